"""PredRNN: predicting frames with two memories, one of which zigzags.

Frame by frame, through layers l = 1 … L of ST-LSTMs, all of whose maps (∗) are
convolutions. C^l stays in its layer, as in an LSTM. M climbs through the layers
of one frame and goes on at the bottom of the next (M^0_t = M^L_{t−1}):

  g, i, f = tanh, σ, σ(W_x ∗ X + W_h ∗ H^l_{t−1})
  C^l_t = f ⊙ C^l_{t−1} + i ⊙ g
  g', i', f' = tanh, σ, σ(W'_x ∗ X + W_m ∗ M^{l−1}_t)
  M^l_t = f' ⊙ M^{l−1}_t + i' ⊙ g'
  o = σ(W_xo ∗ X + W_ho ∗ H^l_{t−1} + W_co ∗ C^l_t + W_mo ∗ M^l_t)
  H^l_t = o ⊙ tanh(W_1×1 ∗ [C^l_t, M^l_t])

X is the frame, or H^{l−1}_t, and a 1 × 1 convolution of H^L_t is the predicted
next frame. So that the two memories do not learn the same, the loss adds their
overlap, per channel over the image, with an adapter A that layers share:

  ΔC = A ∗ (i ⊙ g) ,  ΔM = A ∗ (i' ⊙ g')
  overlap = mean over t, l and channels of |⟨ΔC, ΔM⟩| / (‖ΔC‖ ‖ΔM‖)

The unit is the frame: inputs are frames float [B, T, H, W, C], and the model
predicts the frame after each of them. In training the input at t is the true
frame where `given` says so, else the model's own prediction of it.
`reverse_schedule` draws `given` as the paper's reverse scheduled sampling
does: at first the model must predict much of the context itself, and is given
about half of the future; at last it is given all of the context and nothing of
the future.

Differs: no biases, and 1 added inside f and f', as in the authors' code; no
layer norm, which their runs with decoupling do not have. Action-conditioned
prediction is left out.

Paper: Wang, Wu, Zhang, Gao, Wang, Yu, Long 2021, "PredRNN: A Recurrent Neural
  Network for Spatiotemporal Predictive Learning", arXiv:2103.09504, section 3
  (ST-LSTM, zigzag flow, decoupling, reverse scheduled sampling); Wang, Long,
  Wang, Gao, Yu 2017, "PredRNN: Recurrent Neural Networks for Predictive
  Learning using Spatiotemporal LSTMs", NeurIPS, section 3; code
  github.com/thuml/predrnn-pytorch.
"""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.core import initializers
from memzoo.models import layers
from memzoo.models.encoder import check_size


class State(NamedTuple):
  """What the model holds between two frames, of every row. Float32."""

  h: Any  # per layer [B, H / P, W / P, N]
  c: Any  # per layer, the same
  m: jax.Array  # [B, H / P, W / P, N]
  frame: jax.Array  # [B, H, W, C], the prediction of the next frame


def convolve(x, kernel):
  """x [B, H, W, I] ∗ kernel [F, F, I, O], zeros around: [B, H, W, O]."""
  return jax.lax.conv_general_dilated(
    x, kernel.astype(x.dtype), (1, 1), "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip


class STLSTM(nnx.Module):
  """One layer.

  Args:
    channels: of X.
    hidden: N.
    size: F, odd, of the convolutions.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, channels: int, hidden: int, size: int, *, rngs: nnx.Rngs):
    def draw(inputs, outputs, size=size):
      limit = (inputs * size * size) ** -0.5
      shape = size, size, inputs, outputs
      return nnx.Param(initializers.uniform(rngs.params(), shape, limit))

    self.x = draw(channels, 7 * hidden)  # i, f, g, i', f', g', o
    self.h = draw(hidden, 4 * hidden)  # i, f, g, o
    self.m = draw(hidden, 3 * hidden)  # i', f', g'
    self.o = draw(2 * hidden, hidden)
    self.out = draw(2 * hidden, hidden, 1)

  def __call__(self, x, h, c, m):
    """(h, c, m, i ⊙ g, i' ⊙ g'), all [B, H, W, N]."""
    i_x, f_x, g_x, i_y, f_y, g_y, o_x = jnp.split(
      convolve(x, self.x[...]), 7, axis=-1
    )
    i_h, f_h, g_h, o_h = jnp.split(convolve(h, self.h[...]), 4, axis=-1)
    i_m, f_m, g_m = jnp.split(convolve(m, self.m[...]), 3, axis=-1)
    sigmoid = jax.nn.sigmoid
    to_c = sigmoid(i_x + i_h) * jnp.tanh(g_x + g_h)
    c = sigmoid(f_x + f_h + 1) * c + to_c
    to_m = sigmoid(i_y + i_m) * jnp.tanh(g_y + g_m)
    m = sigmoid(f_y + f_m + 1) * m + to_m
    both = jnp.concatenate([c, m], axis=-1)
    o = sigmoid(o_x + o_h + convolve(both, self.o[...]))
    return o * jnp.tanh(convolve(both, self.out[...])), c, m, to_c, to_m


class PredRNN(nnx.Module):
  """Frames to predictions of the frames after them.

  >>> model = PredRNN((64, 64, 1), hidden=64, depth=4, patch=4,
  ...                 rngs=nnx.Rngs(0))
  >>> state, predicted = model(None, frames)  # float [B, T, 64, 64, 1], both

  Args:
    frame: (height, width, channels).
    hidden: N of every layer.
    depth: L.
    size: F, odd, of the convolutions.
    patch: P: frames are folded into P × P C channels. Divides height and
      width.
    rngs: its `params` stream draws the parameters.

  Raises:
    ValueError: on a size out of range.
  """

  def __init__(
    self, frame: tuple[int, int, int], *, hidden: int = 64, depth: int = 4,
    size: int = 5, patch: int = 1, rngs: nnx.Rngs,
  ):  # fmt: skip
    self.frame = height, width, channels = tuple(
      check_size("frame", n) for n in frame
    )
    self.patch = check_size("patch", patch)
    if height % patch or width % patch:
      raise ValueError(
        f"PredRNN: patch={patch} must divide a frame of {height} × {width}"
      )
    if not check_size("size", size) % 2:
      raise ValueError(f"PredRNN: size must be odd, got {size}")
    self.hidden, self.depth = (
      check_size("hidden", hidden), check_size("depth", depth),
    )  # fmt: skip
    folded = channels * patch * patch
    self.layers = nnx.List(
      STLSTM(hidden if layer else folded, hidden, size, rngs=rngs)
      for layer in range(depth)
    )
    draw = lambda *shape: nnx.Param(
      initializers.lecun_normal(rngs.params(), shape)[None, None]
    )
    self.out, self.adapter = draw(hidden, folded), draw(hidden, hidden)

  def initial_state(self, batch: int) -> State:
    """The memory of `batch` rows before their first frame."""
    height, width, _ = self.frame
    shape = height // self.patch, width // self.patch, self.hidden
    zero = jnp.zeros((check_size("batch", batch), *shape), jnp.float32)
    many = (zero,) * self.depth
    return State(many, many, zero, jnp.zeros((batch, *self.frame)))

  def __call__(
    self, state, frames, *, reset=None, mask=None, given=None, reports=False
  ):
    """(state, predictions [B, T, H, W, C]), zero where there is no frame.

    Args:
      state: as `initial_state` makes it, or None for that.
      frames: float [B, T, H, W, C].
      reset: bool [B, T] or None. True: fresh before this frame.
      mask: bool [B, T] or None. False: no frame here.
      given: bool [B, T] or None for all. False: the frame is not looked at;
        the model's prediction of it is the input. The first frame after a
        start is always given.
      reports: also return {'overlap': []}, the mean over the frames.

    Raises:
      ValueError: on arguments of wrong shape or dtype.
    """
    shape, kind = jnp.shape(frames), jnp.result_type(frames)
    floats = jnp.issubdtype(kind, jnp.floating)
    if len(shape) != 5 or shape[2:] != self.frame or not shape[1] or not floats:
      want = ", ".join(map(str, ("B", "T", *self.frame)))
      raise ValueError(
        f"PredRNN: frames must be float [{want}], got {kind} {shape}"
      )
    layers.check_flags("PredRNN", shape[:2], reset, mask)
    layers.check_flags("PredRNN: given", shape[:2], None, given)
    start = None
    if state is None:
      state, start = self.initial_state(shape[0]), True
    there = jnp.ones(shape[:2], bool) if mask is None else mask
    fresh = jnp.zeros_like(there) if reset is None else reset & there
    seen = jnp.ones_like(there) if given is None else given | fresh
    if start:
      first = jnp.cumsum(there.astype(jnp.int32), axis=1) == 1
      seen |= first & there
    rows = lambda flags: flags[:, None, None, None]

    def step(state, inputs):
      frame, fresh, there, seen = inputs
      old, state = (
        state,
        jax.tree.map(
          lambda s: jnp.where(rows(fresh), jnp.zeros_like(s), s), state
        ),
      )
      frame = jnp.where(rows(seen), frame, state.frame.astype(frame.dtype))
      state, overlap = self._frame(state, frame)
      predicted = jnp.where(rows(there), state.frame, 0)
      state = jax.tree.map(
        lambda n, o: jnp.where(rows(there), n, o), state, old
      )
      return state, (predicted, jnp.where(there, overlap, 0))

    frames = jnp.where(there[:, :, None, None, None], frames, 0)
    by_time = lambda x: jnp.swapaxes(x, 0, 1)
    state, (predicted, overlap) = jax.lax.scan(
      step, state, jax.tree.map(by_time, (frames, fresh, there, seen))
    )
    predicted = by_time(predicted).astype(kind)
    if not reports:
      return state, predicted
    count = jnp.maximum(jnp.sum(there), 1).astype(jnp.float32)
    return state, predicted, {"overlap": jnp.sum(overlap) / count}

  def _frame(self, state: State, frame):
    """One frame: (state, overlap [B])."""
    x, m = self._fold(frame), state.m
    hs, cs, overlaps = [], [], []
    for layer, h, c in zip(self.layers, state.h, state.c):
      x, c, m, *writes = layer(x, h, c, m)
      hs.append(x)
      cs.append(c)
      overlaps.append(self._overlap(*writes))
    predicted = self._unfold(convolve(x, self.out[...]))
    state = State(tuple(hs), tuple(cs), m, predicted.astype(jnp.float32))
    return state, sum(overlaps) / self.depth

  def _overlap(self, to_c, to_m):
    """|cos| of what is written, over the image: [B]."""
    unit = lambda x: (
      x
      * jax.lax.rsqrt(
        jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True) + 1e-12
      )
    )
    a, b = (unit(convolve(x, self.adapter[...])) for x in (to_c, to_m))
    return jnp.mean(jnp.abs(jnp.sum(a * b, axis=(1, 2))), axis=1)

  def _fold(self, x):
    (height, width, channels), p = self.frame, self.patch
    x = x.reshape(-1, height // p, p, width // p, p, channels)
    x = jnp.swapaxes(x, 2, 3)
    return x.reshape(-1, height // p, width // p, p * p * channels)

  def _unfold(self, x):
    (height, width, channels), p = self.frame, self.patch
    x = x.reshape(-1, height // p, width // p, p, p, channels)
    return jnp.swapaxes(x, 2, 3).reshape(-1, *self.frame)


def reverse_schedule(
  key: jax.Array, step, batch: int, context: int, length: int, *,
  first: int = 25000, second: int = 50000, alpha: float = 5000.0,
):  # fmt: skip
  """Which frames are given in a step of training: bool [batch, length].

  Of the context frames after the first a share that grows from a half to all,
  1 − ½ exp(−(step − first) / alpha) from `first` on, and 1 from `second` on; of
  the frames after the context a share that falls from a half to none, linearly
  between `first` and `second`.

  Args:
    key: draws the frames.
    step: of the training, from 0.
    batch: rows.
    context: frames that are known when the model is used.
    length: frames in all.
    first: where the shares begin to move.
    second: where they end.
    alpha: how fast the context's share grows.

  Raises:
    ValueError: unless 1 <= context <= length and first < second.
  """
  if not 1 <= context <= length or not first < second or not alpha > 0:
    raise ValueError(
      "reverse_schedule: needs 1 <= context <= length, first < second and "
      f"alpha > 0, got {context}, {length}, {first}, {second}, {alpha}"
    )
  past = jnp.asarray(step, jnp.float32) - first
  grown = 1 - 0.5 * jnp.exp(-jnp.maximum(past, 0) / alpha)
  grown = jnp.where(past >= second - first, 1.0, grown)
  left = 0.5 - 0.5 * jnp.clip(past / (second - first), 0, 1)
  place = jnp.arange(length)
  share = jnp.where(place < context, grown, left)
  share = jnp.where(place == 0, 1.0, share)
  return jax.random.uniform(key, (batch, length)) < share
