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
