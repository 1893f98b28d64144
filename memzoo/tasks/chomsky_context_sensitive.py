"""Context-sensitive tasks of the Chomsky hierarchy, on strings."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from memzoo.tasks import chomsky, sampling
from memzoo.tasks.chomsky import Chomsky, Letters


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicateString(Letters):
  """Return a random string twice; A(n) = 2n.

  Attributes:
    alphabet: number of symbols.
    The others, layout, Differs: see `Chomsky`.

  Presets: chomsky_duplicate_string (2 symbols),
    chomsky_duplicate_string_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  def answer_length(self, n):
    return 2 * n

  def draw(self, words, n):
    string = sampling.below(words, self.alphabet)
    place = jnp.arange(2 * self.max_length, dtype=jnp.int32)
    return string, string[place % n], 2 * n

  def solve(self, string):
    return string + string


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissingDuplicateString(Chomsky):
  """Find the bit that is missing in a string that comes twice.

  A random bit string of length n // 2 comes twice, with a uniform one of its
  2 (n // 2) bits replaced by symbol 2; symbol 3 fills up an odd n. Where n is
  1, the string is 1 and so is the answer.

  Attributes, layout, Differs: see `Chomsky`.

  Presets: chomsky_missing_duplicate_string,
    chomsky_missing_duplicate_string_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  symbols: ClassVar[int] = 4
  num_outputs: ClassVar[int] = 2

  @property
  def num_words(self) -> int:
    return self.max_length + 1

  def draw(self, words, n):
    half = jnp.maximum(n // 2, 1)
    place = jnp.arange(self.max_length, dtype=jnp.int32)
    string = sampling.below(words[1:], 2)[place % half]
    hole = sampling.below(words[0], 2 * half)
    answer = jnp.where(n == 1, 1, string[jnp.minimum(hole, n - 1)])
    string = jnp.where(place == hole, 2, string)
    string = jnp.where(place == 2 * half, 3, string)
    return jnp.where(n == 1, 1, string), answer[None], 1

  def solve(self, string):
    half = len(string) // 2
    if not half:
      return [1]
    return [string[(string.index(2) + half) % (2 * half)]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OddsFirst(Letters):
  """Return the first, third ... symbol, then the second, fourth ...; A(n) = n.

  Attributes:
    alphabet: number of symbols.
    The others, layout: see `Chomsky`.

  Presets: chomsky_odds_first (2 symbols), chomsky_odds_first_small.

  Differs: as for `Chomsky`; the reference's code counts from 0, so that it
    returns the second, fourth ... symbol first, against its own definition and
    examples, which are followed here.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  def draw(self, words, n):
    string = sampling.below(words, self.alphabet)
    place = jnp.arange(self.max_length, dtype=jnp.int32)
    odds = (n + 1) // 2
    source = jnp.where(place < odds, 2 * place, 2 * (place - odds) + 1)
    return string, string[jnp.minimum(source, n - 1)], n

  def solve(self, string):
    return string[::2] + string[1::2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketSort(Letters):
  """Return the symbols of a random string in ascending order; A(n) = n.

  Attributes:
    alphabet: number of symbols.
    The others, layout, Differs: see `Chomsky`.

  Presets: chomsky_bucket_sort (5 symbols), chomsky_bucket_sort_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  alphabet: int = 5

  def draw(self, words, n):
    string = sampling.below(words, self.alphabet)
    place = jnp.arange(self.max_length, dtype=jnp.int32)
    least = jnp.sort(jnp.where(place < n, string, self.alphabet))
    return string, jnp.minimum(least, self.alphabet - 1), n

  def solve(self, string):
    return sorted(string)


chomsky.register("duplicate_string", DuplicateString)
chomsky.register("missing_duplicate_string", MissingDuplicateString)
chomsky.register("odds_first", OddsFirst)
chomsky.register("bucket_sort", BucketSort)
