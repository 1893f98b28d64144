"""SambaY (arXiv:2507.06607, section 2): one cache, one memory, many readers."""

import functools

from checks import FORWARD, relative
from flax import nnx
import jax
import jax.numpy as jnp
import model_checks
from model_checks import call, shaken, values
import numpy as np
import pytest

from memzoo import models
from memzoo.models.sambay import GatedMemoryUnit, SambaY, remember
from memzoo.ops.attention import attention, empty

V = 7
TINY = dict(
  d_model=8, num_heads=4, num_kv_heads=2, window=3, capacity=12, mlp_width=5,
  mamba=dict(d_state=3, conv_size=3),
)  # fmt: skip


@functools.cache
def tiny(depth=12):
  """Parameters away from their starting values; two repeats above."""
  return shaken(SambaY(depth, V, **TINY, rngs=nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnames="implementation")
def prefill(model, state, tokens, **given):
  return model.next_logits(state, tokens, **given)


def silu(z):
  return z / (1 + np.exp(-z))


def rms(x, scale):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale


def read_outs(p, xs):
  """Of Mamba: m of every token, and what the layer gives."""
  k, e = p["conv"].shape
  r, n = p["dt"].shape[0], p["a_log"].shape[1]
  taps = np.concatenate([np.zeros((k - 1, e)), xs @ p["in"][:, :e]])
  h, ms = np.zeros((e, n)), []
  for t in range(len(xs)):
    u = silu(np.sum(taps[t : t + k] * p["conv"], 0) + p["conv_bias"])
    chosen = u @ p["select"]
    delta = np.log1p(np.exp(chosen[:r] @ p["dt"] + p["dt_bias"]))[:, None]
    h = np.exp(-delta * np.exp(p["a_log"])) * h
    h = h + delta * np.outer(u, chosen[r : r + n])
    ms.append(h @ chosen[r + n :] + p["d"] * u)
  ms = np.stack(ms)
  return ms, (ms * silu(xs @ p["in"][:, e:])) @ p["out"]


def mlp(p, x):
  gate, up = np.split(rms(x, p["mlp_norm"]["scale"]) @ p["mlp"]["up"], 2, -1)
  return x + (silu(gate) * up) @ p["mlp"]["down"]


def cross_attention(p, xs, k, v):
  """Queries [T, D] to keys and values [T, G, K] of the tokens so far."""
  groups, width = k.shape[1:]
  q = (xs @ p["query"]).reshape(len(xs), groups, -1, width)
  out = []
  for t, row in enumerate(q):
    w = np.exp(np.einsum("ghk,tgk->ght", row, k[: t + 1]) / np.sqrt(width))
    w /= w.sum(-1, keepdims=True)
    out.append(np.einsum("ght,tgk->ghk", w, v[: t + 1]).reshape(-1))
  return np.stack(out) @ p["out"]


def oracle(model, tokens):
  """Logits of one row. Samba itself is held to its paper in its own test."""
  stack = model.encoder.stack
  x = model.encoder.embedding[...][tokens]
  x = np.float64(jax.jit(stack.samba)(None, x[None])[1][0])
  p, p_encoder = values(stack), values(model.encoder)
  source = p["source"]
  m, y = read_outs(
    source["memory"]["params"], rms(x, source["memory_norm"]["scale"])
  )
  x = mlp(source, x + y)
  full = p["full"]
  u = rms(x, full["mixer_norm"]["scale"])
  kv = (u @ p["keys_values"]).reshape(len(x), 2, stack.groups, -1)
  k, v = kv[:, 0], kv[:, 1]
  x = mlp(full, x + cross_attention(full["mixer"], u, k, v))
  for r in range(stack.repeats):
    gate, look = (
      jax.tree.map(lambda w, r=r: w[r], p["cross"][i]) for i in range(2)
    )
    u = rms(x, gate["mixer_norm"]["scale"])
    unit = gate["mixer"]
    x = mlp(gate, x + (m * silu(u @ unit["gate"])) @ unit["out"])
    u = rms(x, look["mixer_norm"]["scale"])
    x = mlp(look, x + cross_attention(look["mixer"], u, k, v))
  return rms(x, p_encoder["norm"]["scale"]) @ p_encoder["embedding"].T


def test_paper_equation():
  model = tiny()
  tokens = jax.random.randint(jax.random.key(1), (1, 9), 0, V)
  want = oracle(model, np.asarray(tokens)[0])
  for form in ("scan", "chunk"):
    logits = call(model, None, tokens, implementation=form)[1]
    assert relative(logits[0], want) < FORWARD, form


def test_gated_memory_unit():
  unit = GatedMemoryUnit(4, 6, rngs=nnx.Rngs(0))
  assert unit.gate.shape == (4, 6) and unit.out.shape == (6, 4)
  x, m = (
    jax.random.normal(jax.random.key(n), (3, n), jnp.float32) for n in (4, 6)
  )
  p = values(unit)
  want = (np.float64(m) * silu(np.float64(x) @ p["gate"])) @ p["out"]
  assert relative(unit(x, m), want) < FORWARD
  assert relative(unit(x[0], m[0]), want[0]) < FORWARD
  # The gate alone lets nothing through, and no memory gives nothing.
  assert not np.any(unit(x, jnp.zeros_like(m)))


def test_layers_are_the_authors():
  """Layers 0 … L/2 − 1 Samba, then one Mamba, one full attention, and pairs of
  GMU and cross-attention to the end; one cache, of bounded size."""
  model = nnx.eval_shape(lambda: SambaY(12, V, **TINY, rngs=nnx.Rngs(0)))
  stack = model.encoder.stack
  assert [c.name for c in stack.samba.cells] == ["mamba", "window"]
  assert stack.samba.depth == 6 and not stack.cells[1].rotary
  assert 6 + 2 + 2 * stack.repeats == 12
  made = tiny()
  state = jax.eval_shape(lambda: made.initial_state(3)).layers
  assert state.cache.k.shape == (3, 2, 12, 2)
  assert state.source.memory.h.shape == (3, 16, 3)
  # Nothing is held for the layers above: depth adds to the lower half alone.
  held = lambda depth: sum(
    x.size
    for x in jax.tree.leaves(
      jax.eval_shape(
        lambda: SambaY(depth, V, **TINY, rngs=nnx.Rngs(0)).initial_state(1)
      )
    )
  )
  assert held(16) - held(12) == held(12) - held(8)
  samba = jax.eval_shape(lambda: made.initial_state(1)).layers.samba
  per_pair = sum(x.size // 3 for x in jax.tree.leaves(samba))
  assert held(12) - held(8) == per_pair


MASK = jnp.ones((2, 10), bool).at[0, :2].set(False).at[1, 5].set(False)
RESET = jnp.zeros((2, 10), bool).at[1, 6].set(True)


def test_streams_token_by_token():
  tokens = jax.random.randint(jax.random.key(2), (2, 10), 0, V)
  _, logits = model_checks.streams(tiny(), tokens, mask=MASK, reset=RESET)
  _, fresh = call(tiny(), None, tokens[1:, 6:])
  assert relative(logits[1:, 6:], fresh) < FORWARD


def test_prompt_goes_through_the_self_decoder_alone():
  """The same logits and memory as from the whole call, in linear time."""
  model = tiny()
  tokens = jax.random.randint(jax.random.key(2), (2, 10), 0, V)
  mask = MASK.at[0, 8:].set(False)
  want, logits = call(model, None, tokens, mask=mask, reset=RESET)
  state, last = prefill(model, None, tokens, mask=mask, reset=RESET)
  assert relative(state, want) < FORWARD
  assert relative(last, jnp.stack([logits[0, 7], logits[1, 9]])) < FORWARD
  nothing = prefill(model, None, tokens, mask=jnp.zeros((2, 10), bool))
  np.testing.assert_array_equal(nothing[1], 0)
  long = SambaY(8, V, **{**TINY, "capacity": 4096}, rngs=nnx.Rngs(0))

  flops = lambda run, length: (
    jax.jit(run)
    .lower(jnp.zeros((1, length), jnp.int32))
    .cost_analysis()["flops"]
  )
  run = lambda tokens: long.next_logits(None, tokens, implementation="chunk")
  whole = lambda tokens: long(None, tokens, implementation="chunk")
  assert flops(run, 512) < 0.5 * flops(whole, 512)


def test_generates_what_the_whole_call_gives():
  model = tiny()
  prompt = jax.random.randint(jax.random.key(4), (2, 5), 0, V)
  out = models.generate(model, None, prompt, 6, temperature=0)
  whole = jnp.concatenate([prompt, out], axis=1)
  _, logits = call(model, None, whole[:, :-1])
  np.testing.assert_array_equal(out, jnp.argmax(logits[:, 4:], -1))
  with pytest.raises(ValueError, match="holds at most 12"):
    models.generate(model, None, prompt, 8, temperature=0)
  with pytest.raises(ValueError, match="13 inputs, holds at most 12"):
    model(None, jnp.zeros((1, 13), jnp.int32))


def test_remember_leaves_what_attention_leaves():
  r = np.random.default_rng(0)
  k, v = (jnp.asarray(r.normal(size=(7, 1, 3)), jnp.float32) for _ in range(2))
  one = empty(9, 3, 3)
  ring = one._replace(k=one.k[None], v=one.v[None])
  for reset in (None, jnp.arange(7) == 4):
    mask = jnp.array([1, 1, 0, 1, 1, 0, 1], bool)
    want = attention(one, k[:, 0], k[:, 0], v[:, 0], reset=reset, mask=mask)[0]
    got = remember(ring, k, v, reset, mask)
    held = jnp.arange(9) < want.count
    np.testing.assert_array_equal(got.count, want.count)
    np.testing.assert_array_equal(got.position, want.position)
    assert relative(got.k[0][held], want.k[held]) == 0
    assert relative(got.v[0][held], want.v[held]) == 0


def test_gradients_and_learning():
  """A text with a far repeat is learnt, and a reset lets no gradient
  through."""
  model_checks.learns_to_repeat(tiny(8), V, implementation="scan")
  model_checks.no_gradient_through_a_reset(tiny(8), V)


def make(**options):
  return SambaY(
    **{**dict(depth=8, vocab_size=V), **TINY, **options}, rngs=nnx.Rngs(0)
  )


def test_config_round_trip_and_wrong_options():
  model_checks.config_round_trip(lambda: make(dropout=0.1, dtype="bfloat16"))
  state = jax.eval_shape(lambda: make(dtype="bfloat16").initial_state(1))
  assert state.layers.cache.k.dtype == jnp.bfloat16
  model_checks.refuses(
    make,
    ("multiple of 4, 8 or more, got 6", dict(depth=6)),
    ("capacity must be a positive integer, got 0", dict(capacity=0)),
    ("mlp_width must be positive", dict(mlp_width=0)),
    ("one MLP and no convolution", dict(conv_size=3)),
    ("num_heads=3 must divide d_model=8", dict(num_heads=3, num_kv_heads=1)),
  )
