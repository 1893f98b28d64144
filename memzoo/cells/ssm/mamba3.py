"""Mamba-3."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.batched import heads
from memzoo.ops.rotary import running_angle, turn_pairs, wrap
from memzoo.ops.trapezoid import State as Writes, step as write_step, trapezoid

_DT_FLOOR = _A_FLOOR = 1e-4  # of the authors' code


class State(NamedTuple):
  h: Writes  # s [H, N, P], k [H, R, N] and v [H, R, P], float32
  angle: jax.Array  # [H, S] float32, in [−π, π]


class Selection(NamedTuple):
  c: jax.Array  # [..., H, R, N]
  b: jax.Array  # [..., H, R, N]
  x: jax.Array  # [..., H, R, P]
  z: jax.Array  # [..., H, R, P]
  gates: dict[str, jax.Array]  # [..., H] float32: Δ A, λ Δ and (1 − λ) Δ
  turn: jax.Array  # [..., H, S] float32: Δ θ


@register(
  "mamba3",
  family="ssm",
  year=2026,
  paper="Lahoti et al. 2026, arXiv:2603.15569",
  write="selected decay, rotation and add",
  evidence="silver",
  tiny=dict(d_model=6, head_dim=3, d_state=5, num_groups=2, mimo_rank=2),
)
@dataclasses.dataclass(frozen=True)
class Mamba3(cell.Cell):
  """Mamba-3: a write has two inputs, a plane turns as the input says.

    z, x, B, C, Δ, A, λ, θ = W_in u_t
    Δ = softplus(Δ + b_Δ) ,  A = −softplus(A) ,  λ = σ(λ) ,  θ = π tanh(θ)
    B, C = RMSNorm(B) + b_B, RMSNorm(C) + b_C            section 3.4
    B̄_t, C̄_t = Π_{i≤t} Rot(Δ_i θ_i) of B_t, C_t          proposition 4, (11)
    α = exp(Δ A) ,  β = (1 − λ) Δ α ,  γ = λ Δ           proposition 1
    h_t = α_t h_{t−1} + β_t B̄_{t−1} x_{t−1}ᵀ + γ_t B̄_t x_tᵀ       (5)
    y_t = W_out ((h_tᵀ C̄_t + D x_t) ⊙ silu(z_t))

  Rot turns S pairs of channels, `rope_fraction` of all N: the imaginary part of
  a complex A. With R = mimo_rank > 1 a head writes and reads R vectors at once
  (appendix C): h takes Σ_r B_r (x ⊙ X_r)ᵀ, and y is the sum of
  (hᵀ C_r + D x ⊙ X_r) ⊙ silu(z ⊙ Z_r) ⊙ O_r. E, H, P, G as in Mamba-2; Δ, A, λ
  are scalars a head, θ is shared by the heads.

  State: h: s [H, N, P], k [H, R, N] (B̄_{t−1}) and v [H, R, P] (x_{t−1}); angle
    [H, S], Σ Δ θ in [−π, π]; float32, from zero.
  Params: in [D, 2E + 2RGN + 3H + S] (in the order above), dt_bias [H], b_norm,
    c_norm [N], b_bias, c_bias [H, R, N], d [H], out [E, D]; mimo_x, mimo_z,
    mimo_o [H, R, P] where R > 1. softplus(dt_bias) is log-uniform in
    [dt_min, dt_max]; mimo_x and mimo_o are 1 / R, the rest 1.
  Forms: step and scan O(H R N P) a token, in order; chunk in R T / C steps of
    matmuls, and pallas in one kernel, with both terms of a write at once, a
    token late (`ops.trapezoid`).
  Differs: nothing in the equations. What the paper leaves open, softplus and
    A ≤ −1e-4, D, the shared θ and its tanh, is as in the authors' code at its
    release. Their norm before the gate, for hybrid models, is not here.
  Paper: Lahoti, Li, Chen, Wang et al. 2026, "Mamba-3: Improved Sequence
    Modeling using State Space Principles", arXiv:2603.15569, propositions 1
    and 4 (eq. 5, 11), section 3.4, appendices A.3, C, F; mamba_ssm's mamba3.py.
  """

  d_model: int
  d_state: int = 128
  expand: float = 2.0
  head_dim: int | None = None
  num_groups: int = 1
  mimo_rank: int = 1
  rope_fraction: float = 0.5
  dt_min: float = 1e-3
  dt_max: float = 0.1

  op: ClassVar[str] = "linear_attention"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")

  def __post_init__(self):
    sizes = "d_model", "d_state", "num_groups", "mimo_rank"
    arguments.check_positive(self, *sizes)
    right = {
      "expand · d_model must be a positive whole number": self.expand > 0
      and not self.expand * self.d_model % 1,
      "needs 0 < rope_fraction <= 1 and two channels to turn": self.num_angles
      and self.rope_fraction <= 1,
      "needs 0 < dt_min <= dt_max": 0 < self.dt_min <= self.dt_max,
    }
    for want, found in right.items():
      if not found:
        raise ValueError(f"Mamba3: {want}, got {self}")
    if self.head_dim is not None:
      arguments.check_positive(self, "head_dim")
      arguments.check_divides(self, "head_dim", "d_inner")
    arguments.check_divides(self, "num_groups", "num_heads")

  @property
  def d_inner(self) -> int:
    """E, the channels of the state space."""
    return int(self.expand * self.d_model)

  @property
  def num_heads(self) -> int:
    """H = E / P, with P = head_dim, by default gcd(64, E)."""
    return self.d_inner // (self.head_dim or math.gcd(64, self.d_inner))

  @property
  def num_angles(self) -> int:
    """S, the pairs of channels that turn."""
    return int(self.d_state * self.rope_fraction) // 2

  def init(self, key) -> dict[str, Any]:
    d, e, h, n = self.d_model, self.d_inner, self.num_heads, self.d_state
    r, keys = self.mimo_rank, jax.random.split(key, 3)
    dt = initializers.log_uniform(keys[1], (h,), self.dt_min, self.dt_max)
    width = 2 * e + 2 * r * self.num_groups * n + 3 * h + self.num_angles
    params = {
      "in": initializers.uniform(keys[0], (d, width), d**-0.5),
      "dt_bias": initializers.inverse_softplus(jnp.maximum(dt, _DT_FLOOR)),
      **{k: jnp.ones((n,)) for k in ("b_norm", "c_norm")},
      **{k: jnp.ones((h, r, n)) for k in ("b_bias", "c_bias")},
      "d": jnp.ones((h,)),
      "out": initializers.uniform(keys[2], (e, d), e**-0.5),
    }
    if r > 1:
      ones = jnp.ones((h, r, e // h))
      params |= {"mimo_x": ones / r, "mimo_z": ones, "mimo_o": ones / r}
    return params

  def initial_state(self, params, key=None) -> State:
    h, r, n = params["b_bias"].shape
    p, zeros = self.d_inner // h, lambda *s: jnp.zeros((h, *s), jnp.float32)
    return State(
      Writes(zeros(n, p), zeros(r, n), zeros(r, p)), zeros(self.num_angles)
    )

  def step(self, params, state, u):
    s = self._select(params, u)
    angle = wrap(state.angle + s.turn)
    c, b = (turn_pairs(v, angle[..., None, :]) for v in (s.c, s.b))
    h, y = jax.vmap(write_step)(state.h, c, b, s.x, **s.gates)
    return State(h, angle), self._read_out(params, y, s)

  def parallel(self, params, state, us, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    s = self._select(params, us)
    angle, angles = running_angle(state.angle, s.turn, **flags)
    c, b = (turn_pairs(v, angles[..., None, :]) for v in (s.c, s.b))
    h, y = heads(trapezoid)(
      state.h, c, b, s.x, **s.gates, implementation=implementation, **flags
    )
    return State(h, angle), self._read_out(params, y, s)

  def _select(self, params, u) -> Selection:
    e, h, r, g = self.d_inner, self.num_heads, self.mimo_rank, self.num_groups
    widths = [e, e, r * g * self.d_state, r * g * self.d_state, h, h, h]
    parts = jnp.split(dot(u, params["in"]), np.cumsum(widths), axis=-1)
    dt, a, lam, theta = (x.astype(jnp.float32) for x in parts[4:])
    dt = jax.nn.softplus(dt + params["dt_bias"].astype(jnp.float32))
    a, lam = jnp.maximum(jax.nn.softplus(a), _A_FLOOR), jax.nn.sigmoid(lam)
    gates = dict(log_decay=-a * dt, gamma=lam * dt, beta=(1 - lam) * dt)
    turn = dt[..., None] * math.pi * jnp.tanh(theta)[..., None, :]

    def vectors(x, name):
      x = x.reshape(x.shape[:-1] + (r, g, self.d_state))
      x = norm.rms_norm(x, params[name + "_norm"])
      x = jnp.repeat(jnp.swapaxes(x, -2, -3), h // g, axis=-3)
      return x + params[name + "_bias"].astype(x.dtype)

    z = self._ranks(params, parts[0], "mimo_z")
    x = self._ranks(params, parts[1], "mimo_x")
    b, c = vectors(parts[2], "b"), vectors(parts[3], "c")
    return Selection(c, b, x, z, gates, turn)

  def _ranks(self, params, x, name):
    x = x.reshape(x.shape[:-1] + (self.num_heads, 1, -1))
    return x if self.mimo_rank == 1 else x * params[name].astype(x.dtype)

  def _read_out(self, params, y, s: Selection):
    y = y.astype(s.x.dtype) + params["d"].astype(s.x.dtype)[:, None, None] * s.x
    y = y * jax.nn.silu(s.z)
    if self.mimo_rank > 1:
      y = y * params["mimo_o"].astype(y.dtype)
    y = jnp.sum(y, axis=-2)
    return dot(y.reshape(y.shape[:-2] + (-1,)), params["out"])
