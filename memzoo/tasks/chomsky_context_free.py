"""Deterministic context-free tasks of the Chomsky hierarchy, on a stack."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memzoo.tasks import chomsky, sampling
from memzoo.tasks.chomsky import Chomsky, Letters


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackManipulation(Chomsky):
  """Apply instructions to a stack, then return it from the top to the bottom.

  Symbols: 0 and 1 the bits of a stack, bottom first; 2 pop; 3 and 4 push 0 and
  push 1. The stack has a uniform length in 1..n-1 (1 where n = 1), and random
  instructions follow. A pop from an empty stack does nothing. The answer ends
  with token 2; A(n) = n + 1.

  Attributes, layout, Differs: see `Chomsky`.

  Presets: chomsky_stack_manipulation, chomsky_stack_manipulation_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  symbols: ClassVar[int] = 5
  num_outputs: ClassVar[int] = 3

  def answer_length(self, n):
    return n + 1

  @property
  def num_words(self) -> int:
    return self.max_length + 1

  def draw(self, words, n):
    first, words = words[0], words[1:]
    place = jnp.arange(self.max_length, dtype=jnp.int32)
    given = 1 + sampling.below(first, jnp.maximum(n - 1, 1))
    instruction = 2 + sampling.below(words, 3)
    string = jnp.where(place < given, sampling.below(words, 2), instruction)

    def apply(i, carry):
      stack, depth = carry
      push = string[i] != 2
      bit = (string[i] % 3 == 1).astype(jnp.int32)
      grown = jnp.where(place == depth, bit, stack)
      moved = jnp.where(push, depth + 1, jnp.maximum(depth - 1, 0))
      here = i < n
      return (
        jnp.where(here & push, grown, stack),
        jnp.where(here, moved, depth),
      )

    stack = jnp.zeros((self.max_length,), jnp.int32)
    stack, depth = jax.lax.fori_loop(
      0, self.max_length, apply, (stack, jnp.int32(0))
    )
    place = jnp.arange(self.max_length + 1, dtype=jnp.int32)
    answer = jnp.where(place < depth, stack[depth - 1 - place], 2)
    return string, answer, depth + 1

  def solve(self, string):
    stack = []
    for symbol in string:
      if symbol != 2:
        stack.append({0: 0, 1: 1, 3: 0, 4: 1}[symbol])
      elif stack:
        stack.pop()
    return stack[::-1] + [2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseString(Letters):
  """Return a random string from its end to its beginning; A(n) = n.

  Attributes:
    alphabet: number of symbols.
    The others, layout, Differs: see `Chomsky`.

  Presets: chomsky_reverse_string (2 symbols), chomsky_reverse_string_small.

  Paper: Deletang, Ruoss et al. 2023, arXiv:2207.02098.
  """

  def draw(self, words, n):
    string = sampling.below(words, self.alphabet)
    place = jnp.arange(self.max_length, dtype=jnp.int32)
    return string, string[jnp.maximum(n - 1 - place, 0)], n

  def solve(self, string):
    return string[::-1]


chomsky.register("stack_manipulation", StackManipulation)
chomsky.register("reverse_string", ReverseString)
