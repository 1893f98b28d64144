"""State memory replay."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.cells.ssm.s5 import S5
from memzoo.core import cell, initializers
from memzoo.core.registry import register
from memzoo.ops import arguments
from memzoo.ops.conv import conv, empty, step as conv_step

_GATES = {"sigmoid": jax.nn.sigmoid, "none": lambda x: x}


class State(NamedTuple):
  inputs: jax.Array  # [W − 1, D] float32, the last ones
  ssm: Any  # of the state space


@register(
  "state_memory_replay",
  family="ssm",
  year=2024,
  paper="Qi et al. 2024, arXiv:2405.17534",
  write="decay and add gated inputs",
  evidence="bronze",
  tiny=dict(
    d_model=5,
    memory_size=3,
    ssm=S5(5, d_state=12, blocks=2, dt_min=0.02, dt_max=0.5),
  ),
)
@dataclasses.dataclass(frozen=True)
class StateMemoryReplay(cell.Cell):
  """SMR: a state space whose inputs are scaled by those just before them.

    g_t = σ(Σ_{i < W} M_i ⊙ u_{t−i} + b)
    u'_t = u_t ⊙ g_t
    x_t = A x_{t−1} + B u'_t ,  y_t = C x_t + D u'_t

  M are W = memory_size learned memories. The convolution stands before the
  state space, whichever that is (`ssm`, S5 unless given), so that a convolution
  in time it stays. A linear state space adds inputs up; with the product it can
  tell how neighbours went together.

  State: inputs [W − 1, D] float32, from zero; ssm, that of the state space.
  Params: memory [W, D], bias [D]; ssm, those of the state space.
  Forms: step O(W D) a token and the state space's; scan, assoc, chunk and
    pallas the convolution of the whole sequence, and those forms of the state
    space, where it has them.
  Differs: the text of the paper was not to be had. That SMR multiplies the
    inputs of a state space with a convolution of them is what the public
    reviews of its first version say (equation 15 there, of S4+); that the
    product is a convolutional gate, its abstracts. Open are the gate's
    function (σ here, `gate='none'` for the plain product), whether channels mix
    in it (they do not), the bias, and W. The paper's S4, S6, SPADE and Mega
    around it are the cell's `ssm` as far as this package has them.
  Paper: Qi, Gao, Zhang, Li, Liu, Wu, Zhou 2024, "SMR: State Memory Replay for
    Long Sequence Modeling", arXiv:2405.17534; first version "S4++: Elevating
    Long Sequence Modeling with State Memory Reply", ICLR 2024 submission, with
    its reviews.
  """

  d_model: int
  memory_size: int = 4
  gate: str = "sigmoid"
  ssm: cell.Cell | None = None

  op: ClassVar[str] = "linear_recurrence"
  implementations: ClassVar[tuple[str, ...]] = S5.implementations

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "memory_size")
    if self.gate not in _GATES:
      raise ValueError(
        f"StateMemoryReplay: gate must be one of {tuple(_GATES)}, got "
        f"{self.gate!r}"
      )
    if self.ssm is not None and self.ssm.d_model != self.d_model:
      raise ValueError(
        f"StateMemoryReplay: ssm has d_model={self.ssm.d_model}, the cell has "
        f"{self.d_model}"
      )

  @property
  def space(self) -> cell.Cell:
    """The state space."""
    return S5(self.d_model) if self.ssm is None else self.ssm

  def init(self, key) -> dict[str, Any]:
    key_m, key_s = jax.random.split(key)
    w = self.memory_size
    return {
      "memory": initializers.uniform(key_m, (w, self.d_model), w**-0.5),
      "bias": jnp.zeros((self.d_model,)),
      "ssm": self.space.init(key_s),
    }

  def initial_state(self, params, key=None) -> State:
    start = self.space.initial_state(params["ssm"], key)
    return State(empty(params["memory"]), start)

  def step(self, params, state, x):
    inputs, g = conv_step(state.inputs, x, params["memory"], params["bias"])
    ssm, y = self.space.step(params["ssm"], state.ssm, self._scale(x, g))
    return State(inputs, ssm), y

  def parallel(self, params, state, xs, reset, mask, implementation):
    space = self.space
    if implementation not in space.implementations:
      raise NotImplementedError(
        f"{type(space).__name__} has no form {implementation!r}"
      )
    inputs, g = conv(
      state.inputs, xs, params["memory"], params["bias"], reset=reset, mask=mask
    )
    ssm, ys = space.parallel(
      params["ssm"], state.ssm, self._scale(xs, g), reset, mask, implementation
    )
    return State(inputs, ssm), ys

  def _scale(self, x, g):
    return x * _GATES[self.gate](g)
