"""Counting modulo m: running sums, and parity."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModularSum(Generator):
  """Give the sum, modulo m, of the numbers that were read so far.

  With n uniform in min_length..max_length, inputs x_1 ... x_n are uniform in
  0..m-1, and (x_1 + ... + x_t) mod m is the target at step t, at every step or
  at the last. m = 2 is parity. T = max_length; shorter rows are padded on the
  right with 0, and `mask` is False there.

  Attributes:
    modulus: m.
    min_length: least n.
    max_length: largest n.
    asked: 'every' step, or the 'last' of a row.

  Presets:
    parity_grazzi: m = 2, n = 2..39, the last step; there 20,000 steps of 256
      rows, and the test has n = 39..255.
    parity_small, modular_counting_small: every step of 32, with m = 2 and 5.
      Not published settings.

  Differs: the reference counts the place of the answer in the length of a row
    (3..40 and 40..256), keeps a token for padding, and trains on 5,120,000
    rows; here rows are fresh for ever. Modular counting is a theorem of the
    paper, without an experiment of its own.

  Paper: Grazzi et al. 2025, Unlocking State-Tracking in Linear RNNs Through
    Negative Eigenvalues, arXiv:2411.12537.
  """

  kind: ClassVar[str] = "tokens"
  modulus: int = 2
  min_length: int = 32
  max_length: int = 32
  asked: str = "every"

  def __post_init__(self):
    super().__post_init__()
    owner = "ModularSum"
    task_lib.check_int(owner, "modulus", self.modulus, 2, 2**15)
    task_lib.check_int(owner, "min_length", self.min_length, 1)
    most = 2**31 // self.modulus
    task_lib.check_int(
      owner, "max_length", self.max_length, self.min_length, most
    )
    task_lib.check_choice(owner, "asked", self.asked, ("every", "last"))

  @property
  def length(self) -> int:
    return self.max_length

  @property
  def vocab_size(self) -> int:
    return self.modulus

  @property
  def num_outputs(self) -> int:
    return self.modulus

  @property
  def chance(self) -> float:
    return 1 / self.modulus

  def example(self, key):
    first, words = sampling.words(key, 1, self.max_length)
    lengths = self.max_length - self.min_length + 1
    n = self.min_length + sampling.below(first[0], lengths)
    step = jnp.arange(self.max_length, dtype=jnp.int32)
    mask = step < n
    inputs = jnp.where(mask, sampling.below(words, self.modulus), 0)
    targets = jnp.cumsum(inputs, dtype=jnp.int32) % self.modulus
    asked = mask if self.asked == "every" else step == n - 1
    return inputs, targets, asked.astype(jnp.float32), None, mask

  def oracle(self, batch):
    predictions = np.zeros_like(np.asarray(batch.inputs))
    for row, numbers in enumerate(np.asarray(batch.inputs).tolist()):
      total = 0
      for step, number in enumerate(numbers):
        total = (total + number) % self.modulus
        predictions[row, step] = total
    return predictions


task_lib.register(
  "parity_grazzi",
  ModularSum,
  modulus=2,
  min_length=2,
  max_length=39,
  asked="last",
)
task_lib.register("parity_small", ModularSum, modulus=2)
task_lib.register("modular_counting_small", ModularSum, modulus=5)
