"""Mamba-2."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.batched import heads
from memzoo.ops.conv import conv, empty as conv_empty, step as conv_step
from memzoo.ops.linear_attention import linear_attention, step as attend_step

_DT_FLOOR = 1e-4  # of the authors' code


class State(NamedTuple):
  h: jax.Array  # [H, N, P] float32
  conv: jax.Array  # [W − 1, E + 2GN] float32: the last inputs of x, B, C


class Selection(NamedTuple):
  """What a token chooses after the convolution."""

  c: jax.Array  # [..., H, N], the query
  b: jax.Array  # [..., H, N], the key
  dx: jax.Array  # [..., H, P], the value: Δ x
  log_decay: jax.Array  # [..., H] float32: Δ A
  x: jax.Array  # [..., H, P]


@register(
  "mamba2",
  family="ssm",
  year=2024,
  paper="Dao and Gu 2024, arXiv:2405.21060",
  write="selected decay and add",
  evidence="silver",
  tiny=dict(d_model=6, head_dim=3, d_state=5, num_groups=2, conv_size=3),
  parity="transformers 5.23, Mamba2Mixer",
)
@dataclasses.dataclass(frozen=True)
class Mamba2(cell.Cell):
  """Mamba-2: a state space that is linear attention with a chosen decay.

    z, x, B, C, Δ = W_in u_t
    x, B, C = silu(conv(x, B, C)) ,  Δ = softplus(Δ + b_Δ)
    h_t = exp(Δ_t A) h_{t−1} + B_t (Δ_t x_t)ᵀ      (2a), A a scalar a head
    y_t = h_tᵀ C_t + D x_t                          (2b)
    out = W_out RMSNorm(y_t ⊙ silu(z))              figure 6, section 7

  E = expand D channels in H = E / P heads of P = head_dim, by default 64 or the
  largest divisor of it that divides E. B and C come in G = num_groups groups,
  each for H / G heads (with G = 1 all heads share them: multi-value attention),
  and the norm runs over each group's channels. As attention q = C, k = B,
  v = Δ x.

  State: h [H, N, P] and conv [W − 1, E + 2GN], float32, from zero.
  Params: in [D, 2E + 2GN + H] (z, x, B, C, Δ), conv [W, E + 2GN], conv_bias
    [E + 2GN], dt_bias [H], a_log [H], d [H], norm [E], out [E, D]. At the
    start A = −exp(a_log) is uniform in −[1, 16] and softplus(dt_bias)
    log-uniform in [dt_min, dt_max].
  Forms: step and scan O(H N P) a token, in order; chunk O(H (C (N + P) + N P))
    a token, in T / C sequential steps of matmuls (the block decomposition of
    section 6); pallas the same in one kernel.
  Differs: nothing. The state is held transposed, [N, P].
  Paper: Dao and Gu 2024, "Transformers are SSMs: Generalized Models and
    Efficient Algorithms Through Structured State Space Duality",
    arXiv:2405.21060, eq. 2, sections 5 to 7; starting values, the norm's
    groups and its eps as in the authors' code (mamba_ssm).
  """

  d_model: int
  d_state: int = 128
  expand: float = 2.0
  head_dim: int | None = None
  num_groups: int = 1
  conv_size: int = 4
  dt_min: float = 1e-3
  dt_max: float = 0.1

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "linear_attention"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "d_state", "num_groups", "conv_size"
    )
    if self.expand <= 0 or self.expand * self.d_model % 1:
      raise ValueError(
        f"{type(self).__name__}: expand · d_model must be a positive whole "
        f"number, got expand={self.expand!r}, d_model={self.d_model!r}"
      )
    if self.head_dim is not None:
      arguments.check_positive(self, "head_dim")
      arguments.check_divides(self, "head_dim", "d_inner")
    arguments.check_divides(self, "num_groups", "num_heads")
    if not 0 < self.dt_min <= self.dt_max:
      raise ValueError(
        f"{type(self).__name__}: needs 0 < dt_min <= dt_max, got "
        f"dt_min={self.dt_min!r}, dt_max={self.dt_max!r}"
      )

  @property
  def d_inner(self) -> int:
    """E, the channels of the state space."""
    return int(self.expand * self.d_model)

  @property
  def num_heads(self) -> int:
    """H."""
    return self.d_inner // self.head_width

  @property
  def head_width(self) -> int:
    """P: head_dim, by default 64, or its largest divisor that divides E."""
    return self.head_dim or math.gcd(64, self.d_inner)

  @property
  def _widths(self) -> tuple[int, int, int]:
    """E, G N and the width of the convolution."""
    e, gn = self.d_inner, self.num_groups * self.d_state
    return e, gn, e + 2 * gn

  def init(self, key) -> dict[str, Any]:
    d, h, w = self.d_model, self.num_heads, self.conv_size
    e, _, width = self._widths
    keys = jax.random.split(key, 6)
    dt = initializers.log_uniform(keys[3], (h,), self.dt_min, self.dt_max)

    def uniform(key, shape, fan_in):
      return initializers.uniform(key, shape, fan_in**-0.5)

    return {
      "in": uniform(keys[0], (d, e + width + h), d),
      "conv": uniform(keys[1], (w, width), w),
      "conv_bias": uniform(keys[2], (width,), w),
      "dt_bias": initializers.inverse_softplus(jnp.maximum(dt, _DT_FLOOR)),
      "a_log": jnp.log(jax.random.uniform(keys[4], (h,), minval=1, maxval=16)),
      "d": jnp.ones((h,)),
      "norm": jnp.ones((e,)),
      "out": uniform(keys[5], (e, d), e),
    }

  def initial_state(self, params, key=None) -> State:
    shape = (self.num_heads, self.d_state, self.head_width)
    return State(jnp.zeros(shape, jnp.float32), conv_empty(params["conv"]))

  def step(self, params, state, x):
    z, xbc, dt = self._project(params, x)
    window, xbc = conv_step(
      state.conv, xbc, params["conv"], params["conv_bias"]
    )
    r = self._select(params, xbc, dt)
    h, y = jax.vmap(attend_step)(state.h, *r[:4])
    return State(h, window), self._read_out(params, y, r.x, z)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    z, xbc, dt = self._project(params, xs)
    window, xbc = conv(
      state.conv, xbc, params["conv"], params["conv_bias"], **flags
    )
    r = self._select(params, xbc, dt)
    h, y = heads(linear_attention)(
      state.h, r.c, r.b, r.dx, log_decay=r.log_decay,
      implementation=implementation, **flags,
    )  # fmt: skip
    return State(h, window), self._read_out(params, y, r.x, z)

  def _project(self, params, u):
    e, _, width = self._widths
    return jnp.split(dot(u, params["in"]), [e, e + width], axis=-1)

  def _select(self, params, xbc, dt) -> Selection:
    e, gn, _ = self._widths
    x, b, c = jnp.split(jax.nn.silu(xbc), [e, e + gn], axis=-1)
    lead, g = x.shape[:-1], self.num_groups
    x = x.reshape(lead + (-1, self.head_width))
    b, c = (
      jnp.repeat(y.reshape(lead + (g, -1)), self.num_heads // g, axis=-2)
      for y in (b, c)
    )
    dt = dt.astype(jnp.float32) + params["dt_bias"].astype(jnp.float32)
    dt = jax.nn.softplus(dt)
    log_decay = -jnp.exp(params["a_log"].astype(jnp.float32)) * dt
    dx = (x.astype(jnp.float32) * dt[..., None]).astype(x.dtype)
    return Selection(c, b, dx, log_decay, x)

  def _read_out(self, params, y, x, z):
    y = y + params["d"].astype(x.dtype)[:, None] * x
    y = (y.reshape(z.shape) * jax.nn.silu(z)).reshape(
      z.shape[:-1] + (self.num_groups, -1)
    )
    y = norm.rms_norm(y, params["norm"].reshape(self.num_groups, -1))
    return dot(y.reshape(z.shape), params["out"])
