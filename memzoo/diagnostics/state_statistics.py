"""Norm and rank of the state over time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core.cell import Cell
from memzoo.diagnostics import rollout


class StateStatistics(NamedTuple):
  """By leaf of the state, at times 0 (before the first input) to T."""

  norm: dict[str, np.ndarray]  # [T + 1]: Frobenius norm, mean over B
  rank: dict[str, np.ndarray]  # [T + 1]: of leaves with an axis or more
  largest: dict[str, int]  # the rank that is possible


def state_statistics(cell: Cell, params, xs, *, state=None) -> StateStatistics:
  """Norm and effective rank of every float leaf of the state.

  The rank of a leaf with two axes or more is `effective_rank` of its last
  two, averaged over the axes before (heads) and B. Of a vector it is the
  `participation_ratio` of its B values: at most B − 1.

  Args:
    cell: the memory.
    params: as `cell.init` made them, or trained.
    xs: [B, T, D].
    state: what every sequence starts from; None for the cell's first state.

  Raises:
    ValueError: where the cell has no state, and on inputs of wrong shape.
  """
  who = "state_statistics"
  rollout.check_inputs(who, cell, xs, 2)
  first = rollout.start(cell, params, state)
  rollout.check_state(who, cell, first)
  states = rollout.trajectory(cell, params, xs, first).states
  norm, rank, largest = {}, {}, {}
  for name, leaf in rollout.named_leaves(states).items():
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      continue
    leaf = _double(leaf)
    flat = leaf.reshape(*leaf.shape[:2], -1)
    norm[name] = np.linalg.norm(flat, axis=-1).mean(0)
    if leaf.ndim >= 4:
      ranks = effective_rank(leaf)
      rank[name] = ranks.mean(axis=(0, *range(2, ranks.ndim)))
      largest[name] = min(leaf.shape[-2:])
    elif leaf.ndim == 3:
      rank[name] = participation_ratio(np.swapaxes(leaf, 0, 1))
      largest[name] = min(leaf.shape[0] - 1, leaf.shape[2])
  return StateStatistics(norm, rank, largest)


def effective_rank(matrices) -> np.ndarray:
  """exp of the entropy of the normalised singular values of [..., K, V].

    p_i = σ_i / Σ_j σ_j ,  rank = exp(−Σ_i p_i log p_i)

  From 1 to min(K, V), and 0 for a matrix of zeros. Roy and Vetterli 2007,
  "The effective rank: a measure of effective dimensionality", EUSIPCO.
  """
  sigma = np.linalg.svd(_double(matrices), compute_uv=False)
  total = sigma.sum(-1, keepdims=True)
  p = sigma / np.where(total > 0, total, 1)
  entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
  return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def participation_ratio(vectors) -> np.ndarray:
  """(tr C)² / tr C² of the covariance C of B vectors [..., B, N].

  The number of directions over which their variance is spread: from 1 to
  min(B − 1, N), and 0 where they are equal.
  """
  vectors = _double(vectors)
  centred = vectors - vectors.mean(-2, keepdims=True)
  power = np.linalg.svd(centred, compute_uv=False) ** 2
  total, square = power.sum(-1), (power**2).sum(-1)
  # Equal vectors differ from their mean by rounding.
  size = np.square(np.abs(vectors)).sum((-2, -1))
  varies = total > 1e-24 * size
  return np.where(varies, total**2 / np.where(varies, square, 1), 0.0)


def _double(x) -> np.ndarray:
  x = np.asarray(jax.device_get(x))
  return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
