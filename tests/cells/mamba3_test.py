"""Mamba-3 against Lahoti et al. 2026 (arXiv:2603.15569), propositions 1 and 2
and appendix C."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.ops import trapezoid


def softplus(x):
  return np.log1p(np.exp(x))


def paper(cell, params, us):
  """One token, head and rank at a time, with the complex state of proposition
  2: N / 2 oscillations whose state turns, not B and C."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  heads, ranks, n = p["b_bias"].shape
  groups, turning = cell.num_groups, cell.num_angles
  e = len(p["out"])
  size = e // heads
  one = np.ones((heads, ranks, size))
  spread = [p.get(f"mimo_{c}", one) for c in "xzo"]
  h = np.zeros((heads, size, n))
  last = np.zeros((heads, size, n))  # Σ_r x_r B_rᵀ of the token before
  total = np.zeros((heads, turning))
  ys = []

  def vector(raw, name, head, rank):
    raw = raw.reshape(ranks, groups, n)[rank, head * groups // heads]
    raw = raw / np.sqrt(np.mean(raw**2) + 1e-5) * p[name + "_norm"]
    return raw + p[name + "_bias"][head, rank]

  def turn(state, angle):
    """exp(−i angle) times pairs of channels, the last axis of state."""
    z = state[:, : 2 * turning : 2] + 1j * state[:, 1 : 2 * turning : 2]
    z = z * np.exp(-1j * angle)
    state = state.copy()
    state[:, : 2 * turning : 2], state[:, 1 : 2 * turning : 2] = z.real, z.imag
    return state

  gn = groups * n * ranks
  for u in np.asarray(us, np.float64):
    z, x, b, c, dt, a, lam, theta = np.split(
      u @ p["in"], np.cumsum([e, e, gn, gn, heads, heads, heads])
    )
    y = np.zeros((heads, size))
    for i in range(heads):
      delta = softplus(dt[i] + p["dt_bias"][i])
      alpha = np.exp(-delta * max(softplus(a[i]), 1e-4))
      weight = 1 / (1 + np.exp(-lam[i]))
      angle = delta * np.pi * np.tanh(theta)
      part = slice(i * size, (i + 1) * size)
      xs = [x[part] * spread[0][i, r] for r in range(ranks)]
      write = sum(np.outer(xs[r], vector(b, "b", i, r)) for r in range(ranks))
      old = turn(h[i] + (1 - weight) * delta * last[i], angle)
      h[i] = alpha * old + weight * delta * write
      last[i] = write
      total[i] += angle
      for r in range(ranks):
        out = h[i] @ vector(c, "c", i, r) + p["d"][i] * xs[r]
        gate = z[part] * spread[1][i, r]
        y[i] += out * gate / (1 + np.exp(-gate)) * spread[2][i, r]
    ys.append(y.ravel() @ p["out"])
  # The cell's state is held in turned coordinates.
  states = [turn(h[i], -total[i]).T for i in range(heads)]
  return np.stack(states), np.exp(1j * total), np.stack(ys)


@pytest.mark.parametrize(
  "options",
  (
    dict(),
    dict(mimo_rank=1, num_groups=1, rope_fraction=1.0),
    dict(mimo_rank=3, d_state=4),
  ),
)
def test_paper_equation(options):
  cell = memzoo.tiny("mamba3", **options)
  params, us = checks.drawn(cell, 0.2), checks.inputs(cell, 21)
  params["dt_bias"] += 2.0
  want = paper(cell, params, us)
  for form, state, ys in checks.forms(cell, params, us):
    got = state.h.s, np.exp(1j * np.asarray(state.angle)), ys
    assert checks.relative(got, want) < checks.FORWARD, form


def test_trapezoid_is_of_second_order():
  """Proposition 1: with λ = ½ the error of one step is O(Δ³), so that halving
  Δ divides the error at a fixed time by four; with λ = 1, by two."""

  def error(steps, lam):
    dt = 1.0 / steps
    t = np.arange(1, steps + 1) * dt
    gate = lambda x: jnp.full(steps, x, jnp.float32)
    state = trapezoid.State(
      jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1))
    )  # the input at time 0 is 1
    out, _ = trapezoid.trapezoid(
      state, jnp.ones((steps, 1, 1)), jnp.ones((steps, 1, 1)),
      jnp.cos(3 * jnp.asarray(t, jnp.float32))[:, None, None],
      log_decay=gate(-2 * dt), gamma=gate(lam * dt), beta=gate((1 - lam) * dt),
      implementation="chunk",
    )  # fmt: skip
    # ∫ exp(−2 (1 − s)) cos(3 s) ds over [0, 1].
    exact = (2 * np.cos(3) + 3 * np.sin(3) - 2 * np.exp(-2)) / 13
    return abs(float(out.s[0, 0]) - exact)

  assert error(8, 0.5) / error(16, 0.5) == pytest.approx(4, rel=0.1)
  assert error(8, 1.0) / error(16, 1.0) == pytest.approx(2, rel=0.2)
  assert error(16, 0.5) < 0.2 * error(16, 1.0)


def test_initialization():
  cell = memzoo.make("mamba3", d_model=8, d_state=4, head_dim=4, mimo_rank=3)
  params = jax.jit(cell.init)(jax.random.key(0))
  dt = jax.nn.softplus(params["dt_bias"])
  assert (dt >= 0.99e-3).all() and (dt <= 0.101).all()
  for name in ("b_bias", "c_bias", "b_norm", "c_norm", "d", "mimo_z"):
    assert (params[name] == 1).all()
  np.testing.assert_allclose(params["mimo_x"], 1 / 3, rtol=1e-6)
  np.testing.assert_allclose(params["mimo_o"], 1 / 3, rtol=1e-6)
  assert params["in"].shape == (8, 2 * 16 + 2 * 3 * 4 + 3 * 4 + 1)


def parity(key, length=10):
  """Bits, and after each the parity of those so far: input [0, 1, is first]."""
  bits = jax.random.bernoulli(key, 0.5, (length,)).astype(jnp.int32)
  xs = jnp.zeros((length, 6)).at[jnp.arange(length), bits].set(1.0)
  xs = xs.at[0, 2].set(1.0)
  return xs, jnp.cumsum(bits) % 2, jnp.ones(length)


def test_signature_behaviour():
  """State tracking: a plane that turns by half a circle at each 1 keeps the
  parity of a stream, which Mamba-2, with decays between 0 and 1, cannot, and
  goes on past the length that it learnt at."""
  options = dict(d_model=6, d_state=4, head_dim=6, dt_min=0.5, dt_max=2.0)
  mamba3 = memzoo.make("mamba3", **options, rope_fraction=1.0)
  params, accuracy = checks.learn(mamba3, parity, 300, rate=2e-2)
  assert accuracy > 0.98, accuracy
  keys = jax.random.split(jax.random.key(9), 64)
  xs, targets, _ = jax.vmap(lambda key: parity(key, 30))(keys)
  run = lambda x: memzoo.scan(mamba3, params, None, x, implementation="chunk")
  right = jnp.argmax(jax.jit(jax.vmap(run))(xs)[1], -1) == targets
  assert right.mean() > 0.9
  _, other = checks.learn(memzoo.make("mamba2", **options), parity, 300, 2e-2)
  assert other < 0.85, other


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(head_dim=5), "head_dim=5 must divide d_inner=16"),
    (dict(head_dim=4, num_groups=3), "num_groups=3 must divide num_heads=4"),
    (dict(expand=0.7), "expand · d_model must be a positive whole number"),
    (dict(rope_fraction=1.5), "needs 0 < rope_fraction <= 1"),
    (dict(d_state=2), "two channels to turn"),
    (dict(dt_min=0.2), "needs 0 < dt_min <= dt_max"),
    (dict(mimo_rank=0), "mimo_rank must be a positive integer"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="Mamba3: .*" + message):
    memzoo.make("mamba3", d_model=8, **options)
