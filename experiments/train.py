"""Trains a memory on a task.

  python -m experiments.train --cell=gated_delta --task=mqar_small \\
    --d_model=64 --depth=2 --steps=1000 --learning_rate=3e-3 --workdir=runs/a

The same command goes on where a run stopped, however it stopped. The workdir
gets `metrics.jsonl`, TensorBoard events, checkpoints, and `run.flags`, from
which the run can be repeated: `--flagfile=runs/a/run.flags --workdir=runs/b`.
"""

import ast
import contextlib
import datetime
import importlib.util
import json
import signal
import sys

from absl import app, flags, logging
from etils import epath
from flax import nnx
import jax

import memzoo
from memzoo import models, parallel, tasks, training
from memzoo.models.lightnet import GridClassifier

MACHINE = ("distributed", "coordinator", "processes", "process", "platform")


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not on import, so that others can use `build`."""
  integer, number, text, choice = (
    lambda name, default, about, define=define: define(
      name, default, about, flag_values=values
    )
    for define in (
      flags.DEFINE_integer,
      flags.DEFINE_float,
      flags.DEFINE_string,
      lambda name, default, about, **to: flags.DEFINE_enum(
        name, default[0], [x for x in default if x], about, **to
      ),
    )
  )
  switch = lambda name, about: flags.DEFINE_bool(
    name, False, about, flag_values=values
  )
  # The model.
  flags.DEFINE_list(
    "cell", "gru", "A memory, or several for a hybrid.", flag_values=values
  )
  text("cell_options", "", "'num_heads=2,gru.reset_after=true', or JSON.")
  integer("d_model", 64, "Width.")
  integer("depth", 2, "Number of blocks.")
  number("dropout", 0.0, "Rate on what each branch adds.")
  choice("pool", ("mean", "last"), "Read-out of classifiers.")
  choice("compute_dtype", ("float32", "bfloat16"), "Of activations.")
  text("model_options", "", "'conv_size=4,mlp_width=0,positions=64', or JSON.")
  text("implementation", None, "Form of the cells; the fastest if unset.")
  # The task.
  text("task", "mqar_small", "A preset of memzoo.tasks.")
  text("task_options", "", "'length=128', or JSON.")
  text("eval_split", "validation", "Where the run is judged.")
  flags.DEFINE_list(
    "final", "", "Splits to evaluate after the last step.", flag_values=values
  )
  text(
    "final_options", "",
    "Task options to evaluate under, too, on the last split of --final, else "
    "on --eval_split: 'length=128|length=256'.",
  )  # fmt: skip
  # The optimiser.
  integer("steps", 1000, "Optimiser steps.")
  integer("batch_size", 64, "Rows of a step, over all devices.")
  number("learning_rate", 1e-3, "Peak of the schedule.")
  integer("warmup", 100, "Steps before the cosine.")
  number("weight_decay", 0.1, "On matrices.")
  number("clip", 1.0, "Largest norm of the gradient; 0 does not clip.")
  integer("accumulate", 1, "Micro-batches of a step.")
  text("report_weights", "", "Reports in the loss: 'balance=0.01'.")
  integer("seed", 0, "Of parameters, batches and dropout.")
  # What is written, and when.
  text("workdir", None, "Folder or bucket; nothing is kept if unset.")
  text("best", "loss", "Metric of the best checkpoint.")
  integer("log_every", 100, "Steps that a line averages.")
  integer("eval_every", 500, "Steps; 0 evaluates at the end alone.")
  integer("checkpoint_every", 500, "Steps; 0 saves at the end alone.")
  switch("profile", "Write a trace of a few steps.")
  # The machine.
  choice("platform", (None, "cpu", "gpu", "tpu"), "Insist on it.")
  text("mesh", "", "'data:4,fsdp:2'; all devices on data if unset.")
  switch("distributed", "This is one of several processes.")
  text("coordinator", None, "host:port of process 0, where JAX cannot tell.")
  integer("processes", None, "How many, where JAX cannot tell.")
  integer("process", None, "Which one, where JAX cannot tell.")


def flag_names() -> list[str]:
  """The names of the flags."""
  values = flags.FlagValues()
  define(values)
  return sorted(values)


def parse_options(text: str) -> dict:
  """'a=1,b=true,c=word', or a JSON object, as a dict.

  Raises:
    ValueError: on anything else.
  """
  text = text.strip()
  if text.startswith("{"):
    try:
      return json.loads(text)
    except json.JSONDecodeError as error:
      raise ValueError(f"options {text!r} are no JSON: {error}") from error
  options = {}
  for part in filter(None, (p.strip() for p in text.split(","))):
    name, equals, value = (p.strip() for p in part.partition("="))
    if not name or not equals:
      raise ValueError(f"options {text!r}: {part!r} is not name=value")
    options[name] = _value(value)
  return options


def _value(text: str):
  """What JSON or Python would read, else the text itself."""
  for read in (json.loads, ast.literal_eval):
    try:
      return read(text)
    except (ValueError, SyntaxError):
      continue
  return text


def make_cells(config) -> list[memzoo.Cell]:
  """The memories of the attributes `cell`, `cell_options` and `d_model`.

  Raises:
    ValueError, TypeError: on unknown names and impossible options.
  """
  given = parse_options(config.cell_options)
  for name in given:
    owner = name.rpartition(".")[0]
    if owner and owner not in config.cell:
      raise ValueError(f"cell_options: {name!r}, and no cell is {owner!r}")
  cells = []
  for cell in config.cell:
    shared = {k: v for k, v in given.items() if "." not in k}
    own = {k.rpartition(".")[2]: v for k, v in given.items() if "." in k
           and k.rpartition(".")[0] == cell}  # fmt: skip
    cells.append(memzoo.make(cell, d_model=config.d_model, **shared, **own))
  return cells


def build(config):
  """The task and the model that flags, or whatever has their names, ask for.

  Args:
    config: has the attributes `cell` (a list of names), `cell_options`,
      `d_model`, `depth`, `dropout`, `pool`, `compute_dtype`, `model_options`,
      `task`, `task_options` and `seed`.

  Raises:
    ValueError, TypeError: on unknown names and impossible options.
  """
  task = tasks.make(config.task, **parse_options(config.task_options))
  cells = make_cells(config)
  options = dict(
    dropout=config.dropout,
    dtype=config.compute_dtype,
    rngs=nnx.Rngs(config.seed),
    **parse_options(config.model_options),
  )
  if task.kind == "tokens":
    size = max(task.vocab_size, task.num_outputs)
    return task, models.LanguageModel(cells, config.depth, size, **options)
  if task.vocab_size is not None:
    options["vocab_size"] = task.vocab_size
  else:
    options["d_input"] = task.d_input
  pool = config.pool
  make = models.SequenceRegressor
  if task.kind == "classification":
    make = models.SequenceClassifier
    if "grid" in options:  # '8x8': the steps are the places of an image
      options["grid"] = [int(n) for n in str(options["grid"]).split("x")]
      make = GridClassifier
  elif task.kind in ("labels", "bits"):
    pool = None
  elif task.batch(config.seed, 0, 1).targets.ndim == 3:
    pool = None
  return task, make(cells, config.depth, task.num_outputs, pool=pool, **options)


def restore(workdir, which: str = "latest", **options):
  """What a run of this program left in its workdir: (flags, task, model).

  Args:
    workdir: of the run.
    which: 'best' or 'latest' checkpoint.
    **options: task options that replace the run's.

  Raises:
    ValueError: where the workdir is not one of this program.
    CheckpointError: where it has no such checkpoint.
  """
  path = epath.Path(workdir) / "run.flags"
  if not path.exists():
    raise ValueError(
      f"checkpoint: {str(workdir)!r} has no run.flags; give the workdir of a "
      "run of experiments.train"
    )
  values = flags.FlagValues()
  define(values)
  values(["experiments.train", *path.read_text().splitlines()])
  task, model = build(values)
  training.load(workdir, model, which)
  if options:
    options = {**parse_options(values.task_options), **options}
    task = tasks.make(values.task, **options)
  return values, task, model


def finals(config, task) -> dict:
  """{name: (task, split)} to evaluate after the last step.

  Raises:
    ValueError: on task options that make a task of another kind.
  """
  found = {split: (task, split) for split in config.final}
  judged = config.final[-1] if config.final else config.eval_split
  for text in filter(None, config.final_options.split("|")):
    options = {**parse_options(config.task_options), **parse_options(text)}
    other = tasks.make(config.task, **options)
    for name in ("kind", "vocab_size", "d_input", "num_outputs"):
      if getattr(other, name) != getattr(task, name):
        raise ValueError(
          f"final_options: {text!r} changes the {name} of {config.task!r} from "
          f"{getattr(task, name)!r} to {getattr(other, name)!r}"
        )
    found[text] = other, judged
  return found


def state_size(model) -> int:
  """Floats that a model carries from token to token, for one sequence."""
  state = jax.eval_shape(lambda: model.initial_state(1))
  count = lambda x: x.size * (2 if "complex" in x.dtype.name else 1)
  return sum(
    count(x)
    for x in jax.tree.leaves(state)
    if jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)
  )


def settings(config) -> training.Config:
  """The run that flags, or whatever has their names, ask for."""
  return training.Config(
    steps=config.steps,
    batch_size=config.batch_size,
    learning_rate=config.learning_rate,
    warmup=config.warmup,
    weight_decay=config.weight_decay,
    clip=config.clip,
    accumulate=config.accumulate,
    seed=config.seed,
    report_weights=parse_options(config.report_weights),
    implementation=config.implementation,
    best=config.best,
    eval_split=config.eval_split,
    eval_every=config.eval_every,
    checkpoint_every=config.checkpoint_every,
    log_every=config.log_every,
  )


def about(config, model) -> dict:
  """What a checkpoint has to agree with, beside `settings`."""
  return {
    "task": config.task,
    "task_options": parse_options(config.task_options),
    "model": models.to_config(model),
  }


class Progress:
  """A line for people: metrics, rate, and the time left."""

  def __init__(self, steps: int):
    self.steps = steps

  def start(self, step: int) -> None:
    if step:
      print(f"resumed at step {step}", flush=True)

  def write(self, step: int, split: str, metrics) -> None:
    hidden = {"seconds", "steps_per_second", "learning_rate", "grad_norm"}
    hidden |= set() if metrics.get("skipped") else {"skipped"}
    line = [f"{k} {v:.4g}" for k, v in metrics.items() if k not in hidden]
    rate = metrics.get("steps_per_second")
    if rate:
      left = datetime.timedelta(seconds=round((self.steps - step) / rate))
      line.append(f"{rate:.3g} steps/s, {left} left")
    done = f"{step:>{len(str(self.steps))}}/{self.steps}"
    print(f"{done} {split:<5}", *line, sep="  ", flush=True)

  def close(self) -> None:
    pass


class RunFlags:
  """`run.flags`: the flags of a run, less those of the machine."""

  def __init__(self, values: flags.FlagValues):
    given = [values[name] for name in flag_names() if name not in MACHINE]
    self.path = epath.Path(values.workdir) / "run.flags"
    self.text = "".join(
      flag.serialize() + "\n" for flag in given if flag.value is not None
    )

  def start(self, step: int) -> None:
    del step
    self.path.write_text(self.text)

  def write(self, step: int, split: str, metrics) -> None:
    pass

  def close(self) -> None:
    pass


def devices(platform: str | None) -> list[jax.Device]:
  """All devices, once it is sure that they are of `platform`."""
  try:
    found = jax.devices()
  except RuntimeError as error:
    raise ValueError(f"no device to run on: {error}") from error
  if platform not in (None, jax.default_backend()):
    raise ValueError(
      f"platform: no {platform} is here; JAX found {len(found)} of the kind "
      f"{jax.default_backend()}"
    )
  return found


def run(values: flags.FlagValues, stop=lambda: False) -> dict:
  """Trains as the flags say, until `stop` answers True: `training.fit`."""
  if values.platform == "cpu":
    jax.config.update("jax_platforms", "cpu")
  if values.distributed:
    parallel.initialize(values.coordinator, values.processes, values.process)
  mesh = parallel.make_mesh(values.mesh, devices(values.platform))
  config = settings(values)
  task, model = build(values)

  writers = [Progress(config.steps)]
  if values.workdir is not None:
    writers.append(RunFlags(values))
    if importlib.util.find_spec("tensorboardX"):
      events = epath.Path(values.workdir) / "tensorboard"
      writers.append(training.TensorBoardWriter(events))
    else:
      print("no TensorBoard events: pip install 'memzoo[tensorboard]'")

  result = training.fit(
    config,
    model,
    task,
    workdir=values.workdir,
    about=about(values, model),
    mesh=mesh,
    writers=writers,
    final=finals(values, task),
    stop=stop,
    profile=values.profile,
  )
  about_task = dict(chance=task.chance, length=task.length)
  return {**result, **about_task, "state_size": state_size(model)}


def stop_on_sigterm():
  """A function that tells whether SIGTERM has come, from now on."""
  terminated = []
  signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
  return lambda: bool(terminated)


@contextlib.contextmanager
def one_line_errors():
  """Ends the program with one line where the user's input is at fault."""
  if FLAGS.verbosity == 0:  # the default, of which Orbax makes much use
    logging.set_verbosity(logging.WARNING)
  try:
    yield
  except (
    ValueError, TypeError, OSError, ImportError, RuntimeError, flags.Error,
  ) as error:  # fmt: skip
    if logging.vlog_is_on(1):
      raise
    # Less the note on tracebacks that JAX appends.
    message = str(error).split("\n" + "-" * 20)[0]
    sys.exit(f"error: {message} (--v=1 shows where)")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  with one_line_errors():
    result = run(FLAGS, stop_on_sigterm())
  if jax.process_index() == 0:
    print(json.dumps(result))


FLAGS = flags.FLAGS

if __name__ == "__main__":
  define()
  app.run(main)
