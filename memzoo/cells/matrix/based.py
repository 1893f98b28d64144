"""Based's linear attention."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, features
from memzoo.ops.batched import heads
from memzoo.ops.linear_attention import linear_attention, step as attend_step


class State(NamedTuple):
  s: jax.Array  # [H, F, V] float32: Σ φ(k) vᵀ
  z: jax.Array  # [H, F] float32: Σ φ(k)


@register(
  "based",
  family="matrix",
  year=2024,
  paper="Arora et al. 2024, arXiv:2402.18668",
  write="add",
  evidence="gold",
  parity="fla-core 0.6, based (its op)",
  tiny=dict(d_model=6, num_heads=2, feature_dim=3, head_dim=5),
)
@dataclasses.dataclass(frozen=True)
class Based(cell.Cell):
  """Based: linear attention with the second-order Taylor series of exp.

    S_t = S_{t−1} + φ(k_t) v_tᵀ ,  z_t = z_{t−1} + φ(k_t)
    y_t = W_o (φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t)
    φ(x) = [1, x / K^¼, vec(x xᵀ) / sqrt(2 K)]
    φ(q)·φ(k) = 1 + s + s² / 2 ≈ exp(s) ,  s = q·k / sqrt(K)

  The similarity is at least 1/2, so that the denominator is never near zero.
  Queries and keys are narrow (K = feature_dim) and values wide (V = head_dim,
  d_model / num_heads unless it is given): K sets the size of the state.

  State: s [H, F, V] and z [H, F] float32, from zero; F = 1 + K + K².
  Params: qkv [D, H (2K + V)], out [HV, D].
  Forms: step and scan O(H F V) a token, in order; chunk O(H (C (F + V) + F V))
    a token, in T / C sequential steps of matmuls; pallas the same in one
    kernel.
  Differs: nothing. The paper's stack has this layer beside sliding-window
    attention and gated short convolutions: `memzoo.models.based`.
  Paper: Arora, Eyuboglu, Zhang, Timalsina, Alberti, Zinsley, Zou, Rudra, Ré
    2024, "Simple linear attention language models balance the
    recall-throughput tradeoff", arXiv:2402.18668, section 4 (the feature map
    and the layer); scales and the denominator's constant as in the authors'
    code (github.com/HazyResearch/based).
  """

  d_model: int
  num_heads: int = 1
  feature_dim: int = 16
  head_dim: int | None = None
  eps: float = 1e-12

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "linear_attention"

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_heads", "feature_dim")
    if self.head_dim is None:
      arguments.check_divides(self, "num_heads", "d_model")
    else:
      arguments.check_positive(self, "head_dim")

  @property
  def value_dim(self) -> int:
    """V of every head."""
    return self.head_dim or self.d_model // self.num_heads

  def init(self, key) -> dict[str, Any]:
    d, h, v = self.d_model, self.num_heads, self.value_dim
    key_qkv, key_out = jax.random.split(key)
    width = h * (2 * self.feature_dim + v)
    return {
      "qkv": initializers.lecun_normal(key_qkv, (d, width)),
      "out": initializers.lecun_normal(key_out, (h * v, d)),
    }

  def initial_state(self, params, key=None) -> State:
    h, f = self.num_heads, features.width("taylor", self.feature_dim)
    return State(
      jnp.zeros((h, f, self.value_dim), jnp.float32),
      jnp.zeros((h, f), jnp.float32),
    )

  def step(self, params, state, x):
    sz, o = jax.vmap(attend_step)(join(state), *self._project(params, x))
    return part(sz), self._read_out(params, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    sz, o = heads(linear_attention)(
      join(state), *self._project(params, xs), reset=reset, mask=mask,
      implementation=implementation,
    )  # fmt: skip
    return part(sz), self._read_out(params, o)

  def _project(self, params, x):
    """φ(q), φ(k) [..., H, F] and [v, 1] [..., H, V + 1], whose last column
    sums up z."""
    width = self.num_heads * self.feature_dim
    q, k, v = jnp.split(dot(x, params["qkv"]), [width, 2 * width], axis=-1)
    q, k, v = (self.by_head(u) for u in (q, k, v))
    return features.taylor(q), features.taylor(k), with_one(v)

  def _read_out(self, params, o):
    o = o[..., :-1] / (o[..., -1:] + self.eps)
    return dot(o.reshape(o.shape[:-2] + (-1,)), params["out"])

  def by_head(self, u):
    """[..., H N] as [..., H, N]."""
    return u.reshape(u.shape[:-1] + (self.num_heads, -1))


def with_one(v):
  """[v, 1]: [..., V] -> [..., V + 1]."""
  return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def join(state: State) -> jax.Array:
  """[s, z] as one matrix a head: [H, F, V + 1]."""
  return jnp.concatenate([state.s, state.z[..., None]], axis=-1)


def part(sz) -> State:
  """What `join` was given."""
  return State(sz[..., :-1], sz[..., -1])
