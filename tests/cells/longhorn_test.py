"""Longhorn against Liu et al. 2024 (arXiv:2407.14207): the closed form of
online least squares, and that it never overshoots."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.cells.matrix import longhorn


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def paper(cell, params, xs):
  """Algorithm 1, one token and one channel at a time."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  e, n = cell.d_inner, cell.d_state
  rank = len(p["beta"])
  recent, s = [np.zeros(e)] * (cell.conv_size - 1), np.zeros((e, n))
  ys = []
  for u in np.asarray(xs, np.float64):
    x, z = np.split(u @ p["in"], 2)
    recent = [*recent, x]
    x = silu(sum(w * r for w, r in zip(p["conv"], recent)) + p["conv_bias"])
    recent = recent[1:]
    low, k, q = np.split(x @ p["select"], [rank, rank + n])
    beta = sigmoid(low @ p["beta"] + p["beta_bias"])
    o = np.zeros(e)
    for c in range(e):
      delta = beta[c] / (1 + beta[c] * (k @ k))
      s[c] = (1 - delta * k**2) * s[c] + delta * x[c] * k
      o[c] = s[c] @ q
    ys.append(((o + p["d"] * x) * silu(z)) @ p["out"])
  return s, np.stack(ys)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(cell, params, xs, form=None):
  return memzoo.scan(cell, params, None, xs, implementation=form)


def test_paper_equation():
  cell = memzoo.tiny("longhorn")
  params = jax.tree.map(lambda x: 2 * x, cell.init(jax.random.key(0)))
  params["beta_bias"] += 0.3 * jnp.arange(9.0) - 1
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  want = paper(cell, params, xs)
  for form in ("step", "scan", "chunk"):
    state, ys = run(cell, params, xs, form)
    error = checks.relative((state.s, ys), want)
    assert error <= checks.FORWARD, (form, error)


def drawn(cell, scale, count=200):
  """Decays, writes and what they come from, for inputs of any size."""
  params = cell.init(jax.random.key(0))
  shift = scale * jax.random.normal(
    jax.random.key(2), params["beta_bias"].shape
  )
  params["beta_bias"] += shift
  x = scale * jax.random.normal(jax.random.key(1), (count, cell.d_inner))
  w = cell._select(params, x)
  return w, *longhorn._transition(w)


@pytest.mark.parametrize("scale", (0.1, 3.0, 10.0))
def test_never_overshoots(scale):
  """Whatever the input, with no parameter to see to it: one write moves the
  recall of its own key from nothing towards the target by β |k|² / (1 + β |k|²)
  of the way; and writing a token over and over takes each entry of the memory
  towards where it rests, x / k_n, and never past it."""
  cell = memzoo.tiny("longhorn")
  w, decay, write = drawn(cell, scale)
  assert (decay >= 0).all() and (decay <= 1).all()
  x, k = np.asarray(w.x, np.float64), np.asarray(w.k, np.float64)
  decay, write = np.asarray(decay, np.float64), np.asarray(write, np.float64)
  square = np.sum(k**2, axis=1, keepdims=True)
  share = np.einsum("ten,tn->te", write, k) / x
  np.testing.assert_allclose(share, np.asarray(w.delta) * square, rtol=1e-4)
  assert (share > 0).all() and (share <= 1 + 1e-6).all()
  s, rest = np.zeros(write.shape), x[..., None] / k[:, None]
  way = np.zeros(write.shape)
  for _ in range(20):
    s = decay * s + write
    assert (s / rest >= way - 1e-5).all()
    way = s / rest
    assert (way <= 1 + 1e-3).all()


def test_signature_behaviour():
  """One step is the minimiser of ‖s − s'‖² + β (s·k − x)²: with a key of one
  feature, where the diagonal is all there is, the update equals the solution of
  the normal equations, and a large β recalls the last target exactly. And it
  learns to overwrite."""
  r = np.random.default_rng(0)
  k, before, x = r.normal(size=50), r.normal(size=50), r.normal(size=50)
  beta = sigmoid(3 * r.normal(size=50))
  solved = (before + beta * k * x) / (1 + beta * k**2)
  single = lambda a: jnp.asarray(a[:, None], jnp.float32)
  delta = single(beta / (1 + beta * k**2))
  w = longhorn.Write(single(x), delta, single(k), single(k))
  decay, write = longhorn._transition(w)
  got = decay[:, 0, 0] * before.astype(np.float32) + write[:, 0, 0]
  np.testing.assert_allclose(got, solved, rtol=1e-5, atol=1e-6)
  # A contraction: each step leaves 1 / (1 + β k²) of the error, never a sign.
  left = (got * k - x) / (before * k - x)
  np.testing.assert_allclose(left, 1 / (1 + beta * k**2), rtol=1e-3, atol=1e-4)

  cell = memzoo.make(
    "longhorn", d_model=8, d_state=8, expand=4.0, rank=4, conv_size=1
  )
  draw = functools.partial(checks.pairs, count=8, keys=3, rewrite=True)
  _, accuracy = checks.learn(cell, draw, 400, rate=2e-2)
  assert accuracy > 0.95, accuracy


def test_memory_and_loops():
  """Nothing of shape [T, E, N], 33.5 MB here, is ever built."""
  cell = memzoo.make("longhorn", d_model=64, d_state=16)
  length = 4096
  xs = jax.ShapeDtypeStruct((length, 64), jnp.float32)
  params = jax.eval_shape(cell.init, jax.random.key(0))

  def loss(params, xs):
    return jnp.sum(
      memzoo.scan(cell, params, None, xs, implementation="scan")[1] ** 2
    )

  grad = jax.jit(jax.grad(loss)).lower(params, xs).compile()
  assert grad.memory_analysis().temp_size_in_bytes < 15e6
  assert set(checks.trip_counts(grad)) == {length // 64, 64}


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(d_state=0), "d_state must be a positive integer"),
    (dict(rank=0), "rank must be a positive integer"),
    (dict(expand=0.3), "expand · d_model must be a positive whole number"),
  ),
)
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("longhorn", d_model=8, **options)
