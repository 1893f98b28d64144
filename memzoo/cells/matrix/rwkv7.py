"""RWKV-7."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.batched import heads
from memzoo.ops.conv import conv, step as conv_step
from memzoo.ops.diag_plus_rank_one import diag_plus_rank_one, step as rule_step

_NORM_EPS = 64e-5  # of the authors' code


class State(NamedTuple):
  s: jax.Array  # [H, K, K] float32: keys, values
  shift: jax.Array  # [1, D] float32: the input before


class Read(NamedTuple):
  """What a token asks, writes, removes and forgets."""

  r: jax.Array  # [..., H, K]
  k: jax.Array  # [..., H, K] the replacement key
  v: jax.Array  # [..., H, K]
  a: jax.Array  # [..., H, K] the removal key, of unit norm, negative
  b: jax.Array  # [..., H, K] the same times the in-context learning rate
  log_decay: jax.Array  # [..., H, K] float32


@register(
  "rwkv7",
  family="matrix",
  year=2025,
  paper="Peng et al. 2025, arXiv:2503.14456",
  write="decay per channel, remove, add",
  evidence="gold",
  parity="rwkv 0.8.32, RWKV_x070_TMix_seq; fla-core 0.6 (its op)",
  tiny=dict(d_model=6, num_heads=2, decay_rank=2, rate_rank=1, gate_rank=3),
)
@dataclasses.dataclass(frozen=True)
class RWKV7(cell.Cell):
  """RWKV-7 "Goose": a delta rule that removes one key and writes another.

    x□_t = x_t + (x_{t−1} − x_t) ⊙ μ_□ ,  □ in r, w, k, v, a, g   token shift
    a_t = σ(a_0 + x^a A_1 A_2)                 in-context learning rate
    w_t = exp(−e^{−½} σ(w_0 + tanh(x^w D_1) D_2))                 decay
    k_t = x^k W_k ,  v_t = x^v W_v ,  r_t = x^r W_r
    κ̂_t = k_t ⊙ ξ / ‖k_t ⊙ ξ‖                  removal key, per head
    k̃_t = k_t ⊙ (1 + (a_t − 1) ⊙ α)            replacement key
    S_t = S_{t−1} (diag(w_t) − κ̂_tᵀ (a_t ⊙ κ̂_t)) + v_tᵀ k̃_t
    p_t = LayerNorm(r_t S_tᵀ) + (r_t · (ρ ⊙ k̃_t)) v_t        per head
    y_t = (p_t ⊙ σ(x^g G_1) G_2) W_o

  Vectors are rows; the state is held transposed, [K, V]. The removal reads it
  before it decays: an eigenvalue of the transition may fall to w − 1, below 0.

  State: s [H, K, K] float32 and shift [1, D] float32, from zero; K = D / H.
  Params: mix [6, D] (μ), rkv [3, D, D], decay_down [D, R], decay_up, decay_bias
    [D], rate_down, rate_up, rate_bias, gate_down, gate_up, removal [D] (ξ),
    replacement [D] (α), bonus [H, K] (ρ), norm_scale, norm_bias [H, K],
    out [D, D]. Starting values are those of the authors' first layer: down and
    out from zero, so that an untrained cell answers zero.
  Forms: step and scan O(D K) a token, in order; chunk O(D (C + K)) a token and
    log C products of decayed keys, in T / C sequential steps of matmuls; pallas
    the same in one kernel.
  Differs: the values of later layers are mixed with those of the first in the
    paper (value residual); a cell knows one layer, and does as the paper's
    first: v_t alone. Ranks are the code's unless given.
  Paper: Peng, Zhang, Goldstein, Alcaide, Du, Hou, Lin, Liu, Lu, Merrill, Song,
    Tan, Utpala, Wilce, Wind, Wu, Wuttke, Zhou-Zheng 2025, "RWKV-7 'Goose' with
    Expressive Dynamic State Evolution", arXiv:2503.14456, section 4 (weight
    preparation, state evolution, readout); starting values and ranks as in the
    authors' code (RWKV-LM, RWKV-v7, `RWKV_Tmix_x070`).
  """

  d_model: int
  num_heads: int = 1
  decay_rank: int | None = None
  rate_rank: int | None = None
  gate_rank: int | None = None

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "diag_plus_rank_one"

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_heads")
    arguments.check_divides(self, "num_heads", "d_model")
    ranks = ("decay_rank", "rate_rank", "gate_rank")
    arguments.check_positive(
      self, *(r for r in ranks if getattr(self, r) is not None)
    )
    if self.head_dim < 2:
      raise ValueError(
        f"RWKV7: num_heads={self.num_heads} must be at most half of "
        f"d_model={self.d_model}"
      )

  @property
  def head_dim(self) -> int:
    """K."""
    return self.d_model // self.num_heads

  def init(self, key) -> dict[str, Any]:
    d, h, k = self.d_model, self.num_heads, self.head_dim
    keys = jax.random.split(key, 6)
    place = jnp.arange(d, dtype=jnp.float32)
    line = place / (d - 1) - 0.5
    zigzag = 2 * (place % k) / (k - 1) - 1
    zigzag = zigzag * jnp.abs(zigzag)
    powers = jnp.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])  # of r, w, k, v, a, g
    limits = jnp.array([0.5, 0.05, 0.5])[:, None, None] * d**-0.5
    rank = lambda given, factor: (
      given or max(32, round(factor * math.sqrt(d) / 32) * 32)
    )

    def low_rank(name, key, rank):
      up = 0.1 * max(1.0, rank / d) ** 0.5
      up *= initializers.orthogonal(key, (rank, d))
      return {name + "_down": jnp.zeros((d, rank)), name + "_up": up}

    return {
      "mix": 1 - (place / d) ** powers[:, None],
      "rkv": limits * jax.random.uniform(keys[0], (3, d, d), minval=-1),
      **low_rank("decay", keys[1], rank(self.decay_rank, 2.5)),
      "decay_bias": -6 + 6 * place / (d - 1) + 0.5 + 2.5 * zigzag,
      **low_rank("rate", keys[2], rank(self.rate_rank, 2.5)),
      "rate_bias": -0.19 + 0.3 * zigzag + 0.4 * line,
      **low_rank("gate", keys[3], rank(self.gate_rank, 5.0)),
      "removal": 0.71 - 0.1 * line,
      "replacement": jnp.full((d,), 1.02),
      "bonus": jnp.full((h, k), -0.04),
      "norm_scale": jnp.ones((h, k)),
      "norm_bias": jnp.zeros((h, k)),
      "out": jnp.zeros((d, d)),
    }

  def initial_state(self, params, key=None) -> State:
    h, k = self.num_heads, self.head_dim
    return State(
      jnp.zeros((h, k, k), jnp.float32),
      jnp.zeros((1, self.d_model), jnp.float32),
    )

  def step(self, params, state, x):
    shift, before = conv_step(state.shift, x, self._taps())
    r, gate = self._project(params, x, before)
    s, o = jax.vmap(rule_step)(state.s, *r)
    return State(s, shift), self._read_out(params, r, o, gate)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    shift, before = conv(state.shift, xs, self._taps(), **flags)
    r, gate = self._project(params, xs, before)
    s, o = heads(diag_plus_rank_one)(
      state.s, r.r, r.k, r.v, a=r.a, b=r.b, log_decay=r.log_decay,
      implementation=implementation, **flags,
    )  # fmt: skip
    return State(s, shift), self._read_out(params, r, o, gate)

  def _taps(self):
    """The convolution that gives the input before."""
    return jnp.stack([jnp.ones(self.d_model), jnp.zeros(self.d_model)])

  def _project(self, params, x, before):
    """-> (Read, the output's gate [..., D])."""
    mix = params["mix"].astype(x.dtype)
    xr, xw, xk, xv, xa, xg = (x + (before - x) * mix[i] for i in range(6))
    r, k, v = (dot(z, w) for z, w in zip((xr, xk, xv), params["rkv"]))
    low = lambda name, z, f: dot(
      f(dot(z, params[name + "_down"])), params[name + "_up"]
    )
    split = lambda z: z.reshape(z.shape[:-1] + (self.num_heads, -1))
    bias = params["decay_bias"].astype(jnp.float32)
    w = low("decay", xw, jnp.tanh).astype(jnp.float32) + bias
    bias = params["rate_bias"].astype(x.dtype)
    a = jax.nn.sigmoid(low("rate", xa, lambda z: z) + bias)
    removal = split(k * params["removal"].astype(x.dtype))
    removal = norm.l2_normalize(removal, eps=1e-12)
    replacement = 1 + (a - 1) * params["replacement"].astype(x.dtype)
    log_decay = -math.exp(-0.5) * jax.nn.sigmoid(w)
    read = Read(
      split(r), split(k * replacement), split(v), -removal,
      removal * split(a), split(log_decay),
    )  # fmt: skip
    return read, low("gate", xg, jax.nn.sigmoid)

  def _read_out(self, params, r: Read, o, gate):
    scale, bias = params["norm_scale"], params["norm_bias"]
    p = norm.layer_norm(o, scale, bias, eps=_NORM_EPS)
    bonus = r.r * r.k * params["bonus"].astype(r.r.dtype)
    p = p + jnp.sum(bonus, axis=-1, keepdims=True) * r.v
    return dot(p.reshape(gate.shape) * gate, params["out"])
