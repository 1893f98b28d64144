"""HGRN, the hierarchically gated recurrent network."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.linear_recurrence import (
  linear_recurrence,
  step as recurrence_step,
)


class State(NamedTuple):
  h: jax.Array  # [N] complex64


class Inputs(NamedTuple):
  """What a token brings, before it meets the state."""

  decay: jax.Array  # [..., N] complex64: λ exp(iθ)
  write: jax.Array  # [..., N] complex64: (1 − λ) ⊙ c
  g: jax.Array  # [..., 2N], the output gate


@register(
  "hgrn",
  family="rnn",
  year=2023,
  paper="Qin et al. 2023, arXiv:2311.04823",
  write="forget and turn, add what was freed",
  evidence="silver",
  tiny=dict(d_model=5, d_state=7, layer_index=1, num_layers=3),
)
@dataclasses.dataclass(frozen=True)
class HGRN(cell.Cell):
  """HGRU, the layer of HGRN: complex numbers that forget by choice, and turn.

    Re(c_t) = silu(x_t W_cr + b_cr) ,  Im(c_t) = silu(x_t W_ci + b_ci)
    μ_t = σ(x_t W_μ + b_μ) ,  λ_t = γ + (1 − γ) ⊙ μ_t
    h_t = λ_t exp(iθ) ⊙ h_{t−1} + (1 − λ_t) ⊙ c_t
    g_t = silu(x_t W_g + b_g)
    y_t = LayerNorm(g_t ⊙ [Re(h_t); Im(h_t)]) W_o + b_o
    γ   = Σ_{j<k} softmax(Γ)_j     over the layers j = 0 … L − 1

  γ, per channel, is the lower bound of λ in layer k = `layer_index`: zero in
  the first layer, and higher the higher the layer, so that lower layers
  forget. θ is learned, the same at every step.

  State: h [N] complex64, starts at zero.
  Params: w [D, 5N] (W_cr, W_ci, W_μ, W_g), b [5N], theta [N], norm [2N],
    norm_bias [2N], out [2N, D], out_bias [D]; above the first layer bounds
    [L, N] (Γ), from zero: γ starts at k / L. θ_n starts at 10000^(−2n / N).
  Forms: step O(DN) a token; scan hoists everything but the recurrence, whose
    steps are O(N); assoc the same in O(log T) parallel passes, chunk in
    passes over 16 tokens and T / 16 serial steps; pallas the steps of scan in
    one kernel.
  Differs: the layers of the paper's model share one Γ; a cell has its own, of
    the same shape, so that bounds stay in order between layers only while
    their Γ agree. N = D in the paper. silu in the output gate, which the
    paper leaves open, and the start of θ are the authors' code's
    (hgru-pytorch); it applies the gate after the norm, the paper before.
  Paper: Qin, Yang, Zhong 2023, "Hierarchically Gated Recurrent Neural Network
    for Sequence Modeling", arXiv:2311.04823, section 3.2, as the authors'
    repository restates it (OpenNLPLab/HGRN, "Algorithm").
  """

  d_model: int
  d_state: int | None = None
  layer_index: int = 0
  num_layers: int = 1

  op: ClassVar[str] = "linear_recurrence"
  implementations: ClassVar[tuple[str, ...]] = (
    "scan",
    "assoc",
    "chunk",
    "pallas",
  )

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_layers")
    if self.d_state is not None:
      arguments.check_positive(self, "d_state")
    if not 0 <= self.layer_index < self.num_layers:
      raise ValueError(
        "HGRN: layer_index must be 0 … num_layers − 1 = "
        f"{self.num_layers - 1}, got {self.layer_index!r}"
      )

  @property
  def width(self) -> int:
    """N."""
    return self.d_state or self.d_model

  def init(self, key) -> dict[str, Any]:
    d, n = self.d_model, self.width
    key_w, key_out = jax.random.split(key)
    params = {
      "w": initializers.lecun_normal(key_w, (d, 5 * n)),
      "b": jnp.zeros((5 * n,)),
      "theta": 10000.0 ** (-2 / n * jnp.arange(n, dtype=jnp.float32)),
      "norm": jnp.ones((2 * n,)),
      "norm_bias": jnp.zeros((2 * n,)),
      "out": initializers.lecun_normal(key_out, (2 * n, d)),
      "out_bias": jnp.zeros((d,)),
    }
    if self.layer_index:
      params["bounds"] = jnp.zeros((self.num_layers, n))
    return params

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.width,), jnp.complex64))

  def step(self, params, state, x):
    i = self._project(params, x)
    h, _ = recurrence_step(state.h, i.write, i.decay)
    return State(h), _read_out(params, h, i.g)

  def parallel(self, params, state, xs, reset, mask, implementation):
    i = self._project(params, xs)
    h, hs = linear_recurrence(
      state.h, i.write, decay=i.decay, reset=reset, mask=mask,
      implementation=implementation,
    )  # fmt: skip
    return State(h), _read_out(params, hs, i.g)

  def _project(self, params, x) -> Inputs:
    n = self.width
    z = dot(x, params["w"]) + params["b"].astype(x.dtype)
    c, mu, g = jnp.split(z, [2 * n, 3 * n], axis=-1)
    re, im = jnp.split(jax.nn.silu(c.astype(jnp.float32)), 2, axis=-1)
    mu = mu.astype(jnp.float32)
    decay, free = jax.nn.sigmoid(mu), jax.nn.sigmoid(-mu)  # λ and 1 − λ
    if self.layer_index:
      share = jax.nn.softmax(params["bounds"].astype(jnp.float32), axis=0)
      bound = jnp.sum(share[: self.layer_index], axis=0)
      rest = jnp.sum(share[self.layer_index :], axis=0)
      decay, free = bound + rest * decay, rest * free
    theta = params["theta"].astype(jnp.float32)
    decay = jax.lax.complex(decay * jnp.cos(theta), decay * jnp.sin(theta))
    write = jax.lax.complex(free * re, free * im)
    return Inputs(decay, write, jax.nn.silu(g))


def _read_out(params, h, g):
  parts = jnp.concatenate([h.real, h.imag], axis=-1).astype(g.dtype)
  y = norm.layer_norm(g * parts, params["norm"], params["norm_bias"])
  return dot(y, params["out"]) + params["out_bias"].astype(g.dtype)
