"""The regular tasks of the Chomsky hierarchy."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memzoo.tasks import chomsky, sampling, task as task_lib
from memzoo.tasks.chomsky import Chomsky


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvenPairs(Chomsky):
  """Is the number of 01 and 10 in a random bit string even (0) or odd (1)?

  Attributes, layout, Differs: see `Chomsky`.

  Presets: chomsky_even_pairs, chomsky_even_pairs_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  symbols: ClassVar[int] = 2
  num_outputs: ClassVar[int] = 2

  def draw(self, words, n):
    string = sampling.below(words, 2)
    return string, (string[0] ^ string[n - 1])[None], 1

  def solve(self, string):
    return [sum(a != b for a, b in zip(string, string[1:])) % 2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityCheck(Chomsky):
  """The number of ones in a random bit string, modulo 2.

  Attributes, layout, Differs: see `Chomsky`.

  Presets: chomsky_parity_check, chomsky_parity_check_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  symbols: ClassVar[int] = 2
  num_outputs: ClassVar[int] = 2

  def draw(self, words, n):
    string = sampling.below(words, 2)
    read = jnp.arange(self.max_length) < n
    ones = jnp.sum(jnp.where(read, string, 0), dtype=jnp.int32)
    return string, (ones % 2)[None], 1

  def solve(self, string):
    return [string.count(1) % 2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CycleNavigation(Chomsky):
  """The place on a cycle after random steps from place 0.

  Symbols 0, 1, 2 stand for a step back, none, and a step forward.

  Attributes:
    cycle: number of places.
    The others, layout, Differs: see `Chomsky`.

  Presets: chomsky_cycle_navigation (5 places),
    chomsky_cycle_navigation_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  symbols: ClassVar[int] = 3
  cycle: int = 5

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("CycleNavigation", "cycle", self.cycle, 2)

  @property
  def num_outputs(self) -> int:
    return self.cycle

  def draw(self, words, n):
    string = sampling.below(words, 3)
    read = jnp.arange(self.max_length) < n
    steps = jnp.sum(jnp.where(read, string - 1, 0), dtype=jnp.int32)
    return string, (steps % self.cycle)[None], 1

  def solve(self, string):
    place = 0
    for symbol in string:
      place = (place + {0: -1, 1: 0, 2: 1}[symbol]) % self.cycle
    return [place]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModularArithmetic(Chomsky):
  """The value, modulo m, of random numbers joined by +, - and *.

  Symbols: 0..m-1 the numbers; m, m + 1, m + 2 the operators +, - and *, of
  which * binds closer. Strings are of odd length: an even n is lowered by 1.

  Attributes:
    modulus: m.
    The others, layout, Differs: see `Chomsky`.

  Presets: chomsky_modular_arithmetic (m = 5),
    chomsky_modular_arithmetic_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098: modular arithmetic
    (simple).
  """

  modulus: int = 5

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("ModularArithmetic", "modulus", self.modulus, 2, 2**15)

  @property
  def symbols(self) -> int:
    return self.modulus + 3

  @property
  def num_outputs(self) -> int:
    return self.modulus

  def fit(self, n):
    return n - (n + 1) % 2

  def draw(self, words, n):
    m = self.modulus
    place = jnp.arange(self.max_length, dtype=jnp.int32)
    operator = m + sampling.below(words, 3)
    string = jnp.where(place % 2 == 0, sampling.below(words, m), operator)

    def read(carry, item):
      total, term = carry
      operator, number, here = item
      product = term * number % m
      signed = jnp.where(operator == m, number, (m - number) % m)
      times = operator == m + 2
      total_new = jnp.where(times, total, (total + term) % m)
      term_new = jnp.where(times, product, signed)
      carry = jnp.where(here, total_new, total), jnp.where(here, term_new, term)
      return carry, None

    pairs = (self.max_length - 1) // 2
    here = place[2::2] < n
    items = string[1 : 2 * pairs : 2], string[2::2], here
    (total, term), _ = jax.lax.scan(read, (jnp.int32(0), string[0]), items)
    return string, ((total + term) % m)[None], 1

  def solve(self, string):
    m = self.modulus
    total, sign, term = 0, 1, string[0]
    for operator, number in zip(string[1::2], string[2::2]):
      if operator == m + 2:
        term *= number
      else:
        total += sign * term
        sign, term = (1 if operator == m else -1), number
    return [(total + sign * term) % m]


chomsky.register("even_pairs", EvenPairs)
chomsky.register("parity_check", ParityCheck)
chomsky.register("cycle_navigation", CycleNavigation)
chomsky.register("modular_arithmetic", ModularArithmetic)
