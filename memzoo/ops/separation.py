"""Separation functions: scores [..., M] -> weights [..., M], not negative.

  softmax     p_i = exp(z_i) / Σ_j exp(z_j)
  softmax1    p_i = exp(z_i) / (1 + Σ_j exp(z_j)): a further, empty pattern of
              score 0 takes the rest (Hu et al. 2024, arXiv:2404.03828)
  sparsemax   the point of the simplex that is nearest to z (Martins and
              Astudillo 2016, arXiv:1602.02068, algorithm 1)
  entmax15    argmax p·z + H(p) on the simplex, with the Tsallis entropy
              H(p) = 4/3 Σ (p − p^1.5) (Peters et al. 2019, arXiv:1905.05702,
              algorithm 2)

Each is the gradient of a convex function, its `conjugate`, which makes it the
step of an energy. Sparsemax and entmax15 are exact, by sorting, and have their
closed-form derivatives.
"""

import jax
import jax.numpy as jnp

from memzoo.core import dispatch


def softmax(z):
  """z float32 [..., M] -> [..., M]."""
  top = jax.lax.stop_gradient(_top(z))
  e = jnp.exp(z - top)
  return e / jnp.sum(e, axis=-1, keepdims=True)


def softmax1(z):
  """z float32 [..., M] -> [..., M], of sum below 1."""
  top = jax.lax.stop_gradient(jnp.maximum(_top(z), 0.0))
  e = jnp.exp(z - top)
  return e / (jnp.exp(-top) + jnp.sum(e, axis=-1, keepdims=True))


@jax.custom_jvp
def sparsemax(z):
  """z float32 [..., M] -> [..., M]: [z − τ]₊ with Σ = 1."""
  x, ordered, rank = _sorted(z)
  total = jnp.cumsum(ordered, axis=-1)
  size = _size(1.0 + rank * ordered > total)
  threshold = (_at(total, size) - 1.0) / size.astype(x.dtype)
  # Once more from the support itself, which rounds less than running sums.
  inside = x > threshold
  count = jnp.sum(inside, axis=-1, keepdims=True, dtype=x.dtype)
  total = jnp.sum(jnp.where(inside, x - threshold, 0.0), -1, keepdims=True)
  threshold += (total - 1.0) / count
  return jnp.maximum(x - threshold, 0.0)


@sparsemax.defjvp
def _sparsemax_jvp(primals, tangents):
  p = sparsemax(*primals)
  support = (p > 0).astype(p.dtype)
  return p, _centred(support, tangents[0])


@jax.custom_jvp
def entmax15(z):
  """z float32 [..., M] -> [..., M]: [z / 2 − τ]₊² with Σ = 1."""
  x, ordered, rank = _sorted(z / 2)
  mean = jnp.cumsum(ordered, axis=-1) / rank
  square = jnp.cumsum(ordered**2, axis=-1) / rank
  spread = jnp.maximum((1.0 / rank) - (square - mean**2), 0.0)
  thresholds = mean - jnp.sqrt(spread)
  threshold = _at(thresholds, _size(thresholds <= ordered))
  # A Newton step takes out what the running sums have rounded.
  root = jnp.maximum(x - threshold, 0.0)
  slope = 2 * jnp.sum(root, axis=-1, keepdims=True)
  threshold += (jnp.sum(root**2, axis=-1, keepdims=True) - 1.0) / slope
  return jnp.maximum(x - threshold, 0.0) ** 2


@entmax15.defjvp
def _entmax15_jvp(primals, tangents):
  p = entmax15(*primals)
  return p, _centred(_root(p), tangents[0])


FUNCTIONS = {
  "softmax": softmax,
  "softmax1": softmax1,
  "sparsemax": sparsemax,
  "entmax15": entmax15,
}


def get(name: str):
  """The function `name`; `ValueError` with the nearest on another one."""
  if name not in FUNCTIONS:
    raise ValueError(
      f"unknown separation {name!r}: " + dispatch.nearest(name, FUNCTIONS)
    )
  return FUNCTIONS[name]


def separate(name: str, z: jax.Array, mask: jax.Array | None = None):
  """Weights of the scores z.

  Args:
    name: of a function of this module.
    z: float32 [..., M].
    mask: bool, broadcastable to z; False: the pattern is not there, and its
      weight is zero. Where none is there all weights are zero.

  Returns:
    float32 [..., M].

  Raises:
    ValueError: on an unknown name.
  """
  function = get(name)
  if mask is None:
    return function(z)
  mask = jnp.broadcast_to(mask, z.shape)
  # Where none is there, zeros take the place of −inf, for finite gradients.
  any_there = jnp.any(mask, axis=-1, keepdims=True)
  z = jnp.where(mask, z, jnp.where(any_there, -jnp.inf, 0.0))
  return jnp.where(mask, function(z), 0.0)


def conjugate(name: str, z: jax.Array, mask: jax.Array | None = None):
  """The convex function whose gradient is the separation `name`.

  The log-sum-exp for softmax, with a score of 0 more for softmax1; p·z + H(p)
  for the sparse ones, each with its entropy H.

  Args:
    name: of a function of this module.
    z: float32 [..., M].
    mask: bool, broadcastable to z.

  Returns:
    float32 [...]: between max z and max z + `largest_entropy`; −inf where no
    pattern is there.
  """
  get(name)
  if mask is not None:
    z = jnp.where(mask, z, -jnp.inf)
  if name == "softmax1":
    z = jnp.concatenate([z, jnp.zeros_like(z[..., :1])], axis=-1)
  if name in ("softmax", "softmax1"):
    return jax.nn.logsumexp(z, axis=-1)
  p = separate(name, z, mask)
  value = jnp.sum(p * jnp.where(p > 0, z, 0.0), axis=-1)
  return value + jnp.sum(_entropy(name, p), axis=-1)


def largest_entropy(name: str, count: jax.Array):
  """H of `count` equal weights: by how much `conjugate` may exceed max z."""
  count = jnp.asarray(count, jnp.float32)
  if name == "softmax1":
    count += 1
  if name in ("softmax", "softmax1"):
    return jnp.log(count)
  get(name)
  return count * _entropy(name, 1.0 / count)


def _entropy(name, p):
  if name == "sparsemax":
    return (p - p**2) / 2
  return (p - p * _root(p)) * (4 / 3)


def _root(p):
  """√p, with a derivative of 0 at 0."""
  return jnp.where(p > 0, jnp.sqrt(jnp.where(p > 0, p, 1.0)), 0.0)


def _top(z):
  top = jnp.max(z, axis=-1, keepdims=True)
  return jnp.where(jnp.isneginf(top), 0.0, top)


def _sorted(z):
  """z less its largest, cut at −1 (nothing below has weight), sorted, rank."""
  x = jnp.maximum(z - _top(z), -1.0)
  rank = jnp.arange(1, x.shape[-1] + 1, dtype=x.dtype)
  return x, -jnp.sort(-x, axis=-1), rank


def _size(inside):
  return jnp.maximum(jnp.sum(inside, axis=-1, keepdims=True), 1)


def _at(values, size):
  return jnp.take_along_axis(values, size - 1, axis=-1)


def _centred(weight, v):
  """diag(s) v − s (s·v) / Σ s: the Jacobian of both times v."""
  v = jnp.where(weight > 0, v, 0.0)
  mean = jnp.sum(weight * v, axis=-1, keepdims=True)
  mean /= jnp.sum(weight, axis=-1, keepdims=True)
  return weight * (v - mean)
