"""The figures of a comparison: functions from its summary to one figure.

`table` is what `results.summarise` returns. A function returns a Matplotlib
figure, or None where the table has nothing to show in it.
"""

import math
import re

LABELS = {
  "state": "floats held between two tokens",
  "accuracy": "test accuracy, %",
  "bits": "bits per token",
}


def _colours(table):
  from matplotlib import colormaps

  cells = sorted({r["cell"] for r in table})
  return {c: colormaps["tab20"](n % 20) for n, c in enumerate(cells)}


def _panels(names, height=4.0):
  """(figure, axes), one panel for each name."""
  from matplotlib.figure import Figure

  columns = min(len(names), 4)
  rows = -(-len(names) // columns)
  figure = Figure((4.6 * columns, height * rows), dpi=110, layout="constrained")
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis in axes[len(names) :]:
    axis.set_visible(False)
  for axis, name in zip(axes, names):
    axis.set_title(name)
    axis.grid(alpha=0.3)
  return figure, axes


def _legend(figure, colours):
  from matplotlib.lines import Line2D

  handles = [
    Line2D([], [], color=c, marker="o", linewidth=1.5, label=name)
    for name, c in colours.items()
  ]
  longest = max(map(len, colours))
  fit = int(figure.get_figwidth() / (0.5 + 0.08 * longest))
  figure.legend(
    handles=handles, loc="outside lower center",
    ncols=max(1, min(len(handles), fit)), fontsize=9, frameon=False,
  )  # fmt: skip


def _tasks(table, keep):
  names = dict.fromkeys(r["task"] for r in table if keep(r))
  return [(n, [r for r in table if r["task"] == n and keep(r)]) for n in names]


def _by_cell(rows):
  return {
    cell: [r for r in rows if r["cell"] == cell]
    for cell in dict.fromkeys(r["cell"] for r in rows)
  }


def _has_accuracy(r):
  return not math.isnan(r["accuracy"])


def curves(table):
  """What runs were evaluated on as they went, by default the validation split:
  the mean over seeds, with their range as a band."""
  tasks = _tasks(table, lambda r: any(len(c) > 1 for c in r["curves"]))
  if not tasks:
    return None
  colours = _colours(table)
  figure, axes = _panels([name for name, _ in tasks])
  for axis, (_, rows) in zip(axes, tasks):
    scale = 100 if _has_accuracy(rows[0]) else 1
    for r in rows:
      steps = sorted(
        set.intersection(*({s for s, _ in c} for c in r["curves"]))
      )
      seeds = [[scale * dict(map(tuple, c))[s] for s in steps]
               for c in r["curves"]]  # fmt: skip
      points = list(zip(*seeds))
      mean = [sum(p) / len(p) for p in points]
      axis.plot(steps, mean, color=colours[r["cell"]], linewidth=1.5)
      low, high = [min(p) for p in points], [max(p) for p in points]
      axis.fill_between(
        steps, low, high, color=colours[r["cell"]], alpha=0.2, linewidth=0
      )
    if scale == 100:
      axis.axhline(rows[0]["chance"], color="grey", linestyle=":", linewidth=1)
      axis.set_ylim(0, 103)
    axis.set_xlabel("step")
    axis.set_ylabel("accuracy, %" if scale == 100 else "loss")
  _legend(figure, colours)
  return figure


def _against(table, x, label, log, quality):
  """Quality against a number of each row, lines joining a memory's sizes."""
  bits = quality == "bits"
  keep = (lambda r: True) if bits else _has_accuracy
  tasks = _tasks(table, keep)
  if not tasks:
    return None
  colours = _colours(table)
  figure, axes = _panels([name for name, _ in tasks])
  for axis, (_, rows) in zip(axes, tasks):
    for cell, mine in _by_cell(rows).items():
      mine = sorted(mine, key=x)
      scale = 1 / math.log(2) if bits else 1
      name, spread = ("loss", "loss_spread") if bits else ("accuracy", "spread")
      axis.errorbar(
        [max(x(r), 1) for r in mine], [scale * r[name] for r in mine],
        yerr=[scale * r[spread] for r in mine], marker="o", linewidth=1.2,
        capsize=2, color=colours[cell],
      )  # fmt: skip
    if not bits:
      axis.axhline(rows[0]["chance"], color="grey", linestyle=":", linewidth=1)
      axis.set_ylim(0, 103)
    if log:
      axis.set_xscale("log")
      axis.margins(x=0.15)
    axis.set_xlabel(label)
    axis.set_ylabel(LABELS[quality])
  _legend(figure, colours)
  return figure


def recall(table):
  """Accuracy against state size."""
  return _against(
    table, lambda r: r["state_size"], LABELS["state"], True, "accuracy"
  )


def bits(table):
  """Bits per token against state size, for tasks on text."""
  texts = [
    r for r in table if r["task"].startswith(("text", "tfds", "english"))
  ]
  return _against(
    texts, lambda r: r["state_size"], LABELS["state"], True, "bits"
  )


def cost(table):
  """Accuracy against the seconds of a run, compilation included."""
  return _against(table, lambda r: r["seconds"], "seconds", True, "accuracy")


def lengths(table):
  """Accuracy against the length of the test, where runs were tested at some."""
  tasks = _tasks(table, lambda r: _has_accuracy(r) and len(_variants(r)) > 1)
  if not tasks:
    return None
  colours = _colours(table)
  figure, axes = _panels([name for name, _ in tasks])
  for axis, (_, rows) in zip(axes, tasks):
    for r in rows:
      points = _variants(r)
      axis.errorbar(
        [n for n, _ in points], [q["accuracy"] for _, q in points],
        yerr=[q["spread"] for _, q in points], marker="o", linewidth=1.2,
        capsize=2, color=colours[r["cell"]],
      )  # fmt: skip
    axis.axvline(rows[0]["length"], color="grey", linestyle="--", linewidth=1)
    axis.axhline(rows[0]["chance"], color="grey", linestyle=":", linewidth=1)
    axis.set_ylim(0, 103)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("length (dashed: trained at)")
    axis.set_ylabel(LABELS["accuracy"])
  _legend(figure, colours)
  return figure


def _variants(r):
  """[(length, quality)] of the tests at the trained and at other lengths."""
  points = {r["length"]: r}
  for text, quality in r["final"].items():
    found = re.search(r"(?:^|,)\s*(?:max_)?length=(\d+)", text)
    if found:
      points[int(found[1])] = quality
  return sorted(points.items(), key=lambda p: p[0])


FIGURES = {
  "curves": curves, "recall": recall, "lengths": lengths, "bits": bits,
  "cost": cost,
}  # fmt: skip
