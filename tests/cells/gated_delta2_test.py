"""Gated DeltaNet-2 against Hatamizadeh et al. 2026 (arXiv:2605.22791)."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np

import memzoo
from memzoo import ops


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def paper(cell, params, xs):
  """S_t = (I − k_t (b_t ⊙ k_t)ᵀ) D_t S_{t−1} + k_t (w_t ⊙ v_t)ᵀ (eq. 10), one
  token at a time, with the gates of eq. 11 and 12 and the layer of section
  3.5."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, k = cell.num_heads, cell.head_dim
  v = p["norm"].shape[0]
  window = np.zeros(p["conv"].shape)
  s = np.zeros((h, k, v))
  ys = []
  for x in np.asarray(xs, np.float64):
    window = np.concatenate([window[1:], [x @ p["qkv"]]])
    z = np.sum(window * p["conv"], axis=0)
    z = z * sigmoid(z)
    b = sigmoid(x @ p["erase"]).reshape(h, k)
    b = b * (2 if cell.allow_neg_eigval else 1)
    w = sigmoid(x @ p["write"]).reshape(h, v)
    decay = (x @ p["down"][:, :v] @ p["decay"]).reshape(h, k)
    g = -np.exp(p["a_log"])[:, None] * np.log1p(np.exp(decay + p["dt"]))
    gate = x @ p["down"][:, v:] @ p["gate"] + p["gate_bias"]
    y = []
    for n in range(h):
      q = z[n * k : (n + 1) * k]
      key = z[(h + n) * k : (h + n + 1) * k]
      value = z[2 * h * k + n * v : 2 * h * k + (n + 1) * v]
      q = q / np.sqrt(np.sum(q**2) + 1e-6) / np.sqrt(k)
      key = key / np.sqrt(np.sum(key**2) + 1e-6)
      erase = np.eye(k) - np.outer(key, b[n] * key)
      s[n] = erase @ np.diag(np.exp(g[n])) @ s[n]
      s[n] = s[n] + np.outer(key, w[n] * value)
      o = s[n].T @ q
      o = o / np.sqrt(np.mean(o**2) + 1e-5) * p["norm"]
      out = gate[n * v : (n + 1) * v]
      y.append(o * out * sigmoid(out))
    ys.append(np.concatenate(y) @ p["out"])
  return s, np.stack(ys)


def test_paper_equation():
  for negative in (False, True):
    cell = memzoo.tiny("gated_delta2", allow_neg_eigval=negative)
    params = cell.init(jax.random.key(0))
    params["norm"] += 0.3 * jnp.arange(3.0)
    params["gate_bias"] += jnp.linspace(-1.0, 1.0, 6)
    xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
    s, want = paper(cell, params, xs)
    state, ys = memzoo.scan(cell, params, None, xs, implementation="step")
    assert checks.relative(ys, want) < checks.FORWARD
    assert checks.relative(state.s, s) < checks.FORWARD


@jax.jit
def gated(erase, write, sharp=60.0):
  """State after one token that meets ones, with gates of 0 or 1, and forgets
  nothing; before SiLU its key is (3, 4) and its value (2, −1)."""
  cell = memzoo.make("gated_delta2", d_model=2, head_dim=2, conv_size=1)
  params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
  row = jnp.asarray([0.0, 0.0, 3.0, 4.0, 2.0, -1.0])
  params["qkv"] = params["qkv"].at[0].set(row)
  params["conv"] += 1.0
  params["dt"] -= 200.0
  gates = lambda on: sharp * (2 * on - 1)
  params["erase"] = params["erase"].at[0].set(gates(erase))
  params["write"] = params["write"].at[0].set(gates(write))
  state = cell.initial_state(params)._replace(s=jnp.ones((1, 2, 2)))
  return cell.step(params, state, jnp.asarray([1.0, 0.0]))[0].s[0]


def test_gates_act_apart():
  """The erase gate takes key channels out of what is read and erased, the
  write gate takes value channels out of what is written."""
  z = np.asarray([3.0, 4.0, 2.0, -1.0])
  k, v = np.split(z * sigmoid(z), 2)
  k = k / np.sqrt(np.sum(k**2) + 1e-6)
  ones = np.ones((2, 2))
  for erase in ((0, 0), (1, 0), (1, 1)):
    for write in ((0, 0), (0, 1), (1, 1)):
      read = (np.asarray(erase) * k) @ ones
      want = ones - np.outer(k, read) + np.outer(k, np.asarray(write) * v)
      got = gated(*jnp.asarray([erase, write], jnp.float32))
      np.testing.assert_allclose(got, want, atol=1e-5)
  closed = gated(*jnp.zeros((2, 2)))
  np.testing.assert_allclose(closed, 1.0, atol=1e-6)


def test_signature_behaviour():
  """It writes beside what a key holds, replaces it or erases it, as its two
  gates say, where one gate ties the three; and a layer learns to rewrite."""
  key, held = jnp.asarray([[1.0, 0.0]]), jnp.asarray([[4.0], [7.0]])
  run = lambda b, w: ops.diag_plus_rank_one(
    held, key, key, w * jnp.asarray([[3.0]]), a=-b * key
  )[0]
  np.testing.assert_allclose(run(0.0, 1.0), [[7.0], [7.0]])  # added
  np.testing.assert_allclose(run(1.0, 1.0), [[3.0], [7.0]])  # replaced
  np.testing.assert_allclose(run(1.0, 0.0), [[0.0], [7.0]])  # erased

  draw = functools.partial(checks.pairs, count=8, keys=3, rewrite=True)
  cell = memzoo.make("gated_delta2", d_model=8, num_heads=2, head_dim=8)
  _, accuracy = checks.learn(cell, draw, 200, rate=2e-2)
  assert accuracy > 0.95, accuracy
