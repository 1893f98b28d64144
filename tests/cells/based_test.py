"""Based against Arora et al. 2024 (arXiv:2402.18668) and the authors' layer."""

import functools

import checks
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import models
from memzoo.models import based
from memzoo.ops import features


def paper(cell, params, xs):
  """All pairs weighed by 1 + s + s² / 2, s = q·k / sqrt(K), and normalised."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, k, v = cell.num_heads, cell.feature_dim, cell.value_dim
  qkv = np.asarray(xs, np.float64) @ p["qkv"]
  y = np.zeros((len(xs), h, v))
  for n in range(h):
    q = qkv[:, n * k : (n + 1) * k]
    key = qkv[:, (h + n) * k : (h + n + 1) * k]
    value = qkv[:, 2 * h * k + n * v : 2 * h * k + (n + 1) * v]
    for i in range(len(xs)):
      s = key[: i + 1] @ q[i] / np.sqrt(k)
      weight = 1 + s + s**2 / 2
      y[i, n] = weight @ value[: i + 1] / weight.sum()
  return y.reshape(len(xs), -1) @ p["out"]


@pytest.mark.parametrize("options", [{}, dict(head_dim=None, num_heads=3)])
def test_paper_equation(options):
  cell = memzoo.tiny("based", **options)
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  run = jax.jit(
    lambda: [
      memzoo.scan(cell, params, None, xs, implementation=form)[1]
      for form in ("step", "chunk")
    ]
  )
  want = paper(cell, params, xs)
  for ys in run():
    assert checks.relative(ys, want) < checks.FORWARD


def test_signature_behaviour():
  """Features of K numbers have the second-order Taylor series of exp as their
  product, off by the third-order remainder; and it learns to recall pairs."""
  q, k = np.random.default_rng(0).normal(size=(2, 500, 16))
  s = np.sum(q * k, axis=1) / 4
  phi = jax.jit(features.taylor)
  got = np.sum(np.asarray(phi(q.astype(np.float32)) * phi(k.astype("f4"))), 1)
  np.testing.assert_allclose(got, 1 + s + s**2 / 2, rtol=1e-4)
  assert got.min() >= 0.5 - 1e-5
  remainder = np.abs(s) ** 3 / 6 * np.exp(np.maximum(s, 0))
  assert np.all(np.abs(np.exp(s) - got) <= remainder + 1e-4)

  cell = memzoo.make("based", d_model=9, num_heads=1, feature_dim=8)
  _, accuracy = checks.learn(cell, checks.pairs, 150, rate=2e-2)
  assert accuracy > 0.95, accuracy


def test_width_sets_the_state():
  """V (1 + K + K²) numbers a head and as many for the denominator as F."""
  for k in (2, 5):
    cell = memzoo.make("based", d_model=12, num_heads=3, feature_dim=k)
    f = 1 + k + k * k
    assert memzoo.state_size(cell) == 3 * f * (4 + 1)


def test_model():
  """The stack of linear attention and window, streamed and whole."""
  pair = based.cells(8, num_heads=2, feature_dim=3, window=4)
  assert [type(c).__name__ for c in pair] == ["Based", "Window"]
  assert pair[1].capacity == 4
  model = models.LanguageModel(pair, 4, 11, conv_size=3, rngs=nnx.Rngs(0))
  tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
  run = nnx.jit(lambda model, state, tokens: model(state, tokens))
  _, whole = run(model, None, tokens)
  state, first = run(model, None, tokens[:, :5])
  _, rest = run(model, state, tokens[:, 5:])
  streamed = jnp.concatenate([first, rest], axis=1)
  assert checks.relative(streamed, whole) < checks.FORWARD


def test_options_are_checked():
  make = functools.partial(memzoo.make, "based", d_model=8)
  with pytest.raises(ValueError, match="num_heads=3 must divide d_model=8"):
    make(num_heads=3)
  with pytest.raises(ValueError, match="feature_dim must be a positive"):
    make(feature_dim=0)
