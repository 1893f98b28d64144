"""Routing of tokens to a few of many memories.

A token goes to the k memories of the largest logits, with shares that are the
softmax of those k: the renormalised top-k of Shazeer et al. 2017,
arXiv:1701.06538, eq. 3 to 5. Each memory then passes the whole sequence with
flags of its own, `Sent`, and the others' tokens are absent for it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Route(NamedTuple):
  """Where tokens go."""

  chosen: jax.Array  # bool [..., M]
  weight: jax.Array  # [..., M] float32, 0 where not chosen


class Sent(NamedTuple):
  """What each memory sees of a sequence."""

  counts: jax.Array  # int32 [T, M]: sent since the reset, this one included
  reset: jax.Array | None  # bool [M, T]: at the first it is sent after a reset
  mask: jax.Array  # bool [M, T]
  empty: jax.Array | None  # bool [M]: a reset, and nothing sent after it


def top_k(logits: jax.Array, k: int, always: int = 0) -> Route:
  """The k largest of logits [..., E] and their shares.

  Args:
    logits: [..., E].
    k: how many are chosen, E or fewer. With 1 the share is 1, and the logits
      get no gradient.
    always: how many memories, after the E, take every token with weight 1.
  """
  top, index = jax.lax.top_k(logits.astype(jnp.float32), k)
  here = jax.nn.one_hot(index, logits.shape[-1])
  weight = jnp.sum(jax.nn.softmax(top)[..., None] * here, axis=-2)
  chosen = jnp.any(here > 0, axis=-2)
  pad = [(0, 0)] * (weight.ndim - 1) + [(0, always)]
  return Route(
    jnp.pad(chosen, pad, constant_values=True),
    jnp.pad(weight, pad, constant_values=1.0),
  )


def sent(counts, chosen, reset=None, mask=None) -> Sent:
  """The flags of each memory over one sequence.

  Args:
    counts: int32 [M], tokens that each was sent before, since its reset.
    chosen: bool [T, M].
    reset: bool [T] or None; True only where `mask` is.
    mask: bool [T] or None.
  """
  there = chosen if mask is None else chosen & mask[:, None]
  seen = there.astype(jnp.int32)
  total = jnp.cumsum(seen, axis=0)
  if reset is None:
    return Sent(counts + total, None, there.T, None)
  start = jnp.where(reset[:, None], total - seen, -counts)
  counts = total - jax.lax.cummax(start, axis=0)
  interrupted = jnp.cumsum(reset.astype(jnp.int32)) > 0
  first = there & interrupted[:, None] & (counts == 1)
  empty = interrupted[-1] & (counts[-1] == 0)
  return Sent(counts, first.T, there.T, empty)


def balance(route: Route, counts, k: int, always: int = 0) -> jax.Array:
  """E Σ_e f_e g_e, with f_e the share of tokens that e was sent: k where all
  are in equal use, more where they are not. Fedus et al. 2021,
  arXiv:2101.03961, eq. 4 to 6, f over the past in place of the batch.

  Args:
    route: [..., E + always].
    counts: int32 [..., E + always], as in `Sent`.
    k: memories a token, as in `top_k`.
    always: as there; not part of the balance.
  """
  count = counts.shape[-1] - always
  used = counts[..., :count].astype(jnp.float32)
  tokens = jnp.sum(used, axis=-1, keepdims=True) / k
  share = used / jnp.maximum(tokens, 1.0)
  return count * jnp.sum(share * route.weight[..., :count], axis=-1)
