"""Softmax attention over a bounded ring of keys and values, with sinks.

The ring has S slots. The token at position p of its segment is written to

  slot(p) = p                              for p < sinks
            sinks + (p − sinks) mod W      otherwise, W = S − sinks

and then read together with all that the ring holds: the query at position p
sees the keys at positions j <= p with j < sinks or p − j < W, itself among
them. The first `sinks` tokens of a segment stay for good; the others stay W
steps. Up to S tokens this is plain causal attention.

  o_t = Σ_j softmax_j(scale · k_j·q_t) v_j

Sources: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Beltagy et al. 2020,
arXiv:2004.05150, section 3.1 (sliding window); Xiao et al. 2023,
arXiv:2309.17453, section 3.2 (sinks).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.kernels import external
from memzoo.kernels.interpret import interpreting
from memzoo.ops import arguments, chunk


class State(NamedTuple):
  """A ring of keys and values."""

  k: jax.Array  # [S, K]
  v: jax.Array  # [S, V]
  position: jax.Array  # int32 [S], of the token in the slot; −1: empty
  count: jax.Array  # int32 [], tokens seen in this segment


def empty(
  capacity: int, key_width: int, value_width: int, dtype=jnp.float32
) -> State:
  """The ring that holds nothing: S = capacity, K, V, and the dtype in which
  keys and values are kept."""
  return State(
    k=jnp.zeros((capacity, key_width), dtype),
    v=jnp.zeros((capacity, value_width), dtype),
    position=jnp.full((capacity,), -1, jnp.int32),
    count=jnp.zeros((), jnp.int32),
  )


def write(state: State, k, v, *, sinks: int = 0) -> State:
  """The next token: k [K], v [V]."""
  slot = _slot(state.count, state.k.shape[0], sinks)
  return State(
    k=state.k.at[slot].set(k.astype(state.k.dtype)),
    v=state.v.at[slot].set(v.astype(state.v.dtype)),
    position=state.position.at[slot].set(state.count),
    count=state.count + 1,
  )


def read(state: State, q, *, scale: float | None = None):
  """Attention to all that the ring holds: q [K] -> [V], in q's dtype; zero
  where it holds nothing."""
  visible = (state.position >= 0)[None]
  return _attend(q[None], state.k, state.v, visible, scale)[0]


def step(state: State, q, k, v, *, sinks: int = 0, scale: float | None = None):
  """One token, written and then read: (state, o [V])."""
  state = write(state, k, v, sinks=sinks)
  return state, read(state, q, scale=scale)


def positions(
  count: jax.Array,
  length: int,
  *,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
) -> jax.Array:
  """The position of every token in its segment.

  Args:
    count: int32 [], tokens seen in the segment that goes on at step 0.
    length: T.
    reset: bool [T]; True: a segment starts at t.
    mask: bool [T]; False: no token, which takes no position.

  Returns:
    int32 [T]; where there is no token, the position of the one before.
  """
  there = jnp.ones((length,), bool) if mask is None else mask
  seen = jnp.cumsum(there.astype(jnp.int32))
  if reset is None:
    return count + seen - 1
  reset = reset & there
  start = jax.lax.cummax(jnp.where(reset, seen - 1, -1))
  return jnp.where(start < 0, count + seen - 1, seen - 1 - start)


def chunk_size_for(capacity: int, key_width: int) -> int:
  """The C of `chunk_size=None`: about sqrt(S · K) / 2, between 64 and 512.

  The scores of a chunk take C · S numbers, and the rings that the backward
  keeps 2 K S · T / C: where T is near S, a C of this order balances the two.
  """
  size = math.sqrt(capacity * key_width) / 2
  return max(64, min(512, 1 << round(math.log2(max(size, 1)))))


def attention(
  state: State,
  q: axes.Queries,
  k: axes.Keys,
  v: axes.Values,
  *,
  sinks: int = 0,
  scale: float | None = None,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: State | None = None,
  implementation: str | None = None,
  chunk_size: int | None = None,
) -> tuple[State, axes.Values]:
  """Attention over one sequence of one head.

  Args:
    state: the ring to go on from, as `empty` makes it. Keys and values are
      kept, and read, in its dtype.
    q: [T, K].
    k: [T, K].
    v: [T, V].
    sinks: how many tokens at the start of a segment are never forgotten;
      0 <= sinks < S.
    scale: of the scores; K^−½ by default.
    reset: bool [T]; True: the ring is `fresh` before step t.
    mask: bool [T]; False: no step t: nothing is written, no position is
      counted, and the output there is zero.
    fresh: a ring like `state`; the empty one by default.
    implementation: 'scan', 'chunk', 'cudnn' (all of the sequence at once, by
      cuDNN through `jax.nn.dot_product_attention`; its mask takes T (S + T)
      numbers), 'tokamax' (likewise, by `memzoo.kernels.external`), or None.
    chunk_size: C of the chunk form, a power of two; None chooses by S and K.

  Returns:
    (state, outputs [T, V] in v's dtype).

  Raises:
    ValueError: on wrong shapes or dtypes, or sinks that leave no window.
    NotImplementedError: on a form that does not exist.
  """
  _check(state, q, k, v, sinks, reset, mask, fresh)
  capacity, width = state.k.shape
  if chunk_size is None:
    chunk_size = chunk_size_for(capacity, width)
  chunk.power_of_two("chunk_size", chunk_size)
  if mask is not None and reset is not None:
    reset = reset & mask
  inputs = Inputs(q, k, v, reset, mask)
  options = dict(sinks=sinks, scale=scale)
  forms = {
    "scan": lambda: arguments.scan_steps(
      lambda s, x: step(s, x.q, x.k, x.v, **options),
      state,
      inputs,
      _empty_like(state) if fresh is None else fresh,
    ),
    "chunk": lambda: chunk.run(
      chunk_function(**options), state, inputs, fresh, chunk_size=chunk_size
    ),
    "cudnn": lambda: chunk_function(**options, attend=_cudnn(state, inputs))(
      state, inputs, fresh
    ),
    "tokamax": lambda: chunk_function(
      **options, attend=_tokamax(state, inputs)
    )(state, inputs, fresh),
  }
  return dispatch.run("attention", forms, implementation)


class Inputs(NamedTuple):
  q: jax.Array
  k: jax.Array
  v: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


class Local(NamedTuple):
  """What a chunk knows without the ring at its start."""

  inputs: Inputs
  same: jax.Array  # bool [C, C]: j <= i of one segment, both there
  live: jax.Array  # bool [C]: no reset up to i
  last: jax.Array  # bool [C]: there, and in the chunk's last segment
  there: jax.Array  # bool [C]
  ahead: jax.Array  # int32 [C]: tokens of i's segment in this chunk, up to i
  fresh: State | None


def chunk_function(
  sinks: int = 0, scale: float | None = None, attend=None
) -> chunk.ChunkFunction:
  """The chunk function: C queries against [the ring at the chunk's start;
  the keys of the chunk] under a band mask. Its constants are `fresh`.

  `attend` (q [C, K], k [N, K], v [N, V], visible bool [C, N], scale) -> [C, V]
  is the softmax attention itself; zero where nothing is visible.
  """
  attend = attend or _attend

  def advance(state, local):
    return _advance(state, local, sinks)

  def emit(state, local):
    return _emit(state, local, sinks, scale, attend)

  return chunk.ChunkFunction(_prepare, advance, emit)


def _prepare(inputs: Inputs, fresh) -> Local:
  size = inputs.q.shape[0]
  there = jnp.ones((size,), bool) if inputs.mask is None else inputs.mask
  same = chunk.lower(size) & there[None, :]
  live, last = jnp.ones((size,), bool), there
  if inputs.reset is not None:
    resets = inputs.reset.astype(jnp.float32)[:, None]
    segment = chunk.running_sum(resets)[:, 0]
    same &= segment[:, None] == segment[None, :]
    live = segment == 0
    last = there & (segment == segment[-1])
  ahead = jnp.sum(same, axis=1, dtype=jnp.int32)
  same &= there[:, None]
  return Local(inputs, same, live, last, there, ahead, fresh)


def _place(state: State, local: Local):
  """Positions int32 [C] of the tokens of a chunk in their segments."""
  first = 0 if local.fresh is None else local.fresh.count
  return jnp.where(local.live, state.count, first) + local.ahead - 1


def _advance(state: State, local: Local, sinks: int) -> State:
  capacity = state.k.shape[0]
  place = _place(state, local)
  if local.inputs.reset is not None:
    fresh = _empty_like(state) if local.fresh is None else local.fresh
    state = jax.tree.map(
      lambda s, f: jnp.where(local.live[-1], s, f.astype(s.dtype)), state, fresh
    )
  count = state.count + local.ahead[-1]
  # Of the tokens of the last segment, those that are still in the window.
  stays = (place < sinks) | (count - 1 - place < capacity - sinks)
  stays &= local.last
  # Each stays in a slot of its own; what does not stay is dropped.
  index = jnp.arange(place.shape[0], dtype=jnp.int32)
  slot = jnp.where(stays, _slot(place, capacity, sinks), capacity + index)

  def put(ring, rows):
    return ring.at[slot].set(
      rows.astype(ring.dtype), mode="drop", unique_indices=True
    )

  return State(
    k=put(state.k, local.inputs.k),
    v=put(state.v, local.inputs.v),
    position=put(state.position, place),
    count=count,
  )


def _emit(state: State, local: Local, sinks: int, scale, attend):
  window = state.k.shape[0] - sinks
  place = _place(state, local)[:, None]

  def in_window(position):
    return (position < sinks) | (place - position < window)

  def in_ring(ring, rows):
    held = ring.position[None, :]
    return (held >= 0) & in_window(held) & rows[:, None]

  q, k, v = local.inputs.q, local.inputs.k, local.inputs.v
  blocks = [(state, in_ring(state, local.live & local.there))]
  if local.fresh is not None and local.inputs.reset is not None:
    rows = ~local.live & local.there
    blocks.append((local.fresh, in_ring(local.fresh, rows)))
  dtype = state.k.dtype, state.v.dtype
  keys = [ring.k.astype(dtype[0]) for ring, _ in blocks] + [k.astype(dtype[0])]
  values = [ring.v.astype(dtype[1]) for ring, _ in blocks]
  values.append(v.astype(dtype[1]))
  visible = [seen for _, seen in blocks] + [local.same & in_window(place.T)]
  keys, values = jnp.concatenate(keys), jnp.concatenate(values)
  visible = jnp.concatenate(visible, axis=1)
  # Zero times what is not finite is not zero: such rows are taken out, and
  # every query that sees one becomes NaN.
  good_q = jnp.isfinite(q).all(axis=1)
  good = jnp.isfinite(keys).all(axis=1) & jnp.isfinite(values).all(axis=1)
  out = attend(
    _keep(q, good_q), _keep(keys, good), _keep(values, good), visible, scale
  )
  spoiled = jnp.any(visible & ~good[None, :], axis=1)
  spoiled |= ~good_q & local.there
  return jnp.where(spoiled[:, None], jnp.nan, out).astype(v.dtype)


def _attend(q, k, v, visible, scale):
  """q [C, K], k [N, K], v [N, V], visible bool [C, N] -> [C, V]."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  scores = scale * chunk.matmul(q, k.T, q.dtype)
  top = jnp.max(scores, axis=1, keepdims=True, initial=-jnp.inf, where=visible)
  top = jax.lax.stop_gradient(jnp.where(visible.any(1)[:, None], top, 0.0))
  weights = jnp.exp(jnp.where(visible, scores - top, -jnp.inf))
  total = jnp.sum(weights, axis=1, keepdims=True)
  out = chunk.matmul(weights, v, q.dtype) / jnp.where(total == 0, 1.0, total)
  return out.astype(q.dtype)


def _cudnn(state: State, inputs: Inputs):
  """cuDNN's attention in the place of `_attend`, where it serves the call."""
  inside = interpreting()
  if not inside and dispatch.current_platform() != "gpu":
    raise NotImplementedError("cuDNN runs on NVIDIA GPUs")
  _check_half("cuDNN", state, inputs)
  width, values = inputs.k.shape[1], inputs.v.shape[1]
  if width != values or not inside and (width % 8 or width > 128):
    raise NotImplementedError(
      f"cuDNN takes K = V, a multiple of 8 up to 128, got {width} and {values}"
    )

  def attend(q, k, v, visible, scale):
    seen = visible.any(axis=1, keepdims=True)
    out = jax.nn.dot_product_attention(
      q[:, None], k[:, None], v[:, None], mask=(visible | ~seen)[None],
      scale=scale, implementation="xla" if inside else "cudnn",
    )  # fmt: skip
    return jnp.where(seen, out[:, 0], 0.0)

  return attend


def _tokamax(state: State, inputs: Inputs):
  """tokamax's attention in the place of `_attend`, where it serves the call."""
  one = external.tokamax()
  _check_half("tokamax", state, inputs)

  def attend(q, k, v, visible, scale):
    seen = visible.any(axis=1, keepdims=True)
    return jnp.where(seen, one(q, k, v, visible | ~seen, scale), 0.0)

  return attend


def _check_half(who, state: State, inputs: Inputs):
  dtypes = {x.dtype.name for x in (*inputs[:3], state.k, state.v)}
  half = dtypes <= {"bfloat16", "float16"} or interpreting()
  if len(dtypes) > 1 or not half:
    raise NotImplementedError(
      f"{who} takes q, k, v and a ring of one dtype, bfloat16 or float16, got "
      + ", ".join(sorted(dtypes))
    )


def _slot(position, capacity: int, sinks: int):
  ring = sinks + (position - sinks) % (capacity - sinks)
  return jnp.where(position < sinks, position, ring)


def _keep(x, rows):
  return jnp.where(rows[:, None], x, jnp.zeros_like(x))


def _empty_like(state: State) -> State:
  return jax.tree.map(jnp.zeros_like, state)._replace(
    position=jnp.full_like(state.position, -1)
  )


def _check(state, q, k, v, sinks, reset, mask, fresh):
  who = "attention"
  if jnp.ndim(q) != 2:
    hint = ": map it over heads and batch with jax.vmap"
    arguments.fail(who, "q", "floating [T, K] of one head" + hint, q)
  length, width = jnp.shape(q)
  arguments.check_array(who, "q", q, (length, width))
  arguments.check_array(who, "k", k, (length, width))
  arguments.check_array(who, "v", v, (length, None))
  if not jnp.result_type(q) == jnp.result_type(k) == jnp.result_type(v):
    raise ValueError(
      f"{who}: q, k and v must have one dtype, got {arguments.describe(q)}, "
      f"{arguments.describe(k)}, {arguments.describe(v)}"
    )
  values = jnp.shape(v)[1]
  arguments.check_array(who, "state.k", state.k, (None, width))
  capacity = jnp.shape(state.k)[0]
  for name, ring in (("state", state), ("fresh", fresh)):
    if ring is None:
      continue
    arguments.check_array(who, f"{name}.k", ring.k, (capacity, width))
    arguments.check_array(who, f"{name}.v", ring.v, (capacity, values))
    arguments.check_array(
      who, f"{name}.position", ring.position, (capacity,), jnp.integer
    )
    arguments.check_array(who, f"{name}.count", ring.count, (), jnp.integer)
  if not 0 <= sinks < capacity:
    raise ValueError(
      f"{who}: sinks must be in 0 … {capacity - 1} for a ring of {capacity} "
      f"slots, got {sinks}"
    )
  arguments.check_flags(who, length, reset, mask)
