"""Token Turing machine: its equations, and what it learns to keep."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def softmax(x, axis):
  e = np.exp(x - x.max(axis=axis, keepdims=True))
  return e / e.sum(axis=axis, keepdims=True)


def layer_norm(x, scale, bias):
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + 1e-6) * scale + bias


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def summarise(v, p):
  """S_k, the paper's section 3.2: k convex combinations of the tokens v."""
  if "queries" in p:
    alpha = v @ p["queries"].T / np.sqrt(v.shape[1])
  else:
    h = layer_norm(v, p["norm_scale"], p["norm_bias"])
    alpha = gelu(h @ p["w1"] + p["b1"]) @ p["w2"]
  tokens = []
  for k in range(alpha.shape[1]):
    tokens.append(softmax(alpha[:, k], 0) @ v)
  return np.stack(tokens)


def encoder(z, p, num_layers, num_heads):
  """A pre-norm transformer encoder over all tokens."""
  z = z + p["location"]
  d = z.shape[1]
  c = d // num_heads
  for n in range(num_layers):
    layer = p[f"layer_{n}"]
    h = layer_norm(z, layer["norm_scale"][0], layer["norm_bias"][0])
    qkv = h @ layer["qkv"]
    heads = []
    for j in range(num_heads):
      q, k, v = (qkv[:, i * d + j * c : i * d + (j + 1) * c] for i in range(3))
      heads.append(softmax(q @ k.T / np.sqrt(c), 1) @ v)
    z = z + np.concatenate(heads, 1) @ layer["out_w"] + layer["out_b"][0]
    h = layer_norm(z, layer["norm_scale"][1], layer["norm_bias"][1])
    z = (
      z + gelu(h @ layer["w1"] + layer["b1"]) @ layer["w2"] + layer["out_b"][1]
    )
  return layer_norm(z, p["norm_scale"], p["norm_bias"])


def machine(cell, p, xs):
  """Ryoo et al. 2022, section 3: read, process, write."""
  m = np.zeros((cell.memory_size, cell.d_model))
  read, write = p["read"]["location"], p["write"]["location"]
  ys = []
  for x in xs:
    i = x[None]
    z = summarise(np.concatenate([m, i]) + read, p["read"])
    o = encoder(z, p, cell.num_layers, cell.num_heads)
    # Locations stand in the order memory, input, outputs.
    m = summarise(np.concatenate([m, i, o]) + write, p["write"])
    ys.append(o.mean(0) @ p["out_w"] + p["out_b"])
  return m, np.stack(ys)


def drawn(cell):
  """Parameters of the right shapes, none at its starting value."""
  r = np.random.default_rng(1)
  draw = lambda path, x: jnp.asarray(
    0.4 * r.normal(size=x.shape) + ("scale" in jax.tree_util.keystr(path)),
    jnp.float32,
  )
  shapes = jax.eval_shape(cell.init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("summary,num_layers", [("mlp", 2), ("query", 1)])
def test_paper_equation(summary, num_layers):
  cell = memzoo.tiny(
    "token_turing_machine", summary=summary, num_layers=num_layers
  )
  params = drawn(cell)
  xs = np.random.default_rng(0).normal(size=(5, cell.d_model))
  run = lambda p, x: memzoo.scan(cell, p, None, x, implementation="scan")
  state, ys = jax.jit(run)(params, jnp.asarray(xs, jnp.float32))
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  memory, want = machine(cell, p, np.float64(np.float32(xs)))
  assert checks.relative((ys, state.memory), (want, memory)) <= checks.FORWARD


def first_class(key, length=7, classes=4):
  """[one-hot class, 1 at the first token]; asked at the last token."""
  tokens = jax.random.randint(key, (length,), 0, classes)
  first = jax.nn.one_hot(0, length)
  xs = jnp.concatenate([jax.nn.one_hot(tokens, classes), first[:, None]], -1)
  xs = jnp.pad(xs, [(0, 0), (0, 8 - classes - 1)])
  last = jax.nn.one_hot(length - 1, length)
  return xs, jnp.full((length,), tokens[0]), last


def test_signature_behaviour():
  """It learns to keep the first token's class while distractors go by, in a
  state whose size does not depend on how many."""
  cell = memzoo.make(
    "token_turing_machine", d_model=8, memory_size=4, process_size=2, num_heads=2,
    summary_dim=16, mlp_dim=16,
  )  # fmt: skip
  params, accuracy = checks.learn(cell, first_class, steps=150)
  assert accuracy >= 0.9, accuracy  # a guess is right in one of four
  assert memzoo.state_size(cell) == 4 * 8
  for length in (3, 11):
    xs = jax.ShapeDtypeStruct((length, 8), jnp.float32)
    run = lambda p, x: memzoo.scan(cell, p, None, x)[0]
    state = jax.eval_shape(run, params, xs)
    assert [s.shape for s in jax.tree.leaves(state)] == [(4, 8)]


def test_options_are_checked():
  with pytest.raises(
    ValueError, match="summary must be 'mlp' or 'query', got 'mean'"
  ):
    memzoo.make("token_turing_machine", d_model=8, summary="mean")
  with pytest.raises(ValueError, match="num_heads=3 must divide d_model=8"):
    memzoo.make("token_turing_machine", d_model=8, num_heads=3)
