"""LRU against Orvieto et al. 2023 (arXiv:2303.06349), appendix A."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memzoo
from memzoo import kernels


def paper(params, us):
  """x_k = Λ x_{k−1} + exp(γ_log) ⊙ (B u_k), y_k = Re(C x_k) + D ⊙ u_k, in
  complex128."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  lam = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
  b = (p["b_re"] + 1j * p["b_im"]).T  # [N, D], as the paper has it
  c = (p["c_re"] + 1j * p["c_im"]).T
  x, ys = np.zeros(lam.shape, np.complex128), []
  for u in np.asarray(us, np.float64):
    x = lam * x + np.exp(p["gamma_log"]) * (b @ u)
    ys.append((c @ x).real + p["d"] * u)
  return x, np.stack(ys)


def test_paper_equation():
  cell = memzoo.tiny("lru")
  params = cell.init(jax.random.key(0))
  params["gamma_log"] += 0.2 * jnp.arange(5.0)
  us = jax.random.normal(jax.random.key(1), (19, cell.d_model))
  want = paper(params, us)
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((state.h, ys), want) < checks.FORWARD, form


def test_ring_initialization():
  """Lemma 3.2: |λ|² uniform between the squares of the radii, the phase up to
  max_phase; γ = sqrt(1 − |λ|²) gives a driven state unit variance."""
  cell = memzoo.make(
    "lru", d_model=4, d_state=4096, r_min=0.5, r_max=0.9, max_phase=0.3
  )
  p = cell.init(jax.random.key(0))
  p = {k: np.asarray(v, np.float64) for k, v in p.items()}
  radius, phase = np.exp(-np.exp(p["nu_log"])), np.exp(p["theta_log"])
  assert radius.min() >= 0.5 - 1e-6 and radius.max() <= 0.9 + 1e-6
  assert phase.min() >= 0 and phase.max() <= 0.3 + 1e-6
  share = (radius**2 - 0.25) / (0.81 - 0.25)
  tenths = np.linspace(0.1, 0.9, 9)
  np.testing.assert_allclose(np.quantile(share, tenths), tenths, atol=0.03)
  np.testing.assert_allclose(
    np.quantile(phase / 0.3, tenths), tenths, atol=0.03
  )
  gamma = np.sqrt(1 - radius**2)
  np.testing.assert_allclose(np.exp(p["gamma_log"]), gamma, rtol=1e-4)
  for name, variance in (("b_re", 1 / 8), ("c_im", 1 / 4096)):
    assert abs(p[name].var() / variance - 1) < 0.05, name
  # White input of unit variance: E|x|² = |B|² = 1 on average over the ring.
  us = jax.random.normal(jax.random.key(1), (512, 4))
  params = cell.init(jax.random.key(0))
  h = memzoo.scan(cell, params, None, us, implementation="scan")[0].h
  assert abs(np.mean(np.abs(h) ** 2) - 1) < 0.2


def test_widest_ring_is_finite():
  cell = memzoo.make("lru", d_model=2, d_state=4096, r_min=0.999, r_max=1.0)
  params = cell.init(jax.random.key(0))
  assert all(np.isfinite(x).all() for x in params.values())


def test_signature_behaviour():
  """An impulse decays at |λ|^t and turns at λ's phase; and training moves
  both to those of a damped oscillation that it is shown."""
  cell = memzoo.tiny("lru", r_min=0.8, r_max=0.95, max_phase=1.0)
  params = cell.init(jax.random.key(0))
  us = jnp.zeros((30, 6)).at[0, 0].set(1.0)
  step = lambda state, u: (cell.step(params, state, u)[0],) * 2
  _, states = jax.lax.scan(step, cell.initial_state(params), us)
  x = np.asarray(states.h, np.complex128)
  radius = np.exp(-np.exp(np.asarray(params["nu_log"], np.float64)))
  phase = np.exp(np.asarray(params["theta_log"], np.float64))
  t = np.arange(30)[:, None]
  np.testing.assert_allclose(np.abs(x / x[0]), radius**t, rtol=1e-4)
  turned = np.exp(1j * (np.angle(x / x[0]) - phase * t))
  np.testing.assert_allclose(turned, 1, atol=1e-4)

  cell = memzoo.make("lru", d_model=1, d_state=1, r_min=0.6, r_max=0.8)
  us = jnp.zeros((24, 1)).at[0].set(1.0)
  time = jnp.arange(24.0)
  target = 0.9**time * jnp.cos(0.5 * time)
  params = cell.init(jax.random.key(3)) | {"theta_log": jnp.log(jnp.ones(1))}
  optimizer = optax.adam(3e-2)

  def loss(params):
    ys = memzoo.scan(cell, params, None, us)[1]
    return jnp.mean((ys[:, 0] - target) ** 2)

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), value

  train = jax.jit(
    lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=800)
  )
  (params, _), losses = train(params)
  assert losses[-1] < 1e-3 * losses[0], (losses[0], losses[-1])
  np.testing.assert_allclose(
    jnp.exp(-jnp.exp(params["nu_log"])), 0.9, atol=0.01
  )
  np.testing.assert_allclose(jnp.exp(params["theta_log"]), 0.5, atol=0.01)


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(d_state=0), "d_state must be a positive integer"),
    (dict(r_min=0.9, r_max=0.9), "0 <= r_min < r_max <= 1"),
    (dict(r_max=1.1), "0 <= r_min < r_max <= 1"),
    (dict(max_phase=7.0), "max_phase must be in"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="LRU: .*" + message):
    memzoo.make("lru", d_model=4, **options)
