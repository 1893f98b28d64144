"""Gated DeltaProduct."""

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
from memzoo.ops.delta_rule import delta_rule, read, write


class State(NamedTuple):
  s: jax.Array  # [H, K, V] float32
  conv: jax.Array  # [W − 1, H (K + n (K + V))] float32: last inputs of q, k, v


class Read(NamedTuple):
  """What a token asks, binds and forgets, in n steps, heads first."""

  q: jax.Array  # [..., H, K]
  k: jax.Array  # [..., n, H, K]
  v: jax.Array  # [..., n, H, V]
  beta: jax.Array  # [..., n, H] float32
  log_decay: jax.Array | None  # [..., H] float32


@register(
  "gated_delta_product",
  family="matrix",
  year=2025,
  paper="Siems et al. 2025, arXiv:2502.10297",
  write="decay, several erasures and additions",
  evidence="gold",
  parity="fla-core 0.6, gated_delta_product (its op)",
  tiny=dict(d_model=6, num_heads=2, head_dim=4, expand_v=0.75, conv_size=3),
)
@dataclasses.dataclass(frozen=True)
class GatedDeltaProduct(cell.Cell):
  """Gated DeltaProduct: n_h delta steps a token, whose reflections compose.

    H_{i,0} = g_i H_{i−1}
    H_{i,j} = (I − β_ij k_ij k_ijᵀ) H_{i,j−1} + β_ij k_ij v_ijᵀ   j = 1 … n_h
    H_i = H_{i,n_h} ,  o_i = H_iᵀ q_i                      (section 3)
    A(x_i) = g_i Π_j (I − β_ij k_ij k_ijᵀ)                 the transition
    g_i = exp(−exp(A) softplus(W_a x_i + dt)) ,  β_ij = 2 σ(W_βj x_i)
    q, k_j = unit norm of silu(conv(W x)) ,  v_j = silu(conv(W_vj x))
    y_i = W_o (RMSNorm(o_i) ⊙ silu(W_g x_i)), norm and gate per head

  Each factor has its own key, value and step. One factor reflects; two make any
  rotation of a plane, and n_h any orthogonal map that moves n_h dimensions.
  Without `forget_gate` g = 1 (DeltaProduct); without `allow_neg_eigval` β stays
  below 1. q is scaled by 1/sqrt(K).

  State: s [H, K, V] float32 and conv [W − 1, H (K + n (K + V))] float32, from
    zero, where n is n_h (`num_householder`).
  Params: qkv [D, H (K + n (K + V))] (q; k, v: step by step), conv [W, the
    same], beta [D, nH], norm [V], gate [D, HV], out [HV, D]; with the gate
    decay [D, H], a_log [H], dt [H].
  Forms: step and scan O(n H K V) a token, in order; chunk
    O(n H (C (K + V) + K V)) a token, in n T / C sequential steps of matmuls:
    the delta rule on n T steps, of which the first of a token decays and the
    last is read; pallas the same in one kernel.
  Differs: exp(A) starts in U(1, 16), the code's in U(0, 16).
  Paper: Siems, Carstensen, Zela, Hutter, Pontil, Grazzi 2025, "DeltaProduct:
    Improving State-Tracking in Linear RNNs via Householder Products",
    arXiv:2502.10297, section 3; gates, norms and scale as in the authors' layer
    (flash-linear-attention, `gated_deltaproduct`).
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  expand_v: float = 1.0
  num_householder: int = 2
  conv_size: int = 4
  forget_gate: bool = True
  allow_neg_eigval: bool = True

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "delta_rule"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "num_householder", "conv_size"
    )
    if self.value_dim < 1 or self.value_dim != self.head_dim * self.expand_v:
      raise ValueError(
        f"GatedDeltaProduct: expand_v={self.expand_v} times "
        f"head_dim={self.head_dim} must be a positive integer"
      )

  @property
  def value_dim(self) -> int:
    return int(self.head_dim * self.expand_v)

  def init(self, key) -> dict[str, Any]:
    d, h, k, v = self.d_model, self.num_heads, self.head_dim, self.value_dim
    n = self.num_householder
    keys = jax.random.split(key, 8)
    draw, width = initializers.lecun_normal, h * (k + n * (k + v))
    params = {
      "qkv": draw(keys[0], (d, width)),
      "conv": initializers.uniform(
        keys[1], (self.conv_size, width), self.conv_size**-0.5
      ),
      "beta": draw(keys[2], (d, n * h)),
      "norm": jnp.ones((v,)),
      "gate": draw(keys[3], (d, h * v)),
      "out": draw(keys[4], (h * v, d)),
    }
    if not self.forget_gate:
      return params
    return params | {
      "decay": draw(keys[5], (d, h)),
      "a_log": jnp.log(jax.random.uniform(keys[6], (h,), minval=1, maxval=16)),
      "dt": initializers.inverse_softplus(
        initializers.log_uniform(keys[7], (h,), 0.001, 0.1)
      ),
    }

  def initial_state(self, params, key=None) -> State:
    return State(
      jnp.zeros((self.num_heads, self.head_dim, self.value_dim), jnp.float32),
      conv_empty(params["conv"]),
    )

  def step(self, params, state, x):
    window, qkv = conv_step(state.conv, dot(x, params["qkv"]), params["conv"])
    r, s = self._project(params, x, qkv), state.s
    for j in range(self.num_householder):
      decay = r.log_decay if j == 0 else None
      s = jax.vmap(write)(s, r.k[j], r.v[j], r.beta[j], decay)
    return State(s, window), self._read_out(params, x, jax.vmap(read)(s, r.q))

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    window, qkv = conv(
      state.conv, dot(xs, params["qkv"]), params["conv"], **flags
    )
    r, n = self._project(params, xs, qkv), self.num_householder
    alone = lambda z, j: None if z is None else _alone(z, j, n)
    s, o = heads(delta_rule)(
      state.s, alone(r.q, n - 1), _join(r.k), _join(r.v), beta=_join(r.beta),
      log_decay=alone(r.log_decay, 0), reset=alone(reset, 0),
      mask=None if mask is None else jnp.repeat(mask, n),
      implementation=implementation,
    )  # fmt: skip
    return State(s, window), self._read_out(params, xs, o[n - 1 :: n])

  def _project(self, params, x, qkv) -> Read:
    h, k, n = self.num_heads, self.head_dim, self.num_householder
    split = lambda z, *shape: z.reshape(z.shape[:-1] + (*shape, h, -1))
    q, key, v = jnp.split(jax.nn.silu(qkv), [h * k, (n + 1) * h * k], axis=-1)
    beta = jax.nn.sigmoid(dot(x, params["beta"]).astype(jnp.float32))
    log_decay = None
    if self.forget_gate:
      a = dot(x, params["decay"]).astype(jnp.float32)
      dt = jax.nn.softplus(a + params["dt"].astype(jnp.float32))
      log_decay = -jnp.exp(params["a_log"].astype(jnp.float32)) * dt
    return Read(
      norm.l2_normalize(split(q)) * k**-0.5,
      norm.l2_normalize(split(key, n)),
      split(v, n),
      split(2 * beta if self.allow_neg_eigval else beta, n)[..., 0],
      log_decay,
    )

  def _read_out(self, params, x, o):
    gate = dot(x, params["gate"]).reshape(o.shape)
    y = norm.rms_norm(o, params["norm"]) * jax.nn.silu(gate)
    return dot(y.reshape(y.shape[:-2] + (-1,)), params["out"])


def _join(z):
  """[T, n, ...] -> [T n, ...]."""
  return z.reshape((-1,) + z.shape[2:])


def _alone(z, j: int, n: int):
  """[T, ...] at the j-th of n steps of each token, zeros elsewhere."""
  zeros = jnp.zeros(z.shape[:1] + (n,) + z.shape[1:], z.dtype)
  return _join(zeros.at[:, j].set(z))
