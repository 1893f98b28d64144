"""SkiM: LSTMs over short segments, and LSTMs that skip from one to the next.

The sequence is cut into segments of K inputs. In layer l a SegLSTM reads each
segment from the state (h_s, c_s) that it is given; a MemLSTM reads the states
in which the segments end, one a segment, and what it gives is where the SegLSTM
of the next layer starts in the next segment:

  x, (h_s, c_s) = SegLSTM_l(x, start_s^l) ,  x ← x + norm(W LSTM(x) + b)
  h'_s = h_s + norm(LSTM^h_l(h_1 … h_s))
  c'_s = c_s + norm(LSTM^c_l(c_1 … c_s))
  start_s^{l+1} = (h'_{s−1}, c'_{s−1}) ,  start_1 = 0 ,  start^1 = 0

so that an input T back is T / K steps away. After the last layer come a PReLU
and a linear map. The unit is the token: nothing waits for a segment's end.

A whole sequence has two forms: 'step', token by token, and 'segment', all
segments of a layer side by side, in K + T / K serial steps a layer.

Differs: the causal form alone; the authors also have a bidirectional one. The
encoder and decoder of waveforms around it, and the loss over permutations of
speakers, are not here: inputs and outputs are features. Dropout is left out.

Paper: Li, Yang, Wang, Qian 2022, "SkiM: Skipping Memory LSTM for Low-Latency
  Real-Time Continuous Speech Separation", arXiv:2201.10800, section 2 and
  figure 1; the norm (per input, over channels), the projection behind each
  LSTM and the output layer as in the authors' code (github.com/espnet/espnet,
  espnet2/enh/layers/skim.py).
"""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.core import dispatch, initializers
from memzoo.core.linear import dot
from memzoo.models import layers
from memzoo.models.encoder import check_size
from memzoo.ops import norm

# What the MemLSTMs hand on: both states, one of them, or both as they are.
MEMORIES = ("hc", "h", "c", "id")


class Pair(NamedTuple):
  """Of an LSTM."""

  h: jax.Array  # [..., H] float32
  c: jax.Array


class State(NamedTuple):
  """What the layers hold between two tokens, of every row."""

  place: jax.Array  # int32 [B], tokens read of the present segment, 0 … K
  segment: Any  # a `Pair` [B, H] per layer
  memory: (
    Any  # per MemLSTM, {'h': Pair [B, H], 'c': Pair}, as far as it has them
  )


class LSTM(nnx.Module):
  """One LSTM and a map behind it: norm(W LSTM(x) + b).

  Args:
    width: of x and of what comes out.
    hidden: H.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
    draw = lambda *shape: nnx.Param(
      initializers.uniform(rngs.params(), shape, hidden**-0.5)
    )
    self.x, self.h = draw(width, 4 * hidden), draw(hidden, 4 * hidden)
    self.b, self.out = draw(4 * hidden), draw(hidden, width)
    self.out_bias = draw(width)
    self.scale = nnx.Param(jnp.ones((width,)))
    self.shift = nnx.Param(jnp.zeros((width,)))

  def __call__(self, state: Pair, x):
    """One step: x [..., width] -> (state, y [..., width])."""
    gates = dot(x, self.x[...]).astype(jnp.float32) + self.b[...]
    i, f, g, o = jnp.split(gates + dot(state.h, self.h[...]), 4, axis=-1)
    c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    y = dot(h.astype(x.dtype), self.out[...])
    y = y + self.out_bias[...].astype(x.dtype)
    return Pair(h, c), norm.layer_norm(y, self.scale[...], self.shift[...])


class SkiM(nnx.Module):
  """Features to features, causally.

  >>> model = SkiM(64, 128, 32, depth=4, segment=150, rngs=nnx.Rngs(0))
  >>> state, ys = model(None, xs)  # float [B, T, 64] -> [B, T, 32]

  Args:
    d_input: width of the inputs, and of the residual stream.
    hidden: H of all LSTMs.
    d_output: width of the outputs.
    depth: number of SegLSTMs; one less are the MemLSTMs.
    segment: K.
    memory: 'hc', 'h' or 'c', which states the MemLSTMs carry on (the other
      starts at zero); 'id': no MemLSTM, states go on as they are.
    rngs: its `params` stream draws the parameters.

  Raises:
    ValueError: on an option out of range.
  """

  def __init__(
    self, d_input: int, hidden: int, d_output: int, *, depth: int = 4,
    segment: int = 150, memory: str = "hc", rngs: nnx.Rngs,
  ):  # fmt: skip
    if memory not in MEMORIES:
      raise ValueError(
        f"SkiM: unknown memory {memory!r}; "
        + dispatch.nearest(str(memory), MEMORIES)
      )
    self.d_input = check_size("d_input", d_input)
    self.hidden = check_size("hidden", hidden)
    self.segment = check_size("segment", segment)
    self.depth = check_size("depth", depth)
    self.memory = memory
    self.seg = nnx.List(
      LSTM(d_input, hidden, rngs=rngs) for _ in range(self.depth)
    )
    kinds = "" if memory == "id" else memory
    self.mem = nnx.List(
      nnx.Dict({k: LSTM(hidden, hidden, rngs=rngs) for k in kinds})
      for _ in range(self.depth - 1)
    )
    self.slope = nnx.Param(jnp.full((), 0.25))
    shape = d_input, check_size("d_output", d_output)
    self.out = nnx.Param(initializers.lecun_normal(rngs.params(), shape))
    self.out_bias = nnx.Param(jnp.zeros(shape[1:]))

  def initial_state(self, batch: int) -> State:
    """The memory of `batch` rows before their first input."""
    zero = jnp.zeros((check_size("batch", batch, 1), self.hidden), jnp.float32)
    pair = Pair(zero, zero)
    return State(
      jnp.zeros((batch,), jnp.int32),
      (pair,) * self.depth,
      tuple({k: pair for k in nets} for nets in self.mem),
    )

  def __call__(
    self, state, inputs, *, reset=None, mask=None, implementation=None,
    max_resets: int | None = None,
  ):  # fmt: skip
    """(state, ys [B, T, d_output]), zero where there is no input.

    Args:
      state: as `initial_state` makes it, or None for that.
      inputs: float [B, T, d_input].
      reset: bool [B, T] or None. True: fresh before this input, which starts a
        segment.
      mask: bool [B, T] or None. False: no input here.
      implementation: 'step', 'segment', or None: 'segment' where the number of
        resets is known and there is more than one token.
      max_resets: the most resets of a row; None: not known. Rows with more
        give NaN.

    Raises:
      ValueError: on arguments of wrong shape or dtype, an unknown form, or
        'segment' with resets whose number is not known.
    """
    shape, kind = jnp.shape(inputs), jnp.result_type(inputs)
    if (
      len(shape) != 3
      or shape[2] != self.d_input
      or not shape[1]
      or not jnp.issubdtype(kind, jnp.floating)
    ):
      raise ValueError(
        f"SkiM: inputs must be float [B, T, {self.d_input}], got {kind} {shape}"
      )
    layers.check_flags("SkiM", shape[:2], reset, mask)
    state = self.initial_state(shape[0]) if state is None else state
    known = reset is None or max_resets is not None
    if implementation is None:
      implementation = "segment" if known and shape[1] > 1 else "step"
    if implementation not in ("step", "segment"):
      raise ValueError(
        f"SkiM: unknown form {implementation!r}; known: segment, step"
      )
    if implementation == "segment" and not known:
      raise ValueError("SkiM: 'segment' with resets needs max_resets")
    there = jnp.ones(shape[:2], bool) if mask is None else mask
    fresh = jnp.zeros_like(there) if reset is None else reset & there
    x = jnp.where(there[..., None], inputs, 0)
    if implementation == "step":
      state, x = jax.vmap(self._steps)(state, x, fresh, there)
    else:
      resets = 0 if reset is None else check_size("max_resets", max_resets, 0)
      rows = -(-shape[1] // self.segment) + 1 + resets
      run = lambda *row: self._segments(rows, *row)
      state, x = jax.vmap(run)(state, x, fresh, there)
    x = jnp.where(x > 0, x, self.slope[...].astype(x.dtype) * x)
    y = dot(x, self.out[...]) + self.out_bias[...].astype(x.dtype)
    return state, jnp.where(there[..., None], y, 0)

  def _skip(self, layer: int, memory, pair: Pair):
    """A MemLSTM on the state in which a segment ends: (memory, where the next
    layer starts in the next segment)."""
    new, out = {}, {}
    for k in memory:
      x = getattr(pair, k)
      new[k], y = self.mem[layer][k](memory[k], x)
      out[k] = x + y
    if self.memory == "id":
      return new, pair
    zero = jnp.zeros_like(pair.h)
    return new, Pair(out.get("h", zero), out.get("c", zero))

  def _steps(self, state, xs, reset, mask):
    """One row, token by token: xs [T, D] -> (state, xs [T, D])."""

    def step(state, inputs):
      x, reset, mask = inputs
      new = jax.tree.map(
        lambda s: jnp.where(reset, jnp.zeros_like(s), s), state
      )
      ends = new.place == self.segment
      starts, memories = [jax.tree.map(jnp.zeros_like, new.segment[0])], []
      for layer, memory in enumerate(new.memory):
        memory, start = self._skip(layer, memory, new.segment[layer])
        memories.append(memory)
        starts.append(start)
      pick = lambda a, b: jax.tree.map(lambda u, v: jnp.where(ends, u, v), a, b)
      segment = pick(tuple(starts), new.segment)
      memory = pick(tuple(memories), new.memory)
      pairs = []
      for net, pair in zip(self.seg, segment):
        pair, y = net(pair, x)
        x = x + y
        pairs.append(pair)
      place = jnp.where(ends, 0, new.place) + 1
      new = State(place, tuple(pairs), memory)
      return jax.tree.map(lambda n, o: jnp.where(mask, n, o), new, state), x

    return jax.lax.scan(step, state, (xs, reset, mask))

  def _segments(self, rows: int, state, xs, reset, mask):
    """One row, its segments side by side in a table [rows, K, D]. The first
    holds the segment that goes on; a reset begins another."""
    size = self.segment
    row, place = self._table(state.place, reset, mask)
    at = row, jnp.where(mask, place, size)
    put = lambda x: jnp.zeros((rows, size, *x.shape[1:]), x.dtype)
    put = lambda x, put=put: put(x).at[at].set(x, mode="drop")
    table, there = put(xs), put(mask)
    begins = (
      jnp.zeros(rows, bool)
      .at[jnp.where(reset, row, rows)]
      .set(True, mode="drop")
    )
    pick = lambda x: x.at[row[-1]].get(mode="fill", fill_value=jnp.nan)
    zero = jax.tree.map(jnp.zeros_like, state.segment[0])
    zeros = jax.tree.map(lambda z: jnp.zeros((rows, *z.shape), z.dtype), zero)
    starts, ends, memories = zeros, [], []
    for layer, net in enumerate(self.seg):
      first = jax.tree.map(
        lambda table, x: table.at[0].set(x), starts, state.segment[layer]
      )

      def read(pair, inputs, net=net):
        x, there = inputs
        new, y = net(pair, x)
        keep = lambda n, o: jnp.where(there[:, None], n, o)
        return jax.tree.map(keep, new, pair), x + y

      end, table = jax.lax.scan(
        read, first, (jnp.swapaxes(table, 0, 1), there.T)
      )
      table = jnp.swapaxes(table, 0, 1)
      ends.append(jax.tree.map(pick, end))
      if layer == self.depth - 1:
        break

      def skip(memory, inputs, layer=layer):
        pair, begins = inputs
        memory = jax.tree.map(
          lambda m: jnp.where(begins, jnp.zeros_like(m), m), memory
        )
        new, start = self._skip(layer, memory, pair)
        return new, (memory, start)

      _, (before, after) = jax.lax.scan(
        skip, state.memory[layer], (end, begins)
      )
      memories.append(jax.tree.map(pick, before))
      shifted = jax.tree.map(lambda a: jnp.roll(a, 1, axis=0), after)
      starts = jax.tree.map(
        lambda s, z: jnp.where(begins[:, None], z, s), shifted, zeros
      )
    state = State(place[-1] + 1, tuple(ends), tuple(memories))
    ys = table[jnp.minimum(row, rows - 1), jnp.minimum(place, size - 1)]
    return state, jnp.where((row < rows)[:, None], ys, jnp.nan)

  def _table(self, place, reset, mask):
    """Where each token of a row stands: (segment, place in it), int32 [T];
    where there is none, the place of the one before it."""

    def step(carry, flags):
      row, place = carry
      reset, mask = flags
      new = reset | (place == self.segment)
      moved = row + new.astype(jnp.int32), jnp.where(new, 0, place) + 1
      moved = jax.tree.map(lambda n, o: jnp.where(mask, n, o), moved, carry)
      return moved, moved

    carry = jnp.zeros((), jnp.int32), place
    _, (row, place) = jax.lax.scan(step, carry, (reset, mask))
    return row, place - 1
