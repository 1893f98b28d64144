"""Associative recall of keys whose values change."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator
from memzoo.tasks.mixture import Mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgettingMqar(Generator):
  """Recall the latest value of each key; some keys were given a second one.

  With V = vocab_size, P = pairs, U = updates, T = length: keys k_1..k_P are
  drawn without replacement from 1..V/2-1, values v_1..v_P without replacement
  from V/2..V-1. The row begins k_1 v_1 ... k_P v_P; then U distinct keys, in
  random order, come again, each with a new value, uniform among the values but
  the one that it replaces. Each of the P keys comes once more, at position
  2 (P + U) + 2 g_j; the slots g_j of the S = T / 2 - P - U there are drawn one
  after the other without replacement with probability proportional to
  (g + 1)^(power_a - 1). The target at that position is the latest value of the
  key; nothing is asked elsewhere. All other tokens are 0, or uniform in 0..V-1
  if `random_non_queries`.

  Attributes:
    vocab_size: V, above T.
    length: T, even, 4P + 2U or more.
    pairs: P.
    updates: U, P at most.
    power_a: exponent of the gaps; 1 makes them uniform.
    random_non_queries: noise in place of the zeros.

  Presets:
    forgetting_mqar: defaults of the reference's generator (1,000 examples).
    forgetting_mqar_zoology: the sweep of the Zoology repository: five training
      sets, seven test sets up to T = 2048 and P = 256, U = 4 in all; there 32
      epochs, batch 256, rates logspace(-3, -1.5, 4).
    forgetting_mqar_small: 6 pairs and 4 updates in 64 steps, 256 tokens. Not a
      published setting.

  Differs: the noise is drawn from the seed, and rows are shuffled each epoch,
    as in `Mqar`. The reference means an update to change the value, but
    compares it with that of another key, so that a few updates change nothing.

  Paper: none; the Zoology repository, `zoology/data/forgetting_mqar.py`. The
    task that it extends: Arora, Eyuboglu et al. 2023, arXiv:2312.04927.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: int = 8192
  length: int = 64
  pairs: int = 8
  updates: int = 4
  power_a: float = 0.01
  random_non_queries: bool = True

  def __post_init__(self):
    super().__post_init__()
    owner = "ForgettingMqar"
    task_lib.check_int(owner, "pairs", self.pairs, 1)
    task_lib.check_int(owner, "updates", self.updates, 1, self.pairs)
    task_lib.check_int(owner, "length", self.length, 1)
    task_lib.check_int(owner, "vocab_size", self.vocab_size, 4)
    least = 4 * self.pairs + 2 * self.updates
    if self.length % 2 or self.length < least:
      raise ValueError(
        f"ForgettingMqar: length must be even and at least 4 * pairs + 2 *"
        f" updates = {least}; got {self.length}"
      )
    if self.vocab_size <= self.length:
      raise ValueError(
        f"ForgettingMqar: vocab_size must be above length = {self.length}; got"
        f" {self.vocab_size}"
      )

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / (self.vocab_size - self.vocab_size // 2)

  def example(self, key):
    context = 2 * (self.pairs + self.updates)
    num_slots = (self.length - context) // 2
    keys, values, chosen, fresh, slots, noise = sampling.words(
      key,
      self.pairs,
      self.pairs,
      self.updates,
      self.updates,
      num_slots,
      self.length,
    )
    half = self.vocab_size // 2
    keys = sampling.distinct(keys, 1, half)
    values = sampling.distinct(values, half, self.vocab_size)
    chosen = sampling.distinct(chosen, 0, self.pairs)
    fresh = half + sampling.below(fresh, self.vocab_size - half - 1)
    fresh = jnp.where(fresh < values[chosen], fresh, fresh + 1)
    latest = values.at[chosen].set(fresh)

    slot = np.arange(1, num_slots + 1, dtype=np.float32)
    log_p = np.float32(self.power_a - 1) * np.log(slot)
    query = context + 2 * sampling.weighted_distinct(slots, self.pairs, log_p)

    shown = jnp.concatenate([keys, keys[chosen]])
    given = jnp.concatenate([values, fresh])
    inputs = jnp.zeros((self.length,), jnp.int32)
    inputs = inputs.at[:context:2].set(shown).at[1:context:2].set(given)
    inputs = inputs.at[query].set(keys)
    if self.random_non_queries:
      noise = sampling.below(noise, self.vocab_size)
      inputs = jnp.where(inputs == 0, noise, inputs)
    targets = jnp.zeros((self.length,), jnp.int32).at[query].set(latest)
    weights = jnp.zeros((self.length,), jnp.float32).at[query].set(1.0)
    return inputs, targets, weights

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    # Noise looks like keys, so the end of the context must be known. Each key
    # is asked once; `Mixture` calls the oracle of its first component for all.
    pairs = int((np.asarray(batch.weights) > 0).sum(1).max())
    context = inputs[:, : 2 * (pairs + self.updates)]
    keys, values = context[:, ::2], context[:, 1::2]
    same = inputs[:, :, None] == keys[:, None, ::-1]
    last = keys.shape[1] - 1 - same.argmax(-1)
    return np.take_along_axis(values, last, axis=1)


def _sizes(sizes, **options) -> tuple[ForgettingMqar, ...]:
  return tuple(
    ForgettingMqar(length=length, pairs=pairs, **options)
    for length, pairs in sizes
  )


task_lib.register(
  "forgetting_mqar", ForgettingMqar, num_train=1000, num_test=1000
)
task_lib.register(
  "forgetting_mqar_small",
  ForgettingMqar,
  vocab_size=256,
  length=64,
  pairs=6,
  updates=4,
)
task_lib.register(
  "forgetting_mqar_zoology",
  Mixture,
  train=_sizes(((64, 4),), num_train=100_000)
  + _sizes(((128, 9), (256, 16), (256, 25), (256, 36)), num_train=20_000),
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
  ),
)
