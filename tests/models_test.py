"""Models: one memory in four frameworks, and the models built of it."""

import dataclasses
import functools
import json
import subprocess
import sys
from typing import Any

from checks import FORWARD, GRADIENT, relative, wave
import equinox as eqx
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memzoo
from memzoo import models
from memzoo.models import block, linen, pooling

V = 11


def takes_vectors(name):
  cell = memzoo.tiny(name)
  spec = jax.ShapeDtypeStruct((cell.d_model,), jnp.float32)
  return cell.x_spec == cell.y_spec == spec


def one_of_each_family():
  """The first cell of each family that a block takes: one per kind of state,
  by width."""
  first, widths = {}, {}
  for name in memzoo.names():
    entry = memzoo.describe(name)
    if takes_vectors(name) and entry.cls.causal and entry.cls.resettable:
      first.setdefault(entry.family, memzoo.tiny(name))
  for cell in first.values():
    widths.setdefault(cell.d_model, []).append(cell)
  return list(widths.values())


def gru(d_model=6):
  return memzoo.make("gru", d_model=d_model)


def linear(d_model=6):
  return memzoo.make(
    "linear_attention", d_model=d_model, num_heads=2, head_dim=3
  )


def lm(cells, depth=None, **options):
  options = {"mlp_width": 5, "rngs": nnx.Rngs(0), **options}
  return models.LanguageModel(cells, depth, V, **options)


def tokens(*shape, seed=0):
  return jax.random.randint(jax.random.key(seed), shape, 0, V)


def flags(rows):
  """['.x', …] to bool: a dot is False."""
  return jnp.array([[c != "." for c in row] for row in rows])


@functools.partial(jax.jit, static_argnames=("implementation", "reports"))
def call(model, state, inputs, **kwargs):
  return model(state, inputs, **kwargs)


# Adapters


class EqxMemory(eqx.Module):
  """All that another framework needs: a place for the parameters."""

  cell: memzoo.Cell = eqx.field(static=True)
  params: Any

  def __init__(self, cell, key):
    self.cell, self.params = cell, cell.init(key)

  def __call__(self, state, xs, **kwargs):
    return memzoo.scan(self.cell, self.params, state, xs, **kwargs)


class Stacked(nn.Module):
  """A Linen model with the memory inside, as users have it."""

  cell: memzoo.Cell

  @nn.compact
  def __call__(self, state, xs, **kwargs):
    return linen.MemoryLayer(self.cell, name="memory")(state, xs, **kwargs)


@pytest.mark.parametrize("name", memzoo.names())
def test_bare_nnx_linen_and_equinox_give_the_same_numbers(name):
  cell = memzoo.tiny(name)
  b, t = 2, 4

  def draw(spec):
    if jnp.issubdtype(spec.dtype, jnp.integer):
      return jax.random.randint(jax.random.key(1), (b, t, *spec.shape), 0, 5)
    return jax.random.normal(jax.random.key(1), (b, t, *spec.shape))

  xs = jax.tree.map(draw, cell.x_spec)
  mask = flags([".xxx", "xx.x"])
  reset = flags(["..x.", ".x.."]) if cell.resettable else None
  given = dict(reset=reset, mask=mask, implementation="step")

  layer = models.MemoryLayer(cell, rngs=nnx.Rngs(3))
  params = layer.values
  twin = Stacked(cell)
  variables = jax.eval_shape(
    lambda key: twin.init(key, None, xs, **given), jax.random.key(0)
  )
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  variables = {
    collection: {"memory": {n: leaves[n] for n in branch["memory"]}}
    for collection, branch in variables.items()
  }
  assert sum(len(v["memory"]) for v in variables.values()) == len(leaves)
  other = eqx.tree_at(
    lambda m: m.params, EqxMemory(cell, jax.random.key(9)), params
  )

  @jax.jit
  def run(params, layer, variables, other, xs):
    state = layer.initial_state(b)
    bare = lambda state, xs, reset, mask: memzoo.scan(
      cell, params, state, xs, reset=reset, mask=mask, implementation="step"
    )
    foreign = lambda state, xs, reset, mask: other(
      state, xs, reset=reset, mask=mask, implementation="step"
    )
    return (
      jax.vmap(bare)(state, xs, reset, mask),
      layer(state, xs, **given),
      twin.apply(variables, state, xs, **given),
      jax.vmap(foreign)(state, xs, reset, mask),
    )

  one, *others = run(params, layer, variables, other, xs)
  # Some memories answer zero until they are trained: their state moves.
  assert any(np.any(x) for x in jax.tree.leaves(one))
  for two in others:
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert relative(two, one) <= 1e-6


@dataclasses.dataclass(frozen=True)
class Mean(memzoo.Cell):
  """Subtracts the mean of a past batch: a cell with a buffer and a report."""

  d_model: int = 6
  reports = ("size",)

  def init(self, key):
    return {
      "w": jax.random.normal(key, (self.d_model,)),
      "buffers": {"mean": jnp.zeros((self.d_model,))},
    }

  def initial_state(self, params, key=None):
    return ()

  def observe(self, params, state, x):
    y = (x - params["buffers"]["mean"]) * params["w"]
    return state, y, {"size": jnp.sum(jnp.abs(x))}

  def refresh(self, params, xs):
    return {**params, "buffers": {"mean": jnp.mean(xs, axis=(0, 1))}}


def test_linen_twin_initialises_and_refreshes():
  layer = linen.MemoryLayer(Mean())
  xs = jax.random.normal(jax.random.key(0), (2, 3, 6))
  variables = layer.init(jax.random.key(1), None, xs)
  assert variables.keys() == {"params", "buffers"}
  assert variables["params"]["w"].shape == (6,)
  _, new = layer.apply(variables, xs, method="refresh", mutable=["buffers"])
  np.testing.assert_allclose(
    new["buffers"]["buffers/mean"], xs.mean((0, 1)), rtol=1e-6
  )
  _, ys = layer.apply({**variables, **new}, None, xs)
  np.testing.assert_allclose(ys.mean((0, 1)), 0, atol=1e-6)
  assert linen.MemoryLayer(Mean()).initial_state(variables, 3) == ()
  other = linen.MemoryLayer(gru())
  variables = jax.eval_shape(other.init, jax.random.key(0), None, xs)
  state = jax.eval_shape(lambda v: other.initial_state(v, 3), variables)
  assert state.h.shape == (3, 6)


# One call trains and decodes


@pytest.mark.parametrize(
  "cells",
  one_of_each_family(),
  ids=lambda cells: "-".join(c.name for c in cells),
)
def test_decodes_as_it_trains_with_ragged_masks(cells):
  """T = 7 at once equals seven times T = 1: logits and memory."""
  model = lm(cells, conv_size=3, positions=8, mlp_width=0)
  inputs = tokens(3, 7)
  mask = flags(["..xxxxx", "xxxxx..", "xx.x.xx"])
  reset = flags(["...x...", ".x...x.", "...x.x."])
  whole, logits = call(model, None, inputs, reset=reset, mask=mask)
  assert np.all(np.any(logits, -1) == mask)
  state, rows = model.initial_state(3), []
  for t in range(7):
    column = lambda x, t=t: None if x is None else x[:, t : t + 1]
    state, row = call(
      model, state, column(inputs), reset=column(reset), mask=column(mask)
    )
    rows.append(row[:, 0])
  assert relative(jnp.stack(rows, 1), logits) <= FORWARD
  assert relative(state, whole) <= FORWARD


@pytest.fixture(scope="module")
def hybrid():
  """Two kinds of cell, two repeats, every option of the block."""
  return lm(
    [gru(), linear()], 4, conv_size=3, positions=16, dropout=0.3,
    mlp="swiglu", norm="layer", tie_embeddings=False,
  )  # fmt: skip


def test_without_norms_a_linear_memory_makes_a_linear_model():
  cell = memzoo.make("lru", d_model=4, d_state=3)
  model = models.SequenceRegressor(
    cell, 2, 1, d_input=1, mlp_width=0, norm="none", rngs=nnx.Rngs(0)
  )
  x = jax.random.normal(jax.random.key(0), (1, 5, 1))
  _, once = call(model, None, x)
  _, thrice = call(model, None, 3 * x)
  assert relative(thrice, 3 * once) <= FORWARD


def test_packed_documents_equal_separate_ones(hybrid):
  one, two = tokens(1, 3), tokens(1, 4, seed=1)
  packed = jnp.concatenate([one, two], axis=1)
  reset = memzoo.reset_from_segment_ids(jnp.array([[0] * 3 + [1] * 4]))
  state, logits = call(hybrid, None, packed, reset=reset)
  _, first = call(hybrid, None, one)
  alone, second = call(hybrid, None, two)
  both = jnp.concatenate([first, second], axis=1)
  assert relative(logits, both) <= FORWARD
  assert relative(state, alone) <= FORWARD


@pytest.mark.nans
@pytest.mark.parametrize(
  "pool", ["mean", pytest.param("last", marks=pytest.mark.slow)]
)
def test_padding_may_hold_anything(pool):
  model = models.SequenceClassifier(
    [gru(), linear()], 2, 3, d_input=2, pool=pool, mlp_width=5,
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  xs = jax.random.normal(jax.random.key(0), (2, 6, 2))
  mask = flags(["..xxxx", "xxx.x."])
  dirty = jnp.where(mask[..., None], xs, jnp.nan)

  @jax.jit
  def run(model, xs):
    def loss(model):
      _, logits = model(None, xs, mask=mask)
      return wave(logits), logits

    return jax.grad(loss, has_aux=True)(model)

  (clean, logits), (grads, same) = run(model, xs), run(model, dirty)
  assert np.isfinite(logits).all()
  assert relative(same, logits) == 0
  assert relative(grads, clean) == 0
  _, row = call(model, None, xs[1:, jnp.array([0, 1, 2, 4])])
  assert relative(logits[1:], row) <= FORWARD
  _, none = call(model, None, xs, mask=jnp.zeros((2, 6), bool))
  np.testing.assert_array_equal(none, jnp.zeros((2, 3)))


def test_pooling():
  x = jnp.arange(12.0).reshape(2, 6, 1)
  mask = flags([".xxx..", "xxxxxx"])
  reset = flags(["..x...", "......"])
  np.testing.assert_allclose(pooling.pool("mean", x, None, mask), [[2], [8.5]])
  np.testing.assert_allclose(pooling.pool("last", x, None, mask), [[3], [11]])
  np.testing.assert_allclose(
    pooling.pool("mean", x, reset, mask), [[2.5], [8.5]]
  )
  np.testing.assert_allclose(pooling.pool("mean", x), [[2.5], [8.5]])


def test_positions_count_real_inputs_since_the_reset():
  model = lm(gru(), 1, positions=9)
  inputs = tokens(2, 5)
  mask, reset = flags(["x.xxx", "xxxxx"]), flags(["...x.", "....."])
  state, _ = model(None, inputs, mask=mask, reset=reset)
  np.testing.assert_array_equal(state.position, [2, 5])
  state, _ = model(state, inputs[:, :2], reset=flags([".x", ".."]))
  np.testing.assert_array_equal(state.position, [1, 7])


def test_regressor_per_input_and_pooled():
  mask = flags(["xx.", "xxx"])
  make = lambda **options: models.SequenceRegressor(
    gru(), 1, 2, vocab_size=V, mlp_width=0, rngs=nnx.Rngs(0), **options
  )
  model = make()
  _, y = call(model, None, tokens(2, 3), mask=mask)
  assert y.shape == (2, 3, 2) and y.dtype == jnp.float32
  assert not np.any(y[0, 2]) and np.all(y[1, 2])
  _, mean = call(make(pool="mean"), None, tokens(2, 3), mask=mask)
  assert relative(mean, jnp.stack([y[0, :2].mean(0), y[1].mean(0)])) <= FORWARD


# Stacks


def unrolled(stack, x, key=None):
  """The stack by hand: block after block."""
  states = []
  keys = None if key is None else jax.random.split(key, stack.repeats)
  for r in range(stack.repeats):
    for i, blocks in enumerate(stack.blocks):
      layer = jax.tree.map(lambda p, r=r: p[r], blocks)
      one = None if key is None else jax.random.fold_in(keys[r], i)
      state, x = layer(layer.initial_state(x.shape[0]), x, key=one)
      states.append(state)
  return states, x


def test_scan_over_layers_equals_unrolled():
  make = lambda unroll=1, **options: models.Stack(
    [gru(), linear()], 4,
    models.BlockOptions(mlp_width=5, conv_size=2, dropout=0.2, **options),
    unroll=unroll, rngs=nnx.Rngs(0),
  )  # fmt: skip
  stack = make()
  x = jax.random.normal(jax.random.key(0), (2, 3, 6))
  key = jax.random.key(1)

  def scanned(stack):
    state, y = stack(None, x, key=key)
    return wave(y), (state, y)

  def by_hand(stack):
    states, y = unrolled(stack, x, key)
    state = tuple(
      jax.tree.map(lambda *s: jnp.stack(s), *states[i::2]) for i in range(2)
    )
    return wave(y), (state, y)

  run = lambda f, stack: jax.jit(jax.grad(f, has_aux=True))(stack)
  want_grads, want = run(by_hand, stack)
  for other in (stack, make(remat=True), make(unroll=2)):
    grads, out = run(scanned, other)
    assert relative(out, want) <= FORWARD
    assert relative(grads, want_grads) <= GRADIENT


def test_depth_costs_no_compilation():
  """The program of 16 layers is that of 2."""

  def size(cells, depth):
    model = jax.eval_shape(lambda: lm(cells, depth))
    run = lambda model, x: model(None, x)[1].sum()
    lowered = jax.jit(jax.value_and_grad(run)).lower(model, tokens(2, 5))
    return len(lowered.as_text().splitlines())

  assert size(gru(), 16) <= 1.05 * size(gru(), 2)
  assert size([gru(), linear()], 16) <= 1.05 * size([gru(), linear()], 2)


def test_pattern_is_the_shortest():
  a, b = gru(), linear()
  stack = lambda *args: jax.eval_shape(
    lambda: models.Stack(*args, rngs=nnx.Rngs(0))
  )
  for cells, depth, want in (
    (a, None, ((a,), 1)),
    (a, 3, ((a,), 3)),
    ([a, b, a, b], None, ((a, b), 2)),
    ([a, a, a], None, ((a,), 3)),
    ([a, b, b], 6, ((a, b, b), 2)),
  ):
    made = stack(cells, depth)
    assert (made.cells, made.repeats) == want
    assert made.depth == len(want[0]) * want[1]


# Training at the boundary


@pytest.mark.parametrize(
  "graph", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_split_merge_jit_grad_optax(hybrid, graph):
  """The subset of NNX that means the same in graph and in tree mode."""
  inputs = tokens(3, 5)
  optimizer = optax.adam(1e-2)
  with nnx.set_graph_mode(graph):
    graphdef, params, rest = nnx.split(hybrid, nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    params = nnx.to_pure_dict(params)

    @jax.jit
    def step(params, opt_state, key):
      def loss(params):
        model = nnx.merge(graphdef, params, rest)
        _, logits = model(None, inputs[:, :-1], key=key)
        return optax.softmax_cross_entropy_with_integer_labels(
          logits, inputs[:, 1:]
        ).mean()

      value, grads = jax.value_and_grad(loss)(params)
      with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, opt_state)
      return value, optax.apply_updates(params, updates), opt_state, grads

    opt_state, losses = optimizer.init(params), []
    for i in range(30):
      value, params, opt_state, grads = step(
        params, opt_state, jax.random.key(i)
      )
      losses.append(float(value))
  assert losses[-1] < losses[0] - 0.5
  dead = [
    jax.tree_util.keystr(path)
    for path, g in jax.tree_util.tree_leaves_with_path(grads)
    if not np.any(g)
  ]
  assert not dead


def test_dropout_needs_a_key():
  model, still = lm(gru(), 2, dropout=0.5), lm(gru(), 2)
  inputs = tokens(2, 5)
  run = lambda model, seed=None: call(
    model, None, inputs, key=None if seed is None else jax.random.key(seed)
  )[1]
  np.testing.assert_array_equal(run(model), run(model))
  np.testing.assert_array_equal(run(model), run(still))
  np.testing.assert_array_equal(run(model, 1), run(model, 1))
  np.testing.assert_array_equal(run(still, 1), run(still))
  assert relative(run(model, 1), run(model)) > 0.01
  assert relative(run(model, 1), run(model, 2)) > 0.01
  ones = jnp.ones((100, 100))
  dropped = block.dropout(ones, 0.2, jax.random.key(0))
  assert abs(float(dropped.mean()) - 1) < 0.02
  np.testing.assert_allclose(np.unique(dropped), [0, 1.25])


def test_bfloat16_computes_and_float32_keeps():
  full = lm([gru(), linear()], 2, tie_embeddings=False)
  model = lm([gru(), linear()], 2, tie_embeddings=False, dtype=jnp.bfloat16)
  assert {x.dtype.name for x in jax.tree.leaves(model)} == {"float32"}
  inputs = tokens(2, 5)
  state, logits = call(model, None, inputs)
  assert logits.dtype == jnp.float32
  start = model.initial_state(2)
  for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(state)):
    assert old.dtype == new.dtype
  _, want = call(full, None, inputs)
  assert 1e-5 < relative(logits, want) < 0.05
  _, x = model.encoder(None, inputs)
  assert x.dtype == jnp.bfloat16


# Buffers and reports


def test_buffers_are_no_parameters_and_refresh_by_layer():
  model = lm(Mean(), 2, mlp_width=0)
  assert model.has_buffers and not lm(gru(), 1).has_buffers
  inputs = tokens(2, 4)
  mask = flags(["xxxx", "xx.."])
  graphdef, params, buffers = nnx.split(model, nnx.Param, ...)
  names = lambda tree: {
    jax.tree_util.keystr(p)
    for p, _ in jax.tree_util.tree_leaves_with_path(tree)
  }
  assert all("buffers" in name for name in names(nnx.to_pure_dict(buffers)))
  assert not any("buffers" in name for name in names(nnx.to_pure_dict(params)))
  assert set(
    map(
      type,
      jax.tree.leaves(buffers, is_leaf=lambda x: isinstance(x, nnx.Variable)),
    )
  ) == {models.Buffer}

  @jax.jit
  def refreshed(params, buffers):
    model = nnx.merge(graphdef, params, buffers)
    model.refresh((), inputs, mask=mask)
    return nnx.to_pure_dict(nnx.state(model, models.Buffer))

  new = refreshed(params, buffers)
  got = jax.tree.leaves(new)[0]
  # By hand: what enters the first memory, and the second.
  first, second = (
    jax.tree.map(lambda p, r=r: p[r], model.encoder.stack.blocks[0])
    for r in range(2)
  )
  x = model.encoder.embedding[...][jnp.where(mask, inputs, 0)]
  u = jnp.where(mask[..., None], first.memory_norm(x), 0)
  np.testing.assert_allclose(got[0], u.mean((0, 1)), rtol=1e-5, atol=1e-6)
  _, x = first(first.initial_state(2), x, mask=mask)
  u = jnp.where(mask[..., None], second.memory_norm(x), 0)
  np.testing.assert_allclose(got[1], u.mean((0, 1)), rtol=1e-5, atol=1e-6)


def test_reports_are_masked_means_by_layer():
  model = lm([Mean(), gru()], 4, mlp_width=0)
  inputs, mask = tokens(2, 4), flags(["xxxx", "xx.."])
  _, logits, reports = call(model, None, inputs, mask=mask, reports=True)
  _, same = call(model, None, inputs, mask=mask)
  np.testing.assert_array_equal(logits, same)
  assert reports.keys() == {"layers/0/size", "layers/2/size", "size"}
  first = jax.tree.map(lambda p: p[0], model.encoder.stack.blocks[0])
  u = first.memory_norm(model.encoder.embedding[...][inputs])
  want = jnp.abs(u).sum(-1)[mask].mean()
  np.testing.assert_allclose(reports["layers/0/size"], want, rtol=1e-5)
  np.testing.assert_allclose(
    reports["size"],
    (reports["layers/0/size"] + reports["layers/2/size"]) / 2,
    rtol=1e-6,
  )


# Implementations


def test_implementation_by_name_and_by_cell():
  model = lm([gru(), linear()], 2)
  inputs = tokens(2, 5)
  explain = lambda form: {
    d.name: d.form
    for d in memzoo.explain(
      lambda x: model(None, x, implementation=form), inputs
    )
  }
  assert explain({"linear_attention": "scan"})["linear_attention"] == "scan"
  assert explain({"gru": "step"})["gru"] == "step"
  assert explain("scan")["gru"] == explain("scan")["linear_attention"] == "scan"
  with pytest.raises(NotImplementedError, match="gru has no 'chunk' form"):
    model(None, inputs, implementation="chunk")
  with pytest.raises(ValueError, match="no cell 'lstn'.*known: gru"):
    model(None, inputs, implementation={"lstn": "scan"})


# Generation


@pytest.fixture(scope="module")
def speaker():
  """A model whose predictions differ from token to token."""
  model = lm([gru(), linear()], 2, tie_embeddings=False, conv_size=2)
  return jax.tree.map(lambda p: 2.0 * p, model)


def test_generate_greedy_is_the_argmax_of_the_whole_call(speaker):
  prompt = tokens(2, 4)
  state, out = models.generate(
    speaker, None, prompt, 5, temperature=0, with_state=True
  )
  assert out.shape == (2, 5) and out.dtype == jnp.int32
  whole = jnp.concatenate([prompt, out], axis=1)
  want, logits = call(speaker, None, whole[:, :-1])
  np.testing.assert_array_equal(out, jnp.argmax(logits[:, 3:], -1))
  assert relative(state, want) <= FORWARD
  again = models.generate(
    speaker, None, prompt, 5, jax.random.key(0), top_k=1, temperature=3.0
  )
  np.testing.assert_array_equal(out, again)
  more = models.generate(speaker, state, out[:, -1:], 2, temperature=0)
  longer = models.generate(speaker, None, prompt, 7, temperature=0)
  np.testing.assert_array_equal(longer[:, 5:], more)


def test_generate_from_ragged_prompts(speaker):
  row = tokens(1, 3)
  left = jnp.concatenate([jnp.full((1, 2), 9), row], axis=1)
  right = jnp.concatenate([row, jnp.full((1, 2), -1)], axis=1)
  split = jnp.concatenate([row[:, :1], left[:, :2], row[:, 1:]], axis=1)
  mask = flags(["..xxx", "xxx..", "x..xx"])
  prompt = jnp.concatenate([left, right, split])
  out = models.generate(speaker, None, prompt, 4, temperature=0, mask=mask)
  want = models.generate(speaker, None, row, 4, temperature=0)
  np.testing.assert_array_equal(out, jnp.repeat(want, 3, 0))


def test_generate_draws_from_the_top_k(speaker):
  prompt = jnp.repeat(tokens(1, 4), 400, 0)
  out = models.generate(
    speaker, None, prompt, 1, jax.random.key(1), top_k=3, temperature=1.5
  )[:, 0]
  _, logits = call(speaker, None, prompt[:1])
  top, index = jax.lax.top_k(logits[0, -1], 3)
  assert set(np.unique(out)) == set(np.asarray(index).tolist())
  want = jax.nn.softmax(top / 1.5)
  got = [np.mean(out == i) for i in np.asarray(index)]
  np.testing.assert_allclose(got, want, atol=0.1)


def test_generate_stops_by_row(speaker):
  prompt = tokens(4, 4, seed=5)
  free = np.asarray(models.generate(speaker, None, prompt, 6, temperature=0))
  stop = int(free[0, 2])
  out = np.asarray(
    models.generate(speaker, None, prompt, 6, temperature=0, stop_token=stop)
  )
  for got, row in zip(out, free):
    ends = np.flatnonzero(row == stop)
    n = ends[0] + 1 if len(ends) else 6
    np.testing.assert_array_equal(got[:n], row[:n])
    assert (got[n:] == stop).all()
  assert (out[0, 2:] == stop).all()


def test_generate_holds_constant_memory_per_token(speaker):
  def temporary(steps):
    run = lambda model, prompt: models.generate(
      model, None, prompt, steps, temperature=0
    )
    lowered = jax.jit(run).lower(speaker, tokens(2, 4))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  # Two rows of int32 tokens, twice at most.
  assert temporary(1016) - temporary(16) <= 1000 * 2 * 4 * 2


def test_generate_checks_capacity_before_it_computes():
  cell = memzoo.make(
    "window", d_model=6, num_heads=1, head_dim=4, capacity=8, sliding=False
  )

  class Silent(models.LanguageModel):
    def next_logits(self, *args, **kwargs):
      raise AssertionError("computed")

  model = Silent([gru(), cell], 2, V, mlp_width=0, rngs=nnx.Rngs(0))
  assert model.max_length == 8
  with pytest.raises(ValueError, match="prompt of 5 and 4 steps.*at most 8"):
    models.generate(model, None, tokens(1, 5), 4, temperature=0)
  with pytest.raises(AssertionError, match="computed"):
    models.generate(model, None, tokens(1, 5), 3, temperature=0)
  with pytest.raises(ValueError, match="9 inputs, holds at most 8"):
    model(None, tokens(1, 9))
  assert lm(gru(), 1, positions=4).max_length == 4
  assert lm(gru(), 1).max_length is None


KEY = jax.random.key(0)


@pytest.mark.parametrize(
  "match, changes",
  [
    ("temperature must be a finite number.*-1", dict(temperature=-1)),
    (
      "temperature must be a finite number.*nan",
      dict(temperature=float("nan")),
    ),
    ("temperature must be a finite number.*'hot'", dict(temperature="hot")),
    ("top_k must be an integer, 1 to 11, got 0", dict(top_k=0)),
    ("top_k must be an integer, 1 to 11, got 12", dict(top_k=12)),
    ("steps must be an integer, 1 or more, got 0", dict(steps=0)),
    ("stop_token must be an integer, 0 to 10, got 11", dict(stop_token=11)),
    ("needs a key", dict(key=None)),
    ("prompt must be integer .*float32", dict(prompt=jnp.ones((2, 3)))),
    (r"prompt must be integer .*\(2, 0\)", dict(prompt=jnp.ones((2, 0), int))),
    ("tokens from 1 to 11", dict(prompt=jnp.array([[1, V]]))),
    ("row 1 of the prompt has no token", dict(mask=flags(["xxx", "..."]))),
    (r"mask must be bool \[2, 3\]", dict(mask=jnp.ones((2, 3)))),
  ],
)
def test_generate_refuses(speaker, match, changes):
  given = dict(prompt=jnp.ones((2, 3), int), steps=2, key=KEY)
  with pytest.raises(ValueError, match=match):
    models.generate(speaker, None, **{**given, **changes})


# Configs and errors


def test_config_round_trip(hybrid):
  classifier = models.SequenceClassifier(
    gru(), 2, 3, d_input=2, pool="last", rngs=nnx.Rngs(0)
  )
  regressor = models.SequenceRegressor(
    [linear()], None, 1, vocab_size=V, rngs=nnx.Rngs(0), dtype="bfloat16"
  )
  for model in (hybrid, classifier, regressor):
    config = json.loads(json.dumps(models.to_config(model)))
    again = models.from_config(config, nnx.Rngs(0))
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert models.to_config(again) == models.to_config(model)
    assert hash(nnx.graphdef(again)) == hash(nnx.graphdef(model))
    assert relative(again, model) == 0
  with pytest.raises(TypeError, match="Mean is not registered"):
    models.to_config(lm(Mean(), 1))
  with pytest.raises(TypeError, match="Stack has no config.*LanguageModel"):
    models.to_config(hybrid.encoder.stack)
  for bad, match in (
    ({"cells": []}, "no model config"),
    ({"model": "langauge_model", "cells": []}, "mean 'language_model'"),
    ({**models.to_config(hybrid), "depth": 3}, "multiple of the 2 cell"),
  ):
    with pytest.raises(ValueError, match=match):
      models.from_config(bad, nnx.Rngs(0))


class Token(memzoo.Cell):
  """A cell whose input is no vector."""

  d_model = 6

  @property
  def x_spec(self):
    return jax.ShapeDtypeStruct((), jnp.int32)


@pytest.mark.parametrize(
  "error, match, make",
  [
    (ValueError, "Token has x_spec", lambda: lm(Token(), 1)),
    (ValueError, "one d_model, got gru: 6, linear_attention: 4",
     lambda: lm([gru(), linear(4)])),
    (ValueError, "got no cell", lambda: lm([])),
    (ValueError, "positive multiple of the 2 cell.* got 3",
     lambda: lm([gru(), linear()], 3)),
    (ValueError, "multiple of the 1 cell.* got 0", lambda: lm(gru(), 0)),
    (ValueError, "unknown mlp 'gleu'; did you mean", lambda: lm(gru(), 1, mlp="gleu")),
    (ValueError, "unknown norm 'batch'; known: layer, none, rms",
     lambda: lm(gru(), 1, norm="batch")),
    (ValueError, r"rate in \[0, 1\), got 1", lambda: lm(gru(), 1, dropout=1)),
    (ValueError, "mlp_width must be an integer, 0 or more, got -1",
     lambda: lm(gru(), 1, mlp_width=-1)),
    (ValueError, "unroll must be a positive", lambda: lm(gru(), 1, unroll=0)),
    (ValueError, "dtype must be 'float32'.*'int8'", lambda: lm(gru(), 1, dtype="int8")),
    (ValueError, "positions must be an integer.*1.5",
     lambda: lm(gru(), 1, positions=1.5)),
    (TypeError, "no option 'dropuot'; did you mean|did you mean 'dropout'",
     lambda: lm(gru(), 1, dropuot=0.1)),
    (ValueError, "vocab_size must be an integer, 1 or more, got 0",
     lambda: models.LanguageModel(gru(), 1, 0, rngs=nnx.Rngs(0))),
    (ValueError, "one of the two",
     lambda: models.SequenceClassifier(gru(), 1, 2, rngs=nnx.Rngs(0))),
    (ValueError, "unknown pool 'max'; did you mean 'mean'",
     lambda: models.SequenceClassifier(
       gru(), 1, 2, d_input=1, pool="max", rngs=nnx.Rngs(0))),
  ],
)  # fmt: skip
def test_models_refuse_bad_options(error, match, make):
  with pytest.raises(error, match=match):
    make()


@pytest.mark.parametrize(
  "match, inputs, given",
  [
    (r"integer tokens \[B, T\], got float32 \(2, 3\)", jnp.ones((2, 3)), {}),
    (r"integer tokens \[B, T\], got int32 \(3,\)", jnp.ones(3, int), {}),
    (r"got int32 \(2, 0\)", jnp.ones((2, 0), int), {}),
    (r"mask must be bool \[2, 3\], got bool \[2, 4\]", tokens(2, 3),
     dict(mask=jnp.ones((2, 4), bool))),
    (r"reset must be bool \[2, 3\], got int32", tokens(2, 3),
     dict(reset=jnp.ones((2, 3), int))),
    ("not a state of this model", tokens(2, 3), dict(state=(1, 2))),
    ("for 2 rows", tokens(2, 3), dict(state=3)),
  ],
)  # fmt: skip
def test_calls_refuse_bad_inputs(match, inputs, given):
  model = lm(gru(), 1)
  state = given.pop("state", None)
  if isinstance(state, int):
    state = model.initial_state(state)
  with pytest.raises(ValueError, match=match):
    model(state, inputs, **given)


def test_memory_layer_takes_what_is_no_vector():
  """The adapter serves any cell; a block needs vectors."""

  @dataclasses.dataclass(frozen=True)
  class Count(memzoo.Cell):
    d_model: int = 1

    @property
    def x_spec(self):
      return {"token": jax.ShapeDtypeStruct((), jnp.int32)}

    def init(self, key):
      return {"w": jnp.ones(())}

    def initial_state(self, params, key=None):
      return jnp.zeros((), jnp.int32)

    def step(self, params, state, x):
      state = state + x["token"]
      return state, params["w"] * state.astype(jnp.float32)

  layer = models.MemoryLayer(Count(), rngs=nnx.Rngs(0))
  state, ys = layer(None, {"token": jnp.array([[1, 2], [3, 4]])})
  np.testing.assert_array_equal(ys, [[1, 3], [3, 7]])
  np.testing.assert_array_equal(state, [3, 7])


def test_import_of_memzoo_leaves_models_alone():
  code = "import memzoo, sys; sys.exit('memzoo.models' in sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)
