"""Dots under strict promotion: the caller's dtype in and out."""

import jax
import jax.numpy as jnp


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
  """x [..., D] @ w [D, N] in x's dtype, accumulated in float32.

  Works on one input [D] and on a sequence [T, D] alike. The precision of
  float32 operands is `jax.default_matmul_precision`, as for every layer of
  the caller's own network.
  """
  y = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
  return y.astype(x.dtype)


def dot_complex(x: jax.Array, re: jax.Array, im: jax.Array) -> jax.Array:
  """x [..., D] @ (re + i im) [D, N], real in, complex64 [..., N] out.

  A sequence takes one product with both matrices side by side. One input takes
  two: side by side, all weights are copied for it.
  """
  if x.ndim == 1:
    parts = dot(x, re), dot(x, im)
  else:
    parts = jnp.split(dot(x, jnp.concatenate([re, im], axis=1)), 2, axis=-1)
  return jax.lax.complex(*(y.astype(jnp.float32) for y in parts))


def dot_real(h: jax.Array, re: jax.Array, im: jax.Array, dtype) -> jax.Array:
  """Re(h [..., N] @ (re + i im) [N, D]), complex in, [..., D] of `dtype` out;
  for a sequence and for one input as `dot_complex`."""
  parts = h.real.astype(dtype), h.imag.astype(dtype)
  if h.ndim == 1:
    y, z = (
      jnp.matmul(p, w.astype(dtype), preferred_element_type=jnp.float32)
      for p, w in zip(parts, (re, im))
    )
    return (y - z).astype(dtype)
  return dot(jnp.concatenate(parts, axis=-1), jnp.concatenate([re, -im]))


def dot_blocks(x: jax.Array, w: jax.Array, parts: int) -> jax.Array:
  """x [..., D] times matrices that are block-diagonal: heads that do not mix.

  Args:
    x: [..., D], heads of N entries, one after the other.
    w: [D, parts · N] of x's dtype, the blocks [N, parts · N] of all heads one
      under the other; columns are part by part. With one head, [D, parts · D].
    parts: how many products, as the gates of a cell.

  Returns:
    float32 [..., parts · D], part by part, and in each head by head.
  """
  width = w.shape[1] // parts
  if width == w.shape[0]:
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)
  heads = x.reshape(*x.shape[:-1], -1, width)
  blocks = w.reshape(-1, width, parts, width)
  y = jnp.einsum(
    "...hn,hnpm->...phm", heads, blocks, preferred_element_type=jnp.float32
  )
  return y.reshape(*x.shape[:-1], -1)
