"""Softmax attention to the S tokens of largest weight so far.

Every token has a weight m, added to its score; the query of token t sees the
S largest of the weights of tokens 1 … t, the earlier of equal ones first:

  o_t = Σ_{j ∈ top(t)} softmax_j(scale · k_j·q_t + m_j) v_j

A weight does not depend on the query, so that a token which falls out of the
S largest never comes back: what is kept between two tokens are S keys, values
and weights, in the order in which they came.
Source: Shi and Wu 2024, arXiv:2412.11834 (dynamic mask attention); the choice
of the S largest for each query as in the authors' later code (Doge in
huggingface/transformers, `prepare_dynamic_mask`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.ops import arguments, chunk

CHUNK_SIZE = 64


class State(NamedTuple):
  """Tokens that are kept, oldest last but empty slots first."""

  k: jax.Array  # [S, K]
  v: jax.Array  # [S, V]
  weight: jax.Array  # float32 [S], −inf where the slot is empty


class Inputs(NamedTuple):
  q: jax.Array
  k: jax.Array
  v: jax.Array
  weight: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


def empty(
  capacity: int, key_width: int, value_width: int, dtype=jnp.float32
) -> State:
  """The state that keeps nothing: S = capacity, K, V, and their dtype."""
  return State(
    jnp.zeros((capacity, key_width), dtype),
    jnp.zeros((capacity, value_width), dtype),
    jnp.full((capacity,), -jnp.inf),
  )


def step(state: State, q, k, v, weight, *, scale: float | None = None):
  """One token: q, k [K], v [V], weight [] -> (state, o [V])."""
  new = State(k, v, weight)
  every = jax.tree.map(
    lambda kept, x: jnp.concatenate([kept, x[None].astype(kept.dtype)]),
    state,
    new,
  )
  count = every.weight.shape[0]
  # Out goes the least weight, of equal ones the latest.
  out = count - 1 - jnp.argmin(every.weight[::-1])
  place = jnp.arange(count - 1)
  place += (place >= out).astype(place.dtype)
  state = jax.tree.map(lambda x: x[place], every)
  seen = state.weight > -jnp.inf
  return state, _attend(q[None], *state, seen[None], scale)[0].astype(v.dtype)


def dynamic_mask_attention(
  state: State,
  q: axes.Queries,
  k: axes.Keys,
  v: axes.Values,
  *,
  weight: jax.Array,
  scale: float | None = None,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  implementation: str | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[State, axes.Values]:
  """Attention over one sequence of one head.

  Args:
    state: to go on from, as `empty` makes it.
    q: [T, K].
    k: [T, K].
    v: [T, V].
    weight: m, float32 [T], finite.
    scale: of the scores; K^−½ by default.
    reset: bool [T]; True: nothing is kept before step t.
    mask: bool [T]; False: no step t; the output there is zero.
    implementation: 'scan', 'chunk' (C queries against S + C tokens at once),
      or None.
    chunk_size: C, a power of two.

  Returns:
    (state, outputs [T, V] in v's dtype).

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a form that does not exist.
  """
  who = "dynamic_mask_attention"
  if jnp.ndim(q) != 2:
    arguments.fail(who, "q", "floating [T, K] of one head", q)
  length, width = q.shape
  arguments.check_array(who, "k", k, (length, width))
  arguments.check_array(who, "v", v, (length, None))
  arguments.check_array(who, "weight", weight, (length,))
  arguments.check_array(who, "state.k", state.k, (None, width))
  slots = state.k.shape[0]
  arguments.check_array(who, "state.v", state.v, (slots, v.shape[1]))
  arguments.check_array(who, "state.weight", state.weight, (slots,))
  arguments.check_flags(who, length, reset, mask)
  chunk.power_of_two("chunk_size", chunk_size)
  if mask is not None and reset is not None:
    reset = reset & mask
  weight = weight.astype(jnp.float32)
  weight = jnp.where(weight == 0, 0, weight)  # −0, which `top_k` sets below 0
  inputs = Inputs(q, k, v, weight, reset, mask)
  fresh = empty(slots, width, v.shape[1], state.k.dtype)
  forms = {
    "scan": lambda: arguments.scan_steps(
      lambda s, x: step(s, x.q, x.k, x.v, x.weight, scale=scale),
      state,
      inputs,
      fresh,
    ),
    "chunk": lambda: chunk.run(
      lambda s, x, _: _chunk(s, x, scale), state, inputs, chunk_size=chunk_size
    ),
  }
  return dispatch.run(who, forms, implementation)


def _chunk(state: State, x: Inputs, scale):
  """C tokens after what is kept; columns are in the order of time."""
  size, slots = x.q.shape[0], state.weight.shape[0]
  there = jnp.ones((size,), bool) if x.mask is None else x.mask
  own, live = chunk.lower(size) & there, jnp.ones((size,), bool)
  if x.reset is not None:
    segment = jnp.cumsum(x.reset.astype(jnp.int32))
    own &= segment[:, None] == segment
    live = segment == 0
  held = live[:, None] & (state.weight > -jnp.inf)
  seen = jnp.concatenate([held, own], axis=1)
  every = jax.tree.map(
    lambda kept, new: jnp.concatenate([kept, new.astype(kept.dtype)]),
    state,
    State(x.k, x.v, x.weight),
  )
  weight = jax.lax.stop_gradient(jnp.where(seen, every.weight, -jnp.inf))
  place = jax.lax.top_k(weight, slots)[1]
  rows = jnp.arange(size)[:, None]
  top = jnp.zeros_like(seen).at[rows, place].set(True) & seen
  o = _attend(x.q, *every, top, scale)
  o = jnp.where(there[:, None], o, 0).astype(x.v.dtype)
  # The last row's choice is kept, after what slots it leaves empty.
  place = jnp.sort(jnp.where(top[-1, place[-1]], place[-1], -1))
  kept = jax.tree.map(lambda x: x[place], every)
  fresh = empty(slots, x.k.shape[1], x.v.shape[1], state.k.dtype)
  put = lambda new, none: jnp.where(
    (place >= 0).reshape((-1,) + (1,) * (new.ndim - 1)), new, none
  )
  return jax.tree.map(put, kept, fresh), o


def _attend(q, k, v, weight, visible, scale):
  """q [C, K], k [N, K], v [N, V], weight [N], visible bool [C, N]: float32
  [C, V]."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  weight = jnp.where(weight > -jnp.inf, weight, 0)
  scores = scale * chunk.matmul(q, k.T, q.dtype) + weight
  top = jnp.max(scores, axis=1, keepdims=True, initial=-jnp.inf, where=visible)
  top = jax.lax.stop_gradient(jnp.where(visible.any(1)[:, None], top, 0.0))
  p = jnp.exp(jnp.where(visible, scores - top, -jnp.inf))
  total = jnp.sum(p, axis=1, keepdims=True)
  return chunk.matmul(p, v, q.dtype) / jnp.where(total == 0, 1.0, total)
