"""Gated recurrent unit."""

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
  h: jax.Array  # [D] float32


@register(
  "gru",
  family="rnn",
  year=2014,
  paper="Cho et al. 2014, arXiv:1406.1078",
  write="gated mix",
  evidence="silver",
  tiny=dict(d_model=6),
)
@dataclasses.dataclass(frozen=True)
class GRU(cell.Cell):
  """Gated recurrent unit: a vector, of which each entry is kept or replaced.

    r_t = σ(W_r x_t + U_r h_{t−1})                             (5)
    z_t = σ(W_z x_t + U_z h_{t−1})                             (6)
    h̃_t = tanh(W x_t + U (r_t ⊙ h_{t−1}))                      (8)
    h_t = z_t ⊙ h_{t−1} + (1 − z_t) ⊙ h̃_t ,  y_t = h_t         (7)

  With `reset_after`, the form that cuDNN and PyTorch compute:
  h̃_t = tanh(W x_t + b + r_t ⊙ (U h_{t−1} + c)).

  State: h [D] float32, starts at zero.
  Params: w [D, 3D] (r, z, h̃), u [D, 3D], b [3D], and c [D] (reset_after).
  Forms: step O(D²) a token; scan hoists W x, the same order of work; pallas
    keeps U on chip, in x's dtype.
  Differs: biases, which the paper omits ("to make the equations
    uncluttered").
  Paper: Cho, van Merriënboer, Gulcehre, Bahdanau, Bougares, Schwenk, Bengio
    2014, "Learning Phrase Representations using RNN Encoder-Decoder for
    Statistical Machine Translation", arXiv:1406.1078, eq. 5-8.
  """

  d_model: int
  reset_after: bool = False

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model")

  def init(self, key) -> dict[str, Any]:
    d = self.d_model
    key_w, key_u = jax.random.split(key)
    params = {
      "w": initializers.glorot_uniform(key_w, (d, 3 * d)),
      "u": jnp.concatenate(
        [
          initializers.orthogonal(k, (d, d)) for k in jax.random.split(key_u, 3)
        ],
        axis=1,
      ),
      "b": jnp.zeros((3 * d,)),
    }
    if self.reset_after:
      params["c"] = jnp.zeros((d,))
    return params

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.d_model,), jnp.float32))

  def step(self, params, state, x):
    state = self._recur(params, state, self._project(params, x))
    return state, state.h.astype(x.dtype)

  def parallel(self, params, state, xs, reset, mask, implementation):
    gates = self._project(params, xs)
    if implementation == "pallas":
      u = params["u"].astype(xs.dtype)
      c = params["c"].astype(jnp.float32) if self.reset_after else None
      return cell_scan(
        _step_by_gate,
        state,
        Gates(*jnp.split(gates, 3, axis=1)),
        (Gates(*jnp.split(u, 3, axis=1)), c),
        reset=reset,
        mask=mask,
        inert=True,
      )
    inputs = Inputs(gates, reset, mask)

    def step(state, inputs):
      state = self._recur(params, state, inputs.gates)
      return state, state.h

    state, hs = arguments.scan_steps(step, state, inputs, None)
    return state, hs.astype(xs.dtype)

  def _project(self, params, x):
    gates = dot(x, params["w"]).astype(jnp.float32)
    return gates + params["b"].astype(jnp.float32)

  def _recur(self, params, state, gates):
    d, h = self.d_model, state.h
    u = params["u"].astype(jnp.float32)
    r, z = jnp.split(jax.nn.sigmoid(gates[: 2 * d] + h @ u[:, : 2 * d]), 2)
    if self.reset_after:
      c = params["c"].astype(jnp.float32)
      candidate = jnp.tanh(gates[2 * d :] + r * (h @ u[:, 2 * d :] + c))
    else:
      candidate = jnp.tanh(gates[2 * d :] + (r * h) @ u[:, 2 * d :])
    return State(z * h + (1 - z) * candidate)


class Inputs(NamedTuple):
  gates: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


class Gates(NamedTuple):
  r: jax.Array
  z: jax.Array
  candidate: jax.Array


def _step_by_gate(state, x: Gates, constants):
  """The step on W x + b, each gate with a weight of its own [D, D], and c [D]
  where the reset gate acts after the product."""
  (u, c), h = constants, state.h
  low = h.astype(u.r.dtype)
  r = jax.nn.sigmoid(x.r + product(low, u.r))
  z = jax.nn.sigmoid(x.z + product(low, u.z))
  if c is None:
    added = product(r * h, u.candidate)
  else:
    added = r * (product(low, u.candidate) + c)
  h = z * h + (1 - z) * jnp.tanh(x.candidate + added)
  return State(h), h.astype(low.dtype)
