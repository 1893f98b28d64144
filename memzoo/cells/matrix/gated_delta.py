"""Gated DeltaNet."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.batched import heads
from memzoo.ops.conv import conv, empty as conv_empty, step as conv_step
from memzoo.ops.delta_rule import delta_rule, step as delta_step


class State(NamedTuple):
  s: jax.Array  # [H, K, V] float32
  conv: jax.Array  # [W − 1, H (2K + V)] float32: the last inputs of q, k, v


class Read(NamedTuple):
  """What a token asks, binds and forgets, before it meets the state."""

  q: jax.Array  # [..., H, K]
  k: jax.Array  # [..., H, K]
  v: jax.Array  # [..., H, V]
  beta: jax.Array  # [..., H]
  log_decay: jax.Array  # [..., H]


@register(
  "gated_delta",
  family="matrix",
  year=2024,
  paper="Yang et al. 2024, arXiv:2412.06464",
  write="decay, erase, add",
  evidence="gold",
  parity="transformers 5.23, Qwen3NextGatedDeltaNet; fla-core 0.6 (its op)",
  tiny=dict(d_model=6, num_heads=2, head_dim=4, expand_v=0.75, conv_size=3),
)
@dataclasses.dataclass(frozen=True)
class GatedDelta(cell.Cell):
  """Gated DeltaNet: a matrix that decays, and replaces what a key held.

    S_t = S_{t−1} (α_t (I − β_t k_t k_tᵀ)) + β_t v_t k_tᵀ        (10)
    o_t = S_t q_t
    α_t = exp(−exp(A) softplus(W_a x_t + dt)) ,  β_t = σ(W_β x_t)
    q, k = unit norm of silu(conv(W x)) ,  v = silu(conv(W_v x))
    y_t = W_o (RMSNorm(o_t) ⊙ silu(W_g x_t)), norm and gate per head

  The state is held transposed, [K, V], and q is scaled by 1/sqrt(K).

  State: s [H, K, V] float32 and conv [W − 1, H (2K + V)] float32, from zero.
  Params: qkv [D, H (2K + V)], conv [W, H (2K + V)], ab [D, 2H] (decay, beta),
    a_log [H], dt [H], gate [D, HV], norm [V], out [HV, D].
  Forms: step and scan O(H K V) a token, in order; chunk O(H (C (K + V) + K V))
    a token, in T / C sequential steps of matmuls; pallas the same in one
    kernel.
  Differs: nothing. With `allow_neg_eigval` β is doubled (Grazzi et al. 2024,
    arXiv:2411.12537).
  Paper: Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2
    with Delta Rule", arXiv:2412.06464, eq. 10 and section 3.4; gates and
    starting values as in the authors' code.
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  expand_v: float = 1.0
  conv_size: int = 4
  allow_neg_eigval: bool = False

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "delta_rule"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "conv_size"
    )
    if self.value_dim < 1 or self.value_dim != self.head_dim * self.expand_v:
      raise ValueError(
        f"GatedDelta: expand_v={self.expand_v} times head_dim={self.head_dim} "
        "must be a positive integer"
      )

  @property
  def value_dim(self) -> int:
    return int(self.head_dim * self.expand_v)

  def init(self, key) -> dict[str, Any]:
    d, h, k, v = self.d_model, self.num_heads, self.head_dim, self.value_dim
    keys = jax.random.split(key, 7)
    width = h * (2 * k + v)
    return {
      "qkv": initializers.lecun_normal(keys[0], (d, width)),
      "conv": initializers.uniform(
        keys[1], (self.conv_size, width), self.conv_size**-0.5
      ),
      "ab": initializers.lecun_normal(keys[2], (d, 2 * h)),
      "a_log": jnp.log(jax.random.uniform(keys[3], (h,), minval=1, maxval=16)),
      "dt": initializers.inverse_softplus(
        initializers.log_uniform(keys[4], (h,), 0.001, 0.1)
      ),
      "gate": initializers.lecun_normal(keys[5], (d, h * v)),
      "norm": jnp.ones((v,)),
      "out": initializers.lecun_normal(keys[6], (h * v, d)),
    }

  def initial_state(self, params, key=None) -> State:
    return State(
      jnp.zeros((self.num_heads, self.head_dim, self.value_dim), jnp.float32),
      conv_empty(params["conv"]),
    )

  def step(self, params, state, x):
    window, qkv = conv_step(state.conv, dot(x, params["qkv"]), params["conv"])
    r = self._project(params, x, qkv)
    s, o = jax.vmap(delta_step)(state.s, *r)
    return State(s, window), self._read_out(params, x, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    window, qkv = conv(
      state.conv, dot(xs, params["qkv"]), params["conv"], **flags
    )
    r = self._project(params, xs, qkv)
    s, o = heads(delta_rule)(
      state.s, r.q, r.k, r.v, beta=r.beta, log_decay=r.log_decay,
      implementation=implementation, **flags,
    )  # fmt: skip
    return State(s, window), self._read_out(params, xs, o)

  def _project(self, params, x, qkv) -> Read:
    h, k = self.num_heads, self.head_dim
    qkv = jax.nn.silu(qkv)
    q, key, v = jnp.split(qkv, [h * k, 2 * h * k], axis=-1)
    split = lambda z: z.reshape(z.shape[:-1] + (h, -1))
    a, b = jnp.split(dot(x, params["ab"]).astype(jnp.float32), 2, axis=-1)
    dt = jax.nn.softplus(a + params["dt"].astype(jnp.float32))
    beta = jax.nn.sigmoid(b)
    return Read(
      norm.l2_normalize(split(q)) * k**-0.5,
      norm.l2_normalize(split(key)),
      split(v),
      2 * beta if self.allow_neg_eigval else beta,
      -jnp.exp(params["a_log"].astype(jnp.float32)) * dt,
    )

  def _read_out(self, params, x, o):
    gate = dot(x, params["gate"]).reshape(o.shape)
    y = norm.rms_norm(o, params["norm"]) * jax.nn.silu(gate)
    return dot(y.reshape(y.shape[:-2] + (-1,)), params["out"])
