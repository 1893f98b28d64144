"""Linear attention with an exponential input gate and a normaliser.

  S_t = f_t S_{t−1} + i_t k_t v_tᵀ ,   n_t = f_t n_{t−1} + i_t k_t
  o_t = S_tᵀ q_t / max(|n_tᵀ q_t|, 1)

The gate i_t = exp(log_input_t) has no upper bound, so what is kept is S and n
divided by exp(m_t), where

  m_t = max(log f_t + m_{t−1}, log i_t) ,

and the 1 of the denominator becomes exp(−m_t). Every form keeps this very m: a
chunk takes the maximum over its writes, decayed to each of its steps, and the
m at its start. Source: Beck et al. 2024, arXiv:2405.04517, eq. 15-21.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.ops import arguments, chunk, decay

CHUNK_SIZE = 64
EPS = 1e-6  # of the authors' code, added to the denominator
_NOTHING = -1e30  # below every maximum: no write
_CEILING = 80.0  # exp of it is a float


class State(NamedTuple):
  s: jax.Array  # [K, V] float32: Σ i k vᵀ exp(−m)
  n: jax.Array  # [K] float32: Σ i k exp(−m)
  m: jax.Array  # [] float32


def empty(keys: int, values: int) -> State:
  """The state before the first step: zeros."""
  zeros = partial(jnp.zeros, dtype=jnp.float32)
  return State(zeros((keys, values)), zeros((keys,)), zeros(()))


def step(state: State, q, k, v, log_input, log_decay):
  """One step: (state, q [K], k [K], v [V], log_input and log_decay scalars) ->
  (state, o [V] in v's dtype)."""
  dtype, (q, k, v) = v.dtype, (x.astype(jnp.float32) for x in (q, k, v))
  log_input, log_decay = _floor(log_input), _floor(log_decay)
  old = log_decay + state.m
  m = jnp.maximum(old, log_input)
  keep, add = jnp.exp(old - m), jnp.exp(log_input - m)
  s = keep * state.s + (add * k)[:, None] * v
  n = keep * state.n + add * k
  o = _divide(chunk.matmul(q, s), jnp.sum(q * n), m)
  return State(s, n, m), o.astype(dtype)


def _floor(x):
  # −inf is no number: its exponential is 0 as that of the floor is.
  return jnp.maximum(x.astype(jnp.float32), decay.FLOOR)


def _divide(numerator, denominator, m):
  one = jnp.exp(jnp.minimum(-m, _CEILING))
  return numerator / (jnp.maximum(jnp.abs(denominator), one) + EPS)


def exponential_attention(
  state: State,
  q: axes.Queries,
  k: axes.Keys,
  v: axes.Values,
  *,
  log_input: axes.Scalars,
  log_decay: axes.Scalars,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: State | None = None,
  implementation: str | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[State, axes.Values]:
  """The recurrence over one sequence of one head.

  Args:
    state: to go on from; `empty` makes the first.
    q: [T, K]; no scaling is applied.
    k: [T, K].
    v: [T, V].
    log_input: [T], of any sign and size; −inf writes nothing.
    log_decay: [T], at most 0 (a forget gate above 1 is legal too); −inf clears
      the state.
    reset: bool [T]; True: the state is `fresh` before step t.
    mask: bool [T]; False: no step t; the output there is zero.
    fresh: a `State`, zeros by default.
    implementation: 'scan', 'chunk', or None.
    chunk_size: C of the chunk form, a power of two.

  Returns:
    (state, outputs [T, V] in v's dtype).

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a form that does not exist.
  """
  who = "exponential_attention"
  arguments.check_matrix_op(who, state.s, q, k, v, reset=reset, mask=mask)
  length, width = q.shape
  for name, gate in (("log_input", log_input), ("log_decay", log_decay)):
    arguments.check_array(who, name, gate, (length,))
  for what, given in (("state", state), ("fresh", fresh)):
    if given is not None:
      arguments.check_array(who, f"{what}.s", given.s, state.s.shape)
      arguments.check_array(who, f"{what}.n", given.n, (width,))
      arguments.check_array(who, f"{what}.m", given.m, ())
  chunk.power_of_two("chunk_size", chunk_size)
  if mask is not None and reset is not None:
    reset = reset & mask
  inputs = Inputs(q, k, v, log_input, log_decay, reset, mask)
  forms = {
    "scan": lambda: arguments.scan_steps(
      lambda s, i: step(s, i.q, i.k, i.v, i.log_input, i.log_decay),
      state,
      inputs,
      fresh,
    ),
    "chunk": lambda: chunk.run(
      FUNCTION, state, inputs, fresh, chunk_size=chunk_size, columns=True
    ),
  }
  return dispatch.run(who, forms, implementation)


class Inputs(NamedTuple):
  q: jax.Array
  k: jax.Array
  v: jax.Array
  log_input: jax.Array
  log_decay: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


class Local(NamedTuple):
  """What a chunk knows without the state; `_in` is up to each step, `_out` up
  to the chunk's end."""

  q: jax.Array  # [C, K]
  num_in: jax.Array  # [C, V] of the chunk's own writes, over exp(m_in)
  den_in: jax.Array  # [C, 1]
  m_in: jax.Array  # [C, 1]
  decay_in: jax.Array  # [C, 1] log, from the start of the step's segment
  s_out: jax.Array  # [K, V] what is added, over exp(m_out)
  n_out: jax.Array  # [1, K]
  m_out: jax.Array  # [1, 1]
  decay_out: jax.Array  # [1, 1] log, from the last segment's start
  live: jax.Array  # [C, 1]
  ends_live: jax.Array  # [1, 1]
  poison: jax.Array | None
  fresh: State  # tiles
  v: jax.Array  # for its dtype


def _prepare(inputs: Inputs, fresh) -> Local:
  reset, mask = inputs.reset, inputs.mask
  bad, g, q, k, v, i = decay.quarantine(
    reset, mask, inputs.log_decay, inputs.q, inputs.k, inputs.v,
    jnp.maximum(inputs.log_input, decay.FLOOR),
  )  # fmt: skip
  g, i, mm = (
    _floor(g),
    i.astype(jnp.float32),
    partial(chunk.matmul, dtype=q.dtype),
  )
  d = decay.decays(None, reset, mask, bad, q.shape[0])
  between, to_end = chunk.segment_sums(g), d.onto > 0
  logs = jnp.where(d.pairs, between + chunk.row(i), _NOTHING)
  m_in = jnp.max(logs, axis=1, keepdims=True)
  a = mm(q, k.T) * _exp(logs - m_in, d.pairs)
  onto = jnp.where(to_end, chunk.column(chunk.last(between)) + i, _NOTHING)
  m_out = jnp.max(onto, axis=0, keepdims=True)
  k_out = k.astype(jnp.float32) * _exp(onto - m_out, to_end)
  if fresh is None:
    zeros = jnp.zeros((1, k.shape[1]), jnp.float32)
    fresh = State(jnp.zeros((1, 1), jnp.float32), zeros, zeros[:, :1])
  return Local(
    q=q.astype(jnp.float32),
    num_in=mm(a, v),
    den_in=jnp.sum(a, axis=1, keepdims=True),
    m_in=m_in,
    decay_in=decay.sums(d.pairs, g),
    s_out=mm(k_out.T, v),
    n_out=jnp.sum(k_out, axis=0, keepdims=True),
    m_out=m_out,
    decay_out=jnp.sum(jnp.where(to_end, g, 0.0), axis=0, keepdims=True),
    live=d.live,
    ends_live=d.ends_live,
    poison=d.poison,
    fresh=jax.tree.map(lambda x: x.astype(jnp.float32), fresh),
    v=v,
  )


def _exp(x, there):
  """exp, and 0 with gradient 0 where there is nothing."""
  return jnp.where(there, jnp.exp(jnp.where(there, x, 0.0)), 0.0)


def _advance(state: State, local: Local):
  start = jax.tree.map(
    lambda s, f: chunk.where(local.ends_live, s, f), state, local.fresh
  )
  old = local.decay_out + start.m
  m = jnp.maximum(old, local.m_out)
  keep, add = jnp.exp(old - m), jnp.exp(local.m_out - m)
  new = State(
    keep * start.s + add * local.s_out, keep * start.n + add * local.n_out, m
  )
  if local.poison is None:
    return new
  spoilt = chunk.last(local.poison)
  return jax.tree.map(lambda x: chunk.where(spoilt, jnp.nan, x), new)


def _emit(state: State, local: Local):
  dtype, spoiled = local.v.dtype, None
  if local.poison is not None:
    bad = sum(decay.any_bad(x) for x in state)
    state = jax.tree.map(lambda x: chunk.where(bad, 0.0, x), state)
    spoiled = local.live * bad
  live, fresh, q = local.live, local.fresh, local.q
  old = local.decay_in + chunk.where(live, state.m, fresh.m)
  m = jnp.maximum(old, local.m_in)
  keep, add = jnp.exp(old - m), jnp.exp(local.m_in - m)
  read = lambda s: chunk.matmul(q, jnp.broadcast_to(s.s, state.s.shape), dtype)
  held = lambda s: jnp.sum(q * s.n, axis=1, keepdims=True)
  numerator, denominator = read(state), held(state)
  if local.poison is not None:  # resets are served
    numerator = chunk.where(live, numerator, read(fresh))
    denominator = chunk.where(live, denominator, held(fresh))
  out = _divide(
    keep * numerator + add * local.num_in,
    keep * denominator + add * local.den_in,
    m,
  )
  return decay.spoil(out, local.poison, spoiled).astype(dtype)


FUNCTION = chunk.ChunkFunction(_prepare, _advance, _emit)
