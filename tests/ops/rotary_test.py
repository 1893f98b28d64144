"""`rotary`: RoFormer's rotation, channels paired by halves."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops import rotary as rotary_lib
from memzoo.ops.rotary import rotary as rotary_op

rotary = jax.jit(rotary_op, static_argnames="base")

T, K = 7, 6


def oracle(x, positions, base=10000.0):
  """Su et al. 2021 eq. 15: R = blocks [[cos mθ, −sin mθ], [sin mθ, cos mθ]],
  θ_i = base^(−2(i−1)/d), i = 1 … d/2; here the i-th pair is (i, i + d/2)."""
  x = np.asarray(x, np.float64)
  y = np.zeros_like(x)
  d = x.shape[-1]
  for t, m in enumerate(positions):
    for i in range(1, d // 2 + 1):
      theta = base ** (-2 * (i - 1) / d)
      c, s = np.cos(m * theta), np.sin(m * theta)
      a, b = x[t, i - 1], x[t, i - 1 + d // 2]
      y[t, i - 1] = c * a - s * b
      y[t, i - 1 + d // 2] = s * a + c * b
  return y


@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_paper_equation(base):
  x = np.random.default_rng(0).normal(size=(T, K)).astype(np.float32)
  positions = np.array([0, 1, 2, 3, 40, 500, 1023], np.int32)
  got = rotary(jnp.asarray(x), jnp.asarray(positions), base=base)
  # The float32 angle is off by up to p · 2⁻²⁴.
  np.testing.assert_allclose(got, oracle(x, positions, base), atol=2e-4)
  near = rotary(jnp.asarray(x[:4]), jnp.asarray(positions[:4]), base=base)
  assert checks.relative(near, oracle(x[:4], positions[:4], base)) < 1e-6


def test_dots_depend_on_the_difference_of_positions():
  q, k = np.random.default_rng(1).normal(size=(2, 1, K)).astype(np.float32)
  q, k = (jnp.broadcast_to(x, (T, K)) for x in (q, k))
  p = jnp.arange(T)
  dots = jnp.sum(rotary(q, p + 5) * rotary(k, p + 2), axis=1)
  np.testing.assert_allclose(dots, np.full(T, dots[0]), rtol=1e-5)
  other = jnp.sum(rotary(q, p + 5) * rotary(k, p + 3), axis=1)
  assert abs(float(other[0] - dots[0])) > 1e-2


def test_layouts_and_dtypes():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(T, 3, K)), jnp.float32)
  p = jnp.arange(T)
  whole = rotary(x, p[:, None])
  for h in range(3):
    np.testing.assert_array_equal(whole[:, h], rotary(x[:, h], p))
  np.testing.assert_allclose(
    whole[4, 1], rotary(x[4, 1], jnp.int32(4)), rtol=1e-6
  )
  half = rotary(x.astype(jnp.bfloat16), p[:, None])
  assert half.dtype == jnp.bfloat16
  exact = rotary(x.astype(jnp.bfloat16).astype(jnp.float32), p[:, None])
  np.testing.assert_array_equal(half, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
  "x, positions, words",
  [
    (np.zeros((T, 5), np.float32), np.arange(T), "even K"),
    (np.zeros((T, K), np.int32), np.arange(T), "floating"),
    (np.zeros((T, K), np.float32), np.arange(T + 1), "positions"),
    (np.zeros((T, K), np.float32), np.zeros(T, np.float32), "positions"),
  ],
)
def test_bad_input(x, positions, words):
  with pytest.raises(ValueError, match=words):
    rotary(jnp.asarray(x), jnp.asarray(positions))


def test_turn_pairs():
  """The paper's pairs, (2i, 2i + 1), as complex numbers; the rest stays."""
  x = np.random.default_rng(0).normal(size=(T, 3, 7)).astype(np.float32)
  angle = np.random.default_rng(1).normal(size=(T, 1, 2)).astype(np.float32)
  z = (x[..., :4:2] + 1j * x[..., 1:4:2]) * np.exp(1j * angle)
  want = x.copy()
  want[..., :4:2], want[..., 1:4:2] = z.real, z.imag
  got = rotary_lib.turn_pairs(jnp.asarray(x), jnp.asarray(angle))
  assert checks.relative(got, want) < 1e-6
  half = rotary_lib.turn_pairs(jnp.asarray(x, jnp.bfloat16), jnp.asarray(angle))
  assert half.dtype == jnp.bfloat16


def test_running_angle():
  """Sums that start again at resets, skip what is masked, and are as exact
  after a long time as at its start."""
  r = np.random.default_rng(0)
  turn = r.uniform(0, 6, size=(3000, 2)).astype(np.float32)
  start = np.asarray([0.5, -1.0], np.float32)
  reset, mask = r.random(3000) < 0.001, r.random(3000) < 0.9
  for flags in (dict(), dict(reset=jnp.asarray(reset), mask=jnp.asarray(mask))):
    at, want = start.astype(np.float64), np.zeros(turn.shape)
    for t in range(3000):
      if not flags or mask[t]:
        at = (0 if flags and reset[t] else at) + turn[t].astype(np.float64)
      want[t] = at
    last, got = jax.jit(rotary_lib.running_angle)(start, turn, **flags)
    np.testing.assert_array_equal(last, got[-1])
    assert np.abs(got).max() <= 3.1416
  assert np.abs(np.exp(1j * np.asarray(got)) - np.exp(1j * want)).max() < 2e-5
