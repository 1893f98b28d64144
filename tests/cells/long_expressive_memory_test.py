"""LEM against Rusch et al. 2021 (arXiv:2110.04744), eq. 3."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels

NAME = "long_expressive_memory"


def paper(params, us, dt):
  """Eq. 3, one step at a time."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  v_1, v_2, v_z, v_y = np.split(p["v"].T, 4)
  w_1, w_2, w_z = np.split(p["w"].T, 3)
  b_1, b_2, b_z, b_y = np.split(p["b"], 4)
  logistic = lambda a: 1 / (1 + np.exp(-a))
  y = z = np.zeros(b_y.shape)
  ys = []
  for u in np.asarray(us, np.float64):
    dt_n = dt * logistic(w_1 @ y + v_1 @ u + b_1)
    dt_bar = dt * logistic(w_2 @ y + v_2 @ u + b_2)
    z = (1 - dt_n) * z + dt_n * np.tanh(w_z @ y + v_z @ u + b_z)
    y = (1 - dt_bar) * y + dt_bar * np.tanh(p["w_y"].T @ z + v_y @ u + b_y)
    ys.append(y)
  return (y, z), np.stack(ys)


@pytest.mark.parametrize("dt", [1.0, 0.3])
def test_paper_equation(dt):
  cell = memzoo.tiny(NAME, dt=dt)
  params, us = checks.drawn(cell), checks.inputs(cell, 9)
  want = paper(params, us, dt)
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((tuple(state), ys), want) < checks.FORWARD, form


def test_signature_behaviour():
  """It learns to write one bit and to hold it while others pass."""
  cell = memzoo.make(NAME, d_model=6)
  _, accuracy = checks.learn(cell, checks.marked_bit, 400, rate=3e-2)
  assert accuracy > 0.95, accuracy


def test_units_keep_their_own_time():
  """With gates that say τ, a state falls by 1 − Δt / τ a step, from some steps
  to thousands in one layer; an input that opens the gates replaces it."""
  cell = memzoo.make(NAME, d_model=6, dt=0.5)
  params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
  tau = np.asarray([1.5, 5.0, 30.0, 200.0, 1e3, 1e4], np.float32)
  params["b"] = jnp.concatenate([jnp.tile(-jnp.log(tau - 1), 2), jnp.zeros(12)])
  start = type(cell.initial_state(params))(jnp.ones(6), jnp.full(6, -1.0))
  state, _ = memzoo.scan(cell, params, start, jnp.zeros((100, 6)))
  want = (1 - 0.5 / np.asarray(tau, np.float64)) ** 100
  np.testing.assert_allclose(state.y, want, rtol=2e-4, atol=1e-30)
  np.testing.assert_allclose(state.z, -want, rtol=2e-4, atol=1e-30)
  # The first input feature opens all gates; the second says what to write.
  params["v"] = params["v"].at[0, :12].set(1e3).at[1, 12:].set(1e3)
  write = jnp.zeros((1, 6)).at[0, :2].set(1.0)
  state, _ = memzoo.scan(cell, params, start, write)
  np.testing.assert_allclose(state.y, 1.0, rtol=1e-6)
  np.testing.assert_allclose(state.z, 0.0, atol=1e-6)


def test_states_are_bounded():
  """No weight, however large, leads a state out of [−1, 1]."""
  cell = memzoo.tiny(NAME, dt=1.0)
  params, us = checks.drawn(cell, scale=5.0), checks.inputs(cell, 200, 5.0)
  state, ys = memzoo.scan(cell, params, None, us)
  assert np.abs(np.stack([*state, *ys])).max() <= 1 + 1e-6


@pytest.mark.parametrize("dt", [0.0, 1.5])
def test_bad_options(dt):
  with pytest.raises(ValueError, match=r"dt must be in \(0, 1\], got"):
    memzoo.make(NAME, d_model=4, dt=dt)
