"""UnICORNN against Rusch and Mishra 2021 (arXiv:2103.05487), section 2."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def paper(cell, params, us):
  """The discretised layer, one neuron at a time."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  ys, zs = np.zeros((2, len(us), cell.d_model))
  for n in range(cell.d_model):
    y = z = 0.0
    dt = cell.dt / (1 + np.exp(-p["c"][n]))
    for t, u in enumerate(np.asarray(us, np.float64)):
      net = p["w"][n] * y + p["v"][:, n] @ u + p["b"][n]
      z = z - dt * (np.tanh(net) + cell.alpha * y)
      y = y + dt * z
      ys[t, n], zs[t, n] = y, z
  return (ys[-1], zs[-1]), ys


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_paper_equation(alpha):
  cell = memzoo.tiny("unicornn", alpha=alpha)
  params, us = checks.drawn(cell), checks.inputs(cell, 9)
  want = paper(cell, params, us)
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((tuple(state), ys), want) < checks.FORWARD, form


def test_signature_behaviour():
  """No state is lost: volume is kept by every step, and the first state is
  had back from the last one and the inputs; and a layer learns to hold a bit
  while noise passes."""
  cell = memzoo.make("unicornn", d_model=6, dt=0.3, alpha=1.0)
  params, us = checks.drawn(cell), checks.inputs(cell, 200)
  start = type(cell.initial_state(params))(
    jnp.linspace(-1, 1, 6), jnp.linspace(2, 0, 6)
  )

  def one(flat):
    state = type(start)(*jnp.split(flat, 2))
    return jnp.concatenate(cell.step(params, state, us[0])[0])

  jacobian = jax.jacobian(one)(jnp.concatenate(start))
  np.testing.assert_allclose(np.linalg.det(jacobian), 1.0, rtol=1e-5)
  state, _ = memzoo.scan(cell, params, start, us)
  y, z = (np.asarray(s, np.float64) for s in state)
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  dt = 0.3 / (1 + np.exp(-p["c"]))
  for u in us[::-1]:
    y = y - dt * z
    z = z + dt * (np.tanh(p["w"] * y + u @ p["v"] + p["b"]) + y)
  assert checks.relative((y, z), tuple(start)) < 1e-3

  cell = checks.ReadOut(memzoo.make("unicornn", d_model=6, dt=0.5, alpha=0.0))
  _, accuracy = checks.learn(cell, checks.early_bit, 300, rate=1e-2)
  assert accuracy > 0.95, accuracy


def test_an_oscillator_alone_keeps_its_energy():
  cell = memzoo.make("unicornn", d_model=1, dt=0.1, alpha=4.0)
  params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
  start = type(cell.initial_state(params))(jnp.ones(1), jnp.zeros(1))
  _, ys = memzoo.scan(cell, params, start, jnp.zeros((2000, 1)))
  # σ̂(0) = 1/2: a step of 0.05, a period of 2π / √4 / 0.05 steps.
  time = 0.05 * np.arange(1, 201)
  np.testing.assert_allclose(ys[:200, 0], np.cos(2 * time), atol=0.1)
  swings = np.abs(ys[:, 0]).reshape(10, -1).max(axis=1)
  np.testing.assert_allclose(swings, 1.0, atol=0.01)


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(dt=0.0), "dt must be above 0, got 0.0"),
    (dict(alpha=-1.0), "alpha must be 0 or above, got -1.0"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="UnICORNN: " + message):
    memzoo.make("unicornn", d_model=4, **options)
