"""The tasks on binary numbers, context-sensitive ones."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import chomsky, sampling
from memzoo.tasks.chomsky import Chomsky


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Binary(Chomsky):
  """A function of two binary numbers, lowest digit first, joined by symbol 2.

  The first number has a uniform number of digits in 1..n-2, the second the
  other n - 1; each is uniform but not 0. The answer has no zeros at its end
  and is followed by token 2.
  """

  symbols: ClassVar[int] = 3
  num_outputs: ClassVar[int] = 3

  @property
  def num_words(self) -> int:
    return self.max_length + 1

  def _operands(self, words, n):
    """The string, and its numbers int32 [L], lowest digit first, 0 after."""
    words, first = words[1:], words[0]
    place = jnp.arange(self.max_length, dtype=jnp.int32)
    size = 1 + sampling.below(first, jnp.maximum(n - 2, 1))
    size = jnp.where(n > 2, size, n)
    a = _nonzero(words, place < size)
    b = _nonzero(words, (place > size) & (place < n))
    # Up to two digits there is no second number, and 0 replaces the largest.
    a = jnp.where((n > 2) | (place >= n), a, 1 - a)
    string = jnp.where(place == size, 2, a + b)
    shifted = jnp.minimum(size + 1 + place, self.max_length - 1)
    b = jnp.where(size + 1 + place < n, b[shifted], 0)
    return string, a, b

  def _result(self, digits, least):
    """The digits but for the zeros at the end, token 2, and their number."""
    place = jnp.arange(digits.shape[0], dtype=jnp.int32)
    size = jnp.max(jnp.where(digits > 0, place + 1, least))
    return jnp.where(place == size, 2, digits), size + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryAddition(_Binary):
  """Add two binary numbers, lowest digit first, joined by symbol 2.

  The first has a uniform number of digits in 1..n-2, the second the other
  ones of the n - 1; each is uniform but not 0. The answer is the sum without
  zeros at its end, then token 2; A(n) = n + 1. Where n is 1 or 2, the string
  is one uniform number below 2^n - 1, and so is the answer.

  Attributes, layout, Differs: see `Chomsky`.

  Presets: chomsky_binary_addition, chomsky_binary_addition_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  def answer_length(self, n):
    return n + 1

  def draw(self, words, n):
    string, a, b = self._operands(words, n)
    digits = _carry(jnp.pad(a + b, (0, 1)))
    return string, *self._result(digits, 1)

  def solve(self, string):
    first, second = _numbers(string)
    return _digits(first + second) + [2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryMultiplication(_Binary):
  """Multiply two binary numbers, lowest digit first, joined by symbol 2.

  Strings are those of `BinaryAddition`. The answer is the product without
  zeros at its end, then token 2; A(n) = n. Where n is 1 or 2, the answer is
  n - 1 zeros, then token 2.

  Attributes, layout, Differs: see `Chomsky`.

  Presets: chomsky_binary_multiplication, chomsky_binary_multiplication_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  def answer_length(self, n):
    return n

  def draw(self, words, n):
    string, a, b = self._operands(words, n)
    place = jnp.arange(self.max_length, dtype=jnp.int32)
    other = place[:, None] - place
    table = jnp.where(other >= 0, b[jnp.maximum(other, 0)], 0)
    digits = _carry(jnp.sum(table * a, axis=1, dtype=jnp.int32))
    return string, *self._result(digits, jnp.minimum(n - 1, 1))

  def solve(self, string):
    if len(string) <= 2:
      return [0] * (len(string) - 1) + [2]
    first, second = _numbers(string)
    return _digits(first * second) + [2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeSqrt(Chomsky):
  """The square root of a binary number, rounded down, highest digit first.

  The number is uniform in 1..2^n-1; A(n) = (n + 1) // 2 digits.

  Attributes, layout, Differs: see `Chomsky`.

  Presets: chomsky_compute_sqrt, chomsky_compute_sqrt_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  symbols: ClassVar[int] = 2
  num_outputs: ClassVar[int] = 2

  def answer_length(self, n):
    return (n + 1) // 2

  def draw(self, words, n):
    place = jnp.arange(self.max_length, dtype=jnp.int32)
    string = _nonzero(words, place < n)
    most = (self.max_length + 1) // 2
    # Highest digit first, filled up with zeros on the left.
    source = jnp.arange(2 * most, dtype=jnp.int32) - (2 * most - n)
    digits = jnp.where(source >= 0, string[jnp.maximum(source, 0)], 0)
    root = _root(digits)
    asked = (n + 1) // 2
    place = place[:most]
    return string, root[jnp.minimum(most - asked + place, most - 1)], asked

  def solve(self, string):
    root = math.isqrt(int("".join(map(str, string)), 2))
    return [int(c) for c in f"{root:b}".zfill((len(string) + 1) // 2)]


def _nonzero(words: jax.Array, here: jax.Array) -> jax.Array:
  """Uniform bits where `here`, not all 0; 0 elsewhere.

  The 32 bit planes of the words are 32 draws: the first that is not all 0 is
  taken. Ones all over, if there is none (probability 2^-32 at most).
  """
  words = jnp.where(here, words, jnp.uint32(0))
  planes = jax.lax.reduce(words, np.uint32(0), jax.lax.bitwise_or, (0,))
  first = planes & (~planes + jnp.uint32(1))
  bits = (words & first) != 0
  return jnp.where(here & (bits | (first == 0)), 1, 0).astype(jnp.int32)


def _carry(sums: jax.Array) -> jax.Array:
  """Binary digits, lowest first, of the number sum_i sums_i 2^i."""

  def add(carry, item):
    total = carry + item
    return total >> 1, total & 1

  return jax.lax.scan(add, jnp.int32(0), sums)[1]


def _root(digits: jax.Array) -> jax.Array:
  """Square root, rounded down, of a number of 2 R digits, highest first.

  Digit by digit: with remainder r and root q so far, and the next two digits
  d, r becomes 4r + d, less 4q + 1 where that is not above it; the next digit
  of q says so. Borrows need no chain: at each place, the nearest lower place
  where the two numbers differ decides.

  Args:
    digits: int32 [2 R].

  Returns:
    int32 [R], highest digit first.
  """
  rounds = digits.shape[0] // 2
  # Lowest digit first; r is at most 2q, so 4r + 3 fits in R + 2 digits.
  place = jnp.arange(rounds + 2, dtype=jnp.int32)

  def extend(i, carry):
    rest, root = carry
    pair = jax.lax.dynamic_slice(digits, (2 * i,), (2,))
    rest = jnp.concatenate([pair[::-1], rest[:-2]])
    trial = jnp.concatenate([jnp.array([1, 0], jnp.int32), root[:-2]])
    last = jax.lax.cummax(jnp.where(rest != trial, place, -1))
    enough = (last[-1] < 0) | (rest[last[-1]] == 1)
    below = jnp.concatenate([jnp.full((1,), -1, jnp.int32), last[:-1]])
    borrow = jnp.where(below >= 0, trial[jnp.maximum(below, 0)], 0)
    rest = jnp.where(enough, rest ^ trial ^ borrow, rest)
    digit = jnp.where(enough, 1, 0).astype(jnp.int32)
    return rest, jnp.concatenate([digit[None], root[:-1]])

  zeros = jnp.zeros((rounds + 2,), jnp.int32)
  _, root = jax.lax.fori_loop(0, rounds, extend, (zeros, zeros))
  return root[:rounds][::-1]


def _numbers(string: list[int]) -> tuple[int, int]:
  """The two numbers of a string; the second is 0 where there is one alone."""
  text = "".join(map(str, string))
  first, _, second = text.partition("2")
  return int(first[::-1], 2), int(second[::-1] or "0", 2)


def _digits(number: int) -> list[int]:
  return [int(c) for c in f"{number:b}"[::-1]]


chomsky.register("binary_addition", BinaryAddition)
chomsky.register("binary_multiplication", BinaryMultiplication)
chomsky.register("compute_sqrt", ComputeSqrt)
