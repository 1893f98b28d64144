"""Linear recurrent unit."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell
from memzoo.core.linear import dot_complex, dot_real
from memzoo.core.registry import register
from memzoo.ops import arguments
from memzoo.ops.linear_recurrence import linear_recurrence


class State(NamedTuple):
  h: jax.Array  # [N] complex64


@register(
  "lru",
  family="ssm",
  year=2023,
  paper="Orvieto et al. 2023, arXiv:2303.06349",
  write="decay and add",
  evidence="gold",
  parity="memax 0.1.1, LRU",
  tiny=dict(d_model=6, d_state=5),
)
@dataclasses.dataclass(frozen=True)
class LRU(cell.Cell):
  """Linear recurrent unit: complex numbers that turn and shrink.

    λ   = exp(−exp(ν_log) + i exp(θ_log))
    x_k = λ ⊙ x_{k−1} + exp(γ_log) ⊙ (B u_k)
    y_k = Re(C x_k) + D ⊙ u_k

  x is the state here `h`, u the input, B = b_re + i b_im, C = c_re + i c_im.
  At the start the λ are uniform on the ring r_min <= |λ| <= r_max, with phases
  in [0, max_phase] (lemma 3.2), and γ = sqrt(1 − |λ|²) (section 3.4).

  State: h [N] complex64, starts at zero.
  Params: nu_log, theta_log, gamma_log [N]; b_re, b_im [D, N]; c_re, c_im
    [N, D]; d [D].
  Forms: step O(DN) a token; scan hoists B u and C x out of the loop, whose
    steps are O(N); assoc the same in O(log T) parallel passes, chunk in
    passes over 16 tokens and T / 16 serial steps; pallas the steps of scan in
    one kernel.
  Differs: nothing in the recurrent layer. The block around it (norm, gated
    linear unit, skip) is the model's.
  Paper: Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De 2023,
    "Resurrecting Recurrent Neural Networks for Long Sequences",
    arXiv:2303.06349, section 3 and the listing of appendix A.
  """

  d_model: int
  d_state: int = 64
  r_min: float = 0.0
  r_max: float = 1.0
  max_phase: float = 2 * math.pi

  op: ClassVar[str] = "linear_recurrence"
  implementations: ClassVar[tuple[str, ...]] = (
    "scan",
    "assoc",
    "chunk",
    "pallas",
  )

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "d_state")
    if not 0 <= self.r_min < self.r_max <= 1:
      raise ValueError(
        "LRU: the ring needs 0 <= r_min < r_max <= 1, got "
        f"r_min={self.r_min!r}, r_max={self.r_max!r}"
      )
    if not 0 < self.max_phase <= 2 * math.pi:
      raise ValueError(
        f"LRU: max_phase must be in (0, 2π], got {self.max_phase!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, n = self.d_model, self.d_state
    keys = jax.random.split(key, 7)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    # |λ|² = r_max² (1 − u (1 − r_min² / r_max²)): uniform in the ring's area,
    # and never 1 exactly.
    u = jax.random.uniform(keys[0], (n,), minval=tiny)
    inner = 1 - (self.r_min / self.r_max) ** 2
    log_square = 2 * math.log(self.r_max) + jnp.log1p(-u * inner)
    phase = jax.random.uniform(keys[1], (n,), minval=tiny)

    def normal(key, shape, scale):
      return jax.random.normal(key, shape) * scale

    return {
      "nu_log": jnp.log(-0.5 * log_square),
      "theta_log": jnp.log(self.max_phase * phase),
      "gamma_log": 0.5 * jnp.log(-jnp.expm1(log_square)),
      "b_re": normal(keys[2], (d, n), (2 * d) ** -0.5),
      "b_im": normal(keys[3], (d, n), (2 * d) ** -0.5),
      "c_re": normal(keys[4], (n, d), n**-0.5),
      "c_im": normal(keys[5], (n, d), n**-0.5),
      "d": normal(keys[6], (d,), 1.0),
    }

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.d_state,), jnp.complex64))

  def step(self, params, state, x):
    h = _eigenvalues(params) * state.h + self._write(params, x)
    return State(h), self._read(params, h, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    h, hs = linear_recurrence(
      state.h,
      self._write(params, xs),
      decay=_eigenvalues(params),
      reset=reset,
      mask=mask,
      implementation=implementation,
    )
    return State(h), self._read(params, hs, xs)

  def _write(self, params, x):
    """exp(γ_log) ⊙ (B u): [..., D] -> complex64 [..., N]."""
    gamma = jnp.exp(params["gamma_log"].astype(jnp.float32))
    u = dot_complex(x, params["b_re"], params["b_im"])
    return jax.lax.complex(gamma * u.real, gamma * u.imag)

  def _read(self, params, h, x):
    """Re(C h) + D ⊙ u: complex64 [..., N] -> [..., D]."""
    y = dot_real(h, params["c_re"], params["c_im"], x.dtype)
    return y + params["d"].astype(x.dtype) * x


def _eigenvalues(params):
  size = -jnp.exp(params["nu_log"].astype(jnp.float32))
  phase = jnp.exp(params["theta_log"].astype(jnp.float32))
  return jnp.exp(jax.lax.complex(size, phase))
