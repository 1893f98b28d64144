"""MesaNet."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.conv import conv, empty as conv_empty, step as conv_step
from memzoo.ops.mesa import State as Memory, mesa, step as mesa_step

_RIDGE = 1.0  # λ at the start


class State(NamedTuple):
  memory: Memory  # kk [H, K, K] and kv [H, K, V]: H and Gᵀ of the paper
  conv: jax.Array  # [W − 1, 2 H K] float32: the last inputs of q and k


class Read(NamedTuple):
  """What a token asks, binds and forgets, before it meets the state."""

  q: jax.Array  # [..., H, K]
  k: jax.Array  # [..., H, K]
  v: jax.Array  # [..., H, V]
  beta: jax.Array  # [..., H]
  log_decay: jax.Array  # [..., H]


@register(
  "mesa_net",
  family="matrix",
  year=2025,
  paper="von Oswald et al. 2025, arXiv:2506.05233",
  write="decay, add; solved at the read",
  evidence="silver",
  parity="fla-core 0.6, mesa_net (its op)",
  tiny=dict(
    d_model=6, num_heads=2, head_dim=4, expand_v=0.75, conv_size=3,
    solver_steps=8,
  ),
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class MesaNet(cell.Cell):
  """MesaNet: the least-squares map from all keys to all values, at every token.

    G_t = γ_t G_{t−1} + β_t v_t k_tᵀ ,  H_t = γ_t H_{t−1} + β_t k_t k_tᵀ
    o_t = G_t (H_t + Λ)⁻¹ q_t = Φ̂_t q_t
    Φ̂_t = argmin_Φ ½ Σ_{i <= t} ζ_ti ‖v_i − Φ k_i‖² + ½ Tr(Φ Λ Φᵀ)
    ζ_ti = β_i Π_{i < j <= t} γ_j ,  γ = σ(W_γ x + b_γ) ,  β = σ(W_β x + b_β)
    Λ = Diag(bound + softplus(λ))
    q, k = unit norm of silu(conv(W x)) ,  v = W_v x
    y_t = W_o RMSNorm(o_t), the norm per head

  The system is solved by `solver_steps` conjugate gradients from zero; G is
  held transposed, [K, V]. With `output_gate`, RMSNorm(o_t) ⊙ silu(W_g x_t).

  State: memory kk [H, K, K], kv [H, K, V] and conv [W − 1, 2HK], float32, from
    zero.
  Params: qkv [D, H (2K + V)], conv [W, 2HK], ab [D, 2H] (γ, β), ab_bias [2H],
    ridge [H, K], norm [V], out [HV, D]; gate [D, HV] where there is one. Λ is 1
    at the start.
  Forms: step and scan O(H (S K² + K V)) a token, S = solver_steps, in order;
    chunk O(H (S (C K + K²) + (C + K) V)) a token, in T / C sequential steps of
    matmuls.
  Differs: the gradient is that of the exact solution, as in the public code,
    also where few steps have not reached it. A row of the solver rests when its
    residual is below rounding; the public kernels add 1e-5 to denominators
    instead. The paper's stopping rule at test time, a tolerance, is left out.
  Paper: von Oswald, Scherrer, Kobayashi, Versari, Yang, Schlegel, Maile,
    Schimpf, Sieberling, Meulemans, Saurous, Lajoie, Frenkel, Pascanu, Agüera y
    Arcas, Sacramento 2025, "MesaNet: Sequence Modeling by Locally Optimal
    Test-Time Training", arXiv:2506.05233, eq. 3-5 and section 3; the layer as
    in flash-linear-attention.
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  expand_v: float = 1.0
  conv_size: int = 4
  solver_steps: int = 30
  ridge_bound: float = 0.25
  output_gate: bool = False

  op: ClassVar[str] = "mesa"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "conv_size", "solver_steps"
    )
    if self.value_dim < 1 or self.value_dim != self.head_dim * self.expand_v:
      raise ValueError(
        f"MesaNet: expand_v={self.expand_v} times head_dim={self.head_dim} "
        "must be a positive integer"
      )
    if not 0 < self.ridge_bound < _RIDGE:
      raise ValueError(
        f"MesaNet: ridge_bound must be between 0 and {_RIDGE}, got "
        f"{self.ridge_bound!r}"
      )

  @property
  def value_dim(self) -> int:
    return int(self.head_dim * self.expand_v)

  def init(self, key) -> dict[str, Any]:
    d, h, k, v = self.d_model, self.num_heads, self.head_dim, self.value_dim
    keys = jax.random.split(key, 5)
    ridge = jnp.full((h, k), _RIDGE - self.ridge_bound)
    params = {
      "qkv": initializers.lecun_normal(keys[0], (d, h * (2 * k + v))),
      "conv": initializers.uniform(
        keys[1], (self.conv_size, 2 * h * k), self.conv_size**-0.5
      ),
      "ab": initializers.lecun_normal(keys[2], (d, 2 * h)),
      "ab_bias": jnp.zeros((2 * h,)),
      "ridge": initializers.inverse_softplus(ridge),
      "norm": jnp.ones((v,)),
      "out": initializers.lecun_normal(keys[3], (h * v, d)),
    }
    if self.output_gate:
      params["gate"] = initializers.lecun_normal(keys[4], (d, h * v))
    return params

  def initial_state(self, params, key=None) -> State:
    h, k, v = self.num_heads, self.head_dim, self.value_dim
    memory = Memory(
      jnp.zeros((h, k, k), jnp.float32), jnp.zeros((h, k, v), jnp.float32)
    )
    return State(memory, conv_empty(params["conv"]))

  def step(self, params, state, x):
    qk, v = self._split(params, x)
    window, qk = conv_step(state.conv, qk, params["conv"])
    r = self._project(params, x, qk, v)

    def one(memory, q, k, v, beta, log_decay, ridge):
      return mesa_step(
        memory, q, k, v, beta, ridge, log_decay, self.solver_steps
      )

    memory, o = jax.vmap(one)(state.memory, *r, self._ridge(params))
    return State(memory, window), self._read_out(params, x, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    qk, v = self._split(params, xs)
    window, qk = conv(state.conv, qk, params["conv"], **flags)
    r = self._project(params, xs, qk, v)

    def one(memory, q, k, v, beta, log_decay, ridge):
      return mesa(
        memory, q, k, v, beta=beta, ridge=ridge, log_decay=log_decay,
        implementation=implementation, solver_steps=self.solver_steps, **flags,
      )  # fmt: skip

    over_heads = jax.vmap(one, in_axes=(0, 1, 1, 1, 1, 1, 0), out_axes=(0, 1))
    memory, o = over_heads(state.memory, *r, self._ridge(params))
    return State(memory, window), self._read_out(params, xs, o)

  def _ridge(self, params):
    ridge = params["ridge"].astype(jnp.float32)
    return self.ridge_bound + jax.nn.softplus(ridge)

  def _split(self, params, x):
    width = 2 * self.num_heads * self.head_dim
    return jnp.split(dot(x, params["qkv"]), [width], axis=-1)

  def _project(self, params, x, qk, v) -> Read:
    split = lambda z: z.reshape(z.shape[:-1] + (self.num_heads, -1))
    q, k = map(split, jnp.split(jax.nn.silu(qk), 2, axis=-1))
    ab = dot(x, params["ab"]).astype(jnp.float32)
    a, b = jnp.split(ab + params["ab_bias"].astype(jnp.float32), 2, axis=-1)
    return Read(
      norm.l2_normalize(q),
      norm.l2_normalize(k),
      split(v),
      jax.nn.sigmoid(b),
      jax.nn.log_sigmoid(a),
    )

  def _read_out(self, params, x, o):
    y = norm.rms_norm(o, params["norm"])
    y = y.reshape(y.shape[:-2] + (-1,))
    if self.output_gate:
      y = y * jax.nn.silu(dot(x, params["gate"]))
    return dot(y, params["out"])
