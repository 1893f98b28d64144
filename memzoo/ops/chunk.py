"""One chunk function, every form.

An op gives one pure function of a chunk of C steps, in three parts:

  local   = prepare(inputs of C steps)     what does not depend on the state
  state'  = advance(state, local)          the only serial part
  outputs = emit(state, local)             given the state at the chunk's start

and, where `advance` is affine in the state, its `effect` with `compose` and
`apply`. The XLA forms here are made of these parts, and kernels and sequence
parallelism need no others.
"""

from collections.abc import Callable
from functools import partial
import math
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp


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

  Returns:
    (state, outputs [T, ...]).
  """
  length = jax.tree.leaves(inputs)[0].shape[0]
  size = fit(chunk_size, length)
  count = -(-length // size)
  if not split:
    group = _fit_group(group, count)
    count += -count % group
  pad = count * size - length
  if pad:
    if inputs.mask is None:
      inputs = inputs._replace(mask=jnp.ones((length,), bool))
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


def matmul(a: jax.Array, b: jax.Array, dtype=jnp.float32) -> jax.Array:
  """a @ b with operands in `dtype`, summed and returned in float32.

  float32 operands are multiplied in full precision on every device.
  """
  dtype = jnp.dtype(dtype)
  full = dtype == jnp.float32
  return jnp.matmul(
    a.astype(dtype),
    b.astype(dtype),
    precision=jax.lax.Precision.HIGHEST if full else None,
    preferred_element_type=jnp.float32,
  )


def lower(size: int, strict: bool = False) -> jax.Array:
  """bool [size, size]: j <= i, or j < i."""
  i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
  j = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
  return j < i if strict else j <= i


def running_sum(x: jax.Array) -> jax.Array:
  """Inclusive sums along the first axis of x [C, N], by a triangular matmul."""
  return matmul(lower(x.shape[0]).astype(jnp.float32), x)


def segment_sums(g: jax.Array) -> jax.Array:
  """Sums of g [C] over (j, i], for every pair: [C, C], zero where j >= i.

  Every pair has its own sum. The difference of two running sums would lose
  the small ones: at g = −20 its gradient has no digit left.
  """
  size = g.shape[0]
  terms = jnp.where(lower(size, strict=True), g[:, None], 0.0)
  return matmul(lower(size).astype(jnp.float32), terms)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def unit_lower_solve(
  a: jax.Array, right: jax.Array, dtype=jnp.float32
) -> jax.Array:
  """The solution y of (I + a) y = right, for a strictly lower triangular a.

  By the inverse, in doubling blocks: that of [[P, 0], [R, Q]] is
  [[P⁻¹, 0], [−Q⁻¹ R P⁻¹, Q⁻¹]]. No power of `a` is formed: products such as
  (I − a)(I + a²)(I + a⁴)… have terms that grow with C where keys are alike.
  The inverse is named 'inverse' for checkpoint policies.

  Args:
    a: float32 [C, C], C a power of two; what stands on and above the diagonal
      is not read.
    right: float32 [C, N].
    dtype: of the operands of the products with the inverse.

  Returns:
    float32 [C, N].
  """
  return _solve_fwd(a, right, dtype)[0]


def _solve_fwd(a, right, dtype):
  inverse = checkpoint_name(unit_lower_inverse(a), "inverse")
  y = matmul(inverse, right, dtype)
  return y, (inverse, y)


def _solve_bwd(dtype, saved, g):
  inverse, y = saved
  right = matmul(inverse.T, g, dtype)
  d = -matmul(right, y.T, dtype)
  return jnp.where(lower(y.shape[0], strict=True), d, 0.0), right


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
      x = x - matmul(matmul(x, off), x)
    block *= 2
  return x


def power_of_two(name: str, size: int) -> int:
  """`size`, or `ValueError` where it is no power of two."""
  if size < 1 or size != 1 << int(math.log2(size)):
    raise ValueError(f"{name} must be a power of two, got {size}")
  return size
