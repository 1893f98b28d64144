"""Performer against Choromanski et al. 2020 (arXiv:2009.14794)."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.ops import features


def paper(cell, params, xs):
  """Attention with the kernel's estimate in place of exp(q·k / sqrt(K)), over
  all pairs, without a stabiliser."""
  p = {k: np.asarray(params[k], np.float64) for k in ("qkv", "out")}
  omega = np.asarray(params["buffers"]["projection"], np.float64)
  h, k = cell.num_heads, cell.head_dim
  qkv = (np.asarray(xs, np.float64) @ p["qkv"]).reshape(len(xs), 3, h, k)
  phi = lambda x: np.exp(omega @ x - x @ x / 2) / np.sqrt(len(omega))
  y = np.zeros((len(xs), h, k))
  for n in range(h):
    for i in range(len(xs)):
      q = phi(qkv[i, 0, n] / k**0.25)
      weights = [q @ phi(qkv[j, 1, n] / k**0.25) for j in range(i + 1)]
      y[i, n] = weights @ qkv[: i + 1, 2, n] / np.sum(weights)
  return y.reshape(len(xs), -1) @ p["out"]


def test_paper_equation():
  cell = memzoo.tiny("performer", eps=0.0)
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  run = jax.jit(
    lambda xs: [
      memzoo.scan(cell, params, None, xs, implementation=form)
      for form in ("step", "chunk")
    ]
  )
  for scale in (1.0, 3.0):
    want = paper(cell, params, scale * xs)
    for _, ys in run(scale * xs):
      assert checks.relative(ys, want) < checks.FORWARD


def estimates(rows, q, k):
  """φ(q)·φ(k) by each of many projections [N, M, K]."""
  one = lambda omega: features.favor(q, omega) @ features.favor(k, omega)
  return np.asarray(jax.vmap(one)(rows), np.float64)


def test_signature_behaviour():
  """The estimate of exp(q·k) is unbiased and positive, its error falls as
  1 / sqrt(M), and orthogonal rows have less of it; and a layer learns to
  recall pairs."""
  q = jnp.asarray([0.5, -0.3, 0.2, 0.4])
  k = jnp.asarray([0.3, 0.4, 0.1, 0.6])
  exact = float(np.exp(np.dot(q, k)))
  count = 20000
  keys = jax.random.split(jax.random.key(0), count)
  spread = {}
  for m in (4, 64):
    free = jax.random.normal(jax.random.key(m), (count, m, 4))
    orthogonal = jax.jit(
      jax.vmap(lambda key, m=m: features.orthogonal_rows(key, m, 4))
    )(keys)
    for name, rows in (("free", free), ("orthogonal", orthogonal)):
      got = estimates(rows, q, k)
      assert got.min() > 0
      spread[name, m] = got.std()
      assert abs(got.mean() - exact) < 4 * got.std() / np.sqrt(count), name
  for name in ("free", "orthogonal"):
    ratio = spread[name, 4] / spread[name, 64]  # sqrt(16)
    assert 3.4 < ratio < 4.7, (name, ratio)
  for m in (4, 64):
    assert spread["orthogonal", m] < 0.97 * spread["free", m], spread

  cell = memzoo.make("performer", d_model=9, head_dim=8, num_features=32)
  _, accuracy = checks.learn(cell, checks.pairs, 200, rate=2e-2)
  assert accuracy > 0.9, accuracy


def test_orthogonal_rows():
  """Rows of a block are orthogonal, blocks are not; norms are those of normal
  vectors."""
  rows = np.asarray(features.orthogonal_rows(jax.random.key(0), 7, 3))
  assert rows.shape == (7, 3)
  for block in (rows[:3], rows[3:6]):
    gram = block @ block.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)
  assert np.abs(rows[:3] @ rows[3:6].T).max() > 0.1
  many = jax.vmap(lambda key: features.orthogonal_rows(key, 3, 3))(
    jax.random.split(jax.random.key(1), 2000)
  )
  square = np.sum(np.square(many), axis=-1)
  np.testing.assert_allclose(square.mean(), 3, rtol=0.05)  # χ² of 3
  np.testing.assert_allclose(square.var(), 6, rtol=0.15)


def test_no_exponential_overflows():
  """Keys and queries whose exponents leave float32, with the same output as
  all-pairs attention in float64."""
  cell = memzoo.tiny("performer", eps=0.0)
  params = cell.init(jax.random.key(0))
  params["buffers"]["projection"] += 40.0
  xs = 4.0 * jax.random.normal(jax.random.key(1), (9, cell.d_model))
  exponents = features.favor_exponents(
    (xs @ params["qkv"])[:, 6:9] / 3**0.25, params["buffers"]["projection"]
  )
  assert exponents.max() > 89 and exponents.min() < -104
  state, ys = memzoo.scan(cell, params, None, xs, implementation="chunk")
  assert checks.relative(ys, paper(cell, params, xs)) < 1e-3
  np.testing.assert_allclose(state.n.sum(1), 1, rtol=1e-5)  # shares


def test_refresh_redraws_when_due():
  cell = memzoo.tiny("performer", redraw_every=3)
  params = cell.init(jax.random.key(0))
  refresh = jax.jit(lambda p: cell.refresh(p, jnp.zeros((2, 4, 6))))
  drawn = [params["buffers"]["projection"]]
  for _ in range(6):
    params = refresh(params)
    drawn.append(params["buffers"]["projection"])
  new = [bool(np.any(a != b)) for a, b in zip(drawn, drawn[1:])]
  assert new == [False, False, True, False, False, True]
  gram = drawn[-1][:3] @ drawn[-1][:3].T
  np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-4)
  never = memzoo.tiny("performer", redraw_every=0)
  assert never.refresh(params, None) is params


def test_options_are_checked():
  with pytest.raises(ValueError, match="redraw_every must be an integer, 0 or"):
    memzoo.make("performer", d_model=8, redraw_every=-1)
