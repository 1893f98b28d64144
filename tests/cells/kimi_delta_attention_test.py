"""Kimi Delta Attention against Kimi Team 2025 (arXiv:2510.26692), eq. 1."""

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
  """S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t−1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t
  (eq. 1), one token at a time, in the layer of section 4."""
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
    decay = (x @ p["down"][:, :v] @ p["decay"]).reshape(h, k)
    alpha = np.exp(
      -np.exp(p["a_log"])[:, None] * np.log1p(np.exp(decay + p["dt"]))
    )
    gate = x @ p["down"][:, v:] @ p["gate"] + p["gate_bias"]
    y = []
    for n in range(h):
      q = z[n * k : (n + 1) * k]
      key = z[(h + n) * k : (h + n + 1) * k]
      value = z[2 * h * k + n * v : 2 * h * k + (n + 1) * v]
      q = q / np.sqrt(np.sum(q**2) + 1e-6) / np.sqrt(k)
      key = key / np.sqrt(np.sum(key**2) + 1e-6)
      beta = sigmoid(x @ p["beta"])[n]
      erase = np.eye(k) - beta * np.outer(key, key)
      s[n] = erase @ np.diag(alpha[n]) @ s[n] + beta * np.outer(key, value)
      o = s[n].T @ q
      o = o / np.sqrt(np.mean(o**2) + 1e-5) * p["norm"]
      y.append(sigmoid(gate[n * v : (n + 1) * v]) * o)
    ys.append(np.concatenate(y) @ p["out"])
  return s, np.stack(ys)


def test_paper_equation():
  cell = memzoo.tiny("kimi_delta_attention")
  params = cell.init(jax.random.key(0))
  params["norm"] += 0.3 * jnp.arange(3.0)
  params["gate_bias"] += jnp.linspace(-1.0, 1.0, 6)
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  s, want = paper(cell, params, xs)
  state, ys = memzoo.scan(cell, params, None, xs, implementation="step")
  assert checks.relative(ys, want) < checks.FORWARD
  assert checks.relative(state.s, s) < checks.FORWARD


def test_signature_behaviour():
  """Each key channel forgets at its own rate, exactly; the correction reads
  what the decay left; a layer learns to rewrite."""
  s = jnp.arange(1.0, 7.0).reshape(3, 2)
  rates = jnp.asarray([0.0, -0.5, -jnp.inf])
  zeros = jnp.zeros((4, 3))
  out, _ = ops.delta_rule(
    s, zeros, zeros, jnp.zeros((4, 2)), beta=jnp.zeros(4),
    log_decay=jnp.broadcast_to(rates, (4, 3)),
  )  # fmt: skip
  np.testing.assert_allclose(out[0], s[0])
  np.testing.assert_allclose(out[1], s[1] * np.exp(-2.0), rtol=1e-6)
  np.testing.assert_array_equal(out[2], 0.0)
  key = jnp.full((1, 3), 3**-0.5)
  out, o = ops.delta_rule(
    s, key, key, jnp.asarray([[5.0, -7.0]]), beta=jnp.ones(1),
    log_decay=rates[None],
  )  # fmt: skip
  np.testing.assert_allclose(o[0], [5.0, -7.0], rtol=1e-5)
  left = jnp.exp(rates)[:, None] * s
  across = left[0] - left[1]  # orthogonal to the key: decayed, not erased
  np.testing.assert_allclose(out[0] - out[1], across, rtol=1e-5)

  draw = functools.partial(checks.pairs, count=8, keys=3, rewrite=True)
  cell = memzoo.make("kimi_delta_attention", d_model=8, num_heads=2, head_dim=8)
  _, accuracy = checks.learn(cell, draw, 200, rate=2e-2)
  assert accuracy > 0.95, accuracy
