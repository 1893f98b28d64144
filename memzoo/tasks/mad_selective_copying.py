"""MAD: selective copying."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadSelectiveCopying(Generator):
  """Repeat, in order, the data tokens that were scattered among blanks.

  With V = vocab_size, T = length, M = data: M tokens, uniform in 0..V-3, and
  T - 2M - 1 blanks (token V-2), each before a data token that is uniform among
  the M, so that a data token comes last; then the copy token V-1 and M blanks,
  at the m-th of which the m-th data token is asked.

  Attributes:
    vocab_size: V, blank and copy token included.
    length: T, above 2M + 1.
    data: M.

  Presets:
    mad_selective_copying: V = 16, T = 256, M = 16, 12,800 training and 1,280
      test rows. Variations: _vocab_{32,64,128}, _length_{512,1024},
      _train_{6400,3200,1600,800}, _copy_{32,64,96}.
    mad_selective_copying_small: T = 64, M = 8, fresh rows. Not a published
      setting.
    For the training there, see `MadRecall`.

  Differs: the reference draws the places of the blanks from NumPy's global
    generator and not from the one passed to it; here they follow from the seed.
    Its accuracy is the mean over classes. `SelectiveCopying` is Mamba's task.

  Paper: Poli, Thomas et al. 2024, Mechanistic Design and Scaling of Hybrid
    Architectures, arXiv:2403.17844, section 3 and appendix B; constants from
    the code of the paper, `mad/data/instances.py`, `configs/tasks/`.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: int = 16
  length: int = 256
  data: int = 16

  def __post_init__(self):
    super().__post_init__()
    owner = "MadSelectiveCopying"
    task_lib.check_int(owner, "vocab_size", self.vocab_size, 3)
    task_lib.check_int(owner, "data", self.data, 1)
    task_lib.check_int(owner, "length", self.length, 2 * self.data + 2)

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / (self.vocab_size - 2)

  def example(self, key):
    context = self.length - self.data - 1
    tokens, gaps = sampling.words(key, self.data, context - self.data)
    tokens = sampling.below(tokens, self.vocab_size - 2)
    blanks = jnp.zeros((self.data,), jnp.int32)
    blanks = blanks.at[sampling.below(gaps, self.data)].add(1)
    places = jnp.cumsum(blanks) + np.arange(self.data, dtype=np.int32)
    inputs = jnp.full((self.length,), self.vocab_size - 2, jnp.int32)
    inputs = inputs.at[places].set(tokens)
    inputs = inputs.at[context].set(self.vocab_size - 1)
    targets = jnp.zeros((self.length,), jnp.int32)
    targets = targets.at[context + 1 :].set(tokens)
    weights = jnp.zeros((self.length,), jnp.float32)
    return inputs, targets, weights.at[context + 1 :].set(1.0)

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    predictions = np.zeros_like(inputs)
    for row, tokens in enumerate(inputs):
      predictions[row, -self.data :] = tokens[tokens < self.vocab_size - 2]
    return predictions


_NAME = "mad_selective_copying"
_BASE = dict(num_train=12_800, num_test=1280)
task_lib.register(_NAME, MadSelectiveCopying, **_BASE)
for _value in (32, 64, 128):
  task_lib.register(
    f"{_NAME}_vocab_{_value}", MadSelectiveCopying, vocab_size=_value, **_BASE
  )
for _value in (512, 1024):
  task_lib.register(
    f"{_NAME}_length_{_value}", MadSelectiveCopying, length=_value, **_BASE
  )
for _value in (6400, 3200, 1600, 800):
  task_lib.register(
    f"{_NAME}_train_{_value}",
    MadSelectiveCopying,
    **{**_BASE, "num_train": _value},
  )
for _value in (32, 64, 96):
  task_lib.register(
    f"{_NAME}_copy_{_value}", MadSelectiveCopying, data=_value, **_BASE
  )
task_lib.register(f"{_NAME}_small", MadSelectiveCopying, length=64, data=8)
