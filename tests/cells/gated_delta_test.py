"""Gated DeltaNet against Yang et al. 2024 (arXiv:2412.06464), eq. 10."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np

import memzoo
from memzoo import ops


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def paper(cell, params, xs):
  """The layer of the paper's figure 1 and eq. 10, one token at a time, with S
  [V, K] as the paper has it."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, k = cell.num_heads, cell.head_dim
  v = p["norm"].shape[0]
  width = p["conv"].shape[0]
  projected = [np.zeros(p["qkv"].shape[1])] * (width - 1)
  s = np.zeros((h, v, k))
  ys = []
  for x in np.asarray(xs, np.float64):
    projected = [*projected, x @ p["qkv"]]
    recent = projected[-width:]
    qkv = silu(sum(c * r for c, r in zip(p["conv"], recent)))
    ab = x @ p["ab"]
    y = []
    for n in range(h):
      q = qkv[n * k : (n + 1) * k]
      key = qkv[(h + n) * k : (h + n + 1) * k]
      value = qkv[2 * h * k + n * v : 2 * h * k + (n + 1) * v]
      q = q / np.sqrt(np.sum(q**2) + 1e-6) / np.sqrt(k)
      key = key / np.sqrt(np.sum(key**2) + 1e-6)
      softplus = np.log1p(np.exp(ab[n] + p["dt"][n]))
      alpha = np.exp(-np.exp(p["a_log"][n]) * softplus)
      beta = sigmoid(ab[h + n]) * (2 if cell.allow_neg_eigval else 1)
      s[n] = s[n] @ (alpha * (np.eye(k) - beta * np.outer(key, key)))
      s[n] = s[n] + beta * np.outer(value, key)
      o = s[n] @ q
      o = o / np.sqrt(np.mean(o**2) + 1e-5) * p["norm"]
      y.append(o * silu((x @ p["gate"])[n * v : (n + 1) * v]))
    ys.append(np.concatenate(y) @ p["out"])
  return s, np.stack(ys)


def test_paper_equation():
  for negative in (False, True):
    cell = memzoo.tiny("gated_delta", allow_neg_eigval=negative)
    params = cell.init(jax.random.key(0))
    params["norm"] += 0.3 * jnp.arange(3.0)
    xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
    s, want = paper(cell, params, xs)
    state, ys = memzoo.scan(cell, params, None, xs, implementation="step")
    assert checks.relative(ys, want) < checks.FORWARD
    assert checks.relative(state.s, np.swapaxes(s, 1, 2)) < checks.FORWARD


def test_signature_behaviour():
  """It overwrites: at beta = 1 a key holds its last value alone, exactly, and
  an orthogonal key is untouched; and it learns to, where linear attention's
  sum cannot."""
  key, other = jnp.eye(3)[0], jnp.eye(3)[1]
  v = jnp.asarray([[1.0, 2.0], [5.0, -1.0], [3.0, 7.0]])
  ks = jnp.stack([key, other, key])
  s, _ = ops.delta_rule(jnp.zeros((3, 2)), ks, ks, v, beta=jnp.ones(3))
  np.testing.assert_allclose(s[0], v[2], atol=1e-6)
  np.testing.assert_allclose(s[1], v[1], atol=1e-6)
  summed, _ = ops.linear_attention(jnp.zeros((3, 2)), ks, ks, v)
  np.testing.assert_allclose(summed[0], v[0] + v[2], atol=1e-6)

  draw = functools.partial(checks.pairs, count=8, keys=3, rewrite=True)
  cell = memzoo.make("gated_delta", d_model=8, num_heads=2, head_dim=8)
  _, accuracy = checks.learn(cell, draw, 400)
  assert accuracy > 0.95, accuracy


def test_gate_forgets():
  """With alpha = exp(g) and nothing written the state shrinks by alpha."""
  s = jnp.ones((3, 2))
  zeros = jnp.zeros((5, 3))
  out, _ = ops.delta_rule(
    s, zeros, zeros, jnp.zeros((5, 2)), beta=jnp.zeros(5),
    log_decay=jnp.full(5, -0.5),
  )  # fmt: skip
  np.testing.assert_allclose(out, s * np.exp(-2.5), rtol=1e-6)
