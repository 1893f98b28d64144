"""coRNN against Rusch and Mishra 2020 (arXiv:2010.00951), eq. 3 and the
bounds of section 3."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def paper(cell, params, us):
  """Eq. 3: the velocity from the old position, the position from the new
  velocity; n̄ = n solved for z_n."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  dt, gamma, epsilon = cell.dt, cell.gamma, cell.epsilon
  y = z = np.zeros(cell.d_model)
  ys = []
  for u in np.asarray(us, np.float64):
    a = p["w"].T @ y + p["w_z"].T @ z + p["v"].T @ u + p["b"]
    if cell.implicit:  # z_n (1 + Δt ε) = z_{n−1} + Δt σ(…) − Δt γ y_{n−1}
      z = (z + dt * np.tanh(a) - dt * gamma * y) / (1 + dt * epsilon)
    else:
      z = z + dt * np.tanh(a) - dt * gamma * y - dt * epsilon * z
    y = y + dt * z
    ys.append(y)
  return (y, z), np.stack(ys)


@pytest.mark.parametrize("implicit", [False, True])
def test_paper_equation(implicit):
  cell = memzoo.tiny("co_rnn", gamma=1.3, epsilon=2.0, implicit=implicit)
  params, us = checks.drawn(cell), checks.inputs(cell, 9)
  want = paper(cell, params, us)
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((tuple(state), ys), want) < checks.FORWARD, form


def test_signature_behaviour():
  """It learns to write one bit and to hold it while others pass."""
  cell = memzoo.make("co_rnn", d_model=6, dt=0.3, gamma=1.0, epsilon=2.0)
  cell = checks.ReadOut(cell)
  _, accuracy = checks.learn(cell, checks.marked_bit, 400, rate=3e-2)
  assert accuracy > 0.95, accuracy


def test_energy_is_bounded():
  """|y_n|² + |z_n|² <= m n Δt with γ = ε = 1 and n̄ = n, for weights of any
  size; without the damping it is not."""
  cell = memzoo.make(
    "co_rnn", d_model=6, dt=0.02, gamma=1.0, epsilon=1.0, implicit=True
  )
  n = np.arange(1, 501)
  for scale in (0.5, 50.0):
    params, us = checks.drawn(cell, scale), checks.inputs(cell, 500, scale)
    ys = memzoo.scan(cell, params, None, us)[1]
    y = np.concatenate([np.zeros((1, 6)), np.asarray(ys, np.float64)])
    z = np.diff(y, axis=0) / cell.dt
    energy = np.sum(y[1:] ** 2 + z**2, axis=1)
    assert np.all(energy <= 6 * n * cell.dt * (1 + 1e-3))
    assert energy.max() > 0.1
  push = {**jax.tree.map(jnp.zeros_like, params), "w_z": 50 * jnp.eye(6)}
  push["b"] = jnp.full(6, 1.0)
  free = memzoo.make("co_rnn", d_model=6, dt=0.02, gamma=1.0, epsilon=0.0)
  state = memzoo.scan(free, push, None, us)[0]
  assert np.sum(np.square(state)) > 6 * 500 * 0.02


def test_an_oscillator_alone():
  """Unforced and undamped it swings with frequency √γ and keeps its energy;
  damped it loses exp(−ε t) of it."""
  for gamma in (1.0, 9.0):
    cell = memzoo.make("co_rnn", d_model=1, dt=1e-3, gamma=gamma, epsilon=0.0)
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
    start = type(cell.initial_state(params))(jnp.ones(1), jnp.zeros(1))
    time = 1e-3 * np.arange(1, 4001)
    _, ys = memzoo.scan(cell, params, start, jnp.zeros((4000, 1)))
    want = np.cos(np.sqrt(gamma) * time)
    np.testing.assert_allclose(ys[:, 0], want, atol=1e-2)
  damped = memzoo.make("co_rnn", d_model=1, dt=1e-3, gamma=9.0, epsilon=0.5)
  state, _ = memzoo.scan(damped, params, start, jnp.zeros((4000, 1)))
  energy = 9 * state.y[0] ** 2 + state.z[0] ** 2
  np.testing.assert_allclose(energy, 9 * np.exp(-0.5 * 4), rtol=0.1)


def test_gradients_neither_explode_nor_vanish():
  """The bound of section 3: with γ = ε = 1, n̄ = n, T = N Δt = 1 and weights
  for which Δt (1 + ‖W‖∞) / (1 + Δt) and Δt ‖𝒲‖∞ / (1 + Δt) are at most √Δt,
  |∂E/∂θ| <= (m + Ȳ √m) / 2 for every weight, with E the mean over n of
  ‖y_n − ȳ_n‖² / 2. And the first of 400 inputs still counts in the last
  output's gradient, where a plain recurrent network's is gone."""
  m, length, dt = 6, 400, 1 / 400
  cell = memzoo.make(
    "co_rnn", d_model=m, dt=dt, gamma=1.0, epsilon=1.0, implicit=True
  )
  r = np.random.default_rng(0)
  us = r.uniform(-1, 1, (length, m)).astype(np.float32)
  goal = r.uniform(-1, 1, (length, m)).astype(np.float32)
  room = (1 + dt) * dt**-0.5  # of ‖·‖∞
  weight = lambda norm: norm * np.eye(m, dtype=np.float32)
  params = {
    "v": weight(1.0), "w": weight(room - 1), "w_z": -weight(room),
    "b": np.zeros(m, np.float32),
  }  # fmt: skip

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    ys = memzoo.scan(cell, params, None, us)[1]
    return jnp.mean(jnp.sum((ys - goal) ** 2, axis=1)) / 2

  value, grads = loss(params)
  bound = 0.5 * (m + np.abs(goal).max() * np.sqrt(m))
  worst = max(np.abs(g).max() for g in jax.tree.leaves(grads))
  assert 1e-4 < worst <= bound, (worst, bound)

  def share(name, params, **options):
    cell = memzoo.make(name, d_model=m, **options)
    last = lambda us: jnp.sum(memzoo.scan(cell, params, None, us)[1][-1])
    g = np.linalg.norm(jax.jit(jax.grad(last))(us), axis=1)
    return g[0] / g.max()

  drawn = cell.init(jax.random.key(0))
  options = dict(dt=dt, gamma=1.0, epsilon=1.0, implicit=True)
  assert share("co_rnn", drawn, **options) > 0.1
  plain = memzoo.make("elman", d_model=m, activation="tanh")
  plain = plain.init(jax.random.key(0))
  assert share("elman", plain, activation="tanh") < 1e-4


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(dt=0.0), "dt must be above 0, got 0.0"),
    (dict(gamma=-1.0), "gamma must be above 0, got -1.0"),
    (dict(epsilon=-1.0), "epsilon must be 0 or above, got -1.0"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="CoRNN: " + message):
    memzoo.make("co_rnn", d_model=4, **options)
