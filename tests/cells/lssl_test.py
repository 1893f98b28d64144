"""LSSL against Gu et al. 2021 (arXiv:2110.13985)."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal
import scipy.special

import memzoo
from memzoo.ops import hippo


def space(params):
  """A = −P (T⁻¹ + S) Q, B = P b, in float64."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  t = np.diag(p["diagonal"])
  t += np.diag(p["lower"], -1) + np.diag(p["upper"], 1)
  a = np.linalg.inv(t) + np.diag(p["s"])
  return p, -np.diag(p["p"]) @ a @ np.diag(p["q"]), p["p"] * p["b"]


def gelu(x):
  """As `jax.nn.gelu`, the approximation by tanh."""
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def paper(params, us, alpha):
  """x_t = Ā x_{t−1} + B̄ u_t, y_t = C x_t + D u_t, for every channel; then the
  map over channels."""
  p, a, b = space(params)
  us = np.asarray(us, np.float64)
  size, (channels, _, outputs) = len(b), p["c"].shape
  x = np.zeros((channels, size))
  ys = np.zeros((len(us), channels, outputs))
  for h, dt in enumerate(np.exp(p["log_dt"])):
    system = a, b[:, None], np.eye(size), np.zeros((size, 1))
    a_bar, b_bar = scipy.signal.cont2discrete(system, dt, "gbt", alpha)[:2]
    for t, u in enumerate(us[:, h]):
      x[h] = a_bar @ x[h] + b_bar[:, 0] * u
      ys[t, h] = x[h] @ p["c"][h] + p["d"][h] * u
  return x, gelu(ys.reshape(len(us), -1)) @ p["out"] + p["out_bias"]


@pytest.mark.parametrize("alpha", (0.5, 0.8))
def test_paper_equation(alpha):
  cell = memzoo.tiny("lssl", alpha=alpha)
  params = jax.tree.map(
    lambda x, y: 0.7 * x + 0.3 * y,
    cell.init(jax.random.key(0)),
    checks.drawn(cell, 0.2),
  )
  us = checks.inputs(cell, 21)
  want = paper(params, us, alpha)
  forms = ("step", *cell.implementations)
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    error = checks.relative((state.h, ys), want)
    assert error < checks.FORWARD, (form, error)


def test_it_starts_at_hippo():
  """The structure holds HiPPO-LegS exactly, and with it the paper's claim that
  the class contains the matrices of continuous-time memory."""
  cell = memzoo.make("lssl", d_model=2, d_state=16)
  _, a, b = space(cell.init(jax.random.key(0)))
  want_a, want_b = hippo.legs(16)
  np.testing.assert_allclose(a, want_a, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(b, want_b, rtol=1e-6)


def test_signature_behaviour():
  """Continuous-time memory: a state holds the past in Legendre polynomials of
  an exponentially warped time, so that a linear read-out, with no training of
  anything else, gives the past back at several delays; and a step half as long
  stretches all of them by two (time-scale adaptation)."""
  size, dt = 32, 0.02
  cell = memzoo.make("lssl", d_model=1, d_state=size, dt_min=dt, dt_max=dt)

  def states(dt, us):
    params = cell.init(jax.random.key(0))
    params["log_dt"] = jnp.log(jnp.full((1,), dt))
    transition, write, _ = cell._space(params)

    def step(h, u):
      h = jnp.einsum("dij,dj->di", transition, h) + write * u
      return h, h[0]

    run = lambda us: jax.lax.scan(step, jnp.zeros((1, size)), us)[1]
    return jax.jit(run)(us)

  t = np.arange(600)
  us = np.sin(0.05 * t) + 0.5 * np.sin(0.11 * t + 1)
  # u at age s: P_n(2 e^{−s} − 1) √(2n + 1), of HiPPO-LegS.
  for step, delays in ((dt, (5, 20, 40)), (dt / 2, (10, 40, 80))):
    x = np.asarray(states(step, jnp.asarray(us, jnp.float32)), np.float64)
    for delay in delays:
      basis = scipy.special.eval_legendre(
        np.arange(size), 2 * np.exp(-step * (delay + 0.5)) - 1
      )
      got = x @ (basis * np.sqrt(2 * np.arange(size) + 1))
      error = got[300:] - us[300 - delay : 600 - delay]
      error = np.sqrt(np.mean(error**2) / np.mean(us**2))
      assert error < 0.05, (step, delay, error)


def test_training_moves_a_and_the_step():
  """A damped oscillation that LegS of two states does not have is learnt, and A
  leaves HiPPO on the way."""
  cell = memzoo.make("lssl", d_model=1, d_state=2, dt_min=0.3, dt_max=0.3)
  us = jnp.zeros((24, 1)).at[0].set(1.0)
  time = jnp.arange(24.0)
  target = 0.9**time * jnp.cos(0.4 * time)
  start = cell.init(jax.random.key(2))
  optimizer = optax.adam(2e-2)

  def loss(params):
    # The state space alone, without the map over channels.
    transition, write, read = cell._space(params)

    def step(h, u):
      h = jnp.einsum("dij,dj->di", transition, h) + write * u
      return h, jnp.einsum("dn,dnm->", h, read)

    ys = jax.lax.scan(step, jnp.zeros((1, 2)), us)[1]
    return jnp.mean((ys - target) ** 2)

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), value

  train = jax.jit(
    lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=800)
  )
  (params, _), losses = train(start)
  assert losses[-1] < 0.02 * losses[0], (losses[0], losses[-1])
  assert np.abs(space(params)[1] - space(start)[1]).max() > 0.3
  assert abs(params["log_dt"][0] - start["log_dt"][0]) > 0.05


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(outputs=0), "outputs must be a positive integer"),
    (dict(alpha=1.5), "alpha must be in"),
    (dict(dt_min=1.0), "needs 0 < dt_min <= dt_max"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="LSSL: " + message):
    memzoo.make("lssl", d_model=4, **options)
