"""DeltaNet."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.batched import heads
from memzoo.ops.conv import conv, empty as conv_empty, step as conv_step
from memzoo.ops.delta_rule import delta_rule, step as delta_step


class State(NamedTuple):
  s: jax.Array  # [H, K, V] float32
  conv: jax.Array  # [W − 1, H (2K + V)] float32: the last inputs of q, k, v


class Read(NamedTuple):
  """What a token asks and binds, before it meets the state."""

  q: jax.Array  # [..., H, K]
  k: jax.Array  # [..., H, K]
  v: jax.Array  # [..., H, V]
  beta: jax.Array  # [..., H] float32


@register(
  "delta_net",
  family="matrix",
  year=2024,
  paper="Yang et al. 2024, arXiv:2406.06484",
  write="erase, add",
  evidence="gold",
  parity="fla-core 0.6, delta_rule (its op)",
  tiny=dict(d_model=6, num_heads=2, head_dim=4, expand_v=0.75, conv_size=3),
)
@dataclasses.dataclass(frozen=True)
class DeltaNet(cell.Cell):
  """DeltaNet: what a key holds is moved towards its new value.

    S_t = S_{t−1} − β_t (S_{t−1} k_t − v_t) k_tᵀ           (section 2.2)
        = S_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ
    o_t = S_t q_t ,  β_t = σ(W_β x_t)
    q, k = unit norm of silu(conv(W x)) ,  v = silu(conv(W_v x))
    y_t = W_o RMSNorm(o_t), the norm per head

  With `allow_neg_eigval` β_t = 2 σ(W_β x_t): the eigenvalue 1 − β_t of the
  transition falls to −1, so that the state can flip, as parity needs.

  The state is held transposed, [K, V], and q is scaled by 1/sqrt(K).

  State: s [H, K, V] float32 and conv [W − 1, H (2K + V)] float32, from zero.
  Params: qkv [D, H (2K + V)], conv [W, H (2K + V)], beta [D, H], norm [V],
    out [HV, D].
  Forms: step and scan O(H K V) a token, in order; chunk O(H (C (K + V) + K V))
    a token, in T / C sequential steps of matmuls; pallas the same in one
    kernel.
  Differs: nothing. Doubled β is that of Grazzi et al. 2024, arXiv:2411.12537.
  Paper: Yang, Wang, Zhang, Shen, Kim 2024, "Parallelizing Linear Transformers
    with the Delta Rule over Sequence Length", arXiv:2406.06484, section 2.2
    (the rule, after Schlag et al. 2021, arXiv:2102.11174), section 3 and
    appendix B (chunks); convolutions, norms and scale as in the authors' layer
    (flash-linear-attention).
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  expand_v: float = 1.0
  conv_size: int = 4
  allow_neg_eigval: bool = False

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "delta_rule"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "conv_size"
    )
    if self.value_dim < 1 or self.value_dim != self.head_dim * self.expand_v:
      raise ValueError(
        f"DeltaNet: expand_v={self.expand_v} times head_dim={self.head_dim} "
        "must be a positive integer"
      )

  @property
  def value_dim(self) -> int:
    return int(self.head_dim * self.expand_v)

  def init(self, key) -> dict[str, Any]:
    d, h, k, v = self.d_model, self.num_heads, self.head_dim, self.value_dim
    keys = jax.random.split(key, 4)
    width = h * (2 * k + v)
    return {
      "qkv": initializers.lecun_normal(keys[0], (d, width)),
      "conv": initializers.uniform(
        keys[1], (self.conv_size, width), self.conv_size**-0.5
      ),
      "beta": initializers.lecun_normal(keys[2], (d, h)),
      "norm": jnp.ones((v,)),
      "out": initializers.lecun_normal(keys[3], (h * v, d)),
    }

  def initial_state(self, params, key=None) -> State:
    return State(
      jnp.zeros((self.num_heads, self.head_dim, self.value_dim), jnp.float32),
      conv_empty(params["conv"]),
    )

  def step(self, params, state, x):
    window, qkv = conv_step(state.conv, dot(x, params["qkv"]), params["conv"])
    s, o = jax.vmap(delta_step)(state.s, *self._project(params, x, qkv))
    return State(s, window), self._read_out(params, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    window, qkv = conv(
      state.conv, dot(xs, params["qkv"]), params["conv"], **flags
    )
    r = self._project(params, xs, qkv)
    s, o = heads(delta_rule)(
      state.s, r.q, r.k, r.v, beta=r.beta, implementation=implementation,
      **flags,
    )  # fmt: skip
    return State(s, window), self._read_out(params, o)

  def _project(self, params, x, qkv) -> Read:
    h, k = self.num_heads, self.head_dim
    q, key, v = jnp.split(jax.nn.silu(qkv), [h * k, 2 * h * k], axis=-1)
    split = lambda z: z.reshape(z.shape[:-1] + (h, -1))
    beta = jax.nn.sigmoid(dot(x, params["beta"]).astype(jnp.float32))
    return Read(
      norm.l2_normalize(split(q)) * k**-0.5,
      norm.l2_normalize(split(key)),
      split(v),
      2 * beta if self.allow_neg_eigval else beta,
    )

  def _read_out(self, params, o):
    y = norm.rms_norm(o, params["norm"])
    return dot(y.reshape(y.shape[:-2] + (-1,)), params["out"])
