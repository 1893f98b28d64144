"""The delta-rule fast weight programmer."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, features
from memzoo.ops.batched import heads
from memzoo.ops.delta_rule import delta_rule, step as delta_step

_EPS = 1e-5  # of the sum normalisation


class State(NamedTuple):
  s: jax.Array  # [H, F, V] float32: the fast weights, transposed


@register(
  "fast_weight_programmer",
  family="matrix",
  year=2021,
  paper="Schlag et al. 2021, arXiv:2102.11174",
  write="erase, add",
  evidence="silver",
  tiny=dict(d_model=6, num_heads=2, head_dim=3, nu=2),
)
@dataclasses.dataclass(frozen=True)
class FastWeightProgrammer(cell.Cell):
  """Fast weights that a slow net programs by corrections, with DPFP keys.

    k_t, v_t, q_t = W_k x_t, W_v x_t, W_q x_t ,  β_t = σ(W_β x_t)
    v̄_t = W_{t−1} φ(k_t)                      what the key holds
    W_t = W_{t−1} + β_t (v_t − v̄_t) φ(k_t)ᵀ
    y_t = W_o W_t φ(q_t) / sqrt(K)            heads side by side
    φ(x) = f(x) / Σ_i f(x)_i                  sum normalisation
    f(x)_{jn + i} = r_i r_{i − j} ,  r = [relu(x), relu(−x)]    (DPFP)

  with n = 2K, j = 1 … ν and indices that wrap around. φ(k) sums to one, so
  that its norm is at most one and the correction never overshoots. The fast
  weights are held transposed, [F, V], F = 2 K ν and V = K = head_dim.

  State: s [H, F, V] float32, from zero.
  Params: qkv [D, 3HK], beta [D, H], out [HK, D].
  Forms: step and scan O(H F V) a token, in order; chunk O(H (C (F + V) + F V))
    a token, in T / C sequential steps of matmuls; pallas the same in one
    kernel.
  Differs: 1e-5 is added to the sum in φ, as in the authors' later layers (a
    vector without two active neighbours has f = 0). Norm, residual and
    dropout are the block's.
  Paper: Schlag, Irie, Schmidhuber 2021, "Linear Transformers Are Secretly Fast
    Weight Programmers", arXiv:2102.11174, section 4.2 (the update rule and the
    sum normalisation) and section 5.3 (DPFP); layer and output scale as in the
    authors' code (github.com/IDSIA/lmtool-fwp).
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  nu: int = 1

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "delta_rule"

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_heads", "head_dim", "nu")
    if self.nu >= 2 * self.head_dim:
      raise ValueError(
        "FastWeightProgrammer: nu must be below 2 head_dim = "
        f"{2 * self.head_dim}, got {self.nu}"
      )

  def init(self, key) -> dict[str, Any]:
    d, h, width = self.d_model, self.num_heads, self.num_heads * self.head_dim
    keys = jax.random.split(key, 3)
    return {
      "qkv": initializers.lecun_normal(keys[0], (d, 3 * width)),
      "beta": initializers.lecun_normal(keys[1], (d, h)),
      "out": initializers.lecun_normal(keys[2], (width, d)),
    }

  def initial_state(self, params, key=None) -> State:
    h, k = self.num_heads, self.head_dim
    return State(jnp.zeros((h, 2 * k * self.nu, k), jnp.float32))

  def step(self, params, state, x):
    q, k, v, beta = self._project(params, x)
    s, o = jax.vmap(delta_step)(state.s, q, k, v, beta)
    return State(s), self._read_out(params, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    q, k, v, beta = self._project(params, xs)
    s, o = heads(delta_rule)(
      state.s, q, k, v, beta=beta, reset=reset, mask=mask,
      implementation=implementation,
    )  # fmt: skip
    return State(s), self._read_out(params, o)

  def phi(self, x):
    """φ: [..., K] -> [..., 2 K ν] in x's dtype."""
    f = features.dpfp(x.astype(jnp.float32), self.nu)
    return (f / (jnp.sum(f, -1, keepdims=True) + _EPS)).astype(x.dtype)

  def _project(self, params, x):
    qkv = dot(x, params["qkv"])
    qkv = qkv.reshape(qkv.shape[:-1] + (3, self.num_heads, self.head_dim))
    q, k, v = (qkv[..., i, :, :] for i in range(3))
    beta = jax.nn.sigmoid(dot(x, params["beta"]).astype(jnp.float32))
    return self.phi(q), self.phi(k), v, beta

  def _read_out(self, params, o):
    o = o * self.head_dim**-0.5
    return dot(o.reshape(o.shape[:-2] + (-1,)), params["out"])
