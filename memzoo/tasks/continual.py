"""Continual learning: tasks that come one after the other."""

from collections.abc import Iterator
import dataclasses

import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.digits import Digits
from memzoo.tasks.examples import Examples
from memzoo.tasks.task import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continual(task_lib.Task):
  """Sub-tasks that are trained on one after the other, told by the step alone.

  Step i is of sub-task i // steps_per_task (the last goes on for ever), and
  nothing in the batch says which it is. Evaluation goes through the examples
  of all sub-tasks, one after the other; `dataclasses.replace(task, only=i)`
  trains on and evaluates sub-task i alone. Row i of the matrix R of the paper
  is the accuracy on each of `only=0, ..., num_tasks - 1` after
  (i + 1) * steps_per_task steps; `average_accuracy`, `backward_transfer` and
  `forward_transfer` sum it up.

  Attributes:
    parts: the sub-tasks, which agree in the shapes of inputs and outputs.
    steps_per_task: steps of each.
    only: None, or the one sub-task of every step.

  Presets:
    continual_digits_split: five sub-tasks of two digits each, 0 1, 2 3, ...,
      with one output layer for all ten (class-incremental learning), 100 steps
      each. Not a published setting.
    continual_digits_permuted: 20 permutations of the pixels (seeds 0 to 19),
      100 steps each: with batches of 10, one pass over 1,000 examples, which
      is the protocol of the paper for MNIST.

  Differs: digits of scikit-learn in place of MNIST, read as a sequence of
    eight rows (`Digits.width`); the model is never told the sub-task (the
    paper gives its learners a task descriptor).

  Paper: Lopez-Paz and Ranzato 2017, Gradient Episodic Memory for Continual
    Learning, arXiv:1706.08840, sections 2 and 5.
  """

  parts: tuple[Examples, ...]
  steps_per_task: int
  only: int | None = None

  def __post_init__(self):
    task_lib.check_int("Continual", "steps_per_task", self.steps_per_task, 1)
    object.__setattr__(self, "parts", tuple(self.parts))
    if not self.parts:
      raise ValueError("Continual: parts needs one sub-task at least")
    if self.only is not None:
      task_lib.check_int("Continual", "only", self.only, 0, self.num_tasks - 1)
    for name in ("kind", "vocab_size", "d_input", "num_outputs", "length"):
      found = {getattr(part, name) for part in self.parts}
      if len(found) > 1:
        raise ValueError(f"Continual: parts differ in {name}: {found}")

  @property
  def kind(self):
    return self.parts[0].kind

  @property
  def vocab_size(self):
    return self.parts[0].vocab_size

  @property
  def d_input(self):
    return self.parts[0].d_input

  @property
  def num_outputs(self):
    return self.parts[0].num_outputs

  @property
  def length(self):
    return self.parts[0].length

  @property
  def chance(self):
    return 1 / self.num_outputs

  @property
  def num_tasks(self) -> int:
    """Number of sub-tasks."""
    return len(self.parts)

  def task_at(self, step: int) -> int:
    """Which sub-task a step trains on."""
    task_lib.check_int("Continual", "step", step, 0)
    if self.only is not None:
      return self.only
    return min(int(step) // self.steps_per_task, self.num_tasks - 1)

  def batch(self, seed, step, batch_size, split="train"):
    task_lib.check_request(self, seed, step, batch_size, split)
    step = int(step)
    which = self.task_at(step)
    first = 0 if self.only is not None else which * self.steps_per_task
    # Sub-tasks of equal size must not see their examples in the same order.
    seed = int(sampling.tag(f"continual {int(seed)} {which}"))
    return self.parts[which].batch(seed, step - first, batch_size, split)

  def eval_batches(self, batch_size, split="test"):
    task_lib.check_request(self, 0, 0, batch_size, split)
    return self._eval_batches(batch_size, split)

  def _eval_batches(self, batch_size, split) -> Iterator[Batch]:
    chosen = range(self.num_tasks) if self.only is None else (self.only,)
    for which in chosen:
      yield from self.parts[which].eval_batches(batch_size, split)


def average_accuracy(accuracy: np.ndarray) -> float:
  """ACC = 1/T sum_{i=1}^T R_{T,i}: accuracy on all sub-tasks at the end.

  Args:
    accuracy: R, float [T, T]; R_{i,j} is the accuracy on the test examples of
      sub-task j after the training on sub-task i.
  """
  accuracy = _matrix("average_accuracy", accuracy, 1)
  return float(accuracy[-1].mean())


def backward_transfer(accuracy: np.ndarray) -> float:
  """BWT = 1/(T-1) sum_{i=1}^{T-1} (R_{T,i} - R_{i,i}).

  What the training on later sub-tasks did to earlier ones: negative where they
  were forgotten.

  Differs: the authors' code divides by T.

  Args:
    accuracy: see `average_accuracy`; T is 2 or more.
  """
  accuracy = _matrix("backward_transfer", accuracy, 2)
  return float((accuracy[-1] - np.diag(accuracy))[:-1].mean())


def forward_transfer(accuracy: np.ndarray, untrained: np.ndarray) -> float:
  """FWT = 1/(T-1) sum_{i=2}^T (R_{i-1,i} - b_i).

  What the training on earlier sub-tasks gives to one not yet seen.

  Differs: the authors' code divides by T.

  Args:
    accuracy: see `average_accuracy`; T is 2 or more.
    untrained: b, float [T], the accuracy on each sub-task at initialisation.
  """
  accuracy = _matrix("forward_transfer", accuracy, 2)
  untrained = np.asarray(untrained, np.float64)
  if untrained.shape != accuracy.shape[:1]:
    raise ValueError(
      f"forward_transfer: untrained must have the shape {accuracy.shape[:1]};"
      f" got {untrained.shape}"
    )
  return float((np.diag(accuracy, k=1) - untrained[1:]).mean())


def _matrix(owner: str, accuracy, least: int) -> np.ndarray:
  accuracy = np.asarray(accuracy, np.float64)
  shape = accuracy.shape
  if len(shape) != 2 or shape[0] != shape[1] or shape[0] < least:
    raise ValueError(
      f"{owner}: accuracy must be a square matrix, {least} x {least} or more;"
      f" got the shape {shape}"
    )
  return accuracy


task_lib.register(
  "continual_digits_split",
  Continual,
  parts=tuple(Digits(classes=(i, i + 1), width=8) for i in range(0, 10, 2)),
  steps_per_task=100,
)
task_lib.register(
  "continual_digits_permuted",
  Continual,
  parts=tuple(Digits(permutation=i, width=8) for i in range(20)),
  steps_per_task=100,
)
