"""Legendre memory unit."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.kernels.cell_scan import cell_scan, product
from memzoo.ops import arguments, hippo


class State(NamedTuple):
  h: jax.Array  # [D] float32
  m: jax.Array  # [N] float32


class Inputs(NamedTuple):
  """What a token brings: W_x x and e_x x."""

  h: jax.Array  # [..., D] float32
  u: jax.Array  # [..., 1] float32


@register(
  "lmu",
  family="ssm",
  year=2019,
  paper="Voelker et al. 2019, NeurIPS 32",
  write="Legendre coefficients of a window",
  evidence="silver",
  tiny=dict(d_model=5, order=7, theta=9.0),
)
@dataclasses.dataclass(frozen=True)
class LMU(cell.Cell):
  """Legendre memory unit: a window of one signal, and a network that reads it.

    θ ṁ(t) = A m(t) + B u(t)                                            (1)
    A_ij = (2i + 1) (−1 (i < j), (−1)^{i−j+1} (i >= j)) ,
    B_i = (2i + 1) (−1)^i ,  i, j = 0 … N − 1                           (2)
    u(t − θ') ≈ Σ_i P̃_i(θ'/θ) m_i(t) ,  0 <= θ' <= θ                   (3)
    m_t = Ā m_{t−1} + B̄ u_t                                            (4)
    h_t = tanh(W_x x_t + W_h h_{t−1} + W_m m_t)                         (6)
    u_t = e_x x_t + e_h h_{t−1} + e_m m_{t−1}                           (7)
    y_t = h_t

  Ā and B̄ are the zero-order hold of (1) for one token; P̃_i are the shifted
  Legendre polynomials.

  State: h [D], m [N] float32, from zero.
  Params: e_x [D, 1], e_h [D, 1], e_m [N, 1], w_x [D, D], w_h [D, D],
    w_m [N, D]. A and B are fixed, as is θ, in tokens.
  Forms: step O((D + N)²) a token; scan hoists W_x x and e_x x; pallas keeps the
    weights on chip. u sees h, so that no form is parallel over tokens: that is
    `parallel_lmu`.
  Differs: h has the width of the input.
  Paper: Voelker, Kajić, Eliasmith 2019, "Legendre Memory Units: Continuous-Time
    Representation in Recurrent Neural Networks", NeurIPS 2019,
    eq. 1 to 7 (equation numbers not checked), with its ZOH and starting
    values; A and B are of Voelker and Eliasmith 2018,
    doi:10.1162/neco_a_01046.
  """

  d_model: int
  order: int = 32
  theta: float = 64.0

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "order")
    if not self.theta > 0:
      raise ValueError(f"LMU: theta must be above 0, got {self.theta!r}")

  def init(self, key) -> dict[str, Any]:
    d, n = self.d_model, self.order
    keys = jax.random.split(key, 5)
    uniform = lambda k: initializers.uniform(k, (d, 1), (3 / d) ** 0.5)
    glorot = lambda k, shape: (
      jax.random.normal(k, shape) * ((2 / sum(shape)) ** 0.5)
    )
    return {
      "e_x": uniform(keys[0]),
      "e_h": uniform(keys[1]),
      "e_m": jnp.zeros((n, 1)),
      "w_x": glorot(keys[2], (d, d)),
      "w_h": glorot(keys[3], (d, d)),
      "w_m": glorot(keys[4], (n, d)),
    }

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.d_model,)), jnp.zeros((self.order,)))

  def step(self, params, state, x):
    state = self._recur(params, state, self._project(params, x))
    return state, state.h.astype(x.dtype)

  def parallel(self, params, state, xs, reset, mask, implementation):
    inputs = self._project(params, xs)
    if implementation == "pallas":
      state, hs = self._fused(params, state, inputs, reset, mask)
    else:

      def step(state, i):
        state = self._recur(params, state, i.inputs)
        return state, state.h

      state, hs = arguments.scan_steps(
        step, state, Steps(inputs, reset, mask), None
      )
    return state, hs.astype(xs.dtype)

  def _project(self, params, x) -> Inputs:
    single = lambda name: dot(x, params[name]).astype(jnp.float32)
    return Inputs(single("w_x"), single("e_x"))

  def _recur(self, params, state, inputs):
    p = {k: x.astype(jnp.float32) for k, x in params.items()}
    a, b = self._window()
    u = inputs.u + state.h @ p["e_h"] + state.m @ p["e_m"]
    m = state.m @ a + b * u
    h = jnp.tanh(inputs.h + state.h @ p["w_h"] + m @ p["w_m"])
    return State(h, m)

  def _window(self):
    """Āᵀ [N, N] and B̄ [N]."""
    a, b = hippo.zoh(hippo.delay, self.order, 1 / self.theta)
    return jnp.asarray(a.T, jnp.float32), jnp.asarray(b, jnp.float32)

  def _fused(self, params, state, inputs, reset, mask):
    """In one kernel, u's weights folded into those of m."""
    p = {k: x.astype(jnp.float32) for k, x in params.items()}
    a, b = self._window()
    constants = (a + p["e_m"] * b, p["e_h"] * b, p["w_h"], p["w_m"])
    inputs = Inputs(inputs.h, inputs.u * b)
    return cell_scan(
      _step, state, inputs, constants, reset=reset, mask=mask, inert=True
    )


class Steps(NamedTuple):
  inputs: Inputs
  reset: jax.Array | None
  mask: jax.Array | None


def _step(state, inputs, constants):
  m_m, h_m, h_h, m_h = constants
  m = inputs.u + product(state.m, m_m) + product(state.h, h_m)
  h = jnp.tanh(inputs.h + product(state.h, h_h) + product(m, m_h))
  return State(h, m), h
