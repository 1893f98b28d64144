"""SRU against Lei et al. 2018 (arXiv:1709.02755v5), section 3."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def paper(cell, params, xs):
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  w, w_f, w_r = np.split(p["w"], 3, axis=1)
  (v_f, v_r), (b_f, b_r) = np.split(p["v"], 2), np.split(p["b"], 2)
  alpha = np.sqrt(1 + np.exp(cell.highway_bias) * 2)
  c, hs = np.zeros(cell.d_model), []
  for x in np.asarray(xs, np.float64):
    f = sigmoid(x @ w_f + v_f * c + b_f)
    r = sigmoid(x @ w_r + v_r * c + b_r)
    c = f * c + (1 - f) * (x @ w)
    hs.append(r * c + (1 - r) * x * alpha)
  return c, np.stack(hs)


@pytest.mark.parametrize("bias", (0.0, -2.0))
def test_paper_equation(bias):
  cell = memzoo.tiny("sru", highway_bias=bias)
  params, xs = checks.drawn(cell), checks.inputs(cell, 19)
  want = paper(cell, params, xs)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, ("step", "scan", "pallas"))))()
  for state, ys in outs:
    assert checks.relative((state.c, ys), want) < checks.FORWARD


def test_start():
  """Var W = 1 / D; what enters a gate has the variance 1 for x and c of 1; the
  outputs of a deep stack keep the variance of its input (section 3)."""
  cell = memzoo.make("sru", d_model=256, highway_bias=-2.0)
  params = cell.init(jax.random.key(0))
  assert abs(params["w"][:, :256].var() * 256 - 1) < 0.03
  assert abs(params["w"][:, 256:].var() * 256 - 0.5) < 0.03
  assert abs(params["v"].var() - 0.5) < 0.06
  np.testing.assert_array_equal(params["b"][256:], -2.0)

  deep = memzoo.make("sru", d_model=64, highway_bias=-2.0)
  xs = jax.random.normal(jax.random.key(1), (64, 64))

  def layer(xs, key):
    return memzoo.scan(deep, deep.init(key), None, xs)[1], None

  ys, _ = jax.lax.scan(layer, xs, jax.random.split(jax.random.key(2), 12))
  assert 0.3 < ys.var() < 3, ys.var()


def test_signature_behaviour():
  """A gate sees of the state its own entry alone: no entry moves another. With
  f = 1 entries are kept to the bit, with f = 0 replaced; with r = 0 the input
  passes. And it learns to write one bit and to hold it."""
  cell = memzoo.make("sru", d_model=6)
  params = checks.drawn(cell)
  xs = jnp.asarray(checks.inputs(cell, 30))
  start = cell.initial_state(params)._replace(c=jnp.linspace(-1.0, 1.0, 6))
  end = lambda s: memzoo.scan(cell, params, s, xs[:3])[0].c
  moved = jax.jacobian(end)(start).c
  assert (moved[~np.eye(6, dtype=bool)] == 0).all()
  assert (jnp.diag(moved) != 0).all()

  gates = {"w": params["w"].at[:, 6:].set(0.0), "v": jnp.zeros(12)}
  bias = lambda f, r: {"b": jnp.repeat(jnp.array([f, r]), 6)}
  kept, ys = memzoo.scan(cell, params | gates | bias(100.0, -200.0), start, xs)
  np.testing.assert_array_equal(kept.c, start.c)
  np.testing.assert_allclose(ys, 3**0.5 * xs, rtol=1e-6)
  gone, ys = memzoo.scan(cell, params | gates | bias(-200.0, 100.0), start, xs)
  np.testing.assert_array_equal(ys[-1], gone.c)
  np.testing.assert_allclose(ys, xs @ params["w"][:, :6], rtol=1e-5, atol=1e-6)

  _, accuracy = checks.learn(cell, checks.marked_bit, 400, rate=3e-2)
  assert accuracy > 0.95, accuracy


def test_bad_options():
  with pytest.raises(ValueError, match="SRU: d_model must be a positive"):
    memzoo.make("sru", d_model=0)
