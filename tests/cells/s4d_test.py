"""S4D against Gu et al. 2022 (arXiv:2206.11893), sections 3 and 4."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels
from memzoo.ops import hippo


def discrete(params, kind):
  """Ā, B̄ and C of all N states, complex128: pairs are written out."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  pair = lambda z: np.concatenate([z, z.conj()], axis=1)
  a = pair(-np.exp(p["log_re"]) + 1j * p["im"])
  b = pair(p["b_re"] + 1j * p["b_im"])
  c = pair(p["c_re"] + 1j * p["c_im"])
  dt = np.exp(p["log_dt"])[:, None]
  if kind == "zoh":
    return np.exp(dt * a), (np.exp(dt * a) - 1) / a * b, c
  return (1 + dt * a / 2) / (1 - dt * a / 2), dt * b / (1 - dt * a / 2), c


def paper(params, us, kind="zoh"):
  """x_k = Ā x_{k−1} + B̄ u_k, y_k = C x_k + D u_k."""
  a, b, c = discrete(params, kind)
  x, ys = np.zeros(a.shape, np.complex128), []
  for u in np.asarray(us, np.float64):
    x = a * x + b * u[:, None]
    y = np.sum(c * x, axis=1)
    assert np.abs(y.imag).max() < 1e-12
    ys.append(y.real + np.asarray(params["d"], np.float64) * u)
  return x[:, : a.shape[1] // 2], np.stack(ys)


def test_paper_equation():
  cell = memzoo.tiny("s4d")
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
  # The kernel is the Vandermonde sum K̄_l = Σ_n C_n Ā_n^l B̄_n.
  a, b, c = discrete(params, "zoh")
  powers = a[..., None] ** np.arange(21)
  kernel = np.einsum("dn,dn,dnl->ld", c, b, powers).real
  for d in range(cell.d_model):
    full = np.convolve(kernel[:, d], us[:, d])[:21]
    skip = float(params["d"][d]) * us[:, d]
    np.testing.assert_allclose(full + skip, want[1][:, d], atol=1e-9)


@pytest.mark.parametrize("init_a", ("inv", "lin"))
def test_initializations(init_a):
  """S4D-Inv and S4D-Lin, with the bilinear transform."""
  cell = memzoo.tiny("s4d", init_a=init_a, discretization="bilinear", d_state=8)
  params = cell.init(jax.random.key(0))
  us = checks.inputs(cell, 9)
  out = memzoo.scan(cell, params, None, us, implementation="chunk")
  error = checks.relative((out[0].h, out[1]), paper(params, us, "bilinear"))
  assert error < checks.FORWARD
  for n in range(4):
    want = 8 / np.pi * (8 / (2 * n + 1) - 1) if init_a == "inv" else np.pi * n
    np.testing.assert_allclose(params["im"][:, n], want, rtol=1e-6)
  np.testing.assert_allclose(-np.exp(params["log_re"]), -0.5, rtol=1e-6)
  np.testing.assert_allclose(params["b_re"], 1)
  dt = np.exp(params["log_dt"])
  assert (dt >= 0.02).all() and (dt <= 0.5).all()


def test_legs_tends_to_s4():
  """Theorem 3: as N grows, the states of S4D-LegS, with half of B, answer as
  those of the whole HiPPO-LegS do. Seen in the first four Legendre
  coefficients, V x, at low frequencies s: (s I − A)⁻¹ B."""

  def error(size):
    w, _, b, v = hippo.legs_dplr(size)
    a, b_full = hippo.legs(size)
    w, b, v = (np.concatenate([x, x.conj()], -1) for x in (w, b, v))
    off = total = 0.0
    for s in (0.5j, 2j, 5j, 1 + 3j):
      whole = np.linalg.solve(s * np.eye(size) - a, b_full)[:4]
      off += np.sum(np.abs(v[:4] @ (b / 2 / (s - w)) - whole) ** 2)
      total += np.sum(np.abs(whole) ** 2)
    return (off / total) ** 0.5

  assert error(32) < 0.1 and error(128) < 0.3 * error(32)
  cell = memzoo.make("s4d", d_model=2, d_state=16)
  params = cell.init(jax.random.key(0))
  w, _, b, _ = hippo.legs_dplr(16)
  np.testing.assert_allclose(-np.exp(params["log_re"]), -0.5, rtol=1e-6)
  np.testing.assert_allclose(params["im"][1], w.imag, rtol=1e-6)
  np.testing.assert_allclose(params["b_re"][1], b.real / 2, rtol=1e-5)


def test_signature_behaviour():
  """A delayed copy is learnt. A decaying average c Σ aᵏ u_{t−k} cannot: its
  error is 1 − a¹⁶ (1 − a²) at best, 0.957 at a² = 8/9."""
  options = dict(d_state=16, init_a="lin", dt_min=0.125, dt_max=0.125)
  cell = memzoo.make("s4d", d_model=1, **options)
  error = checks.delay_error(cell, cell.init(jax.random.key(0)))
  assert error < 0.25, error


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(d_state=5), "d_state must be even"),
    (dict(init_a="hippo"), "init_a must be one of"),
    (dict(discretization="euler"), "discretization must be one of"),
    (dict(dt_min=0.2), "needs 0 < dt_min <= dt_max"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="S4D: .*" + message):
    memzoo.make("s4d", d_model=4, **options)
