"""MAD: compression."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadCompression(Generator):
  """Give back a whole sequence from the state after its last token.

  With V = vocab_size, L = seq_len: L - 1 tokens, uniform in 0..V-2, then L - 1
  compression tokens V-1, at the m-th of which the m-th token is asked.

  Attributes:
    vocab_size: V, the compression token included.
    seq_len: L; T = 2 (L - 1).

  Presets:
    mad_compression: V = 16, L = 32, 12,800 training and 1,280 test rows.
      Variations: _vocab_{32,64,128}, _length_{64,128,256},
      _train_{6400,3200,1600,800}.
    mad_compression_small: L = 16, fresh rows. Not a published setting.
    For the training there, see `MadRecall`.

  Differs: the reference shows one compression token, takes the vector that the
    model gives there, adds a position to it and reads each of the L tokens (the
    compression token too) with a two-layer network: an auto-encoder. Here the
    memory gives them back step by step, so that no head of its own is needed;
    memory that keeps the tokens themselves, a window of attention, is not
    forced to compress, and figures do not compare.

  Paper: Poli, Thomas et al. 2024, Mechanistic Design and Scaling of Hybrid
    Architectures, arXiv:2403.17844, section 3 and appendix B; constants from
    the code of the paper, `mad/data/instances.py`, `configs/tasks/`.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: int = 16
  seq_len: int = 32

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("MadCompression", "vocab_size", self.vocab_size, 2)
    task_lib.check_int("MadCompression", "seq_len", self.seq_len, 2)

  @property
  def length(self) -> int:
    return 2 * (self.seq_len - 1)

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / (self.vocab_size - 1)

  def example(self, key):
    n = self.seq_len - 1
    (tokens,) = sampling.words(key, n)
    tokens = sampling.below(tokens, self.vocab_size - 1)
    inputs = jnp.pad(tokens, (0, n), constant_values=self.vocab_size - 1)
    weights = np.arange(self.length) >= n
    return inputs, jnp.pad(tokens, (n, 0)), jnp.asarray(weights, jnp.float32)

  def oracle(self, batch):
    return np.roll(np.asarray(batch.inputs), self.seq_len - 1, axis=1)


_NAME = "mad_compression"
_BASE = dict(num_train=12_800, num_test=1280)
task_lib.register(_NAME, MadCompression, **_BASE)
for _value in (32, 64, 128):
  task_lib.register(
    f"{_NAME}_vocab_{_value}", MadCompression, vocab_size=_value, **_BASE
  )
for _value in (64, 128, 256):
  task_lib.register(
    f"{_NAME}_length_{_value}", MadCompression, seq_len=_value, **_BASE
  )
for _value in (6400, 3200, 1600, 800):
  task_lib.register(
    f"{_NAME}_train_{_value}",
    MadCompression,
    **{**_BASE, "num_train": _value},
  )
task_lib.register(f"{_NAME}_small", MadCompression, seq_len=16)
