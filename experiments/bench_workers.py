"""Processes of other interpreters that measure peers on a device, for
`experiments.bench_device`."""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from experiments import bench_kernels
from experiments.bench_kernels import Case, row, rows_of
from experiments.bench_parity import Options
from experiments.timing import DIRECTIONS

ROOT = pathlib.Path(__file__).resolve().parent.parent
MARK = "bench-rows "  # before what a worker says


class Worker:
  """A process of another interpreter that measures one case at a time.

  Args:
    python: the interpreter.
    module: `experiments.…`: it reads a JSON line a job, and answers with
      `MARK` and a JSON list of rows.
  """

  def __init__(self, python: str, module: str):
    self._command = [python, "-m", module]
    self._process, self._lines = None, queue.Queue()
    self._error = ""
    self._log = tempfile.TemporaryFile("w+")

  def start(self) -> None:
    """Starts it, where it has not been: importing takes a while."""
    if self._process or self._error:
      return
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
      self._process = subprocess.Popen(
        self._command, env=env, cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=self._log, text=True,
      )  # fmt: skip
    except OSError as error:
      self._error = f"{self._command[0]} does not start: {error.strerror}"
      return
    threading.Thread(target=self._read, daemon=True).start()

  def _read(self):
    for line in self._process.stdout:
      if line.startswith(MARK):
        self._lines.put(line.removeprefix(MARK))
    self._lines.put(None)

  def ask(self, job: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
    """Its rows for a job; a row of '' that says why where there are none."""
    self.start()
    if not self._error:
      try:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._lines.get(timeout=max(timeout, 1.0))
      except queue.Empty:
        self.stop()
        self._error = "out of time"
      except OSError:
        answer = None
      if not self._error and answer is None:
        self._error = self._last()
    if self._error:
      return [{"form": "", "error": self._error}]
    return json.loads(answer)

  def _last(self) -> str:
    code = self._process.wait()
    self._log.seek(0)
    said = (self._log.read().strip().splitlines() or ["no output"])[-1]
    return f"{self._command[0]} ended ({code}): {said}"[:200]

  def stop(self) -> None:
    if self._process:
      self._process.kill()
      self._process.wait()
      self._process.stdin.close()
      self._process.stdout.close()
    self._process = None
    self._log.close()


@dataclasses.dataclass
class Peers:
  """Who else is asked, in which order: name -> (worker, whether it has a
  case)."""

  workers: dict[str, tuple[Worker, Callable[[Case], bool]]]

  def start(self, cases) -> None:
    for worker, has in self.workers.values():
      if any(map(has, cases)):
        worker.start()

  def rows(self, case: Case, options: Options, left: float, limit: float):
    """Their rows of a case: form '' stands for the peer's name."""
    rows, end = [], time.monotonic() + left
    for name, (worker, has) in self.workers.items():
      if not has(case):
        continue
      job = {
        "case": case._asdict(), "directions": DIRECTIONS,
        "options": dataclasses.asdict(options) | {"memory_limit": limit},
        "parity": options.small(case)._asdict(),
      }  # fmt: skip
      for got in worker.ask(job, end - time.monotonic()):
        got["form"] = got["form"] or name
        if "direction" in got:
          rows.append(row(case, **got | {"kind": "peer"}))
        else:
          rows += rows_of(case, got["form"], got["error"])
    return rows

  def stop(self) -> None:
    for worker, _ in self.workers.values():
      worker.stop()


def peers(suite: str, peer_python: str | None, torch_python: str | None):
  """The peers of a suite, by this interpreter where none is given."""
  if suite == "tpu":
    return Peers({})
  jax_peer = Worker(peer_python or sys.executable, "experiments.bench_device")
  torch_peer = Worker(torch_python or sys.executable, "experiments.bench_torch")
  return Peers(
    {
      "flash-linear-attention": (torch_peer, bench_kernels.has_torch),
      bench_kernels.JLA_FORM: (jax_peer, bench_kernels.has_jla),
    }
  )
