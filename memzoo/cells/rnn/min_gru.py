"""Minimal gated recurrent unit."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments
from memzoo.ops.linear_recurrence import (
  linear_recurrence,
  step as recurrence_step,
)


class State(NamedTuple):
  h: jax.Array  # [N] float32


@register(
  "min_gru",
  family="rnn",
  year=2024,
  paper="Feng et al. 2024, arXiv:2410.01201",
  write="gated mix",
  evidence="gold",
  parity="minGRU-pytorch 0.2, minGRU",
  tiny=dict(d_model=5, d_state=7),
)
@dataclasses.dataclass(frozen=True)
class MinGRU(cell.Cell):
  """Minimal GRU: entries kept or replaced, as the input alone decides.

    z_t = σ(W_z x_t) ,  h̃_t = g(W_h x_t)                    (algorithm 5)
    h_t = (1 − z_t) ⊙ h_{t−1} + z_t ⊙ h̃_t ,  y_t = h_t
    g(x) = x + 1/2 where x >= 0, σ(x) elsewhere

  That is what the paper trains: g keeps states positive, so that its parallel
  form can work on their logarithms. With `log_space=False` it is the plain
  form, h̃_t = W_h x_t (algorithm 1). `step` takes the last line as it stands
  in both. With N = `d_state` other than D, y_t = W_y h_t.

  State: h [N] float32, starts at zero.
  Params: w [D, 2N] (z, h̃), b [2N], which starts at zero; out [N, D] (W_y,
    where N is not D).
  Forms: step O(DN) a token; scan hoists W x, its steps are O(N); assoc the
    same in O(log T) parallel passes, chunk in passes over 16 tokens and T / 16
    serial steps; pallas the steps of scan in one kernel.
  Differs: no form works on logarithms (algorithm 6): the sums here divide by
    no product of decays, which is what the paper's does it for, and 1 − z is
    σ(−W_z x). h_0 is zero in both forms; the paper leaves it to the caller,
    above zero in log-space. W_y, for states wider than the output, is not
    among its equations.
  Paper: Feng, Tung, Ahmed, Bengio, Hajimirsadeghi 2024, "Were RNNs All We
    Needed?", arXiv:2410.01201, section 3.1 and appendices A.1.1 and B
    (algorithms 1, 2, 5 and 6, listing 6).
  """

  d_model: int
  d_state: int | None = None
  log_space: bool = True

  op: ClassVar[str] = "linear_recurrence"
  implementations: ClassVar[tuple[str, ...]] = (
    "scan",
    "assoc",
    "chunk",
    "pallas",
  )

  def __post_init__(self):
    arguments.check_positive(self, "d_model")
    if self.d_state is not None:
      arguments.check_positive(self, "d_state")

  @property
  def width(self) -> int:
    """N."""
    return self.d_state or self.d_model

  def init(self, key) -> dict[str, Any]:
    d, n = self.d_model, self.width
    key_w, key_out = jax.random.split(key)
    params = {
      "w": initializers.lecun_normal(key_w, (d, 2 * n)),
      "b": jnp.zeros((2 * n,)),
    }
    if n != d:
      params["out"] = initializers.lecun_normal(key_out, (n, d))
    return params

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.width,), jnp.float32))

  def step(self, params, state, x):
    keep, write = self._project(params, x)
    h, _ = recurrence_step(state.h, write, keep)
    return State(h), _read_out(params, h, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    keep, writes = self._project(params, xs)
    h, hs = linear_recurrence(
      state.h, writes, decay=keep, reset=reset, mask=mask,
      implementation=implementation,
    )  # fmt: skip
    return State(h), _read_out(params, hs, xs)

  def _project(self, params, x):
    """1 − z_t and z_t ⊙ h̃_t, float32 [..., N]."""
    wx = dot(x, params["w"]).astype(jnp.float32)
    z, new = jnp.split(wx + params["b"].astype(jnp.float32), 2, axis=-1)
    new = _g(new) if self.log_space else new
    return jax.nn.sigmoid(-z), jax.nn.sigmoid(z) * new


def _read_out(params, h, x):
  y = h.astype(x.dtype)
  return dot(y, params["out"]) if "out" in params else y


def _g(x):
  """Above zero, continuous, nearly the identity where x is."""
  return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))
