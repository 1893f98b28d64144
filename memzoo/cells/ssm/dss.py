"""DSS: diagonal state spaces."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.registry import register
from memzoo.ops import arguments, hippo
from memzoo.ops.state_space import state_space, step as space_step

_EPS = 1e-7  # of the complex softmax, as in the authors' code


class State(NamedTuple):
  h: jax.Array  # [D, N] complex64


@register(
  "dss",
  family="ssm",
  year=2022,
  paper="Gupta et al. 2022, arXiv:2203.14343",
  write="decay and add",
  evidence="silver",
  tiny=dict(d_model=5, d_state=3, dt_min=0.02, dt_max=0.5),
)
@dataclasses.dataclass(frozen=True)
class DSS(cell.Cell):
  """DSS: per channel, N complex exponentials that the channel excites.

    x_k = Ā x_{k−1} + B̄ u_k ,  y_k = Re(w x_k) + D u_k ,  Ā = exp(ΔΛ)
    exp:      B̄ = Λ⁻¹ (exp(ΔΛ) − I) ,  Λ = −exp(Λ_re) + i Λ_im
    softmax:  B̄ = Λ⁻¹ (exp(ΔΛ) − I) (exp(LΔΛ) − I)⁻¹ ,  Λ = Λ_re + i Λ_im
    K̄ = w Λ⁻¹ (exp(ΔΛ) − I) exp(P)  or  w Λ⁻¹ row-softmax(P) ,  P_nk = λ_n k Δ

  K̄ is the kernel of the same map as a convolution, y = Re(K̄) ∗ u + D u. Without
  `length` it is DSS-exp; with it DSS-softmax, whose K̄ is one softmax over L =
  `length` tokens, and whose λ may grow: exp((k − L + 1) λ Δ) is at most 1 up to
  token L, the most that a fresh state takes. The diagonal of C B̄ is all that
  is learnt of B and C, and it serves every diagonalisable state space.

  State: h [D, N] complex64, from zero; it is x.
  Params: log_dt [D], log_re (exp) or re (softmax) and im [N], shared by the
    channels, w_re, w_im [D, N], d [D]. Δ is log-uniform in [dt_min, dt_max],
    w and D normal, Λ = −½ + i times the N frequencies above 0 of HiPPO-LegS of
    2N states (its skew part).
  Forms: step and scan O(DN) a token, scan in checkpointed blocks; chunk in
    T / 16 serial steps, inside which K̄ is a triangular matrix; fft the whole
    convolution, O(D T (log T + N / √T)): no reset, and about 1e-7 of a later
    input reaches an output; assoc and pallas as of the linear recurrence, with
    T D N states kept.
  Differs: L is an option, the same for every call, where theirs is the length
    of the sequence at hand: the recurrence needs it before the first token. A
    λ that grows by more than exp(87), float32's range, in L tokens is lost.
    One Δ a channel, as in the paper; their code has one more for Im Λ. GELU
    and the map over channels that follow are the model's.
  Paper: Gupta, Gu, Berant 2022, "Diagonal State Spaces are as Effective as
    Structured State Spaces", arXiv:2203.14343, proposition 1; starting values
    and 1 / z as z* / (z z* + 1e-7) in the softmax as in the authors' code.
  """

  d_model: int
  d_state: int = 64
  length: int | None = None
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
    if self.length is not None:
      arguments.check_positive(self, "length")
    if not 0 < self.dt_min <= self.dt_max:
      raise ValueError(
        "DSS: needs 0 < dt_min <= dt_max, got "
        f"dt_min={self.dt_min!r}, dt_max={self.dt_max!r}"
      )

  @property
  def max_length(self) -> int | None:
    """L of DSS-softmax; None for DSS-exp."""
    return self.length

  def init(self, key) -> dict[str, Any]:
    d, n = self.d_model, self.d_state
    keys = jax.random.split(key, 4)
    dt = initializers.log_uniform(keys[0], (d,), self.dt_min, self.dt_max)
    re = jnp.full((n,), 0.5)
    start = {"log_re": jnp.log(re)} if self.length is None else {"re": -re}
    return start | {
      "log_dt": jnp.log(dt),
      "im": jnp.asarray(-hippo.legs_dplr(2 * n)[0].imag, jnp.float32),
      "w_re": jax.random.normal(keys[1], (d, n)),
      "w_im": jax.random.normal(keys[2], (d, n)),
      "d": jax.random.normal(keys[3], (d,)),
    }

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.d_model, self.d_state), jnp.complex64))

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
    """Ā, B̄ and w, complex64 [D, N]."""
    p = {k: x.astype(jnp.float32) for k, x in params.items()}
    w = jax.lax.complex(p["w_re"], p["w_im"])
    dt = jnp.exp(p["log_dt"])[:, None].astype(w.dtype)
    if self.length is None:
      rate = jax.lax.complex(-jnp.exp(p["log_re"]), p["im"])
      return *hippo.zoh_diagonal(rate, dt), w
    rate, last = jax.lax.complex(p["re"], p["im"]), self.length - 1
    # Of a growing exponential the largest term, the last one, is taken out.
    grows, z = p["re"] > 0, dt * rate
    inward = jnp.where(grows, -z, z)
    total = rate * jnp.expm1(self.length * inward)
    write = jnp.expm1(inward) * total.conj() / (total * total.conj() + _EPS)
    return jnp.exp(z), write * jnp.exp(jnp.where(grows, -last * z, 0)), w
