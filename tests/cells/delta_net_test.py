"""DeltaNet against Yang et al. 2024 (arXiv:2406.06484), section 2.2."""

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
  """S_t = S_{t−1} − β_t (S_{t−1} k_t − v_t) k_tᵀ, o_t = S_t q_t, one token at a
  time, with S [V, K] as the paper has it; the layer around it as in section 3
  (short convolution, SiLU, unit norm, output norm)."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, k = cell.num_heads, cell.head_dim
  v = p["norm"].shape[0]
  window = np.zeros(p["conv"].shape)
  s = np.zeros((h, v, k))
  ys = []
  for x in np.asarray(xs, np.float64):
    window = np.concatenate([window[1:], [x @ p["qkv"]]])
    z = np.sum(window * p["conv"], axis=0)
    z = z * sigmoid(z)
    beta = sigmoid(x @ p["beta"]) * (2 if cell.allow_neg_eigval else 1)
    y = []
    for n in range(h):
      q = z[n * k : (n + 1) * k]
      key = z[(h + n) * k : (h + n + 1) * k]
      value = z[2 * h * k + n * v : 2 * h * k + (n + 1) * v]
      q = q / np.sqrt(np.sum(q**2) + 1e-6) / np.sqrt(k)
      key = key / np.sqrt(np.sum(key**2) + 1e-6)
      s[n] = s[n] - beta[n] * np.outer(s[n] @ key - value, key)
      o = s[n] @ q
      y.append(o / np.sqrt(np.mean(o**2) + 1e-5) * p["norm"])
    ys.append(np.concatenate(y) @ p["out"])
  return s, np.stack(ys)


def test_paper_equation():
  for negative in (False, True):
    cell = memzoo.tiny("delta_net", allow_neg_eigval=negative)
    params = cell.init(jax.random.key(0))
    params["norm"] += 0.3 * jnp.arange(3.0)
    xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
    s, want = paper(cell, params, xs)
    state, ys = memzoo.scan(cell, params, None, xs, implementation="step")
    assert checks.relative(ys, want) < checks.FORWARD
    assert checks.relative(state.s, np.swapaxes(s, 1, 2)) < checks.FORWARD


def parity(key, length=10):
  """Bits, and after each whether their sum is odd: input [1, bit, first, 0 …]."""
  bits = jax.random.bernoulli(key, 0.5, (length,)).astype(jnp.int32)
  xs = jnp.zeros((length, 8)).at[:, 0].set(1.0).at[0, 2].set(1.0)
  xs = xs.at[:, 1].set(bits.astype(jnp.float32))
  return xs, jnp.cumsum(bits) % 2, jnp.ones(length)


def test_signature_behaviour():
  """At beta 1 a key holds its last value alone, exactly, whatever it held; at
  beta 2 it holds the mirror image of what it held, and so a layer learns
  parity, which one whose eigenvalues stay positive does not."""
  key, other = jnp.eye(3)[0], jnp.eye(3)[1]
  v = jnp.asarray([[1.0, 2.0], [5.0, -1.0], [3.0, 7.0]])
  ks = jnp.stack([key, other, key])
  s, _ = ops.delta_rule(jnp.zeros((3, 2)), ks, ks, v, beta=jnp.ones(3))
  np.testing.assert_allclose(s[0], v[2], atol=1e-6)
  np.testing.assert_allclose(s[1], v[1], atol=1e-6)
  flipped, _ = ops.delta_rule(
    s, key[None], key[None], jnp.zeros((1, 2)), beta=2 * jnp.ones(1)
  )
  np.testing.assert_allclose(flipped[0], -v[2], atol=1e-6)
  np.testing.assert_allclose(flipped[1], v[1], atol=1e-6)

  make = functools.partial(
    memzoo.make, "delta_net", d_model=8, num_heads=2, head_dim=4, conv_size=1
  )
  cell = make(allow_neg_eigval=True)
  params, accuracy = checks.learn(cell, parity, 200, rate=2e-2)
  assert accuracy > 0.98, accuracy
  xs, odd, _ = parity(jax.random.key(5), 20)  # twice what it was trained on
  ys = jax.jit(lambda x: memzoo.scan(cell, params, None, x)[1])(xs)
  assert jnp.mean(jnp.argmax(ys, -1) == odd) > 0.9
  _, accuracy = checks.learn(make(), parity, 200, rate=2e-2)
  assert accuracy < 0.85, accuracy


def test_learns_to_rewrite():
  draw = functools.partial(checks.pairs, count=8, keys=3, rewrite=True)
  cell = memzoo.make("delta_net", d_model=8, num_heads=2, head_dim=8)
  _, accuracy = checks.learn(cell, draw, 200, rate=2e-2)
  assert accuracy > 0.95, accuracy


def test_options_are_checked():
  with pytest.raises(ValueError, match="expand_v=0.3 times head_dim=4"):
    memzoo.make("delta_net", d_model=6, head_dim=4, expand_v=0.3)
  with pytest.raises(ValueError, match="conv_size must be a positive integer"):
    memzoo.make("delta_net", d_model=6, conv_size=0)
