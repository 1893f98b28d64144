"""Word problems of groups."""

import dataclasses
import functools
import itertools
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator

_MOST_ELEMENTS = 720


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordProblem(Generator):
  """Give the product of the elements of a group that were read so far.

  Inputs g_1 ... g_T are uniform elements of a finite group, numbered from 0,
  the identity; the target at step t is g_1 g_2 ... g_t, at every step.
  Elements are permutations in lexicographic order, multiplied from left to
  right: i goes to q(p(i)) under p q. Those of a cyclic group are rotations,
  which are numbered by how far they turn; those of a direct product are
  numbered with the last factor fastest.

  Attributes:
    group: factors joined by 'x', each 's', 'a' or 'z' with a number: the
      symmetric and the alternating group of that many points, the cyclic
      group of that order. Up to 720 elements.
    length: T. A model trained at one length is tested at others by
      `make(name, length=...)`.

  Presets:
    word_problem_{z60,a4xz5,a5}_merrill: three groups of 60 elements: Abelian,
      solvable, not solvable. T = 20, the longest, 1,000,000 rows; there one
      model for each T, batches of 512.
    word_problem_{s3,s4,a5,s5}_deltaproduct: T = 128, 100,000 rows, tested at
      T = 512; there batches of 2,048, 100 epochs, rate 1e-3.
    word_problem_small: S3, T = 32. Not a published setting.

  Differs: there is no token before the first element (the references put one
    there); rows are drawn with replacement, and there are none of T = 2, which
    the references add to the training set. Their numbering of the elements is
    that of a package; it does not change the problem.

  Paper: Merrill, Petty and Sabharwal 2024, The Illusion of State in
    State-Space Models, arXiv:2404.08819; Siems et al. 2025, DeltaProduct:
    Improving State-Tracking in Linear RNNs via Householder Products,
    arXiv:2502.10297; also Grazzi et al. 2025, Unlocking State-Tracking in
    Linear RNNs Through Negative Eigenvalues, arXiv:2411.12537.
  """

  kind: ClassVar[str] = "tokens"
  group: str = "s5"
  length: int = 128

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("WordProblem", "length", self.length, 1)
    elements(str(self.group))

  @property
  def vocab_size(self) -> int:
    return len(elements(self.group))

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / self.vocab_size

  def example(self, key):
    (words,) = sampling.words(key, self.length)
    inputs = sampling.below(words, self.vocab_size)
    table = jnp.asarray(_table(self.group))

    def multiply(product, element):
      product = table[product, element]
      return product, product

    targets = jax.lax.scan(multiply, jnp.int32(0), inputs)[1]
    return inputs, targets, jnp.ones((self.length,), jnp.float32)

  def oracle(self, batch):
    members = elements(self.group)
    number = {member: i for i, member in enumerate(members)}
    predictions = np.zeros_like(np.asarray(batch.inputs))
    for row, word in enumerate(np.asarray(batch.inputs).tolist()):
      points = members[0]
      for step, element in enumerate(word):
        points = tuple(members[element][point] for point in points)
        predictions[row, step] = number[points]
    return predictions


@functools.lru_cache(maxsize=32)
def elements(group: str) -> tuple[tuple[int, ...], ...]:
  """The elements of a group as permutations, the identity first."""
  factors = []
  for name in group.split("x"):
    match = re.fullmatch(r"([sa])([1-6])|z([1-9]\d?)", name)
    if not match:
      raise ValueError(
        "WordProblem: group must be factors s1 to s6, a1 to a6 or z1 to z99"
        f" joined by 'x', as in 'a4xz5'; got {group!r}"
      )
    if match[3]:
      order = int(match[3])
      points = range(order)
      turns = [tuple((i + turn) % order for i in points) for turn in points]
      factors.append(turns)
      continue
    every = itertools.permutations(range(int(match[2])))
    factors.append([p for p in every if match[1] == "s" or _is_even(p)])
  if np.prod([len(factor) for factor in factors]) > _MOST_ELEMENTS:
    raise ValueError(
      f"WordProblem: group must have at most {_MOST_ELEMENTS} elements; got"
      f" {group!r}"
    )
  first = np.cumsum([0] + [len(factor[0]) for factor in factors])
  first = first.tolist()
  return tuple(
    tuple(start + i for start, part in zip(first, parts) for i in part)
    for parts in itertools.product(*factors)
  )


def _is_even(permutation: tuple[int, ...]) -> bool:
  pairs = itertools.combinations(permutation, 2)
  return sum(a > b for a, b in pairs) % 2 == 0


@functools.lru_cache(maxsize=32)
def _table(group: str) -> np.ndarray:
  """The number of p q at [p, q], int32."""
  members = np.array(elements(group), np.int32)
  number = {member.tobytes(): i for i, member in enumerate(members)}
  return np.array(
    [
      [number[product.tobytes()] for product in members[:, first]]
      for first in members
    ],
    np.int32,
  )


for _group in ("z60", "a4xz5", "a5"):
  task_lib.register(
    f"word_problem_{_group}_merrill",
    WordProblem,
    group=_group,
    length=20,
    num_train=1_000_000,
  )
for _group in ("s3", "s4", "a5", "s5"):
  task_lib.register(
    f"word_problem_{_group}_deltaproduct",
    WordProblem,
    group=_group,
    length=128,
    num_train=100_000,
  )
task_lib.register("word_problem_small", WordProblem, group="s3", length=32)
