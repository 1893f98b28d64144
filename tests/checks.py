"""Measures and data that the suites share."""

import re

import jax
import jax.numpy as jnp
import numpy as np

FORWARD, GRADIENT = 1e-5, 1e-4  # float32 on CPU, relative norms


def relative(a, b):
  """The largest ‖a − b‖ / ‖b‖ over the leaves; integers must be equal."""
  worst = 0.0
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
      np.testing.assert_array_equal(x, y)
      continue
    x, y = np.asarray(x, np.complex128), np.asarray(y, np.complex128)
    assert x.shape == y.shape, (x.shape, y.shape)
    difference = np.linalg.norm((x - y).ravel())
    scale = np.linalg.norm(y.ravel())
    worst = max(worst, difference / scale if scale > 1e-30 else difference)
  return worst


def is_float(x):
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def wave(*arrays):
  """A scalar in which every entry of the arrays has its own weight."""
  total = 0.0
  for n, x in enumerate(arrays):
    weights = jnp.cos(0.7 * jnp.arange(x.size, dtype=jnp.float32) + n)
    total += jnp.sum(x.astype(jnp.float32) * weights.reshape(x.shape))
  return total


def half(tree):
  """Floats rounded to bfloat16."""
  return jax.tree.map(
    lambda x: x.astype(jnp.bfloat16) if is_float(x) else x, tree
  )


def single(tree):
  """Floats as float32."""
  return jax.tree.map(
    lambda x: x.astype(jnp.float32) if is_float(x) else x, tree
  )


def trip_counts(compiled) -> list[int]:
  """The iteration counts of the loops of a compiled function."""
  return [
    int(n)
    for n in re.findall(r'known_trip_count":\{"n":"(\d+)"', compiled.as_text())
  ]
