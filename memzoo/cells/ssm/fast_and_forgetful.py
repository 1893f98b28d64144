"""Fast and forgetful memory."""

import dataclasses
import math
import sys
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.linear_recurrence import linear_recurrence

# The fastest |α| at the start: in the authors' code the end of the range in
# which 1024 steps of float64 neither over- nor underflow.
_FASTEST = math.log(sys.float_info.max) / 1024 - 0.02


class State(NamedTuple):
  s: jax.Array  # [M, C] complex64


@register(
  "fast_and_forgetful",
  family="ssm",
  year=2023,
  paper="Morad et al. 2023, arXiv:2310.04128",
  write="decay, turn and add",
  evidence="silver",
  parity="memax 0.1.1, FFM (its states)",
  tiny=dict(d_model=6, num_traces=5, num_contexts=3, max_period=30),
)
@dataclasses.dataclass(frozen=True)
class FastAndForgetful(cell.Cell):
  """Fast and forgetful memory (FFM): traces that fade, and turn as they fade.

    x̃   = ℓ_1(x) ⊙ σ(ℓ_2(x))
    S_t = γ ⊙ S_{t−1} + x̃_t 1_cᵀ ,  γ_jk = exp(−|α_j| + i ω_k)
    z   = ℓ_3([Re S_t, Im S_t])
    y   = LN(z) ⊙ σ(ℓ_4(x)) + ℓ_5(x) ⊙ (1 − σ(ℓ_4(x)))

  Each ℓ is a linear map with a bias, LN has none of its own. Trace j fades by
  |α_j|; seen against c clocks of periods 2π / ω_k, what it holds tells when it
  came. At the start the periods are evenly spaced from `min_period` to
  `max_period`, and the α_j from a half-life of one step to the one that leaves
  `forgotten_at` of a trace after `max_period` steps.

  State: s [M, C] complex64, starts at zero; M = num_traces, C = num_contexts.
  Params: pre [D, 2M] (ℓ_1, ℓ_2) and pre_b [2M], alpha [M], omega [C], mix
    [2MC, D] (row (2j + r)C + k: trace j, real or imaginary part r, context k)
    and mix_b [D], post [D, 2D] (ℓ_4, ℓ_5) and post_b [2D].
  Forms: step O(M C D) a token; scan hoists all ℓ out of the loop, whose steps
    are O(M C); assoc the same in O(log T) parallel passes, chunk in passes
    over 16 tokens and T / 16 serial steps; pallas the steps of scan in one
    kernel.
  Differs: the paper's closed form multiplies powers of γ, for which its code
    uses float64 and cuts α to a range; the recurrence needs neither, and −|α|
    does not grow.
  Paper: Morad, Kortvelesy, Liwicki, Prorok 2023, "Reinforcement Learning with
    Fast and Forgetful Memory", arXiv:2310.04128, section 4 (the aggregator and
    the cell); the start as in the authors' code (proroklab/ffm).
  """

  d_model: int
  num_traces: int = 32
  num_contexts: int = 4
  min_period: float = 1.0
  max_period: float = 1024.0
  forgotten_at: float = 0.01

  op: ClassVar[str] = "linear_recurrence"
  implementations: ClassVar[tuple[str, ...]] = (
    "scan",
    "assoc",
    "chunk",
    "pallas",
  )

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_traces", "num_contexts")
    if not 0 < self.min_period <= self.max_period:
      raise ValueError(
        "FastAndForgetful: needs 0 < min_period <= max_period, got "
        f"min_period={self.min_period!r}, max_period={self.max_period!r}"
      )
    if not 0 < self.forgotten_at < 1:
      raise ValueError(
        "FastAndForgetful: forgotten_at must be in (0, 1), got "
        f"{self.forgotten_at!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, m, c = self.d_model, self.num_traces, self.num_contexts
    keys = jax.random.split(key, 6)
    draw = lambda key, shape, n: initializers.uniform(key, shape, n**-0.5)
    slowest = -math.log(self.forgotten_at) / self.max_period
    periods = jnp.linspace(self.min_period, self.max_period, c)
    return {
      "pre": draw(keys[0], (d, 2 * m), d),
      "pre_b": draw(keys[1], (2 * m,), d),
      "alpha": jnp.linspace(-max(_FASTEST, slowest), -slowest, m),
      "omega": 2 * math.pi / periods,
      "mix": draw(keys[2], (2 * m * c, d), 2 * m * c),
      "mix_b": draw(keys[3], (d,), 2 * m * c),
      "post": draw(keys[4], (d, 2 * d), d),
      "post_b": draw(keys[5], (2 * d,), d),
    }

  def initial_state(self, params, key=None) -> State:
    shape = (self.num_traces, self.num_contexts)
    return State(jnp.zeros(shape, jnp.complex64))

  def step(self, params, state, x):
    write = _write(params, x).astype(jnp.complex64)
    s = _decay(params) * state.s + write[:, None]
    return State(s), _read(params, s, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    write = jnp.repeat(_write(params, xs), self.num_contexts, axis=-1)
    s, ss = linear_recurrence(
      state.s.ravel(), write, decay=_decay(params).ravel(), reset=reset,
      mask=mask, implementation=implementation,
    )  # fmt: skip
    ss = ss.reshape(-1, *state.s.shape)
    return State(s.reshape(state.s.shape)), _read(params, ss, xs)


def _affine(x, w, b):
  return dot(x, w) + b.astype(x.dtype)


def _decay(params):
  """γ, complex64 [M, C]."""
  alpha, omega = (params[k].astype(jnp.float32) for k in ("alpha", "omega"))
  shape = alpha.size, omega.size
  return jnp.exp(
    jax.lax.complex(
      jnp.broadcast_to(-jnp.abs(alpha)[:, None], shape),
      jnp.broadcast_to(omega, shape),
    )
  )


def _write(params, x):
  """x̃: [..., D] -> float32 [..., M]."""
  new = _affine(x, params["pre"], params["pre_b"]).astype(jnp.float32)
  new, gate = jnp.split(new, 2, axis=-1)
  return new * jax.nn.sigmoid(gate)


def _read(params, s, x):
  """y of complex64 [..., M, C] and x [..., D]."""
  parts = jnp.concatenate([s.real, s.imag], axis=-1).astype(x.dtype)
  z = _affine(parts.reshape(*x.shape[:-1], -1), params["mix"], params["mix_b"])
  gate, skip = jnp.split(_affine(x, params["post"], params["post_b"]), 2, -1)
  gate = jax.nn.sigmoid(gate)
  return norm.layer_norm(z) * gate + skip * (1 - gate)
