"""Rows of generated text that end in an answer, made on the host."""

import abc
from collections import Counter
from collections.abc import Iterable, Sequence
import dataclasses
from typing import ClassVar

import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.task import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRows(task_lib.Task, abc.ABC):
  """Read a context and a question, then predict the answer, byte by byte.

  A row is the text `context question answer` of N symbols, N at most
  T = length: inputs[t] is symbol t and targets[t] is symbol t + 1. The weight
  is 1 where symbol t + 1 belongs to an answer, 0 elsewhere, so the accuracy is
  the share of right answer symbols, each predicted from the true symbols
  before it. From N on there are zeros, of mask False.

  Row i is a function of (seed, split, i) alone. It is made by NumPy on the
  host, so `step` is an integer. A concrete task writes `row` and `solve`;
  symbols are bytes unless it also writes `encode` and `vocab_size`.

  Attributes:
    length: T.
    num_train: size of the training set, which is shuffled anew each epoch;
      None: fresh rows for ever.
    num_test: size of the validation set and of the test set. They do not
      depend on the seed of the run.
  """

  kind: ClassVar[str] = "tokens"

  length: int
  num_train: int | None = None
  num_test: int = 500

  def __post_init__(self):
    owner = type(self).__name__
    task_lib.check_int(owner, "length", self.length, 1)
    if self.num_train is not None:
      task_lib.check_int(owner, "num_train", self.num_train, 1, 2**31 - 1)
    task_lib.check_int(owner, "num_test", self.num_test, 1, 2**31 - 1)

  @property
  def vocab_size(self) -> int:
    return 256

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @abc.abstractmethod
  def row(self, draws: "Draws") -> list[tuple[bytes, bool]]:
    """The text of one row in pieces, and whether each is asked for."""

  @abc.abstractmethod
  def solve(self, symbols: np.ndarray) -> tuple[int, bytes]:
    """Where the answer begins in a row, and the answer, from what is before.

    Args:
      symbols: int32 [T], the inputs of a row. The answer that they hold is
        not to be read.
    """

  def encode(self, text: bytes) -> np.ndarray:
    """The symbols of a text, int32 [N]."""
    return np.frombuffer(text, np.uint8).astype(np.int32)

  def batch(self, seed, step, batch_size, split="train"):
    task_lib.check_request(self, seed, step, batch_size, split)
    first = int(step) * batch_size
    index = range(first, first + batch_size)
    if split == "train" and self.num_train is not None:
      epoch, offset = sampling.locate(int(step), batch_size, self.num_train)
      key = sampling.stream(seed, "order", split)
      index = sampling.epoch_order_jit(
        key, epoch, offset, batch_size, self.num_train
      )
      index = np.asarray(index).tolist()
    return self._rows(seed, split, index, batch_size)

  def eval_batches(self, batch_size, split="test"):
    task_lib.check_request(self, 0, 0, batch_size, split)
    return self._eval_batches(batch_size, split)

  def _eval_batches(self, batch_size, split):
    for first in range(0, self.num_test, batch_size):
      index = range(first, first + batch_size)
      yield self._rows(0, split, index, self.num_test - first)

  def _rows(self, seed, split, index: Iterable[int], count: int) -> Batch:
    """The rows of `index`; the first `count` of them have weights."""
    index = list(index)
    inputs = np.zeros((len(index), self.length), np.int32)
    targets = np.zeros_like(inputs)
    weights = np.zeros(inputs.shape, np.float32)
    mask = np.zeros(inputs.shape, bool)
    tag = int(sampling.tag(split))
    for i, number in enumerate(index):
      pieces = [
        (self.encode(text), asked)
        for text, asked in self.row(Draws(tag, int(seed), number))
      ]
      symbols = np.concatenate([part for part, _ in pieces])
      asked = np.concatenate([np.full(len(p), asked) for p, asked in pieces])
      inputs[i, : len(symbols)] = symbols
      targets[i, : len(symbols) - 1] = symbols[1:]
      mask[i, : len(symbols)] = True
      if i < count:
        weights[i, : len(symbols) - 1] = asked[1:]
    return Batch(inputs=inputs, targets=targets, weights=weights, mask=mask)

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    predictions = np.zeros_like(inputs)
    for prediction, symbols in zip(predictions, inputs):
      begin, answer = self.solve(symbols)
      answer = self.encode(answer)
      prediction[begin - 1 : begin - 1 + len(answer)] = answer
    return predictions


class Draws:
  """Random numbers of one row, a pure function of the numbers it is named by.

  They are built on the raw words of Philox, which NumPy keeps from version to
  version; its distributions may change.
  """

  def __init__(self, *name: int):
    self._source = np.random.Philox(np.random.SeedSequence(name))
    self._words = []

  def below(self, high: int) -> int:
    """A uniform integer of [0, high); by remainder of 64 bits."""
    if not self._words:
      self._words = self._source.random_raw(64).tolist()
    return self._words.pop() % high

  def pick(self, items: Sequence):
    """One of the items."""
    return items[self.below(len(items))]

  def sample(self, high: int, size: int) -> list[int]:
    """Distinct integers of [0, high), in random order."""
    cards = {}
    drawn = []
    for i in range(size):
      j = i + self.below(high - i)
      drawn.append(cards.get(j, j))
      cards[j] = cards.get(i, i)
    return drawn

  def shuffled(self, items: Sequence) -> list:
    """The items in random order."""
    return [items[i] for i in self.sample(len(items), len(items))]


def guess(answers: Sequence) -> float:
  """Share of right symbols when a random answer stands for another.

  Args:
    answers: the possible answers, as sequences of symbols, equally likely.
  """
  right = 0.0
  for place in range(max(map(len, answers))):
    found = Counter(a[place] for a in answers if len(a) > place)
    right += sum((n / len(answers)) ** 2 for n in found.values())
  return right / (sum(map(len, answers)) / len(answers))
