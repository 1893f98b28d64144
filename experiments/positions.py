"""Bits per byte against the position in the context, for trained models.

  python -m experiments.positions --runs='runs/english/runs/*' \\
    --length=1024 --workdir=runs/english

reads the latest checkpoints of runs of `experiments.train` on text, and
measures windows of the test split at even distances, each from a fresh memory.
A memory that uses its past predicts better the later it is; what it cannot
hold does not help. The workdir gets `positions.json` and `positions.png`.
"""

import glob
import json
import math

from absl import app, flags
import jax
import numpy as np
import optax

from experiments import train
from memzoo import training

FLAGS = flags.FLAGS


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not on import, so that others can use `measure`."""
  to = dict(flag_values=values)
  flags.DEFINE_list("runs", [], "Workdirs of runs; globs may.", **to)
  flags.DEFINE_integer("length", 1024, "Bytes of a window.", 2, **to)
  flags.DEFINE_integer("windows", 64, "How many.", 1, **to)
  flags.DEFINE_integer("batch_size", 16, "Windows at once.", 1, **to)
  flags.DEFINE_string("workdir", None, "Where numbers and figure go.", **to)


def buckets(length: int) -> list[tuple[int, int]]:
  """Ranges of positions that double: [(0, 1), (1, 2), (2, 4), …]."""
  edges = [0, *(2**n for n in range(length.bit_length()) if 2**n < length)]
  return list(zip(edges, [*edges[1:], length]))


def measure(
  model, data: np.ndarray, length, windows, batch_size
) -> list[float]:
  """Mean bits per byte at each position of windows of `data` uint8 [N].

  Raises:
    ValueError: where the data is shorter than a window.
  """
  if len(data) < length + 1:
    raise ValueError(
      f"length: the text has {len(data)} bytes, not {length + 1}"
    )
  starts = np.linspace(0, len(data) - length - 1, windows).astype(int)
  tokens = data[starts[:, None] + np.arange(length + 1)].astype(np.int32)

  @jax.jit
  def losses(tokens):
    _, logits = model(None, tokens[:, :-1])
    logits = logits.astype("float32")
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    )

  parts = [
    np.asarray(losses(tokens[i : i + batch_size]))
    for i in range(0, windows, batch_size)
  ]
  return (np.concatenate(parts).mean(0) / math.log(2)).tolist()


def table(rows) -> str:
  """Markdown: a row for each run, a column for each range of positions."""
  ranges = buckets(len(rows[0]["bits"]))
  names = [f"{low}–{high - 1}" if high - low > 1 else str(low)
           for low, high in ranges]  # fmt: skip
  lines = ["| memory | state, floats | " + " | ".join(names) + " |"]
  lines.append("|---" * (len(names) + 2) + "|")
  for row in rows:
    means = [f"{np.mean(row['bits'][low:high]):.2f}" for low, high in ranges]
    lines.append(
      f"| {row['cell']} | {row['state_size']:,} | " + " | ".join(means) + " |"
    )
  return "\n".join(lines) + "\n"


def draw(rows):
  """The figure: one line for each run."""
  from matplotlib import colormaps
  from matplotlib.figure import Figure

  figure = Figure((7, 4.5), dpi=120, layout="constrained")
  axis = figure.subplots()
  for n, row in enumerate(rows):
    ranges = buckets(len(row["bits"]))
    axis.plot(
      [math.sqrt(max(low, 1) * high) for low, high in ranges],
      [np.mean(row["bits"][low:high]) for low, high in ranges],
      marker="o", markersize=4, linewidth=1.4, color=colormaps["tab10"](n % 10),
      label=f"{row['cell']} ({row['state_size']:,})",
    )  # fmt: skip
  axis.set_xscale("log", base=2)
  axis.set_xlabel("position in the context, bytes")
  axis.set_ylabel("bits per byte")
  axis.grid(alpha=0.3)
  axis.legend(title="memory (floats held)", fontsize=8, title_fontsize=8)
  return figure


def run(values) -> list[dict]:
  """Measures and writes: [{'run', 'cell', 'state_size', 'bits'}]."""
  paths = [p for text in values.runs for p in sorted(glob.glob(text))]
  if not values.workdir or not paths:
    raise ValueError("--workdir and --runs (that exist) are needed")
  workdir = training.open_workdir(values.workdir)
  rows = []
  for path in paths:
    config, task, model = train.restore(path)
    if not hasattr(task, "contents"):
      raise ValueError(f"{path}: {config.task!r} is no task on a text")
    bits = measure(
      model, task.contents("test")[0], values.length, values.windows,
      values.batch_size,
    )  # fmt: skip
    rows.append(
      dict(
        run=path, cell=",".join(config.cell), bits=bits,
        state_size=train.state_size(model),
      )
    )  # fmt: skip
  rows.sort(key=lambda row: np.mean(row["bits"]))
  (workdir / "positions.json").write_text(json.dumps(rows) + "\n")
  with (workdir / "positions.png").open("wb") as file:
    draw(rows).savefig(file, format="png")
  return rows


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  with train.one_line_errors():
    print(table(run(FLAGS)) + f"\nwritten to {FLAGS.workdir}")


if __name__ == "__main__":
  define()
  app.run(main)
