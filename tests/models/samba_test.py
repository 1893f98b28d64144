"""Samba (arXiv:2406.07522, section 2.1) and what it was compared with."""


from checks import FORWARD, relative
from flax import nnx
import jax
import jax.numpy as jnp
import model_checks
from model_checks import call, shaken
import numpy as np
import optax
import pytest

import memzoo
from memzoo import models
from memzoo.cells.ssm.mamba import Mamba
from memzoo.models.samba import PATTERNS, SIZES, samba

V = 7
TINY = dict(
  d_model=8, attention_heads=4, kv_heads=2, window=4, mlp_width=5,
  recurrent=Mamba(8, d_state=3, conv_size=3),
)  # fmt: skip


def build(made, vocab_size=V):
  return models.LanguageModel(
    made.cells, made.depth, vocab_size, **made.options, rngs=nnx.Rngs(0)
  )


# The paper's layers, token by token.


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def silu(z):
  return z * sigmoid(z)


def rms(x, scale):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale


def mamba(cell, p, xs):
  """Section 2.1.1: H = X W_in, eq. 1, eq. 2, the S6 recurrence, the gate."""
  k, e = p["conv"].shape
  n, r = cell.d_state, cell.rank
  w_in, w_g = p["in"][:, :e], p["in"][:, e:]
  h = np.concatenate([np.zeros((k - 1, e)), xs @ w_in])
  z, out = np.zeros((e, n)), []
  for t, x in enumerate(xs):
    u = silu(np.sum(h[t : t + k] * p["conv"], 0) + p["conv_bias"])
    chosen = u @ p["select"]  # W_r, W_b, W_c
    delta = np.log1p(np.exp(chosen[:r] @ p["dt"] + p["dt_bias"]))
    b, c = chosen[r : r + n], chosen[r + n :]
    decay = np.exp(-delta[:, None] * np.exp(p["a_log"]))
    z = decay * z + delta[:, None] * np.outer(u, b)
    out.append((z @ c + p["d"] * u) * silu(x @ w_g) @ p["out"])
  return np.stack(out)


def attention(cell, p, xs):
  """Section 2.1.2: softmax attention to the last w tokens, rotary."""
  heads, groups, k = cell.num_heads, cell.groups, cell.width
  freq = 10000.0 ** (-np.arange(k // 2) / (k // 2))

  def turn(x, place):
    if not cell.rotary:
      return x
    z = (x[:, : k // 2] + 1j * x[:, k // 2 :]) * np.exp(1j * place * freq)
    return np.concatenate([z.real, z.imag], 1)

  keys, values, out = [], [], []
  for t, x in enumerate(xs):
    qkv = (x @ p["qkv"]).reshape(-1, k)
    q, key, v = np.split(qkv, [heads, heads + groups])
    keys.append(turn(key, t))
    values.append(v)
    ks, vs = (np.stack(a[-cell.capacity :]) for a in (keys, values))
    o = []
    for h, q_h in enumerate(turn(q, t)):
      g = h // (heads // groups)
      w = np.exp(ks[:, g] @ q_h / np.sqrt(k))
      o.append(w / w.sum() @ vs[:, g])
    out.append(np.concatenate(o) @ p["out"])
  return np.stack(out)


def oracle(model, tokens):
  """Logits of one row: figure 2, bottom up, pre-norm with skips."""
  value = lambda tree: jax.tree.map(
    np.float64, nnx.to_pure_dict(nnx.state(tree))
  )
  encoder = value(model.encoder)
  stack = model.encoder.stack
  x = encoder["embedding"][tokens]
  for r in range(stack.repeats):
    for cell, block in zip(stack.cells, stack.blocks):
      p = jax.tree.map(lambda w, r=r: w[r], value(block))
      layer = mamba if isinstance(cell, Mamba) else attention
      u = rms(x, p["memory_norm"]["scale"])
      x = x + layer(cell, p["memory"]["params"], u)
      if "mlp" in p:
        gate, up = np.split(
          rms(x, p["mlp_norm"]["scale"]) @ p["mlp"]["up"], 2, -1
        )
        x = x + (silu(gate) * up) @ p["mlp"]["down"]
  return rms(x, encoder["norm"]["scale"]) @ encoder["embedding"].T


@pytest.mark.parametrize("name", PATTERNS)
def test_paper_equation(name):
  """Past the window, and each arrangement of figure 2."""
  depth = 2 * len(PATTERNS[name])
  rotary = name != "swa_mlp"  # and once without positions
  model = shaken(build(samba(depth=depth, pattern=name, rotary=rotary, **TINY)))
  tokens = jax.random.randint(jax.random.key(1), (1, 9), 0, V)
  for form in ("step", "scan"):
    logits = call(model, None, tokens, implementation=form)[1]
    want = oracle(model, np.asarray(tokens)[0])
    assert relative(logits[0], want) < FORWARD, form


def test_arrangements_have_the_papers_layers():
  """24 of 48 layers are MLPs in Samba, 18 of 54 in Mamba-SWA-MLP; and tables 9
  and 10: mixers of each kind at the scale of 1.7B."""
  for name, depth, kinds, mlps in (
    ("samba", 24, dict(mamba=12, window=12), 24),
    ("mamba_swa_mlp", 36, dict(mamba=18, window=18), 18),
    ("mamba_mlp", 24, dict(mamba=24), 24),
    ("swa_mlp", 24, dict(window=24), 24),
    ("mamba", 64, dict(mamba=64), 0),
  ):
    made = samba(depth=depth, pattern=name, **TINY)
    stack = nnx.eval_shape(lambda made=made: build(made)).encoder.stack
    cells = [cell.name for cell in stack.cells] * stack.repeats
    assert {kind: cells.count(kind) for kind in kinds} == kinds
    assert len(cells) == stack.depth == depth
    found = [block.mlp is not None for block in stack.blocks]
    assert sum(found) * stack.repeats == mlps
    if name == "mamba_swa_mlp":
      assert found == [False, True]


@pytest.mark.parametrize(
  "size, vocab, low, high",
  [
    ("421M", 32000, 418e6, 424e6),
    ("1.3B", 32000, 1.25e9, 1.35e9),
    ("1.7B", 50304, 1.65e9, 1.75e9),
    ("3.8B", 32064, 3.8e9, 3.9e9),
  ],
)
def test_published_sizes(size, vocab, low, high):
  """Embeddings tied, as in the authors' code."""
  made = samba(**SIZES[size])
  model = nnx.eval_shape(lambda: build(made, vocab))
  count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
  assert low < count < high, count
  far, near = made.cells
  assert (far.d_inner, far.d_state) == (2 * far.d_model, 16)
  assert far.rank == far.d_model // 16 and near.capacity == 2048


def test_streams_token_by_token():
  """Past the window, with a reset and gaps: logits and memory are those of the
  whole call, whose memory does not grow."""
  model = shaken(build(samba(depth=4, **TINY)))
  tokens = jax.random.randint(jax.random.key(2), (2, 11), 0, V)
  mask = jnp.ones((2, 11), bool).at[0, :2].set(False).at[1, 5].set(False)
  reset = jnp.zeros((2, 11), bool).at[1, 6].set(True)
  end, logits = model_checks.streams(model, tokens, mask=mask, reset=reset)
  shapes = lambda s: jax.tree.map(jnp.shape, s)
  assert shapes(end) == shapes(model.initial_state(2))
  _, fresh = call(model, None, tokens[1:, 6:])
  assert relative(logits[1:, 6:], fresh) < FORWARD


# What both memories are for.

COLOURS, LETTERS, FAR = 4, 3, 16  # 0 … 11 are text, 12 … 15 ask for a colour


def questions(key, rows, groups):
  """Groups of one letter in each colour, and a question: for the letter that
  one colour has in this group, or (FAR) for the letter of the first token.
  (tokens, targets, whether a question is near, far), [rows, 5 · groups]."""
  k_text, k_ask = jax.random.split(key)
  text = jax.random.randint(k_text, (rows, groups, COLOURS), 0, LETTERS)
  ask = jax.random.randint(k_ask, (rows, groups, 1), 0, 2 * COLOURS)
  near = ask < COLOURS
  token = jnp.where(near, COLOURS * LETTERS + ask, FAR)
  named = jnp.take_along_axis(text, ask % COLOURS, 2)
  target = jnp.where(near, named, text[:, :1, :1])
  tokens = jnp.concatenate([text + LETTERS * jnp.arange(COLOURS), token], 2)
  flags = lambda asks: jnp.concatenate([jnp.zeros_like(text, bool), asks], 2)
  flat = lambda x: x.reshape(rows, -1)
  targets = jnp.broadcast_to(target, tokens.shape)
  return tuple(map(flat, (tokens, targets, flags(near), flags(~near))))


def test_learns_near_and_far_and_beyond_its_length():
  """Trained on 25 tokens with a window of five, it recalls what the window
  holds and the first token of all; also in texts twice as long."""
  far = Mamba(16, d_state=8)
  made = samba(16, 2, attention_heads=1, window=5, mlp_width=32, recurrent=far)

  def loss(model, key):
    tokens, targets, near, far = questions(key, 32, 5)
    _, logits = model(None, tokens, implementation="scan")
    cost = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(cost, where=near | far)

  model, losses = model_checks.train(build(made, 17), loss, 600)
  assert losses[-20:].mean() < 0.2 * losses[0], losses[::60]
  tokens, targets, near, far = questions(jax.random.key(2), 64, 10)
  _, logits = call(model, None, tokens, implementation="scan")
  right = jnp.argmax(logits, -1) == targets
  late = jnp.arange(50) >= 25
  for asked in (near, far):
    share = jnp.mean(right, where=asked & late)
    assert share > 0.9, share


def test_one_mlp_width_per_cell_survives_a_config():
  made = samba(depth=4, pattern="mamba_swa_mlp", **TINY)
  model = build(made)
  again = models.from_config(models.to_config(model), nnx.Rngs(0))
  assert models.to_config(again) == models.to_config(model)
  assert relative(again, model) == 0
  with pytest.raises(ValueError, match="3 widths for a list of 2 cell"):
    build(made._replace(options=dict(mlp_width=(0, 5, 0))))
  with pytest.raises(ValueError, match="mlp_width must be .* got -1"):
    models.BlockOptions(mlp_width=(0, -1))


def test_wrong_options():
  with pytest.raises(ValueError, match="unknown pattern 'sambo'.*'samba'"):
    samba(depth=2, pattern="sambo", **TINY)
  with pytest.raises(ValueError, match="positive multiple of 2, got 3"):
    samba(depth=3, **TINY)
  with pytest.raises(ValueError, match="must divide"):
    samba(8, 2, attention_heads=3)
  gla = memzoo.make("gla", d_model=8)
  assert samba(8, 2, attention_heads=2, recurrent=gla).cells[0] is gla
