"""Copy, repeat copy, associative recall and priority sort of bit vectors."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtmTask(Generator, abc.ABC):
  """Bits in, bits out: what the tasks of the Neural Turing Machine share.

  Inputs are float32 [T, D]: `bits` channels of uniform bits and a few of
  control. Targets are float32 {0, 1} [T, N], weights [T]: 1 at the steps of the
  answer, where the inputs are zero. Rows of different lengths end in steps that
  are masked and ask for nothing. `chance` is the share of right bits.
  """

  kind: ClassVar[str] = "bits"
  chance: ClassVar[float] = 0.5

  bits: int = 8

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int(type(self).__name__, "bits", self.bits, 1, 32)

  @property
  def num_outputs(self) -> int:
    return self.bits

  def _check_range(self, low: str, high: str, least: int):
    owner = type(self).__name__
    floor = task_lib.check_int(owner, low, getattr(self, low), least)
    task_lib.check_int(owner, high, getattr(self, high), floor)

  def _vectors(self, word: jax.Array) -> jax.Array:
    """A vector of bits from each random word, float32 [..., bits]."""
    shift = np.arange(self.bits, dtype=np.uint32)
    return ((word[..., None] >> shift) & np.uint32(1)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtmCopy(NtmTask):
  """Give a sequence of vectors back after a delimiter.

  n vectors, n uniform in min_length..max_length; a delimiter, 1 on a channel of
  its own; then n steps of zeros at which the vectors are asked in order.

  Attributes:
    bits: bits of a vector.
    min_length: lowest n.
    max_length: highest n; T is twice that and 1.

  Presets:
    ntm_copy: 8 bits, lengths 1 to 20; there RMSProp with momentum 0.9, rate
      1e-4, gradients clipped to [-10, 10]. Tested at longer ones (there 10, 20,
      30, 50, 120) by `make(name, min_length=120, max_length=120)`.
    ntm_copy_small: 4 bits, lengths 1 to 8. Not a published setting.

  Differs: rows of a batch have different lengths.

  Paper: Graves, Wayne and Danihelka 2014, Neural Turing Machines,
    arXiv:1410.5401, section 4.1.
  """

  min_length: int = 1
  max_length: int = 20

  def __post_init__(self):
    super().__post_init__()
    self._check_range("min_length", "max_length", 1)

  @property
  def d_input(self) -> int:
    return self.bits + 1

  @property
  def length(self) -> int:
    return 2 * self.max_length + 1

  def example(self, key):
    word, n = sampling.words(key, self.max_length, 1)
    n = _between(n[0], self.min_length, self.max_length)
    vectors, step = self._vectors(word), np.arange(self.length)
    shown, asked = step < n, (step > n) & (step <= 2 * n)
    data = jnp.where(shown[:, None], _take(vectors, step), 0.0)
    control = jnp.asarray(step == n, jnp.float32)
    inputs = jnp.concatenate([data, control[:, None]], axis=1)
    targets = jnp.where(asked[:, None], _take(vectors, step - n - 1), 0.0)
    return inputs, targets, asked.astype(jnp.float32), None, step <= 2 * n

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    predictions = np.zeros_like(inputs[:, :, : self.bits])
    for row, x in enumerate(inputs):
      n = int(x[:, self.bits].argmax())
      predictions[row, n + 1 : 2 * n + 1] = x[:n, : self.bits]
    return predictions


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtmRepeatCopy(NtmTask):
  """Give a sequence of vectors back r times, then an end marker.

  n vectors, n uniform in min_length..max_length; a step that holds, on a
  channel of its own, r less its mean, over its standard deviation, for r
  uniform in min_repeats..max_repeats; then nr + 1 steps of zeros, at which the
  vectors are asked r times over, and at the last the marker: 1 on output
  channel `bits`, which is 0 before.

  Attributes:
    bits: bits of a vector.
    min_length: lowest n.
    max_length: highest n.
    min_repeats: lowest r.
    max_repeats: highest r.
    norm_repeats: r is scaled as uniform in 1..norm_repeats, 2 or more and even,
      so that no r is scaled to 0. It stays that of the training when r goes
      beyond it.

  Presets:
    ntm_repeat_copy: 8 bits, 1 to 10 vectors, 1 to 10 times; training as for
      `ntm_copy`. There tested on 20 vectors and on 20 repeats, by
      `make(name, min_length=20, max_length=20)` and so on.
    ntm_repeat_copy_small: 4 bits, 1 to 4 vectors, 1 to 4 times. Not a published
      setting.

  Differs: rows of a batch have different lengths.

  Paper: Graves, Wayne and Danihelka 2014, Neural Turing Machines,
    arXiv:1410.5401, section 4.2.
  """

  min_length: int = 1
  max_length: int = 10
  min_repeats: int = 1
  max_repeats: int = 10
  norm_repeats: int = 10

  def __post_init__(self):
    super().__post_init__()
    self._check_range("min_length", "max_length", 1)
    self._check_range("min_repeats", "max_repeats", 1)
    task_lib.check_int("NtmRepeatCopy", "norm_repeats", self.norm_repeats, 2)
    if self.norm_repeats % 2:
      raise ValueError(
        f"NtmRepeatCopy: norm_repeats must be even; got {self.norm_repeats}"
      )

  @property
  def d_input(self) -> int:
    return self.bits + 1

  @property
  def num_outputs(self) -> int:
    return self.bits + 1

  @property
  def length(self) -> int:
    return self.max_length * (self.max_repeats + 1) + 2

  def _scale(self) -> tuple[float, float]:
    """Mean and standard deviation of r, uniform in 1..norm_repeats."""
    return (self.norm_repeats + 1) / 2, ((self.norm_repeats**2 - 1) / 12) ** 0.5

  def example(self, key):
    word, n, r = sampling.words(key, self.max_length, 1, 1)
    n = _between(n[0], self.min_length, self.max_length)
    r = _between(r[0], self.min_repeats, self.max_repeats)
    vectors, step = self._vectors(word), np.arange(self.length)
    end = n + 1 + n * r
    copying = (step > n) & (step < end)
    data = jnp.where((step < n)[:, None], _take(vectors, step), 0.0)
    mean, deviation = self._scale()
    count = (r.astype(jnp.float32) - mean) / deviation
    control = jnp.where(step == n, count, 0.0)
    inputs = jnp.concatenate([data, control[:, None]], axis=1)
    copies = _take(vectors, (step - n - 1) % n)
    copies = jnp.where(copying[:, None], copies, 0.0)
    marker = (step == end).astype(jnp.float32)
    targets = jnp.concatenate([copies, marker[:, None]], axis=1)
    weights = ((step > n) & (step <= end)).astype(jnp.float32)
    return inputs, targets, weights, None, step <= end

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    predictions = np.zeros_like(inputs)
    mean, deviation = self._scale()
    for row, x in enumerate(inputs):
      n = int((x[:, self.bits] != 0).argmax())
      r = round(float(x[n, self.bits]) * deviation + mean)
      answer = np.tile(x[:n, : self.bits], (r, 1))
      predictions[row, n + 1 : n + 1 + n * r, : self.bits] = answer
      predictions[row, n + 1 + n * r, self.bits] = 1
    return predictions


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtmAssociativeRecall(NtmTask):
  """Give the item back that followed the one that is shown again.

  n items, n uniform in min_items..max_items, each of `item_length` vectors
  after a delimiter (1 on channel `bits`); then a query delimiter (1 on the
  channel after it), one of the items but the last, uniform, and a query
  delimiter; then item_length steps of zeros, at which the vectors of the item
  after it are asked. Should two items be equal, the first of them counts.

  Attributes:
    bits: bits of a vector.
    item_length: vectors in an item.
    min_items: lowest n, 2 or more.
    max_items: highest n.

  Presets:
    ntm_associative_recall: 6 bits, 3 vectors, 2 to 6 items; training as for
      `ntm_copy`. There tested up to 20 items, by
      `make(name, min_items=20, max_items=20)`.
    ntm_associative_recall_small: 4 bits, 2 vectors, 2 to 4 items. Not a
      published setting.

  Differs: rows of a batch have different lengths. The paper shows the query
    delimiter before the query; the one after it is read from "bounded on the
    left and right by delimiter symbols".

  Paper: Graves, Wayne and Danihelka 2014, Neural Turing Machines,
    arXiv:1410.5401, section 4.3.
  """

  bits: int = 6
  item_length: int = 3
  min_items: int = 2
  max_items: int = 6

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int(
      "NtmAssociativeRecall", "item_length", self.item_length, 1
    )
    self._check_range("min_items", "max_items", 2)

  @property
  def d_input(self) -> int:
    return self.bits + 2

  @property
  def length(self) -> int:
    return self.max_items * (self.item_length + 1) + 2 * self.item_length + 2

  def example(self, key):
    m = self.item_length
    word, n, query = sampling.words(key, self.max_items * m, 1, 1)
    n = _between(n[0], self.min_items, self.max_items)
    items = self._vectors(word).reshape(self.max_items, m, self.bits)
    query = sampling.below(query[0], n - 1)
    same = (items == items[query]).all((1, 2))
    answer = items[same.argmax() + 1]

    step, start = np.arange(self.length), n * (m + 1)
    item = jnp.pad(items, ((0, 0), (1, 0), (0, 0))).reshape(-1, self.bits)
    data = jnp.where((step < start)[:, None], _take(item, step), 0.0)
    data = jax.lax.dynamic_update_slice(data, items[query], (start + 1, 0))
    delimiter = (step < start) & (step % (m + 1) == 0)
    ask = (step == start) | (step == start + m + 1)
    control = jnp.stack([delimiter, ask], axis=1).astype(jnp.float32)
    inputs = jnp.concatenate([data, control], axis=1)
    asked = (step >= start + m + 2) & (step < start + 2 * m + 2)
    targets = jnp.zeros((self.length, self.bits), jnp.float32)
    targets = jax.lax.dynamic_update_slice(targets, answer, (start + m + 2, 0))
    mask = step < start + 2 * m + 2
    return inputs, targets, asked.astype(jnp.float32), None, mask

  def oracle(self, batch):
    inputs, m = np.asarray(batch.inputs), self.item_length
    predictions = np.zeros_like(inputs[:, :, : self.bits])
    for row, x in enumerate(inputs):
      start = int(x[:, self.bits + 1].argmax())
      items = x[:start, : self.bits].reshape(-1, m + 1, self.bits)[:, 1:]
      query = x[start + 1 : start + 1 + m, : self.bits]
      which = int((items == query).all((1, 2)).argmax())
      predictions[row, start + m + 2 : start + 2 * m + 2] = items[which + 1]
    return predictions


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtmPrioritySort(NtmTask):
  """Give back the vectors of highest priority, highest first.

  `items` vectors, each with a priority, uniform in [-1, 1), on a channel of its
  own; then `keep` steps of zeros, at which the vectors of the highest
  priorities are asked in falling order.

  Attributes:
    bits: bits of a vector.
    items: vectors in a row.
    keep: vectors asked, `items` at most.

  Presets:
    ntm_priority_sort: 20 vectors, the highest 16; there RMSProp as for
      `ntm_copy`, rate 3e-5.
    ntm_priority_sort_small: 4 bits, 8 vectors, the highest 6. Not a published
      setting.

  Differs: the paper does not give the bits of a vector (8 as in its copy task),
    nor whether the highest priority comes first; no delimiter ends the input,
    since the length is fixed.

  Paper: Graves, Wayne and Danihelka 2014, Neural Turing Machines,
    arXiv:1410.5401, section 4.5.
  """

  items: int = 20
  keep: int = 16

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("NtmPrioritySort", "items", self.items, 1)
    task_lib.check_int("NtmPrioritySort", "keep", self.keep, 1, self.items)

  @property
  def d_input(self) -> int:
    return self.bits + 1

  @property
  def length(self) -> int:
    return self.items + self.keep

  def example(self, key):
    word, priority = sampling.words(key, self.items, self.items)
    vectors = self._vectors(word)
    # Multiples of 2^-23, exact in float32; of equal ones the first is higher.
    priority = (priority >> 8).astype(jnp.float32) * 2.0**-23 - 1.0
    order = jnp.argsort(-priority, stable=True)[: self.keep]
    shown = jnp.concatenate([vectors, priority[:, None]], axis=1)
    inputs = jnp.pad(shown, ((0, self.keep), (0, 0)))
    targets = jnp.pad(vectors[order], ((self.items, 0), (0, 0)))
    weights = np.arange(self.length) >= self.items
    return inputs, targets, jnp.asarray(weights, jnp.float32)

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    shown = inputs[:, : self.items]
    order = np.argsort(-shown[:, :, self.bits], axis=1, kind="stable")
    answer = np.take_along_axis(shown, order[:, : self.keep, None], axis=1)
    predictions = np.zeros_like(inputs[:, :, : self.bits])
    predictions[:, self.items :] = answer[:, :, : self.bits]
    return predictions


def _between(word: jax.Array, low: int, high: int) -> jax.Array:
  """Uniform in low..high, both included."""
  return low + sampling.below(word, high - low + 1)


def _take(vectors: jax.Array, place) -> jax.Array:
  """vectors[place]; any valid vector where the place is out of range."""
  return vectors[jnp.clip(jnp.asarray(place), 0, len(vectors) - 1)]


task_lib.register("ntm_copy", NtmCopy)
task_lib.register("ntm_copy_small", NtmCopy, bits=4, max_length=8)
task_lib.register("ntm_repeat_copy", NtmRepeatCopy)
task_lib.register(
  "ntm_repeat_copy_small",
  NtmRepeatCopy,
  bits=4,
  max_length=4,
  max_repeats=4,
  norm_repeats=4,
)
task_lib.register("ntm_associative_recall", NtmAssociativeRecall)
task_lib.register(
  "ntm_associative_recall_small",
  NtmAssociativeRecall,
  bits=4,
  item_length=2,
  max_items=4,
)
task_lib.register("ntm_priority_sort", NtmPrioritySort)
task_lib.register(
  "ntm_priority_sort_small", NtmPrioritySort, bits=4, items=8, keep=6
)
