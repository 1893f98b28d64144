"""Byte-level language modelling of a local file."""

import dataclasses
import functools
import os

import numpy as np

from memzoo.tasks import task as task_lib
from memzoo.tasks.byte_stream import ByteStream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(ByteStream):
  """Predict the next byte of any file.

  The file is mapped, not loaded: it may be larger than the memory. The splits
  are contiguous: training bytes first, then validation, then test.

  Attributes:
    path: the file.
    length: T.
    mode: 'stream' (memory is carried over batches) or 'window': see
      `ByteStream`.
    splits: shares of the three splits, 1 in sum. The default is the custom of
      enwik8 and text8.

  Preset: text.
  """

  path: str
  splits: tuple[float, float, float] = (0.9, 0.05, 0.05)

  def __post_init__(self):
    super().__post_init__()
    try:
      shares = tuple(float(share) for share in self.splits)
      good = len(shares) == 3 and min(shares) >= 0
      good = good and abs(sum(shares) - 1) < 1e-6
    except (TypeError, ValueError):
      good = False
    if not good:
      raise ValueError(
        "Text: splits must be three shares of at least 0 and 1 in sum; got"
        f" {self.splits!r}"
      )
    object.__setattr__(self, "splits", shares)
    object.__setattr__(self, "path", os.fspath(self.path))
    size = _size(self.path)
    if size < self.length + 1:
      what = "is empty" if not size else f"has {size} bytes"
      raise ValueError(
        f"Text: {self.path!r} {what}; length {self.length} needs at least"
        f" {self.length + 1} bytes"
      )

  def contents(self, split):
    task_lib.check_choice("Text", "split", split, task_lib.SPLITS)
    data = _open(self.path, os.stat(self.path).st_mtime_ns, _size(self.path))
    train, validation, _ = self.splits
    size = len(data)
    cuts = [0, round(size * train), round(size * (train + validation)), size]
    which = task_lib.SPLITS.index(split)
    return data[cuts[which] : cuts[which + 1]], np.zeros(1, np.int64)


def _size(path: str) -> int:
  if not os.path.exists(path):
    raise FileNotFoundError(f"Text: there is no file {path!r}")
  if not os.path.isfile(path):
    raise ValueError(f"Text: {path!r} is not a file")
  return os.path.getsize(path)


@functools.lru_cache(maxsize=8)
def _open(path: str, mtime: int, size: int) -> np.ndarray:
  del mtime, size  # A file that changed is mapped anew.
  return np.memmap(path, dtype=np.uint8, mode="r")


task_lib.register("text", Text)
