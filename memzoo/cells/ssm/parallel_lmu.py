"""Parallel Legendre memory unit."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, hippo
from memzoo.ops.state_space import state_space, step as space_step

_ACTIVATIONS = {
  "identity": lambda x: x,
  "relu": jax.nn.relu,
  "gelu": jax.nn.gelu,
  "tanh": jnp.tanh,
}


class State(NamedTuple):
  m: jax.Array  # [M, N] float32


@register(
  "parallel_lmu",
  family="ssm",
  year=2021,
  paper="Chilkuri and Eliasmith 2021, arXiv:2102.11417",
  write="Legendre coefficients of windows",
  evidence="silver",
  tiny=dict(d_model=5, num_signals=2, order=7, theta=9.0),
)
@dataclasses.dataclass(frozen=True)
class ParallelLMU(cell.Cell):
  """Legendre memory unit whose memory sees the input alone: a convolution.

    u_t = f_1(U_x x_t + b_u)                                           (18)
    m_t = Ā m_{t−1} + B̄ u_t                                           (19)
    o_t = f_2(U_m m_t + U_x' x_t + b_o) ,  y_t = o_t                   (20)
    m = H ∗ u ,  H_k = Ā^k B̄                                     (23), (26)

  M signals u, each with a window of θ tokens in N Legendre coefficients; Ā and
  B̄ are those of the LMU: the zero-order hold of θ ṁ = A m + B u.

  State: m [M, N] float32, from zero.
  Params: encode [D, M], encode_bias [M], memory [M N, D], input [D, D],
    bias [D]. A, B and θ are fixed.
  Forms: step O(M N² + M N D + D²) a token; scan the same, in checkpointed
    blocks, with the maps hoisted; chunk by powers of Ā, in T / 16 serial steps
    of matmuls; fft the convolution (26) over the whole sequence, which cannot
    reset and lets about 1e-7 of a later input reach an output.
  Differs: f_1 and f_2 are free in the paper: `encode_activation` and
    `activation`, ReLU both (the LMUFormer's) unless given.
  Paper: Chilkuri, Eliasmith 2021, "Parallelizing Legendre Memory Unit
    Training", arXiv:2102.11417, eq. 18 to 26; A and B of Voelker et al. 2019,
    eq. 2.
  """

  d_model: int
  num_signals: int = 1
  order: int = 32
  theta: float = 64.0
  encode_activation: str = "relu"
  activation: str = "relu"

  op: ClassVar[str] = "state_space"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "fft")
  convolutions: ClassVar[tuple[str, ...]] = ("fft",)

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_signals", "order")
    if not self.theta > 0:
      raise ValueError(
        f"ParallelLMU: theta must be above 0, got {self.theta!r}"
      )
    for field in ("encode_activation", "activation"):
      if getattr(self, field) not in _ACTIVATIONS:
        raise ValueError(
          f"ParallelLMU: {field} must be one of {tuple(_ACTIVATIONS)}, got "
          f"{getattr(self, field)!r}"
        )

  def init(self, key) -> dict[str, Any]:
    d, memory = self.d_model, self.num_signals * self.order
    keys = jax.random.split(key, 3)
    draw = initializers.lecun_normal
    return {
      "encode": draw(keys[0], (d, self.num_signals)),
      "encode_bias": jnp.zeros((self.num_signals,)),
      "memory": draw(keys[1], (memory, d), memory + d),
      "input": draw(keys[2], (d, d), memory + d),
      "bias": jnp.zeros((d,)),
    }

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.num_signals, self.order)))

  def step(self, params, state, x):
    u = self._encode(params, x)
    m, ms = space_step(state.m, u, *self._space())
    return State(m), self._read_out(params, ms, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    transition, write, read = self._space()
    m, ms = state_space(
      state.m, self._encode(params, xs), transition=transition, write=write,
      read=read, reset=reset, mask=mask, implementation=implementation,
    )  # fmt: skip
    return State(m), self._read_out(params, ms, xs)

  def _encode(self, params, x):
    """u, float32 [..., M]."""
    u = dot(x, params["encode"]).astype(jnp.float32)
    bias = params["encode_bias"].astype(jnp.float32)
    return _ACTIVATIONS[self.encode_activation](u + bias)

  def _space(self):
    """Ā and B̄ of every signal, and the read-out of all coefficients."""
    a, b = hippo.zoh(hippo.delay, self.order, 1 / self.theta)
    shared = lambda x: jnp.broadcast_to(
      jnp.asarray(x, jnp.float32), (self.num_signals, *x.shape)
    )
    return shared(a), shared(b), shared(np.eye(self.order))

  def _read_out(self, params, m, x):
    m = m.reshape(m.shape[:-2] + (-1,)).astype(x.dtype)
    o = dot(m, params["memory"]) + dot(x, params["input"])
    return _ACTIVATIONS[self.activation](o + params["bias"].astype(x.dtype))
