"""RG-LRU, the recurrence of Hawk and Griffin."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot, dot_blocks
from memzoo.core.registry import register
from memzoo.ops import arguments
from memzoo.ops.conv import conv, empty as conv_empty, step as conv_step
from memzoo.ops.linear_recurrence import (
  linear_recurrence,
  step as recurrence_step,
)


class State(NamedTuple):
  h: jax.Array  # [R] float32
  conv: jax.Array  # [W − 1, R] float32: the last inputs of the convolution
  seen: jax.Array  # int32 []: 1 after the first input


@register(
  "rg_lru",
  family="ssm",
  year=2024,
  paper="De et al. 2024, arXiv:2402.19427",
  write="gated decay, add what is free",
  evidence="gold",
  parity="transformers 5.23, RecurrentGemmaRecurrentBlock",
  tiny=dict(d_model=5, d_rnn=6, num_heads=2, conv_size=3, whole_first=True),
)
@dataclasses.dataclass(frozen=True)
class RGLRU(cell.Cell):
  """Real-gated linear recurrent unit: a decay that a gate can stop.

    r_t = σ(W_a x_t + b_a)                              recurrence gate   (1)
    i_t = σ(W_x x_t + b_x)                              input gate        (2)
    a_t = a^(c r_t) ,  a = σ(Λ) ,  c = 8                                  (3)
    h_t = a_t ⊙ h_{t−1} + sqrt(1 − a_t²) ⊙ (i_t ⊙ x_t)                    (4)

  With r = 0 an input leaves the state as it is, with r = 1 it meets an LRU of
  decay a^c. In the paper's recurrent block (figure 2c), which is the cell,

    x = conv(W_1 u + b_1) ,  y = W_out (h ⊙ gelu(W_2 u + b_2)) + b_out

  With `num_heads` H above 1, W_a and W_x are block-diagonal, and with
  `whole_first` the first input after a fresh start enters without the factor
  sqrt(1 − a_t²); RecurrentGemma has both.

  State: h [R] float32 and conv [W − 1, R] float32, from zero; seen int32 [],
    whether an input came.
  Params: in [D, 2R] (W_1, W_2), in_bias [2R], conv [W, R], conv_bias [R],
    gates [R, 2N] of N = R / H (rows: the units, head after head; columns: a,
    x), gates_bias [2R], lam [R] (Λ), out [R, D], out_bias [D]. At the start
    a^c is uniform in [0.9, 0.999].
  Forms: step O(R (D + N)) a token; scan hoists everything but the recurrence,
    whose steps are O(R); assoc the same in O(log T) parallel passes, chunk in
    passes over 16 tokens and T / 16 serial steps; pallas the steps of scan in
    one kernel.
  Differs: the convolution starts as that of Mamba does; the paper does not
    say how. gelu is the tanh approximation, as in the authors' code
    (google-deepmind/recurrentgemma), which draws a, and not a^c, from that
    range. There the gradient of the root is clipped at 1000; here it is exact,
    and zero where a_t is 1.
  Paper: De, Smith, Fernando, Botev, Cristian-Muraru, Gu, Haroun, Berrada,
    Chen, Srinivasan, Desjardins, Doucet, Budden, Teh, Pascanu, de Freitas,
    Gulcehre 2024, "Griffin: Mixing Gated Linear Recurrences with Local
    Attention for Efficient Language Models", arXiv:2402.19427, eq. 1-4,
    sections 2.3 and 2.4. Botev et al. 2024, "RecurrentGemma: Moving Past
    Transformers for Efficient Open Language Models", arXiv:2404.07839.
  """

  d_model: int
  d_rnn: int | None = None
  num_heads: int = 1
  conv_size: int = 4
  whole_first: bool = False
  c: float = 8.0

  op: ClassVar[str] = "linear_recurrence"
  implementations: ClassVar[tuple[str, ...]] = (
    "scan",
    "assoc",
    "chunk",
    "pallas",
  )

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_heads", "conv_size")
    if self.d_rnn is not None:
      arguments.check_positive(self, "d_rnn")
    if self.width % self.num_heads:
      raise ValueError(
        f"RGLRU: num_heads={self.num_heads} must divide d_rnn={self.width}"
      )
    if self.c <= 0:
      raise ValueError(f"RGLRU: c must be above 0, got {self.c!r}")

  @property
  def width(self) -> int:
    """R, the channels of the recurrence."""
    return self.d_rnn or self.d_model

  def init(self, key) -> dict[str, Any]:
    d, r, w = self.d_model, self.width, self.conv_size
    n, keys = r // self.num_heads, jax.random.split(key, 5)
    decay = jax.random.uniform(keys[0], (r,), minval=0.9, maxval=0.999)
    log_a = jnp.log(decay) / self.c
    return {
      "in": initializers.lecun_normal(keys[1], (d, 2 * r)),
      "in_bias": jnp.zeros((2 * r,)),
      "conv": initializers.uniform(keys[2], (w, r), w**-0.5),
      "conv_bias": jnp.zeros((r,)),
      "gates": initializers.lecun_normal(keys[3], (r, 2 * n), fan_in=n),
      "gates_bias": jnp.zeros((2 * r,)),
      "lam": log_a - jnp.log(-jnp.expm1(log_a)),
      "out": initializers.lecun_normal(keys[4], (r, d)),
      "out_bias": jnp.zeros((d,)),
    }

  def initial_state(self, params, key=None) -> State:
    h = jnp.zeros((self.width,), jnp.float32)
    return State(h, conv_empty(params["conv"]), jnp.zeros((), jnp.int32))

  def step(self, params, state, x):
    u, gate = self._branches(params, x)
    window, u = conv_step(state.conv, u, params["conv"], params["conv_bias"])
    decay, write = self._gates(params, u, state.seen == 0)
    h, _ = recurrence_step(state.h, write, decay)
    state = State(h, window, jnp.ones_like(state.seen))
    return state, _read_out(params, h, gate)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    u, gate = self._branches(params, xs)
    window, u = conv(
      state.conv, u, params["conv"], params["conv_bias"], **flags
    )
    there = jnp.ones(xs.shape[:1], bool) if mask is None else mask
    count = state.seen + jnp.cumsum(there, dtype=jnp.int32)
    first = count == 1 if reset is None else (count == 1) | reset
    decay, write = self._gates(params, u, first[:, None])
    h, hs = linear_recurrence(
      state.h, write, decay=decay, implementation=implementation, **flags
    )
    seen = jnp.minimum(state.seen + jnp.sum(there, dtype=jnp.int32), 1)
    return State(h, window, seen), _read_out(params, hs, gate)

  def _branches(self, params, x):
    x = dot(x, params["in"]) + params["in_bias"].astype(x.dtype)
    u, gate = jnp.split(x, 2, axis=-1)
    return u, jax.nn.gelu(gate)

  def _gates(self, params, x, first):
    """a_t and sqrt(1 − a_t²) ⊙ i_t ⊙ x_t, float32 [..., R]."""
    single = lambda name: params[name].astype(jnp.float32)
    gates = dot_blocks(x, params["gates"].astype(x.dtype), 2)
    r, i = jnp.split(jax.nn.sigmoid(gates + single("gates_bias")), 2, axis=-1)
    log_a = -self.c * r * jax.nn.softplus(-single("lam"))
    free = -jnp.expm1(2 * log_a)  # 1 − a_t²
    some = free > 0
    free = jnp.where(some, jnp.sqrt(jnp.where(some, free, 1.0)), 0.0)
    if self.whole_first:
      free = jnp.where(first, 1.0, free)
    return jnp.exp(log_a), free * i * x.astype(jnp.float32)


def _read_out(params, h, gate):
  y = dot(h.astype(gate.dtype) * gate, params["out"])
  return y + params["out_bias"].astype(gate.dtype)
