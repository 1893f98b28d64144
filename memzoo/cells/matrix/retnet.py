"""RetNet."""

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
from memzoo.ops.rotary import rotary


class State(NamedTuple):
  s: jax.Array  # [H, K, V] float32
  count: jax.Array  # int32 []: inputs seen, the next one's position


class Read(NamedTuple):
  """What a token asks and stores, turned by its position."""

  q: jax.Array  # [..., H, K]
  k: jax.Array  # [..., H, K]
  v: jax.Array  # [..., H, V]
  log_decay: jax.Array  # [..., H]


@register(
  "retnet",
  family="matrix",
  year=2023,
  paper="Sun et al. 2023, arXiv:2307.08621",
  write="fixed decay and add",
  evidence="silver",
  parity="fla-core 0.6, retention (its op)",
  tiny=dict(d_model=6, num_heads=2, head_dim=4, expand_v=0.75),
)
@dataclasses.dataclass(frozen=True)
class RetNet(cell.Cell):
  """Retention: a matrix that every head forgets at a rate of its own.

    S_n = γ S_{n−1} + K_nᵀ V_n                                  (6)
    o_n = Q_n S_n
    Q_n = (X_n W_Q) e^{inθ} ,  K_n = (X_n W_K) e^{−inθ} / √K    (5)
    γ_h = 1 − 2^{−5−h} ,  h = 0 … H − 1                         (8)
    Y_n = GroupNorm_H(o_n)                                      (8)
    y_n = (swish(X_n W_G) ⊙ Y_n) W_O                            (8)

  The positions n of xPos turn q and k; its decay is γ. The angles θ are
  base^{−i / (K/2 − 1)}, i = 0 … K/2 − 1, of the authors' code.

  State: s [H, K, V] float32 and count int32 [], from zero.
  Params: qk [D, 2HK], v [D, HV], gate [D, HV], out [HV, D]; V = expand_v K.
  Forms: step and scan O(H K V) a token, in order; chunk O(H (C (K + V) + K V))
    a token, in T / C sequential steps of matmuls; pallas the same in one
    kernel.
  Differs: of section 2.2's three normalisations of scores the second and
    third, which scale a head's output and which the group norm undoes but for
    its eps, are left out. The group norm is layer norm per head, without scale
    or bias; the authors' later code divides by the root mean square alone.
    Rotary pairs are halves.
  Paper: Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei 2023, "Retentive Network: A
    Successor to Transformer for Large Language Models", arXiv:2307.08621,
    eq. 5, 6 and 8, section 2.2; angles and starting values as in the authors'
    code (torchscale).
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  expand_v: float = 2.0
  rotary_base: float = 10000.0

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "linear_attention"

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_heads", "head_dim")
    for field, ok, want in (
      ("head_dim", self.head_dim % 2 == 0, "even"),
      ("rotary_base", self.rotary_base > 0, "above 0"),
      (
        "expand_v",
        self.value_dim >= 1 and self.value_dim == self.head_dim * self.expand_v,
        f"such that it times head_dim={self.head_dim} is a positive integer",
      ),
    ):
      if not ok:
        value = getattr(self, field)
        raise ValueError(f"RetNet: {field} must be {want}, got {value!r}")

  @property
  def value_dim(self) -> int:
    """V."""
    return int(self.head_dim * self.expand_v)

  def init(self, key) -> dict[str, Any]:
    d, h, k, v = self.d_model, self.num_heads, self.head_dim, self.value_dim
    keys = jax.random.split(key, 5)
    gain = 2.0**-2.5
    draw = lambda key, width: (
      gain * initializers.glorot_uniform(key, (d, width))
    )
    return {
      "qk": jnp.concatenate([draw(keys[0], h * k), draw(keys[1], h * k)], 1),
      "v": draw(keys[2], h * v),
      "gate": draw(keys[3], h * v),
      "out": initializers.glorot_uniform(keys[4], (h * v, d)),
    }

  def initial_state(self, params, key=None) -> State:
    shape = (self.num_heads, self.head_dim, self.value_dim)
    return State(jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.int32))

  def step(self, params, state, x):
    r = self._project(params, x, state.count)
    s, o = jax.vmap(attend_step)(state.s, *r)
    return State(s, state.count + 1), self._read_out(params, x, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    place = positions(state.count, len(xs), **flags)
    r = self._project(params, xs, place)
    s, o = heads(linear_attention)(
      state.s, r.q, r.k, r.v, log_decay=r.log_decay,
      implementation=implementation, **flags,
    )  # fmt: skip
    return State(s, place[-1] + 1), self._read_out(params, xs, o)

  def _project(self, params, x, place) -> Read:
    """x [..., D] at its place [...] in the segment."""
    h, half = self.num_heads, self.head_dim // 2
    split = lambda z: z.reshape(z.shape[:-1] + (h, -1))
    q, k = map(split, jnp.split(dot(x, params["qk"]), 2, axis=-1))
    # So that the slowest of the K/2 angles is 1 / rotary_base.
    base = self.rotary_base ** (half / max(half - 1, 1))
    q, k = (rotary(z, place[..., None], base=base) for z in (q, k))
    exponent = -5.0 - jnp.arange(h, dtype=jnp.float32)
    log_decay = jnp.broadcast_to(
      jnp.log1p(-jnp.exp2(exponent)), x.shape[:-1] + (h,)
    )
    return Read(
      q, k * self.head_dim**-0.5, split(dot(x, params["v"])), log_decay
    )

  def _read_out(self, params, x, o):
    o = norm.layer_norm(o).reshape(o.shape[:-2] + (-1,))
    return dot(jax.nn.silu(dot(x, params["gate"])) * o, params["out"])
