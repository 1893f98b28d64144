"""Brackets nested up to a depth."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dyck(Generator):
  """Say which closing bracket is legal, in strings of Dyck-(k, m).

  Strings are balanced brackets of k types, at most m of them open at a time.
  They come from an automaton: where no bracket is open, it ends or opens one,
  where m are, it closes one, and else it opens or closes one, each with
  probability 1/2; types are uniform. It does not end before min_length
  brackets, and a string with its end token is at most max_length long; longer
  ones are rejected.

  Token i opens type i, k + i closes it. At each step where a bracket is open
  after it, the target is the type of the innermost one, the only one that may
  be closed. T = max_length - 1; after a string, tokens are 0 and `mask` is
  False.

  Attributes:
    types: k.
    depth: m.
    min_length: least number of brackets.
    max_length: longest string, its end token included.

  Presets:
    dyck_hewitt_k{k}_m{m}: k = 2, 8, 32, 128, m = 3, 5: strings up to 84 for m
      = 3, up to 180 for m = 5; there tested on 85..168 and 181..360, with
      LSTMs of one layer, batches of 10, 2,000 to 20,000,000 tokens.
    dyck_small: k = 4, m = 3, strings up to 32. Not a published setting.

  Differs: the paper trains a language model, and tests at the steps that are
    asked here that, of the probability of all closing brackets, the legal one
    has 0.8 or more, averaged for each distance to its partner; here that
    bracket is what is trained, and scored by accuracy over all such steps.
    Start and end tokens are left out. Strings are fresh for ever. Rejection is
    exact but done in advance, by the chance of an end in time.

  Paper: Hewitt et al. 2020, RNNs can generate bounded hierarchical languages
    with optimal memory, arXiv:2010.07515.
  """

  kind: ClassVar[str] = "tokens"
  types: int = 2
  depth: int = 3
  min_length: int = 1
  max_length: int = 84

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("Dyck", "types", self.types, 1)
    task_lib.check_int("Dyck", "depth", self.depth, 1)
    task_lib.check_int("Dyck", "min_length", self.min_length, 1)
    least = self.min_length + self.min_length % 2 + 1
    task_lib.check_int("Dyck", "max_length", self.max_length, least)

  @property
  def length(self) -> int:
    return self.max_length - 1

  @property
  def vocab_size(self) -> int:
    return 2 * self.types

  @property
  def num_outputs(self) -> int:
    return self.types

  @property
  def chance(self) -> float:
    return 1 / self.types

  def example(self, key):
    words, kinds = sampling.words(key, self.length, self.length)
    # 24 bits: exact in float32, below 1.
    chance = (words >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
    kinds = sampling.below(kinds, self.types)
    opening = jnp.asarray(
      _opening(self.depth, self.min_length, self.max_length)
    )

    place = jnp.arange(self.depth, dtype=jnp.int32)

    def emit(carry, item):
      stack, open_brackets, ended = carry
      chance, kind, opening = item
      opens = chance < opening[open_brackets]
      ended |= (open_brackets == 0) & ~opens
      top = stack[jnp.maximum(open_brackets - 1, 0)]
      token = jnp.where(opens, kind, self.types + top)
      pushed = jnp.where(place == open_brackets, kind, stack)
      after = open_brackets + jnp.where(opens, 1, -1)
      stack = jnp.where(opens & ~ended, pushed, stack)
      open_brackets = jnp.where(ended, 0, after)
      target = stack[jnp.maximum(open_brackets - 1, 0)]
      out = jnp.where(ended, 0, token), target, open_brackets > 0, ~ended
      return (stack, open_brackets, ended), out

    start = jnp.zeros((self.depth,), jnp.int32), jnp.int32(0), jnp.bool_(False)
    _, (inputs, targets, asked, mask) = jax.lax.scan(
      emit, start, (chance, kinds, opening)
    )
    targets = jnp.where(asked, targets, 0)
    return inputs, targets, asked.astype(jnp.float32), None, mask

  def oracle(self, batch):
    inputs, mask = np.asarray(batch.inputs), np.asarray(batch.mask)
    predictions = np.zeros_like(inputs)
    for row, brackets in enumerate(inputs):
      stack = []
      for step, token in enumerate(brackets[mask[row]].tolist()):
        if token < self.types:
          stack.append(token)
        else:
          stack.pop()
        if stack:
          predictions[row, step] = stack[-1]
    return predictions


@functools.lru_cache(maxsize=32)
def _opening(depth: int, least: int, most: int) -> np.ndarray:
  """Chance to open after t brackets with d open, float32 [most - 1, depth + 1].

  That of the automaton, given that the string with its end token fits into
  `most`: by the chance, from behind, that it does.
  """
  fits = np.zeros((most + 1, depth + 1))
  opening = np.zeros((most, depth + 1))
  for t in reversed(range(most)):
    for d in range(depth + 1):
      if d == 0:
        up = 1.0 if t < least else 0.5
        other = 1.0
      else:
        up = 0.0 if d == depth else 0.5
        other = fits[t + 1, d - 1]
      grown = up * fits[t + 1, d + 1] if up else 0.0
      fits[t, d] = grown + (1 - up) * other
      opening[t, d] = grown / fits[t, d] if fits[t, d] else 0.0
  return opening[: most - 1].astype(np.float32)


for _types in (2, 8, 32, 128):
  for _depth, _most in ((3, 84), (5, 180)):
    task_lib.register(
      f"dyck_hewitt_k{_types}_m{_depth}",
      Dyck,
      types=_types,
      depth=_depth,
      max_length=_most,
    )
task_lib.register("dyck_small", Dyck, types=4, depth=3, max_length=32)
