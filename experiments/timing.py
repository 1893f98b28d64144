"""Times forms of one computation against one another.

The forms of a group are run in turn, A B C C B A A B C …, so that a machine
that slows down slows all of them, and every ratio is the median over rounds of
two times taken within one round.
"""

from collections.abc import Callable, Mapping
import dataclasses
import itertools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DIRECTIONS = ("forward", "forward+backward")
ROUNDS = (3, 200)  # at least, at most


@dataclasses.dataclass(frozen=True)
class Group:
  """Forms of one computation, on the same inputs.

  Attributes:
    kind: the table it belongs to: 'op', 'cell' or 'peer'.
    what: its name there.
    shape: of the inputs, for people.
    tokens: time steps in a call, over the batch.
    build: () -> Forms. Called when the group is measured; it raises where the
      group cannot be built, ImportError where a package is missing.
    reference: the form whose time the others are divided into; of several,
      the fastest.
    directions: of `DIRECTIONS`.
    dtype: of the inputs.
    state: floats of state that one sequence holds between two tokens.
    calls: how many in a row a round is, for what takes microseconds.
  """

  kind: str
  what: str
  shape: str
  tokens: int
  build: Callable[[], "Forms"]
  reference: tuple[str, ...]
  directions: tuple[str, ...] = DIRECTIONS
  dtype: str = "float32"
  state: int | None = None
  calls: int = 1


@dataclasses.dataclass(frozen=True)
class Forms:
  """What a group runs.

  Attributes:
    calls: form -> function of `inputs` that returns (state, outputs).
    inputs: pytrees of arrays.
    default: the form that memzoo takes by itself, or ''.
    same: whether the forms compute the same thing.
  """

  calls: Mapping[str, Callable[..., Any]]
  inputs: tuple[Any, ...]
  default: str = ""
  same: bool = True


def measure(
  group: Group,
  seconds: float,
  *,
  memory_limit: float = 4e9,
  clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
  """Rows of a group: one a form and direction.

  Args:
    group: what is measured.
    seconds: how long the rounds of one direction go on, compilation aside.
      At least `ROUNDS[0]` rounds are run, at most `ROUNDS[1]`.
    memory_limit: bytes; a form that needs more temporary memory is compiled
      and not run.
    clock: seconds, as `time.perf_counter` gives them.

  Returns:
    Dictionaries with the keys kind, what, form, default, shape, dtype,
    direction, state, reference, and either error (what kept the form from
    being measured; with compile_s and temp_bytes where it compiled) or
    compile_s, temp_bytes, rounds, median_ms, min_ms, max_ms, ratio (how many
    times as fast as the reference), ratios (as every form), tokens_per_s and
    difference (`relative` to the reference's outputs and gradients).
  """
  try:
    forms = group.build()
  except Exception as error:  # A peer that is absent, or does not fit.
    why = short(error)
    return [row(group, "", d, "", error=why) for d in group.directions]
  rows = []
  for direction in group.directions:
    rows += _measure(group, forms, direction, seconds, memory_limit, clock)
  return rows


def rounds(
  runs: Mapping[str, Callable[[], Any]],
  seconds: float,
  *,
  calls: Mapping[str, int] | None = None,
  least: int = ROUNDS[0],
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
  """Runs forms in turn: form -> seconds of a call in each round.

  Args:
    runs: form -> a function that starts a computation and returns its arrays.
    seconds: how long rounds go on; at least `least` are run, at most
      `ROUNDS[1]`.
    calls: form -> how many calls in a row its round is, and then one wait;
      one by default.
    least: rounds.
    clock: as for `measure`.
  """
  times = {form: [] for form in runs}
  order, began = list(runs), clock()
  for count in itertools.count():
    late = clock() - began >= seconds
    if not runs or (late and count >= least) or count >= ROUNDS[1]:
      break
    for form in order:
      number = calls[form] if calls else 1
      start = clock()
      for _ in range(number):
        out = runs[form]()
      jax.block_until_ready(out)
      times[form].append((clock() - start) / number)
    order.reverse()
  return times


def fastest(times: Mapping[str, list[float]], candidates) -> str:
  """Of the candidates that were measured, the one of smallest median; ''
  where none was. `times` is form -> seconds in each round."""
  measured = [form for form in candidates if form in times]
  return min(measured, key=lambda f: statistics.median(times[f]), default="")


def ratio(own: list[float], others: list[float]) -> float:
  """How many times as fast `own` is: the median of ratios within a round."""
  return statistics.median(b / a for a, b in zip(own, others, strict=True))


def compile_call(call, inputs, direction: str):
  """`call` compiled ahead of time: (function of no arguments, executable).

  forward returns what `call` does. forward+backward returns (outputs,
  gradients by every floating leaf of the inputs), pulled back from cotangents
  that are an argument, so that nothing of them is known to the compiler.
  """
  if direction == "forward":
    compiled = jax.jit(call).lower(*inputs).compile()
    return lambda: compiled(*inputs), compiled
  leaves, tree = jax.tree.flatten(inputs)
  inexact = [_is_inexact(x) for x in leaves]
  active = [x for x, a in zip(leaves, inexact) if a]
  passive = [x for x, a in zip(leaves, inexact) if not a]

  def outputs(active, passive):
    rest = {True: iter(active), False: iter(passive)}
    args = jax.tree.unflatten(tree, [next(rest[a]) for a in inexact])
    outs = jax.tree.leaves(call(*args)[1])
    return [y for y in outs if _is_inexact(y)]

  def both(active, passive, cotangents):
    outs, pullback = jax.vjp(lambda a: outputs(a, passive), active)
    return outs, pullback(cotangents)[0]

  specs = jax.eval_shape(outputs, active, passive)
  cotangents = [_wave(s) for s in specs]
  compiled = jax.jit(both).lower(active, passive, cotangents).compile()
  return lambda: compiled(active, passive, cotangents), compiled


def _measure(group, forms, direction, seconds, memory_limit, clock):
  runs, first, about, failed = {}, {}, {}, {}
  for form, call in forms.calls.items():
    facts = {}
    try:
      start = clock()
      run, compiled = compile_call(call, forms.inputs, direction)
      facts["compile_s"] = clock() - start
      temp = compiled.memory_analysis().temp_size_in_bytes
      facts["temp_bytes"] = temp
      if temp > memory_limit:
        needs = f"not run: needs {temp / 1e9:.1f} GB of temporary memory"
        failed[form] = facts | {"error": needs}
        continue
      out = jax.block_until_ready(run())
    except Exception as error:  # A form that refuses, or does not fit.
      failed[form] = facts | {"error": short(error)}
      continue
    # The outputs, and the gradients where there are some.
    first[form] = out[1] if direction == "forward" else out
    runs[form], about[form] = run, facts

  calls = dict.fromkeys(runs, group.calls)
  times = rounds(runs, seconds, calls=calls, clock=clock)
  reference = fastest(times, group.reference)
  rows = []
  for form in forms.calls:
    default = form == forms.default
    if form in failed:
      facts = failed[form]
      rows.append(row(group, form, direction, reference, default, **facts))
      continue
    median = statistics.median(times[form])
    rows.append(
      row(
        group, form, direction, reference, default,
        **about[form],
        rounds=len(times[form]),
        median_ms=1e3 * median,
        min_ms=1e3 * min(times[form]),
        max_ms=1e3 * max(times[form]),
        ratio=ratio(times[form], times[reference]) if reference else None,
        ratios={f: ratio(times[form], t) for f, t in times.items()},
        tokens_per_s=group.tokens / median,
        difference=relative(first[form], first.get(reference))
        if forms.same
        else None,
      )
    )  # fmt: skip
  return rows


def row(
  group: Group,
  form: str,
  direction: str,
  reference: str,
  default: bool = False,
  **measured,
) -> dict[str, Any]:
  """What every row says, and what was `measured`."""
  return {
    "kind": group.kind,
    "what": group.what,
    "form": form,
    "default": default,
    "shape": group.shape,
    "dtype": group.dtype,
    "direction": direction,
    "state": group.state,
    "reference": reference,
    **measured,
  }


def relative(a, b) -> float | None:
  """The largest ‖a − b‖ / ‖b‖ over the inexact leaves.

  None where the trees do not match. What is less than a millionth of the
  largest leaf counts as that: gradients that are zero in exact arithmetic.
  """
  a, b = (
    [np.asarray(x) for x in jax.tree.leaves(t) if _is_inexact(x)]
    for t in (a, b)
  )
  if not b or [x.shape for x in a] != [x.shape for x in b]:
    return None
  norm = lambda x: float(np.linalg.norm(x.astype(np.complex128)))
  floor = 1e-6 * max(map(norm, b))
  distances = [norm(x - y) / (max(norm(y), floor) or 1.0) for x, y in zip(a, b)]
  return float(np.max(distances))  # NaN where one is


def _is_inexact(x) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)


def _wave(spec):
  """Cotangents of which no two neighbours are alike."""
  values = np.cos(0.7 * np.arange(int(np.prod(spec.shape))))
  return jnp.asarray(values.reshape(spec.shape), spec.dtype)


def short(error: Exception) -> str:
  """An error's name and first line."""
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0]}"[:200]
