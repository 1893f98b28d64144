"""Data sets of TensorFlow Datasets, read without TensorFlow."""

import dataclasses
import difflib
import functools
from typing import Any, ClassVar
import zlib

import numpy as np

from memzoo.tasks import cache, task as task_lib
from memzoo.tasks.byte_stream import ByteStream
from memzoo.tasks.examples import Examples
from memzoo.tasks.task import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsClassification(Examples):
  """Classify the examples of a data set by name.

  An image [H, W, C] is read as H * W pixels, row by row: inputs
  float32 [B, H * W, C] in [0, 1]. A numeric feature [T] or [T, D] is read as
  it is. A text is read as bytes: inputs int32 [B, T], padded with zeros where
  `mask` is False, cut at `text_length`.

  Records come through `tfds.data_source` (array_record files, prepared and
  where needed downloaded by TFDS) and are parsed in a Grain pipeline. The
  order is that of `Examples`, so there is no reader state to save.

  Attributes:
    dataset: name for TFDS, with or without config and version.
    data_dir: where TFDS keeps its files; None: its default.
    feature: input feature; None: the data set's own pair (input, label), or
      else the first that can be read.
    label: class label; None: likewise.
    train, validation, test: TFDS split expressions, as 'train[90%:]'.
    text_length: T of text inputs.
    holdout: training examples kept for validation: see `Examples`.
  """

  kind: ClassVar[str] = "classification"

  dataset: str
  data_dir: str | None = None
  feature: str | None = None
  label: str | None = None
  train: str = "train"
  validation: str = "validation"
  test: str = "test"
  text_length: int = 256

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("TfdsClassification", "text_length", self.text_length, 1)

  @property
  def _keys(self) -> tuple[str, str]:
    return _pair(self.dataset, self.data_dir, self.feature, self.label)

  @property
  def _shape(self) -> tuple[int, int] | None:
    """(T, D) of array inputs; None for text."""
    features = _info(self.dataset, self.data_dir).features
    key = self._keys[0]
    if _is_text(features[key]):
      return None
    shape = features[key].shape
    if None in shape or not shape:
      raise ValueError(
        f"tfds {self.dataset}: the feature {key!r} has the shape {shape};"
        " a sequence needs a fixed one"
      )
    if len(shape) == 1:
      return shape[0], 1
    return int(np.prod(shape[:-1])), shape[-1]

  @property
  def vocab_size(self) -> int | None:
    return 256 if self._shape is None else None

  @property
  def d_input(self) -> int | None:
    return None if self._shape is None else self._shape[1]

  @property
  def length(self) -> int:
    return self.text_length if self._shape is None else self._shape[0]

  @property
  def num_outputs(self) -> int:
    features = _info(self.dataset, self.data_dir).features
    return features[self._keys[1]].num_classes

  @property
  def chance(self) -> float:
    return 1 / self.num_outputs

  def source_size(self, split):
    if split == "validation":
      splits = _info(self.dataset, self.data_dir).splits
      if self.validation == "validation" and "validation" not in splits:
        return 0
    return len(self.pipeline(split))

  def pipeline(self, split: str):
    """The split as a `grain.MapDataset` of (inputs, targets, mask) arrays."""
    return _pipeline(self, split)

  def read(self, split, indices):
    pipeline = self.pipeline(split)
    rows = [pipeline[int(index)] for index in indices]
    inputs, targets, mask = (np.stack(column) for column in zip(*rows))
    return Batch(
      inputs=inputs,
      targets=targets,
      weights=np.ones(len(rows), np.float32),
      mask=mask if self._shape is None else None,
    )


@functools.lru_cache(maxsize=16)
def _pipeline(task: TfdsClassification, split: str):
  _, grain = _import()
  expression = getattr(task, split)
  source = _source(task.dataset, task.data_dir, expression)
  feature, label = task._keys  # pylint: disable=protected-access
  shape = task._shape  # pylint: disable=protected-access
  length = task.length

  def parse(record):
    target = np.asarray(record[label], np.int32)
    if shape is None:
      text = np.frombuffer(_as_bytes(record[feature]), np.uint8)[:length]
      tokens = np.zeros(length, np.int32)
      tokens[: len(text)] = text
      return tokens, target, np.arange(length) < len(text)
    array = np.asarray(record[feature])
    scale = np.float32(255 if array.dtype == np.uint8 else 1)
    array = array.astype(np.float32).reshape(shape) / scale
    return array, target, np.ones(shape[0], bool)

  return grain.MapDataset.source(source).map(parse)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsText(ByteStream):
  """Predict the next byte of a data set's texts.

  The texts of a split are written one after the other, once, to a file in the
  cache folder, which is mapped; a damaged file is made anew. Each text is a
  document: see `ByteStream`.

  Attributes:
    dataset: name for TFDS, with or without config and version.
    data_dir: where TFDS keeps its files; None: its default.
    feature: text feature; None: the first.
    train, validation, test: TFDS split expressions, as 'train[90%:]'.
    length: T.
    mode: 'stream' or 'window'.
  """

  dataset: str
  data_dir: str | None = None
  feature: str | None = None
  train: str = "train"
  validation: str = "validation"
  test: str = "test"

  def contents(self, split):
    task_lib.check_choice("TfdsText", "split", split, task_lib.SPLITS)
    return _texts(
      self.dataset,
      self.data_dir,
      self.feature,
      getattr(self, split),
      cache.cache_dir(),
    )


@functools.lru_cache(maxsize=16)
def _texts(dataset, data_dir, feature, expression, folder):
  """Bytes and document starts of a split, through the cache folder."""
  info = _info(dataset, data_dir)
  feature = _text_feature(dataset, info.features, feature)
  source = _source(dataset, data_dir, expression)
  what = f"{info.full_name} {feature} {expression} {len(source)} {data_dir}"
  name = f"tfds-{info.name}-{zlib.crc32(what.encode()):08x}"
  path, index = folder / f"{name}.bin", folder / f"{name}.npy"
  found = _read_texts(path, index)
  if found is None:
    starts = [0]

    def write(target):
      with open(target, "wb") as file:
        for i in range(len(source)):
          text = _as_bytes(source[i][feature])
          if text:
            file.write(text)
            starts.append(starts[-1] + len(text))

    cache.write_atomically(path, write)
    if starts[-1] == 0:
      raise ValueError(f"tfds {dataset}: the split {expression!r} has no text")
    ends = np.asarray(starts, np.int64)
    cache.write_atomically(index, lambda target: np.save(target, ends))
    found = _read_texts(path, index)
  return found


def _read_texts(path, index):
  try:
    ends = np.load(index, allow_pickle=False)
    if ends.dtype != np.int64 or path.stat().st_size != ends[-1]:
      return None
  except (OSError, ValueError, EOFError, IndexError):
    return None
  return np.memmap(path, dtype=np.uint8, mode="r"), ends[:-1]


def make_tfds(
  *,
  dataset: str,
  data_dir: str | None = None,
  feature: str | None = None,
  label: str | None = None,
  train: str = "train",
  validation: str = "validation",
  test: str = "test",
  length: int | None = None,
  mode: str | None = None,
  holdout: int = 0,
) -> task_lib.Task:
  """A classification task where the data set has a class label, else a text.

  Args:
    dataset: name for TFDS.
    data_dir: see `TfdsClassification`, as all options down to `test`.
    feature: input feature.
    label: class label.
    train: split expression.
    validation: split expression.
    test: split expression.
    length: T of text inputs, 256 by default; images have their own.
    mode: of language modelling: 'stream' by default, or 'window'.
    holdout: of classification: training examples kept for validation.

  Returns:
    A `TfdsClassification` or a `TfdsText`.

  Raises:
    ImportError: tensorflow_datasets or grain is not installed.
    ValueError: unknown data set, no usable feature, or an option that does
      not apply.
  """
  common = dict(
    dataset=dataset,
    data_dir=data_dir,
    feature=feature,
    train=train,
    validation=validation,
    test=test,
  )
  features = _info(dataset, data_dir).features
  if label is not None or _class_labels(features):
    if mode is not None:
      raise ValueError(f"tfds {dataset}: mode is for texts without a label")
    task = TfdsClassification(
      label=label,
      holdout=holdout,
      **({} if length is None else {"text_length": length}),
      **common,
    )
    if length is not None and task.vocab_size is None:
      raise ValueError(
        f"tfds {dataset}: length is for texts; this input has"
        f" {task.length} steps"
      )
    return task
  if holdout:
    raise ValueError(
      f"tfds {dataset}: holdout is for classification; use split expressions"
      " such as train='train[:90%]', validation='train[90%:]'"
    )
  _text_feature(dataset, features, feature)
  options = {"length": length, "mode": mode}
  options = {name: x for name, x in options.items() if x is not None}
  return TfdsText(**options, **common)


def _import() -> tuple[Any, Any]:
  """tensorflow_datasets and grain, imported when first needed."""
  try:
    import grain  # pylint: disable=import-outside-toplevel
    import tensorflow_datasets as tfds  # pylint: disable=import-outside-toplevel
  except ImportError as error:
    raise _missing(error) from error
  return tfds, grain


def _missing(error: ImportError) -> ImportError:
  return ImportError(
    f"the task tfds needs the package {error.name}: pip install memzoo[data]"
  )


@functools.lru_cache(maxsize=16)
def _builder(dataset: str, data_dir: str | None):
  tfds, _ = _import()
  try:
    return tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
  except tfds.core.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    near = difflib.get_close_matches(dataset, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"unknown TFDS data set: {dataset!r}{hint}") from error


def _info(dataset: str, data_dir: str | None):
  return _builder(dataset, data_dir).info


@functools.lru_cache(maxsize=32)
def _source(dataset: str, data_dir: str | None, expression: str):
  """Random access to the records of a split; prepares the data set."""
  builder = _builder(dataset, data_dir)
  try:
    builder.download_and_prepare()
  except ImportError as error:
    raise _missing(error) from error
  except Exception as error:
    raise RuntimeError(
      f"tfds {dataset}: the data set could not be prepared in"
      f" {str(builder.data_dir)!r}: {type(error).__name__}: {error}"
    ) from error
  try:
    return builder.as_data_source(split=expression)
  except (KeyError, ValueError) as error:
    raise ValueError(
      f"tfds {dataset}: cannot read the split {expression!r}; it has"
      f" {', '.join(builder.info.splits)}"
    ) from error
  except NotImplementedError as error:
    raise RuntimeError(
      f"tfds {dataset}: {str(builder.data_dir)!r} was prepared in a format"
      " without random access; give another data_dir, or prepare it with"
      " tfds build --file_format=array_record"
    ) from error


def _is_text(feature) -> bool:
  tfds, _ = _import()
  return isinstance(feature, tfds.features.Text)


def _class_labels(features) -> list[str]:
  tfds, _ = _import()
  return [
    name
    for name, feature in features.items()
    if isinstance(feature, tfds.features.ClassLabel)
  ]


def _text_feature(dataset: str, features, name: str | None) -> str:
  texts = [key for key, feature in features.items() if _is_text(feature)]
  if name is None and texts:
    return texts[0]
  if name not in texts:
    raise ValueError(
      f"tfds {dataset}: no text feature"
      + (f" {name!r}" if name is not None else "")
      + f"; it has {', '.join(features)}"
    )
  return name


@functools.lru_cache(maxsize=32)
def _pair(dataset, data_dir, feature, label) -> tuple[str, str]:
  """Names of the input and the label feature."""
  info = _info(dataset, data_dir)
  features = info.features
  labels = _class_labels(features)
  keys = info.supervised_keys or (None, None)
  if label is None:
    label = keys[1] if keys[1] in labels else next(iter(labels), None)
  if label not in labels:
    raise ValueError(
      f"tfds {dataset}: no class label"
      + (f" {label!r}" if label is not None else "")
      + f"; it has {', '.join(features)}"
    )
  arrays = [
    name
    for name, found in features.items()
    if name not in labels and (_is_text(found) or getattr(found, "shape", ()))
  ]
  if feature is None:
    feature = keys[0] if keys[0] in arrays else next(iter(arrays), None)
  if feature not in arrays:
    raise ValueError(
      f"tfds {dataset}: no input feature"
      + (f" {feature!r}" if feature is not None else "")
      + " that is an image, an array or a text; it has "
      + ", ".join(features)
    )
  return feature, label


def _as_bytes(text) -> bytes:
  return text.encode() if isinstance(text, str) else bytes(text)


task_lib.register("tfds", make_tfds)
task_lib.register(
  "tfds_mnist", TfdsClassification, dataset="mnist", holdout=5000
)
task_lib.register("tfds_tiny_shakespeare", TfdsText, dataset="tiny_shakespeare")
