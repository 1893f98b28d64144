"""What the suites `gpu` and `tpu` of `experiments.bench` time: ops and cells
that have kernels, at the sizes of layers in use.

A case is what a row of the tables is about. `forms` are our forms of it, and
`jla_forms` and `yardstick` what they are held against in JAX; the case itself,
as a dictionary, is what `experiments.bench_torch` gets.
"""

from collections.abc import Callable, Iterable
import functools
import importlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import timing
from experiments.bench_cases import chosen_chunk
from experiments.bench_peers import JLA
import memzoo
from memzoo import ops
from memzoo.core import dispatch
from memzoo.ops.gradient_step import Learner, Model, start

MATRIX = ("linear_attention", "delta_rule")
CELLS = ("lstm", "gru")
CUDNN = "cuDNN attention"
JLA_FORM = "jax-linear-attention"
DECAYS = {"none": "no", "scalar": "scalar", "channel": "per-channel"}


class Case(NamedTuple):
  """A computation at one size.

  Attributes:
    op: of `memzoo.ops`, a cell's name, or 'attention' (the yardstick).
    decay: 'none', 'scalar' or 'channel', of ops that have one.
    batch: B.
    length: T; the number of queries of hopfield.
    heads: H; for a recurrence H · K is its width N.
    key: K; for a cell H · K is its width D.
    value: V; 0 for K.
    dtype: of the inputs; states, log-decays and weights are float32.
    slots: stored patterns M of hopfield; the mini-batch of gradient_step.
    forms: ours: names of implementations, with ', C=32' the chunk size.
  """

  op: str
  decay: str = ""
  batch: int = 4
  length: int = 4096
  heads: int = 16
  key: int = 128
  value: int = 0
  dtype: str = "bfloat16"
  slots: int = 0
  forms: tuple[str, ...] = ("pallas", "chunk")

  @property
  def what(self) -> str:
    """Its name in the tables."""
    if self.op == "attention":
      return "attention, causal"
    return f"{self.op}, {DECAYS[self.decay]} decay" if self.decay else self.op

  @property
  def shape(self) -> str:
    """Its sizes, for people."""
    b, t, k = self.batch, self.length, self.key
    if self.op in CELLS:
      heads = f" H={self.heads}" if self.heads > 1 else ""
      return f"B={b} T={t} D={self.heads * k}{heads}"
    if self.op == "hopfield":
      return f"N={t} M={self.slots} K={k}"
    if self.op == "linear_recurrence":
      return f"B={b} T={t} N={self.heads * k}"
    value = self.value or k
    width = f"K=V={k}" if value == k else f"K={k} V={value}"
    more = f" n={self.slots}" if self.slots else ""
    return f"B={b} T={t} H={self.heads} {width}{more}"

  @property
  def tokens(self) -> int:
    return self.batch * self.length

  def small(self, length: int, slots: int = 0) -> "Case":
    """The same computation where a step loop serves: what parity is for."""
    return self._replace(
      batch=1, length=min(self.length, length), heads=min(self.heads, 2),
      slots=slots if self.op == "hopfield" else self.slots,
    )  # fmt: skip


_TUNED = ("pallas", "pallas, C=16", "pallas, C=32", "chunk", "scan")
_ALL = ("pallas", "chunk", "scan")
_DELTA = functools.partial(Case, "delta_rule")
_LINEAR = functools.partial(Case, "linear_attention")
_LONG, _SHORT = dict(batch=1, length=65536), dict(batch=64, length=1024)
# By importance: the suite may run out of time.
CASES = (
  _DELTA("scalar", forms=_TUNED),
  _LINEAR("scalar", forms=_TUNED),
  Case("lstm", "", 64, 1024, 1, 128, forms=("pallas", "scan")),
  _DELTA("channel"),
  _LINEAR("none"),
  _DELTA("none"),
  _LINEAR("channel"),
  Case("hopfield", "", 1, 4096, 1, slots=4096, forms=("pallas", "dense")),
  Case("gradient_step", key=64, slots=16, forms=_ALL),
  Case(
    "linear_recurrence", dtype="float32",
    forms=("pallas", "assoc", "chunk", "scan"),
  ),
  Case("attention", forms=()),
  _DELTA("scalar", **_LONG),
  _LINEAR("scalar", **_LONG),
  Case("attention", **_LONG, forms=()),
  _DELTA("scalar", **_SHORT, heads=8),
  _DELTA("scalar", heads=32, key=64),
  _DELTA("scalar", heads=8, key=256),
  _LINEAR("scalar", batch=1, length=16384, heads=8, value=256),
  _DELTA("scalar", heads=8, key=64, dtype="float32"),
  Case("hopfield", "", 1, 4096, 1, slots=65536, forms=("pallas", "dense")),
  Case("gru", "", 64, 1024, 1, 128, forms=("pallas", "scan")),
  Case("lstm", "", 64, 1024, 8, 128, forms=("pallas", "scan")),
)  # fmt: skip


def row(case: Case, form: str, direction: str, kind: str = "ours", **measured):
  """What every row says, and what was `measured`."""
  return {
    "kind": kind, "what": case.what, "shape": case.shape, "dtype": case.dtype,
    "form": form, "direction": direction, "default": False, **measured,
  }  # fmt: skip


def rows_of(case: Case, form: str, error: str, kind: str = "peer"):
  """Rows of what was not measured."""
  return [row(case, form, d, kind, error=error) for d in timing.DIRECTIONS]


def toys(cases: Iterable[Case]) -> list[Case]:
  """The cases for the interpreter, at sizes without meaning; what is then the
  same comes once."""
  found = {}
  for case in cases:
    slots = 80 if case.op == "hopfield" else case.slots
    small = case._replace(
      batch=1, length=64, heads=min(case.heads, 2), key=16, slots=slots,
      value=32 if case.value else 0,
    )  # fmt: skip
    found.setdefault(small._replace(forms=()), small)
  return list(found.values())


def cell_of(case: Case):
  """The cell of a case."""
  width = case.heads * case.key
  return memzoo.make(case.op, d_model=width, num_heads=case.heads)


def inputs(case: Case, key: jax.Array):
  """Random arguments in float32, (state, *rest), as the case's calls take
  them; `lowered` rounds what a case holds in its dtype."""
  keys = iter(jax.random.split(key, 8))
  b, t, h, k = case.batch, case.length, case.heads, case.key
  v = case.value or k
  normal = lambda *s: jax.random.normal(next(keys), s)
  uniform = lambda low, high, *s: jax.random.uniform(
    next(keys), s, minval=low, maxval=high
  )

  def unit(*s):
    x = normal(*s)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True))

  if case.op in CELLS:
    return cell_of(case).init(next(keys)), normal(b, t, h * k)
  if case.op == "hopfield":
    return unit(case.slots, k) * math.sqrt(k), normal(t, k)
  if case.op == "linear_recurrence":
    n = h * k
    return normal(b, n), normal(b, t, n), uniform(0.5, 0.999, b, t, n)
  if case.op == "attention":
    return normal(b, t, h, k), normal(b, t, h, k), normal(b, t, h, v)
  q, keys_, values = unit(b, t, h, k), unit(b, t, h, k), normal(b, t, h, v)
  if case.op == "gradient_step":
    w, bias = 0.02 * normal(b, h, k, v), 0.02 * normal(b, h, v)
    state = jax.vmap(jax.vmap(start))(Model(w, bias))
    learner = Learner(
      1 / jnp.arange(1.0, case.slots + 1), jnp.ones((v,)), jnp.zeros((v,))
    )
    rate = uniform(0.0, 1 / k, b, t, h)
    return state, q, keys_, values, rate, learner
  gates = {}
  if case.op == "delta_rule":
    gates["beta"] = uniform(0.1, 0.9, b, t, h)
  if case.decay != "none":
    channels = (k,) if case.decay == "channel" else ()
    gates["log_decay"] = -uniform(0.001, 0.1, b, t, h, *channels)
  return normal(b, h, k, v), q, keys_, values, gates


def lowered(case: Case, args):
  """`inputs` with what the case holds in its dtype rounded to it."""
  low = lambda x: x.astype(case.dtype)
  if case.op in CELLS:
    return args[0], low(args[1])
  if case.op in ("hopfield", "attention"):
    return tuple(map(low, args))
  if case.op == "linear_recurrence":
    return args[0], low(args[1]), low(args[2])
  if case.op == "gradient_step":
    return args[0], *map(low, args[1:5]), args[5]
  gates = dict(args[4])
  if "beta" in gates:
    gates["beta"] = low(gates["beta"])
  return args[0], *map(low, args[1:4]), gates


def call(case: Case, form: str | None, *args):
  """The case by one of our forms (None: the form chosen by default)."""
  form, _, size = (form or "").partition(", C=")
  form = form or None
  more = {"chunk_size": int(size)} if size else {}
  if case.op in CELLS:
    cell, (params, xs) = cell_of(case), args
    run = lambda x: memzoo.scan(cell, params, None, x, implementation=form)
    return jax.vmap(run)(xs)
  if case.op == "hopfield":
    return ops.hopfield(*args, implementation=form)
  if case.op == "linear_recurrence":
    run = lambda h, x, a: ops.linear_recurrence(
      h, x, decay=a, implementation=form, **more
    )
    return jax.vmap(run)(*args)
  if case.op == "gradient_step":
    *rest, rate, learner = args
    return ops.batched(ops.gradient_step)(
      *rest, rate=rate, learner=learner, residual=True, implementation=form
    )
  *rest, gates = args
  op = ops.batched(getattr(ops, case.op))
  return op(*rest, **gates, implementation=form, **more)


def forms(case: Case) -> dict[str, Callable[..., Any]]:
  """Our forms: label -> function of `inputs`. The kernel in chunks of the size
  that the op chooses goes by its name alone."""
  labels = case.forms
  if case.op in MATRIX:
    chosen = chosen_chunk(case.op, DECAYS[case.decay])
    labels = [x for x in labels if x != f"pallas, C={chosen}"]
  return {x: functools.partial(call, case, x) for x in labels}


def default(case: Case, args) -> str:
  """The form that memzoo takes by itself, or ''."""
  if case.op == "attention":
    return ""
  return memzoo.explain(functools.partial(call, case, None), *args)[-1].form


def reference(case: Case) -> Callable[..., Any]:
  """What parity is with: the step loop, for float32 arguments."""
  if case.op == "attention":
    return functools.partial(_attention, "xla", True)
  return functools.partial(
    call, case, "dense" if case.op == "hopfield" else "scan"
  )


def yardstick(case: Case) -> dict[str, Callable[..., Any]]:
  """Attention by cuDNN: of causal attention, and of one update of a Hopfield
  network, which is attention to the patterns. Nothing off a GPU."""
  if dispatch.current_platform() != "gpu" or jax.default_backend() == "cpu":
    return {}
  if case.op == "attention":
    return {CUDNN: functools.partial(_attention, "cudnn", True)}
  if case.op != "hopfield":
    return {}

  def run(patterns, query):
    x, q = patterns[None, :, None], query[None, :, None]
    return _attention("cudnn", False, q, x, x)[0, :, 0]

  return {CUDNN: run}


def _attention(implementation, causal, q, k, v):
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=causal, implementation=implementation
  )


def jla_forms(case: Case) -> dict[str, Callable[..., Any]]:
  """jax-linear-attention's own choice for a matrix op that it has.

  Raises:
    ImportError: where the package is missing.
  """
  kind, gates = JLA[case.op, DECAYS[case.decay]]
  linear_attention = importlib.import_module("jla.ops").linear_attention

  def run(s, q, k, v, given):
    names = {"log_decay": "g", "beta": "beta"}
    outputs, state = linear_attention(
      kind, q, k, v, scale=1.0, initial_state=s, output_final_state=True,
      **{names[n]: given[n] for n in gates},
    )  # fmt: skip
    return state, outputs

  return {JLA_FORM: run}


def has_jla(case: Case) -> bool:
  """Whether jax-linear-attention has the op."""
  return (case.op, DECAYS.get(case.decay)) in JLA


def has_torch(case: Case) -> bool:
  """Whether flash-linear-attention has the op."""
  return case.op in MATRIX


def costs(case: Case, args, outputs, both: bool) -> tuple[float, float]:
  """What the computation cannot do without: (FLOP, bytes).

  FLOP are those of the step loop's products (a multiplication and an addition
  are two), of causal attention the half below the diagonal; a backward has
  twice those of its forward. Bytes are the arguments and the outputs, once
  each; with a backward their gradients as well. What a form does beyond that
  (chunks, recomputation) does not count.
  """
  n, k, v = case.tokens * case.heads, case.key, case.value or case.key
  flops = {
    "linear_attention": 4 * n * k * v,
    "delta_rule": 6 * n * k * v,
    "gradient_step": 8 * n * k * v,
    "linear_recurrence": 2 * n * k,
    "hopfield": 4 * case.length * case.slots * k,
    "attention": n * case.length * (k + v),
    "lstm": 8 * n * k * (case.heads + 1) * k,
    "gru": 6 * n * k * (case.heads + 1) * k,
  }[case.op]
  size = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves((args, outputs))
  )
  return (3.0 * flops, 2.0 * size) if both else (float(flops), float(size))
