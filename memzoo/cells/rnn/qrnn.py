"""Quasi-recurrent network."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.registry import register
from memzoo.ops import arguments
from memzoo.ops.conv import conv
from memzoo.ops.linear_recurrence import (
  linear_recurrence,
  step as recurrence_step,
)

GATES = {"f": 1, "fo": 2, "ifo": 3}  # how many a pooling has


class State(NamedTuple):
  c: jax.Array  # [D] float32
  conv: jax.Array  # [k − 1, D] float32: the last inputs


class Pool(NamedTuple):
  """What the pooling takes: float32 [..., D]."""

  f: jax.Array
  write: jax.Array  # (1 − f) ⊙ z, or i ⊙ z
  o: jax.Array | None


@register(
  "qrnn",
  family="rnn",
  year=2017,
  paper="Bradbury et al. 2017, arXiv:1611.01576",
  write="gated mix",
  evidence="silver",
  tiny=dict(d_model=5, kernel_size=3),
)
@dataclasses.dataclass(frozen=True)
class QRNN(cell.Cell):
  """Quasi-recurrent network: a convolution in time, and a pooling with gates.

    z_t = tanh(Σ_j W_z^j x_{t−k+j}) ,  j = 1 … k                       (1)
    f_t = σ(Σ_j W_f^j x_{t−k+j}) , and o_t, i_t as f_t                 (1)
    f:    h_t = f_t ⊙ h_{t−1} + (1 − f_t) ⊙ z_t                        (3)
    fo:   c_t = f_t ⊙ c_{t−1} + (1 − f_t) ⊙ z_t ,  h_t = o_t ⊙ c_t     (4)
    ifo:  c_t = f_t ⊙ c_{t−1} + i_t ⊙ z_t ,  h_t = o_t ⊙ c_t           (5)

  by `pooling`; y_t = h_t, and in f-pooling the state c is h. The convolution is
  masked: it sees the last k = `kernel_size` inputs, zeros before the first.

  State: c [D] float32 and conv [k − 1, D] float32, from zero.
  Params: w [k, D, (1 + G) D] for G gates (columns: z, f, o, i; the last of the
    k meets the newest input), b [(1 + G) D], which starts at zero.
  Forms: step O(k D²) a token; scan hoists the convolution, its steps are O(D);
    assoc the same in O(log T) parallel passes, chunk in passes over 16 tokens
    and T / 16 serial steps; pallas the steps of scan in one kernel.
  Differs: biases, which the equations leave out. Zoneout, dense connections
    and the encoder-decoder form (section 2.1) are not here.
  Paper: Bradbury, Merity, Xiong, Socher 2017, "Quasi-Recurrent Neural
    Networks", arXiv:1611.01576, section 2 (its equations in their order: the
    convolutions, their form for k = 2, and f-, fo- and ifo-pooling; equation
    numbers not checked).
  """

  d_model: int
  kernel_size: int = 2
  pooling: str = "fo"

  op: ClassVar[str] = "linear_recurrence"
  implementations: ClassVar[tuple[str, ...]] = (
    "scan",
    "assoc",
    "chunk",
    "pallas",
  )

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "kernel_size")
    if self.pooling not in GATES:
      raise ValueError(
        f"QRNN: pooling must be one of {tuple(GATES)}, got {self.pooling!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, k = self.d_model, self.kernel_size
    shape = (k, d, (1 + GATES[self.pooling]) * d)
    return {
      "w": initializers.lecun_normal(key, shape, fan_in=k * d),
      "b": jnp.zeros(shape[2:]),
    }

  def initial_state(self, params, key=None) -> State:
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    return State(zeros(self.d_model), zeros(self.kernel_size - 1, self.d_model))

  def step(self, params, state, x):
    taps = jnp.concatenate([state.conv, x[None].astype(jnp.float32)])
    pool = self._convolve(params, taps.astype(x.dtype))
    c, _ = recurrence_step(state.c, pool.write, pool.f)
    return State(c, taps[1:]), _read_out(pool, c, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    # x_{t−k+1} … x_t: depthwise convolutions with one tap of 1.
    one = jnp.eye(self.kernel_size, dtype=jnp.float32)[:, :, None]
    one = jnp.broadcast_to(one, one.shape[:2] + xs.shape[1:])
    shift = lambda kernel: conv(state.conv, xs, kernel, **flags)
    window, taps = jax.vmap(shift, out_axes=(None, 0))(one)
    pool = self._convolve(params, taps)
    c, cs = linear_recurrence(
      state.c, pool.write, decay=pool.f, implementation=implementation, **flags
    )
    return State(c, window), _read_out(pool, cs, xs)

  def _convolve(self, params, taps) -> Pool:
    """taps [k, ..., D] -> [..., D] each."""
    y = jnp.einsum(
      "k...d,kdn->...n", taps, params["w"].astype(taps.dtype),
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    y = y + params["b"].astype(jnp.float32)
    z, f, *rest = jnp.split(y, 1 + GATES[self.pooling], axis=-1)
    o, i = (*map(jax.nn.sigmoid, rest), None, None)[:2]
    i = jax.nn.sigmoid(-f) if i is None else i
    return Pool(jax.nn.sigmoid(f), i * jnp.tanh(z), o)


def _read_out(pool, c, x):
  return (c if pool.o is None else pool.o * c).astype(x.dtype)
