"""One vector for a sequence, from what is there."""

import jax
import jax.numpy as jnp

POOLS = ("mean", "last")


def pool(kind: str, x, reset=None, mask=None):
  """The mean, or the last, of the inputs that are there.

  Args:
    kind: 'mean' or 'last'.
    x: [B, T, D].
    reset: bool [B, T] or None; what stands before a row's last reset is not
      counted, as if the row had started there.
    mask: bool [B, T] or None.

  Returns:
    float [B, D] in x's dtype; zero for a row without inputs.
  """
  if kind == "last":
    return last(x, mask)
  there = jnp.ones(x.shape[:2], bool) if mask is None else mask
  if reset is not None:
    segment = jnp.cumsum((reset & there).astype(jnp.int32), axis=1)
    there = there & (segment == segment[:, -1:])
  total = jnp.sum(jnp.where(there[..., None], x.astype(jnp.float32), 0), axis=1)
  count = jnp.sum(there.astype(jnp.float32), axis=1, keepdims=True)
  return (total / jnp.maximum(count, 1)).astype(x.dtype)


def last(x, mask=None):
  """x [B, T, D] at each row's last input that is there, [B, D]."""
  if mask is None:
    return x[:, -1]
  index = jnp.where(mask, jnp.arange(x.shape[1]), -1).max(axis=1)
  at = jax.vmap(lambda row, i: row[i])(x, jnp.maximum(index, 0))
  return jnp.where((index >= 0)[:, None], at, 0)
