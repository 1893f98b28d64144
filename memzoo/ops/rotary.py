"""Rotary position embedding: channels turn in pairs by an angle that grows
with the position, so that the dot of two rotated vectors depends on the
difference of their positions alone.

  θ_i = base^(−2 i / K) ,  i = 0 … K/2 − 1
  (x_i, x_{i+K/2}) ← rotation by p θ_i of (x_i, x_{i+K/2})

Source: Su et al. 2021, arXiv:2104.09864, eq. 14, 15 and 34. The paper pairs
the channels (2i, 2i + 1); here they are paired by halves (i, i + K/2), as in
most public checkpoints: the same map after a permutation of the channels.
"""

import jax
import jax.numpy as jnp

from memzoo.ops import arguments


def rotary(
  x: jax.Array, positions: jax.Array, *, base: float = 10000.0
) -> jax.Array:
  """Rotates x by its positions.

  Angles are float32: their rounding error grows with the position p, as
  p · 2⁻²⁴ radians for the fastest pair.

  Args:
    x: [..., K], K even.
    positions: int32, broadcastable to x.shape[:-1]: [T] for x [T, K],
      [T, 1] for x [T, H, K], [] for x [K].
    base: of the frequencies.

  Returns:
    Like x; float32 inside.

  Raises:
    ValueError: on an odd K, or positions of another dtype or shape.
  """
  width = jnp.shape(x)[-1] if jnp.ndim(x) else 1
  if width % 2 or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    arguments.fail("rotary", "x", "floating [..., K] with an even K", x)
  shape, want = jnp.shape(positions), jnp.shape(x)[:-1]
  fits = len(shape) <= len(want) and all(
    p in (1, n) for p, n in zip(shape[::-1], want[::-1])
  )
  if not fits or not jnp.issubdtype(jnp.result_type(positions), jnp.integer):
    arguments.fail(
      "rotary", "positions", f"integers that broadcast to {want}", positions
    )
  exponent = jnp.arange(width // 2, dtype=jnp.float32) * (2.0 / width)
  angle = positions.astype(jnp.float32)[..., None] * base**-exponent
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return turned.astype(x.dtype)
