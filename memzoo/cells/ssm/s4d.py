"""S4D: diagonal state spaces."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core import cell, initializers
from memzoo.core.registry import register
from memzoo.ops import arguments, hippo
from memzoo.ops.state_space import state_space, step as space_step

_INITS = ("legs", "inv", "lin")


class State(NamedTuple):
  h: jax.Array  # [D, N / 2] complex64


@register(
  "s4d",
  family="ssm",
  year=2022,
  paper="Gu et al. 2022, arXiv:2206.11893",
  write="decay and add",
  evidence="silver",
  parity="state-spaces/s4 e757cef, S4D (models/s4/s4d.py)",
  tiny=dict(d_model=5, d_state=6, dt_min=0.02, dt_max=0.5),
)
@dataclasses.dataclass(frozen=True)
class S4D(cell.Cell):
  """S4D: per channel, damped oscillations that the channel excites.

    x'(t) = A x(t) + B u(t) ,  y(t) = C x(t) + D u(t) ,  A diagonal
    x_k = Ā x_{k−1} + B̄ u_k
    y_k = 2 Re(C x_k) + D u_k
    zoh:       Ā = exp(ΔA) ,  B̄ = A⁻¹ (Ā − I) B
    bilinear:  Ā = (I − ΔA/2)⁻¹ (I + ΔA/2) ,  B̄ = (I − ΔA/2)⁻¹ ΔB
    K̄_l = 2 Re Σ_n C_n Ā_n^l B̄_n ,  y = K̄ ∗ u + D u

  The N numbers of a channel are N / 2 conjugate pairs, of which one each is
  kept; A = −exp(log_re) + i im. At the start, n = 0 … N/2 − 1:

    legs  the diagonal of the DPLR form of HiPPO-LegS, with half its B
    inv   A_n = −½ + i (N/π) (N / (2n + 1) − 1) ,  B = 1
    lin   A_n = −½ + i π n ,  B = 1

  State: h [D, N/2] complex64, from zero; it is x.
  Params: log_dt [D], log_re, im, b_re, b_im, c_re, c_im [D, N/2], d [D]. Δ is
    log-uniform in [dt_min, dt_max], C and D normal with variance 1.
  Forms: step and scan O(DN) a token, scan in checkpointed blocks; chunk in
    T / 16 serial steps, inside which K̄ is a triangular matrix; fft the whole
    convolution, O(D T (log T + N / √T)), K̄ in two levels of √T powers: no
    reset, and about 1e-7 of a later input reaches an output; assoc and pallas
    as of the linear recurrence, with T D N states kept.
  Differs: nothing in the state space. The GELU and the map over channels that
    follow it in the authors' layer are the model's.
  Paper: Gu, Gupta, Goel, Ré 2022, "On the Parameterization and Initialization
    of Diagonal State Space Models", arXiv:2206.11893, sections 3
    (discretisation, kernel, parameterisation) and 4 (S4D-LegS, -Inv, -Lin).
  """

  d_model: int
  d_state: int = 64
  init_a: str = "legs"
  discretization: str = "zoh"
  dt_min: float = 1e-3
  dt_max: float = 0.1

  op: ClassVar[str] = "state_space"
  implementations: ClassVar[tuple[str, ...]] = (
    "scan",
    "assoc",
    "chunk",
    "pallas",
    "fft",
  )
  convolutions: ClassVar[tuple[str, ...]] = ("fft",)

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "d_state")
    if self.d_state % 2:
      raise ValueError(f"S4D: d_state must be even, got {self.d_state}")
    for field, known in (
      ("init_a", _INITS),
      ("discretization", tuple(hippo.DIAGONAL)),
    ):
      if getattr(self, field) not in known:
        raise ValueError(
          f"S4D: {field} must be one of {known}, got {getattr(self, field)!r}"
        )
    if not 0 < self.dt_min <= self.dt_max:
      raise ValueError(
        "S4D: needs 0 < dt_min <= dt_max, got "
        f"dt_min={self.dt_min!r}, dt_max={self.dt_max!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, n = self.d_model, self.d_state // 2
    keys = jax.random.split(key, 4)
    a, b = self._start()
    real = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), (d, n))
    normal = lambda k: jax.random.normal(k, (d, n)) * math.sqrt(0.5)
    dt = initializers.log_uniform(keys[0], (d,), self.dt_min, self.dt_max)
    return {
      "log_dt": jnp.log(dt),
      "log_re": real(np.log(-a.real)),
      "im": real(a.imag),
      "b_re": real(b.real),
      "b_im": real(b.imag),
      "c_re": normal(keys[1]),
      "c_im": normal(keys[2]),
      "d": jax.random.normal(keys[3], (d,)),
    }

  def _start(self):
    """A, B complex128 [N/2] of the initialization."""
    size = self.d_state
    n = np.arange(size // 2)
    if self.init_a == "legs":
      a, _, b, _ = hippo.legs_dplr(size)
      return a, b / 2
    im = math.pi * n
    if self.init_a == "inv":
      im = size / math.pi * (size / (2 * n + 1) - 1)
    return -0.5 + 1j * im, np.ones(size // 2, complex)

  def initial_state(self, params, key=None) -> State:
    shape = (self.d_model, self.d_state // 2)
    return State(jnp.zeros(shape, jnp.complex64))

  def step(self, params, state, x):
    h, y = space_step(state.h, x, *self._space(params))
    return State(h), y + params["d"].astype(x.dtype) * x

  def parallel(self, params, state, xs, reset, mask, implementation):
    transition, write, read = self._space(params)
    h, y = state_space(
      state.h, xs, transition=transition, write=write, read=read, reset=reset,
      mask=mask, implementation=implementation,
    )  # fmt: skip
    return State(h), y + params["d"].astype(xs.dtype) * xs

  def _space(self, params):
    """Ā, B̄ and 2 C, complex64 [D, N/2]."""
    p = {k: x.astype(jnp.float32) for k, x in params.items()}
    discretize = hippo.DIAGONAL[self.discretization]
    a = jax.lax.complex(-jnp.exp(p["log_re"]), p["im"])
    a_bar, factor = discretize(a, jnp.exp(p["log_dt"])[:, None])
    b = jax.lax.complex(p["b_re"], p["b_im"])
    return a_bar, factor * b, 2 * jax.lax.complex(p["c_re"], p["c_im"])
