"""The pages and lines of the suites `gpu` and `tpu` of `experiments.bench`."""

from typing import Any, NamedTuple

from experiments.bench import table

BOTH = "forward+backward"


class Goal(NamedTuple):
  """What the first case of a name is expected to reach, forward and backward.

  Attributes:
    text: for people.
    what: the case's name.
    ours: 'pallas', our fastest kernel, or 'default', the form that memzoo
      takes by itself.
    against: the beginning of the other form's name; of several, the fastest.
    bound: at least so many times as fast.
  """

  text: str
  what: str
  ours: str
  against: str
  bound: float


def _goals():
  fla, jla = "flash-linear-attention", "jax-linear-attention"
  names = {
    "linear attention": "linear_attention, scalar decay",
    "gated delta rule": "delta_rule, scalar decay",
  }
  for name, what in names.items():
    yield Goal(f"{name}: our kernel, {fla}", what, "pallas", fla, 1.0)
    yield Goal(f"{name}: the default, {jla}", what, "default", jla, 1.0)
    yield Goal(
      f"{name}: our kernel, our XLA form", what, "pallas", "chunk", 5.0
    )
  yield Goal("LSTM: our kernel, lax.scan", "lstm", "pallas", "scan", 10.0)


GOALS = {"gpu": tuple(_goals()), "tpu": ()}


def line(row: dict[str, Any]) -> str:
  """A row for the terminal."""
  head = f"{row['what']} [{row['shape']} {row['dtype']}] {row['form']} "
  head += row["direction"]
  if "error" in row:
    return f"{head}: {row['error']}"
  ratio = ""
  if "ratio" in row:
    ratio = f"  ×{row['ratio']:.2f} {row['reference']}"
  return (
    f"{head}: {row['median_ms']:.3f} ms ({row['min_ms']:.3f} … "
    f"{row['max_ms']:.3f}, {row['rounds']}×{row['calls']} calls){ratio}  "
    f"{_rate(row)}  error {_errors(row)}"
  )


def _rate(row) -> str:
  return (
    f"{row['flops_per_s'] / 1e12:.3g} TFLOP/s ({_share(row, 'of_flops')}), "
    f"{row['bytes_per_s'] / 1e9:.3g} GB/s ({_share(row, 'of_bytes')})"
  )


def _share(row, key) -> str:
  return f"{100 * row[key]:.1f} %" if key in row else "?"


def _errors(row) -> str:
  found = row.get("parity") or {}
  if "values" not in found:
    return ""
  return " / ".join(
    f"{found[part]:.0e} ({found[part + '_bound']:.0e})"
    for part in ("values", "gradients")
  )


def met(goal: Goal, rows) -> tuple[float | None, str]:
  """(how many times as fast, and of which forms), or (None, why not)."""
  first = next((r["shape"] for r in rows if r["what"] == goal.what), None)
  rows = [
    r for r in rows
    if (r["what"], r["shape"], r["direction"]) == (goal.what, first, BOTH)
  ]  # fmt: skip
  ours = lambda r: (
    r["default"] if goal.ours == "default" else r["form"].startswith(goal.ours)
  )
  sides = [
    [r for r in rows if r["kind"] == "ours" and ours(r)],
    [r for r in rows if r["form"].startswith(goal.against)],
  ]
  best = []
  for side in sides:
    timed = [r for r in side if "median_ms" in r]
    if not timed:
      why = side[0]["error"] if side else "not run"
      return None, f"not measured: {why}"
    best.append(min(timed, key=lambda r: r["median_ms"]))
  mine, other = best
  return other["median_ms"] / mine["median_ms"], (
    f"{mine['form']} {mine['median_ms']:.3g} ms, {other['form']} "
    f"{other['median_ms']:.3g} ms"
  )


def summary(rows) -> list[tuple[str, ...]]:
  """Our fastest form against the fastest other, of each case: cells, what
  loses first."""
  cases: dict[Any, dict[bool, dict[str, Any]]] = {}
  for r in rows:
    if "median_ms" in r and r["direction"] == BOTH:
      best = cases.setdefault((r["what"], r["shape"], r["dtype"]), {})
      own = r["kind"] == "ours"
      if own not in best or r["median_ms"] < best[own]["median_ms"]:
        best[own] = r
  found = []
  for names, best in cases.items():
    if len(best) == 2:
      mine, other = best[True], best[False]
      ratio = other["median_ms"] / mine["median_ms"]
      found.append((ratio, names, mine, other))
  return [
    (
      *names, mine["form"], _ms(mine["median_ms"]), other["form"],
      _ms(other["median_ms"]), f"{ratio:.2f}", _bound_by(mine),
    )
    for ratio, names, mine, other in sorted(found, key=lambda x: x[0])
  ]  # fmt: skip


def _bound_by(row) -> str:
  if "floor_ms" not in row:
    return ""
  what = "arithmetic" if row["of_flops"] > row["of_bytes"] else "memory"
  return f"{what}, {row['median_ms'] / row['floor_ms']:.1f}×"


def page(result: dict[str, Any]) -> str:
  """The Markdown page of a result, as the JSON file holds it."""
  rows, top = result["rows"], result["ceilings"]
  lines = [
    f"# Benchmarks, {result['suite']}",
    "",
    *(f"**{note}**\n" for note in result["notes"]),
    f"- device: {result['device']}, {result['devices']} of them; "
    f"{result['cores']} CPU cores",
    f"- date: {result['date']}; the run took {result['minutes']} minutes",
    f"- commit: {result['commit']}",
    f"- Python {result['python']}, JAX {result['jax']}{_versions(rows)}",
    f"- command: `{result['command']}`; seed {result['seed']}",
    f"- ceilings, measured in this run: a copy of {top['copy_bytes'] / 1e9:.3g}"
    f" GB {top['bytes_per_s'] / 1e12:.3g} TB/s (read and written), a bfloat16 "
    f"matrix product of {top['matmul_size']} {top['flops_per_s'] / 1e12:.4g} "
    "TFLOP/s",
    "",
    "× is how many times as fast as our XLA form (marked =). TFLOP/s and GB/s "
    "count what no form can do without; % is of the ceiling. The error is "
    "‖a − b‖ / ‖b‖ of values / gradients against the step loop in float32 on a "
    "short sequence, and in parentheses its bound; a form over it is not "
    "timed. A star marks the form that memzoo takes by itself. Programs were "
    "compiled side by side: compile times are upper bounds.",
  ]
  if GOALS[result["suite"]] and not result["interpret"]:
    lines += ["", "## Goals, forward and backward", "", *_goal_table(rows)]
  cells = summary(rows)
  if cells and not result["interpret"]:
    head = ("", "inputs", "dtype", "ours", "ms", "fastest other", "ms", "×")
    head += ("bound by, time over the floor",)
    lines += [
      "",
      "## Against others, what loses first",
      "",
      *table(head, cells),
    ]
  head = ("", "inputs", "dtype", "form", "direction", "ms", "min", "max", "×")
  head += ("TFLOP/s", "%", "GB/s", "%", "error", "MB", "compile s")
  lines += ["", "## All rows", "", *table(head, map(_cells, rows))]
  return "\n".join(lines) + "\n"


def _goal_table(rows):
  body = []
  for goal in GOALS["gpu"]:
    ratio, about = met(goal, rows)
    told = "" if ratio is None else f"{ratio:.2f}×"
    yes = "" if ratio is None else "yes" if ratio >= goal.bound else "no"
    body.append((goal.text, f"≥ {goal.bound:g}×", told, yes, about))
  return table(("ours, the other", "wanted", "measured", "met", ""), body)


def _versions(rows) -> str:
  found = {f"{k} {r[k]}" for r in rows for k in ("torch", "jax") if k in r}
  peers = sorted(found - {f"jax {rows[0].get('jax')}"} if rows else found)
  return f"; peers {', '.join(peers)}" if peers else ""


def _cells(row):
  form = row["form"] + (" *" if row["default"] else "")
  head = row["what"], row["shape"], row["dtype"], form, row["direction"]
  if "error" in row:
    rest = (row["error"].replace("|", "\\|"), *[""] * 7)
  else:
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    ratio = "=" if row.get("reference") == row["form"] else ratio
    rest = (
      *(_ms(row[k]) for k in ("median_ms", "min_ms", "max_ms")), ratio,
      f"{row['flops_per_s'] / 1e12:.3g}", _share(row, "of_flops"),
      f"{row['bytes_per_s'] / 1e9:.4g}", _share(row, "of_bytes"),
    )  # fmt: skip
  temp = f"{row['temp_bytes'] / 1e6:.1f}" if "temp_bytes" in row else ""
  compile_s = f"{row['compile_s']:.1f}" if "compile_s" in row else ""
  return *head, *rest, _errors(row), temp, compile_s


def _ms(x: float) -> str:
  return f"{x:.0f}" if x >= 1000 else f"{x:.4g}"
