"""Long expressive memory."""

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
  z: jax.Array  # [D] float32


@register(
  "long_expressive_memory",
  family="rnn",
  year=2021,
  paper="Rusch et al. 2021, arXiv:2110.04744",
  write="leaky mix at two learned time scales",
  evidence="silver",
  tiny=dict(d_model=6, dt=0.7),
)
@dataclasses.dataclass(frozen=True)
class LongExpressiveMemory(cell.Cell):
  """Long expressive memory (LEM): two leaky states with gated time steps.

    Δt_n  = Δt σ̂(W_1 y_{n−1} + V_1 u_n + b_1)
    Δt̄_n  = Δt σ̂(W_2 y_{n−1} + V_2 u_n + b_2)
    z_n   = (1 − Δt_n) ⊙ z_{n−1} + Δt_n ⊙ σ(W_z y_{n−1} + V_z u_n + b_z)
    y_n   = (1 − Δt̄_n) ⊙ y_{n−1} + Δt̄_n ⊙ σ(W_y z_n + V_y u_n + b_y)    (3)

  u is the input, y the state that is shown, σ = tanh and σ̂ the logistic
  function. Both gates and z's candidate see the old y; y's candidate sees the
  new z. A unit forgets by 1 − Δt_n a step, with Δt_n anywhere in (0, Δt).

  State: y [D] and z [D] float32, both start at zero.
  Params: v [D, 4D] (V_1, V_2, V_z, V_y), w [D, 3D] (W_1, W_2, W_z), w_y [D, D],
    b [4D]; all uniform in ±1/√D, as in the authors' code.
  Forms: step O(D²) a token; scan hoists V u, the same order of work; pallas
    keeps the four W on chip, in x's dtype.
  Differs: nothing. Δt, which the paper tunes per task (0.0002 to 1), is an
    option.
  Paper: Rusch, Mishra, Erichson, Mahoney 2021 (ICLR 2022), "Long Expressive
    Memory for Sequence Modeling", arXiv:2110.04744, eq. 3; which state enters
    which gate, and the start, as in the authors' code (tk-rusch/LEM).
  """

  d_model: int
  dt: float = 1.0

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model")
    if not 0 < self.dt <= 1:
      raise ValueError(
        f"LongExpressiveMemory: dt must be in (0, 1], got {self.dt!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, keys = self.d_model, jax.random.split(key, 4)
    draw = lambda key, *shape: initializers.uniform(key, shape, d**-0.5)
    return {
      "v": draw(keys[0], d, 4 * d),
      "w": draw(keys[1], d, 3 * d),
      "w_y": draw(keys[2], d, d),
      "b": draw(keys[3], 4 * d),
    }

  def initial_state(self, params, key=None) -> State:
    zeros = jnp.zeros((self.d_model,), jnp.float32)
    return State(zeros, zeros)

  def step(self, params, state, x):
    step, weights = Step(self.dt), cast(_weights(params))
    state, y = step(state, _project(params, x), weights)
    return state, y.astype(x.dtype)

  def parallel(self, params, state, xs, reset, mask, implementation):
    state, ys = step_loop(
      Step(self.dt), state, _project(params, xs), _weights(params),
      dtype=xs.dtype, reset=reset, mask=mask, implementation=implementation,
    )  # fmt: skip
    return state, ys.astype(xs.dtype)


class Gates(NamedTuple):
  """One array for each of the four affine maps of eq. 3."""

  dt_z: jax.Array
  dt_y: jax.Array
  z: jax.Array
  y: jax.Array


class Step(NamedTuple):
  """Eq. 3, after V u_n + b."""

  dt: float

  def __call__(self, state, drive: Gates, w: Gates):
    old = state.y.astype(w.y.dtype)
    dt_z = self.dt * jax.nn.sigmoid(drive.dt_z + product(old, w.dt_z))
    dt_y = self.dt * jax.nn.sigmoid(drive.dt_y + product(old, w.dt_y))
    new_z = jnp.tanh(drive.z + product(old, w.z))
    z = (1 - dt_z) * state.z + dt_z * new_z
    new_y = jnp.tanh(drive.y + product(z, w.y))
    y = (1 - dt_y) * state.y + dt_y * new_y
    return State(y, z), y


def _project(params, u) -> Gates:
  drive = dot(u, params["v"]).astype(jnp.float32)
  drive = drive + params["b"].astype(jnp.float32)
  return Gates(*jnp.split(drive, 4, axis=-1))


def _weights(params) -> Gates:
  return Gates(*jnp.split(params["w"], 3, axis=1), params["w_y"])
