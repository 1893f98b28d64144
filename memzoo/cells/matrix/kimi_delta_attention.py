"""Kimi Delta Attention."""

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
  beta: jax.Array  # [..., H] float32
  log_decay: jax.Array  # [..., H, K] float32


@register(
  "kimi_delta_attention",
  family="matrix",
  year=2025,
  paper="Kimi Team 2025, arXiv:2510.26692",
  write="decay per channel, erase, add",
  evidence="gold",
  parity="transformers 5.23, KimiLinearDeltaAttention; fla-core 0.6 (its op)",
  tiny=dict(d_model=6, num_heads=2, head_dim=4, expand_v=0.75, conv_size=3),
)
@dataclasses.dataclass(frozen=True)
class KimiDeltaAttention(cell.Cell):
  """Kimi Delta Attention: a delta rule whose every key channel decays apart.

    S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t−1} + β_t k_t v_tᵀ ,  o_t = S_tᵀ q_t
                                                                          (1)
    q, k = unit norm of silu(conv(W x)) ,  v = silu(conv(W_v x))
    α_t = f(W_α↑ W_α↓ x_t) ,  β_t = σ(W_β x_t)
    y_t = W_o (σ(W_g↑ W_g↓ x_t) ⊙ RMSNorm(o_t)), norm and gate per head
    f(z) = exp(−exp(A) softplus(z + dt))

  The decay acts first, and the correction reads what it left. The two products
  of maps are of rank V, the head's width. q is scaled by 1/sqrt(K).

  State: s [H, K, V] float32 and conv [W − 1, H (2K + V)] float32, from zero.
  Params: qkv [D, H (2K + V)], conv [W, H (2K + V)], beta [D, H], down [D, 2V]
    (of decay, of gate), decay [V, HK], a_log [H], dt [H, K], gate [V, HV],
    gate_bias [HV], norm [V], out [HV, D].
  Forms: step and scan O(H K V) a token, in order; chunk O(H (C (K + V) + K V))
    a token and log C products of decayed keys, in T / C sequential steps of
    matmuls; pallas the same in one kernel.
  Differs: nothing. The paper leaves f to its predecessors; f, its starting
    values and the gate's bias are those of the authors' code.
  Paper: Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention
    Architecture", arXiv:2510.26692, eq. 1 and the parametrisation of section
    4; the rest as in the authors' layer (flash-linear-attention, `kda`).
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  expand_v: float = 1.0
  conv_size: int = 4

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "delta_rule"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "conv_size"
    )
    if self.value_dim < 1 or self.value_dim != self.head_dim * self.expand_v:
      raise ValueError(
        f"KimiDeltaAttention: expand_v={self.expand_v} times "
        f"head_dim={self.head_dim} must be a positive integer"
      )

  @property
  def value_dim(self) -> int:
    return int(self.head_dim * self.expand_v)

  def init(self, key) -> dict[str, Any]:
    d, h, k, v = self.d_model, self.num_heads, self.head_dim, self.value_dim
    keys = jax.random.split(key, 9)
    draw, width = initializers.lecun_normal, h * (2 * k + v)
    return {
      "qkv": draw(keys[0], (d, width)),
      "conv": initializers.uniform(
        keys[1], (self.conv_size, width), self.conv_size**-0.5
      ),
      "beta": draw(keys[2], (d, h)),
      "down": draw(keys[3], (d, 2 * v)),
      "decay": draw(keys[4], (v, h * k)),
      "a_log": jnp.log(jax.random.uniform(keys[5], (h,), minval=1, maxval=16)),
      "dt": initializers.inverse_softplus(
        initializers.log_uniform(keys[6], (h, k), 0.001, 0.1)
      ),
      "gate": draw(keys[7], (v, h * v)),
      "gate_bias": jnp.zeros((h * v,)),
      "norm": jnp.ones((v,)),
      "out": draw(keys[8], (h * v, d)),
    }

  def initial_state(self, params, key=None) -> State:
    return State(
      jnp.zeros((self.num_heads, self.head_dim, self.value_dim), jnp.float32),
      conv_empty(params["conv"]),
    )

  def step(self, params, state, x):
    window, qkv = conv_step(state.conv, dot(x, params["qkv"]), params["conv"])
    r, gate = self._project(params, x, qkv)
    s, o = jax.vmap(delta_step)(state.s, *r)
    return State(s, window), self._read_out(params, o, gate)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    window, qkv = conv(
      state.conv, dot(xs, params["qkv"]), params["conv"], **flags
    )
    r, gate = self._project(params, xs, qkv)
    s, o = heads(delta_rule)(
      state.s, r.q, r.k, r.v, beta=r.beta, log_decay=r.log_decay,
      implementation=implementation, **flags,
    )  # fmt: skip
    return State(s, window), self._read_out(params, o, gate)

  def _project(self, params, x, qkv):
    """-> (Read, the output's gate [..., H, V])."""
    h, k = self.num_heads, self.head_dim
    q, key, v = jnp.split(jax.nn.silu(qkv), [h * k, 2 * h * k], axis=-1)
    split = lambda z: z.reshape(z.shape[:-1] + (h, -1))
    decay, gate = jnp.split(dot(x, params["down"]), 2, axis=-1)
    decay = split(dot(decay, params["decay"])).astype(jnp.float32)
    dt = jax.nn.softplus(decay + params["dt"].astype(jnp.float32))
    gate = dot(gate, params["gate"]) + params["gate_bias"].astype(x.dtype)
    r = Read(
      norm.l2_normalize(split(q)) * k**-0.5,
      norm.l2_normalize(split(key)),
      split(v),
      jax.nn.sigmoid(dot(x, params["beta"]).astype(jnp.float32)),
      -jnp.exp(params["a_log"].astype(jnp.float32))[:, None] * dt,
    )
    return r, jax.nn.sigmoid(split(gate))

  def _read_out(self, params, o, gate):
    y = norm.rms_norm(o, params["norm"]) * gate
    return dot(y.reshape(y.shape[:-2] + (-1,)), params["out"])
