"""Independently recurrent neural network."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments
from memzoo.ops.step_loop import step_loop


class State(NamedTuple):
  h: jax.Array  # [D] float32


@register(
  "ind_rnn",
  family="rnn",
  year=2018,
  paper="Li et al. 2018, arXiv:1803.04831",
  write="decay and add, rectified",
  evidence="silver",
  tiny=dict(d_model=6, span=9),
)
@dataclasses.dataclass(frozen=True)
class IndRNN(cell.Cell):
  """Independently recurrent neural network: a neuron sees its own past alone.

    h_t = σ(W x_t + u ⊙ h_{t−1} + b) ,  y_t = h_t                   (2)

  A neuron's gradient over T steps is the product of T factors u_n σ' (eq. 4).
  With `span` T, σ the rectifier and |u_n| <= γ^{1/T} it grows at most γ-fold
  over the span; and a neuron with u_n >= ε^{1/T} keeps at least the part ε of
  what it held (section 3.2). u starts uniform in [ε^{1/T}, γ^{1/T}], from zero
  where ε is zero.

  The bound is held where u is used, and gradients pass it as if it were not
  there, so that a weight that was pushed out can come back.

  State: h [D] float32, starts at zero.
  Params: w [D, D], u [D], b [D].
  Forms: step O(D²) a token; scan hoists W x out of the loop, whose steps are
    O(D); pallas the same loop in one kernel.
  Differs: the authors' code cuts u itself to the bound, after each step of
    the optimiser. Batch normalisation and depth are the model's. γ = 2 is the
    paper's choice; ε = 0 serves all its layers but the last.
  Paper: Li, Li, Cook, Zhu, Gao 2018, "Independently Recurrent Neural Network
    (IndRNN): Building A Longer and Deeper RNN", arXiv:1803.04831, eq. 2 and 4
    and section 3.2 (equation numbers not checked); the start of u as in the
    authors' code (Sunnydreamrain/IndRNN_pytorch).
  """

  d_model: int
  span: int = 1024
  gamma: float = 2.0
  epsilon: float = 0.0
  activation: str = "relu"

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "span")
    if not 0 <= self.epsilon <= self.gamma or not self.gamma > 0:
      raise ValueError(
        "IndRNN: needs 0 <= epsilon <= gamma and gamma above 0, got "
        f"epsilon={self.epsilon!r}, gamma={self.gamma!r}"
      )
    if self.activation not in _ACTIVATIONS:
      raise ValueError(
        f"IndRNN: activation must be one of {sorted(_ACTIVATIONS)}, got "
        f"{self.activation!r}"
      )

  @property
  def limit(self) -> float:
    """γ^{1/T}, the largest |u|."""
    return self.gamma ** (1 / self.span)

  def init(self, key) -> dict[str, Any]:
    d = self.d_model
    key_w, key_u = jax.random.split(key)
    low = self.epsilon ** (1 / self.span)
    return {
      "w": initializers.lecun_normal(key_w, (d, d)),
      "u": jax.random.uniform(key_u, (d,), minval=low, maxval=self.limit),
      "b": jnp.zeros((d,)),
    }

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.d_model,), jnp.float32))

  def step(self, params, state, x):
    recur = _ACTIVATIONS[self.activation]
    state, h = recur(state, _project(params, x), self._weight(params))
    return state, h.astype(x.dtype)

  def parallel(self, params, state, xs, reset, mask, implementation):
    state, hs = step_loop(
      _ACTIVATIONS[self.activation], state, _project(params, xs),
      self._weight(params), dtype=xs.dtype, reset=reset, mask=mask,
      implementation=implementation,
    )  # fmt: skip
    return state, hs.astype(xs.dtype)

  def _weight(self, params):
    u = params["u"].astype(jnp.float32)
    held = jnp.clip(u, -self.limit, self.limit)
    return jax.lax.stop_gradient(held) + (u - jax.lax.stop_gradient(u))


def _project(params, x):
  drive = dot(x, params["w"]).astype(jnp.float32)
  return drive + params["b"].astype(jnp.float32)


def _relu(state, drive, u):
  h = jax.nn.relu(drive + u * state.h)
  return State(h), h


def _tanh(state, drive, u):
  h = jnp.tanh(drive + u * state.h)
  return State(h), h


_ACTIVATIONS = dict(relu=_relu, tanh=_tanh)
