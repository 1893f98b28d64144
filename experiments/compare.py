"""Trains several memories on several tasks and shows them side by side.

A grid, every memory at the best rate of a small sweep:

  python -m experiments.compare --cells=gru,lru,gated_delta \\
    --tasks=mqar_small,mnist1d --learning_rates=1e-3,3e-3,1e-2 --seeds=0,1,2 \\
    --sizes='d_model=32;d_model=64' --steps=1000 --workdir=runs/compare

or flag files of `experiments.train`, each as it stands:

  python -m experiments.compare --runs='experiments/mnist1d/*.flags' \\
    --workdir=runs/mnist1d

Every run is a run of `experiments.train` with the flags of this command, of
its flag file, and its own. Rates are chosen on the validation split, and what
is reported is the test split, at the last step. A task with the option
`holdout` keeps `--holdout` of its training data out of the sweep, and the runs
that are reported train on all of it.

A run uses all devices that it sees. With `--jobs=N` N runs go on side by side,
each in a process of its own with its share of the devices (of the cores, on a
CPU): small runs fill a machine so.

The same command goes on where it stopped, and a wider one adds to what is
there: finished runs are in `results.jsonl`, an unfinished one resumes from its
checkpoint. The workdir gets `table.md`, `table.csv`, `table.json` and the
figures of `experiments.plots`.
"""

import concurrent.futures
import functools
import glob
import json
import os
import signal
import subprocess
import sys

from absl import app, flags

from experiments import plots, results, train
from memzoo import tasks, training
from memzoo.core import dispatch

FLAGS = flags.FLAGS

flags.DEFINE_list("cells", [], "Memories to compare, by name.")
flags.DEFINE_list("tasks", [], "Tasks to compare them on, by preset.")
flags.DEFINE_list("learning_rates", [], "Rates of the sweep.")
flags.DEFINE_string(
  "sizes",
  "",
  "Options of models or cells: 'd_model=32;d_model=64,lru.d_state=9'.",
)
flags.DEFINE_list("seeds", ["0"], "Seeds of the runs that are reported.")
flags.DEFINE_list("runs", [], "Flag files of experiments.train; globs may.")
flags.DEFINE_integer("holdout", 800, "Training examples kept out of a sweep.")
flags.DEFINE_integer("limit_steps", None, "Cut every run: for a quick look.")
flags.DEFINE_integer("jobs", 1, "Runs that go on side by side.", lower_bound=1)


# A Python program that takes its cores first, then becomes another.
PINNED = (
  "import os, sys; cores, *rest = sys.argv[1:]; "
  "os.sched_setaffinity(0, map(int, cores.split(','))); "
  "os.execv(sys.executable, [sys.executable, *rest])"
)


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


def cell_flags(*sources, cell, size="", **own):
  """`run_flags` at a size, less the cell options of the grid's other memories.

  An option of `size` that is a flag of experiments.train is that flag, and any
  other is an option of the cell.
  """
  known = train.flag_names()
  chosen = train.parse_options(size)
  own |= {name: value for name, value in chosen.items() if name in known}
  values = run_flags(*sources, cell=cell, **own)
  given = train.parse_options(values.cell_options)
  given |= {name: value for name, value in chosen.items() if name not in known}
  mine = {n: v for n, v in given.items() if n.rpartition(".")[0] in ("", cell)}
  values.cell_options = json.dumps(mine, sort_keys=True) if mine else ""
  return values


class Runner:
  """Runs what the store lacks, in this process or in several.

  Args:
    store: of `results`.
    workdir: the runs' own are in it.
    jobs: how many at once.
    stop: tells whether to stop.
  """

  def __init__(self, store, workdir, jobs, stop):
    self.store, self.workdir, self.jobs = store, workdir, jobs
    self.stop = stop
    self.devices = None
    if jobs > 1:
      self.devices = platform, count = devices()
      if platform != "cpu" and jobs > count:
        raise ValueError(f"--jobs={jobs}, and there are {count} devices")

  def __call__(self, runs) -> list[dict]:
    """The rows of some runs, given by their flags, in their order.

    Raises:
      RuntimeError: where a run in a process of its own failed; the others are
        finished and kept.
    """
    todo = {results.key(values): values for values in runs}
    todo = [v for name, v in todo.items() if name not in self.store.rows]
    if self.jobs == 1:
      for values in todo:
        self._finish(values, self._here(values))
    else:
      self._apart(todo)
    return [self.store.rows[results.key(values)] for values in runs]

  def _finish(self, values, result):
    if result["stopped"]:
      raise SystemExit(0)
    curve = read_curve(self._folder(values))
    self.store.add(results.row(values, result, curve))

  def _folder(self, values):
    return self.workdir / "runs" / results.key(values)

  def _announce(self, values):
    label = f"{values.task} {','.join(values.cell)} lr {values.learning_rate:g}"
    print(f"== {label} seed {values.seed} ({values.eval_split})", flush=True)

  def _here(self, values):
    self._announce(values)
    values.workdir = str(self._folder(values))
    return train.run(values, self.stop)

  def _apart(self, todo):
    free = list(range(self.jobs))
    failed = []
    with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
      started = {
        pool.submit(self._child, values, free): values for values in todo
      }
      for done in concurrent.futures.as_completed(started):
        result = done.result()
        if isinstance(result, dict) and not result["stopped"]:
          self._finish(started[done], result)
        elif isinstance(result, str):
          failed.append(result)
    if failed:
      raise RuntimeError("; ".join(failed))
    if self.stop():
      raise SystemExit(0)

  def _child(self, values, free):
    """One run in a process of its own: its result, or what went wrong."""
    if self.stop():
      return None
    slot = free.pop()
    env, python = share(slot, self.jobs, *self.devices)
    try:
      self._announce(values)
      folder = self._folder(values)
      folder.mkdir(parents=True, exist_ok=True)
      values.workdir = str(folder)
      arguments = [
        values[name].serialize()
        for name in train.flag_names()
        if values[name].value is not None
      ]
      log = folder / "log.txt"
      with log.open("w") as file:
        child = subprocess.Popen(
          [*python, "-m", "experiments.train", *filter(None, arguments)],
          stdout=file, stderr=subprocess.STDOUT, text=True, env=env,
        )  # fmt: skip
        while child.poll() is None:
          try:
            child.wait(0.5)
          except subprocess.TimeoutExpired:
            if self.stop():
              child.send_signal(signal.SIGTERM)
              child.wait()
      lines = log.read_text().splitlines()
      if child.returncode:
        why = lines[-1] if lines else f"exit status {child.returncode}"
        return f"a run failed ({log}): {why}"
      return json.loads(lines[-1])
    finally:
      free.append(slot)


def devices() -> tuple[str, int]:
  """(platform, number of local devices), asked of another process: one that
  opens an accelerator keeps it from its children."""
  ask = "import jax; print(jax.default_backend(), jax.local_device_count())"
  done = subprocess.run(
    [sys.executable, "-c", ask], capture_output=True, text=True
  )
  if done.returncode:
    raise RuntimeError(f"no device to run on: {done.stderr.strip()[-200:]}")
  platform, count = done.stdout.split()[-2:]
  return platform, int(count)


def share(slot: int, jobs: int, platform: str, count: int):
  """(environment, how Python is started) of a process with its share."""
  env, python = dict(os.environ), [sys.executable]
  if platform != "cpu":
    name = (
      "TPU_VISIBLE_DEVICES" if platform == "tpu" else "CUDA_VISIBLE_DEVICES"
    )
    every = [d for d in env.get(name, "").split(",") if d] or range(count)
    env[name] = ",".join(map(str, list(every)[slot::jobs]))
  elif hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[slot::jobs] or cores
    python += ["-c", PINNED, ",".join(map(str, mine))]
  return env, python


def read_curve(folder) -> list:
  """[[step, accuracy or loss]] of the evaluations of a run."""
  points = []
  for line in (folder / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    if row.get("split") == "eval":
      points.append([row["step"], row.get("accuracy", row.get("loss"))])
  return points


def plan(run, store) -> None:
  """All sweeps, then all runs that are reported."""
  names = set(train.flag_names()) - {"workdir"}
  own = [FLAGS[n].serialize() for n in sorted(names) if FLAGS[n].present]
  grid = [
    (size, functools.partial(cell_flags, own, task=task, cell=cell, size=size))
    for task in FLAGS.tasks
    for cell in FLAGS.cells
    for size in (s.strip() for s in FLAGS.sizes.split(";"))
  ]
  chosen = [
    ("", functools.partial(file_flags, path, own), path)
    for path in files(FLAGS.runs)
  ]
  chosen += [
    (size, functools.partial(reported, base, **rate), None)
    for (size, base), rate in zip(grid, sweep(run, [b for _, b in grid]))
  ]
  runs = [
    (size, path, base(seed=seed)) for size, base, path in chosen
    for seed in FLAGS.seeds
  ]  # fmt: skip
  run([values for _, _, values in runs])
  for size, path, values in runs:
    label = [values.task, ",".join(values.cell), size, path or values.steps]
    store.report(label, results.group(values))


def sweep(run, grid) -> list[dict]:
  """{'learning_rate': …} of the best validation metric, for each of `grid`."""
  rates = FLAGS.learning_rates
  if len(rates) < 2:
    return [{"learning_rate": rates[0]} if rates else {} for _ in grid]
  trials = [
    trial(base(learning_rate=rate, seed=FLAGS.seeds[0]))
    for base in grid
    for rate in rates
  ]
  scores = iter([results.score(row) for row in run(trials)])
  best = lambda: max(rates, key=dict(zip(rates, scores)).__getitem__)
  return [{"learning_rate": best()} for _ in grid]


def holds_out(values) -> bool:
  """Whether the task can keep training data for validation."""
  options = train.parse_options(values.task_options)
  return hasattr(tasks.make(values.task, **options), "holdout")


def trial(values):
  """A run that is judged on validation data."""
  if holds_out(values):
    options = train.parse_options(values.task_options)
    options["holdout"] = FLAGS.holdout
    values.task_options = json.dumps(options, sort_keys=True)
    values.eval_split = "validation"
    return values
  return reported(lambda: values)


def reported(base, **own):
  """A run that is judged on the test split, too; alone, where validation data
  would be taken from the training data. Else it serves as a trial as well."""
  values = base(**own)
  if holds_out(values):
    values.eval_split = "test"
  else:
    values.eval_split, values.final = "validation", ["test"]
  return values


def file_flags(path, own, **more):
  """The run of a flag file, judged on the test split."""
  return run_flags([f"--flagfile={path}"], own, **more, eval_split="test")


def files(patterns) -> list[str]:
  found = []
  for pattern in patterns:
    paths = sorted(glob.glob(pattern))
    if not paths:
      raise app.UsageError(f"--runs: no flag file matches {pattern!r}")
    found += paths
  return found


def write(table, workdir) -> None:
  """The tables and the figures of a summary."""
  plain = json.dumps(table, indent=1) + "\n"
  (workdir / "table.json").write_text(plain)
  (workdir / "table.md").write_text(results.markdown(table))
  (workdir / "table.csv").write_text(results.comma_separated(table))
  for name, draw in plots.FIGURES.items():
    figure = draw(table)
    if figure is not None:
      with (workdir / f"{name}.png").open("wb") as file:
        figure.savefig(file, format="png")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  if not FLAGS.workdir:
    raise app.UsageError("--workdir is needed: results are kept there")
  grid = bool(FLAGS.cells and FLAGS.tasks)
  if bool(FLAGS.runs) == grid or (not grid and (FLAGS.cells or FLAGS.tasks)):
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
  store = results.Store(workdir / "results.jsonl")
  plan(Runner(store, workdir, FLAGS.jobs, stop), store)
  table = results.summarise(store.reported())
  write(table, workdir)
  print("\n" + results.markdown(table) + f"\nwritten to {workdir}")


if __name__ == "__main__":
  train.define()
  app.run(main)
