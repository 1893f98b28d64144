"""General-purpose in-context learning (GPICL)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import digits, sampling, task as task_lib
from memzoo.tasks.generator import Generator

TRANSFORMS = ("projection", "permutation", "none")
_PIXELS, _CLASSES = 64, 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneralIcl(Generator):
  """Learn to classify digits anew in every row, from the labels in it.

  A task is a matrix A, 64 x 64, and a permutation p of the ten labels, both
  random. A row holds T = length distinct images z_t, digits d_t, of one task:
  x_t = A z_t, y_t = p(d_t). The input at step t is x_t and, as ten more
  numbers, the label y_{t-1} as a unit vector (zeros at t = 0): float32
  [T, 74]. The target is y_t, at every step: what can be known of p at t is
  what the labels so far have shown.

  The images are those of `Digits`, less the mean and over the standard
  deviation of all pixels of all training images. Rows of the split 'train'
  have training images and one of `num_tasks` tasks, those of the other splits
  have test images and a task of their own, never seen before.

  Attributes:
    length: T.
    num_tasks: number of tasks in the training split, the same for every seed,
      2^k in the paper; None: a task of its own for every row.
    transform: 'projection', A_ij from N(0, 1/64); 'permutation', A permutes
      the pixels; 'none', A is the identity (labels are permuted in any case).
    unseen: all splits are as the test split is. False with
      `num_tasks` tells memorising from learning to learn.

  Presets:
    gpicl: T = 100, fresh tasks for ever.
    gpicl_2_{0,8,16,24}: T = 100, so many tasks: the paper sweeps powers of two.
    gpicl_small: T = 32, permuted pixels. Not a published setting.

  Differs: digits of 64 pixels in place of MNIST, which cannot be had without a
    download: 1,437 images for training and 360 for tests, which validation and
    test rows share (in unrelated tasks). The authors published no code; T and
    the scaling of pixels are those of two independent re-implementations,
    which both take 1/64 for the standard deviation of A_ij. Here it is the
    variance, so that x_t is as large as z_t.

  Paper: Kirsch, Harrison, Sohl-Dickstein, Metz 2022, General-Purpose
    In-Context Learning by Meta-Learning Transformers, arXiv:2212.04458,
    section 3.
  """

  kind: ClassVar[str] = "labels"
  d_input: ClassVar[int] = _PIXELS + _CLASSES
  num_outputs: ClassVar[int] = _CLASSES
  chance: ClassVar[float] = 0.1

  length: int = 100
  num_tasks: int | None = None
  transform: str = "projection"
  unseen: bool = False

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("GeneralIcl", "length", self.length, 1, digits.NUM_TEST)
    if self.num_tasks is not None:
      task_lib.check_int(
        "GeneralIcl", "num_tasks", self.num_tasks, 1, 2**32 - 1
      )
    task_lib.check_choice("GeneralIcl", "transform", self.transform, TRANSFORMS)

  def _generate(self, split, *place):
    task = self
    if self.unseen or split != "train":
      task = dataclasses.replace(self, unseen=True, num_tasks=None)
    return super(GeneralIcl, task)._generate(split, *place)

  def example(self, key):
    images, labels = digits.load()
    part = slice(digits.NUM_TRAIN, None)
    if not self.unseen:
      part = slice(digits.NUM_TRAIN)
    mean = images[: digits.NUM_TRAIN].mean()
    deviation = images[: digits.NUM_TRAIN].std()
    images = (images[part] - mean) / deviation

    chosen, which = sampling.words(key, self.length, 1)
    chosen = sampling.distinct(chosen, 0, len(images))
    if self.num_tasks is None:
      task_key = jax.random.fold_in(key, sampling.tag("task"))
    else:
      which = which[0] % np.uint32(self.num_tasks)
      task_key = jax.random.fold_in(sampling.stream(0, "general_icl"), which)
    relabel, shuffle = sampling.words(task_key, _CLASSES, _PIXELS)
    relabel = sampling.distinct(relabel, 0, _CLASSES)

    x = jnp.asarray(images)[chosen]
    y = relabel[jnp.asarray(labels[part])[chosen]]
    if self.transform == "permutation":
      x = x[:, sampling.distinct(shuffle, 0, _PIXELS)]
    elif self.transform == "projection":
      key = jax.random.fold_in(task_key, sampling.tag("projection"))
      matrix = jax.random.normal(key, (_PIXELS, _PIXELS), jnp.float32)
      matrix = matrix * jnp.float32(_PIXELS**-0.5)
      x = jnp.matmul(x, matrix.T, precision="highest")
    before = jax.nn.one_hot(y[:-1], _CLASSES, dtype=jnp.float32)
    before = jnp.concatenate([jnp.zeros((1, _CLASSES), jnp.float32), before])
    inputs = jnp.concatenate([x, before], axis=1)
    return inputs, y, jnp.ones((self.length,), jnp.float32)


task_lib.register("gpicl", GeneralIcl)
for _log_tasks in (0, 8, 16, 24):
  task_lib.register(
    f"gpicl_2_{_log_tasks}", GeneralIcl, num_tasks=2**_log_tasks
  )
task_lib.register("gpicl_small", GeneralIcl, length=32, transform="permutation")
