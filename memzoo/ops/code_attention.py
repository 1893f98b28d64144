"""Softmax attention in linear time: keys are codewords, the far ones counted.

  o_t = Σ_{i <= t} softmax_i(q_t·C_{z_i} + p_{t−i}) v_i ,  p = 0 from W steps on

Keys are rows of a codebook C [S, K], so that what lies W steps back and more
needs, for each code, no more than the number of its keys and the sum of their
values:

  o_t = (Σ_{t−i < W} e^{q·k̂_i + p_{t−i}} v_i + Σ_s e^{q·C_s} total_s)
      / (Σ_{t−i < W} e^{q·k̂_i + p_{t−i}}     + Σ_s e^{q·C_s} number_s)

The codebook is a constant here. A key k̂_i = C_{z_i} may have a gradient (a
straight-through one): scores have it while the key is in the window.

Source: Lingle 2023, "Transformer-VQ: Linear-Time Transformers via Vector
Quantization", arXiv:2309.16354, and its authors' code
(github.com/transformer-vq/transformer_vq), whose biases are no table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import dispatch
from memzoo.ops import arguments, chunk
from memzoo.ops.attention import positions

CHUNK_SIZE = 32


class State(NamedTuple):
  """What was counted, and a ring of the last W tokens."""

  total: jax.Array  # [S, V] float32
  number: jax.Array  # [S] float32
  k: jax.Array  # [W, K] float32
  v: jax.Array  # [W, V] float32
  code: jax.Array  # int32 [W]
  position: jax.Array  # int32 [W]; −1: empty
  count: jax.Array  # int32 [], tokens of the segment


class Inputs(NamedTuple):
  q: jax.Array  # float32 [T, K], scaled
  k: jax.Array  # float32 [T, K], the codewords
  code: jax.Array  # int32 [T]
  v: jax.Array  # float32 [T, V]
  reset: jax.Array | None = None  # bool [T]
  mask: jax.Array | None = None  # bool [T]


def quantize(k, codes):
  """z = argmin_s ‖k − C_s‖² for k [..., K] and codes [S, K].

  Returns:
    (z int32 [...], C_z with the gradient of k, ‖k − C_z‖² [...]). None goes to
    the codebook.
  """
  codes = jax.lax.stop_gradient(codes)
  distance = jnp.sum(jnp.square(codes), 1) - 2 * chunk.matmul(k, codes.T)
  z = jnp.argmin(distance, axis=-1).astype(jnp.int32)
  error = codes[z] - k
  through = k + jax.lax.stop_gradient(error)
  return z, through, jnp.sum(jnp.square(error), axis=-1)


def empty(codes: int, window: int, key_width: int, value_width: int) -> State:
  """The state that holds nothing, for S codes and a window of W."""
  zero = lambda *shape: jnp.zeros(shape, jnp.float32)
  return State(
    zero(codes, value_width), zero(codes), zero(window, key_width),
    zero(window, value_width), jnp.zeros((window,), jnp.int32),
    jnp.full((window,), -1, jnp.int32), jnp.int32(0),
  )  # fmt: skip


def step(state: State, i: Inputs, codes, bias):
  """One token, counted among those that it sees: (state, o [V])."""
  slot = state.count % len(state.position)
  left = (state.position[slot] >= 0).astype(jnp.float32)
  at = state.code[slot]
  state = State(
    state.total.at[at].add(left * state.v[slot]),
    state.number.at[at].add(left),
    state.k.at[slot].set(i.k),
    state.v.at[slot].set(i.v),
    state.code.at[slot].set(i.code),
    state.position.at[slot].set(state.count),
    state.count + 1,
  )
  back = state.count - 1 - state.position
  near = state.k @ i.q + bias[jnp.clip(back, 0, len(bias) - 1)]
  seen = (state.position >= 0)[None], (state.number > 0)[None]
  far = codes @ i.q
  sums = state.number, state.total
  return state, _read(near[None], far[None], state.v, sums, seen)[0]


def code_attention(
  state: State, inputs: Inputs, codes, bias, *, implementation=None,
  chunk_size: int = CHUNK_SIZE,
):  # fmt: skip
  """The attention over one sequence.

  Args:
    state: as `empty` makes it, or a call returns it.
    inputs: of the sequence. reset True: the state is empty before step t; mask
      False: no step t, the output there means nothing.
    codes: float32 [S, K]; no gradient goes to it.
    bias: float32 [W], p.
    implementation: 'scan' (the step loop), 'chunk' (chunks of C queries
      against C + W keys and S codes), or None.
    chunk_size: C, a power of two.

  Returns:
    (state, o float32 [T, V]).
  """
  chunk.power_of_two("chunk_size", chunk_size)
  codes = jax.lax.stop_gradient(codes)
  fresh = empty(len(codes), len(bias), codes.shape[1], inputs.v.shape[1])
  forms = {
    "scan": lambda: arguments.scan_steps(
      lambda s, i: step(s, i, codes, bias), state, inputs, fresh
    ),
    "chunk": lambda: chunk.run(
      _chunk, state, inputs, (codes, bias), chunk_size=chunk_size
    ),
  }
  return dispatch.run("code_attention", forms, implementation)


def _read(near, far, v, sums, seen):
  """Of scores near [C, N] of keys, with values v, and far [C, S] of codes, with
  numbers and totals in `sums`, of which `seen` are there: [C, V]."""
  near = jnp.where(seen[0], near, -jnp.inf)
  far = jnp.where(seen[1], far, -jnp.inf)
  top = jnp.maximum(jnp.max(near, 1), jnp.max(far, 1))
  top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))[:, None]
  near, far = jnp.exp(near - top), jnp.exp(far - top)
  weight = jnp.sum(near, axis=1) + chunk.matmul(far, sums[0])
  out = chunk.matmul(near, v) + chunk.matmul(far, sums[1])
  return out / jnp.where(weight == 0, 1, weight)[:, None]


def _finite(x):
  """x [N, ...] with zeros in rows that are not finite, and which are."""
  good = jnp.all(jnp.isfinite(x), axis=1)
  return jnp.where(good[:, None], x, 0), good


def _chunk(state: State, i: Inputs, constants):
  codes, bias = constants
  size, window = i.q.shape[0], len(bias)
  there = jnp.ones((size,), bool) if i.mask is None else i.mask
  reset = jnp.zeros((size,), bool) if i.reset is None else i.reset & there
  segment = jnp.cumsum(reset.astype(jnp.int32))
  place = positions(state.count, size, reset=reset, mask=there)
  # The ring, which is of segment 0, and the chunk.
  k, v, code, position, part = (
    jnp.concatenate(pair)
    for pair in (
      (state.k, i.k), (state.v, i.v), (state.code, i.code),
      (state.position, jnp.where(there, place, -1)),
      (jnp.zeros_like(state.position), segment),
    )
  )  # fmt: skip
  back = place[:, None] - position
  seen = (position >= 0) & (segment[:, None] == part)
  seen &= jnp.arange(-window, size) <= jnp.arange(size)[:, None]
  # A code counts once one of its keys has left the window.
  gone = (seen & (back >= window)).astype(jnp.float32)
  gone = chunk.matmul(gone, jax.nn.one_hot(code, len(codes)))
  counted = (segment == 0)[:, None] & (state.number + gone > 0)
  # Zero times what is not finite is not zero: such rows are taken out, and
  # every query that sees one becomes NaN.
  kv = jnp.concatenate([k, v], axis=1)
  (q, good_q), (_, good), (total, good_total) = map(
    _finite, (i.q, kv, state.total)
  )
  k, v = (jnp.where(good[:, None], x, 0) for x in (k, v))
  far = chunk.matmul(q, codes.T)
  near = chunk.matmul(q, k.T) + bias[jnp.clip(back, 0, window - 1)]
  near = jnp.where(back < window, near, far[:, code])
  out = _read(near, far, v, (state.number, total), (seen, counted))
  spoiled = (
    ~good_q | jnp.any(seen & ~good, 1) | jnp.any(counted & ~good_total, 1)
  )
  out = jnp.where(spoiled[:, None], jnp.nan, out)

  # What is left of the last segment goes to the counts or to the ring.
  stays = (position >= 0) & (part == segment[-1])
  count = jnp.where(segment[-1] == 0, state.count, 0)
  count += jnp.sum(there & (segment == segment[-1]), dtype=jnp.int32)
  leaves = stays & (count - position > window)
  stays &= ~leaves
  live = segment[-1] == 0
  of_code = jax.nn.one_hot(jnp.where(leaves, code, -1), len(codes))
  added = chunk.matmul(of_code.T, v)
  lost = jnp.any((of_code > 0) & ~good[:, None], axis=0)[:, None]
  slot = jnp.where(stays, position % window, window)
  put = lambda ring, *rows: (
    jnp.zeros_like(ring).at[slot].set(jnp.concatenate(rows), mode="drop")
  )
  return State(
    jnp.where(live, state.total, 0) + jnp.where(lost, jnp.nan, added),
    jnp.where(live, state.number, 0) + jnp.sum(of_code, axis=0),
    put(state.k, state.k, i.k),
    put(state.v, state.v, i.v),
    put(state.code, code),
    jnp.full_like(state.position, -1).at[slot].set(position, mode="drop"),
    count,
  ), out
