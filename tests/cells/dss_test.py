"""DSS against Gupta et al. 2022 (arXiv:2203.14343), proposition 1."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels
from memzoo.ops import hippo


def kernel(params, length, normalised):
  """K̄ of proposition 1 over `length` tokens, float64 [length, D]."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  re = p["re"] if normalised else -np.exp(p["log_re"])
  rate = re + 1j * p["im"]
  dt, w = np.exp(p["log_dt"]), p["w_re"] + 1j * p["w_im"]
  out = np.zeros((length, len(dt)))
  for d in range(len(dt)):
    exp = np.exp(np.outer(rate, np.arange(length)) * dt[d])  # exp(P)
    if normalised:
      rows = exp / exp.sum(axis=1, keepdims=True)
    else:
      rows = (np.exp(rate * dt[d]) - 1)[:, None] * exp
    out[:, d] = ((w[d] / rate) @ rows).real
  return out


def outputs(cell, params, us):
  forms = ("step", *cell.implementations)
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  with kernels.interpret():
    return dict(zip(forms, jax.jit(lambda: list(map(run, forms)))()))


@pytest.mark.parametrize("length", (None, 21, 40))
def test_paper_equation(length):
  """The convolution with K̄. With a softmax over 40 tokens the first 21 of
  them are seen, and some λ grow."""
  cell = memzoo.tiny("dss", length=length)
  params, us = checks.drawn(cell), checks.inputs(cell, 21)
  if length is not None:
    params["re"] = np.asarray([-0.4, 0.3, 0.9], np.float32)
  k = kernel(params, length or 21, length is not None)
  want = np.stack(
    [np.convolve(k[:, d], us[:, d].astype(np.float64))[:21] for d in range(5)],
    axis=1,
  )
  want += np.asarray(params["d"], np.float64) * us
  for form, (_, ys) in outputs(cell, params, us).items():
    assert checks.relative(ys, want) < checks.FORWARD, form


def test_growth_stays_in_range():
  """exp(L Δ λ) is e⁸⁰, and K̄ is at most w / λ."""
  cell = memzoo.make("dss", d_model=1, d_state=1, length=40)
  params = cell.init(jax.random.key(0))
  params["re"], params["log_dt"] = jnp.asarray([2.0]), jnp.zeros((1,))
  grads, ys = jax.grad(
    lambda p: (lambda y: (jnp.sum(y), y))(
      memzoo.scan(cell, p, None, jnp.ones((40, 1)), implementation="scan")[1]
    ),
    has_aux=True,
  )(params)
  assert np.isfinite(ys).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  want = kernel(params, 40, True).sum() + float(params["d"][0])
  np.testing.assert_allclose(ys[-1, 0], want, rtol=1e-4)


@pytest.mark.parametrize("length", (None, 12))
def test_any_diagonalisable_state_space(length):
  """Proposition 1: a dense A, B and C are a Λ and a w, by exp and softmax."""
  r = np.random.default_rng(3)
  a = r.normal(size=(4, 4)) - 3 * np.eye(4)
  b, c, dt = r.normal(size=4), r.normal(size=4), 0.3
  rate, v = np.linalg.eig(a)
  w = (c @ v) * np.linalg.solve(v, b)
  name = "log_re"
  start = np.log(-rate.real)
  if length is not None:
    w, name, start = w * (np.exp(length * rate * dt) - 1), "re", rate.real
  cell = memzoo.make("dss", d_model=1, d_state=4, length=length)
  params = {
    name: start, "im": rate.imag, "log_dt": np.log([dt]), "w_re": w.real[None],
    "w_im": w.imag[None], "d": np.zeros(1),
  }  # fmt: skip
  params = {k: jnp.asarray(x, jnp.float32) for k, x in params.items()}
  us = checks.inputs(cell, 12)
  ys = memzoo.scan(cell, params, None, us, implementation="chunk")[1]
  # Zero-order hold by the series of exp, x_k = exp(ΔA) x_{k−1} + …
  step = np.eye(4)
  hold = np.zeros((4, 4))
  term = np.eye(4) * dt
  for n in range(1, 40):
    hold = hold + term
    term = term @ a * dt / (n + 1)
  step = step + a @ hold
  x, want = np.zeros(4), []
  for u in us[:, 0].astype(np.float64):
    x = step @ x + hold @ b * u
    want.append([c @ x])
  assert checks.relative(ys, np.asarray(want)) < 1e-4


def test_initialization():
  """The frequencies are those of the skew part of HiPPO-LegS of 2N states."""
  for length in (None, 100):
    cell = memzoo.make("dss", d_model=3, d_state=8, length=length)
    params = cell.init(jax.random.key(0))
    re = -np.exp(params["log_re"]) if length is None else params["re"]
    np.testing.assert_allclose(re, -0.5, rtol=1e-6)
    skew = hippo.legs(16)[0]
    frequencies = np.linalg.eigvals((skew - skew.T) / 2).imag
    want = np.sort(frequencies)[::-1][:8]
    np.testing.assert_allclose(params["im"], want, rtol=1e-5)
    dt = np.exp(params["log_dt"])
    assert (dt >= 0.99e-3).all() and (dt <= 0.101).all()


def test_softmax_has_a_last_token():
  cell = memzoo.tiny("dss", length=12)
  params = cell.init(jax.random.key(0))
  with pytest.raises(ValueError, match="got 13 inputs, holds at most 12"):
    memzoo.scan(cell, params, None, checks.inputs(cell, 13))


@pytest.mark.parametrize("length", (None, 32))
def test_signature_behaviour(length):
  """Without S4's low rank a delayed copy is learnt. A decaying average
  c Σ aᵏ u_{t−k} cannot: its error is 1 − a¹⁶ (1 − a²) at best, 0.957."""
  options = dict(d_state=16, length=length, dt_min=0.125, dt_max=0.125)
  cell = memzoo.make("dss", d_model=1, **options)
  error = checks.delay_error(cell, cell.init(jax.random.key(0)))
  assert error < 0.25, error


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(d_state=0), "d_state must be a positive integer"),
    (dict(length=0), "length must be a positive integer"),
    (dict(dt_min=0.2), "needs 0 < dt_min <= dt_max"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="DSS: .*" + message):
    memzoo.make("dss", d_model=4, **options)
