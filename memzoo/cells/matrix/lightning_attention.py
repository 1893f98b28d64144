"""Lightning attention."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.attention import positions
from memzoo.ops.batched import heads
from memzoo.ops.linear_attention import linear_attention, step as attend_step

VARIANTS = ("transnormer", "minimax")


class State(NamedTuple):
  s: jax.Array  # [H, F, V] float32; F = K, or 2K with lrpe
  count: jax.Array  # int32 []: inputs seen, the next one's position


class Read(NamedTuple):
  """What a token asks and stores, and how much it lets through."""

  q: jax.Array  # [..., H, F]
  k: jax.Array  # [..., H, F]
  v: jax.Array  # [..., H, K]
  log_decay: jax.Array  # [..., H] float32
  u: jax.Array  # [..., H K], the gate


@register(
  "lightning_attention",
  family="matrix",
  year=2023,
  paper="Qin et al. 2023, arXiv:2307.14995",
  write="fixed decay and add",
  evidence="silver",
  tiny=dict(
    d_model=6, num_heads=2, head_dim=3, lrpe=True, layer_index=1, num_layers=3
  ),
  parity="transformers 5.23, MiniMaxLightningAttention",
)
@dataclasses.dataclass(frozen=True)
class LightningAttention(cell.Cell):
  """Lightning attention: linear attention that fades, normed and gated.

    kv_t = λ kv_{t−1} + k_t v_tᵀ ,  o_t = q_tᵀ kv_t
    λ_h  = exp(−s_h (1 − l / (L − 1))) ,  s_h = 2^{−8h/H} ,  h = 1 … H
    transnormer: q, k = swish(x W) ,  v = x W_v ,  u = x W_u
                 y = (SRMSNorm(o) ⊙ u) W_o
    minimax:     q, k, v = swish(x W) ,  u = σ(x W_u)
                 y = (RMSNorm(o) ⊙ u) W_o

  The norms run over all heads. l is `layer_index` and L `num_layers`: lower
  layers forget faster. With `lrpe` (transnormer's first layer) the score of t
  and s is Re Σ_c q_tc k_sc λ^{t−s} e^{iθ_c(t−s)} with θ learned: q and k
  become [z cos(tθ), z sin(tθ)].

  State: s [H, F, K] float32 and count int32 [], from zero; F is K, with lrpe
    2K.
  Params: qkvu [D, 4HK], out [HK, D]; minimax: norm [HK]; lrpe: theta [H, K].
  Forms: step and scan O(H F K) a token, in order; chunk O(H (C (F + K) + F K))
    a token, in T / C sequential steps of matmuls (the intra and inter blocks
    of lightning attention 2); pallas the same in one kernel.
  Differs: λ as the authors' code has it; the paper writes exp(−8h/H (1 − l/L)).
    With MiniMax's code, 1e-5 is added to L − 1 and to the factor of the layer.
    Maps start with variance 1 / D.
  Paper: Qin, Li, Sun, Sun, Shen, Han, Wei, Lv, Luo, Qiao, Zhong 2023,
    "TransNormerLLM: A Faster and Better Large Language Model with Improved
    TransNormer", arXiv:2307.14995, sections 3.1 and 3.2 (eq. 9 to 14 of its
    later form, arXiv:2405.17381). Qin, Sun, Li, Shen, Sun, Zhong 2024,
    "Lightning Attention-2", arXiv:2401.04658. MiniMax 2025, "MiniMax-01",
    arXiv:2501.08313. Slopes, norms and gates as in the authors' code.
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  variant: str = "transnormer"
  lrpe: bool = False
  layer_index: int = 0
  num_layers: int = 1

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "linear_attention"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "num_layers"
    )
    for field, ok, want in (
      ("variant", self.variant in VARIANTS, f"one of {VARIANTS}"),
      (
        "layer_index",
        0 <= self.layer_index < self.num_layers,
        f"0 … num_layers − 1 = {self.num_layers - 1}",
      ),
    ):
      if not ok:
        value = getattr(self, field)
        raise ValueError(
          f"LightningAttention: {field} must be {want}, got {value!r}"
        )

  @property
  def width(self) -> int:
    """F, of q and k as the state meets them."""
    return self.head_dim * (2 if self.lrpe else 1)

  def init(self, key) -> dict[str, Any]:
    d, h, k = self.d_model, self.num_heads, self.head_dim
    key_qkvu, key_out = jax.random.split(key)
    params = {
      "qkvu": initializers.lecun_normal(key_qkvu, (d, 4 * h * k)),
      "out": initializers.lecun_normal(key_out, (h * k, d)),
    }
    if self.variant == "minimax":
      params["norm"] = jnp.ones((h * k,))
    if self.lrpe:
      exponent = jnp.arange(h * k, dtype=jnp.float32) * (-2.0 / (h * k))
      params["theta"] = (10000.0**exponent).reshape(h, k)
    return params

  def initial_state(self, params, key=None) -> State:
    shape = (self.num_heads, self.width, self.head_dim)
    return State(jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.int32))

  def step(self, params, state, x):
    r = self._project(params, x, state.count)
    s, o = jax.vmap(attend_step)(state.s, r.q, r.k, r.v, r.log_decay)
    return State(s, state.count + 1), self._read_out(params, r.u, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    place = positions(state.count, len(xs), **flags)
    r = self._project(params, xs, place)
    s, o = heads(linear_attention)(
      state.s, r.q, r.k, r.v, log_decay=r.log_decay,
      implementation=implementation, **flags,
    )  # fmt: skip
    return State(s, place[-1] + 1), self._read_out(params, r.u, o)

  def _project(self, params, x, place) -> Read:
    """x [..., D] at its place [...] in the segment."""
    h, swish = self.num_heads, jax.nn.silu
    q, k, v, u = jnp.split(dot(x, params["qkvu"]), 4, axis=-1)
    q, k, v = (z.reshape(z.shape[:-1] + (h, -1)) for z in (q, k, v))
    q, k = swish(q), swish(k)
    if self.variant == "minimax":
      v, u = swish(v), jax.nn.sigmoid(u)
    if self.lrpe:
      theta = params["theta"].astype(jnp.float32)
      angle = place.astype(jnp.float32)[..., None, None] * theta
      q, k = (_turned(z, angle) for z in (q, k))
    log_decay = jnp.broadcast_to(-self._slopes(), x.shape[:-1] + (h,))
    return Read(q, k, v, log_decay, u)

  def _slopes(self):
    """Rates of forgetting, float32 [H]."""
    head = jnp.arange(1, self.num_heads + 1, dtype=jnp.float32)
    layer = 1 - self.layer_index / (self.num_layers - 1 + 1e-5) + 1e-5
    return layer * jnp.exp2(head * (-8.0 / self.num_heads))

  def _read_out(self, params, u, o):
    o = norm.rms_norm(o.reshape(u.shape), params.get("norm"), eps=1e-6)
    return dot(o * u, params["out"])


def _turned(z, angle):
  y = z.astype(jnp.float32)
  y = jnp.concatenate([y * jnp.cos(angle), y * jnp.sin(angle)], axis=-1)
  return y.astype(z.dtype)
