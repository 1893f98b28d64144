"""Handwritten digits, 64 pixels one after the other."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from memzoo.tasks import task as task_lib
from memzoo.tasks.examples import Examples
from memzoo.tasks.task import Batch

#: The first so many of the 1,797 images are for training, the rest for tests.
NUM_TRAIN, NUM_TEST = 1437, 360
_PIXELS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Examples):
  """Classify an image of 8 x 8 pixels that is read as a sequence.

  The 1,797 images of `sklearn.datasets.load_digits` (shipped in the package
  scikit-learn: no download). The pixels, row by row, are cut into steps of
  D = `width`: inputs float32 [B, 64 / D, D] in [0, 1]; targets int32 [B]. In
  the order of the package, the first 1,437 images are the training set and the
  last 360 the test set, which is the cut of
  `train_test_split(test_size=0.2, shuffle=False)`.

  Attributes:
    permutation: None, or the seed of a permutation of the 64 pixels, all
      images alike (NumPy's legacy generator). Neighbours are then unrelated.
    classes: digits that occur; None: all ten. The targets keep their numbers.
    width: D, pixels in a step; a divisor of 64.
    holdout: training examples kept for validation: see `Examples`.

  Presets: digits, digits_permuted (seed 42). Sequences of 64 steps; no
    published figures.

  Differs: the papers read the 784 pixels of MNIST, which has to be downloaded
    (preset tfds_mnist); these images have 64 pixels of 17 grey levels.

  Paper: Le, Jaitly, Hinton 2015, A Simple Way to Initialize Recurrent Networks
    of Rectified Linear Units, arXiv:1504.00941, section 4.2 (sequential and
    permuted MNIST); data: Alpaydin and Kaynak 1998, Optical Recognition of
    Handwritten Digits, UCI Machine Learning Repository.
  """

  kind: ClassVar[str] = "classification"
  num_outputs: ClassVar[int] = 10

  permutation: int | None = None
  classes: tuple[int, ...] | None = None
  width: int = 1

  def __post_init__(self):
    super().__post_init__()
    if self.permutation is not None:
      task_lib.check_int(
        "Digits", "permutation", self.permutation, 0, 2**32 - 1
      )
    task_lib.check_int("Digits", "width", self.width, 1, _PIXELS)
    if _PIXELS % self.width:
      raise ValueError(
        f"Digits: width must be a divisor of {_PIXELS}; got {self.width}"
      )
    if self.classes is not None:
      classes = tuple(self.classes)
      for digit in classes:
        task_lib.check_int("Digits", "classes", digit, 0, 9)
      if not classes or len(set(classes)) < len(classes):
        raise ValueError(
          f"Digits: classes must be distinct digits, one at least; got"
          f" {self.classes!r}"
        )
      object.__setattr__(self, "classes", classes)

  @property
  def length(self) -> int:
    return _PIXELS // self.width

  @property
  def d_input(self) -> int:
    return self.width

  @property
  def chance(self) -> float:
    return 1 / (10 if self.classes is None else len(self.classes))

  def source_size(self, split):
    return len(_places(split, self.classes))

  def read(self, split, indices):
    images, labels = load()
    place = _places(split, self.classes)[indices]
    inputs = images[place]
    if self.permutation is not None:
      order = np.random.RandomState(self.permutation).permutation(_PIXELS)
      inputs = inputs[:, order]
    return Batch(
      inputs=inputs.reshape(len(place), self.length, self.width),
      targets=labels[place],
      weights=np.ones(len(place), np.float32),
    )


@functools.lru_cache(maxsize=1)
def load() -> tuple[np.ndarray, np.ndarray]:
  """The images, float32 [1797, 64] in [0, 1], and labels, int32 [1797].

  Raises:
    ImportError: scikit-learn is not installed.
  """
  try:
    from sklearn import datasets  # pylint: disable=import-outside-toplevel
  except ImportError as error:
    raise ImportError(
      "the tasks on digits need the package scikit-learn: pip install"
      " scikit-learn"
    ) from error
  found = datasets.load_digits()
  images = (found.data / 16).astype(np.float32)
  labels = found.target.astype(np.int32)
  for array in (images, labels):
    array.setflags(write=False)
  return images, labels


@functools.lru_cache(maxsize=64)
def _places(split: str, classes: tuple[int, ...] | None) -> np.ndarray:
  """Which of the 1,797 images a split holds, int64, in order."""
  labels = load()[1]
  if split == "validation":
    return np.zeros(0, np.int64)
  place = np.arange(len(labels))
  place = place[:NUM_TRAIN] if split == "train" else place[NUM_TRAIN:]
  if classes is None:
    return place
  return place[np.isin(labels[place], classes)]


task_lib.register("digits", Digits)
task_lib.register("digits_permuted", Digits, permutation=42)
