"""MAC, MAG and MAL against section 4 of Behrouz et al. 2024, and streaming."""

import dataclasses
import functools

import checks
from flax import nnx
import jax
import jax.numpy as jnp
import model_checks
from model_checks import call, next_token_loss
import numpy as np
import pytest

import memzoo
from memzoo import models
from memzoo.cells.ttt.titans import Titans
from memzoo.models.titans import MAC, MAG, MAL, TitansLM

D, N, V = 8, 2, 11
MEMORY = Titans(
  D, num_heads=2, mini_batch_size=3, expansion=2, conv_size=2,
  memory_norm=False,
)  # fmt: skip
SHARED = dict(num_heads=2, persistent=N, attention_conv=2, memory=MEMORY)
LAYERS = {
  "mac": MAC(D, segment=4, **SHARED),
  "mag": MAG(D, window=3, **SHARED),
  "mal": MAL(D, window=3, **SHARED),
}


def drawn(layer):
  """Parameters away from their starting values."""
  params, r = jax.jit(layer.init)(jax.random.key(0)), np.random.default_rng(1)
  noise = lambda x: jnp.asarray(x + 0.1 * r.normal(size=x.shape), jnp.float32)
  return jax.tree.map(noise, params)


def inputs(length, seed=2):
  r = np.random.default_rng(seed)
  return jnp.asarray(r.normal(size=(length, D)), jnp.float32)


@functools.partial(jax.jit, static_argnames=("layer", "form"))
def run(layer, params, state, xs, reset=None, mask=None, form=None):
  return memzoo.scan(
    layer, params, state, xs, reset=reset, mask=mask, implementation=form,
    reports=True,
  )  # fmt: skip


# The papers' layers, segment by segment and token by token.


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def rms(x, scale):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale


def convolve(x, kernel):
  padded = np.concatenate([np.zeros((len(kernel) - 1, x.shape[1])), x])
  return sum(row * padded[w : w + len(x)] for w, row in enumerate(kernel))


def rotate(x, place):
  """x [H, K]: channel i turns with i + K / 2 by place · 10000^(−2 i / K)."""
  half = x.shape[1] // 2
  angle = place * 10000.0 ** (-np.arange(half) / half)
  turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], 1)


def attend(q, seen):
  """Softmax attention of q [H, K] to [(k, v), …]."""
  k, v = (np.stack(x, 1) for x in zip(*seen))
  scores = np.einsum("hk,htk->ht", q, k) / np.sqrt(q.shape[1])
  weights = np.exp(scores - scores.max(1, keepdims=True))
  weights /= weights.sum(1, keepdims=True)
  return np.einsum("ht,htk->hk", weights, v).reshape(-1)


class Attention:
  """The projections of one layer, and its persistent tokens."""

  def __init__(self, params, heads):
    self.p, self.heads = params, heads
    rows = params["persistent"] @ params["qkv"]
    self.prefix = [self.split(row, i)[1:] for i, row in enumerate(rows)]

  def split(self, row, place):
    q, k, v = row.reshape(3, self.heads, -1)
    return rotate(q, place), (rotate(k, place)), v

  def project(self, xs):
    return convolve(xs @ self.p["qkv"], self.p["conv"])


class Memory:
  """`Titans` one token at a time: it is held to its paper in its own test."""

  def __init__(self, cell, params):
    self.cell, self.params = cell, params
    self.state = cell.initial_state(params)
    self.one = jax.jit(cell.step)

  def __call__(self, x):
    x = jnp.asarray(x, jnp.float32)
    self.state, y = self.one(self.params, self.state, x)
    return np.float64(y)


def gate(p, y, m):
  return rms(y, p["norm_attention"]) * sigmoid(rms(m, p["norm_memory"]))


def retrieve(cell, p, weights, x, q):
  """y of `Titans` at input x, of what `weights` recall for q [H, K]."""
  gelu = lambda z: (
    0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
  )
  o = np.stack([
    gelu(q[j] @ weights[0][j]) @ weights[1][j] for j in range(cell.num_heads)
  ])  # fmt: skip
  z = x @ p["gate"]
  o = rms(o, p["norm"]).reshape(-1) * z * sigmoid(z)
  return o @ p["out"]


def mac(layer, params, xs):
  p = jax.tree.map(np.float64, params)
  attention = Attention(p["attention"], layer.num_heads)
  memory = Memory(layer.lmm, params["memory"])
  rows, out = attention.project(xs), []
  m = p["memory"]
  q = convolve(xs @ m["qkv"][:, :D], m["conv"][:, :D])
  q = (q * sigmoid(q)).reshape(len(xs), layer.lmm.num_heads, -1)
  q = q / np.sqrt(np.sum(q**2, -1, keepdims=True) + 1e-6)
  for first in range(0, len(xs), layer.segment):
    segment = range(first, min(first + layer.segment, len(xs)))
    weights = [np.float64(w.w) for w in memory.state.inner.model]  # M_{t−1}
    hs = [retrieve(layer.lmm, m, weights, xs[t], q[t]) for t in segment]
    split = lambda row, i: attention.split(row, N + i)
    h_rows = [split(h @ attention.p["qkv"], i) for i, h in enumerate(hs)]
    x_rows = [split(rows[t], i) for i, t in enumerate(segment)]
    for i in range(len(segment)):
      keys = attention.prefix + [r[1:] for r in h_rows[: i + 1]]
      keys = keys + [r[1:] for r in x_rows[: i + 1]]
      y = attend(x_rows[i][0], keys) @ attention.p["out"]
      out.append(gate(p, y, memory(y)))
  return np.stack(out)


def window_attention(layer, p, xs, stays):
  """Of the tokens before it, each sees the last W; the persistent ones go with
  them, or stay."""
  attention = Attention(p["attention"], layer.num_heads)
  seen, out = list(attention.prefix), []
  for t, row in enumerate(attention.project(xs)):
    q, *pair = attention.split(row, N + t)
    seen.append(pair)
    last = seen[-layer.window :]
    if stays:
      last = seen[:N] + seen[N:][-layer.window :]
    out.append(attend(q, last) @ attention.p["out"])
  return np.stack(out)


def mag(layer, params, xs):
  p = jax.tree.map(np.float64, params)
  memory = Memory(layer.lmm, params["memory"])
  m = np.stack([memory(x) for x in xs])
  return gate(p, window_attention(layer, p, xs, True), m)


def mal(layer, params, xs):
  p = jax.tree.map(np.float64, params)
  memory = Memory(layer.lmm, params["memory"])
  y = np.stack([memory(x) for x in xs])
  return window_attention(layer, p, y, False)


@pytest.mark.parametrize(
  "name,oracle", [("mac", mac), ("mag", mag), ("mal", mal)]
)
def test_paper_equation(name, oracle):
  """Two segments and a half, and past the window."""
  layer = LAYERS[name]
  params, xs = drawn(layer), inputs(10)
  want = oracle(layer, params, np.float64(xs))
  for form in ("step", "chunk"):
    got = run(layer, params, None, xs, form=form)[1]
    assert checks.relative(got, want) <= checks.FORWARD, form


# Every form, resets, gaps, and a stream cut anywhere.


def flags(length, rate, seed):
  return jnp.asarray(np.random.default_rng(seed).random(length) < rate)


@functools.partial(jax.jit, static_argnames=("layer", "form"))
def with_gradients(layer, params, xs, reset, mask, form):
  def loss(params, xs):
    state, ys, reports = memzoo.scan(
      layer, params, None, xs, reset=reset, mask=mask, implementation=form,
      reports=True,
    )  # fmt: skip
    floats = [s for s in jax.tree.leaves(state) if checks.is_float(s)]
    return checks.wave(ys, *floats, *reports.values()), (state, ys, reports)

  grads, out = jax.grad(loss, (0, 1), has_aux=True)(params, xs)
  return out, grads


@pytest.mark.parametrize("name", LAYERS)
def test_scan_equals_step_under_resets_and_gaps(name):
  """Values, state and gradients; the memory's own forms, and deeper ones, are
  held elsewhere."""
  memory = dataclasses.replace(MEMORY, memory_depth=1)
  layer, xs = dataclasses.replace(LAYERS[name], memory=memory), inputs(14)
  params = drawn(layer)
  reset, mask = flags(14, 0.2, 1), flags(14, 0.8, 2)
  want, want_grads = with_gradients(layer, params, xs, reset, mask, "step")
  out, grads = with_gradients(layer, params, xs, reset, mask, "scan")
  assert checks.relative(out, want) <= checks.FORWARD
  assert checks.relative(grads, want_grads) <= checks.GRADIENT
  for path, g in jax.tree_util.tree_leaves_with_path(grads[0]):
    assert np.isfinite(g).all()
    assert np.any(g), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", LAYERS)
def test_streams_by_segments_and_by_tokens(name):
  """The unit is the token: any cut gives what one call gives."""
  layer, xs = LAYERS[name], inputs(12)
  params = drawn(layer)
  end, whole, reports = run(layer, params, None, xs, form="scan")
  state, parts = None, []
  for t in range(12):
    state, *part = run(layer, params, state, xs[t : t + 1], form="step")
    parts.append(part)
  ys, report = jax.tree.map(lambda *y: jnp.concatenate(y), *parts)
  assert checks.relative((ys, report), (whole, reports)) <= checks.FORWARD
  assert checks.relative(state, end) <= checks.FORWARD
  # By segments, by more and by less, with what is not in the call masked.
  for cuts in ((4, 8), (3, 9), (6,)):
    state, total = layer.initial_state(params), 0.0
    for first, last in zip((0, *cuts), (*cuts, 12)):
      index = jnp.arange(12)
      mask = (index >= first) & (index < last)
      state, ys, _ = run(layer, params, state, xs, None, mask, form="scan")
      total += ys
    assert checks.relative(total, whole) <= checks.FORWARD
    assert checks.relative(state, end) <= checks.FORWARD


@pytest.mark.parametrize("name", LAYERS)
def test_causal_and_fresh_after_a_reset(name):
  """Exactly: nothing of later tokens, and after a reset nothing of earlier
  ones but the parameters."""
  layer, params, xs = LAYERS[name], drawn(LAYERS[name]), inputs(14)
  reset, mask = jnp.arange(14) == 5, jnp.arange(14) < 11

  @jax.jit
  def sensitivity(xs):
    late = lambda xs: run(layer, params, None, xs, reset, mask, form="scan")[1]
    ys, pull = jax.vjp(late, xs)
    index = jnp.arange(14)[:, None]
    part = lambda flags: pull(jnp.where(flags, jnp.cos(ys), 0))[0]
    return part(index < 4), part(index >= 5), ys

  early, after, ys = sensitivity(xs)
  assert np.any(early[:4]) and not np.any(early[4:])
  assert np.any(after[5:]) and not np.any(after[:5])
  alone = run(layer, params, None, xs[5:11], form="step")[1]
  assert checks.relative(ys[5:11], alone) <= checks.FORWARD


def test_the_segment_reads_the_memory_of_the_segment_before():
  """In MAC what a segment learned reaches attention in the next alone: the
  keys of h come from weights that stand still."""
  layer = LAYERS["mac"]
  params, xs = drawn(layer), inputs(9)
  states = []
  state = layer.initial_state(params)
  for t in range(9):
    state, _, _ = run(layer, params, state, xs[t : t + 1], form="step")
    states.append(state)
  w = [np.asarray(s.past[0].w) for s in states]
  learned = [np.asarray(s.memory.inner.model[0].w) for s in states]
  for t in range(9):
    start = t - t % 4
    want = (
      learned[start - 1] if start else np.asarray(params["memory"]["memory_0"])
    )
    np.testing.assert_array_equal(w[t], want)
  assert not np.allclose(w[4], w[0])


# Models


def lm(name, **options):
  own = dict(segment=4) if name == "mac" else dict(window=3)
  return TitansLM(
    name, 2, V, d_model=D, num_heads=2, persistent=N, mlp_width=5,
    memory=dict(num_heads=2, mini_batch_size=3, expansion=2, conv_size=2),
    rngs=nnx.Rngs(0), **own, **options,
  )  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_language_model_decodes_as_it_trains(name):
  model = lm(name)
  tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, V)
  mask = jnp.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1]], bool)
  reset = jnp.zeros((2, 7), bool).at[1, 4].set(True)
  flags = dict(mask=mask, reset=reset)
  _, _, reports = call(
    model, None, tokens, **flags, reports=True, implementation="scan"
  )
  assert reports["surprise"] > 0 and "layers/1/inner_loss" in reports
  model_checks.streams(model, tokens, **flags, implementation="scan")


def test_language_model_learns_and_generates():
  """A text that repeats, of which the first period is given."""
  model = lm("mac")
  text = jnp.tile(jax.random.permutation(jax.random.key(1), V)[:6], 3)[None]
  loss = lambda m, _: next_token_loss(m, text, implementation="scan")
  model, losses = model_checks.train(model, loss, 400)
  assert losses[-1] < 0.1 * losses[0], losses[::40]
  tokens = models.generate(
    model, None, text[:, :6], 6, temperature=0, implementation="scan"
  )
  np.testing.assert_array_equal(tokens, text[:, 6:12])


@pytest.mark.parametrize("name", LAYERS)
def test_config_round_trip(name):
  model_checks.config_round_trip(lambda: lm(name, dropout=0.1))


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: MAC(8, segment=0), "segment must be a positive integer, got 0"),
    (
      lambda: MAG(8, persistent=-1),
      "MAG: persistent must be 0 or more, got -1",
    ),
    (
      lambda: MAL(8, window=2),
      "MAL: persistent must be at most window=2, got 4",
    ),
    (lambda: MAC(8, memory=Titans(6)), "its memory must have d_model=8, got 6"),
    (lambda: MAG(8, num_heads=3), "num_heads=3 must divide d_model=8"),
    (
      lambda: TitansLM("mak", 1, 5, d_model=8, rngs=nnx.Rngs(0)),
      "unknown architecture 'mak'; did you mean",
    ),
  ],
)
def test_options_are_checked(make, message):
  with pytest.raises(ValueError, match=message):
    make()
