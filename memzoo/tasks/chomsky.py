"""What the tasks of the Chomsky hierarchy share."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chomsky(Generator, abc.ABC):
  """Read a string, then write a string that is a function of it.

  With n uniform in min_length..max_length, V = `symbols` and c =
  computation_steps, a row is

      s_1 ... s_n   c n computation tokens   A(n) empty tokens   padding

  and the answer, A(n) tokens, is read at the empty tokens: y_i is the target
  at the i-th. Empty is token V, or V + 1 where c > 0 and computation is V.
  T is the length of the longest row; shorter rows are padded on the right with
  token 0, and `mask` is False there. The answers of a row weigh 1 in sum, so
  accuracy is a mean over rows, hence over lengths. Where an answer ends with a
  token of its own, what comes after it is not asked.

  A concrete task writes `symbols`, `draw` and `solve`, and `answer_length`,
  `fit` and `num_words` where they are not the default.

  Attributes:
    min_length: least n.
    max_length: largest n. A model trained on 1..40 is tested at others by
      `make(name, min_length=41, max_length=500)`.
    computation_steps: c, a multiple of the length of the input.

  Presets: chomsky_{task}: n up to 40, the training of the paper; its score is
    the accuracy averaged over n = 41..500. The reference's example script
    trains in batches of 128 with Adam at 1e-3 and gradients clipped at norm 1,
    and tests 512 strings of each length. chomsky_{task}_small: n up to 16. Not
    a published setting.

  Differs: every row has a length of its own (the reference draws one for each
    batch); the loss leaves out the zeros after a terminating token (in the
    reference they count in the loss, not in the accuracy); symbols that the
    reference has in its vocabulary and never draws are left out.

  Paper: Deletang, Ruoss et al. 2023, Neural Networks and the Chomsky
    Hierarchy, arXiv:2207.02098.
  """

  kind: ClassVar[str] = "tokens"
  min_length: int = 1
  max_length: int = 40
  computation_steps: int = 0

  def __post_init__(self):
    super().__post_init__()
    owner = type(self).__name__
    task_lib.check_int(owner, "min_length", self.min_length, 1)
    task_lib.check_int(owner, "max_length", self.max_length, self.min_length)
    task_lib.check_int(owner, "computation_steps", self.computation_steps, 0)

  @property
  @abc.abstractmethod
  def symbols(self) -> int:
    """Number of symbols that strings are made of."""

  @abc.abstractmethod
  def draw(
    self, words: jax.Array, n: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array | int]:
    """A random string of length n and its answer.

    Args:
      words: random uint32 [num_words].
      n: int32 scalar, the value of `fit`.

    Returns:
      (string int32 [max_length], arbitrary but valid from n on; answer int32
      [answer_length(max_length)], likewise; how many of its tokens are asked).
    """

  @abc.abstractmethod
  def solve(self, string: list[int]) -> list[int]:
    """The tokens that are asked, from the string alone, in plain Python."""

  def answer_length(self, n):
    """A(n), the number of empty tokens."""
    del n
    return 1

  def fit(self, n):
    """The length of the string where n was drawn."""
    return n

  @property
  def num_words(self) -> int:
    """Number of random words that `draw` takes."""
    return self.max_length

  @property
  def empty(self) -> int:
    """The token at which an answer is read."""
    return self.symbols + (self.computation_steps > 0)

  @property
  def vocab_size(self) -> int:
    return self.empty + 1

  @property
  def length(self) -> int:
    longest = self.max_length
    return longest * (1 + self.computation_steps) + self.answer_length(longest)

  @property
  def chance(self) -> float:
    return 1 / self.num_outputs

  def example(self, key):
    first, words = sampling.words(key, 1, self.num_words)
    lengths = self.max_length - self.min_length + 1
    n = self.fit(self.min_length + sampling.below(first[0], lengths))
    string, answer, asked = self.draw(words, n)

    step = jnp.arange(self.length, dtype=jnp.int32)
    start = n * (1 + self.computation_steps)
    end = start + self.answer_length(n)
    string = jnp.pad(string, (0, self.length - self.max_length))
    tail = jnp.where(step < start, self.symbols, self.empty)
    inputs = jnp.where(step < n, string, tail)
    mask = step < end
    inputs = jnp.where(mask, inputs, 0).astype(jnp.int32)

    counted = (step >= start) & (step < start + asked)
    place = jnp.clip(step - start, 0, answer.shape[0] - 1)
    targets = jnp.where(counted, answer[place], 0)
    weights = jnp.where(counted, 1 / jnp.asarray(asked, jnp.float32), 0.0)
    return inputs, targets, weights, None, mask

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    predictions = np.zeros_like(inputs)
    for row, tokens in enumerate(inputs):
      n = int((tokens >= self.symbols).argmax())
      answer = self.solve(tokens[:n].tolist())
      start = n * (1 + self.computation_steps)
      predictions[row, start : start + len(answer)] = answer
    return predictions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Letters(Chomsky):
  """A task on uniform letters whose answer has as many, of the same alphabet.

  Attributes:
    alphabet: number of symbols.
    The others: see `Chomsky`.
  """

  alphabet: int = 2

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int(type(self).__name__, "alphabet", self.alphabet, 2)

  @property
  def symbols(self) -> int:
    return self.alphabet

  @property
  def num_outputs(self) -> int:
    return self.alphabet

  def answer_length(self, n):
    return n


def register(name: str, build, **options) -> None:
  """The preset of the paper, and one for a CPU."""
  task_lib.register(f"chomsky_{name}", build, **options)
  task_lib.register(f"chomsky_{name}_small", build, max_length=16, **options)
