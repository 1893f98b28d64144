"""LSTM against Hochreiter and Schmidhuber 1997 with the forget gate of Gers,
Schmidhuber and Cummins 2000."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def matrix(u):
  """The recurrent matrix [D, D] of one gate whose blocks [N, N] stand one
  under the other in u [D, N]."""
  n = u.shape[1]
  full = np.zeros((u.shape[0], u.shape[0]))
  for at in range(0, u.shape[0], n):
    full[at : at + n, at : at + n] = u[at : at + n]
  return full


def paper(params, xs):
  """1997, appendix A.1, with what the docstring says of squashing functions,
  and the forget gate's factor of 2000, section 3: one gate at a time. Heads:
  arXiv:2405.04517, appendix A.2, block-diagonal recurrent matrices."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  w = dict(zip("ifgo", np.split(p["w"], 4, axis=1)))
  u = dict(zip("ifgo", map(matrix, np.split(p["u"], 4, axis=1))))
  b = dict(zip("ifgo", np.split(p["b"], 4)))
  h = c = np.zeros(p["w"].shape[0])
  ys = []
  for x in np.asarray(xs, np.float64):
    net = {k: x @ w[k] + h @ u[k] + b[k] for k in "ifgo"}
    c = sigmoid(net["f"]) * c + sigmoid(net["i"]) * np.tanh(net["g"])
    h = sigmoid(net["o"]) * np.tanh(c)
    ys.append(h)
  return (h, c), np.stack(ys)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_paper_equation(num_heads):
  cell = memzoo.tiny("lstm", num_heads=num_heads)
  params = cell.init(jax.random.key(0))
  assert params["u"].shape == (6, 4 * 6 // num_heads)
  np.testing.assert_array_equal(params["b"], np.repeat([0.0, 1, 0, 0], 6))
  params["b"] += 0.3 * jax.random.normal(jax.random.key(1), (24,))
  xs = jax.random.normal(jax.random.key(2), (9, cell.d_model))
  (h, c), want = paper(params, xs)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  for state, ys in jax.jit(lambda: [run("step"), run("scan")])():
    got = (state.h, state.c, ys)
    assert checks.relative(got, (h, c, want)) < checks.FORWARD


@pytest.mark.parametrize(
  "form, platform",
  [
    ("scan", ""),
    ("pallas", "gpu"),
    pytest.param("pallas", "tpu", marks=pytest.mark.slow),
  ],
)
def test_heads_are_blocks_of_the_recurrent_matrices(form, platform):
  """Values, states and gradients equal those of one head whose matrices are
  block-diagonal, with resets and masks."""
  cell, one = memzoo.tiny("lstm", num_heads=2), memzoo.tiny("lstm")
  keys = jax.random.split(jax.random.key(3), 5)
  params = cell.init(keys[0])
  xs = jax.random.normal(keys[1], (5, 7, 6))
  reset = jax.random.bernoulli(keys[2], 0.2, (5, 7))
  mask = jax.random.bernoulli(keys[3], 0.8, (5, 7))
  start = jax.random.normal(keys[4], (2, 5, 6))

  def spread(u):
    """[6, 12] -> [6, 24]: every gate's blocks in their places."""
    blocks = u.reshape(2, 3, 4, 3)
    full = jnp.zeros((2, 3, 4, 2, 3))
    for head in range(2):
      full = full.at[head, :, :, head].set(blocks[head])
    return full.reshape(6, 24)

  def run(cell, form, params, start, xs):
    state = type(cell.initial_state(params))(*start)
    call = lambda s, x, r, m: memzoo.scan(
      cell, params, s, x, reset=r, mask=m, implementation=form
    )
    out = jax.vmap(call)(state, xs, reset, mask)
    return checks.wave(*jax.tree.leaves(out)), out

  dense = lambda params, *args: run(
    one, "step", {**params, "u": spread(params["u"])}, *args
  )
  pulled = lambda fn: jax.jit(jax.value_and_grad(fn, (0, 1, 2), has_aux=True))
  (_, want), want_grads = pulled(dense)(params, start, xs)
  with memzoo.platform(platform or "cpu"), kernels.interpret(bool(platform)):
    (_, got), grads = pulled(lambda *args: run(cell, form, *args))(
      params, start, xs
    )
  assert checks.relative(got, want) <= checks.FORWARD
  assert checks.relative(grads, want_grads) <= checks.GRADIENT


def test_heads_start_orthogonal_and_one_head_is_the_default():
  params = memzoo.tiny("lstm", num_heads=2).init(jax.random.key(0))
  blocks = params["u"].reshape(2, 3, 4, 3).transpose(0, 2, 1, 3)
  np.testing.assert_allclose(
    blocks @ blocks.swapaxes(2, 3), np.broadcast_to(np.eye(3), (2, 4, 3, 3)),
    atol=1e-6,
  )  # fmt: skip
  assert memzoo.tiny("lstm") == memzoo.tiny("lstm", num_heads=1)
  with pytest.raises(ValueError, match="num_heads=4 must divide d_model=6"):
    memzoo.tiny("lstm", num_heads=4)


def test_forget_bias():
  """It moves the start of b_f and nothing else."""
  key = jax.random.key(0)
  usual = memzoo.tiny("lstm").init(key)
  open_gates = memzoo.tiny("lstm", forget_bias=4).init(key)
  b = open_gates.pop("b")
  np.testing.assert_array_equal(b, np.repeat([0.0, 4, 0, 0], 6))
  assert usual.pop("b").dtype == b.dtype
  jax.tree.map(np.testing.assert_array_equal, usual, open_gates)


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
