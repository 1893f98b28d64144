"""Several generated training sets and test sets as one task."""

import dataclasses

import jax
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(task_lib.Task):
  """Batches of several finite generators, each batch of one of them.

  In an epoch, component c gives num_train_c // B batches (one at least), and
  the components come in a random order, a pure function of (seed, epoch). The
  length of a batch is that of its component, so `step` is a Python integer and
  a training step compiles once for each length. Evaluation goes through the
  test components one after the other, each filled up to whole batches.

  Attributes:
    train: components of the training split; each has `num_train`.
    test: components of the validation and test splits.

  Differs: published mixtures of MQAR visit the components one after the other
    in every epoch, without shuffling, with a short last batch in each.
  """

  train: tuple[Generator, ...]
  test: tuple[Generator, ...]

  def __post_init__(self):
    components = (*self.train, *self.test)
    if not self.train or not self.test:
      raise ValueError("Mixture: train and test need one component each")
    for part in self.train:
      if part.num_train is None:
        raise ValueError(f"Mixture: a train component has no num_train: {part}")
    for name in ("kind", "vocab_size", "d_input", "num_outputs"):
      found = {getattr(part, name) for part in components}
      if len(found) > 1:
        raise ValueError(f"Mixture: components differ in {name}: {found}")

  @property
  def kind(self):
    return self.train[0].kind

  @property
  def vocab_size(self):
    return self.train[0].vocab_size

  @property
  def d_input(self):
    return self.train[0].d_input

  @property
  def num_outputs(self):
    return self.train[0].num_outputs

  @property
  def chance(self):
    return self.train[0].chance

  @property
  def length(self):
    return max(part.length for part in (*self.train, *self.test))

  def batch(self, seed, step, batch_size, split="train"):
    if isinstance(seed, jax.core.Tracer) or isinstance(step, jax.core.Tracer):
      raise TypeError(
        "Mixture: seed and step must be Python integers, not traced: they"
        " decide the shape of the batch"
      )
    task_lib.check_request(self, seed, step, batch_size, split)
    if split == "train":
      parts = self.train
      counts = [max(1, part.num_train // batch_size) for part in parts]
    else:
      parts = self.test
      counts = [max(1, part.num_test // batch_size) for part in parts]
    epoch, offset = divmod(int(step), sum(counts))
    slot = int(
      sampling.epoch_order_jit(
        sampling.stream(seed, split, "mixture"),
        np.uint32(epoch),
        np.uint32(offset),
        1,
        sum(counts),
      )[0]
    )
    last = np.cumsum(counts)
    which = int(np.searchsorted(last, slot, side="right"))
    place = slot - int(last[which]) + counts[which]
    return parts[which].batch(
      _component_seed(seed, which),
      epoch * counts[which] + place,
      batch_size,
      split,
    )

  def eval_batches(self, batch_size, split="test"):
    task_lib.check_request(self, 0, 0, batch_size, split)
    return self._eval_batches(batch_size, split)

  def _eval_batches(self, batch_size, split):
    parts = self.train if split == "train" else self.test
    for which, part in enumerate(parts):
      seed = _component_seed(0, which)
      yield from part.eval_batches(batch_size, split, seed)

  def oracle(self, batch):
    return self.train[0].oracle(batch)


def _component_seed(seed: int, which: int) -> int:
  """A seed for each component, so that their examples are unrelated."""
  key = sampling.stream(seed, f"component {which}")
  return int(jax.random.bits(key, (), np.uint32))
