"""Kernelised hashing: unit vectors to signs, fitted to who is like whom.

  κ_j(u) = exp(−‖u − a_j‖² / 2σ)               anchors a_1 … a_M
  H(u)_r = sign(Σ_j A_rj (κ_j(u) − μ_j))       r = 1 … b

The inner product of two codes is b − 2 · (their Hamming distance). The fit is
supervised by labels Y of pairs, +1 alike, −1 unlike, else 0, and greedy: bit r
is fitted to what the bits before it have left over,

  minimise −(1 / N b) h_rᵀ (b Y − Σ_{s < r} h_s h_sᵀ) h_r   over A_r

by gradient steps with tanh(·/2) in place of sign, kept where the signs do
better than those of the A_r before. Sources: Liu et al. 2012, "Supervised
Hashing with Kernels", CVPR, section 3; Liu et al. 2022, arXiv:2209.09004,
section 4, and the authors' code (github.com/ziplab/EcoFormer).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.ops import chunk, norm

RATE, MOMENTUM = 5e-4, 0.9  # of the fit, as in the authors' code


class Hash(NamedTuple):
  """Hash functions, float32."""

  anchors: jax.Array  # [M, K]
  weights: jax.Array  # [b, M]
  mean: jax.Array  # [M]
  bandwidth: jax.Array  # []


def draw(key, bits: int, anchors: int, width: int) -> Hash:
  """Hash functions for unit vectors before any fit: random unit vectors as
  anchors, normal weights, σ = 2 (the mean squared distance of such vectors)
  and μ = exp(−½)."""
  key_a, key_w = jax.random.split(key)
  return Hash(
    anchors=norm.l2_normalize(jax.random.normal(key_a, (anchors, width))),
    weights=jax.random.normal(key_w, (bits, anchors)),
    mean=jnp.full((anchors,), math.exp(-0.5)),
    bandwidth=jnp.asarray(2.0),
  )


def encode(hashed: Hash, u: jax.Array) -> jax.Array:
  """H(u): float32 [..., K] -> float32 [..., b] of −1 and 1.

  Gradients pass sign where its argument is within ±1; sign(0) is −1.
  """
  y = chunk.matmul(_features(hashed, u), hashed.weights.T)
  passed = jnp.clip(y, -1.0, 1.0)
  return _sign(y) + (passed - jax.lax.stop_gradient(passed))


def fit(
  hashed: Hash,
  u: jax.Array,
  key: jax.Array,
  *,
  top: int,
  steps: int = 100,
  rate: float = RATE,
) -> Hash:
  """Hash functions fitted to the similarities of tokens.

  Args:
    hashed: the functions to start from.
    u: float32 [B, T, K], unit vectors.
    key: draws the anchors, from the tokens of the first row.
    top: how many others each token is most like (+1) and least like (−1).
    steps: Nesterov steps a bit.
    rate: of these steps.

  Returns:
    the new functions; O(B T²) memory on the way.
  """
  length, (bits, count) = u.shape[1], hashed.weights.shape
  order = jax.random.permutation(key, length)
  anchors = u[0][order[jnp.arange(count) % length]]
  bandwidth = jnp.mean(_distances(anchors, u))
  new = Hash(anchors, hashed.weights, jnp.zeros_like(hashed.mean), bandwidth)
  new = new._replace(mean=jnp.mean(_features(new, u), axis=(0, 1)))
  x = _features(new, u)

  def loss(a, target, squash):
    h = squash(x @ a)
    terms = jnp.einsum("bt,bts,bs->b", h, target, h)
    return -jnp.mean(terms) / (length * bits)

  def one_bit(target, a):
    def descend(_, carry):
      a, momentum = carry
      slope = jax.grad(loss)(a, target, lambda y: jnp.tanh(y / 2))
      momentum = MOMENTUM * momentum + slope
      return a - rate * (slope + MOMENTUM * momentum), momentum

    best, _ = jax.lax.fori_loop(0, steps, descend, (a, jnp.zeros_like(a)))
    better = loss(best, target, _sign) < loss(a, target, _sign)
    a = jnp.where(better, best, a)
    h = _sign(x @ a)
    return target - h[:, :, None] * h[:, None, :], a

  target = bits * labels(jnp.einsum("btk,bsk->bts", u, u), min(top, length))
  return new._replace(weights=jax.lax.scan(one_bit, target, new.weights)[1])


def labels(similarity: jax.Array, top: int) -> jax.Array:
  """+1 for the `top` largest of every row of [..., T, T], −1 for the `top`
  smallest (which win where both hold), else 0."""
  rank = jnp.argsort(jnp.argsort(similarity, axis=-1), axis=-1)
  largest = rank >= similarity.shape[-1] - top
  return jnp.where(rank < top, -1.0, jnp.where(largest, 1.0, 0.0))


def _features(hashed, u):
  """κ(u) − μ: [..., M]."""
  kernel = jnp.exp(-_distances(hashed.anchors, u) / (2 * hashed.bandwidth))
  return kernel - hashed.mean


def _distances(anchors, u):
  squares = [jnp.sum(jnp.square(x), axis=-1) for x in (u, anchors)]
  return squares[0][..., None] + squares[1] - 2 * chunk.matmul(u, anchors.T)


def _sign(y):
  return jnp.where(y == 0, -1.0, jnp.sign(y))
