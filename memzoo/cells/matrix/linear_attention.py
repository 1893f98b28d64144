"""Linear attention."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, features, norm
from memzoo.ops.batched import heads
from memzoo.ops.conv import conv, step as conv_step
from memzoo.ops.linear_attention import linear_attention, step as attend_step


class State(NamedTuple):
  s: jax.Array  # [H, F, V] float32: Σ φ(k) vᵀ
  z: jax.Array  # [H, F] float32: Σ φ(k)
  conv: jax.Array  # [W − 1, 3 H K] float32, no rows where there is no conv


@register(
  "linear_attention",
  family="matrix",
  year=2020,
  paper="Katharopoulos et al. 2020, arXiv:2006.16236",
  write="add",
  evidence="silver",
  parity="fla-core 0.6, linear_attn (its op)",
  tiny=dict(d_model=6, num_heads=2, head_dim=3, conv_size=3),
)
@dataclasses.dataclass(frozen=True)
class LinearAttention(cell.Cell):
  """Linear attention: a matrix to which every token adds φ(k) vᵀ.

    S_t = S_{t−1} + φ(k_t) v_tᵀ                                (18)
    z_t = z_{t−1} + φ(k_t)                                     (19)
    y_t = W_o (φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t) ,  φ(x) = elu(x) + 1  (20, 7)

  State: s [H, F, V] and z [H, F] float32, conv [W − 1, 3HK] float32, from zero.
  Params: qkv [D, 3HK], conv [W, 3HK] (where conv_size > 0), out [HK, D].
  Forms: step and scan O(H F V) a token, in order; chunk O(H (C (F + V) + F V))
    a token, in T / C sequential steps of matmuls; pallas the same in one
    kernel.
  Differs: `eps` is added to the denominator, as in the authors' code. Other
    feature maps by name; without `normalize` the denominator is left out and
    the head's output is RMS-normalised (Qin et al. 2022, arXiv:2210.10340).
    A short convolution of q, k, v (`conv_size`, 0 is the paper's) as MQAR
    protocols use it.
  Paper: Katharopoulos, Vyas, Pappas, Fleuret 2020, "Transformers are RNNs:
    Fast Autoregressive Transformers with Linear Attention", arXiv:2006.16236,
    eq. 7, 16-20.
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  feature_map: str = "elu"
  normalize: bool = True
  conv_size: int = 0
  eps: float = 1e-6

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "linear_attention"

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_heads", "head_dim")
    features.get(self.feature_map)
    if self.conv_size < 0:
      raise ValueError(
        f"LinearAttention: conv_size must be at least 0, got {self.conv_size}"
      )

  def init(self, key) -> dict[str, Any]:
    d, width = self.d_model, self.num_heads * self.head_dim
    key_qkv, key_out, key_conv = jax.random.split(key, 3)
    params = {
      "qkv": initializers.lecun_normal(key_qkv, (d, 3 * width)),
      "out": initializers.lecun_normal(key_out, (width, d)),
    }
    if self.conv_size:
      params["conv"] = initializers.uniform(
        key_conv, (self.conv_size, 3 * width), self.conv_size**-0.5
      )
    return params

  def initial_state(self, params, key=None) -> State:
    h, v = self.num_heads, self.head_dim
    f = features.width(self.feature_map, v)
    rows = max(self.conv_size - 1, 0)
    return State(
      jnp.zeros((h, f, v), jnp.float32),
      jnp.zeros((h, f), jnp.float32),
      jnp.zeros((rows, 3 * h * v), jnp.float32),
    )

  def step(self, params, state, x):
    window, qkv = state.conv, dot(x, params["qkv"])
    if self.conv_size:
      window, qkv = conv_step(window, qkv, params["conv"])
    sz, o = jax.vmap(attend_step)(_join(state), *self._split(qkv))
    return State(*_part(sz), window), self._read_out(params, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    window, qkv = state.conv, dot(xs, params["qkv"])
    if self.conv_size:
      window, qkv = conv(window, qkv, params["conv"], **flags)
    sz, o = heads(linear_attention)(
      _join(state), *self._split(qkv), implementation=implementation, **flags
    )
    return State(*_part(sz), window), self._read_out(params, o)

  def _split(self, qkv):
    """φ(q), φ(k) and [v, 1], whose last column sums up z."""
    qkv = qkv.reshape(qkv.shape[:-1] + (3, self.num_heads, self.head_dim))
    q, k, v = (qkv[..., i, :, :] for i in range(3))
    phi = features.get(self.feature_map)
    return phi(q), phi(k), jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)

  def _read_out(self, params, o):
    o, denominator = o[..., :-1], o[..., -1:]
    if self.normalize:
      o = o / (denominator + self.eps)
    else:
      o = norm.rms_norm(o)
    return dot(o.reshape(o.shape[:-2] + (-1,)), params["out"])


def _join(state):
  return jnp.concatenate([state.s, state.z[..., None]], axis=-1)


def _part(sz):
  return sz[..., :-1], sz[..., -1]
