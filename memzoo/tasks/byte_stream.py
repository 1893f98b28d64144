"""Language modelling of a long string of bytes."""

import abc
import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.task import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteStream(task_lib.Task, abc.ABC):
  """Predict the next byte. A concrete task writes `contents`.

  Mode 'stream': the N bytes of a split are cut into B lanes of N // B. Row b
  reads its lane from left to right, `length` bytes a step, the next batch
  where this one stopped, so memory is carried over. An epoch begins with a
  reset, at a phase (bytes skipped in every lane, about one `length` at most)
  that is a function of (seed, epoch).

  Mode 'window': every row is a window at a uniform position, drawn with
  replacement, a function of (seed, step, row); nothing is carried over.

  Where the split holds several documents, the memory is reset at the first
  byte of each, and no first byte is asked for.

  `eval_batches` asks for every byte of the split but the first once: in mode
  'stream' over B lanes with memory carried over, in mode 'window' in adjacent
  windows that start afresh.

  Attributes:
    length: T.
    mode: 'stream' or 'window'.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: ClassVar[int] = 256
  num_outputs: ClassVar[int] = 256
  chance: ClassVar[float] = 1 / 256

  length: int = 256
  mode: str = "stream"

  def __post_init__(self):
    owner = type(self).__name__
    task_lib.check_int(owner, "length", self.length, 1)
    task_lib.check_choice(owner, "mode", self.mode, ("stream", "window"))

  @property
  def streams(self) -> bool:
    return self.mode == "stream"

  @abc.abstractmethod
  def contents(self, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split's bytes, uint8 [N], and where its documents begin, int64."""

  def _contents(self, split, rows):
    data, starts = self.contents(split)
    need = rows * (self.length + 1)
    if len(data) < need:
      raise ValueError(
        f"{self}: the {split} split has {len(data)} bytes; {rows} rows of"
        f" length {self.length} need {need}"
      )
    return data, starts

  def batch(self, seed, step, batch_size, split="train"):
    task_lib.check_request(self, seed, step, batch_size, split)
    step = int(step)
    if self.mode == "window":
      data, starts = self._contents(split, 1)
      key = sampling.stream(seed, split, "window")
      key = jax.random.fold_in(key, np.uint32(step % 2**32))
      words = np.asarray(_words(key, batch_size)).astype(np.uint64)
      words = words[:, 0] << np.uint64(32) | words[:, 1]
      first = (words % np.uint64(len(data) - self.length)).astype(np.int64)
      return self._read(data, starts, first, np.zeros(batch_size, bool))
    data, starts = self._contents(split, batch_size)
    lane = len(data) // batch_size
    chunks = max(1, (lane - self.length) // self.length)
    epoch, chunk = divmod(step, chunks)
    key = sampling.stream(seed, split, "phase")
    key = jax.random.fold_in(key, np.uint32(epoch % 2**32))
    slack = lane - 1 - chunks * self.length
    phase = int(_words(key, 1)[0, 0]) % (slack + 1)
    first = np.arange(batch_size) * lane + phase + chunk * self.length
    fresh = np.full(batch_size, chunk == 0)
    return self._read(data, starts, first, fresh)

  def eval_batches(self, batch_size, split="test"):
    task_lib.check_request(self, 0, 0, batch_size, split)
    data, starts = self._contents(split, 1)
    return self._eval_batches(data, starts, batch_size)

  def _eval_batches(self, data, starts, rows):
    total = len(data) - 1
    if self.mode == "window":
      first = np.arange(0, total, self.length)
      none = np.zeros(rows, bool)
      for i in range(0, len(first), rows):
        part = first[i : i + rows]
        part = np.append(part, np.full(rows - len(part), total))
        yield self._read(data, starts, part, none, total)
      return
    lane = -(-total // rows)
    begin = np.minimum(np.arange(rows) * lane, total)
    end = np.minimum(begin + lane, total)
    for chunk in range(-(-lane // self.length)):
      first = np.minimum(begin + chunk * self.length, end)
      yield self._read(data, starts, first, np.full(rows, chunk == 0), end)

  def _read(self, data, starts, first, fresh, end=None) -> Batch:
    """Rows of `length` bytes from `first` [B]; inputs before `end` count."""
    rows, length = len(first), self.length
    tokens = np.zeros((rows, length + 1), np.int32)
    place = first[:, None] + np.arange(length + 1)
    for row, begin in enumerate(first):
      part = data[begin : begin + length + 1]
      tokens[row, : len(part)] = part
    begins = np.isin(place, _between(starts, place))
    weights = ~begins[:, 1:]
    if end is not None:
      weights &= place[:, :-1] < np.broadcast_to(end, (rows,))[:, None]
    reset = None
    if self.streams or len(starts) > 1:
      reset = begins[:, :-1].copy()
      reset[:, 0] |= fresh
    return Batch(
      inputs=tokens[:, :-1].copy(),
      targets=tokens[:, 1:].copy(),
      weights=weights.astype(np.float32),
      reset=reset,
    )


def _between(starts: np.ndarray, place: np.ndarray) -> np.ndarray:
  """The document starts that lie in any of the rows of `place`."""
  low = np.searchsorted(starts, place[:, 0])
  high = np.searchsorted(starts, place[:, -1], side="right")
  return np.concatenate([starts[i:j] for i, j in zip(low, high)])


@functools.partial(jax.jit, static_argnames="rows")
def _words(key, rows: int) -> jax.Array:
  """uint32 [rows, 2]; row i depends on (key, i) alone."""
  row = jnp.arange(rows, dtype=jnp.uint32)
  return jax.vmap(
    lambda i: jax.random.bits(jax.random.fold_in(key, i), (2,), jnp.uint32)
  )(row)
