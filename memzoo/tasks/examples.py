"""Tasks on a finite set of examples."""

import dataclasses
import functools

import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.task import Batch

# Fixes which training examples are held out, whatever the seed of the run.
_HOLDOUT_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples(task_lib.Task):
  """Examples that can be read by their index, one target each.

  A concrete task writes `source_size` and `read`. Every epoch is shuffled, a
  pure function of (seed, split, epoch), and batches may straddle epochs.

  Attributes:
    holdout: so many training examples, the last of a fixed permutation, form
      the split 'validation' and are not trained on. 0: the validation split
      of the source, where it has one.
  """

  holdout: int = 0

  def __post_init__(self):
    task_lib.check_int(type(self).__name__, "holdout", self.holdout, 0)

  def source_size(self, split: str) -> int:
    """Number of examples the source has in a split; 0, no such split."""
    raise NotImplementedError(type(self).__name__)

  def read(self, split: str, indices: np.ndarray) -> Batch:
    """Examples of the source's split, [B] indices; `weights` are ones [B]."""
    raise NotImplementedError(type(self).__name__)

  def size(self, split: str) -> int:
    """Number of examples in a split, after the holdout."""
    task_lib.check_choice(type(self).__name__, "split", split, task_lib.SPLITS)
    if self.holdout and split != "test":
      total = self.source_size("train")
      if self.holdout >= total:
        raise ValueError(
          f"{type(self).__name__}: holdout must be below the {total} training"
          f" examples; got {self.holdout}"
        )
      return self.holdout if split == "validation" else total - self.holdout
    size = self.source_size(split)
    if not size:
      hint = "; set holdout=" if split == "validation" else ""
      raise ValueError(f"{self}: no examples in the split {split!r}{hint}")
    return size

  def _rows(self, split: str, indices: np.ndarray) -> Batch:
    if self.holdout and split != "test":
      order = _holdout_order(self.source_size("train"))
      if split == "validation":
        indices = indices + (len(order) - self.holdout)
      return self.read("train", order[indices])
    return self.read(split, indices)

  def batch(self, seed, step, batch_size, split="train"):
    task_lib.check_request(self, seed, step, batch_size, split)
    count = self.size(split)
    epoch, offset = sampling.locate(int(step), batch_size, count)
    order = sampling.epoch_order_jit(
      sampling.stream(seed, split, "order"), epoch, offset, batch_size, count
    )
    return self._rows(split, np.asarray(order).astype(np.int64))

  def eval_batches(self, batch_size, split="test"):
    task_lib.check_request(self, 0, 0, batch_size, split)
    return self._eval_batches(batch_size, split, self.size(split))

  def _eval_batches(self, batch_size, split, count):
    for first in range(0, count, batch_size):
      row = first + np.arange(batch_size)
      batch = self._rows(split, np.minimum(row, count - 1))
      yield batch._replace(weights=(row < count).astype(np.float32))


@functools.lru_cache(maxsize=4)
def _holdout_order(count: int) -> np.ndarray:
  order = sampling.epoch_order_jit(
    sampling.stream(_HOLDOUT_SEED, "holdout"),
    np.uint32(0),
    np.uint32(0),
    count,
    count,
  )
  return np.asarray(order).astype(np.int64)
