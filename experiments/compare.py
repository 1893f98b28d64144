"""Trains several memories on several tasks and shows them side by side.

A grid, every memory at the best rate of a small sweep:

  python -m experiments.compare --cells=gru,lru,gated_delta \\
    --tasks=mqar_small,mnist1d --learning_rates=1e-3,3e-3,1e-2 --seeds=0,1,2 \\
    --steps=1000 --workdir=runs/compare

or flag files of `experiments.train`, each as it stands:

  python -m experiments.compare --runs='experiments/mnist1d/*.flags' \\
    --workdir=runs/mnist1d

Every run is a run of `experiments.train` with the flags of this command, of
its flag file, and its own. Rates are chosen on the validation split: a task
with the option `holdout` keeps `--holdout` of its training data out of the
sweep, and the runs that are reported train on all of it. What is reported is
the test split, at the last step.

The same command goes on where it stopped: finished runs are in
`results.jsonl`, an unfinished one resumes from its checkpoint. The workdir
gets `table.md`, `table.json` and `compare.png`.
"""

import glob
import hashlib
import json
import math

from absl import app, flags
from etils import epath
import jax
import numpy as np

from experiments import train
from memzoo import tasks, training
from memzoo.core import dispatch

FLAGS = flags.FLAGS

flags.DEFINE_list("cells", [], "Memories to compare, by name.")
flags.DEFINE_list("tasks", [], "Tasks to compare them on, by preset.")
flags.DEFINE_list("learning_rates", [], "Rates of the sweep.")
flags.DEFINE_list("seeds", ["0"], "Seeds of the runs that are reported.")
flags.DEFINE_list("runs", [], "Flag files of experiments.train; globs may.")
flags.DEFINE_integer("holdout", 800, "Training examples kept out of a sweep.")
flags.DEFINE_integer("limit_steps", None, "Cut every run: for a quick look.")

# Flags of a run that its numbers do not depend on.
QUIET = (
  "workdir", "log_every", "checkpoint_every", "profile", "flagfile",
  "undefok", *train.MACHINE,
)  # fmt: skip


def run_flags(*sources, **own):
  """The flags of one run: defaults, then each list of arguments, then `own`.

  Raises:
    flags.Error: on a flag that experiments.train does not have.
  """
  values = flags.FlagValues()
  train.define(values)
  arguments = [a for source in sources for a in source]
  arguments += [f"--{name}={value}" for name, value in own.items()]
  values(["experiments.train", *arguments])
  if FLAGS.limit_steps:
    values.steps = min(values.steps, FLAGS.limit_steps)
    values.warmup = min(values.warmup, values.steps)
  return values


def cell_flags(*sources, cell, **own):
  """`run_flags`, less the cell options of the other memories of the grid."""
  values = run_flags(*sources, cell=cell, **own)
  given = train.parse_options(values.cell_options)
  mine = {n: v for n, v in given.items() if n.rpartition(".")[0] in ("", cell)}
  values.cell_options = json.dumps(mine, sort_keys=True) if mine else ""
  return values


def identity(values) -> dict:
  """What a run's numbers depend on: {flag: value}."""
  return {n: values[n].value for n in sorted(values) if n not in QUIET}


def key(values) -> str:
  text = json.dumps(identity(values), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
  """Finished runs, one JSON line each; a cut line is dropped."""

  def __init__(self, path):
    self.path, self.rows = path, {}
    text = path.read_text() if path.exists() else ""
    good = []
    for line in text.splitlines():
      try:
        row = json.loads(line)
        self.rows[row["key"]] = row
        good.append(line)
      except (json.JSONDecodeError, KeyError):
        continue
    if text:
      path.write_text("".join(line + "\n" for line in good))

  def add(self, row):
    self.rows[row["key"]] = row
    text = self.path.read_text() if self.path.exists() else ""
    self.path.write_text(text + json.dumps(row) + "\n")


def state_size(model) -> int:
  """Floats that the model carries from token to token, for one sequence."""
  state = jax.eval_shape(lambda: model.initial_state(1))
  count = lambda x: x.size * (2 if "complex" in x.dtype.name else 1)
  return sum(
    count(x)
    for x in jax.tree.leaves(state)
    if jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)
  )


def execute(store, values, split: str, workdir, stop) -> dict:
  """Runs `values`, or takes the stored result, and returns its row."""
  values.eval_split = split
  name = key(values)
  if name in store.rows:
    return store.rows[name]
  task, model = train.build(values)
  label = f"{values.task} {','.join(values.cell)} lr {values.learning_rate:g}"
  print(f"== {label} seed {values.seed} ({split})", flush=True)
  folder = workdir / "runs" / name
  values.workdir = str(folder)
  result = train.run(values, stop)
  if result["stopped"]:
    raise SystemExit(0)
  row = dict(
    key=name, task=values.task, cell=",".join(values.cell), split=split,
    learning_rate=values.learning_rate, seed=values.seed, steps=values.steps,
    metrics=result["eval"], best=result["best"], train=result["train"],
    state_size=state_size(model), parameters=result["parameters"],
    tokens_per_second=result["tokens_per_second"], seconds=result["seconds"],
    chance=task.chance,
    curve=curve(folder, split), flags=identity(values),
  )  # fmt: skip
  store.add(row)
  return row


def curve(folder, split) -> list:
  """[[step, accuracy or loss]] of the evaluations of a run."""
  path = folder / "metrics.jsonl"
  points = []
  for line in path.read_text().splitlines():
    row = json.loads(line)
    if row.get("split") == "eval":
      points.append([row["step"], row.get("accuracy", row.get("loss"))])
  return points


def plan(store, workdir, stop) -> list[dict]:
  """All runs that are reported, after the sweeps that choose their rates."""
  names = set(train.flag_names()) - {"workdir"}
  own = [FLAGS[n].serialize() for n in sorted(names) if FLAGS[n].present]
  rows = []
  for path in files(FLAGS.runs):
    for seed in FLAGS.seeds:
      arguments = [f"--flagfile={path}"]
      values = run_flags(arguments, own, seed=seed)
      rows.append(execute(store, values, "test", workdir, stop))
  for task in FLAGS.tasks:
    for cell in FLAGS.cells:
      base = dict(task=task, cell=cell)
      rate = best_rate(store, own, base, workdir, stop)
      for seed in FLAGS.seeds:
        values = cell_flags(own, **base, seed=seed, **rate)
        rows.append(execute(store, values, "test", workdir, stop))
  return rows


def best_rate(store, own, base, workdir, stop) -> dict:
  """{'learning_rate': …} with the best validation metric of the sweep."""
  if not FLAGS.learning_rates:
    return {}
  if len(FLAGS.learning_rates) == 1:
    return {"learning_rate": FLAGS.learning_rates[0]}
  scores = {}
  for rate in FLAGS.learning_rates:
    values = cell_flags(own, **base, learning_rate=rate, seed=FLAGS.seeds[0])
    options = train.parse_options(values.task_options)
    task = tasks.make(values.task, **options)
    if hasattr(task, "holdout"):
      options["holdout"] = FLAGS.holdout
      values.task_options = json.dumps(options, sort_keys=True)
    row = execute(store, values, "validation", workdir, stop)
    scores[rate] = score(row)
  return {"learning_rate": max(scores, key=scores.get)}


def score(row) -> float:
  """Higher is better; a run that ended without a finite number is last."""
  metrics = row["metrics"]
  value = metrics.get("accuracy", -metrics["loss"])
  return value if math.isfinite(value) else -math.inf


def files(patterns) -> list[str]:
  found = []
  for pattern in patterns:
    paths = sorted(glob.glob(pattern))
    if not paths:
      raise app.UsageError(f"--runs: no flag file matches {pattern!r}")
    found += paths
  return found


def summarise(rows) -> list[dict]:
  """One row per (task, cell): means over its seeds."""
  groups = {}
  for row in rows:
    groups.setdefault((row["task"], row["cell"]), []).append(row)
  table = []
  for (task, cell), group in groups.items():
    scores = [100 * r["metrics"].get("accuracy", math.nan) for r in group]
    table.append(
      dict(
        task=task,
        cell=cell,
        seeds=len(group),
        accuracy=float(np.mean(scores)),
        spread=float(np.std(scores)),
        loss=float(np.mean([r["metrics"]["loss"] for r in group])),
        state_size=group[0]["state_size"],
        parameters=group[0]["parameters"],
        tokens_per_second=float(
          np.median([r["tokens_per_second"] for r in group])
        ),
        seconds=float(np.mean([r["seconds"] for r in group])),
        steps=group[0]["steps"],
        learning_rate=group[0]["learning_rate"],
        chance=100 * group[0]["chance"],
        curves=[r["curve"] for r in group],
      )  # fmt: skip
    )
  order = {
    task: n for n, task in enumerate(dict.fromkeys(r["task"] for r in rows))
  }
  return sorted(table, key=lambda r: (order[r["task"]], -r["accuracy"]))


def markdown(table) -> str:
  lines = [
    "| task | memory | test accuracy, % | state, floats | parameters | "
    "tokens/s | seconds | steps | rate | seeds |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for r in table:
    spread = f" ± {r['spread']:.1f}" if r["seeds"] > 1 else ""
    lines.append(
      f"| {r['task']} | {r['cell']} | {r['accuracy']:.1f}{spread} "
      f"| {r['state_size']:,} | {r['parameters']:,} "
      f"| {r['tokens_per_second']:,.0f} | {r['seconds']:.0f} | {r['steps']:,} "
      f"| {r['learning_rate']:g} | {r['seeds']} |"
    )
  return "\n".join(lines) + "\n"


def draw(table, path) -> None:
  """Learning curves above, accuracy against state size below, by task."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  names = list(dict.fromkeys(r["task"] for r in table))
  cells = sorted({r["cell"] for r in table})
  colour = {c: plt.get_cmap("tab20")(n % 20) for n, c in enumerate(cells)}
  figure, axes = plt.subplots(
    2, len(names), figsize=(5 * len(names), 8), squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for column, task in enumerate(names):
    top, bottom = axes[:, column]
    rows = [r for r in table if r["task"] == task]
    for r in rows:
      for n, points in enumerate(r["curves"]):
        if points:
          steps, values = zip(*points)
          label = r["cell"] if n == 0 else None
          top.plot(
            steps, [100 * v for v in values], color=colour[r["cell"]],
            label=label, linewidth=1.5,
          )  # fmt: skip
      bottom.errorbar(
        max(r["state_size"], 1), r["accuracy"], yerr=r["spread"], fmt="o",
        color=colour[r["cell"]], label=r["cell"],
      )  # fmt: skip
    for axis in (top, bottom):
      axis.axhline(rows[0]["chance"], color="grey", linestyle=":", linewidth=1)
      axis.set_ylim(0, 103)
      axis.grid(alpha=0.3)
    top.set_title(task)
    top.set_xlabel("step")
    top.set_ylabel("test accuracy, %")
    top.legend(fontsize=8, loc="lower right")
    bottom.legend(fontsize=8, loc="lower left")
    bottom.set_xscale("log")
    bottom.margins(x=0.25)
    bottom.set_xlabel("floats held between two tokens")
    bottom.set_ylabel("test accuracy, %")
  with epath.Path(path).open("wb") as f:
    figure.savefig(f, dpi=120, format="png")
  plt.close(figure)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  if not FLAGS.workdir:
    raise app.UsageError("--workdir is needed: results are kept there")
  if bool(FLAGS.runs) == bool(FLAGS.cells and FLAGS.tasks):
    raise app.UsageError("give --runs, or --cells and --tasks")
  for task in FLAGS.tasks:
    if task not in tasks.names():
      raise app.UsageError(
        f"unknown task {task!r}: " + dispatch.nearest(task, tasks.names())
      )
  with train.one_line_errors():
    compare(train.stop_on_sigterm())


def compare(stop) -> None:
  workdir = training.open_workdir(FLAGS.workdir)
  store = Store(workdir / "results.jsonl")
  table = summarise(plan(store, workdir, stop))
  (workdir / "table.json").write_text(json.dumps(table, indent=1) + "\n")
  (workdir / "table.md").write_text(markdown(table))
  draw(table, workdir / "compare.png")
  print("\n" + markdown(table) + f"\nwritten to {workdir}")


if __name__ == "__main__":
  train.define()
  app.run(main)
