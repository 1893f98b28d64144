"""LAVO: attention to an orthogonal memory and a window."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments
from memzoo.ops.attention import (
  State as Ring,
  attention,
  positions,
  step as attend_step,
)
from memzoo.ops.linear_recurrence import linear_recurrence, step as decay_step

# One position and one count serve all heads.
_RING = Ring(k=0, v=0, position=None, count=None)
_NEVER = -3e4  # of a score: its exponential is exactly 0, and float16 has it
# [..., H, N] by [H, N, M] -> [..., H, M].
_dot_heads = jax.vmap(dot, in_axes=(-2, 0), out_axes=-2)


class State(NamedTuple):
  mean: jax.Array  # [H, R] float32: H = diag(mean) B
  window: jax.Array  # [H, W, K] float32: the last W tokens, c
  position: jax.Array  # int32 [W], of the token in the slot; −1: empty
  count: jax.Array  # int32 [], tokens of the segment


@register(
  "orthogonal_memory",
  family="matrix",
  year=2023,
  paper="Zhang et al. 2023, arXiv:2312.11135",
  write="running mean",
  evidence="bronze",
  tiny=dict(d_model=6, num_heads=2, num_bases=2, window=5),
)
@dataclasses.dataclass(frozen=True)
class OrthogonalMemory(cell.Cell):
  """LAVO: the mean of all tokens along orthogonal bases, and a small window.

    H_t = ((t − 1) H_{t−1} + diag(B c_t) B) / t         B Bᵀ = I, r rows
    g_t = softmax(H_t q_t / sqrt(K))ᵀ H_t               global context
    l_t = Σ_j softmax_j(q_t·c_j / sqrt(K) + p_{t − j}) c_j
    y_t = W_o (g_t + l_t) / 2 ,  q, c = W_q x, W_c x    per head

  c is key and value in one. The sequence is dissected into windows of W
  tokens, from the start of a segment; j runs over those of t's own window up
  to t. Nothing decays: H_t is diag(m_t) B with m_t = B · mean of c_1 … c_t, so
  that r numbers a head hold it. The bases are orthonormal and fixed; W_q, W_c
  and W_o, which meet them, are learned.

  State: mean [H, R] and window [H, W, K] float32 from zero, position [W] from
    −1 and count [] from 0, int32. K = d_model / num_heads.
  Params: qc [D, 2D], bias [H, W] (p), out [D, D]; buffers: bases [H, R, K].
  Forms: step and scan O(D (R + W)) a token, in order; assoc the same, the mean
    by an associative scan over the sequence; chunk O(D (R + C + W)) a token,
    in T / C sequential steps.
  Differs: the paper's text and code were not to be had; the rule is put
    together from its abstract and its public reviews, which have: bases and a
    mean of projections over all tokens without a decay, attention to it, keys
    and values that are one vector, dissection into windows of width w for a
    cost of O(wn + rn), additive relative positions in them. Open, and chosen
    here: that tokens are projected before they are compressed, that windows
    are blocks and not sliding, that the two contexts have a softmax each and
    are averaged, scores scaled by 1 / sqrt(K), fixed bases. Cross-attention is
    not built.
  Paper: Zhang, Jiang, Feng, Zheng, Kong 2023, "Linear Attention via Orthogonal
    Memory", arXiv:2312.11135; abstract, and the reviews of the submission to
    ICLR 2024 (openreview.net, Rn3qJGOitY).
  """

  d_model: int
  num_heads: int = 1
  num_bases: int = 8
  window: int = 32

  implementations: ClassVar[tuple[str, ...]] = ("scan", "assoc", "chunk")
  op: ClassVar[str] = "linear_recurrence"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "num_bases", "window"
    )
    arguments.check_divides(self, "num_heads", "d_model")
    if self.num_bases > self.width:
      raise ValueError(
        "OrthogonalMemory: num_bases must be at most d_model / num_heads = "
        f"{self.width}, got {self.num_bases}"
      )

  @property
  def width(self) -> int:
    """K of every head."""
    return self.d_model // self.num_heads

  def init(self, key) -> dict[str, Any]:
    d, h = self.d_model, self.num_heads
    key_qc, key_out, key_b = jax.random.split(key, 3)
    shape = (self.num_bases, self.width)
    return {
      "qc": initializers.lecun_normal(key_qc, (d, 2 * d)),
      "bias": jnp.zeros((h, self.window)),
      "out": initializers.lecun_normal(key_out, (d, d)),
      "buffers": {
        "bases": jax.vmap(lambda key: initializers.orthogonal(key, shape))(
          jax.random.split(key_b, h)
        )
      },
    }

  def initial_state(self, params, key=None) -> State:
    h, w = self.num_heads, self.window
    return State(
      jnp.zeros((h, self.num_bases), jnp.float32),
      jnp.zeros((h, w, self.width), jnp.float32),
      jnp.full((w,), -1, jnp.int32),
      jnp.zeros((), jnp.int32),
    )

  def step(self, params, state, x):
    q, c, projected = self._project(params, x)
    new, decay = self._mean_inputs(projected, state.count)
    mean, _ = decay_step(state.mean, new, decay)
    one = lambda *a: attend_step(*a, scale=1.0)
    ring, local = jax.vmap(one, (_RING, 0, 0, 0), (_RING, 0))(
      self._ring(state), *self._local(params, q, c, state.count)
    )
    y = self._read_out(params, q, mean, local)
    return State(mean, ring.v, ring.position, ring.count), y

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    q, c, projected = self._project(params, xs)
    place = positions(state.count, len(xs), **flags)
    new, decay = self._mean_inputs(projected, place)
    mean, means = linear_recurrence(
      state.mean.reshape(-1), new.reshape(len(xs), -1),
      decay=decay.reshape(len(xs), -1), implementation=implementation, **flags,
    )  # fmt: skip
    whole = lambda *a: attention(*a, scale=1.0, **flags)
    ring, local = jax.vmap(whole, (_RING, 1, 1, 1), (_RING, 1))(
      self._ring(state), *self._local(params, q, c, place)
    )
    y = self._read_out(params, q, means.reshape(new.shape), local)
    mean = mean.reshape(state.mean.shape)
    return State(mean, ring.v, ring.position, ring.count), y

  def _project(self, params, x):
    """q, c [..., H, K] and B c [..., H, R]."""
    qc = dot(x, params["qc"])
    qc = qc.reshape(qc.shape[:-1] + (2, self.num_heads, self.width))
    q, c = qc[..., 0, :, :] * self.width**-0.5, qc[..., 1, :, :]
    return q, c, self._along(params, c)

  def _along(self, params, u):
    """B u: [..., H, K] -> [..., H, R]."""
    return _dot_heads(u, jnp.swapaxes(_bases(params), 1, 2))

  def _mean_inputs(self, projected, place):
    """What is added, and what is left, at place 0, 1, … of a segment."""
    new = projected.astype(jnp.float32)
    count = (place + 1).astype(jnp.float32)[..., None, None]
    return new / count, jnp.broadcast_to((count - 1) / count, new.shape)

  def _ring(self, state) -> Ring:
    """The window with keys [c, one-hot slot], by which `_local` biases."""
    slots = jnp.eye(self.window, dtype=jnp.float32)
    slots = jnp.broadcast_to(slots, (self.num_heads, *slots.shape))
    keys = jnp.concatenate([state.window, slots], axis=-1)
    return Ring(keys, state.window, state.position, state.count)

  def _local(self, params, q, c, place):
    """Queries [q, p by slot] and keys [c, one-hot slot], both [..., H, K + W],
    and values c: their products are q·c + p, or −3e4 in an older window."""
    slot = place % self.window
    back = slot[..., None] - jnp.arange(self.window)
    bias = jnp.moveaxis(params["bias"], 0, -1)[jnp.maximum(back, 0)]
    bias = jnp.where(back[..., None] >= 0, bias, _NEVER).astype(q.dtype)
    bias = jnp.swapaxes(bias, -1, -2)
    at = jax.nn.one_hot(slot, self.window, dtype=c.dtype)[..., None, :]
    at = jnp.broadcast_to(at, c.shape[:-1] + (self.window,))
    with_slot = lambda u, extra: jnp.concatenate([u, extra], axis=-1)
    return with_slot(q, bias), with_slot(c, at), c

  def _read_out(self, params, q, mean, local):
    scores = mean * self._along(params, q).astype(jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1) * mean
    o = _dot_heads(weights.astype(q.dtype), _bases(params)) + local
    return dot(o.reshape(o.shape[:-2] + (-1,)) / 2, params["out"])


def _bases(params):
  return jax.lax.stop_gradient(params["buffers"]["bases"])
