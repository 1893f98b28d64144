"""Product-key memory."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.registry import register
from memzoo.ops import arguments, chunk
from memzoo.ops.product_key import read, top_k

_MOMENTUM, _EPS = 0.1, 1e-5  # of the batch norm, as in the authors' code


@register(
  "product_key",
  family="table",
  year=2019,
  paper="Lample et al. 2019, arXiv:1907.05242",
  write="by gradient, k rows",
  evidence="silver",
  tiny=dict(d_model=6, num_keys=5, knn=3, key_dim=4, num_heads=2),
)
@dataclasses.dataclass(frozen=True)
class ProductKey(cell.Cell):
  """A table of n² values, addressed by keys that are products of n and n.

    q(x) = BN(W x + b)                 per head, q = [q₁, q₂]
    I = the k largest of q(x)·key_i = q₁·c_i₁ + q₂·c'_i₂          (1)
    w = softmax(q(x)·key_i over I)                                (2)
    y = Σ_heads Σ_{i ∈ I} w_i v_i                                 (3)

  Every head has a query and half keys of its own; they share the values.

  State: (), what is remembered is in the parameters.
  Params: query [D, H K], query_bias, norm_scale, norm_bias [H K] (the last
    two with batch_norm), keys [H, 2, n, K / 2], values [n², D]; buffers: mean
    and variance [H K] of the batch norm.
  Forms: step O(D H K + H (n K + k² + k D)) a token; chunk the same for all
    tokens at once, with T H k values in memory.
  Differs: the batch norm uses its running statistics in training too, so that
    a token's output does not depend on its batch; `refresh` moves them by a
    tenth towards those of each batch, as the authors' training mode does,
    without a gradient through them. Scores are float32 whatever x is. No
    dropout; the query is one linear layer and the width of the values D (the
    defaults of the authors' code).
  Paper: Lample, Sablayrolles, Ranzato, Denoyer, Jégou 2019, "Large Memory
    Layers with Product Keys", arXiv:1907.05242, eq. 1-3, sections 3.1-3.3;
    defaults and initial values of github.com/facebookresearch/XLM.
  """

  d_model: int
  num_keys: int = 32
  knn: int = 8
  key_dim: int = 32
  num_heads: int = 4
  batch_norm: bool = True

  op: ClassVar[str] = "product_key"
  implementations: ClassVar[tuple[str, ...]] = ("chunk",)

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_keys", "knn", "key_dim", "num_heads"
    )
    if self.key_dim % 2:
      raise ValueError(
        f"ProductKey: key_dim must be even, two halves, got {self.key_dim}"
      )
    if self.knn > self.num_keys**2:
      raise ValueError(
        f"ProductKey: knn must be at most num_keys² = {self.num_keys**2}, got "
        f"{self.knn}"
      )
    if self.num_keys**2 >= 2**31:
      raise ValueError(
        f"ProductKey: num_keys² must be below 2³¹, got num_keys={self.num_keys}"
      )

  def init(self, key) -> dict[str, Any]:
    d, n, total = self.d_model, self.num_keys, self.num_heads * self.key_dim
    half = self.key_dim // 2
    key_w, key_b, key_k, key_v = jax.random.split(key, 4)
    values = jax.random.normal(key_v, (n * n, d))
    params = {
      "query": initializers.uniform(key_w, (d, total), d**-0.5),
      "query_bias": initializers.uniform(key_b, (total,), d**-0.5),
      "keys": initializers.uniform(
        key_k, (self.num_heads, 2, n, half), half**-0.5
      ),
      "values": d**-0.5 * values,
    }
    if self.batch_norm:
      params["norm_scale"] = jnp.ones((total,))
      params["norm_bias"] = jnp.zeros((total,))
      params["buffers"] = {
        "mean": jnp.zeros((total,)),
        "variance": jnp.ones((total,)),
      }
    return params

  def initial_state(self, params, key=None):
    return ()

  def step(self, params, state, x):
    return state, self._read(params, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    # Nothing passes from token to token: `scan` has zeroed what is masked.
    return state, self._read(params, xs)

  def refresh(self, params, xs):
    """Moves the running statistics towards those of the queries of xs
    [B, T, D], padding among them."""
    if not self.batch_norm:
      return params
    q = self._query(params, xs).reshape(-1, self.num_heads * self.key_dim)
    count = q.shape[0]
    batch = {
      "mean": jnp.mean(q, axis=0),
      "variance": jnp.var(q, axis=0) * (count / max(count - 1, 1)),
    }
    moved = jax.tree.map(
      lambda old, new: (_single(old) + _MOMENTUM * (new - _single(old))).astype(
        old.dtype
      ),
      params["buffers"],
      batch,
    )
    return {**params, "buffers": moved}

  def look_up(self, params, x):
    """Which values are read: x [..., D] -> (weights float32, indices int32),
    both [..., H, k]."""
    q = self._query(params, x)
    if self.batch_norm:
      running = jax.lax.stop_gradient(params["buffers"])
      mean, variance = (_single(running[n]) for n in ("mean", "variance"))
      q = (q - mean) * jax.lax.rsqrt(variance + _EPS)
      q = q * _single(params["norm_scale"]) + _single(params["norm_bias"])
    q = q.reshape(q.shape[:-1] + (self.num_heads, self.key_dim))
    search = jax.vmap(
      lambda q, keys: top_k(q, keys, self.knn), in_axes=(-2, 0), out_axes=-2
    )
    scores, indices = search(q, params["keys"])
    return jax.nn.softmax(scores, axis=-1), indices

  def _read(self, params, x):
    weights, indices = self.look_up(params, x)
    merged = indices.shape[:-2] + (self.num_heads * self.knn,)
    y = read(params["values"], weights.reshape(merged), indices.reshape(merged))
    return y.astype(x.dtype)

  def _query(self, params, x):
    """Before the norm; float32, for the search's sake."""
    return chunk.matmul(x, params["query"]) + _single(params["query_bias"])


def _single(x):
  return x.astype(jnp.float32)
