"""Parity of forms on a device, for `experiments.bench_device`: programs of
values and gradients, and how far they are from the step loop's in float32."""

from collections.abc import Callable, Iterator
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench_kernels, timing
from experiments.bench_kernels import Case
import memzoo
from memzoo import kernels

SINGLE = 1e-4  # ‖a − b‖ / ‖b‖ in float32


@dataclasses.dataclass(frozen=True)
class Options:
  """How the suite runs.

  Attributes:
    suite: 'gpu' or 'tpu'.
    interpret: in Pallas' interpreter at toy sizes, on any machine.
    seconds: of rounds, a case and direction.
    memory_limit: bytes; a program that needs more is not run.
    seed: of all random numbers.
    threads: that compile.
  """

  suite: str
  interpret: bool = False
  seconds: float = 2.0
  memory_limit: float = 4e9
  seed: int = 0
  threads: int = max(2, min(12, os.cpu_count() or 2))

  @contextlib.contextmanager
  def tracing(self, form: str = "pallas") -> Iterator[None]:
    """What is traced in here is for the suite's device; with `interpret` a
    kernel is, and every other form for the machine, which has to run it."""
    if not self.interpret:
      yield
      return
    kernel = form.startswith("pallas")
    with kernels.interpret(), memzoo.platform(self.suite if kernel else "cpu"):
      yield

  def small(self, case: Case) -> Case:
    """The case for parity."""
    return case.small(64, 80) if self.interpret else case.small(512, 1000)


def both(call: Callable[..., Any]) -> Callable[..., Any]:
  """(arguments, cotangents) -> (floating outputs, gradients by every floating
  argument): nothing of the cotangents is known to the compiler."""

  def fn(args, cotangents):
    leaves, tree = jax.tree.flatten(args)
    moving = [i for i, x in enumerate(leaves) if _is_float(x)]

    def outputs(active):
      full = list(leaves)
      for i, x in zip(moving, active):
        full[i] = x
      return floats(call(*jax.tree.unflatten(tree, full)))

    outs, pull = jax.vjp(outputs, [leaves[i] for i in moving])
    cotangents = [c.astype(y.dtype) for c, y in zip(cotangents, outs)]
    return outs, pull(cotangents)[0]

  return fn


def floats(tree) -> list:
  """The floating leaves."""
  return [x for x in jax.tree.leaves(tree) if _is_float(x)]


def _is_float(x) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)


@dataclasses.dataclass(frozen=True)
class Built:
  """An executable and the seconds that it took to make."""

  run: Any
  seconds: float

  @property
  def temp_bytes(self) -> int:
    memory = self.run.memory_analysis()
    return memory.temp_size_in_bytes if memory else 0


def build(pool, fn: Callable[..., Any], *args) -> concurrent.futures.Future:
  """`fn` traced now, and compiled by the pool: a future of `Built`."""
  began = time.perf_counter()
  try:
    lowered = jax.jit(fn).lower(*args)
  except Exception as error:  # A form that refuses.
    future = concurrent.futures.Future()
    future.set_exception(error)
    return future
  traced = time.perf_counter() - began

  def compile_():
    began = time.perf_counter()
    return Built(lowered.compile(), traced + time.perf_counter() - began)

  return pool.submit(compile_)


def result(future: concurrent.futures.Future) -> Built:
  """What was built; `TimeoutError` where nobody waits for it any more."""
  if not future.done():
    raise TimeoutError("still compiling when the time was over")
  return future.result()


class Parity:
  """Forms of a case against its step loop, on short sequences."""

  def __init__(self, case: Case, forms, options: Options, pool):
    self._case = case = options.small(case)
    self._options = options
    key, reference = jax.random.key(0), bench_kernels.reference(case)
    exact, low, _, cotangents = jax.eval_shape(
      functools.partial(_parity_inputs, case), key
    )
    self._draw = build(pool, functools.partial(_parity_inputs, case), key)
    with jax.default_matmul_precision("highest"), options.tracing("scan"):
      self._reference = build(pool, both(reference), exact, cotangents)
    self._forms = {}
    for name, call in forms.items():
      with options.tracing(name):
        self._forms[name] = build(pool, both(call), low, cotangents)

  def futures(self) -> list:
    return [self._draw, self._reference, *self._forms.values()]

  def errors(self) -> dict[str, dict[str, Any]]:
    """Form -> {'values', 'gradients': relative errors, and their bounds}, or
    {'error': why there is none}."""
    try:
      key = jax.random.key(self._options.seed)
      exact, low, rounded, cotangents = result(self._draw).run(key)
      run = result(self._reference).run
      want, base = run(rounded, cotangents), run(exact, cotangents)
    except Exception as error:
      why = f"no reference: {timing.short(error)}"
      return {name: {"error": why} for name in self._forms}
    bounds = [self._bound(a, b) for a, b in zip(base, want)]
    found = {}
    for name, future in self._forms.items():
      try:
        built = result(future)
        poison(want, built.temp_bytes)
        got = jax.block_until_ready(built.run(low, cotangents))
        errors = [relative(a, b) for a, b in zip(got, want)]
      except Exception as error:
        found[name] = {"error": timing.short(error)}
        continue
      parts = "values", "gradients"
      found[name] = {
        **dict(zip(parts, errors)),
        **{f"{part}_bound": bound for part, bound in zip(parts, bounds)},
      }
    return found

  def _bound(self, base, want) -> float:
    """float32: `SINGLE`; else four times what rounding the arguments costs."""
    if self._case.dtype == "float32":
      return SINGLE
    return 4 * relative(base, want) + 2**-8


def _parity_inputs(case: Case, key):
  """(float32 arguments, the case's, those in float32, cotangents)."""
  key, other = jax.random.split(key)
  exact = bench_kernels.inputs(case, key)
  low = bench_kernels.lowered(case, exact)
  rounded = jax.tree.map(lambda x, y: x.astype(y.dtype), low, exact)
  return exact, low, rounded, cotangents(case, exact, other)


def cotangents(case, args, key):
  specs = floats(jax.eval_shape(bench_kernels.reference(case), *args))
  return [
    jax.random.normal(k, y.shape).astype(y.dtype)
    for k, y in zip(jax.random.split(key, len(specs)), specs)
  ]


def relative(a, b) -> float:
  """`timing.relative`, NaN where it cannot be."""
  single = lambda t: [np.asarray(x).astype(np.float32) for x in floats(t)]
  found = timing.relative(single(a), single(b))
  return math.nan if found is None else found


def poison(like, temp_bytes: int) -> None:
  """Leaves NaN in freed memory of the size of what a program is about to
  write, so that what it reads without writing is not last run's result."""
  blocks = [jnp.full(x.shape, jnp.nan, x.dtype) for x in floats(like)]
  if temp_bytes >= 4:
    blocks.append(jnp.full((temp_bytes // 4,), jnp.nan, jnp.float32))
  jax.block_until_ready(blocks)
  for block in blocks:
    block.delete()


def failure(parity: dict[str, Any]) -> str:
  """Why a form with these errors is not timed, or ''."""
  if "error" in parity:
    return parity["error"]
  over = [
    f"{part} {parity[part]:.1e} (bound {parity[part + '_bound']:.1e})"
    for part in ("values", "gradients")
    if not parity[part] <= parity[part + "_bound"]
  ]
  return f"FAILED parity: {', '.join(over)}" if over else ""
