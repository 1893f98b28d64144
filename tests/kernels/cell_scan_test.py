"""The loops over time: `cell_scan` and the linear recurrence's kernel, in
Pallas' interpreter and compiled for devices."""

import functools
from typing import Any, NamedTuple

import checks
import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels, ops, targets
from memzoo.core import dispatch
from memzoo.kernels.cell_scan import cell_scan, lanes, pallas_tpu, product
from memzoo.ops import arguments

PLATFORMS = ("tpu", "gpu")
N, M = 16, 32


def slow(*values):
  """A case for the slow tier: another compilation of what others test."""
  return pytest.param(*values, marks=pytest.mark.slow)


def step(state, x, constants):
  """Two states, of which one is fed back twice; gates; a bias."""
  a, b = state
  u, v, bias = constants
  low = a.astype(u.dtype)
  gate = jax.nn.sigmoid(product(low, u) + x["gate"])
  mixed = jnp.tanh(product(b, v.T) + bias + 0.3 * product(low, u))
  a = gate * a + (1 - gate) * mixed * jnp.cos(x["drive"])
  scale = 1 / (1 + jnp.sum(b * b, keepdims=True))
  b = scale * b + 0.5 * product(a, v)
  return (a, b), dict(y=a * x["drive"], z=b)


def plain(state, x, constants):
  """One state; `product`, and `@` on a weight that is cast."""
  u, bias = constants
  state = jnp.tanh(product(state, u) + x + bias)
  return state, u.astype(jnp.float32) @ state


def slots(memory, x, constants):
  """Slots that are written and read by what they hold: Graves et al. 2014,
  arXiv:1410.5401, with a gate of the write, and slot keys k(i) = M(i) W.

    K[k, k(i)] = k · k(i) / (‖k‖ ‖k(i)‖)            (6), ‖k‖ = 1
    w(i) = g softmax_i(β K[k, k(i)])                (5), gated
    M̃(i) = M(i) (1 − w(i) e)                        (3)
    M(i) = M̃(i) + w(i) a                            (4)
    r = Σ_i softmax_i(β K[k, k(i)]) M(i)            (2)
  """
  w, place = constants
  weights = focus(memory, x, w, place[0])
  given = weights * x["gate"]
  memory = memory * (1 - given * x["erase"]) + given * x["add"]
  weights = focus(memory, x, w, place[0])
  return memory, jnp.sum(weights * memory, axis=0, keepdims=True)


def focus(memory, x, w, place):
  """(5) and (6): a number for each slot, [M, 1]; `place` tells apart slots
  that hold the same."""
  keys = product(memory, w) + place
  square = jnp.sum(keys * keys, axis=1, keepdims=True)
  scores = jnp.sum(keys * x["key"], axis=1, keepdims=True)
  return jax.nn.softmax(4 * scores * jax.lax.rsqrt(square + 1e-6), axis=0)


class Inputs(NamedTuple):
  x: Any
  reset: jax.Array | None
  mask: jax.Array | None


def loop(step, state, inputs, constants, reset=None, mask=None, fresh=None):
  """The definition: `scan_steps` over the same step."""
  return arguments.scan_steps(
    lambda s, i: step(s, i.x, constants),
    state,
    Inputs(inputs, reset, mask),
    fresh,
  )


def draw(seed, batch, length, dtype=np.float32, of=step):
  """(state, inputs, constants, fresh), reset, mask, of one of the steps."""
  r = np.random.default_rng(seed)
  normal = lambda *shape: r.normal(size=shape).astype(np.float32)
  reset = r.random((batch, length)) < 0.2
  mask = r.random((batch, length)) < 0.8
  if of is plain:
    weights = jnp.asarray(normal(N, N) / 4, dtype), normal(N)
    args = normal(batch, N), normal(batch, length, N), weights, normal(N)
    return args, reset, mask
  state = normal(batch, N), normal(batch, M)
  inputs = dict(gate=normal(batch, length, N), drive=normal(batch, length, 1))
  weights = normal(N, N) / 4, normal(N, M) / 4, normal(N)
  weights = (*(jnp.asarray(w, dtype) for w in weights[:2]), weights[2])
  return (state, inputs, weights, (normal(N), normal(M))), reset, mask


def draw_slots(seed, batch, length, count=8, width=16, dtype=np.float32):
  """(memory [M, D], inputs, constants, fresh), reset, mask of `slots`."""
  r = np.random.default_rng(seed)
  normal = lambda *shape: r.normal(size=shape).astype(np.float32)
  uniform = lambda *shape: r.random(shape).astype(np.float32)
  key = normal(batch, length, 1, width)
  inputs = dict(
    key=key / np.linalg.norm(key, axis=-1, keepdims=True),
    gate=uniform(batch, length, 1, 1),
    erase=uniform(batch, length, 1, width),
    add=normal(batch, length, 1, width),
  )
  weights = jnp.asarray(normal(width, width) / 4, dtype)
  constants = weights, normal(1, count, width)
  args = normal(batch, count, width), inputs, constants, normal(count, width)
  return args, r.random((batch, length)) < 0.2, r.random((batch, length)) < 0.8


def pulled(run, args, *flags):
  """Values, final state, and the gradients of all of `args`."""

  def loss(*args):
    new, out = run(*args, *flags)
    return checks.wave(*jax.tree.leaves((new, out))), (new, out)

  axes = tuple(range(len(args)))
  return jax.jit(jax.value_and_grad(loss, axes, has_aux=True))(*args)


def batched(call):
  """`call` of one sequence over a batch; constants and fresh are shared."""

  def run(state, inputs, constants, fresh, reset, mask):
    one = lambda s, x, r, m: call(s, x, constants, reset=r, mask=m, fresh=fresh)
    return jax.vmap(one)(state, inputs, reset, mask)

  return run


def on(platform, fn, *args):
  with memzoo.platform(platform), kernels.interpret():
    return fn(*args)


def agree(got, want, scale=1.0):
  (_, values), grads = got
  (_, wanted), right = want
  assert checks.relative(values, wanted) <= checks.FORWARD * scale
  assert checks.relative(grads, right) <= checks.GRADIENT * scale


KERNEL, LOOP = (functools.partial(f, step) for f in (cell_scan, loop))
SMALL, SMALL_LOOP = (functools.partial(f, plain) for f in (cell_scan, loop))


@pytest.mark.parametrize(
  "batch, length, flags, platform",
  [
    (1, 1, "", "tpu"), (5, 7, "rm", "tpu"), (19, 33, "r", "gpu"),
    slow(1, 1, "", "gpu"), slow(5, 7, "rm", "gpu"), slow(19, 33, "r", "tpu"),
  ],
)  # fmt: skip
def test_equals_the_step_loop(batch, length, flags, platform, monkeypatch):
  """Values, final state, gradients of initial and fresh state, inputs,
  weights and biases; 19 rows are two blocks."""
  monkeypatch.setattr(pallas_tpu, "ROWS", 16)
  args, reset, mask = draw(batch + length, batch, length)
  reset = reset if "r" in flags else None
  mask = mask if "m" in flags else None
  got = on(platform, pulled, batched(KERNEL), args, reset, mask)
  want = pulled(batched(LOOP), args, reset, mask)
  agree(got, want)
  for leaf in jax.tree.leaves(got[1][3]):  # of the fresh state
    assert np.any(leaf) == (reset is not None)


SLOTS, SLOTS_LOOP = (functools.partial(f, slots) for f in (cell_scan, loop))


@pytest.mark.parametrize(
  "batch, length, flags, segments, platform",
  [
    (5, 7, "rm", None, "gpu"), (19, 9, "r", 1, "tpu"),
    slow(1, 1, "", None, "tpu"), slow(5, 7, "rm", None, "tpu"),
    slow(19, 9, "r", 1, "gpu"), slow(2, 33, "m", 3, "tpu"),
  ],
)  # fmt: skip
def test_a_state_of_slots(
  batch, length, flags, segments, platform, monkeypatch
):
  """A state [M, D]: values, and the gradients of the memory at the start and
  after a reset, of inputs, the weight and what is added to each slot's key."""
  monkeypatch.setattr(pallas_tpu, "ROWS", 16)
  args, reset, mask = draw_slots(batch + length, batch, length)
  reset = reset if "r" in flags else None
  mask = mask if "m" in flags else None
  call = functools.partial(SLOTS, segments=segments)
  got = on(platform, pulled, batched(call), args, reset, mask)
  want = pulled(batched(SLOTS_LOOP), args, reset, mask)
  agree(got, want)
  for leaf in jax.tree.leaves(want[1][:3]):
    assert np.any(leaf)


@pytest.mark.parametrize("platform", ["tpu", slow("gpu")])
def test_segments(platform):
  """States computed again, in segments that do not divide the sequence."""
  args, reset, mask = draw(3, 2, 33, of=plain)
  call = functools.partial(SMALL, segments=3)
  got = on(platform, pulled, batched(call), args, reset, mask)
  agree(got, pulled(batched(SMALL_LOOP), args, reset, mask))


@pytest.mark.parametrize("order", ["heads inside", slow("heads outside")])
def test_heads(order):
  """Mapped weights and a batch that shares them, in either order."""
  (state, inputs, weights, fresh), reset, _ = draw(4, 6, 7, of=plain)
  grid = lambda x: jnp.asarray(x).reshape((2, 3) + x.shape[1:])
  state, inputs = grid(state), grid(inputs)  # heads 2, batch 3
  heads = jax.tree.map(
    lambda w: jnp.stack([w, 0.5 * w[::-1]]), (weights, fresh)
  )
  reset = jnp.asarray(reset[:3])

  def both(call):
    one = lambda s, x, c, f, r: call(s, x, c, reset=r, fresh=f)
    if order == "heads inside":
      inner = jax.vmap(one, in_axes=(0, 0, 0, 0, None))
      return jax.vmap(inner, in_axes=(1, 1, None, None, 0), out_axes=1)
    inner = jax.vmap(one, in_axes=(0, 0, None, None, 0))
    return jax.vmap(inner, in_axes=(0, 0, 0, 0, None))

  args = state, inputs, *heads
  got = on("tpu", pulled, both(SMALL), args, reset)
  agree(got, pulled(both(SMALL_LOOP), args, reset))


def test_a_gradient_for_each_sequence():
  """vmap of grad: rows that share a block do not share their gradients."""
  args, _, _ = draw(5, 3, 7, of=plain)

  def each(call):
    def loss(state, inputs, weights, fresh):
      return checks.wave(*call(state, inputs, weights))

    grad = jax.vmap(jax.grad(loss, (0, 2)), in_axes=(0, 0, None, None))
    return jax.jit(grad)(*args)

  got = on("gpu", each, SMALL)
  assert checks.relative(got, each(SMALL_LOOP)) <= checks.GRADIENT


@pytest.mark.parametrize("platform", ["gpu", slow("tpu")])
def test_half_precision(platform):
  """bfloat16 weights: no further off than rounding makes it, and their
  gradients are theirs."""
  args, reset, mask = draw(6, 5, 7, of=plain)
  low, _, _ = draw(6, 5, 7, jnp.bfloat16, of=plain)
  exact = pulled(batched(SMALL_LOOP), args, reset, mask)
  rounded = pulled(batched(SMALL_LOOP), checks.single(low), reset, mask)
  got = on(platform, pulled, batched(SMALL), low, reset, mask)
  dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
  assert dtypes(got[1]) == dtypes(low)
  for a, b, c in zip(*((x[0][1], x[1]) for x in (got, rounded, exact))):
    allowed = 4 * max(checks.relative(b, c), 2.0**-8)
    assert checks.relative(checks.single(a), c) <= allowed


def test_inside_scan_and_checkpoint():
  """Layers in `lax.scan`, each under `jax.checkpoint`."""
  (state, inputs, weights, fresh), reset, mask = draw(7, 3, 7, of=plain)
  layers = jax.tree.map(lambda w: jnp.stack([w, -w, 0.5 * w]), weights)

  def deep(call):
    def run(state, inputs, layers, fresh):
      @jax.checkpoint
      def layer(inputs, weights):
        new, out = batched(call)(state, inputs, weights, fresh, reset, mask)
        return out, new

      return jax.lax.scan(layer, inputs, layers)

    return run

  args = state, inputs, layers, fresh
  got = on("tpu", pulled, deep(SMALL), args)
  agree(got, pulled(deep(SMALL_LOOP), args))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_low_precision_products_inside(platform):
  """The products' operands are in the weights' dtype, forward and backward,
  summed in float32; float32's are asked for in full."""

  def dots(dtype):
    args, _, _ = draw(9, 2, 3, dtype)
    loss = lambda s, x, w, f: checks.wave(
      *jax.tree.leaves(batched(KERNEL)(s, x, w, f, None, None))
    )
    found = []

    def look(jaxpr):
      for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
          kinds = {str(v.aval.dtype) for v in eqn.invars}
          found.append((kinds, str(eqn.outvars[0].aval.dtype), eqn.params))
        for leaf in jax.tree.leaves(
          list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
          inner = getattr(leaf, "jaxpr", leaf)
          if hasattr(inner, "eqns"):
            look(inner)

    look(jax.make_jaxpr(jax.grad(loss, 2))(*args).jaxpr)
    return found

  low = on(platform, dots, jnp.bfloat16)
  assert len(low) >= 12  # forward, and forward and backward in the backward
  assert all(x[:2] == ({"bfloat16"}, "float32") for x in low)
  for kinds, out, params in on(platform, dots, jnp.float32):
    assert kinds == {"float32"} and out == "float32"
    assert "HIGHEST" in str(params["precision"])


@pytest.mark.nans
def test_rows_are_apart():
  """What is not finite in one sequence, which padding repeats, stays there,
  and before its reset."""
  (state, inputs, weights, fresh), _, _ = draw(10, 3, 7, of=plain)
  inputs[2, 1, 3] = np.nan
  reset = np.zeros((3, 7), bool)
  reset[2, 4] = True
  run = batched(SMALL)
  loss = lambda x: checks.wave(
    *(y[:, 4:] for y in run(state, x, weights, fresh, reset, None)[1:])
  )
  value, grad = on("gpu", jax.jit(jax.value_and_grad(loss)), inputs)
  assert np.isfinite(value)
  assert np.isfinite(grad[:2]).all() and np.isfinite(grad[2, 4:]).all()
  assert np.any(grad[2, 4:])


CELLS = {
  "lstm": {}, "gru": {}, "gru_after": dict(reset_after=True),
  "gru_heads": dict(num_heads=2),
  "gru_after_heads": dict(num_heads=3, reset_after=True),
}  # fmt: skip


@pytest.mark.parametrize(
  "name, platform",
  [
    ("lstm", "gpu"), slow("gru_after", "tpu"), slow("lstm", "tpu"),
    slow("gru", "tpu"), slow("gru", "gpu"), slow("gru_after", "gpu"),
    slow("gru_heads", "tpu"), slow("gru_heads", "gpu"),
    slow("gru_after_heads", "tpu"),
  ],
)  # fmt: skip
def test_cells(name, platform):
  """d = 6: a GPU's kernel pads it to 16."""
  cell = memzoo.tiny(name.split("_")[0], **CELLS[name])
  keys = jax.random.split(jax.random.key(0), 5)
  params = jax.tree.map(
    lambda p: p + 0.1 * jax.random.normal(keys[1], p.shape), cell.init(keys[0])
  )
  xs = jax.random.normal(keys[2], (5, 7, 6))
  state = jax.tree.map(
    lambda s: jax.random.normal(keys[2], (5, *s.shape)),
    cell.initial_state(params),
  )
  reset = jax.random.bernoulli(keys[3], 0.2, (5, 7))
  mask = jax.random.bernoulli(keys[4], 0.8, (5, 7))

  def run(form):
    def loss(params, state, xs):
      one = lambda s, x, r, m: memzoo.scan(
        cell, params, s, x, reset=r, mask=m, implementation=form
      )
      out = jax.vmap(one)(state, xs, reset, mask)
      return checks.wave(*jax.tree.leaves(out)), out

    grad = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    return jax.jit(grad)(params, state, xs)

  agree(on(platform, run, "pallas"), run("scan"))


def test_what_is_refused():
  (state, x, (u, bias), _), _, _ = draw(11, 1, 3, of=plain)
  state, x = state[0], x[0]
  run = lambda s, x, u: SMALL(s, x, (u, bias[: s.shape[0]]))
  with pytest.raises(NotImplementedError, match="platform 'cpu'"):
    run(state, x, u)
  with kernels.interpret():
    with pytest.raises(NotImplementedError, match="must be floats"):
      run(state, x.astype(np.int32), u)
    with pytest.raises(ValueError, match="inputs must be arrays of two axes"):
      run(state, x[0], u)
    with pytest.raises(NotImplementedError, match="enters products"):
      cell_scan(lambda s, x, u: (s + u[0], s), state, x, u)
    with pytest.raises(NotImplementedError, match="enters products"):
      cell_scan(lambda s, x, u: (s + jnp.sum(u), s), state, x, u)
    with pytest.raises(ValueError, match="meets a vector of 32"):
      cell_scan(lambda s, x, u: (s @ u, s), state, x, np.ones((32, 16), "f4"))
    with pytest.raises(ValueError, match="a state like the one"):
      cell_scan(lambda s, x, u: ((s, s), s), state, x, u)
    with pytest.raises(ValueError, match="outputs must be arrays of one axis"):
      cell_scan(lambda s, x, u: (s, s[0]), state, x, u)
    with pytest.raises(NotImplementedError, match="x @ w alone"):
      cell_scan(lambda s, x, u: (s, u @ s[:, None]), state, x, u)
    with pytest.raises(NotImplementedError, match="one step or more"):
      run(state, x[:0], u)
    with memzoo.platform("gpu"):
      with pytest.raises(NotImplementedError, match="a power of two"):
        run(state[:6], x[:, :6], u[:6, :6])
      (memory, inputs, constants, _), *_ = draw_slots(0, 1, 3, count=5)
      inputs = jax.tree.map(lambda x: x[0], inputs)
      pairs = lambda s, x, c: (s, jnp.einsum("mi,mj->ij", s, s))
      with pytest.raises(
        NotImplementedError, match="no products of two arrays"
      ):
        cell_scan(pairs, memory[0, :4], inputs)
      joined = lambda s, x, c: (s, jnp.concatenate([s, x["key"]]))
      with pytest.raises(
        NotImplementedError, match="no arrays that are joined"
      ):
        cell_scan(joined, memory[0, :4], inputs)
      with pytest.raises(NotImplementedError, match=r"got \(5, 16\)"):
        SLOTS(memory[0], inputs, constants, inert=True)
      cell = memzoo.make("lstm", d_model=256)
      spec = jax.eval_shape(cell.init, jax.random.key(0))
      call = lambda p, x: memzoo.scan(cell, p, None, x, implementation="pallas")
      xs = jax.ShapeDtypeStruct((9, 256), "bfloat16")
      with pytest.raises(NotImplementedError, match="524288 bytes on chip"):
        jax.eval_shape(call, spec, xs)


def test_forms():
  """A name never falls back, and no kernel is taken unasked."""
  cell = memzoo.tiny("lstm")
  params = cell.init(jax.random.key(0))
  xs = jnp.ones((3, 6))
  for platform in ("cpu", "tpu", "gpu"):
    with memzoo.platform(platform):
      said = dispatch.explain(memzoo.scan, cell, params, None, xs)
      assert said[-1].form == "scan"
      call = functools.partial(ops.linear_recurrence, decay=xs)
      assert dispatch.explain(call, xs[0], xs)[-1].form != "pallas"
  with pytest.raises(NotImplementedError, match="interpret"):
    memzoo.scan(cell, params, None, xs, implementation="pallas")
  with pytest.raises(NotImplementedError, match="interpret"):
    ops.linear_recurrence(xs[0], xs, decay=xs, implementation="pallas")


LINEAR = {  # length, width, kind, flags; 'constant': decay [N]
  "one": (1, 3, "real", ""),
  "real": (33, 40, "real", "rm"),
  "complex": (7, 5, "complex", "rm"),
  "constant": (33, 3, "constant", ""),
  "constant flags": (7, 3, "constant", "r"),
  "wide": (3, 1100, "real", "m"),
}


def recurrence(name, seed=0):
  length, width, kind, flags = LINEAR[name]
  r = np.random.default_rng(seed)

  def normal(*shape):
    x = r.normal(size=shape)
    if kind != "real":
      x = x + 1j * r.normal(size=shape)
    return jnp.asarray(x, jnp.float32 if kind == "real" else jnp.complex64)

  shape = (width,) if kind == "constant" else (3, length, width)
  args = normal(3, width), normal(3, length, width), 0.5 * normal(*shape)
  reset = jnp.asarray(r.random((3, length)) < 0.3) if "r" in flags else None
  mask = jnp.asarray(r.random((3, length)) < 0.7) if "m" in flags else None
  axis = None if kind == "constant" else 0

  def run(form):
    def loss(h, x, decay, fresh):
      one = lambda h, x, a, r, m: ops.linear_recurrence(
        h, x, decay=a, reset=r, mask=m, fresh=fresh, implementation=form
      )
      out = jax.vmap(one, in_axes=(0, 0, axis, 0, 0))(h, x, decay, reset, mask)
      parts = [f(y) for y in out for f in (jnp.real, jnp.imag)]
      return checks.wave(*parts), out

    grad = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
    return jax.jit(grad)(*args, normal_fresh)

  normal_fresh = normal(width)
  return run


@pytest.mark.parametrize(
  "name, platform",
  [
    ("complex", "tpu"), ("real", "gpu"), ("one", "gpu"),
    ("constant flags", "gpu"), ("wide", "tpu"), slow("real", "tpu"),
    slow("complex", "gpu"),
    slow("constant", "tpu"), slow("constant", "gpu"), slow("one", "tpu"),
    slow("constant flags", "tpu"), slow("wide", "gpu"),
  ],
)  # fmt: skip
def test_linear_recurrence(name, platform, monkeypatch):
  monkeypatch.setattr(lanes, "AHEAD", 4)
  monkeypatch.setattr(lanes, "STEPS", 16)
  run = recurrence(name)
  agree(on(platform, run, "pallas"), run("scan"))


@pytest.mark.nans
@pytest.mark.parametrize("platform", PLATFORMS)
def test_linear_recurrence_reset_stops_infinities(platform, monkeypatch):
  monkeypatch.setattr(lanes, "AHEAD", 4)
  x = np.ones((7, 3), np.float32)
  x[1, 0], x[2, 1] = np.inf, np.nan
  reset = np.arange(7) == 4
  call = functools.partial(
    ops.linear_recurrence, jnp.ones(3), x, decay=jnp.full((7, 3), 0.5),
    reset=jnp.asarray(reset), implementation="pallas",
  )  # fmt: skip
  state, hs = on(platform, jax.jit(call))
  assert np.isfinite(state).all() and np.isfinite(hs[4:]).all()
  np.testing.assert_allclose(hs[4:, 0], [1, 1.5, 1.75])


def test_linear_recurrence_over_nested_axes_and_twice(monkeypatch):
  """Batch and groups of channels mapped; a second derivative, since the
  gradient is the kernel run backwards."""
  r = np.random.default_rng(0)
  h, x, a = (
    jnp.asarray(r.normal(size=s), jnp.float32)
    for s in ((2, 3, 4), (2, 3, 5, 4), (3, 5, 4))
  )

  def second(form):
    def value(a):
      one = lambda h, x, a: ops.linear_recurrence(
        h, x, decay=a, implementation=form
      )[1]
      return checks.wave(jax.vmap(jax.vmap(one), in_axes=(0, 0, None))(h, x, a))

    return jax.jit(jax.grad(lambda a: checks.wave(jax.grad(value)(a))))(a)

  monkeypatch.setattr(lanes, "AHEAD", 4)
  got = on("gpu", second, "pallas")
  assert checks.relative(got, second("scan")) <= checks.GRADIENT


@pytest.fixture
def no_cache():
  """Programs for absent devices are written to JAX's compilation cache, from
  which they cannot be read back."""
  where = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.reset_cache()
  yield
  jax.config.update("jax_compilation_cache_dir", where)
  compilation_cache.reset_cache()


def struct(*shape, dtype="float32"):
  return jax.ShapeDtypeStruct(shape, dtype)


def compiled_cell(name, batch, length, width, dtype, **options):
  cell = memzoo.make(name, d_model=width, **options)
  params = jax.eval_shape(cell.init, jax.random.key(0))

  def loss(params, xs, reset, mask):
    one = lambda x, r, m: memzoo.scan(
      cell, params, None, x, reset=r, mask=m, implementation="pallas"
    )
    return checks.wave(*jax.tree.leaves(jax.vmap(one)(xs, reset, mask)))

  flags = struct(batch, length, dtype="bool")
  xs = struct(batch, length, width, dtype=dtype)
  return loss, (params, xs, flags, flags), (0, 1)


def compiled_machine(batch, length, width, dtype):
  """Compiles for a TPU alone: its step multiplies what a row holds."""
  cell = "token_turing_machine"
  return compiled_cell(
    cell, batch, length, width, dtype, memory_size=16, summary="query"
  )


def compiled_linear(batch, length, width, dtype):
  def loss(h, x, decay):
    one = lambda h, x, a: ops.linear_recurrence(
      h, x, decay=a, implementation="pallas"
    )
    y = jax.vmap(one)(h, x, decay)[1]
    return checks.wave(jnp.real(y), jnp.imag(y))

  x = struct(batch, length, width, dtype=dtype)
  return loss, (struct(batch, width, dtype=dtype), x, x), (0, 1, 2)


def compiled_slots(batch, length, count, width, dtype):
  args, reset, mask = draw_slots(0, batch, length, count, width)

  def loss(memory, inputs, constants, fresh, reset, mask):
    constants = constants[0].astype(dtype), constants[1]
    out = batched(SLOTS)(memory, inputs, constants, fresh, reset, mask)
    return checks.wave(*jax.tree.leaves(out))

  args = jax.tree.map(
    lambda x: struct(*x.shape, dtype=x.dtype), (*args, reset, mask)
  )
  return loss, args, (0, 1, 2, 3)


COMPILED = {
  "lstm": functools.partial(compiled_cell, "lstm", 64, 1024, 128, "bfloat16"),
  "gru_odd": functools.partial(compiled_cell, "gru", 70, 777, 60, "float32"),
  "lstm_heads": functools.partial(
    compiled_cell, "lstm", 64, 1024, 1024, "bfloat16", num_heads=8
  ),
  "gru_heads_odd": functools.partial(
    compiled_cell, "gru", 70, 777, 300, "float32", num_heads=5
  ),
  "slots": functools.partial(compiled_slots, 32, 256, 64, 64, "float32"),
  "slots_low": functools.partial(compiled_slots, 7, 99, 16, 128, "bfloat16"),
  "token_turing_machine": functools.partial(
    compiled_machine, 32, 48, 32, "float32"
  ),
  "linear": functools.partial(compiled_linear, 8, 4096, 1024, "float32"),
  "complex": functools.partial(compiled_linear, 8, 4096, 1024, "complex64"),
  "linear_odd": functools.partial(compiled_linear, 3, 1000, 100, "float32"),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu:v5e", "tpu:v6e", "cuda:h200"])
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_for_the_device(case, target, no_cache):
  """Forward and backward."""
  target = targets.get(target)
  if target.missing():
    pytest.skip(f"{target.name} needs {', '.join(target.missing())}")
  loss, args, wrt = COMPILED[case]()
  if case == "token_turing_machine" and target.platform == "gpu":
    with pytest.raises(NotImplementedError, match="no products of two arrays"):
      target.compile(loss, *args)
    return
  for fn in (loss, jax.grad(loss, wrt)):
    report = target.compile(fn, *args)
    assert report.ok, report.message
    assert report.fits
