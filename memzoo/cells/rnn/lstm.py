"""Long short-term memory."""

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
  h: jax.Array  # [D] float32, the output
  c: jax.Array  # [D] float32, the memory cells


@register(
  "lstm",
  family="rnn",
  year=1997,
  paper="Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735",
  write="gated add",
  evidence="gold",
  parity="torch 2.13, LSTM",
  tiny=dict(d_model=6),
)
@dataclasses.dataclass(frozen=True)
class LSTM(cell.Cell):
  """Long short-term memory: cells that gates write, keep and show.

    i_t = σ(W_i x_t + U_i h_{t−1} + b_i)        input gate
    f_t = σ(W_f x_t + U_f h_{t−1} + b_f)        forget gate (Gers et al.)
    g_t = tanh(W_g x_t + U_g h_{t−1} + b_g)     what is offered
    o_t = σ(W_o x_t + U_o h_{t−1} + b_o)        output gate
    c_t = f_t ⊙ c_{t−1} + i_t ⊙ g_t
    h_t = o_t ⊙ tanh(c_t) ,  y_t = h_t

  With `num_heads` H each U is block-diagonal: units hN to (h + 1)N − 1, of
  N = D / H, are head h, and see the h_{t−1} of their own head alone.

  State: h [D] float32 and c [D] float32, both start at zero.
  Params: w [D, 4D] (i, f, g, o), u [D, 4N] (rows: the units, head after head;
    columns: i, f, g, o of the row's own head), b [4D], whose part b_f starts
    at `forget_bias` and the rest at 0.
  Forms: step O(D² + DN) a token; scan hoists W x, the same order of work;
    pallas keeps the U of one head on chip, in x's dtype, heads side by side.
  Differs: from 1997, the forget gate of Gers et al. 2000; tanh for the
    paper's squashing functions 4σ(x) − 2 and 2σ(x) − 1; blocks of one cell;
    exact gradients in time for its truncated ones; every gate sees h alone,
    not the other gates. From 2000, the start of b_f at 1 (Jozefowicz et al.
    2015) for values of the task; far above zero f starts near 1, which is
    what the cells of 1997 have for good. No peepholes, which came later.
    Heads as in Beck et al. 2024 (arXiv:2405.04517, the sLSTM) and Pöppel et
    al. 2024 (arXiv:2412.07752); of the sLSTM nothing else.
  Paper: Hochreiter and Schmidhuber 1997, "Long Short-Term Memory", Neural
    Computation 9(8), section 4 and appendix A.1; Gers, Schmidhuber and
    Cummins 2000, "Learning to Forget: Continual Prediction with LSTM", Neural
    Computation 12(10), section 3 (no arXiv ids).
  """

  d_model: int
  num_heads: int = 1
  forget_bias: float = 1.0

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_heads")
    arguments.check_divides(self, "num_heads", "d_model")

  def init(self, key) -> dict[str, Any]:
    d, heads = self.d_model, self.num_heads
    key_w, *keys = jax.random.split(key, 5)
    zeros, keep = jnp.zeros((d,)), jnp.full((d,), float(self.forget_bias))
    return {
      "w": initializers.glorot_uniform(key_w, (d, 4 * d)),
      "u": jnp.concatenate(
        [initializers.orthogonal_blocks(k, d, heads) for k in keys], axis=1
      ),
      "b": jnp.concatenate([zeros, keep, zeros, zeros]),
    }

  def initial_state(self, params, key=None) -> State:
    zeros = jnp.zeros((self.d_model,), jnp.float32)
    return State(zeros, zeros)

  def step(self, params, state, x):
    state = _recur(params, state, _project(params, x))
    return state, state.h.astype(x.dtype)

  def parallel(self, params, state, xs, reset, mask, implementation):
    gates = _project(params, xs)
    if implementation == "pallas":
      return self._fused(
        params["u"].astype(xs.dtype), state, gates, reset, mask
      )
    inputs = Inputs(gates, reset, mask)

    def step(state, inputs):
      state = _recur(params, state, inputs.gates)
      return state, state.h

    state, hs = arguments.scan_steps(step, state, inputs, None)
    return state, hs.astype(xs.dtype)

  def _fused(self, u, state, gates, reset, mask):
    """One kernel over all heads, which are mapped."""
    heads = self.num_heads
    cut = lambda x: x.reshape(*x.shape[:-1], heads, -1)
    run = lambda state, x, u: cell_scan(
      _step_by_gate, state, x, u, reset=reset, mask=mask, inert=True
    )
    u = u.reshape(heads, -1, u.shape[1])
    state, ys = jax.vmap(run, (0, 1, 0), (0, 1))(
      jax.tree.map(cut, state),
      Gates(*map(cut, jnp.split(gates, 4, axis=1))),
      Gates(*jnp.split(u, 4, axis=2)),
    )
    return jax.tree.map(jnp.ravel, state), ys.reshape(-1, self.d_model)


class Inputs(NamedTuple):
  gates: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


def _project(params, x):
  gates = dot(x, params["w"]).astype(jnp.float32)
  return gates + params["b"].astype(jnp.float32)


def _recur(params, state, gates):
  gates = gates + dot_blocks(state.h, params["u"].astype(jnp.float32), 4)
  return _update(state, *jnp.split(gates, 4))


def _update(state, i, f, g, o):
  c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
  return State(jax.nn.sigmoid(o) * jnp.tanh(c), c)


class Gates(NamedTuple):
  i: jax.Array
  f: jax.Array
  g: jax.Array
  o: jax.Array


def _step_by_gate(state, x: Gates, u: Gates):
  """One head's step on W x + b, each gate with a weight of its own [N, N]."""
  h = state.h.astype(u.i.dtype)
  state = _update(state, *(a + product(h, w) for a, w in zip(x, u)))
  return state, state.h.astype(h.dtype)
