"""Which form of an op or cell runs, and why.

Every op and cell has several forms of one computation (`step`, `scan`,
`assoc`, `chunk`, `pallas`, …). `run` picks one:

* a name never falls back: an unsupported call raises `NotImplementedError`
  with the reason;
* `None` takes the first form that supports the call, in the order of the
  platform's preference table, which comes from measurements.

Nothing is silent: `explain` says which form ran and why.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import contextvars
import difflib
from typing import Any, NamedTuple

import jax

IMPLEMENTATIONS = (
  "step", "scan", "assoc", "chunk", "fft", "dense", "pallas", "pallas_split",
  "jla", "tokamax", "cudnn",
)  # fmt: skip

# Order of preference by platform and op; '' is every op that is not named.
# The CPU rows come from `python -m experiments.bench --suite=cpu`
# (benchmarks/); the others follow the CPU's until a device has been measured:
# until then a kernel runs only where it is asked for by name.
PREFERENCES: dict[str, dict[str, tuple[str, ...]]] = {
  "cpu": {
    "": ("chunk", "scan", "assoc", "step"),
    "linear_recurrence": ("scan", "chunk", "assoc", "step"),
    "selective_scan": ("scan", "chunk", "step"),
  },
  "gpu": {
    "": ("chunk", "assoc", "scan", "dense", "pallas", "step"),
    "linear_recurrence": ("assoc", "chunk", "scan", "pallas", "step"),
  },
  "tpu": {
    "": ("chunk", "assoc", "scan", "dense", "pallas", "step"),
    "linear_recurrence": ("assoc", "chunk", "scan", "pallas", "step"),
  },
}

_platform = contextvars.ContextVar("memzoo_platform", default=None)
_decisions = contextvars.ContextVar("memzoo_decisions", default=None)


class Decision(NamedTuple):
  """One choice of a form, as `explain` reports it."""

  name: str
  form: str
  reason: str

  def __str__(self):
    return f"{self.name}: '{self.form}' ({self.reason})"


@contextlib.contextmanager
def platform(name: str) -> Iterator[None]:
  """Chooses forms as if running on `name` ('cpu', 'gpu' or 'tpu').

  For compiling on a machine without the device. It changes what is traced
  inside the context, so give it to code that is traced there: a function that
  `jax.jit` has already cached keeps the forms that it has.

  Args:
    name: a platform of the preference table.

  Raises:
    ValueError: on an unknown platform.
  """
  if name not in PREFERENCES:
    raise ValueError(
      f"unknown platform {name!r}: expected one of {sorted(PREFERENCES)}"
    )
  token = _platform.set(name)
  try:
    yield
  finally:
    _platform.reset(token)


def current_platform() -> str:
  """The platform that forms are chosen for."""
  name = _platform.get() or jax.default_backend()
  if name in ("cuda", "rocm"):
    name = "gpu"
  return name if name in PREFERENCES else "cpu"


def preferred(op: str) -> tuple[str, ...]:
  """The order in which `implementation=None` tries the forms of `op`."""
  table = PREFERENCES[current_platform()]
  return table.get(op, table[""])


def by_platform(**values):
  """The value for the platform that forms are chosen for, `cpu=` by default.

  >>> chunk_size = dispatch.by_platform(cpu=32, gpu=64, tpu=64)
  """
  return values.get(current_platform(), values["cpu"])


def nearest(name: str, known) -> str:
  """`, did you mean 'x'?` or the whole list: the tail of an error message."""
  known = sorted(known)
  close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
  if close:
    return "did you mean " + " or ".join(repr(c) for c in close) + "?"
  return "known: " + ", ".join(known)


def run(
  name: str,
  forms: Mapping[str, Callable[[], Any]],
  implementation: str | None = None,
  *,
  op: str | None = None,
) -> Any:
  """Runs one of `forms` and returns what it returns.

  Args:
    name: whose forms these are, for messages.
    forms: form name -> a function of no arguments. A form that cannot serve
      the call raises `NotImplementedError` with the reason before it computes.
    implementation: a form's name, or None for the first that supports the
      call in the order of `preferred(op)`.
    op: the row of the preference table; `name` by default.

  Raises:
    ValueError: on a name that is no implementation at all.
    NotImplementedError: on a form that `name` does not have, that refuses the
      call, or when every form refuses.
  """
  if implementation is not None:
    if implementation not in IMPLEMENTATIONS and implementation not in forms:
      raise ValueError(
        f"unknown implementation {implementation!r} for {name}: "
        + nearest(implementation, {*IMPLEMENTATIONS, *forms})
      )
    if implementation not in forms:
      raise NotImplementedError(
        f"{name} has no {implementation!r} form; it has: "
        + ", ".join(sorted(forms))
      )
    try:
      out = forms[implementation]()
    except NotImplementedError as e:
      raise NotImplementedError(
        f"{name}, implementation={implementation!r}: {e}"
      ) from e
    _record(name, implementation, "asked for by name")
    return out
  refused = []
  order = [f for f in preferred(op or name) if f in forms]
  order += [f for f in forms if f not in order]
  for form in order:
    try:
      out = forms[form]()
    except NotImplementedError as e:
      refused.append(f"{form!r} refused: {e}")
      continue
    reason = f"first of {tuple(order)} on {current_platform()}"
    _record(name, form, "; ".join([*refused, reason]))
    return out
  raise NotImplementedError(f"{name}: no form serves it: " + "; ".join(refused))


def _record(name: str, form: str, reason: str) -> None:
  decisions = _decisions.get()
  if decisions is not None:
    decision = Decision(name, form, reason)
    if decision not in decisions:
      decisions.append(decision)


def explain(fn: Callable, *args, **kwargs) -> list[Decision]:
  """Says which forms a call takes, and why, without computing it.

  >>> for line in memzoo.explain(memzoo.scan, cell, params, state, xs):
  ...   print(line)

  Args:
    fn: an op, `memzoo.scan`, a model, or any function that calls them.
    *args: its arguments; arrays may be `jax.ShapeDtypeStruct`.
    **kwargs: its keyword arguments.

  Returns:
    The decisions, outermost last, each printing as one line.
  """
  decisions: list[Decision] = []
  token = _decisions.set(decisions)
  try:
    leaves, tree = jax.tree.flatten((args, kwargs))
    dynamic = [i for i, x in enumerate(leaves) if hasattr(x, "dtype")]

    def call(arrays):
      full = list(leaves)
      for i, a in zip(dynamic, arrays):
        full[i] = a
      a, k = jax.tree.unflatten(tree, full)
      return fn(*a, **k)

    # A fresh function each time: nothing is taken from a trace cache.
    jax.eval_shape(
      lambda a: _arrays_only(call(a)), [leaves[i] for i in dynamic]
    )
  finally:
    _decisions.reset(token)
  return decisions


def _arrays_only(tree):
  return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
