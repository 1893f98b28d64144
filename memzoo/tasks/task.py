"""The contract of a task, and the presets by name."""

from collections.abc import Callable, Iterator
import difflib
import inspect
import operator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

SPLITS = ("train", "validation", "test")

Array = jax.Array | np.ndarray


class Batch(NamedTuple):
  """One batch of B rows and T steps; NumPy or JAX arrays.

  Attributes:
    inputs: int32 [B, T] tokens, or float32 [B, T, D].
    targets: int32 [B, T] for the kinds 'tokens' and 'labels', int32 [B] for
      'classification', float32 0 or 1 [B, T, N] for 'bits', float32 [B, N] or
      [B, T, N] for 'regression'. Arbitrary but valid where the weight is 0.
    weights: float32, [B] where there is one target for a row, else [B, T]:
      how much a prediction counts; 0 where nothing is asked.
    reset: bool [B, T] or None: the memory is fresh before input t. None: no
      reset but the fresh memory with which every batch of a task that does not
      stream begins.
    mask: bool [B, T] or None: False where there is no input t.
  """

  inputs: Array
  targets: Array
  weights: Array
  reset: Array | None = None
  mask: Array | None = None


class Task:
  """A source of batches: a value (frozen dataclass) with pure functions.

  Attributes:
    kind: what is predicted: at every step a token ('tokens', of the inputs'
      vocabulary or not), a class ('labels', from float inputs) or bits
      ('bits'), one class for each row ('classification'), or real numbers at
      every step or for each row ('regression').
    vocab_size: number of input tokens; None where inputs are floats.
    d_input: width D of float inputs; None where inputs are tokens.
    num_outputs: number of classes, of output tokens, of bits, or of real
      numbers.
    length: T; the longest T where it varies.
    streams: row b of a batch continues row b of the batch before, so memory is
      carried over; False: each batch starts with fresh memory.
    chance: accuracy of guessing uniformly among the possible answers; for
      'regression', the loss of the best constant.
  """

  kind: Literal["tokens", "labels", "bits", "classification", "regression"]
  vocab_size: int | None = None
  d_input: int | None = None
  num_outputs: int
  length: int
  streams: bool = False
  chance: float

  def batch(
    self, seed: int, step: int, batch_size: int, split: str = "train"
  ) -> Batch:
    """The batch of a step.

    Pure: equal arguments give equal bytes, in any process and in any order, so
    a run that resumes at a step needs nothing but the step. Seeds and splits
    give unrelated orders (data sets) or unrelated examples (generators).

    Args:
      seed: integer in [0, 2**32).
      step: integer, 0 or more. Generators of one shape accept a traced scalar.
      batch_size: B, 1 or more.
      split: 'train', 'validation' or 'test'.

    Returns:
      A `Batch`, always of the same shapes for the same `batch_size`, except
      for a `Mixture`.
    """
    raise NotImplementedError(type(self).__name__)

  def eval_batches(
    self, batch_size: int, split: str = "test"
  ) -> Iterator[Batch]:
    """Every example of a split once, in the same order at every call.

    The last batch is filled up with rows of weight 0, so that shapes stay
    constant.
    """
    raise NotImplementedError(type(self).__name__)

  def oracle(self, batch: Batch) -> np.ndarray:
    """Exact predictions, shaped as `batch.targets`, from the inputs alone.

    Generated tasks have one; it is right wherever the weight is above 0.
    """
    raise NotImplementedError(
      f"{type(self).__name__} has no oracle: no exact solution is known"
    )


_PRESETS: dict[str, tuple[Callable[..., Task], dict[str, Any]]] = {}


def register(name: str, build: Callable[..., Task], **options) -> None:
  """Names a preset: `build`, a task class or function, with `options`."""
  if name in _PRESETS:
    raise ValueError(f"task {name!r} is registered already")
  _PRESETS[name] = (build, options)


def names() -> tuple[str, ...]:
  """Names of all presets, sorted."""
  return tuple(sorted(_PRESETS))


def make(name: str, **overrides) -> Task:
  """The task of that name, with options replaced.

  Args:
    name: one of `names()`.
    **overrides: options that replace those of the preset.

  Returns:
    The task.

  Raises:
    ValueError: unknown name or option (the nearest are named), an option that
      is required and missing, or a value out of range.
  """
  if name not in _PRESETS:
    raise ValueError(unknown("task", name, names()))
  build, options = _PRESETS[name]
  parameters = inspect.signature(build).parameters
  for option in overrides:
    if option not in parameters:
      raise ValueError(unknown(f"option of task {name!r}", option, parameters))
  options = {**options, **overrides}
  missing = [
    p.name
    for p in parameters.values()
    if p.default is p.empty and p.name not in options
  ]
  if missing:
    raise ValueError(f"task {name!r} needs the option {', '.join(missing)}")
  return build(**options)


def unknown(what: str, got: Any, accepted) -> str:
  """Message for a name that does not exist, with the nearest that do."""
  accepted = [str(name) for name in accepted]
  near = difflib.get_close_matches(str(got), accepted, n=3, cutoff=0.5)
  hints = [f"did you mean {' or '.join(map(repr, near))}?"] if near else []
  if not near or len(accepted) <= 20:
    few = ", ".join(accepted[:20])
    more = f", … ({len(accepted)} in all)" if len(accepted) > 20 else ""
    hints.append(f"accepted: {few}{more}")
  return f"unknown {what}: {got!r}; " + " ".join(hints)


def check_int(
  owner: str, name: str, value: Any, least: int, most: int | None = None
) -> int:
  """`value` as an int in [least, most], or one clear ValueError."""
  try:
    if isinstance(value, bool):
      raise TypeError
    number = operator.index(value)
  except TypeError:
    number = None
  if number is None or number < least or (most is not None and number > most):
    limit = f"{least} or more" if most is None else f"{least} to {most}"
    raise ValueError(
      f"{owner}: {name} must be an integer, {limit}; got {value!r}"
    )
  return number


def check_choice(owner: str, name: str, value: Any, accepted) -> None:
  """One clear ValueError unless `value` is among `accepted`."""
  if value not in tuple(accepted):
    raise ValueError(unknown(f"{name} of {owner}", value, accepted))


def check_request(
  task: Task, seed: Any, step: Any, batch_size: Any, split: Any
) -> None:
  """Checks the arguments of `Task.batch`; traced seeds and steps pass."""
  owner = type(task).__name__
  if not isinstance(seed, jax.core.Tracer):
    check_int(owner, "seed", seed, 0, 2**32 - 1)
  if not isinstance(step, jax.core.Tracer):
    check_int(owner, "step", step, 0)
  check_int(owner, "batch_size", batch_size, 1)
  check_choice(owner, "split", split, SPLITS)
