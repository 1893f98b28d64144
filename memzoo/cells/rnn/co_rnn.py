"""Coupled oscillatory recurrent neural network."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.kernels.cell_scan import product
from memzoo.ops import arguments
from memzoo.ops.step_loop import cast, step_loop


class State(NamedTuple):
  y: jax.Array  # [D] float32, the output
  z: jax.Array  # [D] float32, its velocity


@register(
  "co_rnn",
  family="rnn",
  year=2020,
  paper="Rusch and Mishra 2020, arXiv:2010.00951",
  write="force on damped oscillators",
  evidence="silver",
  tiny=dict(d_model=6, dt=0.4),
)
@dataclasses.dataclass(frozen=True)
class CoRNN(cell.Cell):
  """Coupled oscillatory recurrent network: oscillators that inputs force.

    y″ = σ(W y + 𝒲 y′ + V u + b) − γ y − ε y′                        (1)

  with z = y′, by an implicit-explicit step of length Δt:

    z_n = z_{n−1} + Δt (σ(W y_{n−1} + 𝒲 z_{n−1} + V u_n + b)
                        − γ y_{n−1} − ε z_n̄)
    y_n = y_{n−1} + Δt z_n                                           (3)

  u is the input, y the state that is shown, σ = tanh, √γ the frequency of the
  oscillators alone and ε their damping. The damping is of the new velocity,
  n̄ = n, with `implicit`, and else of the old, n̄ = n − 1. With γ = ε = 1,
  Δt <= 1 and n̄ = n, |y_n|² + |z_n|² <= D n Δt for all weights and inputs.

  State: y [D] and z [D] float32, both start at zero.
  Params: v [D, D], w [D, D] (W), w_z [D, D] (𝒲), b [D], uniform in ±1/√(3D),
    as in the authors' code.
  Forms: step O(D²) a token; scan hoists V u, the same order of work; pallas
    keeps both W on chip, in x's dtype.
  Differs: nothing. The defaults of Δt, γ, ε and n̄ = n − 1 are those of the
    authors' code on permuted sequential MNIST.
  Paper: Rusch, Mishra 2020 (ICLR 2021), "Coupled Oscillatory Recurrent Neural
    Network (coRNN): An accurate and (gradient) stable architecture for
    learning long time dependencies", arXiv:2010.00951, eq. 1 to 3 and the
    energy and gradient bounds of section 3 (equation numbers not checked but
    3, which the caption of figure 4 names); the authors' code
    (tk-rusch/coRNN).
  """

  d_model: int
  dt: float = 0.076
  gamma: float = 0.4
  epsilon: float = 8.0
  implicit: bool = False

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model")
    for field in ("dt", "gamma"):
      if not getattr(self, field) > 0:
        raise ValueError(
          f"CoRNN: {field} must be above 0, got {getattr(self, field)!r}"
        )
    if not self.epsilon >= 0:
      raise ValueError(
        f"CoRNN: epsilon must be 0 or above, got {self.epsilon!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, keys = self.d_model, jax.random.split(key, 4)
    draw = lambda key, *shape: initializers.uniform(key, shape, (3 * d) ** -0.5)
    return {
      "v": draw(keys[0], d, d),
      "w": draw(keys[1], d, d),
      "w_z": draw(keys[2], d, d),
      "b": draw(keys[3], d),
    }

  def initial_state(self, params, key=None) -> State:
    zeros = jnp.zeros((self.d_model,), jnp.float32)
    return State(zeros, zeros)

  def step(self, params, state, x):
    weights = cast(_weights(params))
    state, y = self._step(state, _project(params, x), weights)
    return state, y.astype(x.dtype)

  def parallel(self, params, state, xs, reset, mask, implementation):
    state, ys = step_loop(
      self._step, state, _project(params, xs), _weights(params),
      dtype=xs.dtype, reset=reset, mask=mask, implementation=implementation,
    )  # fmt: skip
    return state, ys.astype(xs.dtype)

  @property
  def _step(self):
    return Step(self.dt, self.gamma, self.epsilon, self.implicit)


class Step(NamedTuple):
  """Eq. 3, after V u_n + b."""

  dt: float
  gamma: float
  epsilon: float
  implicit: bool

  def __call__(self, state, drive, weights):
    w, w_z = weights
    a = drive + product(state.y, w) + product(state.z, w_z)
    force = jnp.tanh(a) - self.gamma * state.y
    if self.implicit:
      z = (state.z + self.dt * force) / (1 + self.dt * self.epsilon)
    else:
      z = state.z + self.dt * (force - self.epsilon * state.z)
    y = state.y + self.dt * z
    return State(y, z), y


def _project(params, u):
  drive = dot(u, params["v"]).astype(jnp.float32)
  return drive + params["b"].astype(jnp.float32)


def _weights(params):
  return params["w"], params["w_z"]
