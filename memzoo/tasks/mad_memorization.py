"""MAD: memorization."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadMemorization(Generator):
  """Learn by heart one table of keys and values, which no row shows.

  With V = vocab_size, K = (V - 1) // 2: keys are 0..K-1, values K..V-2; the
  table gives each key a value of its own and is the same in every row, split
  and seed. A row holds T / 2 keys, uniform with replacement, each followed by
  the token V-1, at which the value of the key is asked. The weights of a model
  must hold the table: its memory across steps is of no use.

  Attributes:
    vocab_size: V, the asking token included.
    length: T, even.
    table_seed: seed of the table.

  Presets:
    mad_memorization: V = 256, T = 32, 256 training and 1,280 test rows.
      Variations: _vocab_{512,1024,2048,4096,8192}; 256 rows show about 63% of
      the keys of the largest.
    mad_memorization_small: V = 32. Not a published setting.
    For the training there, see `MadRecall`.

  Differs: the table is another permutation. The reference's accuracy is the
    mean over classes.

  Paper: Poli, Thomas et al. 2024, Mechanistic Design and Scaling of Hybrid
    Architectures, arXiv:2403.17844, section 3 and appendix B; constants from
    the code of the paper, `mad/data/instances.py`, `mad/configs.py`,
    `configs/tasks/`.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: int = 256
  length: int = 32
  table_seed: int = 12345

  def __post_init__(self):
    super().__post_init__()
    owner = "MadMemorization"
    task_lib.check_int(owner, "vocab_size", self.vocab_size, 3)
    task_lib.check_int(owner, "length", self.length, 2)
    task_lib.check_int(owner, "table_seed", self.table_seed, 0, 2**32 - 1)
    if self.length % 2:
      raise ValueError(f"{owner}: length must be even; got {self.length}")

  @property
  def num_keys(self) -> int:
    return (self.vocab_size - 1) // 2

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / self.num_keys

  def table(self):
    """The value of each key, int32 [K]."""
    key = sampling.stream(self.table_seed, "memorization")
    (word,) = sampling.words(key, self.num_keys)
    return sampling.distinct(word, self.num_keys, self.vocab_size - 1)

  def example(self, key):
    (keys,) = sampling.words(key, self.length // 2)
    keys = sampling.below(keys, self.num_keys)
    asking = jnp.full_like(keys, self.vocab_size - 1)
    inputs = jnp.stack([keys, asking], axis=1).reshape(-1)
    values = self.table()[keys]
    targets = jnp.stack([values, values], axis=1).reshape(-1)
    weights = np.arange(self.length) % 2
    return inputs, targets, jnp.asarray(weights, jnp.float32)

  def oracle(self, batch):
    keys = np.asarray(batch.inputs)[:, ::2]
    return np.repeat(np.asarray(self.table())[keys], 2, axis=1)


_NAME = "mad_memorization"
_BASE = dict(num_train=256, num_test=1280)
task_lib.register(_NAME, MadMemorization, **_BASE)
for _value in (512, 1024, 2048, 4096, 8192):
  task_lib.register(
    f"{_NAME}_vocab_{_value}", MadMemorization, vocab_size=_value, **_BASE
  )
task_lib.register(f"{_NAME}_small", MadMemorization, vocab_size=32)
