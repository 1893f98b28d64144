"""Gated linear attention."""

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


class State(NamedTuple):
  s: jax.Array  # [H, K, V] float32


class Read(NamedTuple):
  """What a token asks, stores and forgets, before it meets the state."""

  q: jax.Array  # [..., H, K]
  k: jax.Array  # [..., H, K]
  v: jax.Array  # [..., H, V]
  log_decay: jax.Array  # [..., H, K] float32


@register(
  "gla",
  family="matrix",
  year=2023,
  paper="Yang et al. 2023, arXiv:2312.06635",
  write="decay per channel and add",
  evidence="silver",
  parity="fla-core 0.6, gla (its op)",
  tiny=dict(d_model=6, num_heads=2, head_dim=4, expand_v=0.75, gate_rank=3),
)
@dataclasses.dataclass(frozen=True)
class GLA(cell.Cell):
  """Gated linear attention: every key channel forgets as the token says.

    S_t = (α_tᵀ 1) ⊙ S_{t−1} + k_tᵀ v_t          (3) and section 4.4
    o_t = q_t S_t
    α_t = σ(x_t W¹_α W²_α + b_α)^{1/τ}           section 4.4
    r_t = Swish(x_t W_r + b_r)
    y_t = (r_t ⊙ LN(o_t)) W_O ,  LN per head

  State: s [H, K, V] float32, from zero.
  Params: qkv [D, H (2K + V)], decay_in [D, R], decay_out [R, HK],
    decay_bias [HK], gate [D, HV], gate_bias [HV], norm [V], out [HV, D];
    V = expand_v K, R = gate_rank. The paper has H K = D / 2.
  Forms: step and scan O(H K V) a token, in order; chunk O(H (C (K log C + V)
    + K V)) a token, in T / C sequential steps of matmuls; pallas the same in
    one kernel.
  Differs: as in the authors' code, LN is an RMS norm with a scale, the same
    for all heads, and q is scaled by 1/√K. Their code has no b_r, which here
    starts at zero. Maps start with variance 1 / D.
  Paper: Yang, Wang, Shen, Panda, Kim 2023, "Gated Linear Attention Transformers
    with Hardware-Efficient Training", arXiv:2312.06635, eq. 3 and section 4.4.
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  expand_v: float = 2.0
  gate_rank: int = 16
  tau: float = 16.0

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "linear_attention"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "gate_rank"
    )
    if self.value_dim < 1 or self.value_dim != self.head_dim * self.expand_v:
      raise ValueError(
        f"GLA: expand_v={self.expand_v!r} times head_dim={self.head_dim} "
        "must be a positive integer"
      )
    if not self.tau > 0:
      raise ValueError(f"GLA: tau must be above 0, got {self.tau!r}")

  @property
  def value_dim(self) -> int:
    """V."""
    return int(self.head_dim * self.expand_v)

  def init(self, key) -> dict[str, Any]:
    d, h, k, v = self.d_model, self.num_heads, self.head_dim, self.value_dim
    keys = jax.random.split(key, 5)
    draw = initializers.lecun_normal
    return {
      "qkv": draw(keys[0], (d, h * (2 * k + v))),
      "decay_in": draw(keys[1], (d, self.gate_rank)),
      "decay_out": draw(keys[2], (self.gate_rank, h * k)),
      "decay_bias": jnp.zeros((h * k,)),
      "gate": draw(keys[3], (d, h * v)),
      "gate_bias": jnp.zeros((h * v,)),
      "norm": jnp.ones((v,)),
      "out": draw(keys[4], (h * v, d)),
    }

  def initial_state(self, params, key=None) -> State:
    shape = (self.num_heads, self.head_dim, self.value_dim)
    return State(jnp.zeros(shape, jnp.float32))

  def step(self, params, state, x):
    s, o = jax.vmap(attend_step)(state.s, *self._project(params, x))
    return State(s), self._read_out(params, x, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    r = self._project(params, xs)
    s, o = heads(linear_attention)(
      state.s, r.q, r.k, r.v, log_decay=r.log_decay, reset=reset, mask=mask,
      implementation=implementation,
    )  # fmt: skip
    return State(s), self._read_out(params, xs, o)

  def _project(self, params, x) -> Read:
    h, k = self.num_heads, self.head_dim
    split = lambda z: z.reshape(z.shape[:-1] + (h, -1))
    q, key, v = jnp.split(dot(x, params["qkv"]), [h * k, 2 * h * k], axis=-1)
    logit = dot(dot(x, params["decay_in"]), params["decay_out"])
    logit = logit.astype(jnp.float32) + params["decay_bias"].astype(jnp.float32)
    return Read(
      split(q) * k**-0.5,
      split(key),
      split(v),
      split(jax.nn.log_sigmoid(logit) / self.tau),
    )

  def _read_out(self, params, x, o):
    r = dot(x, params["gate"]) + params["gate_bias"].astype(x.dtype)
    y = norm.rms_norm(o, params["norm"]) * jax.nn.silu(r).reshape(o.shape)
    return dot(y.reshape(r.shape), params["out"])
