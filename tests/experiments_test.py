"""The programs of `experiments/`, as a user starts them."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import memzoo

ROOT = pathlib.Path(__file__).parent.parent
EVERY = sorted((ROOT / "experiments").glob("*/*.flags"))
GRIDS = [path for path in EVERY if "\n--cells=" in path.read_text()]
FILES = [path for path in EVERY if path not in GRIDS]


def name(path):
  return f"{path.parent.name}/{path.name}"


def start(program, *arguments, ok=True):
  """Runs a program from the checkout: its stdout, or its error."""
  done = subprocess.run(
    [sys.executable, "-m", f"experiments.{program}", *map(str, arguments)],
    cwd=ROOT, capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert (done.returncode == 0) == ok, done.stdout + done.stderr
  return done.stdout if ok else done.stdout + done.stderr


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_flag_file_says_what_it_is(path):
  """Its header has the command, the time, the device and the result."""
  header = [line for line in path.read_text().splitlines() if line[:1] == "#"]
  text = " ".join(line.strip("# ") for line in header)
  relative = path.relative_to(ROOT)
  assert f"--flagfile={relative}" in text, "no command"
  for word in ("Expected", "cores"):
    assert word in text, f"the header has no {word!r}"
  assert "Paper" in text or "Claim" in text, "no source"
  assert re.search(r"\d{4}-\d\d-\d\d", text), "no date"


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=name)
def test_flag_file_runs(path, tmp_path):
  """For two steps; what is for a GPU, at a size for a CPU."""
  cells = re.search(r"^--cell=(.*)$", path.read_text(), re.MULTILINE)[1].split(
    ","
  )
  small = ("--d_model=32", f"--depth={len(cells)}", "--task_options=length=32")
  out = start(
    "train", f"--flagfile={path}", f"--workdir={tmp_path}", "--steps=2",
    "--warmup=1", "--log_every=1", "--eval_every=0", "--batch_size=2",
    *(small if path.parent.name.endswith("_gpu") else ()),
  )  # fmt: skip
  result = json.loads(out.splitlines()[-1])
  assert result["step"] == 2 and result["skipped"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", GRIDS, ids=name)
def test_grid_runs(path, tmp_path):
  """On the first of its tasks, at the first of its sizes."""
  task = re.search(r"--tasks=([^,\n]*)", path.read_text())[1]
  sizes = re.search(r"--sizes=([^;\n]*)", path.read_text())
  start(
    "compare", f"--flagfile={path}", f"--workdir={tmp_path}", "--steps=2",
    "--warmup=1", "--batch_size=2", "--seeds=0", "--learning_rates=1e-3",
    "--eval_every=0", f"--tasks={task}",
    *([f"--sizes={sizes[1]}"] if sizes else ()),
  )  # fmt: skip
  assert (tmp_path / "table.md").exists()


def test_compare_goes_on_where_it_stopped(tmp_path):
  """A sweep, a table and a figure; the second start computes nothing."""
  command = (
    "compare", "--cells=gru,linear_attention", "--tasks=mqar_small",
    "--learning_rates=1e-3,3e-3", "--steps=2", "--warmup=1", "--batch_size=2",
    "--d_model=8", "--depth=1", "--task_options=num_test=4",
    f"--workdir={tmp_path}",
  )  # fmt: skip
  first = start(*command)
  assert first.count("==") == 4  # two rates, for two memories
  table = json.loads((tmp_path / "table.json").read_text())
  assert {r["cell"] for r in table} == {"gru", "linear_attention"}
  picture = (tmp_path / "recall.png").read_bytes()
  assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000
  results = tmp_path / "results.jsonl"
  lines = results.read_text().splitlines()
  assert len(lines) == 4 + 2  # and which two are reported
  # A line cut by a crash is dropped, and its run alone is done again.
  results.write_text("\n".join(lines[:3]) + "\n" + lines[3][:50])
  second = start(*command)
  assert second.count("==") == 1
  again = json.loads((tmp_path / "table.json").read_text())
  keep = lambda rows: [(r["cell"], r["accuracy"], r["loss"]) for r in rows]
  assert keep(again) == keep(table), "the same run gives the same numbers"


@pytest.mark.slow
def test_compare_adds_sizes_lengths_and_jobs(tmp_path):
  """Two processes, two sizes, another length; a wider grid adds its own."""
  command = (
    "compare", "--cells=linear_attention", "--tasks=induction_small",
    "--learning_rates=1e-3", "--steps=4", "--warmup=1", "--batch_size=2",
    "--sizes=d_model=8;d_model=8,num_heads=2", "--depth=1", "--eval_every=2",
    "--task_options=num_test=4,length=8", "--final_options=length=16|length=32",
    "--jobs=2", f"--workdir={tmp_path}",
  )  # fmt: skip
  assert start(*command, "--seeds=0").count("==") == 2
  assert start(*command, "--seeds=0,1").count("==") == 2
  table = json.loads((tmp_path / "table.json").read_text())
  assert [r["seeds"] for r in table] == [2, 2]
  assert {r["size"] for r in table} == {"d_model=8", "d_model=8,num_heads=2"}
  assert len({r["state_size"] for r in table}) == 2
  assert set(table[0]["final"]) == {"length=16", "length=32"}
  for name in ("curves", "recall", "lengths", "cost"):
    picture = (tmp_path / f"{name}.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n", name
  lines = (tmp_path / "table.csv").read_text().splitlines()
  assert len(lines) == 3 and lines[0].startswith("task,cell,size,seeds")
  # Without processes the same runs give the same numbers.
  alone = start(*command[:-2], "--seeds=0", f"--workdir={tmp_path / 'alone'}")
  assert alone.count("==") == 2
  rows = lambda path: {
    json.loads(line)["key"]: json.loads(line)["metrics"]
    for line in path.read_text().splitlines()
    if "report" not in json.loads(line)
  }
  both = rows(tmp_path / "results.jsonl")
  for name, metrics in rows(tmp_path / "alone" / "results.jsonl").items():
    assert both[name] == metrics


def test_compare_says_which_run_failed(tmp_path):
  out = start(
    "compare", "--cells=gru", "--tasks=mqar_small", "--jobs=2", "--steps=2",
    "--warmup=5", f"--workdir={tmp_path}", ok=False,
  )  # fmt: skip
  assert "a run failed" in out and "warmup 5" in out
  assert "Traceback" not in out


@pytest.mark.slow
def test_positions_of_a_trained_model(tmp_path):
  text = tmp_path / "text"
  text.write_bytes(bytes(range(32, 96)) * 40)  # what follows is certain
  start(
    "train", "--cell=gru", "--task=text", "--d_model=8", "--depth=1",
    f"--task_options=path={text},length=16", "--steps=2", "--warmup=1",
    "--batch_size=2", f"--workdir={tmp_path / 'run'}",
  )  # fmt: skip
  out = start(
    "positions", f"--runs={tmp_path}/run", "--length=24", "--windows=3",
    "--batch_size=2", f"--workdir={tmp_path}",
  )  # fmt: skip
  assert "| memory | state, floats | 0 | 1 | 2–3 | 4–7 | 8–15 | 16–23 |" in out
  (row,) = json.loads((tmp_path / "positions.json").read_text())
  assert row["cell"] == "gru" and len(row["bits"]) == 24
  assert (tmp_path / "positions.png").read_bytes()[:4] == b"\x89PNG"
  out = start("positions", "--runs=nowhere", "--workdir=x", ok=False)
  assert "--runs (that exist)" in out


def test_positions_of_a_known_predictor():
  from experiments import positions

  def uniform(state, tokens):
    return state, jax.numpy.zeros((*tokens.shape, 256))

  data = np.arange(100, dtype=np.uint8)
  bits = positions.measure(uniform, data, 8, 5, 2)
  np.testing.assert_allclose(bits, np.full(8, 8.0), rtol=1e-6)
  with pytest.raises(ValueError, match="the text has 100 bytes, not 101"):
    positions.measure(uniform, data, 100, 1, 1)


def test_regret_of_a_known_predictor():
  """The uniform predictor against the closed sum."""
  from experiments import regret
  from memzoo import tasks

  task = tasks.make("bernoulli_small", length=8)

  def uniform(state, tokens):
    return state, jax.numpy.zeros((*tokens.shape, 2))

  found = regret.measure(uniform, task, 40, 20)
  batches = [task.batch(0, step, 20, "test") for step in range(2)]
  logs = np.full((20, 8, 2), np.log(0.5))
  want = np.concatenate([task.regret(logs, batch) for batch in batches])
  np.testing.assert_allclose(found["regret"][-1], want.mean(), rtol=1e-5)
  np.testing.assert_allclose(found["bayes"], 8 - want.mean(), rtol=1e-5)


@pytest.mark.slow
def test_regret_of_a_trained_model(tmp_path):
  start(
    "train", "--cell=gru", "--task=bernoulli_small", "--d_model=8", "--depth=1",
    "--task_options=num_test=4,length=8", "--steps=2", "--warmup=1",
    "--batch_size=2", f"--workdir={tmp_path / 'run'}",
  )  # fmt: skip
  out = start(
    "regret", f"--runs={tmp_path}/run", "--length=12", "--sequences=8",
    "--batch_size=4", f"--workdir={tmp_path}",
  )  # fmt: skip
  assert "bits above Bayes'" in out and "on 12 bits" in out
  assert (tmp_path / "regret.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
  "arguments,message",
  [
    (["train", "--cell=gruu"], "did you mean 'gru'"),
    (["train", "--task=mqar_smal"], "mqar_small"),
    (["train", "--stepz=3"], "Unknown command line flag 'stepz'"),
    (["train", "--platform=tpu"], "no tpu"),
    (["compare", "--cells=gru"], "workdir"),
    (["bench", "--suite=gpu"], "gpu"),
  ],
)
def test_wrong_flags(arguments, message):
  out = start(*arguments, ok=False)
  assert message in out
  assert "Traceback" not in out


@pytest.mark.nans
def test_stream_is_what_one_call_gives():
  """And a memory that grows without bound is told."""
  from experiments import stream

  cell = memzoo.tiny("lru")
  result = stream.measure(cell, steps=64, segment=8, prefix=16)
  assert result["steps"] == 64 and result["finite"]
  assert result["error"] < 1e-6 and result["largest"] < 100
  assert result["state_size"] == memzoo.state_size(cell)

  @dataclasses.dataclass(frozen=True)
  class Growing(memzoo.Cell):
    d_model: int = 2

    def init(self, key):
      return {}

    def initial_state(self, params, key=None):
      return jax.numpy.ones(self.d_model)

    def step(self, params, state, x):
      return 1e6 * state + x, x

  result = stream.measure(Growing(), 64, 8, 16)
  assert not result["finite"]
  assert stream.row("growing", result)[2] == "NO"
