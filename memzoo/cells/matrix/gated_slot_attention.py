"""Gated slot attention."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.batched import heads
from memzoo.ops.linear_attention import linear_attention, step as read_values
from memzoo.ops.value_decay import step as read_keys, value_decay


class State(NamedTuple):
  keys: jax.Array  # [H, K, M] float32: K̃ᵀ
  values: jax.Array  # [H, M, V] float32: Ṽ


class Write(NamedTuple):
  """What a token asks, what it stores, and how much of each slot it takes."""

  q: jax.Array  # [..., H, K]
  k: jax.Array  # [..., H, K]
  v: jax.Array  # [..., H, V]
  share: jax.Array  # [..., H, M]: 1 − α
  log_decay: jax.Array  # [..., H, M]: log α


@register(
  "gated_slot_attention",
  family="matrix",
  year=2024,
  paper="Zhang et al. 2024, arXiv:2409.07146",
  write="mix into slots",
  evidence="silver",
  parity="fla-core 0.6, gsa (its op)",
  tiny=dict(d_model=6, num_heads=2, head_dim=4, expand_v=0.75, num_slots=5),
)
@dataclasses.dataclass(frozen=True)
class GatedSlotAttention(cell.Cell):
  """Gated slot attention: softmax attention to M slots that decay as they fill.

    K̃_t = Diag(α_t) K̃_{t−1} + (1 − α_t) k_tᵀ                       [M, K]
    Ṽ_t = Diag(α_t) Ṽ_{t−1} + (1 − α_t) v_tᵀ                       [M, V]
    o_t = Ṽ_tᵀ softmax(K̃_t q_t)
    α_t = σ(W_α x_t)^{1/τ} ,  τ = 8
    q, k, v = silu(W x_t) ,  y_t = W_o RMSNorm(silu(o_t))

  Two passes of gated linear attention with a softmax between them: the first
  has its decay on the side that it is read out to (`value_decay`), the second
  on the side of its queries (`linear_attention`). The norm is over all heads.

  State: keys [H, K, M] and values [H, M, V] float32, from zero.
  Params: qkv [D, H (2K + V)], slots [D, H M] (W_α), norm [HV], out [HV, D].
  Forms: step and scan O(H M (K + V)) a token, in order; chunk O(H (C log C (K +
    V + M) + M (K + V))) a token, in two times T / C sequential steps of
    matmuls.
  Differs: nothing. K̃ q is not scaled, as in the public code. Grouped keys and
    values and other feature maps are left out.
  Paper: Zhang, Yang, Zhu, Zhang, Cui, Wang, Wang, Shi, Wang, Bi, Zhou, Fu 2024,
    "Gated Slot Attention for Efficient Linear-Time Sequence Modeling",
    arXiv:2409.07146, section 3; starting values and read-out as in
    flash-linear-attention.
  """

  d_model: int
  num_heads: int = 4
  head_dim: int = 32
  expand_v: float = 1.0
  num_slots: int = 64
  gate_divisor: float = 8.0

  op: ClassVar[str] = "linear_attention"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "num_slots"
    )
    if self.value_dim < 1 or self.value_dim != self.head_dim * self.expand_v:
      raise ValueError(
        f"GatedSlotAttention: expand_v={self.expand_v} times head_dim="
        f"{self.head_dim} must be a positive integer"
      )
    if self.gate_divisor <= 0:
      raise ValueError(
        "GatedSlotAttention: gate_divisor must be above 0, got "
        f"{self.gate_divisor!r}"
      )

  @property
  def value_dim(self) -> int:
    return int(self.head_dim * self.expand_v)

  def init(self, key) -> dict[str, Any]:
    d, h, k, v = self.d_model, self.num_heads, self.head_dim, self.value_dim
    keys = jax.random.split(key, 3)
    return {
      "qkv": initializers.lecun_normal(keys[0], (d, h * (2 * k + v))),
      "slots": initializers.lecun_normal(keys[1], (d, h * self.num_slots)),
      "norm": jnp.ones((h * v,)),
      "out": initializers.lecun_normal(keys[2], (h * v, d)),
    }

  def initial_state(self, params, key=None) -> State:
    h, k, v, m = self.num_heads, self.head_dim, self.value_dim, self.num_slots
    return State(
      jnp.zeros((h, k, m), jnp.float32), jnp.zeros((h, m, v), jnp.float32)
    )

  def step(self, params, state, x):
    w = self._project(params, x)
    keys, scores = jax.vmap(read_keys)(
      state.keys, w.q, w.k, w.share, w.log_decay
    )
    values, o = jax.vmap(read_values)(
      state.values, _softmax(scores), w.share, w.v, w.log_decay
    )
    return State(keys, values), self._read_out(params, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    w = self._project(params, xs)
    flags = dict(reset=reset, mask=mask, implementation=implementation)
    keys, scores = heads(value_decay)(
      state.keys, w.q, w.k, w.share, log_decay=w.log_decay, **flags
    )
    values, o = heads(linear_attention)(
      state.values, _softmax(scores), w.share, w.v, log_decay=w.log_decay,
      **flags,
    )  # fmt: skip
    return State(keys, values), self._read_out(params, o)

  def _project(self, params, x) -> Write:
    h, k = self.num_heads, self.head_dim
    qkv = jax.nn.silu(dot(x, params["qkv"]))
    split = lambda z: z.reshape(z.shape[:-1] + (h, -1))
    q, key, v = map(split, jnp.split(qkv, [h * k, 2 * h * k], axis=-1))
    logits = dot(x, params["slots"]).astype(jnp.float32)
    log_decay = split(jax.nn.log_sigmoid(logits)) / self.gate_divisor
    share = -jnp.expm1(log_decay)
    return Write(q, key, v, share.astype(x.dtype), log_decay)

  def _read_out(self, params, o):
    y = jax.nn.silu(o.reshape(o.shape[:-2] + (-1,)))
    return dot(norm.rms_norm(y, params["norm"]), params["out"])


def _softmax(scores):
  read = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
  return read.astype(scores.dtype)
