"""Linear attention against Katharopoulos et al. 2020 (arXiv:2006.16236)."""

import functools

import checks
import jax
import numpy as np
import pytest

import memzoo


def test_paper_equation():
  """Eq. 9: the normalised sum over all pairs, not the recurrence of eq. 18-20
  that the cell computes."""
  cell = memzoo.tiny("linear_attention", conv_size=0)
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  qkv, out = (np.asarray(params[k], np.float64) for k in ("qkv", "out"))
  h, d = cell.num_heads, cell.head_dim
  phi = lambda x: np.where(x > 0, x + 1, np.exp(x))  # elu(x) + 1, eq. 7
  x = np.asarray(xs, np.float64)
  q, k, v = (
    (x @ qkv[:, n * h * d : (n + 1) * h * d]).reshape(9, h, d) for n in range(3)
  )
  want = np.zeros((9, h, d))
  for i in range(9):
    for n in range(h):
      weights = [phi(q[i, n]) @ phi(k[j, n]) for j in range(i + 1)]
      values = sum(w * v[j, n] for j, w in enumerate(weights))
      want[i, n] = values / sum(weights)
  _, ys = memzoo.scan(cell, params, None, xs, implementation="step")
  assert checks.relative(ys, want.reshape(9, -1) @ out) < checks.FORWARD


def test_signature_behaviour():
  """Every token is added: the state is the same whatever their order; and it
  learns to recall pairs."""
  cell = memzoo.tiny("linear_attention", conv_size=0)
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  state, _ = memzoo.scan(cell, params, None, xs)
  again, _ = memzoo.scan(cell, params, None, xs[::-1])
  assert checks.relative(again, state) < checks.FORWARD

  draw = functools.partial(checks.pairs, count=4, keys=4)
  cell = memzoo.make("linear_attention", d_model=9, num_heads=2, head_dim=8)
  _, accuracy = checks.learn(cell, draw, 500)
  assert accuracy > 0.95, accuracy


@pytest.mark.parametrize("name", ["identity", "relu", "silu", "taylor", "dpfp"])
def test_feature_maps(name):
  cell = memzoo.tiny("linear_attention", feature_map=name, normalize=False)
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  step = memzoo.scan(cell, params, None, xs, implementation="step")
  chunk = memzoo.scan(cell, params, None, xs, implementation="chunk")
  assert checks.relative(chunk, step) < checks.FORWARD
