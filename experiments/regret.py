"""What trained memories lose to the exact Bayes predictor of their source.

  python -m experiments.regret --runs='runs/bernoulli/*' --workdir=runs/regret

reads the latest checkpoints of runs of `experiments.train` on a `bernoulli…`
task, and compares their predictions with the predictor's on new sequences:
regret in bits, cumulated over the sequence, at the length of the training and
beyond (`--length`). The workdir gets `regret.json` and `regret.png`.
"""

import glob
import json

from absl import app, flags
import jax
import numpy as np

from experiments import train
from memzoo import tasks, training

FLAGS = flags.FLAGS


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not on import, so that others can use `measure`."""
  to = dict(flag_values=values)
  flags.DEFINE_list("runs", [], "Workdirs of runs; globs may.", **to)
  flags.DEFINE_integer("length", None, "Of the tests; that of the run.", **to)
  flags.DEFINE_integer("sequences", 1024, "How many.", 1, **to)
  flags.DEFINE_integer("batch_size", 128, "Sequences at once.", 1, **to)
  flags.DEFINE_string("workdir", None, "Where numbers and figure go.", **to)


def measure(model, task, sequences, batch_size) -> dict:
  """The regret of a model, and one sequence as an example.

  Returns:
    'regret': mean over sequences, cumulated, in bits, [T]; 'error': standard
    error of the last; 'bayes': bits of the predictor itself per sequence;
    'example': {'bits', 'exact', 'model'} of one sequence, [T] each.
  """

  @jax.jit
  def predict(inputs):
    return jax.nn.log_softmax(model(None, inputs)[1].astype("float32"))

  steps, bayes, example = [], [], None
  for step in range(-(-sequences // batch_size)):
    batch = task.batch(0, step, batch_size, "test")
    log_probs = np.asarray(predict(batch.inputs), np.float64)
    targets = np.asarray(batch.targets)
    one = task.predictor(batch)
    exact = np.log2(np.where(targets == 1, one, 1 - one))
    given = np.take_along_axis(log_probs, targets[..., None], 2)[..., 0]
    steps.append(exact - given / np.log(2))
    bayes.append(-exact.sum(1))
    if example is None:
      two = log_probs[0, :, :2]
      example = dict(
        bits=targets[0].tolist(),
        exact=one[0].tolist(),
        model=np.exp(two[:, 1] - np.logaddexp(*two.T)).tolist(),
      )
  steps = np.concatenate(steps)
  total = steps.sum(1)
  return dict(
    regret=steps.mean(0).cumsum().tolist(),
    error=float(total.std(ddof=1) / len(total) ** 0.5),
    bayes=float(np.concatenate(bayes).mean()),
    example=example,
  )


def draw(rows):
  """The figure: regret over the sequence, and predictions on one."""
  from matplotlib import colormaps
  from matplotlib.figure import Figure

  figure = Figure((11, 4.2), dpi=120, layout="constrained")
  left, right = figure.subplots(1, 2)
  shown = rows[0]["example"]
  time = np.arange(len(shown["bits"]))
  right.scatter(time, shown["bits"], s=8, color="grey", label="bits", zorder=1)
  right.plot(time, shown["exact"], color="black", linewidth=2, label="Bayes")
  for n, row in enumerate(rows):
    colour = colormaps["tab10"](n % 10)
    left.plot(row["regret"], color=colour, linewidth=1.5,
              label=f"{row['cell']}: {row['regret'][-1]:.2f}")  # fmt: skip
    right.plot(time, row["example"]["model"], color=colour, linewidth=1.1,
               label=row["cell"])  # fmt: skip
  left.axhline(0, color="black", linewidth=1, linestyle=":")
  left.set_xlabel("bits seen")
  left.set_ylabel("regret against Bayes, bits, cumulated")
  left.legend(title="memory: bits in all", fontsize=8, title_fontsize=8)
  right.set_xlabel("bits seen")
  right.set_ylabel("probability of a 1")
  right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
  for axis in (left, right):
    axis.grid(alpha=0.3)
  return figure


def run(values) -> list[dict]:
  """Measures and writes: what `measure` gives, of each run, best first."""
  paths = [p for text in values.runs for p in sorted(glob.glob(text))]
  if not values.workdir or not paths:
    raise ValueError("--workdir and --runs (that exist) are needed")
  workdir = training.open_workdir(values.workdir)
  options = {} if values.length is None else {"length": values.length}
  rows = []
  for path in paths:
    config, task, model = train.restore(path, **options)
    if not isinstance(task, tasks.Bernoulli):
      raise ValueError(f"{path}: {config.task!r} has no exact predictor")
    found = measure(model, task, values.sequences, values.batch_size)
    size = train.state_size(model)
    cell = ",".join(config.cell)
    rows.append(dict(run=path, cell=cell, state_size=size, **found))
  rows.sort(key=lambda row: row["regret"][-1])
  (workdir / "regret.json").write_text(json.dumps(rows) + "\n")
  with (workdir / "regret.png").open("wb") as file:
    draw(rows).savefig(file, format="png")
  return rows


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  with train.one_line_errors():
    for row in run(FLAGS):
      print(
        f"{row['cell']:<24} {row['regret'][-1]:7.3f} ± {row['error']:.3f} bits "
        f"above Bayes' {row['bayes']:.2f} on {len(row['regret'])} bits"
      )
    print(f"written to {FLAGS.workdir}")


if __name__ == "__main__":
  define()
  app.run(main)
