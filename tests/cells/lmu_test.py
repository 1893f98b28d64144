"""LMU against Voelker et al. 2019, eq. 1 to 7."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special

import memzoo
from memzoo import kernels, tasks


def window(order, theta):
  """Ā, B̄: (2), held for one token."""
  a, b = np.zeros((order, order)), np.zeros((order, 1))
  for i in range(order):
    b[i] = (2 * i + 1) * (-1.0) ** i
    for j in range(order):
      a[i, j] = (2 * i + 1) * (-1 if i < j else (-1.0) ** (i - j + 1))
  system = a / theta, b / theta, np.eye(order), np.zeros((order, 1))
  a, b = scipy.signal.cont2discrete(system, 1.0, "zoh")[:2]
  return a, b[:, 0]


def paper(cell, params, xs):
  """(7), (4), (6)."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  a, b = window(cell.order, cell.theta)
  h, m, ys = np.zeros(cell.d_model), np.zeros(cell.order), []
  for x in np.asarray(xs, np.float64):
    u = x @ p["e_x"][:, 0] + h @ p["e_h"][:, 0] + m @ p["e_m"][:, 0]
    m = a @ m + b * u
    h = np.tanh(x @ p["w_x"] + h @ p["w_h"] + m @ p["w_m"])
    ys.append(h)
  return (h, m), np.stack(ys)


def test_paper_equation():
  cell = memzoo.tiny("lmu")
  params, xs = checks.drawn(cell), checks.inputs(cell, 21)
  want = paper(cell, params, xs)
  forms = ("step", *cell.implementations)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    error = checks.relative((state.h, state.m, ys), (*want[0], want[1]))
    assert error < checks.FORWARD, (form, error)


def remembered(order, theta, us, shares):
  """u(t − θ') of (3) from the memory of a cell that is shown us [T]."""
  cell = memzoo.make("lmu", d_model=1, order=order, theta=float(theta))
  params = cell.init(jax.random.key(0))
  # (7) with e_x = 1 and e_h = e_m = 0: the memory of the signal alone.
  params = params | {"e_x": jnp.ones((1, 1)), "e_h": jnp.zeros((1, 1))}

  @jax.jit
  def run(us):
    def step(state, u):
      state, _ = cell.step(params, state, u)
      return state, state.m

    return jax.lax.scan(step, cell.initial_state(params), us[:, None])[1]

  m = np.asarray(run(jnp.asarray(us, jnp.float32)), np.float64)
  reads = [
    scipy.special.eval_sh_legendre(np.arange(order), share) for share in shares
  ]
  return m @ np.stack(reads, 1)


def test_signature_behaviour():
  """(3): the memory gives back every moment of its window. Signal, window and
  delays are those of the paper's capacity task: white noise with ten cycles in
  a window of 400 tokens, N = 100, delays of a quarter of it. Read without
  training at θ' = delay + ½, the middle of the token that was held, the error
  is under a thousandth of the signal, and under two hundredths at the ends."""
  theta, delays = 400, (0, 100, 200, 300, 399)
  task = tasks.make("delay_lmu_400")
  us = np.asarray(task.batch(0, 0, 1).inputs)[0, :, 0]
  got = remembered(100, theta, us, (np.array(delays) + 0.5) / theta)
  for n, delay in enumerate(delays):
    error = got[theta:, n] - us[theta - delay : len(us) - delay]
    error = np.sqrt(np.mean(error**2) / np.mean(us**2))
    assert error < (0.02 if delay in (0, 399) else 1.5e-3), (delay, error)


def test_fewer_coefficients_remember_less():
  """The window's error grows with the frequency and falls with N, and what is
  older than the window is gone."""
  theta, t = 60, np.arange(400)

  def error(order, cycles):
    us = np.sin(2 * np.pi * cycles * t / theta)
    got = remembered(order, theta, us, [30.5 / theta])[:, 0]
    return np.sqrt(np.mean((got[200:] - us[170:-30]) ** 2))

  assert error(6, 1) < 0.05 < 0.3 < error(6, 4)
  assert error(16, 4) < 0.1
  us = np.zeros(400)
  us[10] = 1.0
  cell = memzoo.make("lmu", d_model=1, order=16, theta=float(theta))
  params = cell.init(jax.random.key(0)) | {"e_h": jnp.zeros((1, 1))}
  run = lambda us: memzoo.scan(cell, params, None, us, implementation="scan")
  for length, low, high in ((40, 1e-2, 9.0), (400, 0.0, 1e-4)):
    m = run(jnp.asarray(us[:length, None], jnp.float32))[0].m
    assert low <= float(jnp.abs(m).max()) <= high, length


def test_training_reads_the_window():
  """Trained alone, it names the bit that it was shown five tokens ago."""

  def bits(key):
    bits = jax.random.bernoulli(key, 0.5, (20,))
    xs = jnp.zeros((20, 6)).at[:, 0].set(jnp.where(bits, 1.0, -1.0))
    targets = jnp.roll(bits, 5).astype(jnp.int32)
    return xs, targets, (jnp.arange(20) >= 5).astype(jnp.float32)

  cell = memzoo.make("lmu", d_model=6, order=8, theta=8.0)
  _, accuracy = checks.learn(cell, bits, 300)
  assert accuracy > 0.9, accuracy


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(order=0), "order must be a positive integer"),
    (dict(theta=0.0), "theta must be above 0"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="LMU: " + message):
    memzoo.make("lmu", d_model=4, **options)
