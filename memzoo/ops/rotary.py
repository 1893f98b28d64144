"""Rotary position embedding: channels turn in pairs by an angle that grows
with the position, so that the dot of two rotated vectors depends on the
difference of their positions alone.

  θ_i = base^(−2 i / K) ,  i = 0 … K/2 − 1
  (x_i, x_{i+K/2}) ← rotation by p θ_i of (x_i, x_{i+K/2})

Where the angles come from the inputs instead, they add up from token to token
(`running_angle`) and turn the pairs as they are (`turn_pairs`).

Source: Su et al. 2021, arXiv:2104.09864, eq. 14, 15 and 34. The paper pairs
the channels (2i, 2i + 1); here they are paired by halves (i, i + K/2), as in
most public checkpoints: the same map after a permutation of the channels.
`turn_pairs` has the paper's pairs.
"""

import math

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


def turn_pairs(x: jax.Array, angle: jax.Array) -> jax.Array:
  """Turns the channels (2i, 2i + 1), i < S, of x [..., N] by angle [..., S];
  those from 2S on stay. In x's dtype; float32 inside."""
  turned = 2 * angle.shape[-1]
  y = x.astype(jnp.float32)
  even, odd = y[..., :turned:2], y[..., 1:turned:2]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  pairs = pairs.reshape(pairs.shape[:-2] + (turned,))
  return jnp.concatenate([pairs, y[..., turned:]], axis=-1).astype(x.dtype)


def wrap(angle: jax.Array) -> jax.Array:
  """The same angle in [−π, π]."""
  turns = jnp.round(angle / (2 * math.pi))
  # 2π in two parts: in float32 alone it is off by 1.7e-7 each time.
  return angle - 6.28125 * turns - (2 * math.pi - 6.28125) * turns


def running_angle(start, turn, *, reset=None, mask=None):
  """Sums of turns, each wrapped, so that the error does not grow with them.

  Args:
    start: float32 [...], the angle to go on from.
    turn: float32 [T, ...].
    reset: bool [T] or None; True: the angle is zero before turn t.
    mask: bool [T] or None; False: no turn t.

  Returns:
    (the last angle [...], the angle after each turn [T, ...]).
  """
  flags = lambda x: x.reshape((-1,) + (1,) * (turn.ndim - 1))
  cut = jnp.zeros((turn.shape[0],), bool) if reset is None else reset
  if mask is not None:
    cut &= mask
    turn = jnp.where(flags(mask), turn, 0)

  def add(first, second):
    angle, cut = jnp.where(second[1], 0, first[0]), first[1] | second[1]
    return wrap(angle + second[0]), cut

  sums, cut = jax.lax.associative_scan(add, (turn, flags(cut)))
  angles = wrap(sums + jnp.where(cut, 0, start))
  return angles[-1], angles
