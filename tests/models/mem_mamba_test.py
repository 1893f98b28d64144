"""MemMamba (arXiv:2510.03279) against its layers, token by token."""

import functools

from checks import FORWARD, relative, wave
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memzoo.models.mem_mamba import MemMamba

V = 7
TINY = dict(
  d_model=6, depth=5, d_state=3, capacity=3, rank=4, every=2, layers_below=2
)


@functools.cache
def tiny(**options):
  """Parameters away from their starting values."""
  model = MemMamba(V, **TINY | options, rngs=nnx.Rngs(0))
  r = np.random.default_rng(3)
  noise = lambda x: jnp.asarray(x + 0.4 * r.normal(size=x.shape), jnp.float32)
  return jax.tree.map(noise, model)


@functools.partial(jax.jit, static_argnames="reports")
def call(model, state, tokens, **given):
  return model(state, tokens, **given)


def draw(shape, seed=1):
  return jax.random.randint(jax.random.key(seed), shape, 0, V)


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def silu(z):
  return z * sigmoid(z)


def softmax(z):
  e = np.exp(z - z.max())
  return e / e.sum()


def rms(p, x):
  return x / np.sqrt(np.mean(x**2) + 1e-5) * p["scale"]


def mamba(p, held, u):
  """One token: held is (inputs of the convolution, h [E, N])."""
  past, h = held
  x, z = np.split(u @ p["in"], 2)
  taps, n = len(p["conv"]), h.shape[1]
  past = (past + [x])[-taps:]
  rows = [np.zeros_like(x)] * (taps - len(past)) + past
  x = silu(sum(w * r for w, r in zip(p["conv"], rows)) + p["conv_bias"])
  low, b, c = np.split(x @ p["select"], [-2 * n, -n])
  dt = np.log1p(np.exp(low @ p["dt"] + p["dt_bias"]))
  decay = np.exp(-dt[:, None] * np.exp(p["a_log"]))
  h = decay * h + np.outer(dt * x, b)
  return (past, h), ((h @ c + p["d"] * x) * silu(z)) @ p["out"]


def attention(p, u, notes):
  if not notes:
    return 0.0
  s = np.stack(notes)
  weights = softmax((s @ p["k"]) @ (u @ p["q"]) / np.sqrt(s.shape[1]))
  return p["scale"] * (weights @ s @ p["v"])


def insert(pool, note, importance, capacity, replacement):
  """pool: (note, importance), the oldest first."""
  if len(pool) == capacity:
    if replacement == "fifo":
      pool = pool[1:]
    else:
      least = min(range(capacity), key=lambda i: pool[i][1])
      if importance <= pool[least][1]:
        return pool
      pool = pool[:least] + pool[least + 1 :]
  return pool + [(note, importance)]


def oracle(model, tokens):
  """Logits of one row, and its pools at the end."""
  p = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model)))
  options, depth = model.options, TINY["depth"]
  ls = [p["layers"][i] for i in range(depth)]
  width, states = TINY["d_model"], TINY["d_state"]
  held = [([], np.zeros((2 * width, states))) for _ in ls]
  zs, pools = [np.zeros(width)] * depth, [[] for _ in ls]
  out, counts = [], np.zeros(2)
  for token in tokens:
    x = p["embedding"][token]
    for i, q in enumerate(ls):
      u = rms(q["input_norm"], x)
      noted, asked = (
        sigmoid(v @ q["scores"][n] + q["bias"][n])
        for n, v in enumerate((u, zs[i]))
      )
      old = [s for s, _ in pools[i]]
      if noted > options.note_threshold:
        before = pools[i]
        pools[i] = insert(before, u @ q["note"], noted, TINY["capacity"],
                          options.replacement)  # fmt: skip
        counts[0] += pools[i] is not before
      if asked > options.read_threshold:
        x = x + attention(q["read"], u, old)
        counts[1] += bool(old)
      if i and (i + 1) % TINY["every"] == 0:
        below = pools[max(i - TINY["layers_below"], 0) : i]
        x = x + attention(q["across"], u, [s for pool in below for s, _ in pool])
      held[i], zs[i] = mamba(q["mamba"]["params"], held[i], rms(q["norm"], x))
      x = x + zs[i]
    out.append(p["embedding"] @ rms(p["norm"], x))
  return np.stack(out), pools, counts / depth / len(tokens)


@pytest.mark.parametrize("replacement", ["fifo", "priority"])
def test_paper_equation(replacement):
  model, tokens = tiny(replacement=replacement), draw((1, 16))
  want, pools, shares = oracle(model, np.asarray(tokens[0]))
  state, got, reports = call(model, None, tokens, reports=True)
  assert relative(got[0], want) < FORWARD
  np.testing.assert_allclose([reports["noted"], reports["read"]], shares, 1e-5)
  assert (0.1 < shares).all() and (shares < 0.9).all(), shares
  assert max(map(len, pools)) == TINY["capacity"]
  for layer, pool in zip(state, pools):
    held = np.asarray(layer.notes.s)[0, np.asarray(layer.notes.importance[0]) > 0]
    order = lambda s: s[np.lexsort(s.T)] if len(s) else s
    want = np.array([s for s, _ in pool]).reshape(-1, TINY["rank"])
    assert relative(order(held), order(want)) < FORWARD


MASK = np.array([[0, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1, 1]], bool)
RESET = np.array([[0, 0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1, 0]], bool)


def test_streams_token_by_token_under_resets_and_gaps():
  model, tokens = tiny(), draw((2, 7))
  dirty = jnp.where(MASK, tokens, 99)
  end, whole = call(model, None, dirty, mask=MASK, reset=RESET)
  state, parts = model.initial_state(2), []
  for t in range(7):
    cut = lambda x, t=t: x[:, t : t + 1]
    state, y = call(model, state, cut(tokens), mask=cut(MASK), reset=cut(RESET))
    parts.append(y[:, 0])
  assert relative(jnp.stack(parts, 1), whole) < FORWARD
  assert relative(state, end) < FORWARD
  np.testing.assert_array_equal(np.any(whole, 2), MASK)
  # A gap is no token, and a reset is a fresh start (at a gap it is not seen).
  alone = call(model, None, tokens[:1, jnp.array([3, 5, 6])])[1]
  assert relative(whole[:1, jnp.array([3, 5, 6])], alone) < FORWARD
  alone = call(model, None, tokens[1:, jnp.array([0, 1, 3, 4])])[1]
  assert relative(whole[1:, jnp.array([0, 1, 3, 4])], alone) < FORWARD


def test_causal_and_gradients():
  """Nothing of later tokens; every parameter has a finite gradient, the scores
  of both decisions among them."""
  often = dict(note_threshold=0.3, read_threshold=0.3)
  model, tokens = tiny(**often), draw((1, 20))
  other = tokens.at[:, 6].set((tokens[:, 6] + 1) % V)
  logits, changed = (call(model, None, t)[1] for t in (tokens, other))
  np.testing.assert_array_equal(logits[:, :6], changed[:, :6])
  graph, params = nnx.split(model, nnx.Param)

  @jax.jit
  @jax.grad
  def grad(params):
    return wave(nnx.merge(graph, params)(None, tokens)[1])

  for path, g in jax.tree_util.tree_leaves_with_path(grad(params)):
    assert np.isfinite(g).all() and np.abs(g).max() > 0, path


def forget(state):
  """All but the notes is lost."""
  return tuple(
    layer._replace(**jax.tree.map(jnp.zeros_like, dict(mamba=layer.mamba, z=layer.z)))
    for layer in state
  )  # fmt: skip


def test_notes_outlive_the_state():
  """With the states of all Mamba layers lost, the notes still tell of the
  past, by both ways of reading; where nothing is ever read they do not, and
  the model is Mamba alone."""
  first, then = draw((1, 6)), draw((1, 4), 2)
  late = lambda model, state: call(model, state, then)[1]
  never = dict(read_threshold=1.0)
  for options, tells in (
    ({}, True),
    (never, True),  # by the layers that read others' notes
    (never | dict(every=9), False),
    (dict(every=9), True),
  ):
    model = tiny(**options)
    state, _ = call(model, None, first)
    other, _ = call(model, None, (first + 1) % V)
    a, b = late(model, forget(state)), late(model, forget(other))
    assert (relative(a, b) > 1e-3) == tells, options


def told(key):
  """One of four words, once among the first tokens of noise, then more noise
  than a pool holds; asked for at the end of a second part."""
  k_word, k_when, k_noise = jax.random.split(key, 3)
  word, when = (jax.random.randint(k, (), 0, 4) for k in (k_word, k_when))
  tokens = jax.random.randint(k_noise, (15,), 4, 7)
  return tokens.at[when].set(word).at[14].set(7), word


def test_learns_what_to_note():
  """A pool of three notes, ten tokens of noise, and then nothing is left but
  the notes: the word is still known, so noise was not noted."""
  options = dict(d_model=16, depth=2, d_state=4, capacity=3, rank=8, every=2)
  model = MemMamba(8, **options, rngs=nnx.Rngs(0))
  graph, params = nnx.split(model, nnx.Param)
  optimizer = optax.adam(1e-2)

  def logits(params, tokens):
    model = nnx.merge(graph, params)
    state, _ = model(None, tokens[:, :12])
    return model(forget(state), tokens[:, 12:])[1][:, -1]

  def loss(params, key):
    tokens, word = jax.vmap(told)(jax.random.split(key, 32))
    cost = optax.softmax_cross_entropy_with_integer_labels
    return cost(logits(params, tokens), word).mean()

  def step(carry, key):
    params, state = carry
    grads = jax.grad(loss)(params, key)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def train(params):
    keys = jax.random.split(jax.random.key(1), 400)
    carry = params, optimizer.init(params)
    params = jax.lax.scan(step, carry, keys)[0][0]
    tokens, word = jax.vmap(told)(jax.random.split(jax.random.key(2), 256))
    right = jnp.argmax(logits(params, tokens), -1) == word
    noted = nnx.merge(graph, params)(None, tokens, reports=True)[2]["noted"]
    return jnp.mean(right), noted

  right, noted = train(params)
  assert right > 0.9, (right, noted)
  assert noted < 0.5, noted


def test_wrong_arguments():
  make = lambda **o: MemMamba(V, **TINY | o, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="replacement must be one of .*'lru'"):
    make(replacement="lru")
  with pytest.raises(ValueError, match="capacity must be an integer, 1 or more"):
    make(capacity=0)
  tokens = draw((1, 3))
  for match, wrong, given in (
    (r"int \[B, T\], got float32 \(1, 3\)", tokens.astype(jnp.float32), {}),
    (r"reset must be bool \[1, 3\]", tokens, dict(reset=tokens)),
  ):
    with pytest.raises(ValueError, match=match):
      tiny()(None, wrong, **given)
