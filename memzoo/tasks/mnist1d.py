"""MNIST-1D: ten digit shapes as noisy signals of 40 steps."""

import dataclasses
import functools
import pathlib
import random
from typing import ClassVar
import zipfile

import numpy as np

from memzoo.tasks import cache, task as task_lib
from memzoo.tasks.examples import Examples
from memzoo.tasks.task import Batch

_SHAPES = {
  "x": (4000, 40),
  "y": (4000,),
  "x_test": (1000, 40),
  "y_test": (1000,),
}
_SHUFFLE_SEED = 42


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mnist1d(Examples):
  """Classify a signal of 40 steps into ten digits.

  The data set of the `mnist1d` package, made on this machine by the package's
  own generator with its published constants and seed (no download), and kept
  in the cache folder; a damaged cache file is made anew. Inputs are
  float32 [B, 40, 1], of mean 0 and variance 1 over the data set; targets
  int32 [B]. 4,000 examples for training, 1,000 for the test.

  Attributes:
    shuffled: the 40 steps are permuted, all examples alike, by the
      permutation of the authors' comparison: NumPy's legacy generator at
      seed 42. Neighbours in time are then unrelated.
    holdout: training examples kept for validation: see `Examples`.

  Presets: mnist1d, mnist1d_shuffled. The authors' table of test accuracy, in
    percent, plain and shuffled: logistic regression 32, 32; MLP 68, 68;
    CNN 94, 56; GRU 91, 57 (README of the package).

  Differs: nothing; the package's option `shuffle_seq` makes another
    permutation than the authors' comparison.

  Paper: Greydanus and Kobak 2024, Scaling Down Deep Learning with MNIST-1D,
    ICML, arXiv:2011.14439.
  """

  kind: ClassVar[str] = "classification"
  d_input: ClassVar[int] = 1
  num_outputs: ClassVar[int] = 10
  length: ClassVar[int] = 40
  chance: ClassVar[float] = 0.1

  shuffled: bool = False

  def source_size(self, split):
    return {"train": 4000, "validation": 0, "test": 1000}[split]

  def read(self, split, indices):
    suffix = "_test" if split == "test" else ""
    data = _load(cache.cache_dir() / "mnist1d.npz")
    inputs = data["x" + suffix][indices]
    if self.shuffled:
      inputs = inputs[:, np.random.RandomState(_SHUFFLE_SEED).permutation(40)]
    return Batch(
      inputs=inputs[:, :, None],
      targets=data["y" + suffix][indices],
      weights=np.ones(len(indices), np.float32),
    )


@functools.lru_cache(maxsize=2)
def _load(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The data set from the cache file, which is made if absent or damaged."""
  data = _read(path)
  if data is None:
    data = _generate()
    cache.write_atomically(path, lambda name: np.savez(name, **data))
  for array in data.values():
    array.setflags(write=False)
  return data


def _read(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """The arrays of the cache file; None if it is absent or damaged."""
  try:
    with open(path, "rb") as handle, np.load(handle) as file:
      data = {name: file[name] for name in _SHAPES}
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None
  for name, shape in _SHAPES.items():
    dtype = np.int32 if name.startswith("y") else np.float32
    if data[name].shape != shape or data[name].dtype != dtype:
      return None
    if not np.isfinite(data[name]).all():
      return None
  return data


def _generate() -> dict[str, np.ndarray]:
  """Runs the package's generator; the global random states are kept."""
  try:
    from mnist1d import data as generator  # pylint: disable=import-outside-toplevel
  except ImportError as error:
    raise ImportError(
      "the task mnist1d needs the package mnist1d: pip install mnist1d"
    ) from error
  states = np.random.get_state(), random.getstate()
  try:
    made = generator.make_dataset(generator.get_dataset_args())
  finally:
    np.random.set_state(states[0])
    random.setstate(states[1])
  return {
    name: made[name].astype(np.int32 if name.startswith("y") else np.float32)
    for name in _SHAPES
  }


task_lib.register("mnist1d", Mnist1d)
task_lib.register("mnist1d_shuffled", Mnist1d, shuffled=True)
