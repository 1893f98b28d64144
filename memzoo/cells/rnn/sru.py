"""Simple recurrent unit."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.kernels.cell_scan import cell_scan
from memzoo.ops import arguments


class State(NamedTuple):
  c: jax.Array  # [D] float32


class Inputs(NamedTuple):
  """What a token brings, before it meets the state: float32 [..., D]."""

  new: jax.Array  # W x
  f: jax.Array  # W_f x + b_f
  r: jax.Array  # W_r x + b_r
  skip: jax.Array  # α x
  reset: jax.Array | None = None
  mask: jax.Array | None = None


@register(
  "sru",
  family="rnn",
  year=2018,
  paper="Lei et al. 2018, arXiv:1709.02755",
  write="gated mix",
  evidence="silver",
  tiny=dict(d_model=5, highway_bias=-0.5),
)
@dataclasses.dataclass(frozen=True)
class SRU(cell.Cell):
  """Simple recurrent unit: gates that see of the state their own entry alone.

    f_t = σ(W_f x_t + v_f ⊙ c_{t−1} + b_f)
    c_t = f_t ⊙ c_{t−1} + (1 − f_t) ⊙ (W x_t)
    r_t = σ(W_r x_t + v_r ⊙ c_{t−1} + b_r)
    h_t = r_t ⊙ c_t + (1 − r_t) ⊙ α x_t ,  y_t = h_t

  Light recurrence (f, c) and highway (r, h). α = sqrt(1 + 2 exp(b)), where b is
  `highway_bias`, at which b_r starts: with it h has the variance of x at first.

  State: c [D] float32, starts at zero.
  Params: w [D, 3D] (W, W_f, W_r), v [2D] (v_f, v_r), b [2D]. W, v start
    uniform: W with variance 1 / D, W_f and W_r with half of that, v with 1 / 2,
    so that x and c of variance 1 add up to 1 before a gate.
  Forms: step O(D²) a token; scan hoists the products, its steps are O(D);
    pallas the steps of scan in one kernel. The gates are not linear in c:
    there is no parallel form over time.
  Differs: nothing in the layer. Where input and state have one width, as here,
    the highway needs no map of its own.
  Paper: Lei, Zhang, Wang, Dai, Artzi 2018, "Simple Recurrent Units for Highly
    Parallelizable Recurrence", arXiv:1709.02755v5, section 3 and its part on
    initialization; the gates' starts as in the authors' code
    (asappresearch/sru).
  """

  d_model: int
  highway_bias: float = 0.0

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model")

  def init(self, key) -> dict[str, Any]:
    d, half = self.d_model, 0.5**0.5
    key_w, key_v = jax.random.split(key)
    w = initializers.uniform(key_w, (d, 3 * d), (3 / d) ** 0.5)
    highway = jnp.full((d,), self.highway_bias, jnp.float32)
    return {
      "w": w.at[:, d:].multiply(half),
      "v": initializers.uniform(key_v, (2 * d,), half * 3**0.5),
      "b": jnp.concatenate([jnp.zeros((d,)), highway]),
    }

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.d_model,), jnp.float32))

  def step(self, params, state, x):
    state, h = _step(state, self._project(params, x), _v(params))
    return state, h.astype(x.dtype)

  def parallel(self, params, state, xs, reset, mask, implementation):
    inputs, v = self._project(params, xs), _v(params)
    if implementation == "pallas":
      state, hs = cell_scan(
        _step, state, inputs, v, reset=reset, mask=mask, inert=True
      )
    else:
      inputs = inputs._replace(reset=reset, mask=mask)
      step = lambda state, x: _step(state, x, v)
      state, hs = arguments.scan_steps(step, state, inputs, None)
    return state, hs.astype(xs.dtype)

  def _project(self, params, x) -> Inputs:
    wx = dot(x, params["w"]).astype(jnp.float32)
    new, f, r = jnp.split(wx, 3, axis=-1)
    b_f, b_r = jnp.split(params["b"].astype(jnp.float32), 2)
    alpha = math.sqrt(1 + 2 * math.exp(self.highway_bias))
    return Inputs(new, f + b_f, r + b_r, alpha * x.astype(jnp.float32))


def _v(params):
  return tuple(jnp.split(params["v"].astype(jnp.float32), 2))


def _step(state, x: Inputs, v):
  """The recurrence and the highway, on products of x."""
  (v_f, v_r), c = v, state.c
  f = jax.nn.sigmoid(x.f + v_f * c)
  r = jax.nn.sigmoid(x.r + v_r * c)
  c = f * c + (1 - f) * x.new
  return State(c), r * c + (1 - r) * x.skip
