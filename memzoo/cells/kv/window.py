"""Sliding-window attention with sinks."""

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
  empty,
  positions,
  step,
)
from memzoo.ops.conv import conv, step as conv_step
from memzoo.ops.rotary import rotary

# One position and one count serve all heads.
_RING = Ring(k=0, v=0, position=None, count=None)


class State(NamedTuple):
  ring: Ring  # k, v [G, S, K], position [S], count []
  conv: jax.Array  # [W − 1, (H + 2G) K] float32, no rows without a conv


@register(
  "window",
  family="kv",
  year=2020,
  paper="Beltagy et al. 2020, arXiv:2004.05150",
  write="append, oldest out",
  evidence="silver",
  tiny=dict(
    d_model=6,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    capacity=5,
    sinks=1,
    conv_size=3,
  ),  # fmt: skip
)
@dataclasses.dataclass(frozen=True)
class Window(cell.Cell):
  """Attention to the last W tokens and the first few of a segment.

    q_t, k_t, v_t = W_Q x_t, W_K x_t, W_V x_t    per head; q, k rotated by t
    N(t) = {j <= t : t − j < W or j < sinks} ,  W = capacity − sinks
    o_t = Σ_{j ∈ N(t)} softmax_j(k_j·q_t / √K) v_j
    y_t = W_O [o_t of head 1; … ; o_t of head H]

  With `sliding=False` it is plain causal attention, which takes `capacity`
  tokens and no more. With fewer `num_kv_heads` than heads, H / G heads share
  keys and values. K = head_dim is d_model / num_heads unless it is given.

  State: ring of k and v [G, S, K] in `dtype`, position int32 [S] (−1: empty),
    count int32 []; conv [W − 1, (H + 2G) K] float32. Starts empty; S =
    capacity.
  Params: qkv [D, (H + 2G) K], out [H K, D]; conv [W, (H + 2G) K] (where
    conv_size > 0).
  Forms: step O(D² + H S K) a token; scan hoists the projections, the same
    order of work; chunk reads S + C keys for C queries at once and keeps T / C
    rings for the backward.
  Differs: Longformer's dilation and its symmetric window are left out: the
    window is causal. Longformer has learned absolute positions; here rotary
    ones, at the token's place in its segment. StreamingLLM counts positions
    inside the cache, so that a sink stays S − 1 away at most; here a sink is
    as far as it is in the text. No biases. A short convolution of q, k, v
    (`conv_size`, 0 is the papers') as in Primer (So et al. 2021,
    arXiv:2109.08668) and as MQAR protocols use it.
  Paper: Beltagy, Peters, Cohan 2020, "Longformer: The Long-Document
    Transformer", arXiv:2004.05150, section 3.1. Vaswani et al. 2017,
    "Attention Is All You Need", arXiv:1706.03762, eq. 1 and section 3.2.2.
    Xiao, Tian, Chen, Han, Lewis 2023, "Efficient Streaming Language Models
    with Attention Sinks", arXiv:2309.17453, section 3.2.
  """

  d_model: int
  num_heads: int = 1
  head_dim: int | None = None
  capacity: int = 64
  sinks: int = 0
  sliding: bool = True
  num_kv_heads: int | None = None
  rotary: bool = True
  rotary_base: float = 10000.0
  conv_size: int = 0
  dtype: str = "float32"

  op: ClassVar[str] = "attention"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_heads", "capacity")
    if self.head_dim is None:
      arguments.check_divides(self, "num_heads", "d_model")
    else:
      arguments.check_positive(self, "head_dim")
    if self.num_kv_heads is not None:
      arguments.check_positive(self, "num_kv_heads")
      arguments.check_divides(self, "num_kv_heads", "num_heads")
    self._check(0 <= self.sinks < self.capacity, "sinks", "0 … capacity − 1")
    self._check(self.conv_size >= 0, "conv_size", "0 or more")
    self._check(self.rotary_base > 0, "rotary_base", "above 0")
    kinds = ("float32", "bfloat16", "float16")
    self._check(self.dtype in kinds, "dtype", f"one of {kinds}")
    if self.rotary and self.width % 2:
      raise ValueError(
        f"Window: rotary positions need an even width per head, got "
        f"{self.width}"
      )

  def _check(self, ok, field, want):
    if not ok:
      value = getattr(self, field)
      raise ValueError(f"Window: {field} must be {want}, got {value!r}")

  @property
  def width(self) -> int:
    """K of every head."""
    return self.head_dim or self.d_model // self.num_heads

  @property
  def groups(self) -> int:
    """G: heads of keys and values."""
    return self.num_kv_heads or self.num_heads

  @property
  def max_length(self) -> int | None:
    return None if self.sliding else self.capacity

  def init(self, key) -> dict[str, Any]:
    d, heads = self.d_model, self.num_heads
    total = (heads + 2 * self.groups) * self.width
    key_qkv, key_out, key_conv = jax.random.split(key, 3)
    params = {
      "qkv": initializers.lecun_normal(key_qkv, (d, total)),
      "out": initializers.lecun_normal(key_out, (heads * self.width, d)),
    }
    if self.conv_size:
      params["conv"] = initializers.uniform(
        key_conv, (self.conv_size, total), self.conv_size**-0.5
      )
    return params

  def initial_state(self, params, key=None) -> State:
    ring = empty(self.capacity, self.width, self.width, jnp.dtype(self.dtype))
    k, v = (jnp.stack([x] * self.groups) for x in (ring.k, ring.v))
    rows = max(self.conv_size - 1, 0)
    taps = jnp.zeros((rows, params["qkv"].shape[1]), jnp.float32)
    return State(ring._replace(k=k, v=v), taps)

  def step(self, params, state, x):
    qkv, taps = dot(x, params["qkv"]), state.conv
    if self.conv_size:
      taps, qkv = conv_step(taps, qkv, params["conv"])
    one = self._heads(lambda *a: step(*a, sinks=self.sinks))
    ring, o = one(state.ring, *self._split(qkv, state.ring.count))
    return State(ring, taps), dot(o.reshape(-1), params["out"])

  def parallel(self, params, state, xs, reset, mask, implementation):
    qkv, taps = dot(xs, params["qkv"]), state.conv
    if self.conv_size:
      taps, qkv = conv(taps, qkv, params["conv"], reset=reset, mask=mask)
    place = positions(state.ring.count, len(xs), reset=reset, mask=mask)
    whole = self._heads(
      lambda *a: attention(
        *a, sinks=self.sinks, reset=reset, mask=mask,
        implementation=implementation,
      ),
      axis=1,
    )  # fmt: skip
    ring, o = whole(state.ring, *self._split(qkv, place))
    return State(ring, taps), dot(o.reshape(len(xs), -1), params["out"])

  def _split(self, qkv, place):
    """q [..., G, H / G, K], k and v [..., G, K], rotated by place [...]."""
    h, g = self.num_heads, self.groups
    qkv = qkv.reshape(qkv.shape[:-1] + (h + 2 * g, self.width))
    q, k, v = jnp.split(qkv, [h, h + g], axis=-2)
    q = q.reshape(q.shape[:-2] + (g, h // g, self.width))
    if self.rotary:
      q = rotary(q, place[..., None, None], base=self.rotary_base)
      k = rotary(k, place[..., None], base=self.rotary_base)
    return q, k, v

  def _heads(self, one, axis: int = 0):
    """Maps one head over the heads that share a ring, and over the rings."""
    shared = jax.vmap(one, (None, axis, None, None), (None, axis))
    return jax.vmap(shared, (_RING, axis, axis, axis), (_RING, axis))
