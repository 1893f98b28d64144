"""The suites `gpu` and `tpu` of `experiments.bench`: kernels on the device.

First of all parity: each form, forward and backward, against the step loop in
float32 at the highest precision, on a short sequence of fresh random numbers.
What is off by more than its bound is reported and not timed. Then times, at
the sizes of `experiments.bench_kernels`, many calls to a wait, and what of the
device's measured ceilings they reach. The programs of a wave of cases are
compiled side by side, and nothing is timed meanwhile.

Peers run in processes of their own, one case at a time, while this one waits:
`bench_workers` starts this module or `experiments.bench_torch` by another
interpreter. A TPU serves one process, so there jax-linear-attention runs in
this one.

The suite `tpu` has not been run on a TPU.
"""

from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments import bench_kernels, timing
from experiments.bench_kernels import Case, row, rows_of
from experiments.bench_parity import (
  Options,
  Parity,
  both,
  build,
  cotangents,
  failure,
  floats,
  result,
)
from experiments.bench_workers import MARK, Peers, peers
from experiments.timing import DIRECTIONS

WAVES = (2, 3, 4)  # cases in a wave; the last number goes on
RESERVE = 90  # seconds, which most waves need
LEAST = 5  # rounds
SYNC = 0.02  # seconds of calls to a wait
CACHE = 256e6  # bytes of inputs that no cache holds
# ‖a − b‖ / ‖b‖ of two forms at full size, at most.
APART = {"float32": 1e-3, "bfloat16": 5e-2}
UNTESTED = "The suite tpu has not been run on a TPU."
MEANINGLESS = (
  "Pallas' interpreter on a CPU, toy sizes: this shows that the suite runs; "
  "its times, rates and ratios have no meaning."
)


class Budget:
  """Minutes that are to last. A wave begins where as much is left as the
  longest before it took, or `RESERVE`; what it cannot compile is not run."""

  def __init__(
    self, minutes: float, clock: Callable[[], float] = time.monotonic
  ):
    self._clock, self._end = clock, clock() + 60 * minutes
    self.minutes, self._longest = minutes, 0.0

  @property
  def left(self) -> float:
    return self._end - self._clock()

  @contextlib.contextmanager
  def wave(self) -> Iterator[bool]:
    """Whether there is time for a wave, which is what happens inside."""
    before = self.left
    yield before > min(self._longest, RESERVE)
    self._longest = max(self._longest, before - self.left)


def waves(cases: Iterable[Case]) -> Iterator[list[Case]]:
  """The cases in the groups that they are compiled in."""
  cases, sizes = list(cases), list(WAVES)
  while cases:
    size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
    yield cases[:size]
    cases = cases[size:]


def _inputs(case: Case, key):
  key, other = jax.random.split(key)
  args = bench_kernels.lowered(case, bench_kernels.inputs(case, key))
  return args, cotangents(case, args, other)


class Job:
  """A case whose programs are being compiled; `rows` measures it.

  Args:
    case: what it is.
    forms: label -> (kind, function of the case's arguments).
    options: how.
    pool: that compiles.
    known: parities by what they depend on, over the whole run; a form whose
      parity is known is not checked again.
  """

  def __init__(self, case: Case, forms, options: Options, pool, known):
    self._case, self._options, self._known = case, options, known
    self._forms = forms
    xla = [n for n in ("chunk", "dense", "scan") if n in forms]
    self._reference = xla[0] if xla else ""
    self._order = sorted(forms, key=lambda n: n != self._reference)
    calls = {name: call for name, (_, call) in forms.items()}
    new = {n: c for n, c in calls.items() if self._class(n) not in known}
    for name in new:
      known[self._class(name)] = None  # under way
    key = jax.random.key(0)
    with options.tracing():
      self._draw = build(pool, functools.partial(_inputs, case), key)
      specs = jax.eval_shape(functools.partial(_inputs, case), key)
      args, cotangents = specs
      self._default = bench_kernels.default(case, args)
      self._parity = Parity(case, new, options, pool) if new else None
    self._programs = {direction: {} for direction in DIRECTIONS}
    for name, call in calls.items():
      plain = lambda *a, c=call: floats(c(*a))
      with options.tracing(name):
        for direction, fn, more in zip(
          DIRECTIONS, (plain, both(call)), (args, (args, cotangents))
        ):
          self._programs[direction][name] = build(pool, fn, *more)
    self._costs = {
      d: bench_kernels.costs(case, args, cotangents, d != "forward")
      for d in DIRECTIONS
    }

  def _class(self, form):
    c = self._case
    return c.op, c.decay, c.key, c.value, c.dtype, form

  def futures(self) -> list:
    programs = [f for d in self._programs.values() for f in d.values()]
    parity = self._parity.futures() if self._parity else []
    return [self._draw, *programs, *parity]

  def rows(self, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Parity, then times: a row a form and direction."""
    if self._parity:
      for name, found in self._parity.errors().items():
        self._known[self._class(name)] = found
    missing = {"error": "parity was not measured"}
    parity = {n: self._known[self._class(n)] or missing for n in self._forms}
    failed = {n: failure(p) for n, p in parity.items()}
    try:
      sets = self._sets()
    except Exception as error:
      failed = {n: why or timing.short(error) for n, why in failed.items()}
      sets = []
    first, rows = {}, []
    for direction in DIRECTIONS:
      measured = self._measure(direction, sets, dict(failed), first)
      for name, (kind, _) in self._forms.items():
        facts = measured[name]
        if "median_ms" in facts:
          facts |= rates(self._costs[direction], facts, ceilings)
        one = row(self._case, name, direction, kind, parity=parity[name])
        one["default"] = name == self._default
        rows.append(one | facts)
    return rows

  def _sets(self):
    """Inputs, more than once over where a cache could hold them."""
    draw, keys = result(self._draw).run, jax.random.key(self._options.seed)
    first = draw(jax.random.fold_in(keys, 1))
    size = sum(x.nbytes for x in jax.tree.leaves(first))
    count = 1 if self._options.interpret else math.ceil(CACHE / size)
    count = max(2, min(count, 8))
    return [first] + [
      draw(jax.random.fold_in(keys, i)) for i in range(2, count + 1)
    ]

  def _measure(self, direction, sets, failed, first):
    """Form -> what its row says. `first` keeps values over directions."""
    facts: dict[str, dict[str, Any]] = {n: {} for n in self._forms}
    runs, calls = {}, {}
    for name in self._order:
      future = self._programs[direction][name]
      if failed[name]:
        facts[name]["error"] = failed[name]
        continue
      try:
        built = result(future)
        temp = built.temp_bytes
        facts[name] |= {"compile_s": built.seconds, "temp_bytes": temp}
        if temp > self._options.memory_limit:
          facts[name]["error"] = f"not run: needs {temp / 1e9:.1f} GB"
          continue
        run = Turns(built.run, sets, direction)
        out = jax.block_until_ready(run.at(0))
        self._compare(name, direction, out, first, facts)
        del out
        if "error" in facts[name]:
          continue
        runs[name], calls[name] = run, run.calls()
      except Exception as error:  # A form that refuses, or does not fit.
        facts[name]["error"] = timing.short(error)
    times = timing.rounds(runs, self._options.seconds, calls=calls, least=LEAST)
    reference = self._reference
    for name, taken in times.items():
      median = statistics.median(taken)
      facts[name] |= summary(taken, calls[name])
      facts[name]["tokens_per_s"] = self._case.tokens / median
      if reference in times:
        facts[name]["reference"] = reference
        facts[name]["ratio"] = timing.ratio(taken, times[reference])
    return facts

  def _compare(self, name, direction, out, first, facts):
    """Full-size outputs (and gradients) against those of the form that ran
    first, our XLA form where there is one."""
    plain = direction == "forward"
    parts = {"forward": out} if plain else {"forward": out[0], "back": out[1]}
    apart = 0.0
    for part, arrays in parts.items():
      # With itself too: NaN is apart from NaN.
      kept = first.setdefault(part, arrays)
      apart = max(apart, float(_apart(arrays, kept)), key=_nan_last)
    facts[name]["difference"] = apart
    if not apart <= APART[self._case.dtype]:
      facts[name]["error"] = (
        f"FAILED at full size: {apart:.1e} apart from another form (bound "
        f"{APART[self._case.dtype]:.0e})"
      )


def _nan_last(x: float) -> float:
  return math.inf if math.isnan(x) else x


@jax.jit
def _apart(a, b):
  """As `timing.relative`, on the device."""
  norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))
  pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))
  sizes = jnp.stack([norm(y) for _, y in pairs])
  floor = jnp.maximum(sizes, 1e-6 * jnp.max(sizes))
  off = [norm(x.astype(jnp.float32) - y.astype(jnp.float32)) for x, y in pairs]
  return jnp.max(jnp.stack(off) / jnp.where(floor > 0, floor, 1.0))


class Turns:
  """An executable that takes its inputs in turn."""

  def __init__(self, run, sets, direction):
    self._run, self._turn = run, 0
    plain = direction == "forward"
    self._sets = [args if plain else (args, cots) for args, cots in sets]

  def at(self, index: int):
    return self._run(*self._sets[index])

  def __call__(self):
    self._turn = (self._turn + 1) % len(self._sets)
    return self.at(self._turn)

  def calls(self) -> int:
    """How many calls take about `SYNC` seconds."""
    jax.block_until_ready(self())
    start = time.perf_counter()
    jax.block_until_ready(self())
    once = time.perf_counter() - start
    return max(1, min(64, round(SYNC / max(once, 1e-6))))


def summary(taken: list[float], calls: int) -> dict[str, Any]:
  """Seconds of a call in each round, as a row has them."""
  return {
    "rounds": len(taken),
    "calls": calls,
    "median_ms": 1e3 * statistics.median(taken),
    "min_ms": 1e3 * min(taken),
    "max_ms": 1e3 * max(taken),
  }


def rates(costs, facts, ceilings) -> dict[str, float]:
  """What a time makes of a case's costs, and of the ceilings: {} without."""
  flops, size = costs
  seconds = facts["median_ms"] / 1e3
  found = {"flops_per_s": flops / seconds, "bytes_per_s": size / seconds}
  if ceilings:
    times = flops / ceilings["flops_per_s"], size / ceilings["bytes_per_s"]
    found |= {
      "of_flops": times[0] / seconds, "of_bytes": times[1] / seconds,
      "floor_ms": 1e3 * max(times),
    }  # fmt: skip
  return found


def ceilings(options: Options) -> dict[str, float]:
  """What the device does at most, measured: a copy's bytes a second, those
  read and those written, and a bfloat16 matrix product's FLOP a second."""
  n, size = (64, 2**12) if options.interpret else (8192, 2**28)
  key = jax.random.key(options.seed)
  x = jax.random.normal(key, (size,))
  copy = jax.jit(jnp.copy).lower(x).compile()
  a, b = jax.random.normal(key, (2, n, n)).astype(jnp.bfloat16)
  product = jax.jit(jnp.matmul).lower(a, b).compile()
  runs = {"copy": lambda: copy(x), "product": lambda: product(a, b)}
  for run in runs.values():
    jax.block_until_ready([run() for _ in range(3)])
  calls = dict.fromkeys(runs, 10)
  times = timing.rounds(runs, min(options.seconds, 2.0), calls=calls, least=10)
  median = {name: statistics.median(taken) for name, taken in times.items()}
  return {
    "bytes_per_s": 2 * x.nbytes / median["copy"],
    "flops_per_s": 2 * n**3 / median["product"],
    "copy_bytes": x.nbytes,
    "matmul_size": n,
  }


def memory_limit(default: float) -> float:
  """Bytes that a program may take for itself on the device."""
  stats = jax.devices()[0].memory_stats() or {}
  return 0.6 * stats["bytes_limit"] if "bytes_limit" in stats else default


def our_forms(case: Case):
  """Label -> (kind, function): our forms, and JAX's attention."""
  return {
    **{n: ("ours", c) for n, c in bench_kernels.forms(case).items()},
    **{n: ("yardstick", c) for n, c in bench_kernels.yardstick(case).items()},
  }


def tpu_forms(case: Case):
  """`our_forms`, and jax-linear-attention in this process."""
  forms = our_forms(case)
  if bench_kernels.has_jla(case):
    try:
      peer = bench_kernels.jla_forms(case)
    except ImportError as error:
      peer = {bench_kernels.JLA_FORM: functools.partial(_raise, error)}
    forms |= {n: ("peer", c) for n, c in peer.items()}
  return forms


def _raise(error, *_):
  raise error


def run(
  cases: Iterable[Case],
  options: Options,
  budget: Budget,
  others: Peers,
  found: dict[str, Any],
  *,
  show: Callable[[dict[str, Any]], None],
  save: Callable[[], None] = lambda: None,
) -> None:
  """Measures the cases, by importance, as long as the budget lasts.

  Args:
    cases: at their sizes.
    options: how.
    budget: of time.
    others: who else is asked.
    found: takes 'ceilings' and 'rows'.
    show: gets each row as soon as it is known.
    save: called after each wave.
  """
  forms_of = tpu_forms if options.suite == "tpu" else our_forms
  found["ceilings"] = ceilings(options)
  found.setdefault("rows", [])
  limit = memory_limit(options.memory_limit)
  options = dataclasses.replace(options, memory_limit=limit)
  known: dict[Any, Any] = {}

  def say(rows):
    for one in rows:
      one["jax"] = one.get("jax", jax.__version__)
      found["rows"].append(one)
      show(one)

  with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
    for wave in waves(cases):
      with budget.wave() as fits:
        if not fits:
          for case in wave:
            why = f"not run: {budget.minutes:g} minutes were over"
            say(rows_of(case, "all", why, "ours"))
          continue
        others.start(wave)
        with options.tracing():
          forms = [(case, forms_of(case)) for case in wave]
        jobs = [Job(c, f, options, pool, known) for c, f in forms if f]
        waiting = [f for job in jobs for f in job.futures()]
        concurrent.futures.wait(waiting, timeout=max(budget.left, 1.0))
        for case, job in zip([c for c, f in forms if f], jobs):
          ours = job.rows(found["ceilings"])
          say(ours)
          theirs = others.rows(case, options, budget.left, limit)
          with options.tracing():
            complete(case, theirs, ours, found["ceilings"])
          say(theirs)
        for case, none in forms:
          if not none:
            why = "not run: cuDNN's attention is for NVIDIA GPUs"
            say(rows_of(case, bench_kernels.CUDNN, why, "yardstick"))
      save()


def complete(case: Case, theirs, ours, ceilings_) -> None:
  """Adds to peers' rows what follows from their times: rates, and the ratio
  to our XLA form."""
  specs = jax.eval_shape(functools.partial(_inputs, case), jax.random.key(0))
  for one in theirs:
    if "median_ms" not in one:
      continue
    cost = bench_kernels.costs(case, *specs, one["direction"] != "forward")
    one |= rates(cost, one, ceilings_)
    one["tokens_per_s"] = 1e3 * case.tokens / one["median_ms"]
    for other in ours:
      same = other["direction"] == one["direction"]
      if same and other.get("reference") == other["form"]:
        one["reference"] = other["form"]
        one["ratio"] = other["median_ms"] / one["median_ms"]


def serve() -> None:
  """Answers jobs from the standard input: jax-linear-attention's rows."""
  known: dict[Any, Any] = {}
  for line in sys.stdin:
    job = json.loads(line)
    options = Options(**job["options"])
    if options.interpret:
      jax.config.update("jax_platforms", "cpu")
    else:
      jax.config.update("jax_enable_compilation_cache", False)
    case = Case(**job["case"] | {"forms": ()})
    try:
      forms = bench_kernels.jla_forms(case)
    except ImportError as error:
      rows = [{"form": "", "error": timing.short(error)}]
    else:
      forms = {n: ("peer", c) for n, c in forms.items()}
      with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        one = Job(case, forms, options, pool, known)
        concurrent.futures.wait(one.futures())
        rows = one.rows({})
      for each in rows:
        each["jax"] = jax.__version__
        for key in ("what", "shape", "dtype", "kind", "default"):
          del each[key]
    print(MARK + json.dumps(rows), flush=True)


def main(values) -> None:
  """Runs a suite by the flags of `experiments.bench`."""
  from experiments import bench, bench_report

  began = time.monotonic()
  if values.interpret:
    jax.config.update("jax_platforms", "cpu")
    if values["out"].present:
      sys.exit("bench: --interpret writes to --workdir, not to --out")
  else:
    try:
      bench.check_platform(values.suite)
    except RuntimeError as error:
      sys.exit(str(error))
    # Compile times are those of a machine that has not seen the code.
    jax.config.update("jax_enable_compilation_cache", False)
  options = Options(
    values.suite, values.interpret, min(values.seconds, 0.02)
    if values.interpret else values.seconds, values.memory_limit * 1e9,
    int.from_bytes(os.urandom(4)) % 2**31 if values.seed is None
    else values.seed,
  )  # fmt: skip
  cases = bench_kernels.CASES
  if values.interpret:
    cases = bench_kernels.toys(cases)
  cases = [c for c in cases if re.search(values.only, c.what)]
  notes = [MEANINGLESS] if values.interpret else []
  notes += [UNTESTED] if values.suite == "tpu" else []
  for note in notes:
    print(note, flush=True)
  result = {
    "suite": values.suite, **bench.machine(), "notes": notes,
    "interpret": values.interpret, "seed": options.seed,
    "command": bench.command(), "rows": [],
  }  # fmt: skip
  folder = values.workdir if values.interpret else values.out
  if not values.interpret and values.only and not values["out"].present:
    folder = None

  def save():
    result["minutes"] = round((time.monotonic() - began) / 60, 1)
    if folder:
      path = pathlib.Path(folder)
      path.mkdir(parents=True, exist_ok=True)
      text = json.dumps(result, indent=1) + "\n"
      (path / f"{values.suite}.json").write_text(text)
      (path / f"{values.suite}.md").write_text(bench_report.page(result))

  others = peers(values.suite, values.peer_python, values.torch_python)
  try:
    run(
      cases, options, Budget(values.minutes), others, result, save=save,
      show=lambda row: print(bench_report.line(row), flush=True),
    )  # fmt: skip
  finally:
    others.stop()
  if folder:
    print(f"wrote {folder}/{values.suite}.json and .md")


if __name__ == "__main__":
  serve()
