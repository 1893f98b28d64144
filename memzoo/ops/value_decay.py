"""Linear attention whose decay acts on the side of the values.

  S_t = S_{t−1} Diag(a_t) + k_t v_tᵀ ,   o_t = S_tᵀ q_t

The state S is [K, V] and a_t = exp(log_decay_t) is [V]: every column of S has
its own decay, and a query reads along the keys, which have none. With the decay
on the side of the keys it is `linear_attention`. Source: Zhang et al. 2024,
arXiv:2409.07146, the first of the two passes of gated slot attention, in the
layout that reads slots.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.ops import arguments, chunk, decay
from memzoo.ops.linear_attention import read

CHUNK_SIZE = 64


def step(s, q, k, v, log_decay):
  """One step: s [K, V], q [K], k [K], v [V], log_decay [V] -> (s, o [V])."""
  s = jnp.exp(log_decay.astype(s.dtype)) * s
  s = s + k.astype(s.dtype)[:, None] * v.astype(s.dtype)
  return s, read(s, q)


def value_decay(
  s: axes.Matrix,
  q: axes.Queries,
  k: axes.Keys,
  v: axes.Values,
  *,
  log_decay: axes.Values,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: axes.Matrix | None = None,
  implementation: str | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[axes.Matrix, axes.Values]:
  """The recurrence over one sequence of one head.

  Args:
    s: float32 [K, V], the state to go on from.
    q: [T, K]; no scaling is applied.
    k: [T, K].
    v: [T, V].
    log_decay: [T, V]. At most 0; −inf clears the column and has gradient 0.
    reset: bool [T]; True: the state is `fresh` before step t.
    mask: bool [T]; False: no step t; the output there is zero.
    fresh: [K, V], zeros by default.
    implementation: 'scan', 'chunk', or None.
    chunk_size: C of the chunk form, a power of two.

  Returns:
    (state float32 [K, V], outputs [T, V] in v's dtype).

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a form that does not exist.
  """
  who = "value_decay"
  arguments.check_matrix_op(
    who, s, q, k, v, reset=reset, mask=mask, fresh=fresh
  )
  arguments.check_array(who, "log_decay", log_decay, jnp.shape(v))
  chunk.power_of_two("chunk_size", chunk_size)
  if mask is not None and reset is not None:
    reset = reset & mask
  inputs = Inputs(q, k, v, log_decay, reset, mask)
  forms = {
    "scan": lambda: arguments.scan_steps(
      lambda s, i: step(s, i.q, i.k, i.v, i.log_decay), s, inputs, fresh
    ),
    "chunk": lambda: chunk.run(
      FUNCTION, s, inputs, fresh, chunk_size=chunk_size, columns=True
    ),
  }
  return dispatch.run(who, forms, implementation)


class Inputs(NamedTuple):
  q: jax.Array
  k: jax.Array
  v: jax.Array
  log_decay: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


class Local(NamedTuple):
  """What a chunk knows without the state."""

  q: jax.Array  # [C, K]; zero where the incoming state is not seen
  out: jax.Array  # [C, V] from the chunk's own writes
  into: jax.Array  # [C, V] decay from the chunk's start
  offset: jax.Array  # [K, V] what the chunk adds
  through: jax.Array  # [1, V] how much of the state stays
  live: jax.Array | None
  poison: jax.Array | None
  v: jax.Array  # for its dtype


def _prepare(inputs: Inputs, fresh) -> Local:
  bad, g, q, k, v = decay.quarantine(
    inputs.reset, inputs.mask, inputs.log_decay, inputs.q, inputs.k, inputs.v
  )
  d = decay.decays(g, inputs.reset, inputs.mask, bad, q.shape[0])
  mm = partial(chunk.matmul, dtype=q.dtype)
  v32, out = v.astype(jnp.float32), 0.0
  a = jnp.where(d.pairs, mm(q, k.T), 0.0)
  # A decay per channel of v is split where the two halves of the smallest
  # block meet that holds both steps: no sum is a difference (`decay.scores`).
  for level in d.levels or ():
    met = jnp.where(level.pairs, a, 0.0)
    out += mm(met, v32 * level.tail) * level.head
  if d.factor is not None:  # one column: the decay is a scalar
    out = mm(a * d.factor, v)
  else:
    # A product where a sum over rows would do: XLA's CPU compiler of jaxlib
    # 0.10.2 and 0.11 gives wrong numbers there (jax-ml/jax#39257).
    out += mm(jnp.where(chunk.diagonal(q.shape[0]), a, 0.0), v32)
  offset = mm(k.T, v32 * d.onto)
  live = None
  if inputs.reset is not None:
    live = d.live
    if fresh is not None:
      fresh = fresh.astype(jnp.float32)
      out += mm(chunk.where(live, 0.0, q), fresh) * d.into
      offset += chunk.where(d.ends_live, 0.0, chunk.last(d.into)) * fresh
    q = chunk.where(live, q, jnp.zeros_like(q))
    offset = chunk.where(chunk.last(d.poison), jnp.nan, offset)
  through = chunk.row(d.through)
  return Local(q, out, d.into, offset, through, live, d.poison, v)


def _effect(local: Local):
  return local.through, local.offset


def _compose(first, second):
  return second[0] * first[0], _scaled(second[0], first[1]) + second[1]


def _apply(effect, s):
  through, offset = effect
  return _scaled(through, s) + offset


def _scaled(scale, s):
  # What is cleared is cleared before it is multiplied: infinities stop there,
  # and so do their gradients.
  return scale * jnp.where(scale == 0, 0.0, s)


def _advance(s, local: Local):
  return _apply(_effect(local), s)


def _emit(s, local: Local):
  s, spoiled = decay.enter(s, local.live, local.live is not None)
  out = local.out + chunk.matmul(local.q, s, local.v.dtype) * local.into
  return decay.spoil(out, local.poison, spoiled).astype(local.v.dtype)


FUNCTION = chunk.ChunkFunction(
  _prepare, _advance, _emit, _effect, _compose, _apply
)
