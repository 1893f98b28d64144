"""RWKV-7 against Peng et al. 2025 (arXiv:2503.14456), section 4."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import ops


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def paper(cell, params, xs):
  """Weight preparation, state evolution and readout of section 4, one token at
  a time, with rows for vectors and the state [V, K] as the paper has it."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, d = cell.num_heads, cell.d_model
  k = d // h
  lerp = lambda a, b, c: a + (b - a) * c
  last, wkv = np.zeros(d), np.zeros((h, k, k))
  ys = []
  for x in np.asarray(xs, np.float64):
    r, w, k_in, v, a, g = (lerp(x, last, mu) for mu in p["mix"])
    last = x
    r, key, v = (z @ m for z, m in zip((r, k_in, v), p["rkv"]))
    a = sigmoid(a @ p["rate_down"] @ p["rate_up"] + p["rate_bias"])
    w = np.tanh(w @ p["decay_down"]) @ p["decay_up"] + p["decay_bias"]
    w = np.exp(-np.exp(-0.5) * sigmoid(w))
    g = sigmoid(g @ p["gate_down"]) @ p["gate_up"]
    removal = key * p["removal"]
    replacement = key * lerp(1.0, a, p["replacement"])
    out = []
    for n in range(h):
      part = slice(n * k, (n + 1) * k)
      kappa = removal[None, part] / np.linalg.norm(removal[part])
      rn, kn, vn = r[None, part], replacement[None, part], v[None, part]
      transition = np.diag(w[part]) - kappa.T @ (a[part] * kappa)
      wkv[n] = wkv[n] @ transition + vn.T @ kn
      y = (rn @ wkv[n].T)[0]
      y = (y - y.mean()) / np.sqrt(y.var() + 64e-5)
      y = y * p["norm_scale"][n] + p["norm_bias"][n]
      out.append(y + (rn @ (p["bonus"][n] * kn).T)[0, 0] * vn[0])
    ys.append((g * np.concatenate(out)) @ p["out"])
  return wkv, last, np.stack(ys)


def drawn(cell):
  """Parameters off their starting values, of which some are zero."""
  params = cell.init(jax.random.key(0))
  r = np.random.default_rng(3)
  return jax.tree.map(
    lambda x: x + jnp.asarray(0.3 * r.normal(size=x.shape), jnp.float32), params
  )


def test_paper_equation():
  cell = memzoo.tiny("rwkv7")
  params = drawn(cell)
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  wkv, last, want = paper(cell, params, xs)
  state, ys = memzoo.scan(cell, params, None, xs, implementation="step")
  assert checks.relative(ys, want) < checks.FORWARD
  assert checks.relative(state.s, np.swapaxes(wkv, 1, 2)) < checks.FORWARD
  np.testing.assert_allclose(state.shift[0], last, rtol=1e-6)


def test_starting_values():
  """Those of the authors' first layer: decays from slow to fast over the
  channels, ranks by width, and an output from zero."""
  cell = memzoo.make("rwkv7", d_model=128, num_heads=2)
  params = cell.init(jax.random.key(0))
  assert params["decay_down"].shape == (128, 32)
  assert params["gate_down"].shape == (128, 64)
  assert params["mix"][0, 0] == 1 and not params["out"].any()
  rows = params["rate_up"]
  np.testing.assert_allclose(rows @ rows.T, 0.01 * np.eye(32), atol=1e-6)
  np.testing.assert_allclose(params["decay_bias"][0], -8.0, atol=1e-5)
  np.testing.assert_allclose(params["decay_bias"][-1], 3.0, atol=1e-5)


def test_signature_behaviour():
  """The removal key erases what it names, channel by channel at its own rate,
  while the replacement key is written; an eigenvalue may be negative; a layer
  learns to rewrite."""
  held = jnp.asarray([[4.0, 1.0], [6.0, 2.0], [8.0, 3.0]])
  removal, replacement = jnp.eye(3)[:1], 2.0 * jnp.eye(3)[2:]
  value = jnp.asarray([[10.0, 20.0]])
  rule = functools.partial(
    ops.diag_plus_rank_one, held, removal, replacement, value, a=-removal
  )
  s, _ = rule(b=removal)  # a = 1: all of it
  np.testing.assert_allclose(s, [[0, 0], [6, 2], [28, 43]])
  s, _ = rule(b=0.25 * removal)
  np.testing.assert_allclose(s, [[3, 0.75], [6, 2], [28, 43]])
  log_decay = jnp.log(jnp.asarray([[0.6, 1.0, 1.0]]))
  s, _ = rule(b=removal, log_decay=log_decay)
  np.testing.assert_allclose(s[0], -0.4 * held[0], rtol=1e-6)

  draw = functools.partial(checks.pairs, count=8, keys=3, rewrite=True)
  cell = memzoo.make(
    "rwkv7", d_model=8, num_heads=2, decay_rank=4, rate_rank=4, gate_rank=4
  )
  _, accuracy = checks.learn(cell, draw, 200, rate=2e-2)
  assert accuracy > 0.95, accuracy


def test_options_are_checked():
  for options, message in (
    (dict(num_heads=5), "num_heads=5 must divide d_model=6"),
    (dict(num_heads=6), "num_heads=6 must be at most half of d_model=6"),
    (dict(gate_rank=0), "gate_rank must be a positive integer"),
  ):
    with pytest.raises(ValueError, match=message):
      memzoo.make("rwkv7", d_model=6, **options)
