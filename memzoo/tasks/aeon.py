"""Time series classification: the data sets inside the package aeon."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from memzoo.tasks import task as task_lib
from memzoo.tasks.examples import Examples
from memzoo.tasks.task import Batch

# Data set: its loader in `aeon.datasets`.
_LOADERS = {
  "acsf1": "load_acsf1",
  "arrow_head": "load_arrow_head",
  "basic_motions": "load_basic_motions",
  "gunpoint": "load_gunpoint",
  "italy_power_demand": "load_italy_power_demand",
  "japanese_vowels": "load_japanese_vowels",
  "osuleaf": "load_osuleaf",
  "pickup_gesture_wiimote_z": "load_pickup_gesture_wiimoteZ",
  "unit_test": "load_unit_test",
}
DATASETS = tuple(_LOADERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aeon(Examples):
  """Classify the time series of a data set of the UCR and UEA archives.

  Those that come inside the package aeon: nothing is downloaded. Inputs
  float32 [B, T, D] of D channels, each less its mean and over its standard
  deviation in the training set. T is the greatest length of both splits;
  shorter series are filled up with zeros at the end, where `mask` is False
  (None where all have one length). Targets int32 [B]: classes in the order of
  their names, as strings. The splits are those of the archives.

  Attributes:
    dataset: one of `DATASETS`.
    holdout: training examples kept for validation: see `Examples`.

  Presets: aeon_{dataset}; training and test examples, T x D, classes:

    acsf1                      100  100   1460 x 1   10
    arrow_head                  36  175    251 x 1    3
    basic_motions               40   40    100 x 6    4
    gunpoint                    50  150    150 x 1    2
    italy_power_demand          67 1029     24 x 1    2
    japanese_vowels            270  370  7..29 x 12   9
    osuleaf                    200  242    427 x 1    6
    pickup_gesture_wiimote_z    50   50 29..361 x 1  10
    unit_test (of Chinatown)    20   22     24 x 1    2

  Differs: the archives leave scaling to the user. aeon ships regression and
    forecasting data too, which are not served here.

  Paper: Middlehurst et al. 2024, aeon: a Python Toolkit for Learning from Time
    Series, arXiv:2406.14231; Dau et al. 2018, The UCR Time Series Archive,
    arXiv:1810.07758; Bagnall et al. 2018, The UEA Multivariate Time Series
    Classification Archive, arXiv:1811.00075.
  """

  kind: ClassVar[str] = "classification"

  dataset: str

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_choice("Aeon", "dataset", self.dataset, DATASETS)

  @property
  def length(self) -> int:
    return _load(self.dataset)["train"][0].shape[1]

  @property
  def d_input(self) -> int:
    return _load(self.dataset)["train"][0].shape[2]

  @property
  def num_outputs(self) -> int:
    return len(_load(self.dataset)["classes"])

  @property
  def chance(self) -> float:
    return 1 / self.num_outputs

  def source_size(self, split):
    if split == "validation":
      return 0
    return len(_load(self.dataset)[split][0])

  def read(self, split, indices):
    inputs, targets, mask = _load(self.dataset)[split]
    return Batch(
      inputs=inputs[indices],
      targets=targets[indices],
      weights=np.ones(len(indices), np.float32),
      mask=None if mask is None else mask[indices],
    )


_SPLITS = ("train", "test")


@functools.lru_cache(maxsize=4)
def _load(dataset: str) -> dict[str, tuple[np.ndarray, ...]]:
  """Both splits as (inputs, targets, mask), and the names of the classes.

  The masks are None where all series have one length.
  """
  try:
    from aeon import datasets  # pylint: disable=import-outside-toplevel
  except ImportError as error:
    raise ImportError(
      f"the task aeon_{dataset} needs the package aeon: pip install aeon"
    ) from error
  loader = getattr(datasets, _LOADERS[dataset])
  series, labels = {}, {}
  for split in _SPLITS:
    found, names = loader(split=split)
    # A case is [D, length]; a list of them where lengths differ.
    series[split] = [np.asarray(case, np.float64).T for case in found]
    labels[split] = np.asarray(names).astype(str)
  steps = np.concatenate(series["train"])
  mean, deviation = steps.mean(0), steps.std(0)
  deviation = np.where(deviation > 0, deviation, 1.0)
  classes = np.unique(labels["train"])
  unknown = set(labels["test"]) - set(classes)
  if unknown:
    raise ValueError(
      f"aeon {dataset}: classes of the test split without training examples:"
      f" {sorted(unknown)}"
    )
  lengths = {len(case) for split in _SPLITS for case in series[split]}
  length = max(lengths)
  data = {"classes": tuple(classes.tolist())}
  for split in _SPLITS:
    shape = (len(series[split]), length)
    inputs = np.zeros((*shape, steps.shape[1]), np.float32)
    mask = np.zeros(shape, bool)
    for row, case in enumerate(series[split]):
      inputs[row, : len(case)] = (case - mean) / deviation
      mask[row, : len(case)] = True
    targets = np.searchsorted(classes, labels[split]).astype(np.int32)
    for array in (inputs, targets, mask):
      array.setflags(write=False)
    data[split] = inputs, targets, mask if len(lengths) > 1 else None
  return data


for _dataset in DATASETS:
  task_lib.register(f"aeon_{_dataset}", Aeon, dataset=_dataset)
