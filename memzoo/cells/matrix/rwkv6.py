"""RWKV-6 (Finch)."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.batched import heads
from memzoo.ops.conv import shift
from memzoo.ops.linear_attention import linear_attention, read, write

_EPS = 64e-5  # of the authors' group norm: 1e-5 times the square of 8
_MOST = 20.0  # exp(−exp(20)) is 0, and so is its derivative, in float32


class State(NamedTuple):
  s: jax.Array  # [H, K, K] float32
  x: jax.Array  # [D] float32: the last input


class Read(NamedTuple):
  """What a token asks, stores and forgets, before it meets the state."""

  r: jax.Array  # [..., H, K]
  k: jax.Array  # [..., H, K]
  v: jax.Array  # [..., H, K]
  log_w: jax.Array  # [..., H, K] float32
  g: jax.Array  # [..., H, K]


@register(
  "rwkv6",
  family="matrix",
  year=2024,
  paper="Peng et al. 2024, arXiv:2404.05892",
  write="decay per channel and add",
  evidence="silver",
  parity="rwkv 0.8.32, att_seq_v6_0; fla-core 0.6 (its op)",
  tiny=dict(d_model=6, num_heads=2, head_dim=3, mix_rank=2, decay_rank=2),
)
@dataclasses.dataclass(frozen=True)
class RWKV6(cell.Cell):
  """RWKV-6: a token is read with a bonus, stored, and from then on decays.

    lora_□(x) = λ_□ + tanh(x A_□) B_□                                  (14)
    ddlerp_□(a, b) = a + (b − a) ⊙ lora_□(a + (b − a) ⊙ μ_x)           (15)
    □_t = ddlerp_□(x_t, x_{t−1}) W_□ ,  □ of r, k, v, g                (16)
    w_t = exp(−exp(lora_d(ddlerp_d(x_t, x_{t−1}))))                (17, 18)
    o_t = concat(SiLU(g_t) ⊙ LayerNorm(r_t · wkv_t)) W_o               (20)
    wkv_t = s_{t−1} + diag(u) k_tᵀ v_t                                 (21)
    s_t = diag(w_t) s_{t−1} + k_tᵀ v_t                                 (22)

  State: s [H, K, K] and x [D] (x_{t−1}, of the token shift), float32, from
    zero.
  Params: mix_x [D] (μ_x), mix [5, D] (λ of d, k, v, r, g), mix_in [D, 5R]
    (A), mix_out [5, R, D] (B), decay [HK] (λ_d), decay_in [D, R'],
    decay_out [R', HK], r, k, v, g [D, HK], bonus [H, K] (u), norm_scale,
    norm_bias [H, K], out [HK, D]; R = mix_rank, R' = decay_rank.
  Forms: step and scan O(H K²) a token, in order; chunk O(H K (C log C + K)) a
    token, in T / C sequential steps of matmuls; pallas the same in one kernel.
    In scan, chunk and pallas a token's write enters with the next token, which
    so reads s_{t−1}; the last one's enters at the end.
  Differs: nothing in the time mixing; channel mixing is a block's MLP. The
    paper has H K = D. Maps start with variance 1 / D (the code's output starts
    at zero, its keys and gates at a tenth).
  Paper: Peng, Goldstein, Anthony and others 2024, "Eagle and Finch: RWKV with
    Matrix-Valued States and Dynamic Recurrence", arXiv:2404.05892, eq. 14 to
    22; starting values, which depend on `layer_index` and `num_layers`, and
    the norm's eps as in the authors' code (RWKV-LM, x060).
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 64
  mix_rank: int = 32
  decay_rank: int = 64
  layer_index: int = 0
  num_layers: int = 1

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "linear_attention"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "mix_rank", "decay_rank",
      "num_layers",
    )  # fmt: skip
    if not 0 <= self.layer_index < self.num_layers:
      raise ValueError(
        "RWKV6: layer_index must be 0 … num_layers − 1 = "
        f"{self.num_layers - 1}, got {self.layer_index!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, h, k = self.d_model, self.num_heads, self.head_dim
    width, rank, low = h * k, self.mix_rank, self.decay_rank
    keys = jax.random.split(key, 7)
    depth = self.layer_index / max(self.num_layers - 1, 1)
    early = 1 - self.layer_index / self.num_layers
    channel = jnp.arange(d) / d
    slow, fast = 1 - channel**early, 1 - channel ** (0.5 * early)
    n = jnp.arange(width)
    place = n / max(width - 1, 1)
    draw = initializers.lecun_normal
    return {
      "mix_x": slow,
      "mix": jnp.stack([slow, slow, slow - 0.3 * depth, fast, fast]),
      "mix_in": jnp.zeros((d, 5 * rank)),
      "mix_out": initializers.uniform(keys[0], (5, rank, d), 0.01),
      "decay": -6 + 5 * place ** (0.7 + 1.3 * depth),
      "decay_in": jnp.zeros((d, low)),
      "decay_out": initializers.uniform(keys[1], (low, width), 0.01),
      **{c: draw(keys[2 + i], (d, width)) for i, c in enumerate("rkvg")},
      "bonus": (
        depth * (1 - place) + 0.1 * ((n + 1) % 3 - 1).astype(jnp.float32)
      ).reshape(h, k),
      "norm_scale": jnp.ones((h, k)),
      "norm_bias": jnp.zeros((h, k)),
      "out": draw(keys[6], (width, d)),
    }

  def initial_state(self, params, key=None) -> State:
    shape = (self.num_heads, self.head_dim, self.head_dim)
    return State(
      jnp.zeros(shape, jnp.float32), jnp.zeros((self.d_model,), jnp.float32)
    )

  def step(self, params, state, x):
    t = self._project(params, x, state.x.astype(x.dtype))
    o = jax.vmap(read)(state.s, t.r)
    s = jax.vmap(write)(state.s, t.k, t.v, t.log_w)
    return State(s, x.astype(jnp.float32)), self._read_out(params, t, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    last, before = shift(state.x, xs, **flags)
    t = self._project(params, xs, before)
    writes = jnp.concatenate([z.astype(jnp.float32) for z in t[1:4]], axis=-1)
    rows = writes.reshape(len(xs), -1)
    due, ready = shift(jnp.zeros_like(rows[0]), rows, **flags)
    k, v, log_w = jnp.split(ready.reshape(writes.shape), 3, axis=-1)
    s, o = heads(linear_attention)(
      state.s, t.r, k.astype(xs.dtype), v.astype(xs.dtype), log_decay=log_w,
      implementation=implementation, **flags,
    )  # fmt: skip
    due = jnp.split(due.reshape(writes.shape[1:]), 3, axis=-1)
    return State(jax.vmap(write)(s, *due), last), self._read_out(params, t, o)

  def _project(self, params, x, before) -> Read:
    """x and the input before it, [..., D]."""
    cast = lambda name: params[name].astype(x.dtype)
    step = before - x
    low = jnp.tanh(dot(x + step * cast("mix_x"), params["mix_in"]))
    low = low.reshape(low.shape[:-1] + (5, self.mix_rank))
    mix = jax.vmap(dot, in_axes=(-2, 0), out_axes=-2)(low, params["mix_out"])
    mixed = x[..., None, :] + step[..., None, :] * (mix + cast("mix"))
    xw, xk, xv, xr, xg = (mixed[..., i, :] for i in range(5))
    d = dot(jnp.tanh(dot(xw, params["decay_in"])), params["decay_out"])
    d = d.astype(jnp.float32) + params["decay"].astype(jnp.float32)
    split = lambda z: z.reshape(z.shape[:-1] + (self.num_heads, -1))
    return Read(
      split(dot(xr, params["r"])),
      split(dot(xk, params["k"])),
      split(dot(xv, params["v"])),
      split(-jnp.exp(jnp.minimum(d, _MOST))),
      split(dot(xg, params["g"])),
    )

  def _read_out(self, params, t: Read, o):
    bonus = t.r * t.k * params["bonus"].astype(t.r.dtype)
    o = o + jnp.sum(bonus, axis=-1, keepdims=True) * t.v
    o = norm.layer_norm(o, params["norm_scale"], params["norm_bias"], _EPS)
    y = jax.nn.silu(t.g) * o
    return dot(y.reshape(y.shape[:-2] + (-1,)), params["out"])
