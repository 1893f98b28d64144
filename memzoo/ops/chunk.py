"""One chunk function, every form.

An op gives one pure function of a chunk of C steps, in three parts:

  local   = prepare(inputs of C steps)     what does not depend on the state
  state'  = advance(state, local)          the only serial part
  outputs = emit(state, local)             given the state at the chunk's start

and, where `advance` is affine in the state, its `effect` with `compose` and
`apply`. The XLA forms here are made of these parts, and kernels and sequence
parallelism need no others.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
from functools import partial
import math
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from memzoo.core import dispatch


class ChunkFunction(NamedTuple):
  """The parts of a chunk function.

  Attributes:
    prepare: (inputs, constants) -> local. The leaves of inputs are [C, ...];
      constants hold for the whole sequence.
    advance: (state, local) -> state.
    emit: (state, local) -> outputs [C, ...].
    effect: local -> what the chunk does to any state, where it is affine.
    compose: (effect, effect) -> effect, the earlier first.
    apply: (effect, state) -> state.
    both: (state, local) -> (advance, emit), where the two share work.
  """

  prepare: Callable[[Any, Any], Any]
  advance: Callable[[Any, Any], Any]
  emit: Callable[[Any, Any], Any]
  effect: Callable[[Any], Any] | None = None
  compose: Callable[[Any, Any], Any] | None = None
  apply: Callable[[Any, Any], Any] | None = None
  both: Callable[[Any, Any], Any] | None = None

  def __call__(self, state, inputs, constants=()):
    """One chunk: (state, inputs [C, ...]) -> (state, outputs [C, ...])."""
    return self.meet(state, self.prepare(inputs, constants))

  def meet(self, state, local):
    """What is left of a chunk once it is prepared: (state, outputs)."""
    if self.both is not None:
      return self.both(state, local)
    return self.advance(state, local), self.emit(state, local)


def run(
  function: ChunkFunction,
  state,
  inputs,
  constants=(),
  *,
  chunk_size: int,
  group: int = 1,
  split: bool = False,
  save: tuple[str, ...] = (),
  columns: bool = False,
):
  """Runs a chunk function over a sequence.

  Args:
    function: the chunk function; any callable of its form where `group` is 1
      and `split` is False.
    state: its state.
    inputs: a NamedTuple with a field `mask` (bool [T] or None); leaves
      [T, ...]. Padding to whole chunks is written as mask False and zeros.
    constants: passed to every chunk.
    chunk_size: C, a power of two. A shorter sequence takes a shorter chunk.
    group: G, how many chunks are prepared at once, at most. The form is a scan
      of checkpointed groups, whose backward recomputes a group from the state
      at its start.
    split: all `prepare` at once, then the serial walk, then all `emit`, and
      nothing is recomputed: for wide machines.
    save: names (`jax.ad_checkpoint.checkpoint_name`) that the backward keeps
      instead of recomputing.
    columns: the function takes inputs as `as_columns` makes them, and state
      and constants as `as_tiles` does; its outputs are [C, N].

  Returns:
    (state, outputs [T, ...]).
  """
  if columns:
    inputs, constants = as_columns(inputs), as_tiles(constants)
    whole, state = state, as_tiles(state)
  length = jax.tree.leaves(inputs)[0].shape[0]
  size = fit(chunk_size, length)
  count = -(-length // size)
  if not split:
    group = _fit_group(group, count)
    count += -count % group
  pad = count * size - length
  if pad:
    if inputs.mask is None:
      there = jnp.ones((length,), bool)
      inputs = inputs._replace(mask=as_columns(there) if columns else there)
    inputs = jax.tree.map(
      lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)), inputs
    )
  chunks = jax.tree.map(
    lambda x: x.reshape((count, size) + x.shape[1:]), inputs
  )
  if count == 1:
    first = jax.tree.map(lambda x: x[0], chunks)
    state, outputs = function(state, first, constants)
  elif split:
    local = jax.vmap(lambda c: function.prepare(c, constants))(chunks)
    state, starts = jax.lax.scan(
      lambda s, loc: (function.advance(s, loc), s), state, local
    )
    outputs = jax.vmap(function.emit)(starts, local)
    outputs = jax.tree.map(_join, outputs)
  else:
    policy = jax.checkpoint_policies.save_only_these_names(*save)
    body = lambda s, c: function(s, c, constants)
    if group > 1:
      body = lambda s, c: _group(function, s, c, constants)
      chunks = jax.tree.map(
        lambda x: x.reshape((count // group, group) + x.shape[1:]), chunks
      )
    body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    state, outputs = jax.lax.scan(body, state, chunks)
    for _ in range(2 if group > 1 else 1):
      outputs = jax.tree.map(_join, outputs)
  if columns:
    state = from_tiles(state, whole)
  return state, jax.tree.map(lambda y: y[:length], outputs)


def fit(chunk_size: int, length: int) -> int:
  """`chunk_size`, or the power of two that holds a shorter sequence."""
  return min(chunk_size, 1 << max(length - 1, 0).bit_length())


def _fit_group(most: int, count: int) -> int:
  """The largest group of `most` or fewer chunks that pads `count` least."""
  sizes = range(max(min(most, count), 1), 0, -1)
  return min(sizes, key=lambda group: -count % group)


def _group(function: ChunkFunction, state, chunks, constants):
  """Several chunks [G, C, ...]: prepared at once, then one after the other."""
  local = jax.vmap(lambda c: function.prepare(c, constants))(chunks)
  leaves, tree = jax.tree.flatten(local)
  # Split, not indexed: the gradient of a split is one concatenation.
  parts = zip(*(jax.lax.split(x, [1] * x.shape[0]) for x in leaves))
  outputs = []
  for part in parts:
    one = tree.unflatten([x[0] for x in part])
    state, output = function.meet(state, one)
    outputs.append(output)
  return state, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)


def _join(y):
  return y.reshape((y.shape[0] * y.shape[1],) + y.shape[2:])


def as_columns(inputs):
  """Leaves [T] as [T, 1], and flags as float32: what tiles are made of."""

  def column(x):
    x = x.astype(jnp.float32) if x.dtype == jnp.bool_ else x
    return x[:, None] if x.ndim == 1 else x

  return jax.tree.map(column, inputs)


def as_tiles(tree):
  """Leaves [] as [1, 1] and [N] as [1, N], and all but floats as float32."""

  def tile(x):
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
    return x.reshape((1,) * (2 - x.ndim) + x.shape)

  return jax.tree.map(tile, tree)


def from_tiles(tree, like):
  """What `as_tiles` was given: shapes and dtypes are those of `like`."""
  return jax.tree.map(
    lambda x, y: x.reshape(y.shape).astype(y.dtype), tree, like
  )


def matmul(a: jax.Array, b: jax.Array, dtype=jnp.float32) -> jax.Array:
  """a @ b with operands in `dtype`, summed and returned in float32.

  float32 operands are multiplied in full precision on every device. Those of
  a lower precision are so in the gradient's products too where both have two
  axes (and then have no forward mode).
  """
  low = jnp.dtype(dtype) != jnp.float32 and a.ndim == b.ndim == 2
  return (_low_dot if low else _dot)(a.astype(dtype), b.astype(dtype))


# How float32 operands are multiplied; kernels may say how their device does it.
_full_precision = contextvars.ContextVar(
  "memzoo_full_precision", default=jax.lax.Precision.HIGHEST
)


@contextlib.contextmanager
def full_precision(precision) -> Iterator[None]:
  """Sets what `matmul` asks for where its operands are float32: something that
  keeps float32's digits."""
  token = _full_precision.set(precision)
  try:
    yield
  finally:
    _full_precision.reset(token)


def _dot(a, b):
  full = a.dtype == jnp.float32
  return jnp.matmul(
    a,
    b,
    precision=_full_precision.get() if full else None,
    preferred_element_type=jnp.float32,
  )


_low_dot = jax.custom_vjp(_dot)


def _low_dot_fwd(a, b):
  return _dot(a, b), (a, b)


def _low_dot_bwd(saved, g):
  a, b = saved
  g = g.astype(a.dtype)
  return _dot(g, b.T).astype(a.dtype), _dot(a.T, g).astype(b.dtype)


_low_dot.defvjp(_low_dot_fwd, _low_dot_bwd)


@jax.custom_vjp
def masked_sum(mask: jax.Array, x: jax.Array) -> jax.Array:
  """mask @ x to float32 precision, for a mask of zeros and ones.

  Zeros and ones are exact in bfloat16 and x is the sum of three bfloat16
  numbers, so that a matrix unit needs three products where a float32 product
  takes six, or none of its units.

  Args:
    mask: bool [M, C].
    x: float32 [C, N].

  Returns:
    float32 [M, N].
  """
  return _masked_sum(mask, x)


def _masked_sum(mask, x):
  if dispatch.current_platform() == "cpu":
    return _dot(mask.astype(jnp.float32), x)
  mask, total = mask.astype(jnp.bfloat16), None
  for _ in range(3):
    part = x.astype(jnp.bfloat16)
    x = x - part.astype(jnp.float32)
    some = _dot(mask, part)
    total = some if total is None else total + some
  return total


def _masked_sum_fwd(mask, x):
  return _masked_sum(mask, x), mask


def _masked_sum_bwd(mask, g):
  return None, _masked_sum(mask.T, g)


masked_sum.defvjp(_masked_sum_fwd, _masked_sum_bwd)


def lower(size: int, strict: bool = False) -> jax.Array:
  """bool [size, size]: j <= i, or j < i."""
  i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
  j = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
  return j < i if strict else j <= i


def running_sum(x: jax.Array) -> jax.Array:
  """Inclusive sums along the first axis of x [C, N], by a triangular matmul."""
  return matmul(lower(x.shape[0]).astype(jnp.float32), x)


def diagonal(size: int) -> jax.Array:
  """bool [size, size]: j == i."""
  i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
  return i == jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)


def row(x: jax.Array) -> jax.Array:
  """A column [C, 1] as a row [1, C], in operations that every kernel has."""
  terms = jnp.where(diagonal(x.shape[0]), x, jnp.zeros_like(x))
  return jnp.sum(terms, axis=0, keepdims=True)


def column(x: jax.Array) -> jax.Array:
  """A row [1, C] as a column [C, 1]."""
  terms = jnp.where(diagonal(x.shape[1]), x, jnp.zeros_like(x))
  return jnp.sum(terms, axis=1, keepdims=True)


def last(x: jax.Array) -> jax.Array:
  """The last row [1, N] of x [C, N], without a slice."""
  i = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
  terms = jnp.where(i == x.shape[0] - 1, x, jnp.zeros_like(x))
  return jnp.sum(terms, axis=0, keepdims=True)


def where(flags: jax.Array, x, y) -> jax.Array:
  """x where flags (0 or 1, float32, broadcast first) are set, else y."""
  shape = jnp.broadcast_shapes(flags.shape, jnp.shape(x), jnp.shape(y))
  bound = 0.0
  if _wide_flags.get():
    flags, bound = _beside_places(flags, shape)
  return jnp.where(jnp.broadcast_to(flags, shape) > bound, x, y)


_wide_flags = contextvars.ContextVar("memzoo_wide_flags", default=False)


@contextlib.contextmanager
def wide_flags() -> Iterator[None]:
  """Makes `where` compare flags in such a way that no compiler can do so
  before they are broadcast.

  For Triton, which compares before it broadcasts where it can, and converts
  what is broadcast to the layout of a product's operands: it has none for the
  single bits that a comparison gives, and fails.
  """
  token = _wide_flags.set(True)
  try:
    yield
  finally:
    _wide_flags.reset(token)


def _beside_places(flags, shape):
  """(a, b) with a > b, once broadcast to `shape`, where flags are set: b
  counts along the axes that flags are broadcast over."""
  own = (1,) * (len(shape) - flags.ndim) + flags.shape
  place, count = None, 1
  for axis, size in enumerate(shape):
    if size > 1 and own[axis] == 1:
      i = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
      place = i if place is None else place * size + i
      count *= size
  if place is None:
    return flags, 0.0
  return flags * count, place.astype(jnp.float32)


def segment_sums(g: jax.Array) -> jax.Array:
  """Sums of g [C, 1] over (j, i], for every pair: [C, C], zero where j >= i.

  Every pair has its own sum. The difference of two running sums would lose
  the small ones: at g = −20 its gradient has no digit left.
  """
  size = g.shape[0]
  return masked_sum(lower(size), jnp.where(lower(size, strict=True), g, 0.0))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def unit_lower_solve(
  a: jax.Array,
  rights: tuple[jax.Array, ...],
  dtype=jnp.float32,
  name: str | None = None,
) -> tuple[jax.Array, ...]:
  """The solutions y of (I + a) y = right, for a strictly lower triangular a.

  By the inverse, in doubling blocks: that of [[P, 0], [R, Q]] is
  [[P⁻¹, 0], [−Q⁻¹ R P⁻¹, Q⁻¹]]. No power of `a` is formed: products such as
  (I − a)(I + a²)(I + a⁴)… have terms that grow with C where keys are alike.

  Args:
    a: float32 [C, C], C a power of two; what stands on and above the diagonal
      is not read.
    rights: float32 [C, N] each.
    dtype: of the operands of the products with the inverse.
    name: of the inverse, for checkpoint policies.

  Returns:
    float32 [C, N] for each of `rights`.
  """
  return _solve_fwd(a, rights, dtype, name)[0]


def _solve_fwd(a, rights, dtype, name):
  inverse = unit_lower_inverse(a)
  if name is not None:
    inverse = checkpoint_name(inverse, name)
  mm = lambda a, b: _dot(a.astype(dtype), b.astype(dtype))
  ys = tuple(mm(inverse, right) for right in rights)
  return ys, (inverse, ys)


def _solve_bwd(dtype, name, saved, gs):
  inverse, ys = saved
  mm = lambda a, b: _dot(a.astype(dtype), b.astype(dtype))
  rights = tuple(mm(inverse.T, g) for g in gs)
  d = -sum(mm(r, y.T) for r, y in zip(rights, ys))
  return jnp.where(lower(inverse.shape[0], strict=True), d, 0.0), rights


unit_lower_solve.defvjp(_solve_fwd, _solve_bwd)


def unit_lower_inverse(a: jax.Array) -> jax.Array:
  """The inverse that `unit_lower_solve` applies: float32 [C, C]."""
  size = a.shape[0]
  i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
  j = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
  x = (i == j).astype(jnp.float32)
  block = 1
  while block < size:
    odd = (i // block) % 2 == 1
    below = odd & (j // block == i // block - 1)
    off = jnp.where(below, a, 0.0)
    if block == 1:
      x = x - off
    else:
      x = x - _dot(_dot(x, off), x)
    block *= 2
  return x


def power_of_two(name: str, size: int) -> int:
  """`size`, or `ValueError` where it is no power of two."""
  if size < 1 or size != 1 << int(math.log2(size)):
    raise ValueError(f"{name} must be a power of two, got {size}")
  return size
