"""How many tokens one state can hold and give back."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryCopy(Generator):
  """Read n random tokens, then give them all back in order.

  With V = vocab_size, n = tokens: n tokens, uniform in 0..V-2, then the
  separator V-1 and the first n - 1 of them again. From the separator on, the
  next token of the copy is asked, so T = 2n and the answers are fed back as in
  generation. When the separator is read, all that a recurrent memory can know
  is in its state: n log2(V - 1) bits are asked of it.

  Attributes:
    vocab_size: V, the separator included.
    tokens: n.

  Presets:
    memory_copy_{n}: n = 64, 128, 256, 512, 1024 of 32 different tokens.
    memory_copy_small: n = 32 of 8.
    None is a published setting.

  Differs: the copying task of the paper below has strings of random length
    (here n is fixed, so that the state must hold the same in each row), and
    begins with a token of its own.

  Paper: after Jelassi, Brandfonbrener et al. 2024, Repeat After Me:
    Transformers are Better than State Space Models at Copying,
    arXiv:2402.01032.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: int = 33
  tokens: int = 64

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("MemoryCopy", "vocab_size", self.vocab_size, 2)
    task_lib.check_int("MemoryCopy", "tokens", self.tokens, 1)

  @property
  def length(self) -> int:
    return 2 * self.tokens

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / (self.vocab_size - 1)

  def example(self, key):
    n = self.tokens
    (tokens,) = sampling.words(key, n)
    tokens = sampling.below(tokens, self.vocab_size - 1)
    separator = jnp.full((1,), self.vocab_size - 1, jnp.int32)
    inputs = jnp.concatenate([tokens, separator, tokens[:-1]])
    weights = np.arange(self.length) >= n
    return inputs, jnp.pad(tokens, (n, 0)), jnp.asarray(weights, jnp.float32)

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    predictions = np.zeros_like(inputs)
    predictions[:, self.tokens :] = inputs[:, : self.tokens]
    return predictions


for _tokens in (64, 128, 256, 512, 1024):
  task_lib.register(f"memory_copy_{_tokens}", MemoryCopy, tokens=_tokens)
task_lib.register("memory_copy_small", MemoryCopy, vocab_size=9, tokens=32)
