"""Multi-query associative recall (MQAR)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator
from memzoo.tasks.mixture import Mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mqar(Generator):
  """Recall the value of each key when the key comes again.

  With V = vocab_size, P = pairs, T = length: keys k_1..k_P are drawn without
  replacement from 1..V/2-1, values v_1..v_P without replacement from V/2..V-1.
  The row begins k_1 v_1 ... k_P v_P. Each key comes once more, at position
  2P + 2 g_j; the slots g_j of the S = (T - 2P) / 2 there are drawn one after
  the other without replacement with probability proportional to
  (g + 1)^(power_a - 1): mostly soon after the pairs. The target at that
  position is v_j; nothing is asked elsewhere. All other tokens are 0, or
  uniform in 0..V-1 if `random_non_queries`.

  Attributes:
    vocab_size: V, above T.
    length: T, even, 4P or more.
    pairs: P.
    power_a: exponent of the gaps; 1 makes them uniform.
    random_non_queries: noise in place of the zeros.

  Presets:
    mqar: defaults of the reference's generator (1,000 examples).
    mqar_zoology_fig2_{T}_{P}: Figure 2 of Zoology: 100,000 training and 3,000
      test rows, no noise; there trained for 64 epochs in batches of 512 (T up
      to 128), 256 (T = 256) or 128 (T = 512), rates logspace(-4, -2, 4).
    mqar_based: the mixture of Figure 2 of Based: five training sets, seven
      test sets up to T = 1024 and P = 256; there 32 epochs, batch 256, rates
      logspace(-3, -1.5, 4). See `Mixture` for the order.
    mqar_based_2048: the same with an eighth test set, T = 2048 and P = 512
      (an ablation in the Zoology repository, not in the paper).
    mqar_zoology_random_false: the mixture of Based without noise, as in the
      example sweep of the Zoology repository; there 32 epochs, batch 256, rates
      logspace(-3, -1.5, 4).
    mqar_zoology_basic: the first example of the Zoology repository: 256 tokens,
      4 pairs in 64 steps, 10,000 training and 1,000 test rows.
    mqar_small: 8 pairs in 64 steps, 256 tokens, noise: a test, for a CPU,
      that recall can be learned. Not a published setting, and no ranking.

  Differs: the noise is drawn from the seed (the reference draws it unseeded);
    rows are shuffled each epoch (the reference visits them in one order);
    `mqar_small` draws fresh rows for ever; the pairs are shown once (the
    generator of the reference can repeat them, which no published set uses).

  Paper: Arora, Eyuboglu et al. 2023, Zoology: Measuring and Improving Recall
    in Efficient Language Models, arXiv:2312.04927; presets of Based from Arora
    et al. 2024, Simple linear attention language models balance the
    recall-throughput tradeoff, arXiv:2402.18668.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: int = 8192
  length: int = 64
  pairs: int = 8
  power_a: float = 0.01
  random_non_queries: bool = True

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("Mqar", "pairs", self.pairs, 1)
    task_lib.check_int("Mqar", "length", self.length, 1)
    task_lib.check_int("Mqar", "vocab_size", self.vocab_size, 4)
    if self.length % 2 or self.length < 4 * self.pairs:
      raise ValueError(
        f"Mqar: length must be even and at least 4 * pairs ="
        f" {4 * self.pairs}; got {self.length}"
      )
    if self.vocab_size <= self.length:
      raise ValueError(
        f"Mqar: vocab_size must be above length = {self.length}; got"
        f" {self.vocab_size}"
      )

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / (self.vocab_size - self.vocab_size // 2)

  def example(self, key):
    num_slots = self.length // 2 - self.pairs
    keys, values, slots, noise = sampling.words(
      key, self.pairs, self.pairs, num_slots, self.length
    )
    half = self.vocab_size // 2
    keys = sampling.distinct(keys, 1, half)
    values = sampling.distinct(values, half, self.vocab_size)
    context = jnp.stack([keys, values], axis=1).reshape(-1)

    slot = np.arange(1, num_slots + 1, dtype=np.float32)
    log_p = np.float32(self.power_a - 1) * np.log(slot)
    slots = sampling.weighted_distinct(slots, self.pairs, log_p)
    query = 2 * self.pairs + 2 * slots

    inputs = jnp.zeros((self.length,), jnp.int32)
    inputs = inputs.at[: 2 * self.pairs].set(context).at[query].set(keys)
    if self.random_non_queries:
      noise = sampling.below(noise, self.vocab_size)
      inputs = jnp.where(inputs == 0, noise, inputs)
    targets = jnp.zeros((self.length,), jnp.int32).at[query].set(values)
    weights = jnp.zeros((self.length,), jnp.float32).at[query].set(1.0)
    return inputs, targets, weights

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    first = (inputs[:, None, :] == inputs[:, :, None]).argmax(-1)
    after = np.minimum(first + 1, inputs.shape[1] - 1)
    return np.take_along_axis(inputs, after, axis=1)


BASED_TEST = (
  (64, 4),
  (64, 8),
  (64, 16),
  (128, 32),
  (256, 64),
  (512, 128),
  (1024, 256),
)


def _based(length: int, pairs: int, **options) -> Mqar:
  return Mqar(length=length, pairs=pairs, **options)


def _register_based(name: str, test, **options):
  task_lib.register(
    name,
    Mixture,
    train=(
      _based(64, 4, num_train=100_000, **options),
      _based(128, 8, num_train=20_000, **options),
      _based(256, 16, num_train=20_000, **options),
      _based(256, 32, num_train=20_000, **options),
      _based(256, 64, num_train=20_000, **options),
    ),
    test=tuple(
      _based(length, pairs, num_test=1000, **options) for length, pairs in test
    ),
  )


task_lib.register("mqar", Mqar, num_train=1000, num_test=1000)
task_lib.register("mqar_small", Mqar, vocab_size=256, length=64, pairs=8)
task_lib.register(
  "mqar_zoology_basic",
  Mqar,
  vocab_size=256,
  length=64,
  pairs=4,
  num_train=10_000,
  num_test=1000,
)
for _length, _pairs in ((64, 4), (128, 8), (256, 16), (512, 64)):
  task_lib.register(
    f"mqar_zoology_fig2_{_length}_{_pairs}",
    Mqar,
    length=_length,
    pairs=_pairs,
    random_non_queries=False,
    num_train=100_000,
    num_test=3000,
  )
_register_based("mqar_based", BASED_TEST)
_register_based("mqar_based_2048", (*BASED_TEST, (2048, 512)))
_register_based(
  "mqar_zoology_random_false", BASED_TEST, random_non_queries=False
)
