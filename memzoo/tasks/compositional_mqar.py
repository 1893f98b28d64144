"""Associative recall by keys of two tokens."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator
from memzoo.tasks.mixture import Mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompositionalMqar(Generator):
  """Recall the value of each pair of tokens; neither token alone tells it.

  With V = vocab_size, P = pairs = G^2, T = length, W = V // 3: G first tokens
  are drawn without replacement from 1..W-1, G second tokens from W..2W-1, and P
  values from 2W..V-1. The P pairs (a, b) of the G x G grid stand in random
  order, each with a value: the row begins a_1 b_1 v_1 ... a_P b_P v_P. Each
  pair comes once more, at positions 3P + 3 g_j and the next; the slots g_j of
  the S = (T - 3P) // 3 there are drawn one after the other without replacement
  with probability proportional to (g + 1)^(power_a - 1). The target at the
  second of the positions is v_j; nothing is asked elsewhere. All other tokens
  are 0, or uniform in 0..V-1 if `random_non_queries`.

  Attributes:
    vocab_size: V, above T.
    length: T, even, 6P or more.
    pairs: P, a square.
    power_a: exponent of the gaps; 1 makes them uniform.
    random_non_queries: noise in place of the zeros.

  Presets:
    compositional_mqar: defaults of the reference's generator (1,000 examples).
    compositional_mqar_zoology: the sweep of the Zoology repository: five
      training sets, seven test sets up to T = 2048 and P = 256; there 32
      epochs, batch 256, rates logspace(-3, -1.5, 4).
    compositional_mqar_zoology_random_false: the same without noise.
    compositional_mqar_small: 4 pairs in 64 steps, 192 tokens. Not a published
      setting.

  Differs: the noise is drawn from the seed, and rows are shuffled each epoch,
    as in `Mqar`.

  Paper: none; the Zoology repository, `zoology/data/compositional_mqar.py`. The
    task that it extends: Arora, Eyuboglu et al. 2023, arXiv:2312.04927.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: int = 8192
  length: int = 64
  pairs: int = 4
  power_a: float = 0.01
  random_non_queries: bool = True

  def __post_init__(self):
    super().__post_init__()
    owner = "CompositionalMqar"
    task_lib.check_int(owner, "pairs", self.pairs, 1)
    task_lib.check_int(owner, "length", self.length, 1)
    task_lib.check_int(owner, "vocab_size", self.vocab_size, 6)
    if math.isqrt(self.pairs) ** 2 != self.pairs:
      raise ValueError(
        f"{owner}: pairs must be a square (1, 4, 9, ...); got {self.pairs}"
      )
    if self.length % 2 or self.length < 6 * self.pairs:
      raise ValueError(
        f"{owner}: length must be even and at least 6 * pairs ="
        f" {6 * self.pairs}; got {self.length}"
      )
    if self.vocab_size <= self.length:
      raise ValueError(
        f"{owner}: vocab_size must be above length = {self.length}; got"
        f" {self.vocab_size}"
      )

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / (self.vocab_size - 2 * (self.vocab_size // 3))

  def example(self, key):
    grid, third = math.isqrt(self.pairs), self.vocab_size // 3
    num_slots = (self.length - 3 * self.pairs) // 3
    a, b, values, order, slots, noise = sampling.words(
      key, grid, grid, self.pairs, self.pairs, num_slots, self.length
    )
    order = sampling.distinct(order, 0, self.pairs)
    a = sampling.distinct(a, 1, third)[order // grid]
    b = sampling.distinct(b, third, 2 * third)[order % grid]
    values = sampling.distinct(values, 2 * third, self.vocab_size)
    context = jnp.stack([a, b, values], axis=1).reshape(-1)

    slot = np.arange(1, num_slots + 1, dtype=np.float32)
    log_p = np.float32(self.power_a - 1) * np.log(slot)
    slots = sampling.weighted_distinct(slots, self.pairs, log_p)
    query = 3 * self.pairs + 3 * slots

    inputs = jnp.zeros((self.length,), jnp.int32)
    inputs = inputs.at[: 3 * self.pairs].set(context)
    inputs = inputs.at[query].set(a).at[query + 1].set(b)
    if self.random_non_queries:
      noise = sampling.below(noise, self.vocab_size)
      inputs = jnp.where(inputs == 0, noise, inputs)
    targets = jnp.zeros((self.length,), jnp.int32).at[query + 1].set(values)
    weights = jnp.zeros((self.length,), jnp.float32).at[query + 1].set(1.0)
    return inputs, targets, weights

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    # The first place of a pair of neighbours is in the context.
    left = np.pad(inputs[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    code = left.astype(np.int64) * self.vocab_size + inputs
    first = (code[:, None, :] == code[:, :, None]).argmax(-1)
    after = np.minimum(first + 1, inputs.shape[1] - 1)
    return np.take_along_axis(inputs, after, axis=1)


def _sizes(sizes, **options) -> tuple[CompositionalMqar, ...]:
  return tuple(
    CompositionalMqar(length=length, pairs=pairs, **options)
    for length, pairs in sizes
  )


task_lib.register(
  "compositional_mqar", CompositionalMqar, num_train=1000, num_test=1000
)
task_lib.register(
  "compositional_mqar_small",
  CompositionalMqar,
  vocab_size=192,
  length=64,
  pairs=4,
)
for _name, _noise in (("", True), ("_random_false", False)):
  task_lib.register(
    f"compositional_mqar_zoology{_name}",
    Mixture,
    train=_sizes(((64, 4),), num_train=100_000, random_non_queries=_noise)
    + _sizes(
      ((128, 9), (256, 16), (256, 25), (256, 36)),
      num_train=20_000,
      random_non_queries=_noise,
    ),
    test=_sizes(
      (
        (64, 4),
        (64, 9),
        (128, 16),
        (256, 36),
        (512, 64),
        (1024, 144),
        (2048, 256),
      ),
      num_test=1000,
      random_non_queries=_noise,
    ),
  )
