"""What the kernels of both kinds of device share: one step over R rows.

Everything is a tile [R, N] or, of slots, [R, M, N]: a row for each sequence. A
weight [N, M] is one for all rows and enters products alone: over rows they are
products of matrices, and its gradient is one product over all steps and rows,
taken outside the kernel. A constant that is no weight is a row for each
sequence too, since its gradient is then a row's, and summed outside.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.custom_batching import custom_vmap
import jax.numpy as jnp

from memzoo.ops import chunk


class Weight:
  """A constant of two axes as a step sees it: `x @ w` and `product(x, w)`.

  It may be cast (`astype`) and transposed (`T`) before.

  Attributes:
    shape, dtype: as of an array.
    index: which of the weights.
    flipped: whether it has been transposed.
  """

  ndim = 2

  def __init__(self, meet, index, shape, dtype, flipped=False):
    self._meet = meet
    self.index, self.flipped = index, flipped
    self.shape, self.dtype = tuple(shape), jnp.dtype(dtype)

  def astype(self, dtype):
    return Weight(self._meet, self.index, self.shape, dtype, self.flipped)

  @property
  def T(self):  # noqa: N802
    shape = self.shape[::-1]
    return Weight(self._meet, self.index, shape, self.dtype, not self.flipped)

  def product(self, x):
    """x [..., N] @ self in this dtype, float32."""
    if x.shape[-1:] != self.shape[:1]:
      raise ValueError(
        f"cell_scan: a weight {self.shape} meets a vector of {self.shape[0]}, "
        f"got {x.dtype} {x.shape}"
      )
    return self._meet(_cast(x, self.dtype), self)

  def __rmatmul__(self, x):
    return self.product(x).astype(jnp.result_type(x.dtype, self.dtype))

  def __matmul__(self, x):
    if x.ndim != 1:
      raise TypeError(f"x @ w alone where x is {x.dtype} {x.shape}")
    return self.T.__rmatmul__(x)

  def __getitem__(self, key):
    raise TypeError(f"a weight {self.shape} has no parts")


def product(x, w):
  """x [..., N] @ w [N, M] in w's dtype, summed and returned in float32.

  What a step writes where its weights are of a lower precision than its state.
  """
  if isinstance(w, Weight):
    return w.product(x)
  return _dot(_cast(x, w.dtype), w)


class Spec(NamedTuple):
  """Shape and dtype of a leaf of one sequence and one step."""

  shape: tuple[int, ...]
  dtype: jnp.dtype


class Tap(NamedTuple):
  """One product in a step: rows [R, ..., N] of an operand with a weight [N, M].

  Attributes:
    weight: which of the weights.
    flipped: whether it is transposed.
    operand: which of the step's distinct operands.
    shape: [..., M] of the product.
    dtype: of both in the product.
  """

  weight: int
  flipped: bool
  operand: int
  shape: tuple[int, ...]
  dtype: jnp.dtype


class Plan(NamedTuple):
  """What a step is made of.

  Attributes:
    outputs: the specs of its outputs, and their tree.
    taps: its products with weights, in order.
    operands: the specs of what enters them.
    ranks: how many axes state, inputs and outputs have, each number once.
  """

  outputs: tuple[Spec, ...]
  tree: Any
  taps: tuple[Tap, ...]
  operands: tuple[Spec, ...]
  ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
  """A step and how it is taken over rows: a value.

  Attributes:
    step: (state, x, constants) -> (state, output), of one sequence.
    trees: of state, inputs and constants.
    state, inputs, constants: the specs of their leaves for one sequence.
    fresh: whether the vectors end with a fresh state.
    platform: 'tpu' or 'gpu'.
    interpret: run by Pallas' interpreter.
  """

  step: Callable[[Any, Any, Any], Any]
  trees: tuple[Any, Any, Any]
  state: tuple[Spec, ...]
  inputs: tuple[Spec, ...]
  constants: tuple[Spec, ...]
  fresh: bool
  platform: str
  interpret: bool

  @property
  def plan(self) -> Plan:
    return _plan(self)

  def tick(self, weights, state, inputs, flags, vectors):
    """One step: lists of tiles in, (state, outputs) out.

    Traced through its own linearisation, so that a function with a gradient
    of its own (`jax.custom_vjp`) is met by its rule, in plain operations.

    Args:
      weights: [N, M] each.
      state, inputs, vectors: [R, ...] each.
      flags: [R, 1, ...] with as many axes after the first as each of
        `plan.ranks` says, or []: 0 for no input, 1 for one, 2 for one after
        a reset.
    """
    call = lambda *args: self._call(weights, flags, None, *args)[:2]
    return jax.vjp(call, state, inputs, vectors)[0]

  def pull(self, weights, state, inputs, flags, vectors, d_state, d_outputs):
    """The gradients of one step.

    Returns:
      (d_state, d_inputs, d_vectors, operands, d_products), lists of tiles: the
      gradient of a weight is the sum of operandᵀ d_product over its products.
    """
    rows = state[0].shape[0]
    taps = [
      jnp.zeros((rows, *tap.shape), jnp.float32) for tap in self.plan.taps
    ]

    def call(taps, *args):
      new, outputs, operands = self._call(weights, flags, taps, *args)
      return (new, outputs), operands

    _, pull, operands = jax.vjp(
      call, taps, state, inputs, vectors, has_aux=True
    )
    d_taps, *grads = pull((list(d_state), list(d_outputs)))
    return *grads, operands, d_taps

  def _call(self, weights, flags, taps, state, inputs, vectors):
    old = state
    count = len(self.state) if self.fresh else 0
    vectors, fresh = _cut(vectors, len(vectors) - count)
    # One flag for each number of axes: none is given another shape here.
    flag = {1 + n: f for n, f in zip(self.plan.ranks, flags)}
    there = lambda x, y: chunk.where(flag[x.ndim], x, y)
    if flags:
      inputs = [there(x, jnp.zeros_like(x)) for x in inputs]
      fresh = fresh or [jnp.zeros_like(s) for s in state]
      after = [f.astype(s.dtype) for f, s in zip(fresh, state)]
      anew = lambda f, s: chunk.where(flag[s.ndim] - 1.0, f, s)
      state = [anew(f, s) for f, s in zip(after, state)]

    def one(state, inputs, vectors, taps):
      operands, left = [], None if taps is None else list(taps)

      def meet(x, weight):
        _put(operands, x)
        w = _cast(weights[weight.index], weight.dtype)
        w = w.T if weight.flipped else w
        return _product(x, w, None if left is None else left.pop(0))

      return *self._step(meet, state, inputs, vectors), operands

    new, outputs, operands = jax.vmap(one)(state, inputs, vectors, taps)
    if flags:
      new = [there(n, o) for n, o in zip(new, old)]
      outputs = [there(y, jnp.zeros_like(y)) for y in outputs]
    return new, outputs, operands

  def _step(self, meet, state, inputs, vectors):
    """One row's step, on leaves; `meet(x, weight)` is a product."""
    new, outputs = self._trees(meet, state, inputs, vectors)
    return jax.tree.leaves(new), jax.tree.leaves(outputs)

  def _trees(self, meet, state, inputs, vectors):
    vectors, constants, index = iter(vectors), [], 0
    for c in self.constants:
      if len(c.shape) == 2:
        constants.append(Weight(meet, index, *c))
        index += 1
      else:
        constants.append(next(vectors))
    parts = zip(self.trees, (state, inputs, constants))
    return self.step(*(tree.unflatten(leaves) for tree, leaves in parts))


@functools.lru_cache(maxsize=256)
def _plan(rows: Rows) -> Plan:
  """What the step of `rows` is made of."""
  struct = lambda specs: [jax.ShapeDtypeStruct(*s) for s in specs]
  taps, operands = [], []

  def meet(x, weight):
    at = _put(operands, x)
    shape = (*x.shape[:-1], weight.shape[1])
    taps.append(Tap(weight.index, weight.flipped, at, shape, weight.dtype))
    return jnp.zeros(shape, jnp.float32)

  def one(*args):
    taps.clear()
    operands.clear()
    new, outputs = rows._trees(meet, *args)
    return new, outputs, list(operands)

  vectors = [c for c in struct(rows.constants) if len(c.shape) != 2]
  state, inputs = struct(rows.state), struct(rows.inputs)
  try:
    new, outputs, entered = jax.eval_shape(one, state, inputs, vectors)
  except TypeError as error:
    raise NotImplementedError(
      "in a kernel a constant of two axes enters products alone, `x @ w` or "
      "`product(x, w)`, and what is cut from it is a constant of its own: "
      f"{error}"
    ) from error
  spec = lambda xs: tuple(Spec(x.shape, jnp.dtype(x.dtype)) for x in xs)
  like = rows.trees[0].unflatten(state)
  if jax.tree.structure(new) != rows.trees[0] or (
    spec(jax.tree.leaves(new)) != spec(state)
  ):
    raise ValueError(
      f"cell_scan: step must return a state like the one it got, {like}; got "
      f"{new}"
    )
  if rows.platform == "gpu":
    _refuse(jax.make_jaxpr(one)(state, inputs, vectors).jaxpr)
  leaves, tree = jax.tree.flatten(outputs)
  for y in leaves:
    if not y.shape:
      raise ValueError(
        "cell_scan: a step's outputs must be arrays of one axis or more, got "
        f"{y.dtype} {y.shape}"
      )
  parts = *rows.state, *rows.inputs, *leaves
  ranks = tuple(sorted({len(x.shape) for x in parts}))
  return Plan(spec(leaves), tree, tuple(taps), spec(entered), ranks)


# What Pallas' way to Triton does not lower for arrays of R rows.
_ABSENT = {
  "dot_general": "products of two arrays of a row (weights enter products)",
  "concatenate": "arrays that are joined",
}


def _refuse(jaxpr):
  """`NotImplementedError` where a step has what a GPU's kernel does not."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in _ABSENT:
      raise NotImplementedError(
        f"a GPU's kernel has no {_ABSENT[eqn.primitive.name]}, and the step "
        f"has {eqn.primitive.name} of {[str(v.aval) for v in eqn.invars]}"
      )
    is_jaxpr = lambda x: hasattr(x, "eqns")
    for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
      inner = getattr(x, "jaxpr", x)
      if is_jaxpr(inner):
        _refuse(inner)


def _put(items, x) -> int:
  """Where x itself is among `items`, put there if it is not."""
  for at, y in enumerate(items):
    if x is y:
      return at
  items.append(x)
  return len(items) - 1


def _cast(x, dtype):
  """x itself where it has the dtype."""
  return x if x.dtype == dtype else x.astype(dtype)


def _cut(items, at: int):
  return list(items[:at]), list(items[at:])


def _dot(a, b):
  """a [..., N] @ b [N, M] in their dtype, as one product of matrices summed in
  float32; float32 keeps its digits."""
  flat = a if a.ndim < 3 else a.reshape(-1, a.shape[-1])
  if a.dtype == jnp.float32:
    y = chunk.matmul(flat, b)
  else:
    y = jnp.matmul(flat, b, preferred_element_type=jnp.float32)
  return y if a.ndim < 3 else y.reshape(*a.shape[:-1], b.shape[1])


@custom_vmap
def _product(x, w, tap):
  """x @ w: over rows a product of matrices, whose gradient with respect to
  `tap` is that of the product. None is taken with respect to w."""
  del tap
  return _dot(x, w)


@_product.def_vmap
def _product_rule(size, batched, x, w, tap):
  if not batched[0]:
    x = jnp.broadcast_to(x, (size,) + x.shape)
  return _rows_product(x, w, tap), True


@jax.custom_vjp
def _rows_product(x, w, tap):
  del tap
  return _dot(x, w)


def _rows_product_fwd(x, w, tap):
  return _dot(x, w), (w, tap)


def _rows_product_bwd(saved, g):
  w, tap = saved
  d_x = _dot(g.astype(w.dtype), w.T).astype(w.dtype)
  return d_x, None, None if tap is None else g


_rows_product.defvjp(_rows_product_fwd, _rows_product_bwd)
