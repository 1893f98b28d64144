"""The walk over a chunk function: its kernels against the ops' step loops.

In Pallas' interpreter, for the numbers; on real compilers where they are
installed, for what they accept.
"""

import contextlib
import functools
import importlib
import os
import subprocess
import sys

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels, ops, targets
from memzoo.core import dispatch
from memzoo.kernels.chunk_scan import chunk_scan

# The package's names of these are functions.
chunk, delta, attention, learning = (
  importlib.import_module(f"memzoo.ops.{name}")
  for name in ("chunk", "delta_rule", "linear_attention", "gradient_step")
)

PLATFORMS = ("tpu", "gpu")
OPS = ("linear_attention", "delta_rule")
DECAYS = ("none", "scalar", "channel")
B, H, K, V = 2, 2, 6, 5
FLAGS = ("reset", "mask")


@pytest.fixture(params=PLATFORMS)
def platform(request):
  """A driver, in the interpreter."""
  with kernels.interpret(), dispatch.platform(request.param):
    yield request.param


def draw(op, decay, length, seed=0, k=K, v=V, flags=FLAGS, scale=1.0):
  """Arguments of a batched op: (arrays by name, static none)."""
  keys = iter(jax.random.split(jax.random.key(seed), 12))
  normal = lambda *shape: jax.random.normal(next(keys), shape)
  c = dict(
    s=normal(B, H, k, v), q=normal(B, length, H, k),
    k=normal(B, length, H, k), v=normal(B, length, H, v),
  )  # fmt: skip
  c["k"] /= jnp.linalg.norm(c["k"], axis=-1, keepdims=True)
  if decay != "none":
    shape = (B, length, H) + ((k,) if decay == "channel" else ())
    c["log_decay"] = -scale * jnp.exp(normal(*shape))
  if op == "delta_rule":
    c["beta"] = 2 * jax.nn.sigmoid(normal(B, length, H))
  if "reset" in flags:
    c["reset"] = jax.random.bernoulli(next(keys), 0.1, (B, length))
    c["fresh"] = normal(H, k, v)
  if "mask" in flags:
    c["mask"] = jax.random.bernoulli(next(keys), 0.8, (B, length))
  return c


def evaluate(op, c, form, **options):
  """Final state, outputs, and the gradients of all that is a number."""
  free = {k: x for k, x in c.items() if checks.is_float(x)}
  flags = {k: x for k, x in c.items() if k not in free}
  call = ops.batched(getattr(ops, op))

  def loss(free):
    c = dict(free)
    args = [c.pop(name) for name in "sqkv"]
    out = call(*args, **c, **flags, implementation=form, **options)
    return checks.wave(*jax.tree.leaves(out)), out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(free)
  return out, grads


def hold(op, c, form="pallas", **options):
  want, got = evaluate(op, c, "scan"), evaluate(op, c, form, **options)
  assert checks.relative(got[0], want[0]) <= checks.FORWARD
  for name, x in want[1].items():
    assert checks.relative(got[1][name], x) <= checks.GRADIENT, name


QUICK = {("delta_rule", "scalar", 17)}


@pytest.mark.parametrize(
  "op, decay, length",
  [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in sorted(
      {(o, d, t) for o in OPS for d in DECAYS for t in (1, 7, 63, 64, 65, 200)}
      | QUICK
    )
  ],
)
def test_equals_the_step_loop(op, decay, length, platform):
  """Values, final state, every gradient; resets to a learned state, gaps, a
  ragged end, widths that are no powers of two."""
  hold(op, draw(op, decay, length), chunk_size=16 if length < 60 else 32)


@pytest.mark.parametrize(
  "op", [OPS[0], pytest.param(OPS[1], marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  "decay", [pytest.param("scalar", marks=pytest.mark.slow), "channel"]
)
def test_strong_gates_and_identical_keys(op, decay, platform):
  """Log-decay −20 throughout, −inf at places, one key all along."""
  c = draw(op, decay, 33, flags=())
  c["log_decay"] = jnp.full_like(c["log_decay"], -20.0)
  c["log_decay"] = c["log_decay"].at[:, 20:].set(-0.01)
  c["log_decay"] = c["log_decay"].at[:, 25].set(-jnp.inf)
  c["k"] = jnp.broadcast_to(c["k"][:, :1], c["k"].shape)
  hold(op, c, chunk_size=16)


@pytest.mark.parametrize(
  "op", [pytest.param(OPS[0], marks=pytest.mark.slow), OPS[1]]
)
def test_half_precision(op, platform):
  """bfloat16 inputs: at most four times what rounding them costs."""
  c = draw(op, "scalar", 33, flags=())
  low = {
    n: x if n in ("s", "log_decay") else x.astype(jnp.bfloat16)
    for n, x in c.items()
  }
  rounded = {n: x.astype(c[n].dtype) for n, x in low.items()}
  want, near = evaluate(op, c, "scan"), evaluate(op, rounded, "scan")
  got = checks.single(evaluate(op, low, "pallas", chunk_size=16))
  for a, b, x in zip(*map(jax.tree.leaves, (got, near, want)), strict=True):
    bound = 4 * checks.relative(b, x) + 2**-8
    assert checks.relative(a, x) <= bound


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.slow
def test_split_form(op, decay, platform):
  """Prepared side by side, walked, and emitted side by side."""
  hold(op, draw(op, decay, 41), "pallas_split", chunk_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_segments_are_recomputed(op, platform):
  """The backward keeps the first states of segments alone, with what it
  gives: the same gradients, and fewer kept numbers."""
  c = draw(op, "scalar", 75)
  kept = {}
  for segments in (1, 3):
    module = dict(linear_attention=attention, delta_rule=delta)[op]
    names = [n for n in module.Inputs._fields]

    def one(s, fresh, inputs, segments=segments, module=module):
      return chunk_scan(
        module.FUNCTION, s, inputs, fresh, axes=module.AXES, chunk_size=16,
        segments=segments,
      )  # fmt: skip

    first = {n: x[0, :, 0] if x.ndim > 2 else x[0] for n, x in c.items()}
    inputs = module.Inputs(*(first[n] for n in names))
    state, fresh = c["s"][0, 0], c["fresh"][0]

    @jax.jit
    def grads(s, fresh, floats, one=one, inputs=inputs):
      def loss(s, fresh, floats):
        return checks.wave(
          *jax.tree.leaves(one(s, fresh, inputs._replace(**floats)))
        )

      return jax.grad(loss, (0, 1, 2))(s, fresh, floats)

    floats = {n: first[n] for n in names if checks.is_float(first[n])}
    kept[segments] = grads(state, fresh, floats)
  assert checks.relative(kept[3], kept[1]) <= checks.FORWARD


def test_value_axis_in_blocks():
  """Programs for parts of V: key-side gradients are summed over them."""
  c = draw("delta_rule", "scalar", 20, v=32)
  with kernels.interpret(), dispatch.platform("gpu"):
    one = functools.partial(
      chunk_scan, delta.FUNCTION, axes=delta.AXES, chunk_size=16
    )
    first = {n: x[0, :, 0] if x.ndim > 2 else x[0] for n, x in c.items()}
    inputs = delta.Inputs(*(first[n] for n in delta.Inputs._fields))

    def loss(block, s, fresh, q, k, v):
      out = one(
        s, inputs._replace(q=q, k=k, v=v), fresh, value_block=block
      )  # fmt: skip
      return checks.wave(*jax.tree.leaves(out)), out

    args = c["s"][0, 0], c["fresh"][0], inputs.q, inputs.k, inputs.v
    whole, parts = (
      jax.jit(
        jax.grad(functools.partial(loss, n), tuple(range(5)), has_aux=True)
      )(*args)
      for n in (32, 16)
    )
  assert checks.relative(parts, whole) <= checks.FORWARD


@pytest.mark.parametrize(
  "op, k, v",
  [
    pytest.param("linear_attention", 3, 20, marks=pytest.mark.slow),
    pytest.param("linear_attention", 20, 3, marks=pytest.mark.slow),
    ("delta_rule", 3, 20),
    pytest.param("delta_rule", 20, 3, marks=pytest.mark.slow),
  ],
)
def test_keys_and_values_of_two_widths(op, k, v, platform):
  """K above V and below it, and not of one padded width (16 and 32)."""
  hold(op, draw(op, "scalar", 17, k=k, v=v), chunk_size=16)


@pytest.mark.parametrize(
  "op", [OPS[0], pytest.param(OPS[1], marks=pytest.mark.slow)]
)
def test_heads_in_groups(op, platform):
  """Heads of a group share queries, keys and resets: their gradients are the
  sums over the group, and the kernels read one copy of each."""
  groups, heads, length, wide = 2, 3, 20, 20
  keys = iter(jax.random.split(jax.random.key(5), 8))
  normal = lambda *shape: jax.random.normal(next(keys), shape)
  free = dict(
    s=normal(groups, heads, wide, V), q=normal(groups, length, wide),
    k=normal(groups, length, wide) / 4, v=normal(groups, heads, length, V),
    log_decay=-jnp.exp(normal(groups, heads, length)),
  )  # fmt: skip
  if op == "delta_rule":
    free["beta"] = jax.nn.sigmoid(normal(groups, heads, length))
  reset = jax.random.bernoulli(next(keys), 0.1, (groups, length))
  shared = ("q", "k")
  inner = {n: None if n in shared else 0 for n in free}

  def call(form, free):
    def one(free, reset):
      free = dict(free)
      args = [free.pop(n) for n in "sqkv"]
      return getattr(ops, op)(
        *args, **free, reset=reset, implementation=form, chunk_size=16
      )

    return jax.vmap(jax.vmap(one, (inner, None)))(free, reset)

  def run(form):
    def loss(free):
      out = call(form, free)
      return checks.wave(*out), out

    return jax.jit(jax.grad(loss, has_aux=True))(free)

  want, got = run("scan"), run("pallas")
  assert checks.relative(got[1], want[1]) <= checks.FORWARD
  for name, x in want[0].items():
    assert checks.relative(got[0][name], x) <= checks.GRADIENT, name

  jaxpr = jax.make_jaxpr(functools.partial(call, "pallas"))(free).jaxpr
  (kernel,) = _equations(jaxpr, "pallas_call", [])
  shapes = [x.aval.shape for x in kernel.invars]
  chunks = -(-length // 16)
  padded = 32 if platform == "gpu" else wide
  assert shapes.count((groups, chunks, 16, padded)) == 2
  assert not shapes.count((groups, heads, chunks, 16, padded))


@pytest.mark.parametrize(
  "resets", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_test_time_learning(resets, platform):
  """The state is a model that learns: mini-batches of 16, layer norm, a bias,
  from the middle of a mini-batch on."""
  n, width, length = 16, 16, 39
  keys = iter(jax.random.split(jax.random.key(3), 16))
  normal = lambda *shape: jax.random.normal(next(keys), shape)
  model = lambda: learning.Model(0.3 * normal(width, width), normal(width))
  state = learning.State(model(), model(), jnp.asarray(5, jnp.int32))
  free = dict(
    q=normal(length, width), k=normal(length, width), v=normal(length, width),
    rate=0.1 * jax.nn.sigmoid(normal(length)), model=state.model,
    grads=jax.tree.map(lambda x: 0.1 * x, state.grads), fresh=model(),
    learner=learning.Learner(
      1 / jnp.arange(1.0, n + 1), 1 + 0.1 * normal(width), normal(width)
    ),
  )  # fmt: skip
  flags = dict(mask=jax.random.bernoulli(next(keys), 0.8, (length,)))
  if resets:
    flags["reset"] = jax.random.bernoulli(next(keys), 0.1, (length,))

  def run(form):
    def loss(c):
      c = dict(c)
      start = learning.State(c.pop("model"), c.pop("grads"), state.phase)
      if not resets:
        c.pop("fresh")
      out = learning.gradient_step(
        start, c.pop("q"), c.pop("k"), c.pop("v"), **c, **flags,
        residual=True, implementation=form,
      )  # fmt: skip
      return checks.wave(*filter(checks.is_float, jax.tree.leaves(out))), out

    return jax.jit(jax.grad(loss, has_aux=True))(free)

  want, got = run("scan"), run("pallas")
  assert checks.relative(got[1], want[1]) <= checks.FORWARD
  assert checks.relative(got[0], want[0]) <= checks.GRADIENT


@pytest.mark.slow
def test_layers_and_checkpoints(platform):
  """Under `lax.scan` over layers and `jax.checkpoint`, as models are."""
  c = draw("delta_rule", "scalar", 20, flags=())
  weights = 0.3 * jax.random.normal(jax.random.key(1), (3, V, K))

  def run(form):
    call = ops.batched(ops.delta_rule)

    @jax.checkpoint
    def layer(q, w):
      o = call(
        c["s"], q, c["k"], c["v"], beta=c["beta"], log_decay=c["log_decay"],
        implementation=form, chunk_size=16,
      )[1]  # fmt: skip
      return jnp.tanh(o @ w), None

    return jax.jit(
      jax.value_and_grad(
        lambda q, w: checks.wave(jax.lax.scan(layer, q, w)[0]), (0, 1)
      )
    )(c["q"], weights)

  want, got = run("scan"), run("pallas")
  assert checks.relative(got, want) <= checks.GRADIENT


def _equations(jaxpr, name, found):
  """All equations of a primitive, inner ones too."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == name:
      found.append(eqn)
    for value in eqn.params.values():
      for item in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(item, "jaxpr", item)
        if hasattr(inner, "eqns"):
          _equations(inner, name, found)
  return found


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_that_is_asked_for(op, dtype, platform):
  """Every product of float32 numbers asks for all their digits, forward and
  backward, and no caller of float32 meets a lower product. (The interpreter
  cannot show it: it multiplies in float32 whatever is asked.)"""
  c = draw(op, "scalar", 20, flags=())
  low = {
    n: x if n in ("s", "log_decay") else x.astype(dtype) for n, x in c.items()
  }
  call = functools.partial(evaluate, op, form="pallas", chunk_size=16)
  jaxpr = jax.make_jaxpr(lambda c: call(c=c))(low).jaxpr
  dots = _equations(jaxpr, "dot_general", [])
  kinds = set()
  for eqn in dots:
    operands = {str(x.aval.dtype) for x in eqn.invars}
    assert len(operands) == 1, "operands of two dtypes"
    assert str(eqn.params["preferred_element_type"]) == "float32"
    kinds |= operands
    if operands == {"float32"}:
      assert eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    elif dtype == "float32":  # the exact parts of a masked sum alone
      assert any(_is_mask(x) for x in eqn.invars)
  assert dtype in kinds


def _is_mask(x):
  """Whether a product's operand is a square of flags."""
  return x.aval.shape in ((16, 16),)


def test_lower_products_would_be_seen():
  """With operands rounded to TF32's digits the suite's bounds are missed: what
  the test above excludes would matter."""
  c = draw("delta_rule", "scalar", 64, flags=(), scale=0.05)
  want = evaluate("delta_rule", c, "scan")[0]

  def rounded(a, b):
    tf32 = lambda x: jax.lax.reduce_precision(x, 8, 10)
    return exact(tf32(a), tf32(b))

  exact = chunk._dot
  try:
    chunk._dot = rounded
    got = evaluate("delta_rule", c, "chunk", chunk_size=64)[0]
  finally:
    chunk._dot = exact
  assert checks.relative(got, want) > 10 * checks.FORWARD


def test_where_there_is_no_kernel():
  c = draw("delta_rule", "none", 5, flags=())
  call = functools.partial(
    ops.batched(ops.delta_rule), *(c[n] for n in "sqkv"), beta=c["beta"]
  )
  with pytest.raises(NotImplementedError, match="no kernel for the platform"):
    call(implementation="pallas")
  decisions = memzoo.explain(call)
  assert [d.form for d in decisions] == ["chunk"]
  with kernels.interpret(), pytest.raises(NotImplementedError, match="from 16"):
    one = learning.Model(jnp.zeros((4, 4)))
    learning.gradient_step(
      learning.start(one), *(jnp.zeros((9, 4)),) * 3, rate=jnp.ones(9),
      learner=learning.Learner(jnp.ones(4)), implementation="pallas",
    )  # fmt: skip


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from memzoo import kernels, ops
from memzoo.core import dispatch
devices = np.asarray(jax.devices()).reshape(4, 2)
mesh = jax.sharding.Mesh(devices, ("data", "heads"))
keys = jax.random.split(jax.random.key(0), 6)
B, T, H, K = 4, 20, 2, 6
q, k, v = (jax.random.normal(key, (B, T, H, K)) / 3 for key in keys[:3])
beta = jax.nn.sigmoid(jax.random.normal(keys[3], (B, T, H)))
s, fresh = jnp.zeros((B, H, K, K)), jax.random.normal(keys[4], (H, K, K))
reset = jax.random.bernoulli(keys[5], 0.1, (B, T))

def loss(op, form, q, fresh):
  s1, o = op(s, q, k, v, beta=beta, reset=reset, fresh=fresh,
             implementation=form, chunk_size=16)
  return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(s1))

one = ops.batched(ops.delta_rule)
many = ops.batched(ops.delta_rule, mesh=mesh, batch="data", heads="heads")
want = jax.jit(jax.value_and_grad(lambda *a: loss(one, "scan", *a), (0, 1)))(q, fresh)
with kernels.interpret(), dispatch.platform("tpu"):
  got = jax.jit(jax.value_and_grad(lambda *a: loss(many, "pallas", *a), (0, 1)))(q, fresh)
assert len(got[1][0].sharding.device_set) == 8, got[1][0].sharding
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
  a, b = np.asarray(a), np.asarray(b)
  assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), (a, b)
print("equal")
"""


@pytest.mark.slow
def test_batch_and_heads_on_eight_devices():
  """Each device walks over its own rows and heads, as one device does."""
  flags = "--xla_force_host_platform_device_count=8"
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  done = subprocess.run(
    [sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True,
    timeout=300,
  )  # fmt: skip
  assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.nans
@pytest.mark.parametrize("shape", [(5, 1), (1, 7), (1, 1), (5, 7)])
def test_flags_in_triton(shape):
  """The comparison that Triton cannot move before a broadcast: a mask still,
  which nothing crosses, forward or backward."""
  flags = jax.random.bernoulli(jax.random.key(0), 0.5, shape)
  flags = flags.at[0, 0].set(True)
  x = jnp.arange(35.0).reshape(5, 7) - 9
  want = np.where(flags, x, 0.5)
  x = np.where(np.broadcast_to(flags, x.shape), x, np.nan)
  weights = jnp.arange(1.0, 36.0).reshape(5, 7)

  def loss(x):
    y = chunk.where(flags.astype(jnp.float32), x, 0.5)
    return jnp.sum(weights * y), y

  for context in (contextlib.nullcontext(), chunk.wide_flags()):
    with context:
      grad, y = jax.grad(loss, has_aux=True)(jnp.asarray(x))
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(grad, np.where(flags, weights, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu:v5e", "tpu:v6e", "cuda:h200"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("op", OPS)
def test_compiles_for_the_device(op, decay, target):
  """Forward and backward, at B=4 T=4096 H=16 K=V=128 in bfloat16."""
  target = targets.get(target)
  if target.missing():
    pytest.skip(f"{target.name} needs {', '.join(target.missing())}")
  shape = lambda *s, dtype="bfloat16": jax.ShapeDtypeStruct(s, dtype)
  wide = shape(4, 4096, 16, 128)
  gates = {}
  if decay != "none":
    tail = (128,) if decay == "channel" else ()
    gates["log_decay"] = shape(4, 4096, 16, *tail, dtype="float32")
  if op == "delta_rule":
    gates["beta"] = shape(4, 4096, 16)
  call = ops.batched(getattr(ops, op))

  def loss(s, q, k, v, gates):
    s, o = call(s, q, k, v, **gates, implementation="pallas", chunk_size=32)
    return jnp.sum(s) + jnp.sum(o.astype(jnp.float32))

  report = target.compile(
    jax.grad(loss, (0, 1, 2, 3, 4)),
    shape(4, 16, 128, 128, dtype="float32"),
    wide,
    wide,
    wide,
    gates,
  )
  assert report.ok, report.message
  assert report.fits


def test_chunk_of_zeros_is_inert():
  """What is padded changes nothing: zeros in K, V and absent steps."""
  c = draw("delta_rule", "channel", 9, flags=())
  one = {
    n: np.asarray(x[0, :, 0] if n != "s" else x[0, 0]) for n, x in c.items()
  }
  inputs = delta.Inputs(*(one.get(n) for n in delta.Inputs._fields))
  wide = lambda x, *more: jnp.pad(x, [*[(0, 0)] * (x.ndim - len(more)), *more])
  padded = inputs._replace(
    q=wide(inputs.q, (0, 2)), k=wide(inputs.k, (0, 2)),
    v=wide(inputs.v, (0, 3)), log_decay=wide(inputs.log_decay, (0, 2)),
  )  # fmt: skip
  run = jax.jit(
    functools.partial(chunk.run, delta.FUNCTION, chunk_size=16, columns=True)
  )
  want = run(jnp.asarray(one["s"]), jax.tree.map(jnp.asarray, inputs), None)
  got = run(wide(jnp.asarray(one["s"]), (0, 2), (0, 3)), padded, None)
  assert checks.relative(got[0][:K, :V], want[0]) <= checks.FORWARD
  assert checks.relative(got[1][:, :V], want[1]) <= checks.FORWARD
  assert not np.any(got[0][K:]) and not np.any(got[1][:, V:])
