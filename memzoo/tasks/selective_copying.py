"""Selective copying."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Generator):
  """Repeat, in order, the data tokens that were scattered among noise.

  With V = vocab_size, M = data: M tokens, uniform in 1..V-2, stand at distinct
  uniform positions, in order, in a context of noise (token 0); then come M
  markers (token V-1), at the m-th of which the m-th data token is asked.

  Attributes:
    vocab_size: V, noise and marker included.
    context: steps before the markers, M or more.
    data: M.

  Presets:
    selective_copying_mamba: context 4096, 16 data tokens, 16 tokens; there
      trained for 400,000 steps in batches of 64 at the constant rate 1e-4.
    selective_copying_small: context 64, 8 data tokens. Not a published
      setting.

  Differs: Mamba's generator was not published. The layout is that of S4's
    copying generator with variable positions, and the paper's length is taken
    for the context without the markers. Rows are fresh for ever.

  Paper: Gu and Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective
    State Spaces, arXiv:2312.00752, section 4.1.1 and appendix E.1.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: int = 16
  context: int = 4096
  data: int = 16

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("SelectiveCopying", "vocab_size", self.vocab_size, 3)
    task_lib.check_int("SelectiveCopying", "data", self.data, 1)
    task_lib.check_int("SelectiveCopying", "context", self.context, self.data)

  @property
  def length(self) -> int:
    return self.context + self.data

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / (self.vocab_size - 2)

  def example(self, key):
    tokens, places = sampling.words(key, self.data, self.data)
    tokens = sampling.below(tokens, self.vocab_size - 2) + 1
    places = jnp.sort(sampling.distinct(places, 0, self.context))
    inputs = jnp.full((self.length,), self.vocab_size - 1, jnp.int32)
    inputs = inputs.at[: self.context].set(0).at[places].set(tokens)
    targets = jnp.zeros((self.length,), jnp.int32)
    targets = targets.at[self.context :].set(tokens)
    weights = jnp.zeros((self.length,), jnp.float32)
    return inputs, targets, weights.at[self.context :].set(1.0)

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    predictions = np.zeros_like(inputs)
    for row, context in enumerate(inputs[:, : self.context]):
      predictions[row, self.context :] = context[context != 0]
    return predictions


task_lib.register("selective_copying", SelectiveCopying)
task_lib.register(
  "selective_copying_mamba",
  SelectiveCopying,
  vocab_size=16,
  context=4096,
  data=16,
)
task_lib.register(
  "selective_copying_small",
  SelectiveCopying,
  vocab_size=16,
  context=64,
  data=8,
)
