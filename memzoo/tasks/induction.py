"""Induction heads, in one batch or as a stream of pieces."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator
from memzoo.tasks.task import Batch


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionStream(task_lib.Task):
  """The rows of `Induction`, read in pieces with memory carried over.

  A batch holds `piece` steps of its rows, the next batch the steps after them:
  step s is piece s % (L / piece) of the rows B g .. B g + B - 1, where L =
  length, g = s // (L / piece). A row begins with a reset, and asks at its last
  step alone. Nothing longer than a piece is ever made: the tokens of a piece
  are a pure function of (seed, split, row, piece), the place of the first
  trigger and the token after it of (seed, split, row).

  `eval_batches` reads `num_test` rows of a stream that does not depend on the
  seed of the run. `oracle` needs whole rows: pieces joined along time.

  Attributes:
    vocab_size: V, the trigger included.
    length: L, 4 or more. A model trained by `Induction` is tested at others by
      `make(name, length=...)`.
    piece: T of a batch, a divisor of `length`.
    num_test: rows of the validation split and of the test split.

  Presets:
    induction_mamba_stream: L = 2^20 in pieces of 4,096, 16 tokens, 64 rows: the
      longest test of the paper.
    induction_stream_small: L = 256 in pieces of 64. Not a published setting.

  Differs: as `Induction`; the paper does not give the number of test rows. The
    rows are others than those of `Induction`.

  Paper: see `Induction`.
  """

  kind: ClassVar[str] = "tokens"
  streams: ClassVar[bool] = True

  vocab_size: int = 16
  length: int = 2**20
  piece: int = 4096
  num_test: int = 64

  def __post_init__(self):
    owner = "InductionStream"
    task_lib.check_int(owner, "vocab_size", self.vocab_size, 3)
    task_lib.check_int(owner, "length", self.length, 4, 2**31 - 1)
    task_lib.check_int(owner, "piece", self.piece, 1, self.length)
    task_lib.check_int(owner, "num_test", self.num_test, 1, 2**31 - 1)
    if self.length % self.piece:
      raise ValueError(
        f"{owner}: piece must divide length = {self.length}; got {self.piece}"
      )

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / (self.vocab_size - 1)

  @property
  def pieces(self) -> int:
    """L / piece, the batches in which a row is read."""
    return self.length // self.piece

  def batch(self, seed, step, batch_size, split="train"):
    task_lib.check_request(self, seed, step, batch_size, split)
    if isinstance(step, jax.core.Tracer):
      step = step.astype(jnp.uint32)
      group = step // jnp.uint32(self.pieces)
      piece = step % jnp.uint32(self.pieces)
      first = group * jnp.uint32(batch_size)
    else:
      group, piece = divmod(int(step), self.pieces)
      first = np.uint32(group * batch_size % 2**32)
      piece = np.uint32(piece)
    if not isinstance(seed, jax.core.Tracer):
      seed = np.uint32(seed)
    return self._pieces(batch_size, seed, split, first, piece)

  def _pieces(self, size, seed, split, first, piece) -> Batch:
    # What only counts rows must not cause a compilation.
    static = dataclasses.replace(self, num_test=1)
    return _pieces(static, size, seed, sampling.tag(split), first, piece)

  def eval_batches(self, batch_size, split="test"):
    task_lib.check_request(self, 0, 0, batch_size, split)
    return self._eval_batches(batch_size, split)

  def _eval_batches(self, size, split):
    for first in range(0, self.num_test, size):
      left = self.num_test - first
      for piece in range(self.pieces):
        batch = self._pieces(
          size, np.uint32(0), split, np.uint32(first), np.uint32(piece)
        )
        if left < size:
          weights = np.array(batch.weights)
          weights[left:] = 0
          batch = batch._replace(weights=weights)
        yield batch

  def example(self, key, piece):
    """A piece of the row of a key: (inputs, targets, weights, reset)."""
    place, answer = sampling.words(key, 1, 1)
    place = sampling.below(place[0], self.length - 3)
    answer = sampling.below(answer[0], self.vocab_size - 1)
    tokens = jax.random.bits(
      jax.random.fold_in(key, piece), (self.piece,), jnp.uint32
    )
    step = piece.astype(jnp.int32) * self.piece + np.arange(
      self.piece, dtype=np.int32
    )
    last = step == self.length - 1
    inputs = sampling.below(tokens, self.vocab_size - 1)
    inputs = jnp.where(step == place + 1, answer, inputs)
    inputs = jnp.where((step == place) | last, self.vocab_size - 1, inputs)
    targets = jnp.where(last, answer, 0)
    return inputs, targets, last.astype(jnp.float32), step == 0

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    if inputs.shape[1] != self.length:
      raise ValueError(
        f"InductionStream: oracle needs whole rows of {self.length} steps; got"
        f" {inputs.shape[1]}; join the pieces along time"
      )
    return Induction.oracle(self, batch)


@functools.partial(jax.jit, static_argnames=("task", "size"))
def _pieces(task, size, seed, split, first, piece) -> Batch:
  """One piece of `size` successive rows of the stream of (seed, split)."""
  key = jax.random.fold_in(sampling.stream(seed, "pieces"), split)
  row = first + jnp.arange(size, dtype=jnp.uint32)
  return Batch(
    *jax.vmap(lambda i: task.example(jax.random.fold_in(key, i), piece))(row)
  )


task_lib.register("induction", Induction)
task_lib.register("induction_mamba", Induction, vocab_size=16, length=256)
task_lib.register("induction_small", Induction, vocab_size=16, length=64)
task_lib.register("induction_mamba_stream", InductionStream)
task_lib.register(
  "induction_stream_small", InductionStream, length=256, piece=64
)
