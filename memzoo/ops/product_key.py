"""Exact search among the n² keys of a product codebook, and the read.

Key i n + j is the concatenation of the half keys c_i and c'_j, so that its
score is a sum, and the k best of the n² sums are among the k² sums of the k
best of each half:

  score(i, j) = q₁·c_i + q₂·c'_j ,   q = [q₁, q₂]
  I = the k best (i, j)
  m = Σ_{i ∈ I} w_i v_i ,   w = softmax of the scores in I

Source: Lample et al. 2019, arXiv:1907.05242, eq. 1-3 and section 3.2.
"""

import jax
import jax.numpy as jnp

from memzoo.ops import arguments, chunk


def top_k(
  query: jax.Array, keys: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
  """The k keys of largest score: what a search of all n² finds.

  Equal scores may come in another order than a search of all would give.

  Args:
    query: [..., K].
    keys: [2, n, K / 2], the half keys c and c'.
    k: how many, at most n².

  Returns:
    (scores float32 [..., k], falling; indices int32 [..., k], i n + j).

  Raises:
    ValueError: on wrong shapes or dtypes, or a k that is out of range.
  """
  _check(query, keys, k)
  count = keys.shape[1]
  half = min(k, count)
  first, second = jnp.split(query, 2, axis=-1)
  # The operands of the scores stay float32: a rounded score picks other keys.
  s1, i1 = jax.lax.top_k(chunk.matmul(first, keys[0].T), half)
  s2, i2 = jax.lax.top_k(chunk.matmul(second, keys[1].T), half)
  sums = s1[..., :, None] + s2[..., None, :]
  pairs = i1[..., :, None] * count + i2[..., None, :]
  flat = sums.shape[:-2] + (half * half,)
  scores, place = jax.lax.top_k(sums.reshape(flat), k)
  return scores, jnp.take_along_axis(pairs.reshape(flat), place, axis=-1)


def read(values: jax.Array, weights: jax.Array, indices: jax.Array):
  """Σ_k weights_k values[indices_k]: values [N, V], weights and indices
  [..., k] -> float32 [..., V]. Values that are not read get no gradient."""
  rows = jnp.take(values, indices, axis=0, mode="clip")
  return jnp.einsum(
    "...k,...kv->...v",
    weights.astype(jnp.float32),
    rows.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )


def product_key(
  query: jax.Array, keys: jax.Array, values: jax.Array, *, k: int
) -> jax.Array:
  """Looks a query up in a product-key memory.

  Args:
    query: [..., K].
    keys: [2, n, K / 2].
    values: [n², V].
    k: how many values are read.

  Returns:
    [..., V] in the query's dtype.

  Raises:
    ValueError: on wrong shapes or dtypes, or a k that is out of range.
  """
  scores, indices = top_k(query, keys, k)
  arguments.check_array(
    "product_key", "values", values, (keys.shape[1] ** 2, None)
  )
  weights = jax.nn.softmax(scores, axis=-1)
  return read(values, weights, indices).astype(query.dtype)


def _check(query, keys, k):
  who = "product_key"
  if jnp.ndim(query) < 1 or jnp.shape(query)[-1] % 2:
    arguments.fail(who, "query", "floating [..., K] with an even K", query)
  arguments.check_array(who, "query", query, jnp.shape(query))
  width = jnp.shape(query)[-1] // 2
  arguments.check_array(who, "keys", keys, (2, None, width))
  total = jnp.shape(keys)[1] ** 2
  if not 1 <= k <= total:
    raise ValueError(
      f"{who}: k must be in 1 … {total} for {jnp.shape(keys)[1]} half keys, "
      f"got {k}"
    )
  if total >= 2**31:
    raise ValueError(
      f"{who}: n² must be below 2³¹, got n = {jnp.shape(keys)[1]}"
    )
