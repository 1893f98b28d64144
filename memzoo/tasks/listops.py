"""ListOps: nested operations on lists of digits."""

import dataclasses
from typing import ClassVar

import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.task import Batch

_MIN, _MAX, _MEDIAN, _SUM, _END, _PAD = range(10, 16)
_MOST_DRAWS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListOps(task_lib.Task):
  """Evaluate nested minima, maxima, medians and sums modulo 10.

  A row is a tree, written from the root: a node is an operation with
  probability 1/4, at depth max_depth never (the root has depth 1), and else a
  uniform digit. An operation is uniform among the four and has a uniform
  number of nodes, 2..max_args, below it. It is written as its token, what is
  below it, and an end token. Trees of which the tokens are not more than
  min_length and less than max_length are drawn again.

  Tokens 0..9 are the digits, 10..13 the operations minimum, maximum, median
  (rounded down) and sum, 14 the end of a list, 15 padding on the right, where
  `mask` is False. T = max_length - 1. The class of a row is its value, 0..9.

  Rows are made by NumPy on the host, row i from (seed, split, i) alone.

  Attributes:
    min_length: rows have more tokens than this.
    max_length: rows have fewer tokens than this.
    max_depth: most nodes from the root to a leaf.
    max_args: most nodes below an operation.
    num_train: size of the training set, which is shuffled anew each epoch;
      None: fresh rows for ever.
    num_test: size of the validation set and of the test set. They do not
      depend on the seed of the run.

  Presets:
    lra_listops: of the Long Range Arena: 500 to 2,000 tokens, depth and
      operands up to 10, 96,000 training rows, 2,000 for validation and test.
    listops_small: 8 to 64 tokens, depth up to 4, up to 5 operands, fresh rows
      for ever. Not a published setting.

  Differs: the training set depends on the seed; rows are not compared with
    each other (the reference drops repeated trees). The end of a list is a
    token, as in the corrected reference, whose first release dropped it.

  Paper: Tay et al. 2021, Long Range Arena, arXiv:2011.04006;
    Nangia and Bowman 2018, ListOps, arXiv:1804.06028.
  """

  kind: ClassVar[str] = "classification"
  vocab_size: ClassVar[int] = 16
  num_outputs: ClassVar[int] = 10
  chance: ClassVar[float] = 0.1

  min_length: int = 500
  max_length: int = 2000
  max_depth: int = 10
  max_args: int = 10
  num_train: int | None = None
  num_test: int = 1024

  def __post_init__(self):
    check = lambda name, *limits: task_lib.check_int(
      "ListOps", name, getattr(self, name), *limits
    )
    check("min_length", 1)
    # Among any three successive lengths there is that of a tree.
    check("max_length", max(self.min_length, 2) + 4)
    check("max_depth", 2)
    check("max_args", 2)
    if self.num_train is not None:
      check("num_train", 1, 2**31 - 1)
    check("num_test", 1, 2**31 - 1)

  @property
  def length(self) -> int:
    return self.max_length - 1

  def batch(self, seed, step, batch_size, split="train"):
    task_lib.check_request(self, seed, step, batch_size, split)
    count = self.num_train if split == "train" else None
    epoch, offset = sampling.locate(int(step), batch_size, count)
    if count is None:
      index = (int(offset) + np.arange(batch_size)) % 2**32
    else:
      order = sampling.stream(seed, split, "order")
      index = sampling.epoch_order_jit(order, epoch, offset, batch_size, count)
    return self._rows(int(seed), split, np.asarray(index))

  def eval_batches(self, batch_size, split="test"):
    task_lib.check_request(self, 0, 0, batch_size, split)
    return self._eval_batches(batch_size, split)

  def _eval_batches(self, batch_size, split):
    for first in range(0, self.num_test, batch_size):
      index = first + np.arange(batch_size)
      batch = self._rows(0, split, index)
      counted = (index < self.num_test).astype(np.float32)
      yield batch._replace(weights=counted)

  def oracle(self, batch):
    """Reads a row from left to right, with a stack of open lists."""
    operation = {
      _MIN: min,
      _MAX: max,
      _MEDIAN: lambda digits: int(np.median(digits)),
      _SUM: lambda digits: sum(digits) % 10,
    }
    predictions = []
    for row in np.asarray(batch.inputs).tolist():
      stack = [[]]
      for token in row:
        if token in operation:
          stack.append([token])
        elif token == _END:
          name, *digits = stack.pop()
          stack[-1].append(operation[name](digits))
        elif token != _PAD:
          stack[-1].append(token)
      predictions.append(stack[0][0])
    return np.array(predictions, np.int32)

  def _rows(self, seed, split, index) -> Batch:
    rows = len(index)
    inputs = np.full((rows, self.length), _PAD, np.int32)
    targets = np.zeros(rows, np.int32)
    for row, i in enumerate(index.tolist()):
      stream = seed << 32 | int(sampling.tag(split))
      tokens, targets[row] = self._tree(np.random.Philox(key=[stream, i]))
      inputs[row, : len(tokens)] = tokens
    weights = np.ones(rows, np.float32)
    return Batch(inputs, targets, weights, None, inputs != _PAD)

  def _tree(self, bits: np.random.Philox) -> tuple[np.ndarray, int]:
    """The tokens of one accepted tree, and its value."""
    for _ in range(_MOST_DRAWS):
      levels = self._levels(bits)
      if levels is not None:
        return _write(levels)
    raise ValueError(
      f"ListOps: no tree in {_MOST_DRAWS} has more than min_length ="
      f" {self.min_length} tokens and fewer than max_length ="
      f" {self.max_length}: raise max_depth or max_args, or widen the range"
    )

  def _levels(self, bits: np.random.Philox):
    """The nodes of a tree, level by level: (tokens, numbers of operands).

    None if the tree has too many tokens or too few.
    """
    levels, nodes, written = [], 1, 0
    for depth in range(1, self.max_depth + 1):
      words = bits.random_raw(nodes)
      operation = (words >> np.uint64(62)) == 0
      if depth == self.max_depth:
        operation[:] = False
      # Fields of 24, 24 and 2 bits: unlike remainders, they do not overlap.
      low = (words & np.uint64(2**24 - 1)).astype(np.int64)
      high = ((words >> np.uint64(24)) & np.uint64(2**24 - 1)).astype(np.int64)
      operands = np.where(operation, 2 + high % (self.max_args - 1), 0)
      tokens = np.where(operation, _MIN + low % 4, low % 10)
      levels.append((tokens, operands))
      written += nodes + int(operation.sum())
      nodes = int(operands.sum())
      if written + nodes >= self.max_length:
        return None
      if not nodes:
        break
    return levels if written > self.min_length else None


def _write(levels) -> tuple[np.ndarray, int]:
  """A tree as tokens, and its value."""
  # From the leaves up: how many tokens a node takes, and what it is worth.
  sizes, values = [], []
  below_size = below_value = np.zeros(0, np.int64)
  for tokens, operands in reversed(levels):
    size, value = np.ones(len(tokens), np.int64), tokens.copy()
    inner = np.flatnonzero(operands)
    if len(inner):
      first = np.cumsum(operands[inner]) - operands[inner]
      size[inner] = 2 + np.add.reduceat(below_size, first)
      value[inner] = _evaluate(
        tokens[inner], np.split(below_value, first[1:].tolist())
      )
    sizes.append(size)
    values.append(value)
    below_size, below_value = size, value
  sizes.reverse()
  # From the root down: where a node begins.
  text = np.zeros(int(sizes[0][0]), np.int32)
  start = np.zeros(1, np.int64)
  for depth, (tokens, operands) in enumerate(levels):
    text[start] = tokens
    inner = operands > 0
    text[(start + sizes[depth] - 1)[inner]] = _END
    if inner.any():
      size = sizes[depth + 1]
      ahead = np.cumsum(size) - size
      first = np.cumsum(operands[inner]) - operands[inner]
      shift = (start + 1)[inner] - ahead[first]
      start = ahead + np.repeat(shift, operands[inner])
  return text, int(values[-1][0])


def _evaluate(operations, lists) -> list[int]:
  """The value of each operation on its list of digits."""
  results = []
  for operation, digits in zip(operations.tolist(), lists):
    digits = sorted(digits.tolist())
    if operation == _MIN:
      results.append(digits[0])
    elif operation == _MAX:
      results.append(digits[-1])
    elif operation == _MEDIAN:
      middle = len(digits) // 2
      results.append((digits[middle] + digits[-1 - middle]) // 2)
    else:
      results.append(sum(digits) % 10)
  return results


task_lib.register("lra_listops", ListOps, num_train=96_000, num_test=2000)
task_lib.register(
  "listops_small",
  ListOps,
  min_length=8,
  max_length=65,
  max_depth=4,
  max_args=5,
)
