"""LSSL: linear state-space layer."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, hippo
from memzoo.ops.state_space import state_space, step as space_step


class State(NamedTuple):
  h: jax.Array  # [D, N] float32


@register(
  "lssl",
  family="ssm",
  year=2021,
  paper="Gu et al. 2021, arXiv:2110.13985",
  write="continuous-time projection",
  evidence="silver",
  tiny=dict(d_model=5, d_state=4, outputs=2, dt_min=0.02, dt_max=0.3),
)
@dataclasses.dataclass(frozen=True)
class LSSL(cell.Cell):
  """Linear state-space layer: every channel projects its past on a basis.

    x'(t) = A x(t) + B u(t) ,  y(t) = C x(t) + D u(t)
    x_t = Ā x_{t−1} + B̄ u_t ,  y_t = C x_t + D u_t
    Ā = (I − αΔA)⁻¹ (I + (1 − α)ΔA) ,  B̄ = (I − αΔA)⁻¹ ΔB
    y = K ∗ u + D u ,  K_i = C Āⁱ B̄
    A = −P (T⁻¹ + S) Q ,  B = P b ,  P, Q, S diagonal, T tridiagonal
    o_t = W gelu(y_t) + c

  One A, learned within the structure of the HiPPO matrices, for all channels,
  and a learned step Δ for each. At the start A and B are those of HiPPO-LegS:
  P = Q = √(2n + 1), S = −n / (2n + 1), T = I less its first subdiagonal, b = 1.

  State: h [D, N] float32, from zero; it is x.
  Params: log_dt [D], p, q, s, b, diagonal [N], lower, upper [N − 1] (T's), c
    [D, N, M], d [D, M] (M outputs a channel), out [D M, D], out_bias [D]. Δ is
    log-uniform in [dt_min, dt_max], C and D normal with variance 1.
  Forms: step O(D N³) for Ā and O(D N²) for a token; scan makes Ā once, in
    checkpointed blocks of tokens; chunk by powers of Ā, in T / 16 serial steps
    of matmuls; fft the convolutional view, with K in two levels of √T powers:
    no reset, and about 1e-7 of a later input reaches an output.
  Differs: A's products are dense, where the paper shows how its structure makes
    them fast. The name S is D in the paper, which has a skip D too.
  Paper: Gu, Johnson, Goel, Saab, Dao, Rudra, Ré 2021, "Combining Recurrent,
    Convolutional, and Continuous-time Models with Linear State-Space Layers",
    arXiv:2110.13985, sections 2 and 3 (discretisation, both views), 4 and
    appendix (structure of A); W and GELU as in the authors' code.
  """

  d_model: int
  d_state: int = 32
  outputs: int = 1
  alpha: float = 0.5
  dt_min: float = 1e-3
  dt_max: float = 0.1

  op: ClassVar[str] = "state_space"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "fft")
  convolutions: ClassVar[tuple[str, ...]] = ("fft",)

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "d_state", "outputs")
    if not 0 <= self.alpha <= 1:
      raise ValueError(f"LSSL: alpha must be in [0, 1], got {self.alpha!r}")
    if not 0 < self.dt_min <= self.dt_max:
      raise ValueError(
        "LSSL: needs 0 < dt_min <= dt_max, got "
        f"dt_min={self.dt_min!r}, dt_max={self.dt_max!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, n, m = self.d_model, self.d_state, self.outputs
    keys = jax.random.split(key, 4)
    dt = initializers.log_uniform(keys[0], (d,), self.dt_min, self.dt_max)
    i = np.arange(n)
    scale = jnp.asarray(np.sqrt(2 * i + 1), jnp.float32)
    return {
      "log_dt": jnp.log(dt),
      "p": scale,
      "q": scale,
      "s": jnp.asarray(-i / (2 * i + 1), jnp.float32),
      "b": jnp.ones((n,)),
      "diagonal": jnp.ones((n,)),
      "lower": -jnp.ones((n - 1,)),
      "upper": jnp.zeros((n - 1,)),
      "c": jax.random.normal(keys[1], (d, n, m)),
      "d": jax.random.normal(keys[2], (d, m)),
      "out": initializers.lecun_normal(keys[3], (d * m, d)),
      "out_bias": jnp.zeros((d,)),
    }

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.d_model, self.d_state)))

  def step(self, params, state, x):
    h, y = space_step(state.h, x, *self._space(params))
    return State(h), self._read_out(params, y, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    transition, write, read = self._space(params)
    h, y = state_space(
      state.h, xs, transition=transition, write=write, read=read, reset=reset,
      mask=mask, implementation=implementation,
    )  # fmt: skip
    return State(h), self._read_out(params, y, xs)

  def _space(self, params):
    """Ā [D, N, N], B̄ [D, N] and C [D, N, M], float32."""
    p = {k: x.astype(jnp.float32) for k, x in params.items()}
    t = jnp.diag(p["diagonal"])
    if self.d_state > 1:
      t += jnp.diag(p["lower"], -1) + jnp.diag(p["upper"], 1)
    a = jnp.linalg.inv(t) + jnp.diag(p["s"])
    a, b = -p["p"][:, None] * a * p["q"], p["p"] * p["b"]
    discretize = lambda dt: hippo.generalised_bilinear(a, b, dt, self.alpha)
    return *jax.vmap(discretize)(jnp.exp(p["log_dt"])), p["c"]

  def _read_out(self, params, y, x):
    y = jax.nn.gelu(y + params["d"].astype(x.dtype) * x[..., None])
    y = y.reshape(y.shape[:-2] + (-1,))
    return dot(y, params["out"]) + params["out_bias"].astype(x.dtype)
