"""S5: one diagonal state space for all channels."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core import cell, initializers
from memzoo.core.linear import dot_complex, dot_real
from memzoo.core.registry import register
from memzoo.ops import arguments, hippo
from memzoo.ops.linear_recurrence import linear_recurrence

_MOST_REAL = -1e-4  # of clipped eigenvalues, as in the authors' code


class State(NamedTuple):
  h: jax.Array  # [N / 2] complex64


@register(
  "s5",
  family="ssm",
  year=2022,
  paper="Smith et al. 2022, arXiv:2208.04933",
  write="decay and add",
  evidence="silver",
  parity="lindermanlab/S5 3c18fdb, S5SSM",
  tiny=dict(d_model=5, d_state=12, blocks=2, dt_min=0.02, dt_max=0.5),
)
@dataclasses.dataclass(frozen=True)
class S5(cell.Cell):
  """S5: a multi-input, multi-output state space with a diagonal transition.

    x'(t) = Λ x(t) + B̃ u(t) ,  y(t) = C̃ x(t) + D u(t)
    x_k = Λ̄ x_{k−1} + B̄ u_k
    y_k = 2 Re(C̃ x_k) + D ⊙ u_k
    zoh:       Λ̄ = exp(ΛΔ) ,  B̄ = Λ⁻¹ (Λ̄ − I) B̃
    bilinear:  Λ̄ = (I − ΛΔ/2)⁻¹ (I + ΛΔ/2) ,  B̄ = (I − ΛΔ/2)⁻¹ Δ B̃

  Δ is one step for each state, the N states are N / 2 conjugate pairs of which
  one each is kept. At the start Λ is that of HiPPO-N, the normal part of
  HiPPO-LegS = V Λ V* − P Pᵀ, once for each of J blocks of N / J states;
  B̃ = V* B and C̃ = C V, of random B and C.

  State: h [N/2] complex64, from zero; it is x.
  Params: log_dt, re, im [N/2], b_re, b_im [D, N/2], c_re, c_im [N/2, D], d [D].
    Δ is log-uniform in [dt_min, dt_max].
  Forms: step O(DN) a token; scan hoists B̄ u and C̃ x out of the loop, whose
    steps are O(N); assoc (the paper's) the same in O(log T) parallel passes,
    chunk in passes over 16 tokens and T / 16 serial steps; pallas the steps of
    scan in one kernel.
  Differs: causal only: the bidirectional layer of the paper sees later inputs
    and is no memory of a stream; it is `memzoo.models.bidirectional`. B is
    real and C complex, of variance 1 / D and 1 / N, as in the authors' code.
    `clip_eigs` keeps Re Λ below −1e-4, their option for streams without end.
    The activation and norm around the state space are the model's.
  Paper: Smith, Warrington, Linderman 2022, "Simplified State Space Layers for
    Sequence Modeling", arXiv:2208.04933, sections 3 (layer, parallel
    scan) and 4 (initialization), appendix B (symmetry, blocks, timescales).
  """

  d_model: int
  d_state: int = 64
  blocks: int = 1
  discretization: str = "zoh"
  clip_eigs: bool = False
  dt_min: float = 1e-3
  dt_max: float = 0.1

  op: ClassVar[str] = "linear_recurrence"
  implementations: ClassVar[tuple[str, ...]] = (
    "scan",
    "assoc",
    "chunk",
    "pallas",
  )

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "d_state", "blocks")
    if self.d_state % (2 * self.blocks):
      raise ValueError(
        "S5: every block needs an even number of states, got "
        f"d_state={self.d_state}, blocks={self.blocks}"
      )
    if self.discretization not in hippo.DIAGONAL:
      raise ValueError(
        f"S5: discretization must be one of {tuple(hippo.DIAGONAL)}, got "
        f"{self.discretization!r}"
      )
    if not 0 < self.dt_min <= self.dt_max:
      raise ValueError(
        "S5: needs 0 < dt_min <= dt_max, got "
        f"dt_min={self.dt_min!r}, dt_max={self.dt_max!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, n = self.d_model, self.d_state
    keys = jax.random.split(key, 5)
    eigenvalues, _, _, v = hippo.legs_dplr(n // self.blocks)
    eigenvalues = np.tile(eigenvalues, self.blocks)
    v = jnp.asarray(np.kron(np.eye(self.blocks), v), jnp.complex64)
    b = initializers.lecun_normal(keys[0], (d, n)).astype(v.dtype) @ v.conj()
    c = jax.lax.complex(
      initializers.lecun_normal(keys[1], (d, n), n),
      initializers.lecun_normal(keys[2], (d, n), n),
    )
    c = (c @ v).T
    dt = initializers.log_uniform(keys[3], (n // 2,), self.dt_min, self.dt_max)
    return {
      "log_dt": jnp.log(dt),
      "re": jnp.asarray(eigenvalues.real, jnp.float32),
      "im": jnp.asarray(eigenvalues.imag, jnp.float32),
      "b_re": b.real,
      "b_im": b.imag,
      "c_re": c.real,
      "c_im": c.imag,
      "d": jax.random.normal(keys[4], (d,)),
    }

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.d_state // 2,), jnp.complex64))

  def step(self, params, state, x):
    decay, factor = self.discretize(params)
    h = decay * state.h + factor * drive(params, x)
    return State(h), read_out(params, h, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    decay, factor = self.discretize(params)
    h, hs = linear_recurrence(
      state.h,
      factor * drive(params, xs),
      decay=decay,
      reset=reset,
      mask=mask,
      implementation=implementation,
    )
    return State(h), read_out(params, hs, xs)

  def discretize(self, params):
    """Λ̄ and the factor of B̃ in B̄, complex64 [N/2]."""
    real = lambda name: params[name].astype(jnp.float32)
    re = real("re")
    if self.clip_eigs:
      re = jnp.minimum(re, _MOST_REAL)
    discretize = hippo.DIAGONAL[self.discretization]
    return discretize(jax.lax.complex(re, real("im")), jnp.exp(real("log_dt")))


def drive(params, x):
  """B̃ u: [..., D] -> complex64 [..., N/2]."""
  return dot_complex(x, params["b_re"], params["b_im"])


def read_out(params, h, x):
  """2 Re(C̃ x) + D ⊙ u: complex64 [..., N/2], as C̃ has rows -> [..., D]."""
  y = 2 * dot_real(h, params["c_re"], params["c_im"], x.dtype)
  return y + params["d"].astype(x.dtype) * x
