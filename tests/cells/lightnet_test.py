"""LightNet against Qin et al. 2024 (arXiv:2405.21022): its read is a softmax
over the tokens so far, in every channel; and over grids, in one pass."""

import functools
import json

import checks
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import models
from memzoo.models import lightnet


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def parts(cell, p, xs):
  """silu(q), k [T, H, K] and v [T, H, V]."""
  h, width = cell.num_heads, cell.num_heads * cell.head_dim
  q, k, v = np.split(xs @ p["qkv"], [width, 2 * width], axis=1)
  split = lambda z: z.reshape(len(xs), h, -1)
  return split(q * sigmoid(q)), split(k), split(v)


def finish(p, xs, o):
  o = o.reshape(len(xs), -1)
  o = o / np.sqrt(np.mean(o**2, axis=1, keepdims=True) + 1e-5) * p["norm"]
  gate = xs @ p["gate_in"] @ p["gate_out"]
  return (o * gate * sigmoid(gate)) @ p["out"]


def turned(u, angle):
  return np.concatenate([u * np.cos(angle), u * np.sin(angle)], axis=-1)


def double(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def paper(cell, params, xs):
  """Sums over all tokens so far, at every token: no recurrence, no
  stabiliser."""
  p, xs = double(params), double(xs)
  q, k, v = parts(cell, p, xs)
  width = cell.head_dim
  theta = cell.lrpe_base ** (-2 * np.arange(width) / width)
  os = []
  for t in range(len(xs)):
    weight = np.exp(k[: t + 1])
    weight = weight / weight.sum(0)
    qt = q[t]
    if cell.lrpe:
      angle = np.arange(t + 1)[:, None, None] * theta
      weight, qt = turned(weight, angle), turned(qt, t * theta)
    s = np.einsum("thk,thv->hkv", weight, v[: t + 1])
    os.append(np.einsum("hk,hkv->hv", qt, s))
  z = np.log(np.exp(k).sum(0))
  return (s, z), finish(p, xs, np.stack(os))


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(cell, params, xs, form=None, **flags):
  return memzoo.scan(cell, params, None, xs, implementation=form, **flags)


one_pass = jax.jit(lightnet.one_pass, static_argnums=0)


@pytest.mark.parametrize("lrpe", (False, True))
def test_paper_equation(lrpe):
  cell = memzoo.tiny("lightnet", lrpe=lrpe)
  params = jax.tree.map(lambda x: 1.5 * x, cell.init(jax.random.key(0)))
  params["norm"] += 0.1 * jnp.arange(6.0)
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  want = paper(cell, params, xs)
  for form in ("step", "chunk"):
    state, ys = run(cell, params, xs, form)
    error = checks.relative(((state.s, state.z), ys), want)
    assert error <= checks.FORWARD, (form, error)
    assert state.count == 9


def test_signature_behaviour():
  """The state is the mean of the values under the softmax of each channel of
  the keys, wherever the keys stand: a shift of all keys changes nothing, and
  one key far above the others leaves its value alone; and it learns to keep
  the one token that is marked."""
  cell = memzoo.tiny("lightnet", lrpe=False)
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (20, cell.d_model)).at[:, 0].set(1)
  _, k, v = parts(cell, double(params), double(xs))
  softmax = np.exp(k - k.max(0))
  softmax /= softmax.sum(0)
  state, _ = run(cell, params, xs)
  mean = np.einsum("thk,thv->hkv", softmax, v)
  np.testing.assert_allclose(state.s, mean, atol=1e-6)
  assert (np.abs(state.s) <= np.abs(v).max((0, 2))[:, None, None]).all()

  keys = slice(
    cell.num_heads * cell.head_dim, 2 * cell.num_heads * cell.head_dim
  )
  shifted = {**params, "qkv": params["qkv"].at[0, keys].add(100.0)}
  moved, _ = run(cell, shifted, xs)
  np.testing.assert_allclose(moved.s, mean, atol=1e-4)
  np.testing.assert_allclose(moved.z, state.z + 100, rtol=1e-6)

  one = xs.at[:, 0].set(0).at[7, 0].set(1)
  picked, _ = run(cell, shifted, one)
  _, _, v = parts(cell, double(shifted), double(one))
  want = np.broadcast_to(v[7][:, None], picked.s.shape)
  np.testing.assert_allclose(picked.s, want, atol=1e-5)

  cell = memzoo.make("lightnet", d_model=6, head_dim=8, gate_rank=4)
  _, accuracy = checks.learn(cell, checks.marked_bit, 150)
  assert accuracy > 0.95, accuracy


def test_relative_positions_skip_what_is_not_there():
  """With LRPE, gaps do not count, and a reset starts at 0 again."""
  cell = memzoo.tiny("lightnet")
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (7, cell.d_model))
  mask = jnp.asarray([0, 1, 1, 0, 1, 1, 1], bool)
  reset = jnp.zeros(7, bool).at[4].set(True)
  state, ys = run(cell, params, xs, reset=reset, mask=mask)
  alone, want = run(cell, params, xs[4:])
  assert state.count == 3
  assert checks.relative(tuple(state), tuple(alone)) <= checks.FORWARD
  assert checks.relative(ys[4:], want) <= checks.FORWARD


def grid(cell, *shape):
  params = jax.tree.map(lambda x: 1.5 * x, cell.init(jax.random.key(0)))
  return params, jax.random.normal(jax.random.key(1), (*shape, cell.d_model))


def test_one_pass_over_a_grid():
  """A place of a 3 × 4 grid against a loop over all places: with MD-LRPE a
  pair's weight is multiplied by the cosine of θ times what lies between them,
  rows in the first half of the channels and columns in the second."""
  for lrpe in (False, True):
    cell = memzoo.tiny("lightnet", lrpe=lrpe)
    params, xs = grid(cell, 3, 4)
    p, rows = double(params), double(xs).reshape(12, -1)
    q, k, v = parts(cell, p, rows)
    softmax = np.exp(k) / np.exp(k).sum(0)
    theta = cell.lrpe_base ** (-2 * np.arange(3) / 5)
    o = np.zeros(v.shape)
    for a in range(12):
      for b in range(12):
        between = [a // 4 - b // 4] * 3 + [a % 4 - b % 4] * 2
        turn = np.cos(np.asarray(between) * np.r_[theta, theta[:2]])
        score = (q[a] * softmax[b] * (turn if lrpe else 1)).sum(1)
        o[a] += score[:, None] * v[b]
    ys = one_pass(cell, params, xs)
    want = finish(p, rows, o).reshape(xs.shape)
    assert checks.relative(ys, want) <= checks.FORWARD


def test_one_pass_is_the_last_step_of_the_scan():
  """Where nothing is to the right, seeing all is seeing what came before."""
  cell = memzoo.tiny("lightnet")
  params, xs = grid(cell, 11)
  _, ys = run(cell, params, xs)
  whole = one_pass(cell, params, xs)
  assert checks.relative(whole[-1], ys[-1]) <= checks.FORWARD
  assert checks.relative(whole[0], ys[0]) > 0.1


def test_one_pass_with_gaps():
  cell = memzoo.tiny("lightnet", lrpe=False)
  params, xs = grid(cell, 3, 4)
  mask = jnp.zeros((3, 4), bool).at[1:].set(True).at[2, 3].set(False)
  ys = one_pass(cell, params, xs.at[0].set(jnp.inf), mask)
  there = np.asarray(mask)
  alone = one_pass(cell, params, xs[there])
  assert checks.relative(ys[there], alone) <= checks.FORWARD
  assert not np.any(ys[~there])
  assert not np.any(one_pass(cell, params, xs, mask & False))
  back = jnp.flip(xs, (0, 1))  # without positions the order is not seen
  flipped = one_pass(cell, params, back)
  same = one_pass(cell, params, xs)
  assert checks.relative(jnp.flip(flipped, (0, 1)), same) <= checks.FORWARD


def test_md_tpe():
  """Exponential sums along rows and along columns, in a loop, and one model
  gradient for each parameter."""
  params = lightnet.init_md_tpe(jax.random.key(0), 4, dims=2, states=3)
  xs = jax.random.normal(jax.random.key(1), (3, 5, 4))
  p, x = double(params), double(xs)
  decay = sigmoid(p["decay"])
  want = np.zeros(x.shape)
  for i in range(3):
    for j in range(5):
      for before in range(i + 1):
        t = p["write"][0] @ decay[0] ** (i - before)
        want[i, j] += t * x[before, j]
      for before in range(j + 1):
        t = p["write"][1] @ decay[1] ** (j - before)
        want[i, j] += t * x[i, before]

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def both(params):
    ys = lightnet.md_tpe(params, xs)
    return checks.wave(ys), ys

  grads, ys = both(params)
  assert checks.relative(ys, want) <= checks.FORWARD
  assert all((np.abs(g) > 0).all() for g in grads.values())
  with pytest.raises(ValueError, match="xs must be floating with 2 axes"):
    lightnet.md_tpe(params, xs[0])


def classifier(lrpe, states):
  cell = memzoo.tiny("lightnet", lrpe=lrpe)
  return lightnet.GridClassifier(
    cell, 2, 5, grid=(3, 4), tpe_states=states, d_input=2, mlp_width=7,
    rngs=nnx.Rngs(0),
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames="reports")
def call(model, xs, **given):
  return model(None, xs, **given)


def test_grid_classifier():
  """Against its parts, one after the other; where it has no positions it does
  not see the order of the places, and with either kind it does. MD-LRPE's
  cosines alone do not see which way the grid lies."""
  xs = jax.random.normal(jax.random.key(2), (2, 12, 2))
  for lrpe, states in ((False, 0), (False, 3), (True, 0), (True, 3)):
    model = classifier(lrpe, states)
    state, logits = call(model, xs)
    again = models.from_config(
      json.loads(json.dumps(models.to_config(model))), nnx.Rngs(0)
    )
    assert models.to_config(again) == models.to_config(model)
    assert checks.relative(again, model) == 0
    assert not jax.tree.leaves(state)
    apart = lambda xs: checks.relative(call(model, xs)[1], logits)
    moved, turned = apart(jnp.roll(xs, 5, axis=1)), apart(xs[:, ::-1])
    assert moved > 1e-3 if lrpe or states else moved <= checks.FORWARD
    assert turned > 1e-3 if states else turned <= checks.FORWARD

  encoder = model.encoder
  stack = encoder.stack
  x = xs @ encoder.embedding[...] + encoder.bias[...]
  x = x.reshape(2, 3, 4, -1)
  tpe = {name: value[...] for name, value in stack.tpe.items()}
  x = x + jnp.stack([lightnet.md_tpe(tpe, row) for row in x])
  for i in range(2):
    block = jax.tree.map(lambda leaf: leaf[i], stack.blocks[0])
    u, params = block.memory_norm(x), block.memory.values
    x = x + jnp.stack([one_pass(stack.cells[0], params, row) for row in u])
    x = x + block.mlp(block.mlp_norm(x))
  want = model.head(encoder.norm(x).mean((1, 2)))
  assert checks.relative(logits, want) <= checks.FORWARD

  mask = jnp.zeros((2, 12), bool).at[:, :8].set(True)
  _, short = call(model, xs.at[:, 8:].set(jnp.inf), mask=mask)
  assert checks.relative(short, call(model, xs, mask=mask)[1]) == 0
  assert call(model, xs, reports=True)[2] == {}


def test_grid_classifier_refuses():
  model = classifier(True, 0)
  xs = jnp.ones((2, 12, 2))
  with pytest.raises(ValueError, match="9 inputs for a grid of 3 x 4 places"):
    model(None, xs[:, :9])
  with pytest.raises(ValueError, match="there is no reset"):
    model(None, xs, reset=jnp.zeros((2, 12), bool))
  build = functools.partial(
    lightnet.GridClassifier, depth=1, num_classes=2, d_input=2,
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  with pytest.raises(TypeError, match="needs LightNet cells"):
    build(memzoo.tiny("gru"), grid=(3, 4))
  with pytest.raises(ValueError, match="grid must be an integer, 1 or more"):
    build(memzoo.tiny("lightnet"), grid=(3, 0))
  with pytest.raises(ValueError, match="have no convolution"):
    build(memzoo.tiny("lightnet"), grid=(3, 4), conv_size=2)


def test_bad_arguments():
  for options, message in (
    (dict(num_heads=4), "num_heads=4 must divide d_model=6"),
    (dict(gate_rank=0), "gate_rank must be a positive integer"),
    (dict(lrpe_base=0.0), "lrpe_base must be above 0"),
  ):
    with pytest.raises(ValueError, match=message):
      memzoo.make("lightnet", d_model=6, **options)
  cell = memzoo.tiny("lightnet")
  params, xs = grid(cell, 3, 4)
  with pytest.raises(ValueError, match="one_pass: xs must be floating"):
    lightnet.one_pass(cell, params, xs[..., :5])
  with pytest.raises(ValueError, match="one_pass: mask must be bool"):
    lightnet.one_pass(cell, params, xs, jnp.ones(3, bool))
