"""Simple recurrent network."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.kernels.cell_scan import cell_scan, product
from memzoo.ops import arguments


class State(NamedTuple):
  h: jax.Array  # [D] float32, the context units


class Activation(NamedTuple):
  """f(a) = middle + scale · tanh(scale · a)."""

  middle: float
  scale: float


_ACTIVATIONS = dict(logistic=Activation(0.5, 0.5), tanh=Activation(0.0, 1.0))


@register(
  "elman",
  family="rnn",
  year=1990,
  paper="Elman 1990, doi:10.1207/s15516709cog1402_1",
  write="replace",
  evidence="silver",
  tiny=dict(d_model=6),
)
@dataclasses.dataclass(frozen=True)
class Elman(cell.Cell):
  """Simple recurrent network: the hidden units see their copy of before.

    h_t = f(W x_t + U h_{t−1} + b) ,  y_t = h_t

  The copy h_{t−1} are the paper's context units; f is the logistic function,
  or tanh.

  State: h [D] float32, starts in the middle of f's range, at 0.5 for the
    logistic function, as in the paper, and at zero for tanh.
  Params: w [D, D], u [D, D], b [D].
  Forms: step O(D²) a token; scan hoists W x, the same order of work; pallas
    keeps U on chip, in x's dtype.
  Differs: the output units are the next layer's. Gradients are exact in time;
    the paper's stop at the context units. tanh is what later libraries have.
  Paper: Elman 1990, "Finding Structure in Time", Cognitive Science 14(2),
    figure 2 and the text around it (which gives no numbered equations),
    doi:10.1207/s15516709cog1402_1.
  """

  d_model: int
  activation: str = "logistic"

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model")
    if self.activation not in _ACTIVATIONS:
      raise ValueError(
        f"Elman: activation must be one of {sorted(_ACTIVATIONS)}, got "
        f"{self.activation!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d = self.d_model
    key_w, key_u = jax.random.split(key)
    return {
      "w": initializers.glorot_uniform(key_w, (d, d)),
      "u": initializers.orthogonal(key_u, (d, d)),
      "b": jnp.zeros((d,)),
    }

  def initial_state(self, params, key=None) -> State:
    middle = _ACTIVATIONS[self.activation].middle
    return State(jnp.full((self.d_model,), middle, jnp.float32))

  def step(self, params, state, x):
    state = self._recur(params, state, _project(params, x))
    return state, state.h.astype(x.dtype)

  def parallel(self, params, state, xs, reset, mask, implementation):
    drive = _project(params, xs)
    if implementation == "pallas":
      return self._fused(params, state, drive, reset, mask, xs.dtype)

    def step(state, inputs):
      state = self._recur(params, state, inputs.drive)
      return state, state.h

    state, hs = arguments.scan_steps(
      step, state, Inputs(drive, reset, mask), self.initial_state(params)
    )
    return state, hs.astype(xs.dtype)

  def _recur(self, params, state, drive):
    f = _ACTIVATIONS[self.activation]
    a = drive + state.h @ params["u"].astype(jnp.float32)
    return State(f.middle + f.scale * jnp.tanh(f.scale * a))

  def _fused(self, params, state, drive, reset, mask, dtype):
    """The kernel holds h less the middle of f's range: zero where nothing
    stands, and after a reset."""
    f, u = _ACTIVATIONS[self.activation], params["u"].astype(dtype)
    rest = f.middle * jnp.sum(u.astype(jnp.float32), axis=0)
    state, ys = cell_scan(
      Centred(f.scale), State(state.h - f.middle), drive + rest, u,
      reset=reset, mask=mask, inert=True,
    )  # fmt: skip
    return State(state.h + f.middle), (ys + f.middle).astype(dtype)


class Inputs(NamedTuple):
  drive: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


class Centred(NamedTuple):
  """The kernel's step, by h less the middle of f's range."""

  scale: float

  def __call__(self, state, drive, u):
    a = drive + product(state.h.astype(u.dtype), u)
    h = self.scale * jnp.tanh(self.scale * a)
    return State(h), h


def _project(params, x):
  drive = dot(x, params["w"]).astype(jnp.float32)
  return drive + params["b"].astype(jnp.float32)
