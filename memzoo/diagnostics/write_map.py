"""What each step wrote."""

from typing import NamedTuple

import jax
import numpy as np

from memzoo.core.cell import Cell
from memzoo.diagnostics import rollout


class WriteMap(NamedTuple):
  """By leaf of the state: what changed at each of T inputs."""

  difference: dict[str, np.ndarray]  # [B, T, ...]: state after − state before
  norm: dict[str, np.ndarray]  # [B, T]: of the difference
  changed: dict[str, np.ndarray]  # [B, T]: share of the entries that changed


def write_map(
  cell: Cell, params, xs, *, state=None, tolerance: float = 1e-6
) -> WriteMap:
  """The difference that every input makes in the state, and how sparse it is.

  Decay counts as a change too: it rewrites every entry.

  Args:
    cell: the memory.
    params: as `cell.init` made them, or trained.
    xs: [B, T, D].
    state: what every sequence starts from; None for the cell's first state.
    tolerance: an entry has changed where it moved by more than this share of
      the largest entry of its leaf in that sequence.

  Raises:
    ValueError: where the cell has no state, and on inputs of wrong shape.
  """
  who = "write_map"
  rollout.check_inputs(who, cell, xs, 2)
  first = rollout.start(cell, params, state)
  rollout.check_state(who, cell, first)
  states = rollout.trajectory(cell, params, xs, first).states
  difference, norm, changed = {}, {}, {}
  for name, leaf in rollout.named_leaves(states).items():
    leaf = np.asarray(jax.device_get(leaf))
    kind = leaf.dtype.kind
    if kind != "c":
      leaf = leaf.astype(np.int64 if kind in "iub" else np.float64)
    moved = leaf[:, 1:] - leaf[:, :-1]
    flat = np.abs(moved).reshape(*moved.shape[:2], -1)
    size = np.abs(leaf).reshape(len(leaf), -1).max(1)[:, None, None]
    difference[name] = moved
    norm[name] = np.linalg.norm(flat, axis=-1)
    changed[name] = (flat > tolerance * size).mean(-1)
  return WriteMap(difference, norm, changed)
