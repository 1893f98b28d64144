"""Measures what a memory holds, how long, and what it does to its state.

An untrained memory, on normal inputs:

  python -m experiments.diagnose --cell=lru --d_model=16 --workdir=runs/lru

a memory of a trained model, on what reaches it from the task's test split:

  python -m experiments.diagnose --checkpoint=runs/a --layer=1 \\
    --workdir=runs/a/diagnose

The checkpoint is the workdir of a run of `experiments.train`; cell, options
and task come from its `run.flags`. The workdir gets `diagnose.json` with all
numbers and one PNG for each diagnostic.
"""

import json
import math

from absl import app, flags, logging
import jax
import numpy as np

from experiments import train
import memzoo
from memzoo import diagnostics, training
from memzoo.core import cell as cell_lib
from memzoo.diagnostics import figures

FLAGS = flags.FLAGS


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not on import, so that others can use `run`."""
  integer, text = (
    lambda name, default, about, define=define: define(
      name, default, about, flag_values=values
    )
    for define in (flags.DEFINE_integer, flags.DEFINE_string)
  )
  text("cell", None, "A memory, untrained.")
  text("cell_options", "", "'num_heads=2,conv_size=4', or JSON.")
  integer("d_model", 16, "Width, of an untrained memory.")
  text("checkpoint", None, "Workdir of a run, in place of --cell.")
  integer("layer", 0, "Whose memory, of the checkpoint's model.")
  text("which", "best", "'best' or 'latest' checkpoint.")
  integer("length", 64, "Inputs of a sequence, and the longest lag and n.")
  integer("batch", 4, "Sequences, and draws that are averaged.")
  integer("vocab_size", 16, "Tokens of the read-outs.")
  integer("train", 1024, "Sequences that a read-out is fitted on.")
  integer("test", 512, "Sequences that it is measured on.")
  integer("items", 12, "Items of the interference matrix.")
  integer("exponents", 8, "Lyapunov exponents.")
  integer("seed", 0, "Of parameters and inputs.")
  text("workdir", None, "Where numbers and figures go.")


def subject(values):
  """What is measured: (cell, params, xs [B, T, D], vocabulary or None).

  Raises:
    ValueError: unless one of --cell and --checkpoint is given, and where the
      checkpoint has no such layer.
  """
  if (values.cell is None) == (values.checkpoint is None):
    raise ValueError("give one of --cell and --checkpoint")
  if values.checkpoint is not None:
    return trained(values)
  options = train.parse_options(values.cell_options)
  cell = memzoo.make(values.cell, d_model=values.d_model, **options)
  key, key_xs = jax.random.split(jax.random.key(values.seed))
  length = min(values.length, cell.max_length or values.length)
  xs = diagnostics.draw(cell, key_xs, values.batch, length)
  return cell, jax.jit(cell.init)(key), xs, None


def trained(values):
  """`subject` from a run: the inputs are those that reach the memory, and the
  vocabulary is of distinct ones among them."""
  _, task, model = train.restore(values.checkpoint, values.which)
  rows = max(values.batch, 64)
  batch = task.batch(values.seed, 0, rows, "test")
  cell, params, xs = memory_inputs(model, batch.inputs, values.layer)
  words = np.unique(np.asarray(xs).reshape(-1, cell.d_model), axis=0)
  rng = np.random.default_rng(values.seed)
  count = min(values.vocab_size, len(words))
  words = words[np.sort(rng.permutation(len(words))[:count])]
  return cell, params, xs[: values.batch, : values.length], words


def memory_inputs(model, inputs, layer: int):
  """What reaches the memory of a layer: (cell, params, float32 [B, T, D]).

  A row counts as one sequence: its task's resets and padding are not read.

  Raises:
    ValueError: where the model has no such layer.
  """
  encoder, stack = model.encoder, model.encoder.stack
  if not 0 <= layer < stack.depth:
    raise ValueError(f"layer: the model has 0 to {stack.depth - 1}: {layer}")
  _, x, _ = encoder._enter(None, inputs, None, None)
  for i in range(layer + 1):
    repeat, place = divmod(i, len(stack.cells))
    block = jax.tree.map(lambda x, r=repeat: x[r], stack.blocks[place])
    state = block.initial_state(len(x))
    if i == layer:
      u = block._memory_input(state, x, None, None)[1].astype("float32")
      return stack.cells[place], block.memory.values, u
    x = block(state, x)[1]


def measure(cell, params, xs, words, values):
  """{name: (figure function, result)}; those that the cell has no use for are
  left out."""
  key_tokens, key_items = jax.random.split(jax.random.key(values.seed + 1))
  length = jax.tree.leaves(xs)[0].shape[1]
  lengths = [2**n for n in range(20) if 2**n <= length]
  found = {}
  if cell.differentiable:
    found["horizon_by_gradient"] = (
      figures.horizon,
      diagnostics.horizon_by_gradient(cell, params, xs),
    )
  found["horizon_by_perturbation"] = (
    figures.horizon,
    diagnostics.horizon_by_perturbation(cell, params, xs),
  )
  if not jax.tree.leaves(cell.initial_state(params)):
    return found
  if words is None:
    items = diagnostics.draw(cell, key_items, min(values.items, length))
  else:
    items = words[: min(values.items, length)]
  readout = dict(
    vocabulary=words, vocab_size=values.vocab_size, train=values.train,
    test=values.test,
  )  # fmt: skip
  before = min(8, length // 4)
  lags = [0, *(n for n in lengths if n + before + 1 <= length)]
  found["tokens_held"] = (
    figures.tokens_held,
    diagnostics.tokens_held(
      cell, params, key_tokens, lengths=lengths, **readout
    ),
  )
  found["forgetting"] = (
    figures.forgetting,
    diagnostics.forgetting(
      cell, params, key_tokens, lags=lags, before=before, **readout
    ),
  )
  found["interference"] = (
    figures.interference,
    diagnostics.interference(cell, params, items),
  )
  found["state_statistics"] = (
    figures.state_statistics,
    diagnostics.state_statistics(cell, params, xs),
  )
  found["write_map"] = (
    figures.write_map,
    diagnostics.write_map(cell, params, xs),
  )
  if cell.differentiable:
    found["lyapunov"] = (
      figures.lyapunov,
      diagnostics.lyapunov(
        cell, params, xs, count=values.exponents, burn_in=length // 4
      ),
    )
  return found


def plain(value):
  """A result as plain data. What each input changed is left to the figure."""
  if isinstance(value, diagnostics.WriteMap):
    value = {"norm": value.norm, "changed": value.changed}
  if hasattr(value, "_asdict"):
    value = value._asdict()
  if isinstance(value, dict):
    return {name: plain(x) for name, x in value.items()}
  if isinstance(value, list):
    return [plain(x) for x in value]
  if hasattr(value, "tolist"):
    return plain(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def run(values: flags.FlagValues) -> dict:
  """Measures, writes, and returns the numbers."""
  if not values.workdir:
    raise ValueError("--workdir is needed: numbers and figures go there")
  cell, params, xs, words = subject(values)
  workdir = training.open_workdir(values.workdir)
  results = measure(cell, params, xs, words, values)
  state = bool(jax.tree.leaves(cell.initial_state(params)))
  numbers = {
    "cell": memzoo.to_config(cell),
    "checkpoint": values.checkpoint,
    "layer": values.layer if values.checkpoint else None,
    "state_size": cell_lib.state_size(cell),
    "note": None if state else "no state: its horizon alone is measured",
  }
  for name, (draw, result) in results.items():
    numbers[name] = plain(result)
    with (workdir / f"{name}.png").open("wb") as f:
      draw(result).savefig(f, dpi=120, format="png")
  text = json.dumps(numbers, indent=1, allow_nan=False) + "\n"
  (workdir / "diagnose.json").write_text(text)
  return numbers


def summary(numbers) -> list[str]:
  """The scalars, one line each."""
  lines = [f"state {numbers['state_size']:,} floats"]
  if numbers["note"]:
    lines.append(numbers["note"])
  show = lambda name, text: (
    name in numbers and lines.append(text.format(**numbers[name]))
  )
  show("horizon_by_gradient", "horizon by gradient      {horizon} inputs")
  show("horizon_by_perturbation", "horizon by perturbation  {horizon} inputs")
  if "tokens_held" in numbers:
    held = numbers["tokens_held"]
    best = int(np.argmax(held["tokens"]))
    lines.append(
      f"tokens held  {held['tokens'][best]:.1f} of {held['length'][best]}, "
      f"{max(held['bits_per_float']):.3g} bits a float"
    )
  show("forgetting", "forgetting   to 1/e after {horizon} items")
  show("interference", "interference {retroactive:.2g} on earlier items")
  if "lyapunov" in numbers:
    lines.append(f"exponent     {numbers['lyapunov']['exponents'][0]:.3g}")
  return lines


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  with train.one_line_errors():
    if FLAGS.verbosity == logging.WARNING:  # Orbax warns that it only reads
      logging.set_verbosity(logging.ERROR)
    print("\n".join([*summary(run(FLAGS)), f"written to {FLAGS.workdir}"]))


if __name__ == "__main__":
  define()
  app.run(main)
