"""S4 against Gu et al. 2021 (arXiv:2111.00396), section 3 and appendix C."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

import memzoo
from memzoo.ops import hippo


def dense(params):
  """A = Λ − P P*, B [N], C [N] of every channel, complex128, all N states."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  pair = lambda z: np.concatenate([z, z.conj()], axis=1)
  low = pair(p["p_re"] + 1j * p["p_im"])
  a = [
    np.diag(w) - np.outer(v, v.conj())
    for w, v in zip(pair(-np.exp(p["log_re"]) + 1j * p["im"]), low)
  ]
  b, c = (pair(p[k + "_re"] + 1j * p[k + "_im"]) for k in "bc")
  return np.stack(a), b, c, np.exp(p["log_dt"])


def paper(params, us):
  """x_k = Ā x_{k−1} + B̄ u_k, y_k = C x_k + D u_k, with a dense bilinear
  transform; and the kernel C Āⁱ B̄."""
  a, b, c, dt = dense(params)
  us = np.asarray(us, np.float64)
  size = a.shape[1]
  xs, ys, kernels = [], np.zeros(us.shape), np.zeros(us.shape)
  for d in range(len(a)):
    eye = np.eye(size)
    inverse = np.linalg.inv(eye - dt[d] / 2 * a[d])
    a_bar, b_bar = inverse @ (eye + dt[d] / 2 * a[d]), dt[d] * inverse @ b[d]
    x, power = np.zeros(size, complex), b_bar
    for t, u in enumerate(us[:, d]):
      x = a_bar @ x + b_bar * u
      y = c[d] @ x
      assert abs(y.imag) < 1e-10
      ys[t, d] = y.real + float(params["d"][d]) * u
      kernels[t, d] = (c[d] @ power).real
      power = a_bar @ power
    xs.append(x[: size // 2])
  xs = np.stack(xs)
  return np.concatenate([xs.real, xs.imag], 1), ys, kernels


@pytest.mark.parametrize("length", (21, 32))
def test_paper_equation(length):
  """The recurrence by Woodbury's identity, powers of Ā, and the kernel by
  Cauchy products: all are the dense state space."""
  cell = memzoo.tiny("s4")
  params, us = checks.drawn(cell), checks.inputs(cell, length)
  h, ys, kernel = paper(params, us)
  forms = ("step", *cell.implementations)
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, got) in zip(forms, outs):
    error = checks.relative((state.h, got), (h, ys))
    assert error < checks.FORWARD, (form, error)
  # The convolution view: y = K ∗ u + D u.
  for d in range(cell.d_model):
    full = np.convolve(kernel[:, d], np.asarray(us[:, d], np.float64))[:length]
    full += float(params["d"][d]) * us[:, d].astype(np.float64)
    np.testing.assert_allclose(full, ys[:, d], atol=1e-9)


def test_it_starts_at_hippo():
  """In the basis V, Λ − P P* is HiPPO-LegS and B its B: the outputs are those
  of LegS, with C V*."""
  cell = memzoo.make("s4", d_model=2, d_state=8, dt_min=0.1, dt_max=0.1)
  params = cell.init(jax.random.key(0))
  us = checks.inputs(cell, 12)
  a, b = hippo.legs(8)
  v = hippo.legs_dplr(8)[3]
  system = a, b[:, None], np.eye(8), np.zeros((8, 1))
  a_bar, b_bar = scipy.signal.cont2discrete(system, 0.1, "bilinear")[:2]
  c = np.asarray(params["c_re"], np.float64) + 1j * np.asarray(params["c_im"])
  c = 2 * (c @ v.conj().T).real
  ys = memzoo.scan(cell, params, None, us, implementation="fft")[1]
  for d in range(2):
    x, want = np.zeros(8), []
    for u in us[:, d].astype(np.float64):
      x = a_bar @ x + b_bar[:, 0] * u
      want.append(c[d] @ x + float(params["d"][d]) * u)
    np.testing.assert_allclose(ys[:, d], want, rtol=1e-4, atol=1e-4)


def test_signature_behaviour():
  """Long range: a read-out of the untrained states, fitted by least squares on
  one stretch of noise that is smooth, gives on another back what was 60 tokens
  ago; that of as many states that only decay (Λ without its turn, P = 0) does
  not."""
  size, delay, length = 32, 60, 800
  cell = memzoo.make("s4", d_model=1, d_state=size, dt_min=0.02, dt_max=0.02)
  params = cell.init(jax.random.key(0))
  decays = params | {
    k: jnp.zeros_like(params[k]) for k in ("im", "p_re", "p_im")
  }
  rates = jnp.linspace(-3.0, 3.0, size // 2)  # of all sizes
  decays["log_re"] = rates[None].astype(jnp.float32)
  r = np.random.default_rng(0)
  smooth = np.convolve(r.normal(size=2 * length + 64), np.hanning(31), "valid")
  streams = smooth[:length], smooth[length : 2 * length]

  @jax.jit
  def states(params, us):
    step = lambda s, u: (cell.step(params, s, u)[0],) * 2
    return jax.lax.scan(step, cell.initial_state(params), us[:, None])[1].h

  def error(params):
    h = [
      np.asarray(states(params, jnp.asarray(us, jnp.float32)), np.float64)[:, 0]
      for us in streams
    ]
    past = [us[: length - delay] for us in streams]
    seen = [one[delay:] for one in h]
    fit = np.linalg.lstsq(seen[0], past[0], rcond=1e-6)[0]
    off = seen[1] @ fit - past[1]
    return np.sqrt(np.mean(off**2) / np.mean(past[1] ** 2))

  s4, plain = error(params), error(decays)
  assert s4 < 0.15 and plain > 0.5, (s4, plain)


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(d_state=5), "d_state must be even"),
    (dict(dt_max=1e-4), "needs 0 < dt_min <= dt_max"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="S4: " + message):
    memzoo.make("s4", d_model=4, **options)
