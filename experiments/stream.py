"""Streams a long sequence through memories, segment by segment.

  python -m experiments.stream --cells=gated_delta,gla --steps=1000000 \\
    --workdir=runs/stream

The inputs are noise, drawn on the device for one segment at a time, and the
state is carried from segment to segment: memory does not grow with the length.
Over the first `--prefix` steps the same inputs go through in one call too, and
outputs and state must be the same. Prints a Markdown table, a row as soon as it
is known; with a workdir, `stream.json` is written there. Exits with 1 where a
memory did not end finite or departed from the whole call.
"""

import functools
import json
import sys
import time

from absl import app, flags
import jax
import jax.numpy as jnp

from experiments import train
import memzoo
from memzoo import training

FLAGS = flags.FLAGS
TOLERANCE = 1e-4  # relative norm, of outputs and of states
HEAD = (
  "memory", "steps", "finite", "largest state", "prefix error",
  "floats of state", "temporary MB", "steps a second",
)  # fmt: skip


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not on import, so that others can use `measure`."""
  to = dict(flag_values=values)
  flags.DEFINE_list("cells", [], "Memories, by name; all if empty.", **to)
  flags.DEFINE_string("cell_options", "", "'num_heads=2', or JSON.", **to)
  flags.DEFINE_integer("d_model", 32, "Width.", 1, **to)
  flags.DEFINE_integer("steps", 1_000_000, "Of the stream.", 1, **to)
  flags.DEFINE_integer("segment", 4096, "Steps of a call.", 1, **to)
  flags.DEFINE_integer("prefix", 8192, "Steps that are checked.", 1, **to)
  flags.DEFINE_string("implementation", None, "Form; the fastest.", **to)
  flags.DEFINE_string("workdir", None, "Where the numbers go.", **to)
  flags.DEFINE_integer("seed", 0, "Of parameters and inputs.", **to)


def _inputs(cell, key, index, length):
  """The inputs of a segment: floats are normal, integers zeros."""
  leaves, tree = jax.tree.flatten(cell.x_spec)
  keys = jax.random.split(jax.random.fold_in(key, index), len(leaves))
  draw = lambda key, spec: (
    jax.random.normal(key, (length, *spec.shape), spec.dtype)
    if jnp.issubdtype(spec.dtype, jnp.floating)
    else jnp.zeros((length, *spec.shape), spec.dtype)
  )
  return jax.tree.unflatten(tree, map(draw, keys, leaves))


def _error(a, b):
  """‖a − b‖ / ‖b‖ over the float leaves."""
  pairs = [
    (x.astype(jnp.complex64), y.astype(jnp.complex64))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  norm = lambda zs: sum(float(jnp.sum(jnp.abs(z) ** 2)) for z in zs) ** 0.5
  return norm([x - y for x, y in pairs]) / max(
    norm([y for _, y in pairs]), 1e-30
  )


def measure(cell, steps, segment, prefix, implementation=None, seed=0) -> dict:
  """Streams `steps` inputs through a memory.

  Args:
    cell: the memory.
    steps: of the stream, cut to whole segments.
    segment: steps of a call.
    prefix: steps that are compared with one call, cut to whole segments.
    implementation: form of the cell.
    seed: of parameters and inputs.

  Returns:
    'steps', 'finite' (of every output and the final state), 'largest' (of the
    final state's absolute values), 'error' (relative, of the prefix),
    'state_size', 'temporary_bytes' (of the compiled segment), 'seconds'.
  """
  key, key_params = jax.random.split(jax.random.key(seed))
  params = cell.init(key_params)
  run = functools.partial(memzoo.scan, cell, implementation=implementation)

  @jax.jit
  def advance(params, state, index):
    xs = _inputs(cell, key, index, segment)
    state, ys = run(params, state, xs)
    return state, ys, jnp.all(jnp.isfinite(ys))

  start = cell.initial_state(params)
  compiled = advance.lower(params, start, 0).compile()
  checked = max(min(prefix, steps) // segment, 1)
  state, outputs, finite = start, [], True
  for index in range(checked):
    state, ys, good = compiled(params, state, index)
    outputs.append(ys)
    finite &= bool(good)

  @jax.jit
  def whole(params, start):
    parts = [_inputs(cell, key, i, segment) for i in range(checked)]
    xs = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    return run(params, start, xs)

  error = _error((state, jnp.concatenate(outputs)), whole(params, start))
  count = max(steps // segment, checked)
  began = time.monotonic()
  flags_ = []
  for index in range(checked, count):
    state, _, good = compiled(params, state, index)
    flags_.append(good)
  finite &= all(map(bool, flags_))
  seconds = time.monotonic() - began
  leaves = [
    x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  largest = max(
    (float(jnp.max(jnp.abs(x))) for x in leaves if x.size), default=0
  )
  memory = compiled.memory_analysis()
  return dict(
    steps=count * segment,
    finite=finite and largest < float("inf"),
    largest=largest,
    error=error,
    state_size=memzoo.state_size(cell),
    temporary_bytes=memory.temp_size_in_bytes if memory else None,
    seconds=seconds,
    steps_per_second=(count - checked) * segment / max(seconds, 1e-9),
  )


def row(name, result) -> tuple:
  """The cells of a line of the table."""
  temporary = result["temporary_bytes"]
  return (
    name, f"{result['steps']:,}", "yes" if result["finite"] else "NO",
    f"{result['largest']:.3g}", f"{result['error']:.1e}",
    f"{result['state_size']:,}",
    "" if temporary is None else f"{temporary / 1e6:.1f}",
    f"{result['steps_per_second']:,.0f}",
  )  # fmt: skip


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  results, line = (
    {},
    lambda cells: print(f"| {' | '.join(cells)} |", flush=True),
  )
  with train.one_line_errors():
    names = FLAGS.cells or memzoo.names()
    given = train.parse_options(FLAGS.cell_options)
    cells = {n: memzoo.make(n, d_model=FLAGS.d_model, **given) for n in names}
    workdir = training.open_workdir(FLAGS.workdir) if FLAGS.workdir else None
    line(HEAD)
    line(["---"] * len(HEAD))
    for name, cell in cells.items():
      results[name] = measure(
        cell, FLAGS.steps, FLAGS.segment, FLAGS.prefix, FLAGS.implementation,
        FLAGS.seed,
      )  # fmt: skip
      line(row(name, results[name]))
      if workdir:
        text = json.dumps(results, indent=1) + "\n"
        (workdir / "stream.json").write_text(text)
  bad = [
    name for name, r in results.items()
    if not r["finite"] or not r["error"] <= TOLERANCE
  ]  # fmt: skip
  if bad:
    sys.exit(f"not finite, or not what one call gives: {', '.join(bad)}")


if __name__ == "__main__":
  define()
  app.run(main)
