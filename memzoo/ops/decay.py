"""Decays, resets and gaps inside a chunk, for the ops with a matrix state.

For S_t = a_t S_{t−1} + …, a chunk needs the decay between every pair of its
steps, from its start to each step, and from each step to its end. Here they
come from per-pair sums of log a, with what is dead masked before any matmul: a
reset is never a number, and a log-decay of −inf is `FLOOR`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.ops import chunk

# Stands for −inf: its exponential is exactly 0, and so is its gradient.
FLOOR = -1e4


class Decays(NamedTuple):
  """Decay factors inside a chunk; G is 1 (none or scalar) or K (per channel).

  Attributes:
    pairs: bool [C, C]: step j <= i is in the segment of i and both are there.
    factor: [C, C]: decay over (j, i] (none and scalar decay), else None.
    blocks: what `scores` needs for a decay per channel, else None.
    into: [C, G]: decay from the start of i's segment in this chunk to i.
    onto: [C, G]: decay from j to the chunk's end; 0 where j's segment ends.
    through: [G]: decay over the whole chunk; 0 where it holds a reset.
    live: bool [C]: no reset up to i, so that the incoming state is seen.
    ends_live: bool []: no reset in the chunk.
    poison: bool [C] or None: a non-finite input stands earlier in i's segment.
  """

  pairs: jax.Array
  factor: jax.Array | None
  blocks: "Blocks | None"
  into: jax.Array
  onto: jax.Array
  through: jax.Array
  live: jax.Array
  ends_live: jax.Array
  poison: jax.Array | None


class Blocks(NamedTuple):
  """Decays per channel by sub-blocks of c steps, n = C / c of them."""

  inside: jax.Array  # [n, c, c, K]  over (j, i] inside a sub-block
  head: jax.Array  # [n, c, K]  from the sub-block's start to i
  tail: jax.Array  # [n, n, c, K]  from j of block J to the start of block I


def decays(
  log_decay: jax.Array | None,
  reset: jax.Array | None,
  mask: jax.Array | None,
  bad: jax.Array | None,
  size: int,
  sub_block: int = 16,
) -> Decays:
  """Decay factors of a chunk.

  Args:
    log_decay: float32 [C], [C, K], or None; −inf is legal.
    reset: bool [C] or None.
    mask: bool [C] or None; False steps neither write nor decay.
    bad: bool [C] or None: steps whose inputs are not finite.
    size: C.
    sub_block: c, for a decay per channel.
  """
  pairs = chunk.lower(size)
  if reset is None:
    live = jnp.ones((size,), bool)
    first = None
  else:
    first = chunk.running_sum(reset.astype(jnp.float32)[:, None])[:, 0]
    pairs &= first[:, None] == first[None, :]
    live = first == 0
  same = pairs  # as pairs, with steps that are not there
  if mask is not None:
    pairs = pairs & mask[None, :] & mask[:, None]
  poison = None
  if bad is not None:
    poison = jnp.any(same & bad[None, :], axis=1)
  if log_decay is None:
    one = jnp.ones((size, 1), jnp.float32)
    onto = pairs_to_end(same, mask)[:, None].astype(jnp.float32)
    return Decays(
      pairs=pairs,
      factor=pairs.astype(jnp.float32),
      blocks=None,
      into=one,
      onto=onto,
      through=live[-1:].astype(jnp.float32),
      live=live,
      ends_live=live[-1],
      poison=poison,
    )
  g = jnp.maximum(log_decay.astype(jnp.float32), FLOOR)
  if mask is not None:
    g = jnp.where(mask if g.ndim == 1 else mask[:, None], g, 0.0)
  into = jnp.exp(_sums(same, g))
  factor = blocks = None
  if g.ndim == 1:
    sums = chunk.segment_sums(g)
    factor = jnp.where(pairs, jnp.exp(jnp.where(pairs, sums, 0.0)), 0.0)
    to_end = sums[-1][:, None]
  else:
    to_end = _sums(chunk.lower(size, strict=True).T, g)
    blocks = _blocks(g, min(sub_block, size))
  onto = jnp.where(pairs_to_end(same, mask)[:, None], jnp.exp(to_end), 0.0)
  through = jnp.where(live[-1], into[-1], 0.0)
  return Decays(
    pairs, factor, blocks, into, onto, through, live, live[-1], poison
  )


def _sums(where, g):
  """Sums of g [C] or [C, K] over the steps that `where` [C, C] picks."""
  if g.ndim == 1:  # cheaper than a product with one column
    return jnp.sum(jnp.where(where, g[None, :], 0.0), axis=1, keepdims=True)
  return chunk.matmul(where.astype(jnp.float32), g)


def pairs_to_end(same, mask):
  """bool [C]: step j is there and its segment reaches the chunk's end."""
  return same[-1] if mask is None else same[-1] & mask


def _blocks(g, size):
  count, width = g.shape[0] // size, g.shape[1]
  g = g.reshape(count, size, width)
  low = chunk.lower(size).astype(jnp.float32)
  strict = chunk.lower(size, strict=True).astype(jnp.float32)
  # between[i, j, l] = 1 for l in (j, i].
  between = low[:, None, :] * strict.T[None, :, :]
  inside = chunk.matmul(between.reshape(size * size, size), g).reshape(
    count, size, size, width
  )
  head = chunk.matmul(low, g)
  tail = chunk.matmul(strict.T, g)
  # skipped[I, J, b] = 1 for J < b < I.
  blow = chunk.lower(count, strict=True).astype(jnp.float32)
  skipped = blow[:, None, :] * blow.T[None, :, :]
  middle = chunk.matmul(skipped.reshape(count * count, count), head[:, -1])
  tail = tail[None] + middle.reshape(count, count, 1, width)
  return Blocks(jnp.exp(inside), jnp.exp(head), jnp.exp(tail))


def scores(q, k, d: Decays, dtype=jnp.float32):
  """Σ_c q_ic k_jc (decay of c over (j, i]), zero off `pairs`: f32 [C, C].

  Args:
    q: [C, K]; k: [C, K]; d: the chunk's decays.
    dtype: of the operands of the matmuls.
  """
  size = q.shape[0]
  if d.blocks is None:
    out = chunk.matmul(q, k.T, dtype) * d.factor
  else:
    count, block, _ = d.blocks.head.shape
    qb = q.reshape(count, block, -1).astype(jnp.float32)
    kb = k.reshape(count, block, -1).astype(jnp.float32)
    near = jnp.sum(
      qb[:, :, None, :] * kb[:, None, :, :] * d.blocks.inside, axis=-1
    )
    q_head = qb * d.blocks.head
    k_tail = kb[None] * d.blocks.tail  # [I, J, c, K]
    far = chunk.matmul(
      q_head, jnp.swapaxes(k_tail.reshape(count, size, -1), 1, 2), dtype
    ).reshape(count, block, count, block)
    i = jax.lax.broadcasted_iota(jnp.int32, far.shape, 0)
    j = jax.lax.broadcasted_iota(jnp.int32, far.shape, 2)
    far = jnp.where(i > j, far, 0.0)
    eye = jnp.eye(count, dtype=jnp.float32)[:, None, :, None]
    out = (far + near[:, :, None, :] * eye).reshape(size, size)
  return jnp.where(d.pairs, out, 0.0)


def quarantine(reset, mask, log_decay, *tensors):
  """Zeroes inputs that are not there or not finite.

  A non-finite number times the zero of a mask is not a number, so it would
  cross a reset inside a chunk. With resets, such steps are taken out, and
  `Decays.poison` marks the outputs of their own segment, which become NaN.

  Args:
    reset: bool [C] or None.
    mask: bool [C] or None.
    log_decay: [C], [C, K] or None; −inf counts as finite.
    *tensors: [C] or [C, N] each, or None.

  Returns:
    (bad bool [C] or None, log_decay, *tensors).
  """
  tensors = (log_decay, *tensors)
  bad = None
  if mask is not None:
    tensors = [_keep(x, mask) for x in tensors]
  if reset is not None:
    good = jnp.ones(reset.shape, bool)
    for n, x in enumerate(tensors):
      if x is not None:
        fine = jnp.isfinite(x)
        fine = fine | jnp.isneginf(x) if n == 0 else fine
        good &= fine.reshape(fine.shape[0], -1).all(axis=1)
    tensors = [_keep(x, good) for x in tensors]
    bad = ~good
  return bad, *tensors


def _keep(x, flags):
  if x is None:
    return None
  flags = flags.reshape(flags.shape + (1,) * (x.ndim - 1))
  return jnp.where(flags, x, jnp.zeros_like(x))


def enter(state, live, quarantined: bool):
  """The state as the steps of a chunk may read it, and whether it is bad.

  Args:
    state: [K, V].
    live: bool [C].
    quarantined: the call has resets.

  Returns:
    (state with non-finite numbers zeroed, bool [C] or None: steps that see
    one).
  """
  if not quarantined:
    return state, None
  bad = ~jnp.isfinite(state).all()
  return jnp.where(bad, 0.0, state), live & bad


def spoil(outputs, *poisons):
  """NaN in the rows of outputs [C, V] that a poison marks."""
  for poison in poisons:
    if poison is not None:
      outputs = jnp.where(poison[:, None], jnp.nan, outputs)
  return outputs
