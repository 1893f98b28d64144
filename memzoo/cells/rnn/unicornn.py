"""Undamped independent controlled oscillatory recurrent neural network."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments
from memzoo.ops.step_loop import cast, step_loop


class State(NamedTuple):
  y: jax.Array  # [D] float32, the output
  z: jax.Array  # [D] float32, its velocity


@register(
  "unicornn",
  family="rnn",
  year=2021,
  paper="Rusch and Mishra 2021, arXiv:2103.05487",
  write="force on oscillators of their own clocks",
  evidence="silver",
  tiny=dict(d_model=6, dt=0.4, alpha=2.0),
)
@dataclasses.dataclass(frozen=True)
class UnICORNN(cell.Cell):
  """UnICORNN: oscillators without damping, each for itself, on its own clock.

    z_n = z_{n−1} − Δt σ̂(c) ⊙ (σ(w ⊙ y_{n−1} + V u_n + b) + α y_{n−1})
    y_n = y_{n−1} + Δt σ̂(c) ⊙ z_n

  a symplectic step of a Hamiltonian system: u is the input, y the state that is
  shown, σ = tanh, σ̂ the logistic function, Δt σ̂(c) a neuron's own step and √α
  the frequency of the oscillators alone. A step keeps volume (the determinant
  of its Jacobian is one) and can be taken back, so that no state is lost.

  State: y [D] and z [D] float32, both start at zero.
  Params: v [D, D] uniform in ±√(6 / 65D), w [D] uniform in [0, 1], c [D]
    uniform in ±0.1, b [D] from zero, as in the authors' code.
  Forms: step O(D²) a token; scan hoists V u out of the loop, whose steps are
    O(D); pallas the same loop in one kernel.
  Differs: nothing in the layer; the paper stacks layers, and its backward pass
    makes the states again from the last one. The defaults of Δt and α are
    those of its code on permuted sequential MNIST.
  Paper: Rusch, Mishra 2021, "UnICORNN: A recurrent model for learning very
    long time dependencies", arXiv:2103.05487, section 2 (the discretised
    layer); the authors' code (tk-rusch/unicornn).
  """

  d_model: int
  dt: float = 0.19
  alpha: float = 30.65

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model")
    if not self.dt > 0:
      raise ValueError(f"UnICORNN: dt must be above 0, got {self.dt!r}")
    if not self.alpha >= 0:
      raise ValueError(
        f"UnICORNN: alpha must be 0 or above, got {self.alpha!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d = self.d_model
    key_v, key_w, key_c = jax.random.split(key, 3)
    return {
      "v": initializers.uniform(key_v, (d, d), (6 / (65 * d)) ** 0.5),
      "w": jax.random.uniform(key_w, (d,)),
      "c": initializers.uniform(key_c, (d,), 0.1),
      "b": jnp.zeros((d,)),
    }

  def initial_state(self, params, key=None) -> State:
    zeros = jnp.zeros((self.d_model,), jnp.float32)
    return State(zeros, zeros)

  def step(self, params, state, x):
    constants = cast(self._constants(params))
    state, y = Step(self.alpha)(state, _project(params, x), constants)
    return state, y.astype(x.dtype)

  def parallel(self, params, state, xs, reset, mask, implementation):
    state, ys = step_loop(
      Step(self.alpha), state, _project(params, xs), self._constants(params),
      dtype=xs.dtype, reset=reset, mask=mask, implementation=implementation,
    )  # fmt: skip
    return state, ys.astype(xs.dtype)

  def _constants(self, params):
    """w, and every neuron's step Δt σ̂(c)."""
    dt = self.dt * jax.nn.sigmoid(params["c"].astype(jnp.float32))
    return params["w"], dt


class Step(NamedTuple):
  """The layer's step, after V u_n + b."""

  alpha: float

  def __call__(self, state, drive, constants):
    w, dt = constants
    z = state.z - dt * (jnp.tanh(w * state.y + drive) + self.alpha * state.y)
    y = state.y + dt * z
    return State(y, z), y


def _project(params, u):
  drive = dot(u, params["v"]).astype(jnp.float32)
  return drive + params["b"].astype(jnp.float32)
