"""Times every op and every cell, form against form and against peers.

  python -m experiments.bench --suite=cpu

prints the rows and writes `benchmarks/cpu.json` and `benchmarks/cpu.md`. Peers
are other people's packages, in an environment of their own, in which the forms
of memzoo that they are held against run too:

  python3.12 -m venv .venv-peers
  .venv-peers/bin/python -m pip install jax-linear-attention==0.1.0 \\
    memax==0.1.1 absl-py
  python -m experiments.bench --suite=cpu \\
    --peer_python=.venv-peers/bin/python

`--only=delta_rule` runs a part, and prints it alone unless `--out` is given.
Leave the machine alone meanwhile: ratios bear a busy machine, times do not.

  python -m experiments.bench --suite=gpu

and `--suite=tpu` time kernels on such a device (`experiments.bench_device`), in
less than ten minutes, and write `benchmarks/gpu.json` and `gpu.md`. Without the
device `--interpret` tries the suite at toy sizes, for its numbers alone. The
suite `tpu` has not been run on a TPU.
"""

from collections.abc import Iterable
import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from absl import app, flags, logging
import jax

from experiments import bench_cases, timing

FLAGS = flags.FLAGS

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {"full": bench_cases.FULL, "tiny": bench_cases.TINY}
SUITES = ("cpu", "gpu", "tpu")
STATEFUL = ("cell", "chunked cell", "diagonal cell", "decode")
NO_PEERS = "not measured: --peer_python was not given"


class Goal(NamedTuple):
  """What a row is expected to reach at full size.

  Attributes:
    text: for people.
    row: what finds the row: values of its keys; a shape may be a part of one.
    key: of the row: 'ratio' or 'temp_bytes'.
    bound: at least this ratio, fewer than these bytes.
    against: the form that a ratio is to; the row's reference by default.
  """

  text: str
  row: dict[str, Any]
  key: str
  bound: float
  against: str = ""


def _row(kind, what, shape="B=2 T=2048", **more):
  which = {"kind": kind, "what": what, "shape": shape}
  return which | {"direction": "forward+backward", **more}


def _decode_goals():
  """A token through the library costs at most 1.2 times one by hand."""
  for name, options in bench_cases.decode_cells(bench_cases.FULL).items():
    shape = f"D={options['d_model']}"
    row = _row("decode", name, shape, direction="forward", form="memzoo.scan")
    text = f"a token of {name}, against a step by hand (forward)"
    yield Goal(text, row, "ratio", 1 / 1.2)


_CHOSEN, _WIDE = {"default": True}, "B=2 T=2048 D=256"
GOALS = {
  "cpu": (
    Goal(
      "gated delta rule in chunks, against its step loop",
      _row("op", "delta_rule, scalar decay", form="chunk"), "ratio", 5.0,
    ),
    Goal(
      "the same, against jax-linear-attention in its default chunks",
      _row("peer", "delta_rule, scalar decay", form="chunk"), "ratio", 2.3,
      against="jax-linear-attention, chunks of 64",
    ),
    Goal(
      "the same, against jax-linear-attention in its fastest chunks",
      _row("peer", "delta_rule, scalar decay", form="chunk"), "ratio", 2.3,
    ),
    Goal(
      "linear attention in chunks, against its step loop",
      _row("op", "linear_attention, no decay", form="chunk"), "ratio", 4.0,
    ),
    Goal(
      "LRU cell by default, against its step loop",
      _row("cell", "lru", _WIDE, **_CHOSEN), "ratio", 2.5,
    ),
    Goal(
      "the same, against memax's LRU with its own scan",
      _row("peer", "lru", _WIDE, **_CHOSEN), "ratio", 1.5,
      against="memax, semigroup_scan",
    ),
    Goal(
      "the same, against memax's LRU with its fastest scan",
      _row("peer", "lru", _WIDE, **_CHOSEN), "ratio", 1.5,
    ),
    Goal(
      "Mamba cell by default, temporary memory",
      _row("cell", "mamba", "B=1 T=4096", **_CHOSEN), "temp_bytes", 25e6,
    ),
    Goal(
      "selective scan by default, against memax's S6 with its own scan",
      _row("peer", "s6", "B=2 T=2048", **_CHOSEN), "ratio", 1.5,
      against="memax, semigroup_scan",
    ),
    Goal(
      "the same, against memax's S6 with its fastest scan",
      _row("peer", "s6", "B=2 T=2048", **_CHOSEN), "ratio", 1.5,
    ),
    *_decode_goals(),
  ),
}  # fmt: skip


def define() -> None:
  """Defines the flags; not on import, so that others can use the rest."""
  flags.DEFINE_enum("suite", "cpu", SUITES, "Where to run.")
  flags.DEFINE_string("peer_python", None, "An interpreter with the peers.")
  flags.DEFINE_string("only", "", "Regular expression on group names.")
  flags.DEFINE_float("seconds", 2.0, "Of rounds, a group and direction.", 0.0)
  flags.DEFINE_float("memory_limit", 4.0, "GB; what needs more is not run.")
  flags.DEFINE_enum("sizes", "full", sorted(SIZES), "'tiny' tries the script.")
  flags.DEFINE_string("out", "benchmarks", "Folder of the tables.")
  of_device = "Of the suites gpu and tpu: "
  flags.DEFINE_float(
    "minutes", 9.0, of_device + "rows that do not fit are not run.", 0.0
  )
  flags.DEFINE_integer("seed", None, of_device + "by default a new one.")
  flags.DEFINE_string(
    "torch_python", None,
    of_device + "an interpreter with flash-linear-attention; this one by "
    "default, as for --peer_python.",
  )  # fmt: skip
  flags.DEFINE_bool(
    "interpret", False, of_device + "on any machine, at toy sizes."
  )
  flags.DEFINE_string(
    "workdir", None, "Folder of the tables of --interpret; none by default."
  )
  flags.DEFINE_string("peer_worker", None, "For this script's own use.")


def check_platform(suite: str) -> None:
  """Makes JAX run where `suite` says.

  Raises:
    RuntimeError: where the machine has no such device.
  """
  if suite == "cpu":
    jax.config.update("jax_platforms", "cpu")
  found = jax.default_backend()
  if {"cuda": "gpu", "rocm": "gpu"}.get(found, found) != suite:
    raise RuntimeError(
      f"bench: --suite={suite} needs a {suite.upper()}; JAX runs on {found!r} "
      "here"
      + ("" if suite == "cpu" else "; --interpret tries the suite without one")
    )


def run(
  groups: Iterable[timing.Group],
  *,
  seconds: float,
  memory_limit: float = 4e9,
  only: str = "",
) -> list[dict[str, Any]]:
  """Rows of the groups whose name matches `only`; each is printed.

  Groups that a goal looks at are measured four times as long as others.
  """
  rows = []
  goals = [g.row for goals in GOALS.values() for g in goals]
  for group in groups:
    if re.search(only, f"{group.kind} {group.what}"):
      judged = any(
        (g["kind"], g["what"]) == (group.kind, group.what)
        and g["shape"] in group.shape
        for g in goals
      )
      time = 4 * seconds if judged else seconds
      for row in timing.measure(group, time, memory_limit=memory_limit):
        row["jax"] = jax.__version__
        rows.append(row)
        print(line(row), flush=True)
  return rows


def run_peers(
  python: str | None, *, seconds: float, memory_limit: float, only: str,
  sizes: str, suite: str,
) -> list[dict[str, Any]]:  # fmt: skip
  """Rows of `experiments.bench_peers`, measured by another interpreter."""
  if not python:
    return [_no_peers(NO_PEERS)]
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "peers.json"
    command = [
      python, "-m", "experiments.bench", f"--peer_worker={out}",
      f"--suite={suite}", f"--seconds={seconds}", f"--only={only}",
      f"--memory_limit={memory_limit / 1e9}", f"--sizes={sizes}",
    ]  # fmt: skip
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
      done = subprocess.run(
        command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True
      )
    except OSError as error:
      return [_no_peers(f"--peer_python does not start: {error.strerror}")]
    if done.returncode or not out.exists():
      last = (done.stderr.strip().splitlines() or ["no output"])[-1]
      return [_no_peers(f"--peer_python failed ({done.returncode}): {last}")]
    return json.loads(out.read_text())


def _no_peers(error):
  group = timing.Group("peer", "all", "", 0, lambda: None, ())
  return timing.row(group, "", "", "", error=error)


def line(row) -> str:
  """A row for the terminal."""
  head = f"{row['kind']} {row['what']} [{row['shape']}] {row['form']} "
  head += row["direction"]
  if "error" in row:
    return f"{head}: {row['error']}"
  ratio = "" if row["ratio"] is None else f"  ×{row['ratio']:.2f}"
  return (
    f"{head}: {row['median_ms']:.2f} ms ({row['min_ms']:.2f} … "
    f"{row['max_ms']:.2f}, {row['rounds']} rounds){ratio}  "
    f"{row['temp_bytes'] / 1e6:.1f} MB"
  )


def find(rows, goal: Goal):
  """The row of a goal, or None."""
  for row in rows:
    if all(
      v in row[k] if k == "shape" else row[k] == v for k, v in goal.row.items()
    ):
      return row
  return None


def machine() -> dict[str, Any]:
  """The machine, the code and the moment."""
  device = jax.devices()[0]
  name = device.device_kind
  if device.platform == "cpu":
    name = _cpu()
  return {
    "device": name,
    "devices": jax.device_count(),
    "cores": len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count(),
    "load_before": round(os.getloadavg()[0], 2)
    if hasattr(os, "getloadavg")
    else None,
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    "commit": _commit(),
    "python": platform.python_version(),
    "jax": jax.__version__,
  }


def command() -> str:
  """How this was started, without paths of interpreters."""
  return re.sub(
    r"(--?(?:peer|torch)_python[= ])\S+", r"\1PYTHON",
    " ".join(["python -m experiments.bench", *sys.argv[1:]]),
  )  # fmt: skip


def _cpu() -> str:
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    return platform.processor() or platform.machine()
  found = re.search(r"model name\s*:\s*(.+)", text)
  return found.group(1).strip() if found else platform.machine()


def _commit() -> str:
  def git(*args):
    return subprocess.run(
      ("git", "-C", str(ROOT), *args), capture_output=True, text=True,
      check=True,
    ).stdout.strip()  # fmt: skip

  try:
    changed = git(
      "status", "--porcelain", "--", "memzoo", "kernels", "experiments"
    )
    return git("rev-parse", "--short=12", "HEAD") + (
      ", with changes" if changed else ""
    )
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def report(result: dict[str, Any]) -> str:
  """The Markdown page of a result, as the JSON file holds it."""
  rows = result["rows"]
  peers = sorted({r["jax"] for r in rows if r["kind"] == "peer" and "jax" in r})
  lines = [
    f"# Benchmarks, {result['suite']}",
    "",
    f"- device: {result['device']}, {result['cores']} cores",
    f"- date: {result['date']}; load average at the start "
    f"{result['load_before']}; the run took {result['minutes']} minutes",
    f"- commit: {result['commit']}",
    f"- Python {result['python']}, JAX {result['jax']}"
    + (f"; against peers JAX {', '.join(peers)}" if peers else ""),
    f"- command: `{result['command']}`",
    "",
    "Forms of a group run in turn; times are over all rounds. × is how many "
    "times as fast as the group's reference (marked =), the median of ratios "
    "taken within one round. A star marks the form that memzoo takes by "
    "itself. MB is temporary memory, the compiler's figure; what is passed in "
    "and out is not in it." + _agreement(rows),
  ]
  goals = [(g, find(rows, g)) for g in GOALS[result["suite"]]]
  if goals:
    head = ("forward and backward by default", "wanted", "measured", "met")
    body = [_goal(goal, row) for goal, row in goals]
    lines += ["", "## Goals", "", *table(head, body)]
  for kind, title in (
    ("op", "Ops"), ("cell", "Cells"),
    ("chunked cell", "Matrix and test-time memories in chunks"),
    ("diagonal cell", "Diagonal recurrences"),
    ("decode", "One token of a diagonal recurrence"),
    ("peer", "Against other packages"),
  ):  # fmt: skip
    chosen = [r for r in rows if r["kind"] == kind]
    if chosen:
      head = ("", "form", "inputs", "dtype", "direction", "ms", "min", "max")
      head += ("×", "MB", "1,000 tokens/s")
      head += ("state",) if kind in STATEFUL else ()
      head += ("compile s",)
      body = [_cells(row, kind) for row in chosen]
      lines += ["", f"## {title}", "", *table(head, body)]
  return "\n".join(lines) + "\n"


def _agreement(rows) -> str:
  worst = max(
    (r for r in rows if r.get("difference") is not None),
    key=lambda r: r["difference"], default=None,
  )  # fmt: skip
  if worst is None:
    return ""
  return (
    " Forms were held against their reference while they ran: the largest "
    f"relative difference of an output or gradient is "
    f"{worst['difference']:.0e} ({worst['what']}, {worst['form']})."
  )


def _goal(goal: Goal, row):
  ratio = goal.key == "ratio"
  wanted = f"≥ {goal.bound:.3g}×" if ratio else f"< {goal.bound / 1e6:g} MB"
  value = None if row is None else row.get(goal.key)
  if value is not None and goal.against:
    value = row["ratios"].get(goal.against)
  if value is None:
    why = "not measured"
    return goal.text, wanted, why if row is None else row.get("error", why), ""
  met = value >= goal.bound if ratio else value < goal.bound
  shown = f"{value:.2f}×" if ratio else f"{value / 1e6:.1f} MB"
  return goal.text, wanted, shown, "yes" if met else "no"


def _cells(row, kind):
  form = row["form"] + (" *" if row["default"] else "")
  head = row["what"], form, row["shape"], row["dtype"], row["direction"]
  if "error" in row:
    temp = f"{row['temp_bytes'] / 1e6:.1f}" if "temp_bytes" in row else ""
    rest = row["error"], "", "", "", temp, ""
  else:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    ratio = "=" if row["form"] == row["reference"] else ratio
    rest = (
      *(_ms(row[k]) for k in ("median_ms", "min_ms", "max_ms")), ratio,
      f"{row['temp_bytes'] / 1e6:.1f}", f"{row['tokens_per_s'] / 1e3:,.0f}",
    )  # fmt: skip
  state = (f"{row['state']:,}",) if kind in STATEFUL else ()
  compile_s = f"{row['compile_s']:.1f}" if "compile_s" in row else ""
  return *head, *rest, *state, compile_s


def _ms(x: float) -> str:
  return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def table(head, body) -> list[str]:
  """A Markdown table."""
  rows = [head, ["---"] * len(head), *body]
  return ["| " + " | ".join(map(str, r)) + " |" for r in rows]


def write(result: dict[str, Any], folder: pathlib.Path) -> None:
  """Writes `<suite>.json` and `<suite>.md`."""
  folder.mkdir(parents=True, exist_ok=True)
  name = folder / result["suite"]
  text = json.dumps(result, indent=1) + "\n"
  name.with_suffix(".json").write_text(text)
  name.with_suffix(".md").write_text(report(result))


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  if FLAGS.suite != "cpu":
    from experiments import bench_device

    # Peers' processes need some of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    bench_device.main(FLAGS)
    return
  if FLAGS.interpret:
    raise app.UsageError("--interpret is of the suites gpu and tpu")
  try:
    check_platform(FLAGS.suite)
  except RuntimeError as error:
    sys.exit(str(error))
  # Compile times are those of a machine that has not seen the code.
  jax.config.update("jax_enable_compilation_cache", False)
  sizes = SIZES[FLAGS.sizes]
  options = dict(
    seconds=FLAGS.seconds, memory_limit=FLAGS.memory_limit * 1e9,
    only=FLAGS.only,
  )  # fmt: skip
  if FLAGS.peer_worker:
    from experiments import bench_peers

    rows = run(bench_peers.groups(sizes), **options)
    pathlib.Path(FLAGS.peer_worker).write_text(json.dumps(rows))
    return
  result = {"suite": FLAGS.suite, **machine()}
  began = datetime.datetime.now()
  rows = run(bench_cases.groups(sizes), **options)
  rows += run_peers(
    FLAGS.peer_python, sizes=FLAGS.sizes, suite=FLAGS.suite, **options
  )
  took = datetime.datetime.now() - began
  result |= {
    "minutes": round(took.total_seconds() / 60, 1),
    "command": command(),
    "rows": rows,
  }
  partial = FLAGS.only or FLAGS.sizes != "full"
  if partial and not FLAGS["out"].present:
    return
  write(result, pathlib.Path(FLAGS.out))
  print(f"wrote {FLAGS.out}/{FLAGS.suite}.json and .md")


if __name__ == "__main__":
  define()
  app.run(main)
