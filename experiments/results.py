"""Finished runs: the store that `experiments.compare` adds to, and its tables.

A store is a file of JSON lines. A line is a run ('key', and what `row` gives),
or says which runs a comparison reports ('report': [label, group]): of one label
(task, memory, size, steps) the last such line counts, so a wider sweep replaces
what a narrower one chose.
"""

import csv
import hashlib
import io
import json
import math

import numpy as np

from experiments import train

# Flags of a run that its numbers do not depend on.
QUIET = (
  "workdir", "log_every", "checkpoint_every", "profile", "flagfile",
  "undefok", *train.MACHINE,
)  # fmt: skip


def identity(values) -> dict:
  """What a run's numbers depend on: {flag: value}, less the empty ones."""
  return {
    n: values[n].value
    for n in sorted(values)
    if n not in QUIET and values[n].value not in (None, "", [])
  }


def digest(plain) -> str:
  text = json.dumps(plain, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def key(values) -> str:
  """The name of a run."""
  return digest(identity(values))


def group(values) -> str:
  """The name of a run whatever its seed."""
  return digest({k: v for k, v in identity(values).items() if k != "seed"})


class Store:
  """Finished runs by key; a line cut by a crash is dropped."""

  def __init__(self, path):
    self.path, self.rows, self.reports = path, {}, {}
    text = path.read_text() if path.exists() else ""
    good = []
    for line in text.splitlines():
      try:
        self._take(json.loads(line))
        good.append(line)
      except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        continue
    if len(good) < len(text.splitlines()) or not text.endswith("\n"):
      path.write_text("".join(line + "\n" for line in good))

  def _take(self, row):
    if "report" in row:
      label, name = row["report"]
      self.reports[tuple(label)] = name
    else:
      self.rows[row["key"]] = row

  def add(self, row):
    """Keeps one more line."""
    self._take(row)
    with self.path.open("a") as file:
      file.write(json.dumps(row) + "\n")

  def report(self, label, name):
    """The runs of group `name` are what is reported for `label`."""
    if self.reports.get(tuple(label)) != name:
      self.add({"report": [list(label), name]})

  def reported(self) -> list[dict]:
    """The runs that are reported, by label in the order of the first."""
    return [
      {**row, "size": label[2]}
      for label, name in self.reports.items()
      for row in self.rows.values()
      if row["group"] == name
    ]


def row(values, result: dict, curve: list) -> dict:
  """The line of a finished run."""
  return dict(
    key=key(values), group=group(values), task=values.task,
    cell=",".join(values.cell), split=values.eval_split,
    learning_rate=values.learning_rate, seed=values.seed, steps=values.steps,
    d_model=values.d_model, metrics=result["eval"], best=result["best"],
    train=result["train"], final=result["final"],
    state_size=result["state_size"], parameters=result["parameters"],
    tokens_per_second=result["tokens_per_second"], seconds=result["seconds"],
    chance=result["chance"], length=result["length"], curve=curve,
    flags=identity(values),
  )  # fmt: skip


def tested(row) -> dict:
  """The metrics of the test split; of another where the run had none."""
  return row["final"].get("test", row["metrics"])


def score(row) -> float:
  """Higher is better; a run that ended without a finite number is last."""
  metrics = row["metrics"]
  value = metrics.get("accuracy", -metrics["loss"])
  return value if math.isfinite(value) else -math.inf


def summarise(rows) -> list[dict]:
  """One row per (task, cell, size, steps): means over its seeds."""
  groups = {}
  for r in rows:
    label = (r["task"], r["cell"], r["size"], r["group"])
    groups.setdefault(label, []).append(r)
  table = [
    dict(
      task=task, cell=cell, size=size, seeds=len(runs),
      **_quality([tested(r) for r in runs]),
      state_size=runs[0]["state_size"],
      parameters=runs[0]["parameters"],
      tokens_per_second=float(
        np.median([r["tokens_per_second"] for r in runs])
      ),
      seconds=float(np.mean([r["seconds"] for r in runs])),
      steps=runs[0]["steps"],
      learning_rate=runs[0]["learning_rate"],
      chance=100 * runs[0]["chance"],
      length=runs[0]["length"],
      curves=[r["curve"] for r in runs],
      final={
        name: _quality([r["final"][name] for r in runs])
        for name in runs[0]["final"]
        if name != "test" and all(name in r["final"] for r in runs)
      },
    )
    for (task, cell, size, _), runs in groups.items()
  ]  # fmt: skip
  order = {
    name: n for n, name in enumerate(dict.fromkeys(r["task"] for r in rows))
  }
  best = lambda r: r["loss"] if math.isnan(r["accuracy"]) else -r["accuracy"]
  return sorted(table, key=lambda r: (order[r["task"]], best(r)))


def _quality(runs) -> dict:
  """Of the metrics of some runs: means and spreads, accuracy in percent."""
  found = {}
  for name, scale, short in (("accuracy", 100, "spread"),
                             ("loss", 1, "loss_spread")):  # fmt: skip
    values = [scale * m.get(name, math.nan) for m in runs]
    found[name] = float(np.mean(values))
    found[short] = float(np.std(values))
  return found


COLUMNS = (
  "task", "memory", "size", "test accuracy, %", "loss", "state, floats",
  "parameters", "tokens/s", "seconds", "steps", "rate", "seeds",
)  # fmt: skip


def markdown(table) -> str:
  """The summary as a Markdown table."""
  sizes = any(r["size"] for r in table)
  columns = [c for c in COLUMNS if sizes or c != "size"]
  lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
  for r in table:
    several = r["seeds"] > 1
    spread = f" ± {r['spread']:.1f}" if several else ""
    accuracy = f"{r['accuracy']:.1f}{spread}"
    cells = {
      "task": r["task"], "memory": r["cell"], "size": r["size"],
      "test accuracy, %": "" if math.isnan(r["accuracy"]) else accuracy,
      "loss": f"{r['loss']:.3f}", "state, floats": f"{r['state_size']:,}",
      "parameters": f"{r['parameters']:,}",
      "tokens/s": f"{r['tokens_per_second']:,.0f}",
      "seconds": f"{r['seconds']:.0f}", "steps": f"{r['steps']:,}",
      "rate": f"{r['learning_rate']:g}", "seeds": str(r["seeds"]),
    }  # fmt: skip
    lines.append("| " + " | ".join(cells[c] for c in columns) + " |")
  return "\n".join(lines) + "\n"


def comma_separated(table) -> str:
  """The summary as CSV, one line per row; curves are left out."""
  names = [n for n in table[0] if n not in ("curves", "final")] if table else []
  text = io.StringIO()
  writer = csv.DictWriter(text, names, extrasaction="ignore")
  writer.writeheader()
  writer.writerows(table)
  return text.getvalue()
