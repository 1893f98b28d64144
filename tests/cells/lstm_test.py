"""LSTM against Hochreiter and Schmidhuber 1997 with the forget gate of Gers,
Schmidhuber and Cummins 2000."""

import checks
import jax
import jax.numpy as jnp
import numpy as np

import memzoo


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def paper(params, xs):
  """1997, appendix A.1, with what the docstring says of squashing functions,
  and the forget gate's factor of 2000, section 3: one gate at a time."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  w = dict(zip("ifgo", np.split(p["w"], 4, axis=1)))
  u = dict(zip("ifgo", np.split(p["u"], 4, axis=1)))
  b = dict(zip("ifgo", np.split(p["b"], 4)))
  h = c = np.zeros(p["w"].shape[0])
  ys = []
  for x in np.asarray(xs, np.float64):
    net = {k: x @ w[k] + h @ u[k] + b[k] for k in "ifgo"}
    c = sigmoid(net["f"]) * c + sigmoid(net["i"]) * np.tanh(net["g"])
    h = sigmoid(net["o"]) * np.tanh(c)
    ys.append(h)
  return (h, c), np.stack(ys)


def test_paper_equation():
  cell = memzoo.tiny("lstm")
  params = cell.init(jax.random.key(0))
  np.testing.assert_array_equal(params["b"], np.repeat([0.0, 1, 0, 0], 6))
  params["b"] += 0.3 * jax.random.normal(jax.random.key(1), (24,))
  xs = jax.random.normal(jax.random.key(2), (9, cell.d_model))
  (h, c), want = paper(params, xs)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  for state, ys in jax.jit(lambda: [run("step"), run("scan")])():
    got = (state.h, state.c, ys)
    assert checks.relative(got, (h, c, want)) < checks.FORWARD


def test_signature_behaviour():
  """It learns to write one bit and to hold it while others pass."""
  cell = memzoo.make("lstm", d_model=6)
  _, accuracy = checks.learn(cell, checks.marked_bit, 400, rate=3e-2)
  assert accuracy > 0.95, accuracy


def test_constant_error_carousel():
  """With the forget gate open and the input gate shut, a cell holds its
  number, and the gradient flows back through it without loss."""
  cell = memzoo.tiny("lstm")
  params = cell.init(jax.random.key(0))
  i, f = slice(0, 6), slice(6, 12)
  params["b"] = params["b"].at[i].set(-100.0).at[f].set(100.0)
  xs = jax.random.normal(jax.random.key(1), (200, 6))

  def last(c):
    state = cell.initial_state(params)._replace(c=c)
    return memzoo.scan(cell, params, state, xs)[0].c

  c = jnp.linspace(-2, 2, 6)
  np.testing.assert_array_equal(last(c), c)
  np.testing.assert_allclose(jax.jacobian(last)(c), jnp.eye(6), atol=1e-6)
