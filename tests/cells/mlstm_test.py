"""mLSTM against Beck et al. 2024 (arXiv:2405.04517), eq. 15-27, and that its
exponential gate revises what it stored."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.ops.exponential_attention import empty, exponential_attention

XLSTM_7B = dict(backbone="xlstm_7b", expand=1.0, qk_ratio=2 / 3)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def blocks(x, w):
  """A block-diagonal matrix, written out."""
  whole = np.zeros((len(x), len(x)))
  for n, block in enumerate(w):
    at = slice(n * len(block), (n + 1) * len(block))
    whole[at, at] = block
  return x @ whole


def paper(cell, params, xs):
  """One token at a time with C [V, K], stabilised as (15)-(17) say, and 1e-6
  added to the denominator as in the authors' code."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, first = cell.num_heads, cell.backbone == "xlstm"
  e = int(cell.expand * cell.d_model)
  v = e // h
  k = round(v * cell.qk_ratio)
  c, n, m = np.zeros((h, v, k)), np.zeros((h, k)), np.zeros(h)
  us = [np.zeros(e)] * (cell.conv_size - 1)
  ys = []
  for x in np.asarray(xs, np.float64):
    if first:
      up = x @ p["up"]
      u, z = up[:e], up[e:]
      us = [*us, u][-cell.conv_size :]
      a = silu(sum(w * r for w, r in zip(p["conv"], us)) + p["conv_bias"])
      q, key, value = (blocks(y, w) for y, w in zip((a, a, u), p["qkv"]))
      us = us[1:]
      gates = np.concatenate([q, key, value]) @ p["gates"] + p["gates_bias"]
    else:
      all_three = x @ p["qkv"]
      q, key, value = np.split(all_three, [h * k, 2 * h * k])
      gates = x @ p["gates"] + p["gates_bias"]
      gates = cell.soft_cap * np.tanh(gates / cell.soft_cap)
    out = []
    for j in range(h):
      i, f = gates[j], gates[h + j]
      log_f = np.log(sigmoid(f)) if cell.forget_gate == "sigmoid" else f
      kj = key[j * k : (j + 1) * k] / np.sqrt(k)
      new = max(log_f + m[j], i)
      i, f, m[j] = np.exp(i - new), np.exp(log_f + m[j] - new), new
      c[j] = f * c[j] + i * np.outer(value[j * v : (j + 1) * v], kj)
      n[j] = f * n[j] + i * kj
      qj = q[j * k : (j + 1) * k]
      r = c[j] @ qj / (max(abs(n[j] @ qj), np.exp(-new)) + 1e-6)
      eps = 1e-5 if first else 1e-6
      out.append((r - r.mean()) / np.sqrt(r.var() + eps))
    y = np.concatenate(out) * p["norm"]
    if first:
      y = (y + p["skip"] * a) * silu(z)
    else:
      y = y * sigmoid(x @ p["z"])
    ys.append(y @ p["out"])
  return (np.swapaxes(c, 1, 2), n, m), np.stack(ys)


def drawn(cell):
  """Parameters of the right shapes, none at its starting value."""
  r = np.random.default_rng(1)
  shapes = jax.eval_shape(cell.init, jax.random.key(0))
  draw = lambda x: jnp.asarray(0.5 * r.normal(size=x.shape), jnp.float32)
  return jax.tree.map(draw, shapes)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(cell, params, xs, form):
  return memzoo.scan(cell, params, None, xs, implementation=form)


@pytest.mark.parametrize(
  "options", (dict(), XLSTM_7B, dict(forget_gate="exp")), ids=str
)
def test_paper_equation(options):
  cell = memzoo.tiny("mlstm", **options)
  params = drawn(cell)
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  want = paper(cell, params, xs)
  for form in ("step", "chunk"):
    state, ys = run(cell, params, xs, form)
    error = checks.relative((tuple(state.memory), ys), want)
    assert error <= checks.FORWARD, (form, error)


@pytest.mark.parametrize("bias", (300.0, -300.0))
def test_gates_in_the_hundreds(bias):
  """exp(300) is no float32: the state and the output are still the oracle's,
  but for the rounding of 300 itself, 1.5e-5 in the exponent."""
  cell = memzoo.tiny("mlstm")
  params = drawn(cell)
  shift = jnp.repeat(jnp.asarray([bias, 0.0]), cell.num_heads)
  params["gates_bias"] = params["gates_bias"] + shift
  xs = jax.random.normal(jax.random.key(1), (70, cell.d_model))
  want = paper(cell, params, xs)
  for form in ("step", "chunk"):
    state, ys = run(cell, params, xs, form)
    assert np.isfinite(ys).all()
    error = checks.relative((tuple(state.memory), ys), want)
    assert error <= 3e-4, (form, error)


def test_signature_behaviour():
  """A later token with a larger gate takes over what a key holds: the read is
  the mean of the values under softmax of the gates, exactly; and it learns to
  revise in context."""
  key, values = jnp.eye(3)[0], jnp.asarray([[1.0, 2.0], [5.0, -1.0]])
  ks = jnp.stack([key, key])
  read = jax.jit(exponential_attention)
  for gates in ([0.0, 0.0], [0.0, 4.0], [200.0, 190.0], [0.0, 300.0]):
    gates, still = jnp.asarray(gates), jnp.zeros(2)
    state = empty(3, 2)
    _, out = read(state, ks, ks, values, log_input=gates, log_decay=still)
    mean = jax.nn.softmax(gates) @ values
    np.testing.assert_allclose(out[1], mean, rtol=1e-5)
  np.testing.assert_allclose(out[1], values[1], rtol=1e-5)

  draw = functools.partial(checks.pairs, count=8, keys=3, rewrite=True)
  cell = memzoo.make("mlstm", d_model=8, num_heads=2)
  _, accuracy = checks.learn(cell, draw, 400)
  assert accuracy > 0.95, accuracy


def test_nothing_to_read():
  """A query that meets no key reads about nothing: the denominator is the 1 of
  (21), not a sum that vanishes."""
  q, k = jnp.eye(3)[:1], jnp.eye(3)[1:2]
  _, out = jax.jit(exponential_attention)(
    empty(3, 2), q, k, jnp.ones((1, 2)), log_input=jnp.zeros(1),
    log_decay=jnp.zeros(1),
  )  # fmt: skip
  np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(backbone="lstm"), r"backbone must be one of \('xlstm', 'xlstm_7b'\)"),
    (dict(forget_gate="tanh"), r"forget_gate must be one of \('sigmoid', 'exp"),
    (dict(expand=0.0), "expand must be such that V is whole, got 0.0"),
    (dict(num_heads=5), "expand must be such that V is whole"),
    (dict(block_size=5), "block_size must be a divisor of expand · d_model"),
    (dict(qk_ratio=0.5), "qk_ratio must be 1 in 'xlstm', got 0.5"),
    (
      dict(backbone="xlstm_7b", qk_ratio=0.3),
      "qk_ratio must be such that K is",
    ),
    (dict(soft_cap=0.0), "soft_cap must be above 0"),
    (dict(conv_size=0), "conv_size must be a positive integer"),
  ),
)
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("mlstm", d_model=12, **options)
