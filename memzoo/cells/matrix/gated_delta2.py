"""Gated DeltaNet-2."""

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
from memzoo.ops.diag_plus_rank_one import diag_plus_rank_one, step as rule_step


class State(NamedTuple):
  s: jax.Array  # [H, K, V] float32
  conv: jax.Array  # [W − 1, H (2K + V)] float32: the last inputs of q, k, v


class Read(NamedTuple):
  """What a token asks, writes, erases and forgets."""

  q: jax.Array  # [..., H, K]
  k: jax.Array  # [..., H, K]
  wv: jax.Array  # [..., H, V] the part of the value that is written
  a: jax.Array  # [..., H, K] float32: −α ⊙ b ⊙ k
  log_decay: jax.Array  # [..., H, K] float32


@register(
  "gated_delta2",
  family="matrix",
  year=2026,
  paper="Hatamizadeh et al. 2026, arXiv:2605.22791",
  write="decay per channel, gated erase, gated add",
  evidence="silver",
  parity="fla-core 0.6, gdn2 (its op)",
  tiny=dict(d_model=6, num_heads=2, head_dim=4, expand_v=0.75, conv_size=3),
)
@dataclasses.dataclass(frozen=True)
class GatedDelta2(cell.Cell):
  """Gated DeltaNet-2: a delta rule that erases and writes by separate gates.

    S_t = (I − k_t (b_t ⊙ k_t)ᵀ) Diag(α_t) S_{t−1} + k_t (w_t ⊙ v_t)ᵀ     (10)
    o_t = S_tᵀ q_t
    b_t = σ(W_b x_t) ,  w_t = σ(W_w x_t)                                  (11)
    α_t = exp(−exp(A) softplus(W_f↑ W_f↓ x_t + dt))                       (12)
    q, k = unit norm of silu(conv(W x)) ,  v = silu(conv(W_v x))
    y_t = W_o (RMSNorm(o_t) ⊙ silu(W_g↑ W_g↓ x_t)), norm and gate per head

  b is per key channel: which of them are read and erased; w per value channel:
  which of them are written. With both one scalar this is Kimi Delta Attention.
  With `allow_neg_eigval` b is doubled, and w is not. q is scaled by 1/sqrt(K).

  State: s [H, K, V] float32 and conv [W − 1, H (2K + V)] float32, from zero.
  Params: qkv [D, H (2K + V)], conv [W, H (2K + V)], erase [D, HK], write
    [D, HV], down [D, 2V] (of decay, of gate), decay [V, HK], a_log [H],
    dt [H, K], gate [V, HV], gate_bias [HV], norm [V], out [HV, D].
  Forms: step and scan O(H K V) a token, in order; chunk O(H (C (K + V) + K V))
    a token and log C products of decayed keys, in T / C sequential steps of
    matmuls; pallas the same in one kernel.
  Differs: as many value heads as key heads (the paper may share key heads
    among groups of value heads). The maps of decay and output gate are products
    of rank V and maps start with variance 1 / D: the first is the authors'
    code's, the second is not (Xavier with gain 2^−2.5). The layer of
    flash-linear-attention gates with a sigmoid where the paper has silu.
  Paper: Hatamizadeh, Choi, Kautz 2026, "Gated DeltaNet-2: Decoupling Erase and
    Write in Linear Attention", arXiv:2605.22791, eq. 10-12 and section 3.5,
    known from annotated public ports and from flash-linear-attention's `gdn2`.
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  expand_v: float = 1.0
  conv_size: int = 4
  allow_neg_eigval: bool = False

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "diag_plus_rank_one"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "conv_size"
    )
    if self.value_dim < 1 or self.value_dim != self.head_dim * self.expand_v:
      raise ValueError(
        f"GatedDelta2: expand_v={self.expand_v} times "
        f"head_dim={self.head_dim} must be a positive integer"
      )

  @property
  def value_dim(self) -> int:
    return int(self.head_dim * self.expand_v)

  def init(self, key) -> dict[str, Any]:
    d, h, k, v = self.d_model, self.num_heads, self.head_dim, self.value_dim
    keys = jax.random.split(key, 10)
    draw, width = initializers.lecun_normal, h * (2 * k + v)
    return {
      "qkv": draw(keys[0], (d, width)),
      "conv": initializers.uniform(
        keys[1], (self.conv_size, width), self.conv_size**-0.5
      ),
      "erase": draw(keys[2], (d, h * k)),
      "write": draw(keys[3], (d, h * v)),
      "down": draw(keys[4], (d, 2 * v)),
      "decay": draw(keys[5], (v, h * k)),
      "a_log": jnp.log(jax.random.uniform(keys[6], (h,), minval=1, maxval=16)),
      "dt": initializers.inverse_softplus(
        initializers.log_uniform(keys[7], (h, k), 0.001, 0.1)
      ),
      "gate": draw(keys[8], (v, h * v)),
      "gate_bias": jnp.zeros((h * v,)),
      "norm": jnp.ones((v,)),
      "out": draw(keys[9], (h * v, d)),
    }

  def initial_state(self, params, key=None) -> State:
    return State(
      jnp.zeros((self.num_heads, self.head_dim, self.value_dim), jnp.float32),
      conv_empty(params["conv"]),
    )

  def step(self, params, state, x):
    window, qkv = conv_step(state.conv, dot(x, params["qkv"]), params["conv"])
    r, gate = self._project(params, x, qkv)
    s, o = jax.vmap(rule_step)(state.s, r.q, r.k, r.wv, r.a, None, r.log_decay)
    return State(s, window), self._read_out(params, o, gate)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    window, qkv = conv(
      state.conv, dot(xs, params["qkv"]), params["conv"], **flags
    )
    r, gate = self._project(params, xs, qkv)
    s, o = heads(diag_plus_rank_one)(
      state.s, r.q, r.k, r.wv, a=r.a, log_decay=r.log_decay,
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
    log_decay = -jnp.exp(params["a_log"].astype(jnp.float32))[:, None] * dt
    b = jax.nn.sigmoid(split(dot(x, params["erase"])).astype(jnp.float32))
    b = 2 * b if self.allow_neg_eigval else b
    key = norm.l2_normalize(split(key))
    gate = dot(gate, params["gate"]) + params["gate_bias"].astype(x.dtype)
    r = Read(
      norm.l2_normalize(split(q)) * k**-0.5,
      key,
      jax.nn.sigmoid(split(dot(x, params["write"]))) * split(v),
      -jnp.exp(log_decay) * b * key.astype(jnp.float32),
      log_decay,
    )
    return r, jax.nn.silu(split(gate))

  def _read_out(self, params, o, gate):
    y = norm.rms_norm(o, params["norm"]) * gate
    return dot(y.reshape(y.shape[:-2] + (-1,)), params["out"])
