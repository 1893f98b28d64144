"""LightNet's additive recurrence."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.batched import heads
from memzoo.ops.linear_attention import linear_attention, step as attend_step
from memzoo.ops.running_softmax import running_softmax, step as softmax_step


class State(NamedTuple):
  s: jax.Array  # [H, F, V] float32: mean of v under the softmax of each channel
  z: jax.Array  # [H, K] float32: log Σ exp(k), −inf before the first token
  count: jax.Array  # [] int32: tokens of the segment so far


@register(
  "lightnet",
  family="matrix",
  year=2024,
  paper="Qin et al. 2024, arXiv:2405.21022",
  write="running softmax",
  evidence="gold",
  parity="fla-core 0.6, gla (its op)",
  tiny=dict(d_model=6, num_heads=2, head_dim=5, gate_rank=2, lrpe=True),
)
@dataclasses.dataclass(frozen=True)
class LightNet(cell.Cell):
  """LightNet: every channel of the key is a softmax over all tokens so far.

    z_t = logaddexp(z_{t−1}, k_t)
    S_t = Diag(exp(z_{t−1} − z_t)) S_{t−1} + exp(k_t − z_t) v_tᵀ
        = Σ_{i <= t} softmax_i(k_1 … k_t) v_iᵀ      in each channel
    o_t = S_tᵀ silu(q_t) ,  q, k, v = W x_t
    y_t = W_o (RMSNorm(o_t) ⊙ silu(W_2 W_1 x_t))

  The decay depends on sums alone, so that a sequence of several dimensions
  needs one pass: `memzoo.models.lightnet`. With `lrpe` the p-th token of its
  segment (from 0) has the queries and keys [u ⊙ cos(p θ), u ⊙ sin(p θ)], u =
  silu(q) and exp(k − z), θ_i = lrpe_base^(−2 i / K): F = 2K, and a read
  depends on the distance. The norm is over all heads.

  State: s [H, F, V] float32 from zero, z [H, K] float32 from −inf, count int32
    [] from 0. F = K without `lrpe`.
  Params: qkv [D, 2HK + D], gate_in [D, R], gate_out [R, D], norm [D], out
    [D, D]. V = D / H.
  Forms: step and scan O(H F V) a token, in order; chunk O(H (C log C (F + V) +
    F V)) a token, in T / C sequential steps of matmuls; pallas the same in one
    kernel.
  Differs: the relative positions (LRPE) are off unless asked for, and those of
    the model's input (TPE) stand in `memzoo.models.lightnet`; norm and gate are
    those of flash-linear-attention (the authors' later code multiplies by a
    sigmoid before the norm).
  Paper: Qin, Mao, Shen, Li, Zhang, Dai, Zhong 2024, "You Only Scan Once:
    Efficient Multi-dimension Sequential Modeling with LightNet",
    arXiv:2405.21022, the additive recurrence of section 3 and the layer of
    section 4; the layer as in flash-linear-attention.
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  gate_rank: int = 32
  lrpe: bool = False
  lrpe_base: float = 10000.0

  op: ClassVar[str] = "linear_attention"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "gate_rank"
    )
    arguments.check_divides(self, "num_heads", "d_model")
    if self.lrpe_base <= 0:
      raise ValueError(
        f"LightNet: lrpe_base must be above 0, got {self.lrpe_base!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, r, width = self.d_model, self.gate_rank, self.num_heads * self.head_dim
    keys = jax.random.split(key, 4)
    return {
      "qkv": initializers.lecun_normal(keys[0], (d, 2 * width + d)),
      "gate_in": initializers.lecun_normal(keys[1], (d, r)),
      "gate_out": initializers.lecun_normal(keys[2], (r, d)),
      "norm": jnp.ones((d,)),
      "out": initializers.lecun_normal(keys[3], (d, d)),
    }

  def initial_state(self, params, key=None) -> State:
    h, k = self.num_heads, self.head_dim
    f = 2 * k if self.lrpe else k
    return State(
      jnp.zeros((h, f, self.d_model // h), jnp.float32),
      jnp.full((h, k), -jnp.inf, jnp.float32),
      jnp.zeros((), jnp.int32),
    )

  def step(self, params, state, x):
    q, k, v = self.project(params, x)
    z, (log_decay, weight) = jax.vmap(softmax_step)(state.z, k)
    place = lambda u: self._place(u, state.count)
    s, o = jax.vmap(attend_step)(
      state.s,
      place(q),
      place(weight.astype(x.dtype)),
      v,
      self._twice(log_decay),
    )
    return State(s, z, state.count + 1), self.read_out(params, x, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    q, k, v = self.project(params, xs)
    z, (log_decay, weight) = heads(running_softmax)(state.z, k, **flags)
    count, places = _count(state.count, xs.shape[0], **flags)
    place = lambda u: self._place(u, places)
    s, o = heads(linear_attention)(
      state.s, place(q), place(weight.astype(xs.dtype)), v,
      log_decay=self._twice(log_decay), implementation=implementation, **flags,
    )  # fmt: skip
    return State(s, z, count), self.read_out(params, xs, o)

  def project(self, params, x):
    """silu(q), k [..., H, K] and v [..., H, V] of x [..., D]."""
    width = self.num_heads * self.head_dim
    q, k, v = jnp.split(dot(x, params["qkv"]), [width, 2 * width], axis=-1)
    split = lambda a: a.reshape(a.shape[:-1] + (self.num_heads, -1))
    return split(jax.nn.silu(q)), split(k), split(v)

  def read_out(self, params, x, o):
    """y [..., D] from x [..., D] and what was read, o [..., H, V]."""
    gate = jax.nn.silu(dot(dot(x, params["gate_in"]), params["gate_out"]))
    y = norm.rms_norm(o.reshape(x.shape), params["norm"])
    return dot(y * gate, params["out"])

  def _twice(self, log_decay):
    if not self.lrpe:
      return log_decay
    return jnp.concatenate([log_decay, log_decay], axis=-1)

  def _place(self, u, position):
    """u [..., H, K] at positions [...], as [..., H, F]."""
    if not self.lrpe:
      return u
    channel = jnp.arange(self.head_dim, dtype=jnp.float32)
    theta = self.lrpe_base ** (channel * (-2.0 / self.head_dim))
    angle = position.astype(jnp.float32)[..., None, None] * theta
    return turn(u, angle)


def turn(u, angle):
  """[u ⊙ cos(angle), u ⊙ sin(angle)]: [..., H, K] -> [..., H, 2K] in u's
  dtype; the dot of two is the sum of u u' cos(angle − angle')."""
  wide = u.astype(jnp.float32)
  out = jnp.concatenate([wide * jnp.cos(angle), wide * jnp.sin(angle)], axis=-1)
  return out.astype(u.dtype)


def _count(count, length, *, reset, mask):
  """Tokens of the segment after the last one, and before each of them [T]."""
  there = jnp.ones((length,), jnp.int32)
  if mask is not None:
    there = mask.astype(jnp.int32)
  before = jnp.cumsum(there) - there
  start = jnp.full((length,), -count)
  if reset is not None:
    start = jax.lax.cummax(jnp.where(reset, before, -count))
  places = before - start
  return places[-1] + there[-1], places
