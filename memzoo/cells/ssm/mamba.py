"""Mamba."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, chunk, norm
from memzoo.ops.conv import conv, empty as conv_empty, step as conv_step
from memzoo.ops.selective_scan import (
  even_blocks,
  selective_scan,
  step as selective_step,
)

_DT_FLOOR = 1e-4  # of the authors' code


class State(NamedTuple):
  h: jax.Array  # [E, N] float32
  conv: jax.Array  # [W − 1, E] float32: the last inputs of the convolution


class Selection(NamedTuple):
  """What a token chooses after the convolution."""

  x: jax.Array  # [..., E]
  dt: jax.Array  # [..., E] float32, positive
  b: jax.Array  # [..., N]
  c: jax.Array  # [..., N]


@register(
  "mamba",
  family="ssm",
  year=2023,
  paper="Gu and Dao 2023, arXiv:2312.00752",
  write="selected decay and add",
  evidence="gold",
  parity="transformers 5.23, MambaMixer; mambapy 1.2, MambaBlock",
  tiny=dict(d_model=6, d_state=5, expand=1.5, conv_size=3, dt_rank=2),
)
@dataclasses.dataclass(frozen=True)
class Mamba(cell.Cell):
  """Mamba: a diagonal state space whose step size the input chooses.

    x, z = W_in u_t
    x    = silu(conv(x))
    Δ    = softplus(W_Δ (W_r x) + b_Δ) ,  B = W_B x ,  C = W_C x    (alg. 2)
    h_t  = exp(Δ ⊗ A) ⊙ h_{t−1} + (Δ ⊙ x) Bᵀ                      (2a), (4)
    y_t  = W_out ((h_t C + D ⊙ x) ⊙ silu(z))                      (2b)

  E = expand D channels, each with N states; A = −exp(a_log). With
  `select_norm`, its eps, W_r x, B and C are divided by their root mean square
  (Falcon Mamba).

  State: h [E, N] float32 and conv [W − 1, E] float32, from zero.
  Params: in [D, 2E], conv [W, E], conv_bias [E], select [E, R + 2N] (W_r, W_B,
    W_C), dt [R, E], dt_bias [E], a_log [E, N], d [E], out [E, D]. At the start
    A = −(1 … N) in every channel, and softplus(dt_bias) is log-uniform in
    [dt_min, dt_max].
  Forms: step O(E (N + D)) a token; scan the same, with everything but the
    recurrence hoisted into blocks of at most 64 tokens; chunk in T / 16 serial
    steps. In scan and chunk nothing of shape [T, E, N] is built, forward or
    backward, and a block is recomputed in the backward.
  Differs: from eq. 4, the write Δ B x for (ΔA)⁻¹ (exp(ΔA) − I) ΔB x, as the
    authors' code has it. R is ceil(D / 16) unless given, as there.
  Paper: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective
    State Spaces", arXiv:2312.00752, eq. 2 and 4, algorithm 2, sections 3.4
    and 3.6. Norms: Zuo et al. 2024, "Falcon Mamba: The First Competitive
    Attention-free 7B Language Model", arXiv:2410.05355.
  """

  d_model: int
  d_state: int = 16
  expand: float = 2.0
  conv_size: int = 4
  dt_rank: int | None = None
  dt_min: float = 1e-3
  dt_max: float = 0.1
  select_norm: float | None = None

  op: ClassVar[str] = "selective_scan"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "d_state", "conv_size")
    if self.dt_rank is not None:
      arguments.check_positive(self, "dt_rank")
    if self.expand <= 0 or self.expand * self.d_model % 1:
      raise ValueError(
        f"{type(self).__name__}: expand · d_model must be a positive whole "
        f"number, got expand={self.expand!r}, d_model={self.d_model!r}"
      )
    if self.select_norm is not None and self.select_norm <= 0:
      raise ValueError(
        "Mamba: select_norm is the eps of a norm, above 0, or None, got "
        f"{self.select_norm!r}"
      )
    if not 0 < self.dt_min <= self.dt_max:
      raise ValueError(
        "Mamba: needs 0 < dt_min <= dt_max, got "
        f"dt_min={self.dt_min!r}, dt_max={self.dt_max!r}"
      )

  @property
  def d_inner(self) -> int:
    """E, the channels of the scan."""
    return int(self.expand * self.d_model)

  @property
  def rank(self) -> int:
    """R, the width that Δ is made from."""
    return self.dt_rank or -(-self.d_model // 16)

  def init(self, key) -> dict[str, Any]:
    d, e, n, r = self.d_model, self.d_inner, self.d_state, self.rank
    keys = jax.random.split(key, 7)
    dt = initializers.log_uniform(keys[5], (e,), self.dt_min, self.dt_max)

    def uniform(key, shape, fan_in):
      return initializers.uniform(key, shape, fan_in**-0.5)

    return {
      "in": uniform(keys[0], (d, 2 * e), d),
      "conv": uniform(keys[1], (self.conv_size, e), self.conv_size),
      "conv_bias": uniform(keys[2], (e,), self.conv_size),
      "select": uniform(keys[3], (e, r + 2 * n), e),
      "dt": uniform(keys[4], (r, e), r),
      "dt_bias": initializers.inverse_softplus(jnp.maximum(dt, _DT_FLOOR)),
      "a_log": jnp.log(
        jnp.broadcast_to(jnp.arange(1.0, n + 1, dtype=jnp.float32), (e, n))
      ),
      "d": jnp.ones((e,)),
      "out": uniform(keys[6], (e, d), e),
    }

  def initial_state(self, params, key=None) -> State:
    h = jnp.zeros((self.d_inner, self.d_state), jnp.float32)
    return State(h, conv_empty(params["conv"]))

  def step(self, params, state, x):
    x, z = self._project(params, x)
    buffer, x = conv_step(state.conv, x, params["conv"], params["conv_bias"])
    s = self._select(params, x)
    h, y = selective_step(state.h, s.x, s.dt, _a(params), s.b, s.c)
    return State(h, buffer), self._output(params, y, s.x, z)

  def parallel(self, params, state, xs, reset, mask, implementation):
    # Block by block, each recomputed in the backward: the layer's many
    # [T, E] arrays would else outweigh the scan itself.
    def block(state, i, _):
      x, z = self._project(params, i.xs)
      buffer, x = conv(
        state.conv, x, params["conv"], params["conv_bias"], reset=i.reset,
        mask=i.mask,
      )  # fmt: skip
      s = self._select(params, x)
      h, y = selective_scan(
        state.h, s.x, s.dt, _a(params), s.b, s.c, reset=i.reset, mask=i.mask,
        implementation=implementation,
      )  # fmt: skip
      return State(h, buffer), self._output(params, y, s.x, z)

    inputs = Inputs(xs, reset, mask)
    size = even_blocks(xs.shape[0])
    return chunk.run(block, state, inputs, chunk_size=size)

  def _project(self, params, u):
    return jnp.split(dot(u, params["in"]), 2, axis=-1)

  def _select(self, params, x) -> Selection:
    x = jax.nn.silu(x)
    split = [self.rank, self.rank + self.d_state]
    parts = jnp.split(dot(x, params["select"]), split, axis=-1)
    if self.select_norm is not None:
      parts = [norm.rms_norm(p, eps=self.select_norm) for p in parts]
    low, b, c = parts
    dt = dot(low, params["dt"]).astype(jnp.float32)
    dt = jax.nn.softplus(dt + params["dt_bias"].astype(jnp.float32))
    return Selection(x, dt, b, c)

  def _output(self, params, y, x, z):
    y = y + params["d"].astype(x.dtype) * x
    return dot(y * jax.nn.silu(z), params["out"])


class Inputs(NamedTuple):
  xs: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


def _a(params):
  return -jnp.exp(params["a_log"].astype(jnp.float32))
