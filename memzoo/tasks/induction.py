"""Induction heads."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(Generator):
  """Recall what followed the trigger when the trigger comes again.

  With V = vocab_size, T = length: tokens are uniform in 0..V-2; the trigger
  V-1 stands at a uniform position in 0..T-4 and at T-1. The target there, the
  only one, is the token that followed the first trigger.

  Attributes:
    vocab_size: V, the trigger included.
    length: T, 4 or more. A model trained at one length is tested at others by
      `make(name, length=...)`.

  Presets:
    induction_mamba: T = 256, 16 tokens; there batch 8, 25 epochs of 8,192
      steps, rate 2e-4 or 1e-3, tested from T = 2^6 to 2^20.
    induction_small: T = 64, 16 tokens. Not a published setting.

  Differs: Mamba's generator was not published. The layout is that of the H3
    paper, to which it refers, with one trigger, without the token for "no
    answer" of H3's code, and with a loss on the answer alone. Rows are fresh
    for ever.

  Paper: Gu and Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective
    State Spaces, arXiv:2312.00752, section 4.1.2 and appendix E.1; Fu et al.
    2022, Hungry Hungry Hippos, arXiv:2212.14052, section 3.1.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: int = 16
  length: int = 256

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("Induction", "vocab_size", self.vocab_size, 3)
    task_lib.check_int("Induction", "length", self.length, 4)

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / (self.vocab_size - 1)

  def example(self, key):
    tokens, place = sampling.words(key, self.length, 1)
    trigger = self.vocab_size - 1
    inputs = sampling.below(tokens, trigger)
    place = sampling.below(place[0], self.length - 3)
    inputs = inputs.at[place].set(trigger).at[-1].set(trigger)
    targets = jnp.zeros((self.length,), jnp.int32)
    targets = targets.at[-1].set(inputs[place + 1])
    weights = jnp.zeros((self.length,), jnp.float32).at[-1].set(1.0)
    return inputs, targets, weights

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    first = (inputs == self.vocab_size - 1).argmax(-1)
    predictions = np.zeros_like(inputs)
    predictions[:, -1] = inputs[np.arange(len(inputs)), first + 1]
    return predictions


task_lib.register("induction", Induction)
task_lib.register("induction_mamba", Induction, vocab_size=16, length=256)
task_lib.register("induction_small", Induction, vocab_size=16, length=64)
