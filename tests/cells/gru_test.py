"""GRU against Cho et al. 2014 (arXiv:1406.1078), eq. 5-8."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


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
  """Eq. 5 to 8, with biases; with c, PyTorch's form of the candidate. Heads:
  arXiv:2412.07752, block-diagonal recurrent matrices."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  w_r, w_z, w = np.split(p["w"], 3, axis=1)
  u_r, u_z, u = map(matrix, np.split(p["u"], 3, axis=1))
  b_r, b_z, b = np.split(p["b"], 3)
  h, ys = np.zeros(w.shape[1]), []
  for x in np.asarray(xs, np.float64):
    r = sigmoid(x @ w_r + h @ u_r + b_r)  # (5)
    z = sigmoid(x @ w_z + h @ u_z + b_z)  # (6)
    if "c" in p:
      new = np.tanh(x @ w + b + r * (h @ u + p["c"]))
    else:
      new = np.tanh(x @ w + b + (r * h) @ u)  # (8)
    h = z * h + (1 - z) * new  # (7)
    ys.append(h)
  return h, np.stack(ys)


@pytest.mark.parametrize(
  "reset_after, num_heads", [(False, 1), (True, 1), (False, 2), (True, 3)]
)
def test_paper_equation(reset_after, num_heads):
  cell = memzoo.tiny("gru", reset_after=reset_after, num_heads=num_heads)
  params = cell.init(jax.random.key(0))
  assert params["u"].shape == (6, 3 * 6 // num_heads)
  assert ("c" in params) == reset_after
  for n, name in enumerate(params):
    noise = jax.random.normal(jax.random.key(n + 1), params[name].shape)
    params[name] += 0.3 * noise
  xs = jax.random.normal(jax.random.key(9), (9, cell.d_model))
  want = paper(params, xs)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  for state, ys in jax.jit(lambda: [run("step"), run("scan")])():
    assert checks.relative((state.h, ys), want) < checks.FORWARD


def test_heads_must_divide_the_width():
  with pytest.raises(ValueError, match="num_heads=4 must divide d_model=6"):
    memzoo.tiny("gru", num_heads=4)


def test_reset_after_changes_the_function():
  """The same numbers mean another function: r gates h, or U h."""
  xs = jax.random.normal(jax.random.key(1), (9, 6))
  before, after = (memzoo.tiny("gru", reset_after=r) for r in (False, True))
  params = after.init(jax.random.key(0))
  ys = [memzoo.scan(c, params, None, xs)[1] for c in (before, after)]
  assert checks.relative(*ys) > 1e-3


def test_signature_behaviour():
  """It learns to write one bit and to hold it while others pass."""
  cell = memzoo.make("gru", d_model=6)
  _, accuracy = checks.learn(cell, checks.marked_bit, 400, rate=3e-2)
  assert accuracy > 0.95, accuracy


def test_an_open_update_gate_keeps_the_state():
  """z = 1 keeps h to the bit, z = 0 replaces it: the leak is chosen."""
  cell = memzoo.tiny("gru")
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (9, 6))
  state = type(cell.initial_state(params))(jnp.linspace(-1, 1, 6))
  keep = {**params, "b": params["b"].at[6:12].set(100.0)}
  held, ys = memzoo.scan(cell, keep, state, xs)
  np.testing.assert_array_equal(held.h, state.h)
  np.testing.assert_array_equal(ys[0], state.h)
  drop = {**params, "b": params["b"].at[6:12].set(-100.0), "u": 0 * params["u"]}
  ends = [memzoo.scan(cell, drop, s, xs)[0].h for s in (state, None)]
  np.testing.assert_array_equal(*ends)
