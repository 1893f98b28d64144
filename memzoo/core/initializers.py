"""Initializers that cells share, as functions of (key, shape)."""

import math

import jax
import jax.numpy as jnp


def lecun_normal(key, shape, fan_in: int | None = None):
  """Normal with variance 1 / fan_in, cut at two deviations; `shape` is
  [in, out] and fan_in its first axis by default."""
  fan_in = shape[0] if fan_in is None else fan_in
  scale = math.sqrt(1.0 / max(fan_in, 1)) / 0.87962566103423978
  return scale * jax.random.truncated_normal(key, -2.0, 2.0, shape)


def glorot_uniform(key, shape):
  """Uniform in ±sqrt(6 / (in + out)) for `shape` [in, out]."""
  limit = math.sqrt(6.0 / (shape[0] + shape[1]))
  return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def orthogonal(key, shape):
  """Orthonormal rows or columns, whichever are fewer."""
  return jax.nn.initializers.orthogonal()(key, shape, jnp.float32)


def uniform(key, shape, limit):
  """Uniform in ±limit."""
  return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def inverse_softplus(x):
  """z with softplus(z) = x, for x > 0."""
  return x + jnp.log(-jnp.expm1(-x))


def log_uniform(key, shape, low: float, high: float):
  """exp of a uniform draw between log(low) and log(high)."""
  return jnp.exp(
    jax.random.uniform(key, shape, minval=math.log(low), maxval=math.log(high))
  )


def orthogonal_blocks(key, width: int, heads: int):
  """Orthogonal blocks [width / heads, width / heads], one under the other."""
  n = width // heads
  keys = [key] if heads == 1 else jax.random.split(key, heads)
  return jnp.concatenate([orthogonal(k, (n, n)) for k in keys])
