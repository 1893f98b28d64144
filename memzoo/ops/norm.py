"""Normalisations over the last axis: float32 inside, the input's dtype out."""

import jax
import jax.numpy as jnp


def rms_norm(
  x: jax.Array, scale: jax.Array | None = None, eps: float = 1e-5
) -> jax.Array:
  """x / rms(x) · scale. Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.

  Args:
    x: [..., D].
    scale: [D] or None for ones.
    eps: added to the mean square.
  """
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  return _scaled(y, scale).astype(x.dtype)


def layer_norm(
  x: jax.Array,
  scale: jax.Array | None = None,
  bias: jax.Array | None = None,
  eps: float = 1e-5,
) -> jax.Array:
  """(x − mean) / deviation · scale + bias. Ba et al. 2016, arXiv:1607.06450.

  Args:
    x: [..., D].
    scale: [D] or None for ones.
    bias: [D] or None for zeros.
    eps: added to the variance.
  """
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  y = _scaled(y, scale)
  if bias is not None:
    y = y + bias.astype(jnp.float32)
  return y.astype(x.dtype)


def l2_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """x / sqrt(Σ x² + eps): unit rows, finite values and gradients at zero."""
  y = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(y), axis=-1, keepdims=True)
  return (y * jax.lax.rsqrt(square + eps)).astype(x.dtype)


def _scaled(y, scale):
  return y if scale is None else y * scale.astype(jnp.float32)
