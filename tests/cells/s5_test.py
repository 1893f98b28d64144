"""S5 against Smith et al. 2022 (arXiv:2208.04933), sections 3 and 4."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memzoo
from memzoo import kernels
from memzoo.ops import hippo


def discrete(params, kind="zoh"):
  """Λ̄ [N], B̄ [N, D], C̃ [D, N] of all states, complex128."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  pair = lambda z: np.concatenate([z, z.conj()])
  a = pair(p["re"] + 1j * p["im"])
  b = pair((p["b_re"] + 1j * p["b_im"]).T)
  c = pair(p["c_re"] + 1j * p["c_im"]).T
  dt = np.tile(np.exp(p["log_dt"]), 2)
  if kind == "zoh":
    a_bar = np.exp(dt * a)
    return a_bar, ((a_bar - 1) / a)[:, None] * b, c
  inverse = 1 / (1 - dt * a / 2)
  return inverse * (1 + dt * a / 2), (inverse * dt)[:, None] * b, c


def paper(params, us, kind="zoh"):
  """x_k = Λ̄ x_{k−1} + B̄ u_k, y_k = C̃ x_k + D u_k."""
  a, b, c = discrete(params, kind)
  x, ys = np.zeros(a.shape, np.complex128), []
  for u in np.asarray(us, np.float64):
    x = a * x + b @ u
    y = c @ x
    assert np.abs(y.imag).max() < 1e-12
    ys.append(y.real + np.asarray(params["d"], np.float64) * u)
  return x[: len(a) // 2], np.stack(ys)


def test_paper_equation():
  cell = memzoo.tiny("s5")
  params = checks.drawn(cell)
  us = np.asarray(checks.inputs(cell, 21), np.float64)
  want = paper(params, us)
  forms = ("step", *cell.implementations)
  run = lambda form: memzoo.scan(
    cell, params, None, jnp.asarray(us, jnp.float32), implementation=form
  )
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((state.h, ys), want) < checks.FORWARD, form
  # The kernel is the Vandermonde sum K_l = C̃ Λ̄^l B̄.
  a, b, c = discrete(params)
  kernel = np.einsum("dn,nl,ne->lde", c, a[:, None] ** np.arange(21), b).real
  full = sum(
    np.pad(us[: 21 - lag] @ kernel[lag].T, ((lag, 0), (0, 0)))
    for lag in range(21)
  )
  skip = np.asarray(params["d"], np.float64) * us
  np.testing.assert_allclose(full + skip, want[1], atol=1e-9)


def test_bilinear():
  cell = memzoo.tiny("s5", discretization="bilinear")
  params, us = cell.init(jax.random.key(0)), checks.inputs(cell, 9)
  out = memzoo.scan(cell, params, None, us, implementation="scan")
  want = paper(params, us, "bilinear")
  assert checks.relative((out[0].h, out[1]), want) < checks.FORWARD


def test_initialization():
  """Λ is that of HiPPO-N, J times over; B̃ = V* B and C̃ = C V with V unitary,
  so that B̃'s pairs carry B's variance, 1 / D."""
  cell = memzoo.make("s5", d_model=64, d_state=64, blocks=4)
  params = cell.init(jax.random.key(0))
  a, _ = hippo.legs(16)
  p = np.sqrt(np.arange(16) + 0.5)
  normal = np.linalg.eigvals(a + np.outer(p, p))
  want = np.sort(normal.imag[normal.imag < 0])
  np.testing.assert_allclose(
    np.sort(params["im"]), np.sort(np.tile(want, 4)), rtol=1e-5
  )
  np.testing.assert_allclose(params["re"], -0.5, rtol=1e-6)
  assert params["im"].shape == (32,)
  power = np.mean(params["b_re"] ** 2 + params["b_im"] ** 2)
  assert abs(power * 64 - 1) < 0.1
  power = np.mean(params["c_re"] ** 2 + params["c_im"] ** 2)
  assert abs(power * 64 / 2 - 1) < 0.1
  dt = np.exp(params["log_dt"])
  assert (dt >= 0.999e-3).all() and (dt <= 0.1001).all() and dt.std() > 0.005


def test_clipped_eigenvalues_do_not_grow():
  params = memzoo.tiny("s5").init(jax.random.key(0))
  params = params | {"re": jnp.full((6,), 0.3)}
  us = jnp.zeros((400, 5)).at[0].set(1.0)
  sizes = []
  for clip in (False, True):
    cell = memzoo.tiny("s5", clip_eigs=clip)
    state = memzoo.scan(cell, params, None, us, implementation="scan")[0]
    sizes.append(float(jnp.abs(state.h).max()))
  assert sizes[0] > 10 and sizes[1] < 3, sizes


def test_signature_behaviour():
  """Two channels come back, one 8 and one 3 steps later and exchanged: one
  state space serves both. Decaying averages c Σ aᵏ u_{t−k} leave, at best,
  1 − a^{2n} (1 − a²) of a copy's variance after n steps: 0.93 of these two's.
  """
  cell = memzoo.make(
    "s5", d_model=2, d_state=32, blocks=2, dt_min=0.05, dt_max=0.2
  )
  optimizer = optax.adam(1e-2)

  def loss(params, key):
    us = jax.random.normal(key, (16, 32, 2))
    ys = jax.vmap(lambda us: memzoo.scan(cell, params, None, us)[1])(us)
    want = jnp.stack([us[:, :-8, 1], us[:, 5:-3, 0]], -1)
    return jnp.mean((ys[:, 8:] - want) ** 2)

  def step(carry, key):
    params, state = carry
    grads = jax.grad(loss)(params, key)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def train(params):
    keys = jax.random.split(jax.random.key(1), 500)
    carry = params, optimizer.init(params)
    params = jax.lax.scan(step, carry, keys)[0][0]
    return loss(params, jax.random.key(2))

  error = train(cell.init(jax.random.key(0)))
  assert error < 0.2, error


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(d_state=6, blocks=2), "even number of states"),
    (dict(blocks=0), "blocks must be a positive integer"),
    (dict(discretization="euler"), "discretization must be one of"),
    (dict(dt_min=0.0), "needs 0 < dt_min <= dt_max"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="S5: .*" + message):
    memzoo.make("s5", d_model=4, **options)
