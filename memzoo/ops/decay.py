"""Decays, resets and gaps inside a chunk, for the ops with a matrix state.

For S_t = a_t S_{t−1} + …, a chunk needs the decay between every pair of its
steps, from its start to each step, and from each step to its end. Here they
come from per-pair sums of log a, with what is dead masked before any matmul: a
reset is never a number, and a log-decay of −inf is `FLOOR`.

What a chunk knows of each step is a column, [C, 1] or [C, K], and nothing is
sliced: the same functions are the bodies of kernels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import dispatch
from memzoo.ops import chunk

# Stands for −inf: its exponential is exactly 0, and so is its gradient.
FLOOR = -1e4


class Decays(NamedTuple):
  """Decay factors inside a chunk; G is 1 (none or scalar) or K (per channel).

  Flags are float32, 0 or 1.

  Attributes:
    pairs: bool [C, C]: step j <= i is in the segment of i and both are there.
    factor: [C, C]: decay over (j, i] (none and scalar decay), else None.
    levels: what `scores` needs for a decay per channel, else None.
    into: [C, G]: decay from the start of i's segment in this chunk to i.
    onto: [C, G]: decay from j to the chunk's end; 0 where j's segment ends.
    through: [G, 1]: decay over the whole chunk; 0 where it holds a reset.
    live: [C, 1]: no reset up to i, so that the incoming state is seen.
    ends_live: [1, 1]: no reset in the chunk.
    poison: [C, 1] or None: a non-finite input stands earlier in i's segment.
  """

  pairs: jax.Array
  factor: jax.Array | None
  levels: "tuple[Level, ...] | None"
  into: jax.Array
  onto: jax.Array
  through: jax.Array
  live: jax.Array
  ends_live: jax.Array
  poison: jax.Array | None


class Level(NamedTuple):
  """Decays per channel between the two halves of each block of 2n steps."""

  pairs: jax.Array  # bool [C, C]: i in the later half, j in the earlier
  head: jax.Array  # [C, K]  from the later half's start to i
  tail: jax.Array  # [C, K]  from j to the earlier half's end


def decays(
  log_decay: jax.Array | None,
  reset: jax.Array | None,
  mask: jax.Array | None,
  bad: jax.Array | None,
  size: int,
) -> Decays:
  """Decay factors of a chunk.

  Args:
    log_decay: float32 [C, 1], [C, K], or None; −inf is legal.
    reset: flags [C, 1] or None.
    mask: flags [C, 1] or None; steps that are not there neither write nor
      decay.
    bad: flags [C, 1] or None: steps whose inputs are not finite.
    size: C.
  """
  pairs = chunk.lower(size)
  live = jnp.ones((size, 1), jnp.float32)
  if reset is not None:
    first = sums(pairs, reset)
    pairs &= first == chunk.row(first)
    live = (first == 0).astype(jnp.float32)
  same = pairs  # as pairs, with steps that are not there
  to_end = chunk.column(chunk.last(same.astype(jnp.float32)))
  ends_live = chunk.last(live)
  poison = None
  if bad is not None:
    poison = (sums(same, bad) > 0).astype(jnp.float32)
  if mask is not None:
    pairs = pairs & (mask * chunk.row(mask) > 0)
    to_end = to_end * mask
  if log_decay is None:
    one = jnp.ones((size, 1), jnp.float32)
    return Decays(
      pairs, pairs.astype(jnp.float32), None, one, to_end, ends_live, live,
      ends_live, poison,
    )  # fmt: skip
  g = jnp.maximum(log_decay.astype(jnp.float32), FLOOR)
  if mask is not None:
    g = g * mask
  into = jnp.exp(sums(same, g))
  factor = levels = None
  if g.shape[1] == 1:
    between = chunk.segment_sums(g)
    factor = jnp.where(pairs, jnp.exp(jnp.where(pairs, between, 0.0)), 0.0)
    onto = chunk.column(chunk.last(between))
  else:
    onto = sums(chunk.lower(size, strict=True).T, g)
    levels = _levels(g)
  return Decays(
    pairs=pairs,
    factor=factor,
    levels=levels,
    into=into,
    onto=chunk.where(to_end, jnp.exp(onto), 0.0),
    through=chunk.column(ends_live * chunk.last(into)),
    live=live,
    ends_live=ends_live,
    poison=poison,
  )


class ChunkSizes(NamedTuple):
  """C by platform, as `dispatch.by_platform` takes it."""

  scalar: dict[str, int]  # or no decay
  channel: dict[str, int]


def chunk_size(size: int | None, log_decay, sizes: ChunkSizes) -> int:
  """C of a chunk form: `size`, or the platform's for this kind of decay."""
  if size is None:
    channel = log_decay is not None and log_decay.ndim == 2
    size = dispatch.by_platform(**(sizes.channel if channel else sizes.scalar))
  chunk.power_of_two("chunk_size", size)
  return size


def sums(where, g):
  """Sums of g [C, G] over the steps that `where`, bool [C, C], picks."""
  if g.shape[1] == 1:  # a product with one column is no matmul
    terms = jnp.where(where, chunk.row(g), 0.0)
    return jnp.sum(terms, axis=1, keepdims=True)
  return chunk.masked_sum(where, g)


def _levels(g):
  size = g.shape[0]
  i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
  j = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
  levels, half = [], 1
  while half < size:
    here, there = i // half, j // half
    same = here == there
    across = (here == there + 1) & (here % 2 == 1)
    head = sums(same & (j <= i), g)
    tail = sums(same & (j > i), g)
    levels.append(Level(across, jnp.exp(head), jnp.exp(tail)))
    half *= 2
  return tuple(levels)


def scores(q, k, d: Decays, dtype=jnp.float32):
  """Σ_c q_ic k_jc (decay of c over (j, i]), zero off `pairs`: f32 [C, C].

  A decay per channel is split where the two halves of the smallest block of
  1, 2, 4, … steps meet that holds both i and j: no sum is a difference, and no
  exponent is above 0.

  Args:
    q: [C, K]; k: [C, K]; d: the chunk's decays.
    dtype: of the operands of the matmuls.
  """
  if d.levels is None:
    return chunk.matmul(q, k.T, dtype) * d.factor
  q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  own = jnp.sum(q * k, axis=1, keepdims=True)
  out = jnp.where(chunk.diagonal(q.shape[0]), own, 0.0)
  for level in d.levels:
    part = chunk.matmul(q * level.head, (k * level.tail).T, dtype)
    out = jnp.where(level.pairs, part, out)
  return jnp.where(d.pairs, out, 0.0)


def quarantine(reset, mask, log_decay, *tensors):
  """Zeroes inputs that are not there or not finite.

  A non-finite number times the zero of a mask is not a number, so it would
  cross a reset inside a chunk. With resets, such steps are taken out, and
  `Decays.poison` marks the outputs of their own segment, which become NaN.

  Args:
    reset: flags [C, 1] or None.
    mask: flags [C, 1] or None.
    log_decay: [C, 1], [C, K] or None; −inf counts as finite.
    *tensors: [C, N] each, or None.

  Returns:
    (bad flags [C, 1] or None, log_decay, *tensors).
  """
  tensors = (log_decay, *tensors)
  bad = None
  if mask is not None:
    tensors = [_keep(x, mask) for x in tensors]
  if reset is not None:
    bad = jnp.zeros(reset.shape, jnp.float32)
    for n, x in enumerate(tensors):
      if x is not None:
        x = x.astype(jnp.float32)  # a TPU tests no other
        wrong = ~jnp.isfinite(x)
        wrong = wrong & ~jnp.isneginf(x) if n == 0 else wrong
        wrong = wrong.astype(jnp.float32)
        bad = jnp.maximum(bad, jnp.max(wrong, axis=1, keepdims=True))
    tensors = [_keep(x, 1.0 - bad) for x in tensors]
  return bad, *tensors


def _keep(x, flags):
  return None if x is None else chunk.where(flags, x, 0.0)


def enter(state, live, quarantined: bool):
  """The state as the steps of a chunk may read it, and whether it is bad.

  Args:
    state: [K, V].
    live: flags [C, 1].
    quarantined: the call has resets.

  Returns:
    (state with non-finite numbers zeroed, flags [C, 1] or None: steps that see
    one).
  """
  if not quarantined:
    return state, None
  bad = any_bad(state)
  return chunk.where(bad, 0.0, state), live * bad


def any_bad(x):
  """A flag [1, 1]: something in x [M, N] is not finite."""
  bad = (~jnp.isfinite(x)).astype(jnp.float32)
  return jnp.max(jnp.max(bad, axis=1, keepdims=True), axis=0, keepdims=True)


def spoil(outputs, *poisons):
  """NaN in the rows of outputs [C, V] that a poison, flags [C, 1], marks."""
  for poison in poisons:
    if poison is not None:
      outputs = chunk.where(poison, jnp.nan, outputs)
  return outputs
