"""Tasks whose examples are made up on the device."""

from collections.abc import Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.task import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator(task_lib.Task):
  """A task given by a function from a random key to one example.

  A concrete task writes `example`; everything else is here. Splits draw from
  streams of their own. Example i of a stream is a function of (seed, split, i)
  alone, so the batch size does not change the data.

  Attributes:
    num_train: size of the training set, which is shuffled anew each epoch;
      None: fresh examples for ever.
    num_test: size of the validation set and of the test set. They do not
      depend on the seed of the run.
  """

  num_train: int | None = None
  num_test: int = 1024

  def __post_init__(self):
    owner = type(self).__name__
    if self.num_train is not None:
      task_lib.check_int(owner, "num_train", self.num_train, 1, 2**31 - 1)
    task_lib.check_int(owner, "num_test", self.num_test, 1, 2**31 - 1)

  def example(self, key: jax.Array) -> tuple[jax.Array | None, ...]:
    """One example: the fields of a `Batch` without the batch axis.

    (inputs, targets, weights), or those and (reset, mask), which may be None.
    """
    raise NotImplementedError(type(self).__name__)

  def batch(self, seed, step, batch_size, split="train"):
    task_lib.check_request(self, seed, step, batch_size, split)
    count = self.num_train if split == "train" else None
    epoch, offset = sampling.locate(step, batch_size, count)
    if not isinstance(seed, jax.core.Tracer):
      seed = np.uint32(seed)
    return self._generate(split, count, batch_size, seed, epoch, offset)

  def _generate(self, split, count, size, seed, epoch, offset) -> Batch:
    # What only counts examples must not cause a compilation.
    static = dataclasses.replace(self, num_train=None, num_test=1)
    tag = sampling.tag(split)
    return _rows(static, count, size, seed, tag, epoch, offset)

  def eval_batches(
    self, batch_size: int, split: str = "test", seed: int = 0
  ) -> Iterator[Batch]:
    """The first `num_test` examples of the stream (seed, split), in order."""
    task_lib.check_request(self, seed, 0, batch_size, split)
    return self._eval_batches(batch_size, split, seed)

  def _eval_batches(self, batch_size, split, seed):
    for first in range(0, self.num_test, batch_size):
      batch = self._generate(
        split,
        None,
        batch_size,
        np.uint32(seed),
        np.uint32(0),
        np.uint32(first),
      )
      left = self.num_test - first
      if left < batch_size:
        weights = np.array(batch.weights)
        weights[left:] = 0
        batch = batch._replace(weights=weights)
      yield batch


@functools.partial(jax.jit, static_argnames=("task", "count", "size"))
def _rows(task, count, size, seed, split, epoch, offset) -> Batch:
  """Batch of `size` rows from a place in the stream of (seed, split)."""
  key = jax.random.fold_in(sampling.stream(seed), split)
  if count is None:
    index = offset + jnp.arange(size, dtype=jnp.uint32)
  else:
    order = jax.random.fold_in(sampling.stream(seed, "order"), split)
    index = sampling.epoch_order(order, epoch, offset, size, count)
  return Batch(
    *jax.vmap(lambda i: task.example(jax.random.fold_in(key, i)))(index)
  )
