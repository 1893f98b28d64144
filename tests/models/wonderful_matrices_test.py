"""Wonderful Matrices (arXiv:2412.11834): layers, experts, bounded attention."""

import functools

from checks import FORWARD, GRADIENT, relative, wave
from flax import nnx
import jax
import jax.numpy as jnp
import model_checks
from model_checks import call, no_dead_gradient, shaken, values
import numpy as np
import pytest

import memzoo
from memzoo import models
from memzoo.models.wonderful_matrices import (
  DynamicMaskAttention,
  ExpertOptions,
  Experts,
  RotarySSD,
  WonderfulMatrices,
)

V = 7
TINY = dict(
  d_model=8, num_heads=2, period=3, keep=4, mlp_width=5,
  experts=dict(num_keys=3, heads=2, knn=2, key_dim=4),
)  # fmt: skip


@functools.cache
def tiny(depth=3):
  """Parameters away from their starting values."""
  return shaken(WonderfulMatrices(depth, V, **TINY, rngs=nnx.Rngs(0)), 0.2)


def silu(z):
  return z / (1 + np.exp(-z))


def softmax(z):
  e = np.exp(z - z.max())
  return e / e.sum()


def softplus(z):
  return np.log1p(np.exp(z))


def rms(x, scale):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale


def turn(x, place):
  """x [H, K] by its position."""
  half = x.shape[1] // 2
  angle = place * 10000.0 ** (-np.arange(half) / half)
  a, b = x[:, :half], x[:, half:]
  return np.concatenate(
    [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)],
    axis=1,
  )  # fmt: skip


def ssd(p, us, count):
  """count heads, one after the other in time."""
  width = us.shape[1] // count
  h, out = np.zeros((count, width, width)), []
  for t, u in enumerate(us):
    c, b, x = (u @ p[n] for n in "cbx")
    c, b = (turn(y.reshape(count, width), t) for y in (c, b))
    x, dt = x.reshape(count, width), softplus(u @ p["dt"])
    y = np.zeros_like(x)
    for n in range(count):
      a = np.exp(-np.exp(p["a_log"][n]) * dt[n])
      h[n] = a * h[n] + np.outer(b[n], dt[n] * x[n])
      y[n] = c[n] @ h[n] + p["d"][n] * x[n]
    out.append(y.reshape(-1) @ p["out"])
  return np.stack(out)


def attention(p, us, count, keep):
  width = us.shape[1] // count
  q, k, v = np.split(us @ p["qkv"], 3, axis=1)
  weight = np.exp(p["a"] * softplus(v @ p["dt"]))  # [T, H]
  heads = lambda x: x.reshape(len(us), count, width)
  q, k = (
    np.stack([turn(r, t) for t, r in enumerate(heads(x))]) for x in (q, k)
  )
  v, out = heads(v), np.zeros((len(us), count, width))
  for t in range(len(us)):
    for n in range(count):
      top = sorted(range(t + 1), key=lambda j, n=n: -weight[j, n])[:keep]
      score = [k[j, n] @ q[t, n] / np.sqrt(width) + weight[j, n] for j in top]
      out[t, n] = softmax(np.array(score)) @ v[top, n]
  return out.reshape(us.shape) @ p["out"]


def experts(p, x, options):
  """All n² keys are compared: x [T, D]."""
  o = options
  out = np.zeros_like(x)
  for t, row in enumerate(x):
    q = (row @ p["query"]).reshape(o.heads, 2, -1)
    for h in range(o.heads):
      first, second = (p["keys"][h, i] @ q[h, i] for i in range(2))
      score = (first[:, None] + second[None]).ravel()
      top = np.argsort(-score)[: o.knn]
      w = softmax(score[top]) * silu(p["down"][top] @ row)
      out[t] += w @ p["up"][top]
  return out


def oracle(model, tokens):
  """Logits of one row."""
  stack = model.encoder.stack
  p = values(model.encoder)
  x = p["embedding"][tokens]
  for i in range(stack.depth):
    repeat, place = divmod(i, len(stack.cells))
    b = jax.tree.map(lambda w, r=repeat: w[r], p["stack"]["blocks"][place])
    u = rms(x, b["memory_norm"]["scale"])
    memory = b["memory"]["params"]
    if place == len(stack.cells) - 1:
      y = attention(memory, u, TINY["num_heads"], TINY["keep"])
    else:
      y = ssd(memory, u, TINY["num_heads"])
    x = b["memory_residual"] * x + y
    u = rms(x, b["mlp_norm"]["scale"])
    gate, up = np.split(u @ b["mlp"]["up"], 2, -1)
    y = (silu(gate) * up) @ b["mlp"]["down"]
    y = y + experts(b["experts"], u, stack.experts)
    x = b["mlp_residual"] * x + y
  return rms(x, p["norm"]["scale"]) @ p["embedding"].T


def test_paper_equation():
  """Two repeats of the pattern, and more tokens than attention keeps."""
  model = tiny(6)
  tokens = jax.random.randint(jax.random.key(1), (1, 11), 0, V)
  want = oracle(model, np.asarray(tokens)[0])
  for form in ("scan", "chunk"):
    logits = call(model, None, tokens, implementation=form)[1]
    assert relative(logits[0], want) < FORWARD, form


def test_layers_are_the_authors():
  """Every eighth layer is attention, the others are state spaces."""
  model = nnx.eval_shape(
    lambda: WonderfulMatrices(16, V, d_model=8, rngs=nnx.Rngs(0))
  )
  names = [type(c).__name__ for c in model.encoder.stack.cells]
  assert names == ["RotarySSD"] * 7 + ["DynamicMaskAttention"]
  assert model.encoder.stack.repeats == 2
  # What is held does not grow with the text.
  model = tiny()
  state = jax.eval_shape(lambda: model.initial_state(1)).layers
  assert state[2].memory.kept.k.shape == (1, 1, 2, 4, 4)
  assert state[0].memory.h.shape == (1, 1, 2, 4, 4)


def test_experts():
  """Found by product keys as by a search of all; k of them have a gradient."""
  options = ExpertOptions(num_keys=4, heads=2, knn=3, key_dim=6)
  layer = Experts(5, options, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (6, 5))
  want = experts(values(layer), np.float64(x), options)
  assert relative(layer(x), want) < FORWARD
  assert relative(layer(x[2]), want[2]) < FORWARD
  graph, params = nnx.split(layer)
  grad = jax.grad(lambda p: wave(nnx.merge(graph, p)(x[:1])))(params)
  asked = np.any(nnx.to_pure_dict(grad)["up"], axis=1)
  assert 3 <= asked.sum() <= 6


MASK = jnp.ones((3, 11), bool).at[0, :2].set(False).at[1, 5].set(False)
RESET = jnp.zeros((3, 11), bool).at[1, 6].set(True).at[2, 2].set(True)


def test_streams_token_by_token():
  tokens = jax.random.randint(jax.random.key(2), (3, 11), 0, V)
  _, logits = model_checks.streams(tiny(), tokens, mask=MASK, reset=RESET)
  fresh = call(tiny(), None, tokens, mask=MASK.at[1, :6].set(False))[1]
  assert relative(logits[1, 6:], fresh[1, 6:]) < FORWARD


@pytest.mark.parametrize(
  "cell",
  [RotarySSD(6, 3), DynamicMaskAttention(6, 3, keep=3)],
  ids=["ssd", "attention"],
)
def test_forms_of_a_mixer(cell):
  """Values, states and gradients of every form, through resets and gaps."""
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (9, 6))
  given = dict(mask=MASK[1, :9], reset=RESET[1, :9])

  @jax.jit
  def run(params, xs):
    out = {}
    for form in ("step", *cell.implementations):

      def loss(params, xs, form=form):
        end, ys = memzoo.scan(
          cell, params, None, xs, implementation=form, **given
        )
        return wave(ys), (end, ys)

      out[form] = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, xs)
    return out

  out = run(params, xs)
  grads, result = out["step"]
  no_dead_gradient(grads)
  for form in cell.implementations:
    assert relative(out[form][1], result) < FORWARD, form
    assert relative(out[form][0], grads) < GRADIENT, form


def test_learns_to_copy_what_is_far():
  """The half that comes again, from attention that keeps it; all parameters
  have gradients, and a reset lets none through."""
  model = WonderfulMatrices(
    2, V, d_model=16, num_heads=2, period=2, keep=12, mlp_width=16,
    experts=TINY["experts"], rngs=nnx.Rngs(0),
  )  # fmt: skip
  model_checks.learns_to_repeat(model, V, implementation="chunk")
  model_checks.no_gradient_through_a_reset(model, V)


def test_generates_what_the_whole_call_gives():
  model = tiny()
  prompt = jax.random.randint(jax.random.key(4), (2, 5), 0, V)
  out = models.generate(model, None, prompt, 6, temperature=0)
  whole = jnp.concatenate([prompt, out], axis=1)
  _, logits = call(model, None, whole[:, :-1])
  np.testing.assert_array_equal(out, jnp.argmax(logits[:, 4:], -1))


def make(**options):
  return WonderfulMatrices(
    **{**dict(depth=3, vocab_size=V), **TINY, **options}, rngs=nnx.Rngs(0)
  )


def test_config_round_trip_and_wrong_options():
  model_checks.config_round_trip(lambda: make(dropout=0.1, dtype="bfloat16"))
  model_checks.refuses(
    make,
    ("positive multiple of the 3 cell", dict(depth=4)),
    ("num_heads=3 must divide d_model=8", dict(num_heads=3)),
    ("even width per head, got 1", dict(num_heads=8)),
    ("keep must be a positive integer, got 0", dict(keep=0)),
    ("period must be an integer, 1 or more, got 0", dict(period=0)),
    ("have no convolution", dict(conv_size=3)),
    ("key_dim must be even", dict(experts=dict(key_dim=3))),
    ("knn must be an integer, 1 or more", dict(experts=dict(knn=0))),
  )
