"""Hydra (arXiv:2508.15099) against its layers, segment by segment."""

import functools

from checks import FORWARD, GRADIENT, relative, wave
from flax import nnx
import jax
import jax.numpy as jnp
import model_checks
from model_checks import call, shaken, values
import numpy as np
import optax
import pytest

import memzoo
from memzoo.models.hydra import Facts, Hydra, HydraSSM, Workspace

V, L = 7, 6
TINY = dict(
  d_model=4, depth=3, segment=L, chunk=3, attention_every=2, window=4,
  num_heads=2, num_experts=3, expert_width=5, slots=4, rank=3, num_keys=3,
  key_dim=2, value_dim=3, knn=2,
)  # fmt: skip


@functools.cache
def tiny():
  """Parameters away from their starting values."""
  return shaken(Hydra(V, **TINY, rngs=nnx.Rngs(0)), 0.4)


def draw(shape, seed=1):
  return jax.random.randint(jax.random.key(seed), shape, 0, V)


def silu(z):
  return z / (1 + np.exp(-z))


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def softmax(z):
  e = np.exp(z - z.max())
  return e / e.sum()


def softplus(z):
  return np.log1p(np.exp(z))


def ln(p, x):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def ssm(p, s, xs):
  out = []
  for x in xs:
    delta, b, c, u = np.split(x @ p["in"], 4)
    out.append(c * s + x @ p["skip"])
    s = np.exp(-softplus(delta) * softplus(p["decay"])) * s + b * u
  return s, np.stack(out)


def attention(p, past, xs, heads, window):
  """past: keys and values of all tokens before, [T, heads, K]."""
  q, k, v = np.split((xs @ p["qkv"]).reshape(len(xs), 3 * heads, -1), 3, axis=1)
  k, v = np.concatenate([past[0], k]), np.concatenate([past[1], v])
  out = np.zeros_like(q)
  for t in range(len(xs)):
    end = len(k) - len(xs) + t + 1
    near = slice(max(end - window, 0), end)
    for h in range(heads):
      score = k[near, h] @ q[t, h] / np.sqrt(q.shape[2])
      out[t, h] = softmax(score) @ v[near, h]
  return (k, v), out.reshape(len(xs), -1) @ p["out"]


def experts(p, xs, chunk, knn):
  out = []
  for c in range(0, len(xs), chunk):
    part = xs[c : c + chunk]
    logits = part.mean(0) @ p["route"]
    best = np.argsort(-logits)[:knn]
    y = 0
    for e, w in zip(best, softmax(logits[best])):
      gate, up = np.split(part @ p["up"][e], 2, axis=-1)
      y = y + w * (silu(gate) * up) @ p["down"][e]
    out.append(y)
  return np.concatenate(out)


def workspace(p, slots, xs):
  z, slots = xs.mean(0), slots.copy()
  r, w = softmax(z @ p["control"])
  i = np.argmin(np.linalg.norm(slots, axis=1))
  slots[i] = 0.9 * slots[i] + 0.1 * w * z
  m = ln(p["norm"], slots)
  q = ln(p["norm"], z) @ p["q"]
  a = softmax(m @ p["k"] @ q / np.sqrt(len(q)))
  return slots, xs + r * ((a @ (m @ p["v"])) @ p["out"])


def facts(p, xs, knn):
  out, n = [], p["keys"].shape[1]
  for x in xs:
    q = np.split(x @ p["query"], 2)
    s1, s2 = (keys @ half for keys, half in zip(p["keys"], q))
    pairs = [
      (i, j) for i in np.argsort(-s1)[:knn] for j in np.argsort(-s2)[:knn]
    ]
    w = softmax(np.array([s1[i] + s2[j] for i, j in pairs]))
    found = sum(a * p["values"][i * n + j] for a, (i, j) in zip(w, pairs))
    gate = sigmoid(x @ p["gate"] + p["gate_bias"])
    out.append(x + gate * (found @ p["out"]))
  return np.stack(out)


def oracle(model, tokens):
  """Logits of one row, and its slots at the end."""
  p, logits = values(model), []
  blocks = [p["blocks"][n] for n in range(TINY["depth"])]
  slots = p["workspace"]["start"]
  empty = np.zeros((0, TINY["num_heads"], 2))
  held = [[np.zeros(TINY["d_model"]), (empty, empty)] for _ in blocks]
  for s in range(0, len(tokens), L):
    x = p["embedding"][tokens[s : s + L]]
    for b, state in zip(blocks, held):
      state[0], y = ssm(b["ssm"]["params"], state[0], x)
      out = x + b["ssm_scale"] * ln(b["ssm_norm"], y)
      if b.get("attention"):
        state[1], y = attention(
          b["attention"]["params"], state[1], ln(b["attention_norm"], x),
          TINY["num_heads"], TINY["window"],
        )  # fmt: skip
        out = out + b["attention_scale"] * y
      if b.get("experts"):
        y = experts(b["experts"], ln(b["experts_norm"], x), TINY["chunk"], 2)
        out = out + b["experts_scale"] * y
      x = ln(b["norm"], out)
      slots, x = workspace(p["workspace"], slots, x)
      x = facts(p["facts"], x, TINY["knn"])
    logits.append(ln(p["norm"], x) @ p["embedding"].T)
  return np.concatenate(logits), slots


def test_paper_equation():
  model, tokens = tiny(), draw((1, 3 * L))
  want, slots = oracle(model, np.asarray(tokens)[0])
  for form in ("scan", "chunk"):
    state, logits = call(model, None, tokens, implementation=form)
    assert relative(logits[0], want) < FORWARD, form
    assert relative(state.slots[0], slots) < FORWARD, form


def test_forms_of_the_state_space():
  """Reads before it writes, in every form, through resets and gaps."""
  cell = HydraSSM(5)
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (11, 5))
  given = dict(
    reset=jnp.arange(11) == 6, mask=jnp.arange(11) % 4 != 1
  )  # 5 and 9 are not there

  @jax.jit
  def run(params, xs):
    def loss(params, xs, form):
      end, ys = memzoo.scan(
        cell, params, None, xs, implementation=form, **given
      )
      return wave(ys, end), (end, ys)

    forms = ("step", *cell.implementations)
    one = jax.grad(loss, argnums=(0, 1), has_aux=True)
    return [one(params, xs, form) for form in forms]

  (grads, want), *others = run(params, xs)
  for g, out in others:
    assert relative(out, want) < FORWARD
    assert relative(g, grads) < GRADIENT


def test_streams_by_segments():
  """Segment by segment is the whole call; a row without tokens stays as it is,
  and a reset is a fresh start."""
  model, tokens = tiny(), draw((3, 3 * L), 2)
  mask = np.ones((3, 3 * L), bool)
  mask[0, :2] = mask[1, L : 2 * L] = mask[2, -4:] = False
  reset = np.zeros((3, 3), bool)
  reset[0, 1] = reset[1, 1] = reset[2, 2] = True  # row 1: at no token
  dirty = jnp.where(mask, tokens, 99)
  _, whole = model_checks.streams(
    model, dirty, unit=L, mask=mask, reset=reset
  )
  # Row 0 from its second segment, row 1 without its empty one, row 2's last.
  later = jnp.stack([tokens[0, L:], tokens[1, jnp.r_[:L, 2 * L : 3 * L]]])
  _, alone = call(model, None, later)
  assert relative(whole[0, L:], alone[0]) < FORWARD
  assert relative(whole[1, 2 * L :], alone[1, L:]) < FORWARD


def test_sees_its_segment_and_nothing_later():
  """Exactly: a token's logits tell of later tokens in its segment, through the
  means, and of no later segment; slots carry what it was."""
  model, tokens = tiny(), draw((1, 2 * L))
  change = lambda t: tokens.at[0, t].set((tokens[0, t] + 1) % V)
  _, whole = call(model, None, tokens)
  _, other = call(model, None, change(L - 1))
  assert np.any(whole[0, 0] != other[0, 0])
  _, other = call(model, None, change(L))
  np.testing.assert_array_equal(whole[0, :L], other[0, :L])
  state, _ = call(model, None, tokens[:, :L])
  start = model.initial_state(1)
  moved = np.any(state.slots[0] != start.slots[0], axis=1)
  assert 1 <= moved.sum() <= TINY["depth"]
  kept = start._replace(slots=state.slots)
  _, told = call(model, kept, tokens[:, L:])
  _, fresh = call(model, None, tokens[:, L:])
  assert relative(told, fresh) > 1e-4


def test_gradients_and_learning():
  """All parameters have gradients, and what an early segment named is told in
  a late one."""
  model = Hydra(
    V, **{**TINY, "d_model": 16, "depth": 2, "slots": 8}, rngs=nnx.Rngs(0)
  )

  def loss(model, key):
    tokens = jax.random.randint(key, (32, 2 * L), 1, V)
    _, logits = model(None, tokens.at[:, -1].set(0))
    return optax.softmax_cross_entropy_with_integer_labels(
      logits[:, -1], tokens[:, 0]
    ).mean()

  _, losses = model_checks.train(model, loss, 400)
  assert losses[-20:].mean() < 0.5 * np.log(V - 1), losses[::40]


def test_memories_alone():
  """The workspace writes one slot, the least, a tenth of the way, and what it
  writes has no gradient; the table is read at k² places."""
  space = Workspace(4, 3, 2, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (1, 5, 4))
  slots = jnp.array([[[3.0, 0, 0, 0], [0.1, 0, 0, 0], [0, 2, 0, 0]]])
  new, y = space(slots, x, jnp.ones((1, 5), bool))
  want, out = workspace(values(space), np.float64(slots[0]), np.float64(x[0]))
  assert relative(new[0], want) < FORWARD and relative(y[0], out) < FORWARD
  np.testing.assert_array_equal(
    np.any(new != slots, -1), [[False, True, False]]
  )
  there = jnp.ones((1, 5), bool)
  written = lambda slots, x: wave(space(slots, x, there)[0])
  to_slots, to_x = jax.grad(written, argnums=(0, 1))(slots, x)
  assert np.all(to_slots) and not np.any(to_x)
  table = Facts(4, 3, 2, 5, 2, rngs=nnx.Rngs(0))
  assert (
    relative(table(x[0]), facts(values(table), np.float64(x[0]), 2)) < FORWARD
  )
  graph, params = nnx.split(table)
  g = jax.grad(lambda p: wave(nnx.merge(graph, p)(x[0, 0])))(params)
  assert np.any(nnx.to_pure_dict(g)["values"], axis=1).sum() == 4


def test_wrong_arguments():
  model_checks.refuses(
    lambda **o: Hydra(V, **{**TINY, **o}, rngs=nnx.Rngs(0)),
    ("chunk=4 must divide segment=6", dict(chunk=4)),
    ("knn_experts <= num_experts", dict(knn_experts=4)),
    ("slots must be an integer, 1", dict(slots=0)),
    ("num_heads=3 must divide d_model=4", dict(num_heads=3)),
  )
  with pytest.raises(ValueError, match=r"int \[B, S · 6\], whole segments"):
    tiny()(None, draw((1, 7)))
  with pytest.raises(ValueError, match=r"reset must be bool \[1, 2\]"):
    tiny()(None, draw((1, 12)), reset=jnp.zeros((1, 12), bool))
