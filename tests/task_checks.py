"""What every task must keep, as a test for a table of cases."""

import dataclasses

import jax
import numpy as np
import pytest

from memzoo import tasks


def score(task, batch, predictions) -> float:
  """Weighted share of exact predictions; for floats, to 1e-5."""
  targets, weights = np.asarray(batch.targets), np.asarray(batch.weights)
  assert predictions.shape == targets.shape
  if targets.dtype == np.int32:
    right = predictions == targets
  else:
    right = np.abs(predictions - targets) <= 1e-5 * (1 + np.abs(targets))
    right = right.all(-1)
  return float((weights * right).sum() / weights.sum())


def leaves(batch):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]


def same(a, b) -> bool:
  """Equal in shape, dtype and every byte."""
  a, b = leaves(a), leaves(b)
  return len(a) == len(b) and all(
    x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    for x, y in zip(a, b)
  )


def check_shapes(task, batch, rows):
  """A batch is what the fields of its task announce."""
  inputs, targets = np.asarray(batch.inputs), np.asarray(batch.targets)
  weights = np.asarray(batch.weights)
  length = inputs.shape[1]
  assert length <= task.length
  if task.vocab_size is None:
    assert inputs.dtype == np.float32
    assert inputs.shape == (rows, length, task.d_input)
    assert np.isfinite(inputs).all()
  else:
    assert inputs.dtype == np.int32 and inputs.shape == (rows, length)
    assert 0 <= inputs.min() and inputs.max() < task.vocab_size
  assert weights.dtype == np.float32
  if task.kind in ("regression", "bits"):
    assert targets.dtype == np.float32
    assert targets.shape == weights.shape + (task.num_outputs,)
    whole = [(rows, length)] + [(rows,)] * (task.kind == "regression")
    assert weights.shape in whole
    assert task.kind == "regression" or set(np.unique(targets)) <= {0.0, 1.0}
  else:
    assert targets.dtype == np.int32
    assert weights.shape == targets.shape
    once = task.kind == "classification"
    assert targets.shape == ((rows,) if once else (rows, length))
    assert 0 <= targets.min() and targets.max() < task.num_outputs
  for flags in (batch.reset, batch.mask):
    if flags is not None:
      assert flags.dtype == bool and flags.shape == (rows, length)


def check_contract(case):
  """Pure in (seed, step, split), exact in its oracle, honest in `chance`."""
  task = tasks.make(**case)
  batch = task.batch(3, 5, 8)
  check_shapes(task, batch, 8)
  assert score(task, batch, task.oracle(batch)) == 1.0
  assert same(batch, task.batch(3, 5, 8))
  for other in (
    task.batch(3, 6, 8), task.batch(4, 5, 8), task.batch(3, 5, 8, "test"),
    task.batch(3, 5, 8, "validation"),
  ):  # fmt: skip
    assert not same(batch, other)
  assert task == tasks.make(**case) and hash(task) == hash(tasks.make(**case))
  if isinstance(task, tasks.Generator):
    if task.num_train is None:
      traced = jax.jit(lambda seed, step: task.batch(seed, step, 8))
      assert same(traced(np.uint32(3), np.int32(5)), batch)
    task = dataclasses.replace(task, num_test=12)
    first, second = task.eval_batches(8)
    check_shapes(task, second, 8)
    rows = np.asarray(second.weights).reshape(8, -1).sum(1) > 0
    assert rows[:4].all() and not rows[4:].any()
    assert score(task, second, task.oracle(second)) == 1.0
  if task.kind != "regression":
    assert 0 < task.chance <= 1


def contract_test(cases):
  """A test function over a table {case name: arguments of `tasks.make`}."""

  @pytest.mark.parametrize("case", cases)
  def test(case):
    check_contract(cases[case])

  return test
