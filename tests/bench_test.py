"""experiments.bench: what it times, what it writes. No test looks at speed."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench, bench_cases, bench_peers, timing
import memzoo
from memzoo import ops

TINY = bench_cases.TINY
SAID = {
  "kind",
  "what",
  "form",
  "default",
  "shape",
  "dtype",
  "direction",
  "state",
  "reference",
}
MEASURED = {
  "compile_s", "temp_bytes", "rounds", "median_ms", "min_ms", "max_ms", "ratio", "ratios",
  "tokens_per_s", "difference",
}  # fmt: skip


def group(calls, *, length=4, reference=("slow",), **more):
  forms = timing.Forms(calls, (jnp.arange(float(length)),), "fast")
  return timing.Group("op", "toy", "T=4", 4, lambda: forms, reference, **more)


def test_every_op_and_cell_is_timed():
  everything = list(bench_cases.groups(TINY))
  cells = {g.what for g in everything if g.kind == "cell"}
  assert cells == set(memzoo.names())
  timed = {g.what.split(",")[0] for g in everything if g.kind == "op"}
  assert timed == {n for n in vars(ops) if callable(getattr(ops, n))} - {
    "batched"
  } | {"conv"}
  names = [(g.kind, g.what, g.shape) for g in everything]
  assert len(set(names)) == len(names)


def test_goals_name_rows_that_exist():
  full = bench_cases.FULL
  groups = [*bench_cases.groups(full), *bench_peers.groups(full)]
  for goal in bench.GOALS["cpu"]:
    of = goal.row
    found = [
      g for g in groups
      if (g.kind, g.what) == (of["kind"], of["what"]) and of["shape"] in g.shape
    ]  # fmt: skip
    assert len(found) == 1, goal
    assert of["direction"] in found[0].directions
    assert goal.against in ("", *found[0].reference)
    # The row of any other size is not taken for it.
    assert of["shape"] not in " ".join(
      g.shape for g in bench_cases.groups(TINY)
    )


def test_a_run_of_toy_sizes(tmp_path):
  groups = [
    *(
      g
      for g in bench_cases.op_groups(TINY)
      if g.what in ("conv", "linear_attention, no decay")
    ),
    bench_cases.cell_group("gru", 2, 5, d_model=4),
  ]
  rows = bench.run(groups, seconds=0.0)
  # Forms times directions: conv, linear_attention, gru.
  assert len(rows) == 2 * 2 + 2 * 2 + 2 * 2
  for row in rows:
    assert set(row) == SAID | MEASURED | {"jax"}
    assert row["rounds"] >= timing.ROUNDS[0]
    assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    assert row["difference"] < 1e-4
    assert row["ratio"] > 0
    assert row["reference"] == ("step" if row["kind"] == "cell" else "scan")
    if row["form"] == row["reference"]:
      assert row["ratio"] == 1 and row["difference"] == 0
  defaults = {r["what"]: r["form"] for r in rows if r["default"]}
  assert defaults == {
    "conv": "chunk",
    "linear_attention, no decay": "chunk",
    "gru": "scan",
  }
  state = {r["what"]: r["state"] for r in rows}
  assert state == {"conv": None, "linear_attention, no decay": None, "gru": 4}

  result = {
    "suite": "cpu",
    **bench.machine(),
    "minutes": 0.1,
    "command": "toy",
    "rows": rows,
  }
  bench.write(result, tmp_path / "new")
  assert json.loads((tmp_path / "new" / "cpu.json").read_text()) == result
  page = (tmp_path / "new" / "cpu.md").read_text()
  assert page.count("| conv |") == 4 and page.count("| gru |") == 4
  for said in (
    result["device"],
    result["commit"],
    jax.__version__,
    result["date"],
  ):
    assert said in page
  lines = [line for line in page.splitlines() if line.startswith("|")]
  assert {line.count("|") for line in lines} == {5, 13, 14}  # goals, ops, cells


def test_only_takes_a_part():
  calls = {"slow": lambda x: (None, 2 * x)}
  other = timing.Group(
    "cell", "other", "", 1, lambda: pytest.fail("was built"), ()
  )
  assert [r["what"] for r in bench.run([group(calls), other], seconds=0.0, only="^op t")] == [
    "toy", "toy",
  ]  # fmt: skip


def test_goals_are_read_from_their_rows():
  row = {
    "kind": "peer", "what": "lru", "form": "scan", "default": True, "shape": "B=2 T=2048 D=256",
    "direction": "forward+backward", "ratio": 1.2, "temp_bytes": 24e6,
    "ratios": {"memax, semigroup_scan": 3.0},
  }  # fmt: skip
  own, fastest = (
    g
    for g in bench.GOALS["cpu"]
    if (g.row["kind"], g.row["what"]) == ("peer", "lru")
  )
  assert bench._goal(own, bench.find([row], own))[2:] == ("3.00×", "yes")
  assert bench._goal(fastest, bench.find([row], fastest))[2:] == ("1.20×", "no")
  assert bench.find([row | {"default": False}], own) is None
  assert bench._goal(own, None)[2:] == ("not measured", "")
  memory = bench.GOALS["cpu"][-1]
  assert bench._goal(memory, row)[2:] == ("24.0 MB", "yes")
  assert bench._goal(memory, row | {"temp_bytes": 25e6})[2:] == (
    "25.0 MB",
    "no",
  )


def test_goals_are_measured_longer(monkeypatch):
  seen = {}
  measure = lambda group, seconds, **_: (
    seen.setdefault((group.kind, group.what), seconds) and []
  )
  monkeypatch.setattr(timing, "measure", measure)
  bench.run(bench_cases.op_groups(bench_cases.FULL), seconds=2.0)
  assert seen["op", "delta_rule, scalar decay"] == 8.0
  assert seen["op", "delta_rule, no decay"] == 2.0


def test_times_are_taken_in_turn_and_ratios_within_a_round():
  times = {"a": [1.0, 10.0, 1.0], "b": [0.5, 5.0, 0.5], "c": [4.0, 4.0, 4.0]}
  assert timing.fastest(times, ("a", "c", "absent")) == "a"  # by median
  assert timing.fastest(times, ("absent",)) == ""
  # Ten times slower in round 2: no reason for another ratio.
  assert timing.ratio(times["b"], times["a"]) == 2.0
  assert timing.ratio(times["c"], times["a"]) == 0.25

  ticks = iter(range(10**6))
  calls = {"slow": lambda x: (None, x), "fast": lambda x: (None, x)}
  rows = timing.measure(
    group(calls, directions=("forward",)), 40, clock=lambda: next(ticks)
  )
  assert {r["rounds"] for r in rows} == {8}  # of 5 ticks each
  assert {r["median_ms"] for r in rows} == {1000.0}
  assert {r["tokens_per_s"] for r in rows} == {4.0}


def test_gradients_are_those_of_every_floating_input():
  def call(tree, index, z):
    square = jnp.square(jnp.abs(z))
    return None, (
      tree["w"] * tree["w"] + index.astype(jnp.float32) * square,
      index,
    )

  w, z = (
    jnp.asarray([1.0, 2.0, 3.0]),
    jnp.asarray([1 + 1j, 2j, 0.5], jnp.complex64),
  )
  index = jnp.arange(3)
  run, compiled = timing.compile_call(
    call, ({"w": w}, index, z), "forward+backward"
  )
  outputs, (dw, dz) = run()
  assert len(outputs) == 1  # the indices have no cotangent
  cotangent = np.cos(0.7 * np.arange(3))
  np.testing.assert_allclose(dw, 2 * w * cotangent, rtol=1e-6)
  np.testing.assert_allclose(
    np.abs(dz), np.abs(2 * np.arange(3) * np.asarray(z) * cotangent), rtol=1e-5
  )
  assert compiled.memory_analysis().temp_size_in_bytes >= 0


def test_a_difference_between_forms_is_reported():
  calls = {
    "slow": lambda x: (None, x),
    "fast": lambda x: (None, x * jnp.asarray([1.0, 1, 1, 2])),
  }
  _, row, _, back = timing.measure(group(calls), 0.0)
  inputs = np.arange(4.0)
  np.testing.assert_allclose(
    row["difference"], 3 / np.linalg.norm(inputs), rtol=1e-6
  )
  assert back["difference"] > 0.1
  assert timing.relative([jnp.ones(2)], [jnp.ones(3)]) is None
  # A gradient that is zero but for rounding does not count.
  assert (
    timing.relative(
      [jnp.ones(2), jnp.full(2, 1e-9)], [jnp.ones(2), jnp.zeros(2)]
    )
    < 1e-2
  )


def test_what_cannot_run_says_why():
  def refuse(x):
    raise NotImplementedError("no such form\nand more")

  calls = {"slow": lambda x: (None, x), "fast": refuse}
  good, bad = timing.measure(group(calls, directions=("forward",)), 0.0)
  assert good["ratio"] == 1
  assert (
    bad["error"] == "NotImplementedError: no such form"
    and "median_ms" not in bad
  )

  big = {
    "slow": lambda x: (
      None,
      jnp.sin(jnp.outer(x, x)) @ jnp.cos(jnp.outer(x, x)),
    )
  }
  toy = group(big, length=64, directions=("forward",))
  (row,) = timing.measure(toy, 0.0, memory_limit=1000)
  assert row["error"].startswith("not run: needs") and row["temp_bytes"] > 1000

  def build():
    import a_package_that_is_absent  # noqa: F401

  absent = timing.Group(
    "peer", "x", "", 1, build, ("y",), ("forward+backward",)
  )
  (row,) = timing.measure(absent, 0.0)
  assert (
    row["error"]
    == "ModuleNotFoundError: No module named 'a_package_that_is_absent'"
  )
  page = bench.table(("",), [bench._cells(row, "peer")])
  assert "a_package_that_is_absent" in page[-1]


def test_peers_run_in_another_interpreter():
  options = dict(
    seconds=0.0, memory_limit=4e9, only="peer delta_rule, scalar", sizes="tiny"
  )
  (row,) = bench.run_peers(None, suite="cpu", **options)
  assert row["error"] == bench.NO_PEERS
  (row,) = bench.run_peers("no-such-python", suite="cpu", **options)
  assert "--peer_python does not start: No such file" in row["error"]
  rows = bench.run_peers(sys.executable, suite="cpu", **options)
  if len(rows) == 1:
    assert rows[0]["error"] == "ModuleNotFoundError: No module named 'jla'"
  else:  # the peer is installed here
    assert {r["reference"] for r in rows} == {
      "jax-linear-attention, chunks of 16"
    }
    assert max(r["difference"] for r in rows) < 1e-4
  assert {(r["kind"], r["what"]) for r in rows} == {
    ("peer", "delta_rule, scalar decay")
  }
  assert {r["jax"] for r in rows} == {jax.__version__}


@pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="asks for what is here"
)
def test_a_device_that_is_absent_is_one_error():
  done = subprocess.run(
    [sys.executable, "-m", "experiments.bench", "--suite=tpu"], cwd=bench.ROOT, text=True,
    capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert done.returncode == 1
  assert done.stderr.splitlines() == [
    "bench: --suite=tpu needs a TPU; JAX runs on 'cpu' here"
  ]
