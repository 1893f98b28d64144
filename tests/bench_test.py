"""experiments.bench: what it times, what it writes. No test looks at speed."""

import concurrent.futures
import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
  bench,
  bench_cases,
  bench_decode,
  bench_device,
  bench_kernels,
  bench_parity,
  bench_peers,
  bench_report,
  bench_torch,
  bench_workers,
  timing,
)
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


def test_a_token_by_hand_is_a_token():
  """The steps that decoding is held against compute what the cells do."""
  groups = list(bench_cases.decode_groups(TINY))
  assert {g.what for g in groups} == set(bench_decode.STEPS)
  rows = bench.run(groups, seconds=0.0)
  assert len(rows) == 3 * len(groups)
  for row in rows:
    assert "error" not in row, row
    assert row["reference"] == "by hand" and row["direction"] == "forward"
    assert row["difference"] < 1e-4, (row["what"], row["difference"])
    assert row["tokens_per_s"] == pytest.approx(1e3 / row["median_ms"])
  page = bench.report(
    {"suite": "cpu", **bench.machine(), "minutes": 0, "command": "toy", "rows": rows}
  )
  assert page.count("| by hand |") == len(groups) and "## One token" in page


def test_calls_in_a_row_are_shared_out():
  ticks = iter(range(10**6))
  calls = {"slow": lambda x: (None, x), "fast": lambda x: (None, x)}
  toy = dataclasses.replace(group(calls, directions=("forward",)), calls=10)
  rows = timing.measure(toy, 0, clock=lambda: next(ticks))
  # One tick a round, of ten calls.
  assert {r["median_ms"] for r in rows} == {100.0}


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
  memory = next(g for g in bench.GOALS["cpu"] if g.key == "temp_bytes")
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
    "bench: --suite=tpu needs a TPU; JAX runs on 'cpu' here; --interpret tries "
    "the suite without one"
  ]


def device_rows(forms, case=None, **more):
  """Rows of toy forms, compiled by one thread."""
  case = case or bench_kernels.Case(
    "linear_attention", "none", 1, 16, 1, 4, dtype="float32"
  )
  options = bench_parity.Options("gpu", True, 0.0, threads=1, **more)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    forms = {n: ("ours", f) for n, f in forms.items()}
    job = bench_device.Job(case, forms, options, pool, {})
    concurrent.futures.wait(job.futures())
    return job.rows({"flops_per_s": 1e12, "bytes_per_s": 1e9})


@pytest.mark.nans
def test_a_form_that_is_off_is_reported_and_not_timed():
  case = bench_kernels.Case(
    "linear_attention", "none", 1, 16, 1, 4, dtype="float32"
  )
  scan = functools.partial(bench_kernels.call, case, "scan")

  def slightly_off(*args):
    state, outputs = scan(*args)
    return state, outputs * 1.001

  @jax.custom_vjp
  def wrong_back(*args):
    return scan(*args)

  wrong_back.defvjp(
    lambda *args: jax.vjp(scan, *args),
    lambda pull, g: jax.tree.map(lambda x: 1.001 * x, pull(g)),
  )

  def unwritten(*args):
    state, outputs = scan(*args)
    return state, outputs.at[0, 3].set(jnp.nan)

  rows = device_rows(
    {"off": slightly_off, "back": wrong_back, "nan": unwritten, "scan": scan}
  )
  found = {(r["form"], r["direction"]): r for r in rows}
  assert len(found) == len(rows) == 8
  for form, part in (("off", "values"), ("back", "gradients"), ("nan", "nan")):
    for direction in timing.DIRECTIONS:
      row = found[form, direction]
      assert "median_ms" not in row and "FAILED parity" in row["error"]
      assert part in row["error"]
      assert row["error"] in bench_report.line(row)
  good = found["scan", "forward+backward"]
  assert good["parity"]["gradients"] < 1e-5 and good["ratio"] == 1
  # 16 tokens of 4 · 4 · 4 FLOP, three times; arguments, outputs and gradients.
  numbers = 2 * (16 + 3 * 64 + 64 + 16)
  seconds = good["median_ms"] / 1e3
  np.testing.assert_allclose(good["flops_per_s"] * seconds, 3 * 16 * 64)
  np.testing.assert_allclose(good["bytes_per_s"] * seconds, 4 * numbers)
  np.testing.assert_allclose(good["floor_ms"], 1e3 * 4 * numbers / 1e9)
  assert set(good) >= {
    "compile_s", "temp_bytes", "rounds", "calls", "min_ms", "max_ms",
    "tokens_per_s", "difference", "of_flops", "of_bytes",
  }  # fmt: skip


def test_full_size_outputs_are_compared():
  close, far = [jnp.ones(4)], [jnp.asarray([1.0, 1, 1, 1.2])]
  job = object.__new__(bench_device.Job)
  job._case = bench_kernels.Case("lstm")
  first, facts = {}, {"a": {}, "b": {}}
  job._compare("a", "forward", close, first, facts)
  job._compare("b", "forward", far, first, facts)
  assert facts["a"] == {"difference": 0.0}
  assert facts["b"]["error"].startswith("FAILED at full size: 1.0e-01")


def test_device_cases_are_what_is_asked():
  cases = bench_kernels.CASES
  headline = cases[0]
  assert headline.shape == "B=4 T=4096 H=16 K=V=128"
  assert headline.what == "delta_rule, scalar decay"
  assert headline.dtype == "bfloat16"
  assert len({(c.what, c.shape, c.dtype) for c in cases}) == len(cases)
  matrix = [c for c in cases if c.op in bench_kernels.MATRIX]
  assert {c.tokens for c in matrix} == {16384, 65536}
  assert {c.length for c in matrix} == {1024, 4096, 16384, 65536}
  assert {c.key for c in matrix} | {c.value for c in matrix} == {
    0,
    64,
    128,
    256,
  }
  assert {(c.op, c.decay) for c in matrix} == {
    (op, decay) for op in bench_kernels.MATRIX for decay in bench_kernels.DECAYS
  }
  assert [len(w) for w in bench_device.waves(cases)][:3] == [2, 3, 4]
  assert [c for w in bench_device.waves(cases) for c in w] == list(cases)
  # Both sides of every goal are measured.
  for goal in bench_report.GOALS["gpu"]:
    first = next(c for c in cases if c.what == goal.what)
    assert goal.ours == "default" or goal.ours in first.forms
    assert goal.against in first.forms or first.op in bench_kernels.MATRIX
  for op, decay in bench_torch.PEERS[bench_torch.FLA]:
    assert bench_kernels.has_torch(bench_kernels.Case(op, decay))


def test_time_runs_out_before_a_wave_that_would_not_fit(monkeypatch):
  now = [0.0]
  budget = bench_device.Budget(1.0, clock=lambda: now[0])
  seen = []
  for length in (10, 25, 5, 1):
    with budget.wave() as fits:
      seen.append(fits)
      now[0] += length if fits else 0
  assert seen == [True, True, False, False]  # 25 s are left, 25 were needed
  assert budget.left == 25
  slow = bench_device.Budget(10.0, clock=lambda: now[0])
  for length, fits_now in ((400, True), (100, True), (50, True), (1, False)):
    with slow.wave() as fits:
      assert fits == fits_now
      now[0] += length

  monkeypatch.setattr(bench_device, "ceilings", lambda _: {})
  found, shown = {}, []
  bench_device.run(
    bench_kernels.CASES[:3], bench_parity.Options("gpu", True),
    bench_device.Budget(0.0), bench_workers.Peers({}), found, show=shown.append,
  )  # fmt: skip
  assert found["rows"] == shown and len(shown) == 6
  assert {r["error"] for r in shown} == {"not run: 0 minutes were over"}


def test_peers_of_the_device_suites_that_are_absent_say_so(tmp_path):
  (tmp_path / "dies.py").write_text("raise SystemExit('no luck')")
  (tmp_path / "answers.py").write_text(
    "import sys\n"
    "for line in sys.stdin:\n"
    f'  print(\'noise\'); print(\'{bench_workers.MARK}[{{"form": "x", '
    '"error": "y"}]\', flush=True)\n'
  )
  case, options = bench_kernels.CASES[0], bench_parity.Options("gpu", True)

  def ask(python, module):
    peers = bench_workers.Peers(
      {"peer": (bench_workers.Worker(python, module), lambda _: True)}
    )
    try:
      peers.start([case])
      rows = [peers.rows(case, options, 60.0, 1e9) for _ in range(2)]
    finally:
      peers.stop()
    assert rows[0] == rows[1]
    assert [r["direction"] for r in rows[0]] == list(timing.DIRECTIONS)
    assert {(r["kind"], r["what"]) for r in rows[0]} == {("peer", case.what)}
    return rows[0][0]["form"], rows[0][0]["error"]

  old = os.environ.get("PYTHONPATH", "")
  os.environ["PYTHONPATH"] = str(tmp_path)
  try:
    form, error = ask("no-such-python", "dies")
    assert form == "peer" and "does not start: No such file" in error
    form, error = ask(sys.executable, "dies")
    assert form == "peer" and "ended (1): no luck" in error
    assert ask(sys.executable, "answers") == ("x", "y")
    name, error = ask(sys.executable, "experiments.bench_torch")
    assert name == "peer"
    assert "torch" in error or "finds no GPU" in error
  finally:
    os.environ["PYTHONPATH"] = old


@pytest.mark.parametrize("decay", sorted(bench_kernels.DECAYS))
@pytest.mark.parametrize("op", bench_kernels.MATRIX)
def test_the_step_loop_in_pytorch_is_ours(op, decay):
  torch = pytest.importorskip("torch")
  case = bench_kernels.Case(op, decay, 1, 7, 2, 3, 5, "float32")
  plain = case._asdict()
  generator = torch.Generator("cpu").manual_seed(0)
  s, q, k, v, *gates = bench_torch.inputs(torch, plain, generator, "cpu")
  want = bench_torch.step_loop(torch, plain, s, q, k, v, *gates)
  array = lambda x: jnp.asarray(x.numpy())
  names = {"g": "log_decay", "beta": "beta"}
  given = {
    names[n]: array(x) for n, x in zip(bench_torch.gate_names(plain), gates)
  }
  got = bench_kernels.call(case, "scan", *map(array, (s, q, k, v)), given)
  assert timing.relative(got[1], array(want[0])) < 1e-6
  assert timing.relative(got[0], array(want[1])) < 1e-6


def test_the_page_of_a_device_suite():
  def timed(kind, form, ms, what="delta_rule, scalar decay", **more):
    case = next(c for c in bench_kernels.CASES if c.what == what)
    facts = bench_device.summary([ms / 1e3] * 5, 2)
    facts |= bench_device.rates(
      (1e12, 1e9), facts, {"flops_per_s": 8e14, "bytes_per_s": 4e12}
    )
    row = bench_kernels.row(case, form, "forward+backward", kind, **facts)
    return row | {"jax": "1.2.3"} | more

  rows = [
    timed("ours", "pallas", 4.0), timed("ours", "pallas, C=32", 2.0),
    timed("ours", "chunk", 9.0, default=True, reference="chunk", ratio=1.0),
    timed("peer", "flash-linear-attention", 3.0, torch="9.9"),
    timed("ours", "pallas", 1.0, "lstm"),
    timed("peer", "other", 0.5, "lstm"),
  ]  # fmt: skip
  rows.append(
    bench_kernels.row(
      bench_kernels.CASES[0], "x", "forward", "peer", error="absent | so"
    )
  )
  goals = {g.text: bench_report.met(g, rows) for g in bench_report.GOALS["gpu"]}
  fla, jla, own = (v for n, v in goals.items() if n.startswith("gated"))
  assert fla[0] == 1.5 and "pallas, C=32 2 ms" in fla[1]
  assert jla == (None, "not measured: not run")
  assert own[0] == 4.5
  losing = bench_report.summary(rows)
  assert [r[0] for r in losing] == ["lstm", "delta_rule, scalar decay"]
  assert losing[0][7] == "0.50" and losing[1][3] == "pallas, C=32"
  # 1 TFLOP at 800 a second: 1.25 ms.
  assert losing[1][-1] == "arithmetic, 1.6×"
  result = {
    "suite": "gpu", **bench.machine(), "notes": ["a note"], "minutes": 8.7,
    "interpret": False, "seed": 11, "command": "toy", "rows": rows,
    "ceilings": {
      "copy_bytes": 1e9, "bytes_per_s": 4e12, "flops_per_s": 8e14,
      "matmul_size": 8192,
    },
  }  # fmt: skip
  page = bench_report.page(result)
  for said in ("a note", "4 TB/s", "800 TFLOP/s", "torch 9.9", "seed 11"):
    assert said in page
  assert "absent \\| so" in page and "| chunk * |" in page
  tables = {}
  for text in page.splitlines():
    if text.startswith("|"):
      tables.setdefault(text.replace("\\|", "").count("|"), 0)
  assert set(tables) == {6, 10, 17}


@pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="asks for what is here"
)
def test_the_gpu_suite_in_the_interpreter(tmp_path):
  """All of it, from the command to the files, on one small case."""
  command = [
    sys.executable, "-m", "experiments.bench", "--suite=gpu", "--interpret",
    "--only=hopfield", f"--workdir={tmp_path}", "--seed=1",
  ]  # fmt: skip
  done = subprocess.run(
    command, cwd=bench.ROOT, text=True, capture_output=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[0] == bench_device.MEANINGLESS
  result = json.loads((tmp_path / "gpu.json").read_text())
  assert result["interpret"] and result["seed"] == 1
  assert {(r["form"], r["direction"]) for r in result["rows"]} == {
    (f, d) for f in ("pallas", "dense") for d in timing.DIRECTIONS
  }
  for row in result["rows"]:
    assert "error" not in row and row["rounds"] >= bench_device.LEAST
    for part in ("values", "gradients"):
      assert 0 < row["parity"][part] <= row["parity"][f"{part}_bound"] < 0.05
  assert "have no meaning" in (tmp_path / "gpu.md").read_text()
