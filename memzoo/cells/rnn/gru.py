"""Gated recurrent unit."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot, dot_blocks
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
  evidence="gold",
  parity="torch 2.13, GRU (reset_after)",
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

  With `num_heads` H each U is block-diagonal: units hN to (h + 1)N − 1, of
  N = D / H, are head h, and see the h_{t−1} of their own head alone.

  State: h [D] float32, starts at zero.
  Params: w [D, 3D] (r, z, h̃), u [D, 3N] (rows: the units, head after head;
    columns: r, z, h̃ of the row's own head), b [3D], and c [D] (reset_after).
  Forms: step O(D² + DN) a token; scan hoists W x, the same order of work;
    pallas keeps the U of one head on chip, in x's dtype, heads side by side.
  Differs: biases, which the paper omits ("to make the equations
    uncluttered"). Heads as in Pöppel et al. 2024 (arXiv:2412.07752).
  Paper: Cho, van Merriënboer, Gulcehre, Bahdanau, Bougares, Schwenk, Bengio
    2014, "Learning Phrase Representations using RNN Encoder-Decoder for
    Statistical Machine Translation", arXiv:1406.1078, eq. 5-8.
  """

  d_model: int
  reset_after: bool = False
  num_heads: int = 1

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_heads")
    arguments.check_divides(self, "num_heads", "d_model")

  def init(self, key) -> dict[str, Any]:
    d, heads = self.d_model, self.num_heads
    key_w, key_u = jax.random.split(key)
    params = {
      "w": initializers.glorot_uniform(key_w, (d, 3 * d)),
      "u": jnp.concatenate(
        [
          initializers.orthogonal_blocks(k, d, heads)
          for k in jax.random.split(key_u, 3)
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
      return self._fused(u, c, state, gates, reset, mask)
    inputs = Inputs(gates, reset, mask)

    def step(state, inputs):
      state = self._recur(params, state, inputs.gates)
      return state, state.h

    state, hs = arguments.scan_steps(step, state, inputs, None)
    return state, hs.astype(xs.dtype)

  def _fused(self, u, c, state, gates, reset, mask):
    """One kernel over all heads, which are mapped."""
    heads = self.num_heads
    cut = lambda x: x.reshape(*x.shape[:-1], heads, -1)
    run = lambda state, x, constants: cell_scan(
      _step_by_gate, state, x, constants, reset=reset, mask=mask, inert=True
    )
    u = u.reshape(heads, -1, u.shape[1])
    state, ys = jax.vmap(run, (0, 1, 0), (0, 1))(
      jax.tree.map(cut, state),
      Gates(*map(cut, jnp.split(gates, 3, axis=1))),
      (Gates(*jnp.split(u, 3, axis=2)), None if c is None else cut(c)),
    )
    return jax.tree.map(jnp.ravel, state), ys.reshape(-1, self.d_model)

  def _project(self, params, x):
    gates = dot(x, params["w"]).astype(jnp.float32)
    return gates + params["b"].astype(jnp.float32)

  def _recur(self, params, state, gates):
    d, n, h = self.d_model, self.d_model // self.num_heads, state.h
    u = params["u"].astype(jnp.float32)
    shown = gates[: 2 * d] + dot_blocks(h, u[:, : 2 * n], 2)
    r, z = jnp.split(jax.nn.sigmoid(shown), 2)
    if self.reset_after:
      c = params["c"].astype(jnp.float32)
      added = r * (dot_blocks(h, u[:, 2 * n :], 1) + c)
    else:
      added = dot_blocks(r * h, u[:, 2 * n :], 1)
    return State(z * h + (1 - z) * jnp.tanh(gates[2 * d :] + added))


class Inputs(NamedTuple):
  gates: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


class Gates(NamedTuple):
  r: jax.Array
  z: jax.Array
  candidate: jax.Array


def _step_by_gate(state, x: Gates, constants):
  """One head's step on W x + b, each gate with a weight of its own [N, N], and
  c [N] where the reset gate acts after the product."""
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
