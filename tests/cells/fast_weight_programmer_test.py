"""Fast weights against Schlag et al. 2021 (arXiv:2102.11174), sections 4.2 and
5.3."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import ops


def dpfp(x, nu):
  """f_{2dν}(x)_{jn + i} = r_i r_{i + j}, indices mod n = 2K, in some order."""
  r = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)])
  n = len(r)
  return np.array(
    [r[i] * r[(i - j) % n] for j in range(1, nu + 1) for i in range(n)]
  )


def paper(cell, params, xs):
  """The slow net's instructions, executed one by one with W [V, F]: what the
  key holds is removed, what is to be held is added."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, d = cell.num_heads, cell.head_dim
  w = np.zeros((h, d, 2 * d * cell.nu))
  ys = []
  for x in np.asarray(xs, np.float64):
    q, k, v = (x @ p["qkv"]).reshape(3, h, d)
    beta = 1 / (1 + np.exp(-x @ p["beta"]))
    y = []
    for n in range(h):
      fk, fq = dpfp(k[n], cell.nu), dpfp(q[n], cell.nu)
      fk, fq = fk / (fk.sum() + 1e-5), fq / (fq.sum() + 1e-5)
      old = w[n] @ fk
      new = beta[n] * v[n] + (1 - beta[n]) * old
      w[n] = w[n] - np.outer(old, fk) + np.outer(new, fk)
      y.append(w[n] @ fq / np.sqrt(d))
    ys.append(np.concatenate(y) @ p["out"])
  return w, np.stack(ys)


@pytest.mark.parametrize("nu", [1, 3])
def test_paper_equation(nu):
  cell = memzoo.tiny("fast_weight_programmer", nu=nu)
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  run = jax.jit(
    lambda: [
      memzoo.scan(cell, params, None, xs, implementation=form)
      for form in ("step", "chunk")
    ]
  )
  w, want = paper(cell, params, xs)
  for state, ys in run():
    assert checks.relative(ys, want) < checks.FORWARD
    assert checks.relative(state.s, np.swapaxes(w, 1, 2)) < checks.FORWARD


def test_signature_behaviour():
  """It overwrites: keys in different quadrants have orthogonal features, and
  at beta = 1 each holds its last value alone, exactly; and it learns to, where
  the sum of outer products cannot."""
  cell = memzoo.make("fast_weight_programmer", d_model=4, head_dim=2)
  quadrants = jnp.asarray([[1.0, 2.0], [3.0, -1.0], [-2.0, -2.0], [-1.0, 3.0]])
  phi = cell.phi(quadrants)
  np.testing.assert_allclose(phi @ phi.T, np.eye(4), atol=1e-4)
  keys = cell.phi(jnp.asarray([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]))
  v = jnp.asarray([[1.0, 2.0], [5.0, -1.0], [3.0, 7.0]])
  s, o = ops.delta_rule(jnp.zeros((4, 2)), keys, keys, v, beta=jnp.ones(3))
  np.testing.assert_allclose(o, v, rtol=1e-4)
  np.testing.assert_allclose(keys[1] @ s, v[1], rtol=1e-4)
  np.testing.assert_allclose(keys[0] @ s, v[2], rtol=1e-4)

  draw = functools.partial(checks.pairs, count=8, keys=3, rewrite=True)
  cell = memzoo.make(
    "fast_weight_programmer", d_model=8, num_heads=2, head_dim=4, nu=2
  )
  _, accuracy = checks.learn(cell, draw, 300, rate=2e-2)
  assert accuracy > 0.95, accuracy
  adds = memzoo.make("linear_attention", d_model=8, num_heads=2, head_dim=4)
  _, summed = checks.learn(adds, draw, 300, rate=2e-2)
  assert summed < accuracy - 0.1, (summed, accuracy)


def test_features():
  """They are sparse and sum to one, so that no correction overshoots."""
  cell = memzoo.make("fast_weight_programmer", d_model=4, head_dim=5, nu=3)
  x = jax.random.normal(jax.random.key(0), (64, 5))
  phi = np.asarray(cell.phi(x))
  assert phi.shape == (64, 30) and phi.min() >= 0
  np.testing.assert_allclose(phi.sum(1), 1, atol=1e-2)
  assert np.linalg.norm(phi, axis=1).max() <= 1
  want = np.stack([dpfp(np.asarray(u, np.float64), 3) for u in x])
  want /= want.sum(1, keepdims=True) + 1e-5
  np.testing.assert_allclose(phi, want, rtol=1e-4, atol=1e-7)
  assert not np.any(cell.phi(jnp.zeros(5)))
  # ν active neighbours at most: a third of the products of K = 5, ν = 3.
  assert (phi > 0).mean() < 0.5


def test_options_are_checked():
  with pytest.raises(ValueError, match="nu must be below 2 head_dim = 6"):
    memzoo.make("fast_weight_programmer", d_model=6, head_dim=3, nu=6)
