"""Compiles an op, a cell or a model for a device that is not here.

An op, with inputs of the sizes that are given:

  python -m experiments.compile --target=tpu:v5e,cuda:h200 --op=delta_rule \\
    --implementation=chunk,scan --gradient --dtype=bfloat16 \\
    --batch=4 --length=4096 --heads=16 --key=128 --value=128

A cell, over a batch of sequences: `--cell=gated_delta --d_model=256
--cell_options=num_heads=4`; several cells take turns.

A model, for one step of training (forward, backward, update), by the flags of
`experiments.train`, `--task` among them, so that its flag files do:

  python -m experiments.compile --target=tpu:v5e-4 \\
    --flagfile=experiments/mqar_small/gated_delta.flags --batch_size=1024

A target of several devices splits the batch over them (`--mesh` says how), and
bytes are those of one. `make aot-env` makes the environment with the compilers.

Prints a Markdown table, a row as soon as it is known; exits with 1 where
something did not compile or does not fit.
"""

from collections.abc import Callable
import dataclasses
import functools
import inspect
import json
import sys
from typing import Any, NamedTuple

from absl import app, flags, logging
from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp

from experiments import train
from experiments.bench import table
import memzoo
from memzoo import ops, parallel, targets, tasks, training
from memzoo.ops.attention import empty as ring_empty
from memzoo.ops.conv import conv
from memzoo.ops.gradient_step import Learner, Model, start

FLAGS = flags.FLAGS

# What each kind takes of the flags below and of `experiments.train`'s.
OF_ALL = ("target", "implementation", "json", "mesh", "seed")
OF_OPS = (
  "op", "op_options", "batch", "length", "heads", "key", "value", "slots",
  "decay", "dtype", "gradient", "reset",
)  # fmt: skip
OF_CELLS = (
  "cell", "cell_options", "d_model", "batch", "length", "dtype", "gradient",
  "reset",
)  # fmt: skip
HEAD = (
  "what", "inputs", "direction", "target", "form", "compiled", "s",
  "arguments MB", "outputs MB", "temporary MB", "code MB", "fits", "GiB",
  "message",
)  # fmt: skip
MESSAGE = 240  # characters of it in the table


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags, and those of `experiments.train`."""
  train.define(values)
  whole = lambda name, default, about: flags.DEFINE_integer(
    name, default, about, lower_bound=1, flag_values=values
  )
  flags.DEFINE_list(
    "target", None,
    f"Of {', '.join(targets.names())}, with a count (tpu:v5e-4) or a layout "
    "(tpu:v5e:2x2) for several devices.", flag_values=values,
  )  # fmt: skip
  flags.DEFINE_enum(
    "op", None, sorted(OPS), "An op of memzoo.ops.", flag_values=values
  )
  flags.DEFINE_string(
    "op_options", "", "'chunk_size=64', or JSON.", flag_values=values
  )
  whole("batch", 4, "B of an op or cell.")
  whole("length", 4096, "T of an op or cell.")
  whole("heads", 16, "H of an op that has heads.")
  whole("key", 128, "K of an op; N of a recurrence, D of conv.")
  whole("value", 128, "V of an op; D of selective_scan.")
  whole(
    "slots", None,
    "Attention's ring (T if unset), hopfield's patterns (1024), n of "
    "product_key's n² keys (64), gradient_step's mini-batch (16), conv's taps "
    "(4).",
  )  # fmt: skip
  flags.DEFINE_enum(
    "decay", "none", ("none", "scalar", "channel"),
    "Of linear_attention, delta_rule and diag_plus_rank_one.",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_enum(
    "dtype", "float32", ("float32", "bfloat16"),
    "Of an op's or cell's inputs; states, gates and parameters are float32.",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    "gradient", False, "The backward of an op or cell, too.",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    "reset", False, "Give an op or cell resets.", flag_values=values
  )
  flags.DEFINE_string(
    "json", None, "A file for the rows, messages whole.", flag_values=values
  )


class Call(NamedTuple):
  """What is compiled.

  Attributes:
    fn: a function of arrays, or one that `jax.jit` made.
    inputs: `jax.ShapeDtypeStruct`s, placed on a mesh.
    plain: the function itself where `fn` is jitted.
  """

  fn: Callable
  inputs: tuple[Any, ...]
  plain: Callable | None = None


class Case(NamedTuple):
  """One thing to compile, for whatever target and by whatever form.

  Attributes:
    what: its name.
    inputs: their shape and dtype, for people.
    direction: 'forward', 'forward+backward' or 'training step'.
    build: (mesh, form or None) -> Call.
  """

  what: str
  inputs: str
  direction: str
  build: Callable[[jax.sharding.Mesh, str | None], Call]


class Shapes:
  """Makes structs: `rows` are split over the mesh, `whole` ones are not."""

  def __init__(self, mesh: jax.sharding.Mesh, batch: int):
    if batch % mesh.size:
      raise ValueError(
        f"batch: {batch} rows cannot be split evenly over {mesh.size} devices"
      )
    self.mesh = mesh
    self.batch = batch

  def rows(self, *shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """[B, *shape]."""
    where = parallel.batch_sharding(self.mesh)
    return jax.ShapeDtypeStruct((self.batch, *shape), dtype, sharding=where)

  def whole(self, *shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """[*shape]."""
    where = parallel.replicated(self.mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  def rows_like(self, tree, *lead):
    """Arrays or structs [...] as `rows` [B, *lead, ...]."""
    return jax.tree.map(
      lambda x: self.rows(*lead, *x.shape, dtype=x.dtype), tree
    )


# Ops: name -> (shape for people, function of (flags, Shapes) that gives the
# op over a batch and its inputs).


def _over_rows(op, *, shared=()):
  """Maps op over leading axes, but for the arguments at `shared`."""

  def call(form, *inputs, **options):
    reset = options.pop("reset", None)
    axes = [None if i in shared else 0 for i in range(len(inputs))]

    def one(reset, *inputs):
      flag = {} if reset is None else {"reset": reset}
      return op(*inputs, **flag, implementation=form, **options)

    return jax.vmap(one, (0, *axes))(reset, *inputs)

  return call


def _matrix(values, shapes):
  op, k = ops.batched(getattr(ops, values.op)), values.key
  lead, dtype = (values.length, values.heads), jnp.dtype(values.dtype)
  gates = {}
  if values.op == "delta_rule":
    gates["beta"] = shapes.rows(*lead)
  if values.op == "diag_plus_rank_one":
    gates |= {name: shapes.rows(*lead, k, dtype=dtype) for name in "ab"}
  if values.decay != "none":
    channels = (k,) if values.decay == "channel" else ()
    gates["log_decay"] = shapes.rows(*lead, *channels)

  def call(form, s, q, k, v, gates, **options):
    return op(s, q, k, v, **gates, implementation=form, **options)

  keys = [shapes.rows(*lead, k, dtype=dtype) for _ in range(2)]
  v = shapes.rows(*lead, values.value, dtype=dtype)
  state = shapes.rows(values.heads, k, values.value)
  return call, (state, *keys, v, gates)


def _attention(values, shapes):
  lead, dtype = (values.length, values.heads), jnp.dtype(values.dtype)
  slots = values.slots or values.length
  ring = jax.eval_shape(lambda: ring_empty(slots, values.key, values.value))

  def call(form, *inputs, **options):
    return ops.batched(ops.attention)(*inputs, implementation=form, **options)

  keys = [shapes.rows(*lead, values.key, dtype=dtype) for _ in range(2)]
  v = shapes.rows(*lead, values.value, dtype=dtype)
  return call, (shapes.rows_like(ring, values.heads), *keys, v)


def _gradient_step(values, shapes):
  lead, dtype = (values.length, values.heads), jnp.dtype(values.dtype)
  k, v, n = values.key, values.value, values.slots or 16
  state = jax.eval_shape(lambda: start(Model(jnp.zeros((k, v)), jnp.zeros(v))))
  learner = Learner(
    rates=shapes.whole(n),
    norm_scale=shapes.whole(v),
    norm_bias=shapes.whole(v),
  )

  def call(form, state, q, k, v, rate, learner, **options):
    state, out = ops.batched(ops.gradient_step)(
      state, q, k, v, rate=rate, learner=learner, implementation=form, **options
    )
    return state, out.o

  keys = [shapes.rows(*lead, k, dtype=dtype) for _ in range(2)]
  inputs = *keys, shapes.rows(*lead, v, dtype=dtype), shapes.rows(*lead)
  return call, (shapes.rows_like(state, values.heads), *inputs, learner)


def _recurrence(values, shapes):
  shape = values.length, values.key

  def op(h, x, decay, **options):
    return ops.linear_recurrence(h, x, decay=decay, **options)

  x = shapes.rows(*shape, dtype=jnp.dtype(values.dtype))
  return _over_rows(op), (shapes.rows(values.key), x, shapes.rows(*shape))


def _selective_scan(values, shapes):
  length, n, d = values.length, values.key, values.value
  dtype = jnp.dtype(values.dtype)
  x = shapes.rows(length, d, dtype=dtype)
  bc = [shapes.rows(length, n, dtype=dtype) for _ in range(2)]
  dt, a = shapes.rows(length, d), shapes.whole(d, n)
  call = _over_rows(ops.selective_scan, shared=(3,))
  return call, (shapes.rows(d, n), x, dt, a, *bc)


def _conv(values, shapes):
  taps, d, dtype = values.slots or 4, values.key, jnp.dtype(values.dtype)
  state = shapes.rows(taps - 1, d, dtype=dtype)
  x, kernel = shapes.rows(values.length, d, dtype=dtype), shapes.whole(taps, d)
  return _over_rows(conv, shared=(2,)), (state, x, kernel)


def _hopfield(values, shapes):
  def call(form, patterns, query, **options):
    options |= _form_option(ops.hopfield, form)
    return ops.hopfield(patterns, query, **options)

  dtype = jnp.dtype(values.dtype)
  query = shapes.rows(values.length, values.key, dtype=dtype)
  return call, (shapes.whole(values.slots or 1024, values.key), query)


def _product_key(values, shapes):
  n, dtype = values.slots or 64, jnp.dtype(values.dtype)

  def call(form, query, keys, contents, **options):
    options = {"k": 8, **options, **_form_option(ops.product_key, form)}
    return ops.product_key(query, keys, contents, **options)

  query = shapes.rows(values.length, values.key, dtype=dtype)
  keys = shapes.whole(2, n, values.key // 2)
  return call, (query, keys, shapes.whole(n * n, values.value))


def _form_option(op, form):
  if "implementation" in inspect.signature(op).parameters:
    return {"implementation": form}
  if form is not None:
    raise NotImplementedError(f"{op.__name__} has one form, got {form!r}")
  return {}


TIMELESS = ("hopfield", "product_key")
_HEADS = "B={v.batch} T={v.length} H={v.heads} K={v.key} V={v.value}"
OPS = {
  "attention": (_HEADS, _attention),
  "conv": ("B={v.batch} T={v.length} D={v.key}", _conv),
  "delta_rule": (_HEADS, _matrix),
  "diag_plus_rank_one": (_HEADS, _matrix),
  "gradient_step": (_HEADS, _gradient_step),
  "hopfield": ("B={v.batch} T={v.length} K={v.key}", _hopfield),
  "linear_attention": (_HEADS, _matrix),
  "linear_recurrence": ("B={v.batch} T={v.length} N={v.key}", _recurrence),
  "product_key": ("B={v.batch} T={v.length} K={v.key}", _product_key),
  "selective_scan": (
    "B={v.batch} T={v.length} D={v.value} N={v.key}", _selective_scan,
  ),
}  # fmt: skip


def op_case(values) -> Case:
  """The op that flags, or whatever has their names, ask for.

  Raises:
    ValueError: on flags that the op has no use for.
  """
  shape, make = OPS[values.op]
  options = train.parse_options(values.op_options)
  if values.reset and values.op in TIMELESS:
    raise ValueError(f"reset: {values.op} reads a memory that has no time")
  if values.decay != "none" and make is not _matrix:
    raise ValueError(
      "decay: a flag of linear_attention, delta_rule and diag_plus_rank_one, "
      f"not of {values.op}"
    )

  def build(mesh, form):
    shapes = Shapes(mesh, values.batch)
    op, inputs = make(values, shapes)

    def call(reset, *inputs):
      flag = {} if reset is None else {"reset": reset}
      return op(form, *inputs, **flag, **options)

    return _call(call, (_reset(values, shapes), *inputs), values, mesh)

  decay = "" if values.decay == "none" else f", {values.decay} decay"
  inputs = f"{shape.format(v=values)} {values.dtype}"
  return Case(values.op + decay, inputs, _direction(values), build)


def cell_case(cell, values) -> Case:
  """A cell over a batch of sequences, from fresh states."""

  def build(mesh, form):
    shapes = Shapes(mesh, values.batch)
    params = jax.tree.map(
      lambda x: shapes.whole(*x.shape, dtype=x.dtype),
      jax.eval_shape(cell.init, jax.random.key(0)),
    )
    xs = jax.tree.map(
      lambda x: shapes.rows(
        values.length, *x.shape,
        dtype=values.dtype if _is_inexact(x) else x.dtype,
      ),
      cell.x_spec,
    )  # fmt: skip

    def call(reset, params, xs):
      def one(reset, x):
        return memzoo.scan(
          cell, params, None, x, reset=reset, implementation=form
        )

      return jax.vmap(one)(reset, xs)

    return _call(call, (_reset(values, shapes), params, xs), values, mesh)

  inputs = f"B={values.batch} T={values.length} D={cell.d_model} {values.dtype}"
  return Case(cell.name, inputs, _direction(values), build)


def model_case(values) -> Case:
  """One step of training, as `experiments.train` takes it."""
  config = train.settings(values)
  task = tasks.make(values.task, **train.parse_options(values.task_options))
  # No array is made, however large the model is.
  model = nnx.eval_shape(lambda: train.build(values)[1])
  draw = lambda: task.batch(
    config.seed, 0, config.batch_size, config.train_split
  )
  try:
    batch = jax.eval_shape(draw)
  except TypeError:  # the task reads files, or uses NumPy
    batch = jax.eval_shape(lambda batch: batch, draw())

  def build(mesh, form):
    # A trainer for each, so that no cache holds another form's trace.
    trainer = training.Trainer(
      dataclasses.replace(config, implementation=form), model, task, mesh=mesh
    )
    rows = parallel.batch_sharding(mesh)
    inputs = (
      trainer.abstract(),
      jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch
      ),
    )
    return Call(trainer._one, inputs, trainer._step)

  what = f"{'+'.join(values.cell)}, depth {values.depth}, on {values.task}"
  inputs = f"B={values.batch_size} D={values.d_model} {values.compute_dtype}"
  return Case(what, inputs, "training step", build)


def _direction(values) -> str:
  return "forward+backward" if values.gradient else "forward"


def _reset(values, shapes):
  return shapes.rows(values.length, dtype=bool) if values.reset else None


def _is_inexact(x) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)


def _call(fn, inputs, values, mesh) -> Call:
  """`fn`, or its outputs and the gradient by every floating input, pulled back
  from cotangents that are arguments."""
  if not values.gradient:
    return Call(fn, inputs)

  def both(cotangents, *inputs):
    leaves, tree = jax.tree.flatten(inputs)
    moving = [i for i, x in enumerate(leaves) if _is_inexact(x)]

    def outputs(active):
      full = list(leaves)
      for i, x in zip(moving, active):
        full[i] = x
      outs = jax.tree.leaves(fn(*jax.tree.unflatten(tree, full)))
      return [y for y in outs if _is_inexact(y)]

    outs, pullback = jax.vjp(outputs, [leaves[i] for i in moving])
    return outs, pullback(cotangents)[0]

  rows = parallel.batch_sharding(mesh)
  outs = jax.tree.leaves(jax.eval_shape(fn, *inputs))
  cotangents = [
    jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=rows)
    for y in outs
    if _is_inexact(y)
  ]
  return Call(both, (cotangents, *inputs))


def cases(values) -> list[Case]:
  """What the flags ask for: an op, a model, or each of several cells.

  Raises:
    ValueError: where they ask for nothing, or for two things at once.
  """
  given = {name for name in values if values[name].present}
  if "op" in given:
    kind, own = "an op (--op)", OF_OPS
  elif "task" in given:
    # Flag files say more than a step needs.
    own = {*train.flag_names()}
    kind = "a model (--task)"
  elif "cell" in given:
    kind, own = "a cell (--cell)", OF_CELLS
  else:
    raise ValueError(
      "nothing to compile: give --op, --cell, or --task and the other flags of "
      "a model"
    )
  known = {*OF_OPS, *OF_CELLS, *train.flag_names()}
  other = sorted(given & known - {*own, *OF_ALL})
  if other:
    raise ValueError(
      f"--{', --'.join(other)}: of no meaning for {kind}, which this compiles"
    )
  if "op" in given:
    return [op_case(values)]
  if "task" in given:
    return [model_case(values)]
  return [cell_case(cell, values) for cell in train.make_cells(values)]


def compile_case(
  case: Case, target: targets.Target, form: str | None, mesh_axes: str = ""
) -> dict[str, Any]:
  """A row: what was compiled, and the fields of `targets.Report`.

  A call that cannot be traced, as one that the form refuses, is a row too.
  """
  mesh = target.mesh(mesh_axes)
  row = {
    "what": case.what, "inputs": case.inputs, "direction": case.direction,
    "target": target.name, "layout": target.layout, "devices": mesh.size,
    "implementation": form, "forms": [], "memory_bytes": target.memory_bytes,
    "jax": jax.__version__,
  }  # fmt: skip
  try:
    with target.lowering(mesh):
      call = case.build(mesh, form)
      chosen = memzoo.explain(call.plain or call.fn, *call.inputs)
    row["forms"] = [f"{d.name}: {d.form}" for d in chosen]
    report = target.compile(call.fn, *call.inputs)
  except (ValueError, TypeError, NotImplementedError) as error:
    if logging.vlog_is_on(1):
      raise
    report = targets.Report(False, 0.0, message=str(error))
  return {**row, **report._asdict(), "total_bytes": report.total_bytes}


def cells_of(row) -> tuple[str, ...]:
  """A row for the table, under `HEAD`."""
  form = row["implementation"] or ", ".join(
    sorted({f.rpartition(": ")[2] for f in row["forms"]})
  )
  size = lambda key: "" if row[key] is None else f"{row[key] / 1e6:,.1f}"
  fits = {True: "yes", False: "no", None: ""}[row["fits"]]
  message = " ".join(row["message"].split()).replace("|", "\\|")
  if len(message) > MESSAGE:
    message = message[:MESSAGE] + " …"
  return (
    row["what"], row["inputs"], row["direction"], row["target"],
    form + ("" if row["implementation"] else " *"),
    "yes" if row["ok"] else "no", f"{row['seconds']:.1f}",
    *(size(f"{x}_bytes") for x in ("argument", "output", "temp", "code")),
    fits, f"{row['memory_bytes'] / targets.GIB:.4g}", message,
  )  # fmt: skip


def run(values, show: Callable[[str], None] = print) -> list[dict[str, Any]]:
  """Compiles what the flags ask for; shows the table row by row.

  Raises:
    ValueError, TypeError: on flags that make no sense.
    ImportError: where a target's compiler is not installed.
  """
  if not values.target:
    raise ValueError(f"target: give --target, of {', '.join(targets.names())}")
  wanted = [targets.get(name) for name in values.target]
  work = cases(values)
  forms = (values.implementation or "").split(",")
  for target in wanted:
    target.mesh(values.mesh)  # what is missing is said before anything else
  head, rule = table(HEAD, [])
  show(head)
  show(rule)
  rows = []
  for case in work:
    for target in wanted:
      for form in forms:
        row = compile_case(case, target, form or None, values.mesh)
        rows.append(row)
        show(table(cells_of(row), [])[0])
  if values.json:
    text = json.dumps(rows, indent=1) + "\n"
    epath.Path(values.json).write_text(text)
  return rows


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  jax.config.update("jax_platforms", "cpu")  # no device is looked for
  with train.one_line_errors():
    rows = run(FLAGS, functools.partial(print, flush=True))
  sys.exit(0 if all(row["ok"] and row["fits"] for row in rows) else 1)


if __name__ == "__main__":
  define()
  app.run(main)
