"""Training: the step, the losses, checkpoints, kill and resume, devices.

Runs that must die or need other devices are processes: this file, as a script.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import memzoo
from memzoo import checkpoint, parallel, tasks, training
from memzoo.tasks import Batch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

if __name__ != "__main__":
  from experiments import train  # noqa: E402

VOCAB, WIDTH, LENGTH = 7, 8, 6


# A model and tasks of the contract, as small as they get.


class Counter(nnx.Variable):
  """An untrained variable."""


class Tiny(nnx.Module):
  """A tanh network over tokens or vectors; its memory has leaves of all kinds."""

  has_buffers = False

  def __init__(
    self, key, inputs=VOCAB, outputs=VOCAB, dropout=0.0, pooled=False
  ):
    keys = jax.random.split(key, 3)
    draw = lambda k, *shape: nnx.Param(0.3 * jax.random.normal(k, shape))
    self.embed = draw(keys[0], inputs, WIDTH)
    self.kernel = draw(keys[1], WIDTH, WIDTH)
    self.head = draw(keys[2], WIDTH, outputs)
    self.bias = nnx.Param(jnp.zeros(outputs))
    self.seen = Counter(jnp.zeros((), jnp.float32))
    self.dropout = dropout
    self.pooled = pooled

  def initial_state(self, batch):
    return {
      "h": jnp.zeros((batch, WIDTH)),
      "layers": jnp.zeros((2, batch)),  # rows on the second axis
      "keys": jax.random.split(jax.random.key(5), batch),
      "steps": jnp.zeros((), jnp.int32),
      "none": jnp.zeros((batch, 0)),
    }

  def __call__(
    self, state, inputs, *, reset=None, mask=None, key=None, reports=False
  ):
    if jnp.issubdtype(inputs.dtype, jnp.integer):
      xs = self.embed[...][inputs]
    else:
      xs = inputs @ self.embed[...]
    if key is not None and self.dropout:
      keep = jax.random.bernoulli(key, 1 - self.dropout, xs.shape)
      xs = jnp.where(keep, xs / (1 - self.dropout), 0.0)
    if reset is None:
      reset = jnp.zeros(xs.shape[:2], bool)

    def step(h, x):
      x, fresh = x
      h = jnp.tanh(jnp.where(fresh[:, None], 0.0, h) @ self.kernel[...] + x)
      return h, h

    h, ys = jax.lax.scan(step, state["h"], (xs.swapaxes(0, 1), reset.T))
    ys = ys.swapaxes(0, 1)
    state = {
      "h": h,
      "layers": state["layers"] + jnp.sum(h, -1),
      "keys": jax.vmap(lambda k: jax.random.split(k)[0])(state["keys"]),
      "steps": state["steps"] + 1,
      "none": state["none"],
    }
    ys = jnp.mean(ys, 1) if self.pooled else ys
    outputs = ys @ self.head[...] + self.bias[...]
    if reports:
      return state, outputs, {"size": jnp.mean(jnp.square(h))}
    return state, outputs


@functools.partial(jax.jit, static_argnames=("batch_size", "split"))
def drawn(seed, step, batch_size, split):
  key = jax.random.fold_in(jax.random.key(seed), step)
  key = jax.random.fold_in(key, ("train", "validation", "test").index(split))
  first, noise = jax.random.split(key)
  x = jax.random.randint(first, (batch_size,), 0, VOCAB)
  slips = jax.random.bernoulli(noise, 0.1, (LENGTH, batch_size)).astype(
    jnp.int32
  )
  _, rest = jax.lax.scan(
    lambda x, slip: ((3 * x + 1 + slip) % VOCAB,) * 2, x, slips
  )
  weights = 1 + jnp.arange(batch_size * LENGTH).reshape(batch_size, LENGTH) % 3
  return jnp.concatenate([x[:, None], rest.T], 1), weights.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tokens:
  """x -> 3 x + 1 modulo 7, with some noise; ragged weights."""

  kind = "tokens"
  streams: bool = True
  on_host: bool = False
  bad: tuple = ()  # steps whose weights are not finite

  def batch(self, seed, step, batch_size, split):
    tokens, weights = drawn(seed, step, batch_size, split)
    if self.on_host:
      tokens, weights = np.asarray(tokens), np.asarray(weights)
    for bad in self.bad:
      weights = jnp.where(step == bad, jnp.inf, weights)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)

  def eval_batches(self, batch_size, split):
    for step in range(3):
      yield self.batch(9, step, batch_size, split)


CONFIG = dict(
  steps=40, batch_size=8, learning_rate=1e-2, seed=1,
  log_every=5, eval_every=10, checkpoint_every=10,
)  # fmt: skip


def make(**options):
  options.setdefault("warmup", min(5, options.get("steps", 5)))
  config = training.Config(**{**CONFIG, **options})
  return config, Tiny(jax.random.key(0), dropout=0.1), Tokens()


def lines(workdir):
  """metrics.jsonl without the times."""
  found = []
  for line in (
    (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  ):
    line = json.loads(line)
    found.append({k: v for k, v in line.items() if "second" not in k})
  return found


def digest(model):
  """A hash of every bit of a model's variables."""
  sha = hashlib.sha256()
  for name, leaf in parallel.named_leaves(checkpoint.variables(model)).items():
    sha.update(name.encode() + np.asarray(leaf).tobytes())
  return sha.hexdigest()


def host(tree):
  """Leaves as NumPy arrays, keys as their bits."""
  data = lambda x: (
    jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    else x
  )
  return [np.asarray(data(x)) for x in jax.tree.leaves(tree)]


def assert_equal(a, b):
  for x, y in zip(host(a), host(b), strict=True):
    np.testing.assert_array_equal(x, y)


def files(folder):
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in sorted(pathlib.Path(folder).rglob("*"))
    if p.is_file()
  }


# Losses


def reference_loss(logits, targets, weights):
  """Weighted cross-entropy and accuracy, in float64."""
  logits = logits.astype(np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  loss = correct = 0.0
  for index in np.ndindex(targets.shape):
    if weights[index]:
      loss -= weights[index] * log_p[index][targets[index]]
      correct += weights[index] * (logits[index].argmax() == targets[index])
  return loss / weights.sum(), correct / weights.sum()


class Fixed:
  """A model that answers with what it was given."""

  def __init__(self, outputs, reports=None):
    self.outputs, self.reports = outputs, reports or {}

  def __call__(self, state, inputs, *, reset, mask, key, reports=False):
    return (
      (state, self.outputs, self.reports) if reports else (state, self.outputs)
    )


def test_token_loss_counts_by_weight_and_mask():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 4, 5)).astype(np.float32)
  targets = rng.integers(0, 5, (3, 4)).astype(np.int32)
  weights = rng.integers(0, 3, (3, 4)).astype(np.float32)
  mask = rng.random((3, 4)) < 0.7
  counted = weights * mask
  assert 0 < (counted > 0).sum() < counted.size
  want = reference_loss(logits, targets, counted)
  # What does not count may hold anything.
  bad = np.where((counted > 0)[..., None], logits, np.inf).astype(np.float32)
  labels = np.where(counted > 0, targets, -100).astype(np.int32)
  batch = Batch(
    targets, jnp.asarray(labels), jnp.asarray(weights), mask=jnp.asarray(mask)
  )

  def loss(logits):
    value, (state, metrics) = training.token_loss(
      Fixed(logits), batch, "s", None
    )
    assert state == "s"
    return value, metrics

  (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(
    jnp.asarray(logits)
  )
  np.testing.assert_allclose(value, want[0], rtol=1e-6)
  np.testing.assert_allclose(metrics["accuracy"], want[1], rtol=1e-6)
  assert metrics["weight"] == counted.sum()
  assert np.all(np.asarray(grad)[counted == 0] == 0)
  np.testing.assert_allclose(loss(jnp.asarray(bad))[0], want[0], rtol=1e-6)


def test_classification_loss():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(6, 5)).astype(np.float32)
  targets = rng.integers(0, 5, 6).astype(np.int32)
  weights = np.array([1, 2, 0, 1, 0, 3], np.float32)
  mask = jnp.ones((6, 9), bool)
  batch = Batch(
    jnp.zeros((6, 9, 1)), jnp.asarray(targets), jnp.asarray(weights), None, mask
  )
  loss, (_, metrics) = training.classification_loss(
    Fixed(jnp.asarray(logits)), batch, (), None
  )
  want = reference_loss(logits, targets, weights)
  np.testing.assert_allclose(loss, want[0], rtol=1e-6)
  np.testing.assert_allclose(metrics["accuracy"], want[1], rtol=1e-6)


def test_regression_loss():
  rng = np.random.default_rng(2)
  outputs, targets = rng.normal(size=(2, 4, 3, 2)).astype(np.float32)
  weights = np.array([1, 0, 2, 1], np.float32)
  mask = rng.random((4, 3)) < 0.6
  batch = Batch(
    None, jnp.asarray(targets), jnp.asarray(weights), None, jnp.asarray(mask)
  )
  loss, _ = training.regression_loss(
    Fixed(jnp.asarray(outputs)), batch, (), None
  )
  counted = (weights[:, None] * mask)[..., None] * np.ones(2)
  want = (counted * (outputs - targets) ** 2).sum() / counted.sum()
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  with pytest.raises(
    ValueError, match=r"outputs \(4, 3\) and the targets \(4, 3, 2\)"
  ):
    training.regression_loss(Fixed(jnp.zeros((4, 3))), batch, (), None)


@pytest.mark.nans
def test_bits_loss():
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(4, 3, 2)).astype(np.float32)
  targets = (rng.random((4, 3, 2)) < 0.5).astype(np.float32)
  weights = rng.random((4, 3)).astype(np.float32)
  weights[0] = 0
  logits[0] = np.nan  # nothing is asked there
  mask = np.ones((4, 3), bool)
  mask[2, 1] = False
  batch = Batch(None, *map(jnp.asarray, (targets, weights)), None, mask)
  loss, (_, metrics) = training.bits_loss(
    Fixed(jnp.asarray(logits)), batch, (), None
  )
  counted = ((weights * mask)[..., None] * np.ones(2))[1:]
  p = 1 / (1 + np.exp(-logits[1:].astype(np.float64)))
  each = -np.log(np.where(targets[1:] > 0, p, 1 - p))
  np.testing.assert_allclose(
    loss, (counted * each).sum() / counted.sum(), rtol=1e-6
  )
  right = (logits[1:] > 0) == (targets[1:] > 0)
  want = (counted * right).sum() / counted.sum()
  np.testing.assert_allclose(metrics["accuracy"], want, rtol=1e-6)
  with pytest.raises(ValueError, match=r"bits: .* \(4, 3, 2\) differ"):
    training.bits_loss(Fixed(jnp.zeros((4, 3))), batch, (), None)


def test_reports_are_weighed_by_name():
  batch = Batch(None, jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3)))
  model = Fixed(
    jnp.zeros((2, 3, 4)),
    {"balance": jnp.full((), 2.0), "surprise": jnp.ones(())},
  )
  plain, _ = training.token_loss(model, batch, (), None)
  loss, (_, metrics) = training.token_loss(
    model, batch, (), None, report_weights={"balance": 0.5, "surprise": 0.0}
  )
  np.testing.assert_allclose(loss, plain + 1.0, rtol=1e-6)
  assert metrics["report/balance"] == 2 and metrics["report/surprise"] == 1
  np.testing.assert_allclose(metrics["loss"], plain, rtol=1e-6)
  with pytest.raises(
    ValueError, match="no report 'ballance'; it has balance, surprise"
  ):
    training.token_loss(
      model, batch, (), None, report_weights={"ballance": 1.0}
    )


# The optimiser


def test_schedule():
  rate = training.schedule(
    training.Config(steps=110, warmup=10, learning_rate=0.2)
  )
  np.testing.assert_allclose(rate(0), 0.02, rtol=1e-6)
  np.testing.assert_allclose(rate(9), 0.2, rtol=1e-6)
  np.testing.assert_allclose(rate(60), 0.1, rtol=1e-6)
  assert float(rate(110)) == 0
  rates = [float(rate(i)) for i in range(111)]
  assert all(a < b for a, b in zip(rates[:9], rates[1:10]))
  assert all(a > b for a, b in zip(rates[10:], rates[11:]))
  assert float(training.schedule(training.Config(warmup=0))(0)) == np.float32(
    1e-3
  )


def test_clipping_and_decay_change_the_step_as_adamw_says():
  config, model, task = make(clip=0.01, weight_decay=0.3, accumulate=1)
  trainer = training.Trainer(config, model, task)
  state = trainer.init()
  batch = task.batch(1, 0, 8, "train")
  key = jax.random.fold_in(jax.random.key(1), 0)
  _, grads, _, _ = jax.jit(trainer._gradients)(state, batch, key)
  norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in host(grads))))
  assert norm > 0.01
  rate = 1e-2 / 5
  want = {}
  for name, g in parallel.named_leaves(grads).items():
    g = np.asarray(g, np.float64) * 0.01 / norm
    p = np.asarray(state.params[name], np.float64)
    want[name] = (
      p - rate * g / (np.abs(g) + 1e-8) - rate * 0.3 * p * (p.ndim == 2)
    )
  state = trainer.run(state, 1)
  for name, p in state.params.items():
    np.testing.assert_allclose(p, want[name], rtol=2e-4, atol=1e-7)


# The step


def test_chunks_do_not_change_the_numbers():
  config, model, task = make(steps=12)
  trainer = training.Trainer(config, model, task)
  whole = trainer.run(trainer.init(), 12)
  parts = trainer.init()
  for size in (1, 4, 2, 5):
    parts = trainer.run(parts, size)
  assert_equal(whole, parts)
  assert int(parts.step) == 12 and int(parts.memory["steps"]) == 12


def test_host_tasks_train_as_device_tasks_do():
  config, model, _ = make(steps=6)
  drawn = training.Trainer(config, model, Tokens(on_host=False))
  read = training.Trainer(config, model, Tokens(on_host=True))
  assert drawn._on_device and not read._on_device
  for a, b in zip(
    host(drawn.run(drawn.init(), 6)), host(read.run(read.init(), 6))
  ):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_a_mixture_trains():
  """Its batches vary in length, so they are drawn step by step."""
  part = lambda length, **kw: tasks.Mqar(
    vocab_size=64, length=length, pairs=2, num_test=4, **kw
  )
  task = tasks.Mixture(
    train=(part(8, num_train=8), part(12, num_train=8)), test=(part(16),)
  )
  model = Tiny(jax.random.key(0), inputs=64, outputs=64)
  config = training.Config(steps=4, warmup=0, batch_size=4)
  result = training.fit(config, model, task)
  assert result["step"] == 4 and np.isfinite(result["eval"]["loss"])


def test_training_leaves_the_given_model_alone_until_the_end():
  config, model, task = make(steps=3)
  before = digest(model)
  trainer = training.Trainer(config, model, task)
  state = trainer.run(trainer.init(), 3)
  assert digest(model) == before
  trainer.update(model, state)
  assert digest(model) != before
  trainer.run(state, 1)  # donates `state`
  digest(model)


@pytest.mark.parametrize("bad", [(0,), (2, 3)])
def test_a_non_finite_step_is_rejected_whole(bad):
  config, model, _ = make(steps=6)
  trainer = training.Trainer(config, model, Tokens(bad=bad))
  state = trainer.run(trainer.init(), bad[0])
  before = host(state._replace(step=jnp.zeros(()), skipped=jnp.zeros(())))
  state = trainer.run(state, len(bad))
  assert int(state.step) == bad[-1] + 1 and int(state.skipped) == len(bad)
  after = host(state._replace(step=jnp.zeros(()), skipped=jnp.zeros(())))
  for a, b in zip(before, after):
    np.testing.assert_array_equal(a, b)
  state = trainer.run(state, 1)
  assert int(state.skipped) == len(bad)
  assert not np.array_equal(state.params["kernel"], before[2])
  metrics, _ = trainer.summary(state)
  assert metrics["skipped"] == len(bad) and np.isfinite(metrics["loss"])


def test_nan_in_the_memory_rejects_the_step():
  class Broken(Tiny):
    def __call__(self, state, inputs, **options):
      steps = state["steps"]
      state, outputs = super().__call__(state, inputs, **options)
      state["h"] = jnp.where(steps == 2, jnp.nan, state["h"])
      return state, outputs

  config, _, task = make(steps=6)
  trainer = training.Trainer(config, Broken(jax.random.key(0)), task)
  state = trainer.run(trainer.init(), 6)
  assert int(state.skipped) == 4 and int(state.memory["steps"]) == 2
  assert np.isfinite(state.memory["h"]).all()


@pytest.mark.parametrize(
  "streams", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_accumulation_equals_the_big_batch(streams):
  results = []
  for parts in (1, 2, 4):
    config, _, _ = make(accumulate=parts, steps=5, report_weights={"size": 0.1})
    trainer = training.Trainer(
      config, Tiny(jax.random.key(0)), Tokens(streams=streams)
    )
    state = trainer.run(trainer.init(), 5)
    metrics, state = trainer.summary(state)
    results.append((host(state), metrics))
  for leaves, metrics in results[1:]:
    for a, b in zip(results[0][0], leaves, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for name in ("loss", "accuracy", "grad_norm"):
      np.testing.assert_allclose(metrics[name], results[0][1][name], rtol=1e-4)


def test_dropout_differs_by_step_and_by_part():
  class Keyed(Tiny):
    def __call__(self, state, inputs, *, key=None, **options):
      state, outputs = super().__call__(state, inputs, **options)
      if key is None:
        return state, outputs
      return state, outputs + jax.random.normal(key, ())

  seen = []

  def loss_fn(model, batch, state, key):
    value = jax.random.normal(key, ())
    return jnp.sum(model.bias[...]) * 0.0, (state, {"loss": value})

  for parts in (1, 2):
    config, _, task = make(accumulate=parts)
    trainer = training.Trainer(
      config, Tiny(jax.random.key(0)), task, loss_fn=loss_fn
    )
    state = trainer.init()
    for _ in range(3):
      metrics, state = trainer.summary(trainer.run(state, 1))
      seen.append(metrics["loss"])
  assert len(set(seen)) == len(seen)


def test_buffers_are_refreshed_after_the_step_and_not_trained():
  class Buffered(Tiny):
    has_buffers = True

    def refresh(self, state, inputs, *, reset=None, mask=None):
      self.seen[...] = self.seen[...] + jnp.sum(inputs).astype(jnp.float32)

  config, _, task = make(steps=4)
  model = Buffered(jax.random.key(0))
  training.fit(config, model, task)
  want = sum(
    int(jnp.sum(task.batch(1, s, 8, "train").inputs)) for s in range(4)
  )
  assert float(model.seen[...]) == want


def test_evaluation_averages_by_weight_and_carries_the_memory():
  config, _, task = make()
  model = Tiny(jax.random.key(3), dropout=0.5)
  trainer = training.Trainer(config, model, task)
  got = trainer.evaluate(trainer.init(), "test")
  memory, sums = model.initial_state(8), np.zeros(3)
  for batch in task.eval_batches(8, "test"):
    memory, logits = model(memory, batch.inputs)
    weights = np.asarray(batch.weights)
    loss, accuracy = reference_loss(
      np.asarray(logits), np.asarray(batch.targets), weights
    )
    sums += weights.sum() * np.array([loss, accuracy, 1])
  np.testing.assert_allclose(got["loss"], sums[0] / sums[2], rtol=1e-5)
  np.testing.assert_allclose(got["accuracy"], sums[1] / sums[2], rtol=1e-5)


# A whole run


def test_a_relative_workdir(tmp_path, monkeypatch):
  """As people type it: saves, resumes, loads."""
  monkeypatch.chdir(tmp_path)
  config, model, task = make(steps=2, checkpoint_every=1)
  training.fit(config, model, task, workdir="runs/a")
  again = Tiny(jax.random.key(8))
  resumed = training.fit(config, again, task, workdir="runs/a")
  assert resumed["resumed_from"] == 2 and digest(again) == digest(model)
  loaded = Tiny(jax.random.key(9))
  training.load("runs/a", loaded, "latest")
  assert digest(loaded) == digest(model)


def test_fit_learns_and_reports(tmp_path):
  config, model, task = make(
    steps=300, eval_every=50, log_every=50, learning_rate=3e-2
  )
  before = training.Trainer(config, model, task)
  start = before.evaluate(before.init(), "validation")
  result = training.fit(config, model, task, workdir=tmp_path, profile=True)
  assert (
    result["step"] == 300 and not result["stopped"] and not result["skipped"]
  )
  assert start["accuracy"] < 0.4 < 0.8 < result["eval"]["accuracy"]
  assert result["steps_per_second"] > 0
  np.testing.assert_allclose(
    result["tokens_per_second"], result["steps_per_second"] * 8 * LENGTH
  )
  assert result["parameters"] == 2 * VOCAB * WIDTH + WIDTH**2 + VOCAB
  json.dumps(result)
  assert [line["step"] for line in lines(tmp_path)] == [
    s for s in range(50, 301, 50) for _ in range(2)
  ]
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  again = Tiny(jax.random.key(8))
  resumed = training.fit(config, again, task, workdir=tmp_path)
  assert resumed == {**result, "resumed_from": 300}
  assert digest(again) == digest(model)


def test_the_best_checkpoint_outlives_the_latest(tmp_path):
  scores = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.0, 50: 4.0}

  def loss_fn(model, batch, state, key):
    value = jnp.full((), 0.5) * jnp.sum(model.bias[...])
    score = jnp.asarray(list(scores.values()))[state["steps"] // 10 - 1]
    return value, (state, {"loss": score})

  class Plain(Tokens):
    def eval_batches(self, batch_size, split):
      return [self.batch(0, 0, batch_size, split)]

  class Carried(training.Trainer):
    def evaluate(self, state, split):
      return {"loss": scores[int(state.step)]}

  config, model, _ = make(steps=50, checkpoint_every=10, keep=1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(training, "Trainer", Carried)
    result = training.fit(
      config, model, Plain(), workdir=tmp_path, loss_fn=loss_fn
    )
  assert result["best"] == {"step": 20, "loss": 1.0}
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["20", "50"]
  best, latest = Tiny(jax.random.key(1)), Tiny(jax.random.key(2))
  assert training.load(tmp_path, best)["eval"] == {"loss": 1.0}
  training.load(tmp_path, latest, "latest")
  assert digest(latest) == digest(model) != digest(best)


def test_tensorboard_events(tmp_path):
  pytest.importorskip("tensorboardX")
  config, model, task = make(steps=10)
  writer = training.TensorBoardWriter(tmp_path / "events")
  training.fit(config, model, task, writers=[writer])
  (event,) = (tmp_path / "events").iterdir()
  assert (
    b"train/loss" in event.read_bytes()
    and b"eval/accuracy" in event.read_bytes()
  )


# Kill and resume


def run(workdir, *, devices=1, wait=True, distributed=None, **options):
  """This file as a process: `worker` below."""
  flags = [
    f
    for f in os.environ.get("XLA_FLAGS", "").split()
    if "device_count" not in f
  ]
  flags.append(f"--xla_force_host_platform_device_count={devices}")
  environment = {
    **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags),
    "PYTHONPATH": str(ROOT),
  }  # fmt: skip
  request = json.dumps(
    dict(workdir=str(workdir), distributed=distributed, **options)
  )
  process = subprocess.Popen(
    [sys.executable, __file__, request],
    env=environment, cwd=ROOT, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip
  return finish(process) if wait else process


def finish(process, code=0, timeout=300):
  try:
    out, err = process.communicate(timeout=timeout)
  finally:
    process.kill()
  assert process.returncode == code, err[-4000:]
  return json.loads(out.splitlines()[-1]) if out else None


def worker(workdir, distributed, config=None, mesh="", stop_at=None, delay=0.0):
  """Trains `Tiny`, and prints the result and a hash of the model."""
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  if distributed:
    parallel.initialize(*distributed)
  config, model, task = make(**(config or {}))
  stopped = []
  signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))

  class Watch:
    step = 0

    def start(self, step):
      pass

    def write(self, step, split, metrics):
      self.step = step
      time.sleep(delay)

    def close(self):
      pass

  watch = Watch()
  stop = lambda: bool(stopped) or watch.step >= (stop_at or config.steps)
  result = training.fit(
    config, model, task,
    workdir=workdir, mesh=parallel.make_mesh(mesh), writers=[watch], stop=stop,
  )  # fmt: skip
  params = checkpoint.variables(model)["params"]
  if jax.process_count() > 1:
    gather = functools.partial(
      jax.device_put, device=parallel.replicated(parallel.make_mesh(mesh))
    )
    params = jax.tree.map(gather, params)
  result["params"] = {
    n: np.asarray(p).tolist() for n, p in sorted(params.items())
  }
  print(json.dumps(result), flush=True)


def wait_for(condition, process, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()[1][-4000:]
    assert time.monotonic() < end, "it did not come"
    time.sleep(0.005)


def written(workdir):
  path = pathlib.Path(workdir) / "metrics.jsonl"
  return path.read_text().count("\n") if path.exists() else 0


def numbers(result):
  """What must not depend on how a run was interrupted."""
  best = result["best"]
  return (
    result["params"],
    result["eval"],
    best,
    result["skipped"],
    result["step"],
  )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  return run(workdir), lines(workdir)


def test_killed_at_any_moment_a_run_ends_with_the_same_numbers(
  tmp_path, uninterrupted
):
  rng = random.Random(time.time_ns())
  moments = [rng.randrange(1, 11), rng.randrange(1, 5)]
  print(f"killed after {moments} lines")  # shown where the test fails
  for moment in moments:
    until = min(written(tmp_path) + moment, 11)
    process = run(tmp_path, wait=False, delay=0.02)
    wait_for(lambda until=until: written(tmp_path) >= until, process)
    time.sleep(rng.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  result = run(tmp_path)
  assert numbers(result) == numbers(uninterrupted[0])
  assert lines(tmp_path) == uninterrupted[1]


def test_sigterm_saves_and_the_run_goes_on(tmp_path, uninterrupted):
  options = dict(config=dict(checkpoint_every=0, eval_every=0), delay=0.05)
  process = run(tmp_path, wait=False, **options)
  wait_for(lambda: written(tmp_path) >= 2, process)
  process.send_signal(signal.SIGTERM)
  first = finish(process)
  assert first["stopped"] and 0 < first["step"] < 40
  assert os.listdir(tmp_path / "checkpoints") == [str(first["step"])]
  result = run(tmp_path, **options)
  assert result["resumed_from"] == first["step"] and not result["stopped"]
  assert result["params"] == uninterrupted[0]["params"]


def test_a_half_written_checkpoint_is_survived(tmp_path):
  config, model, task = make(steps=20)
  training.fit(config, model, task, workdir=tmp_path)
  found = tmp_path / "checkpoints"
  shutil.copytree(found / "20", found / "30.orbax-checkpoint-tmp")
  shutil.rmtree(found / "20")
  (found / "30.orbax-checkpoint-tmp" / "meta" / "metadata").unlink()
  again = Tiny(jax.random.key(4), dropout=0.1)
  result = training.fit(config, again, task, workdir=tmp_path)
  assert result["resumed_from"] == 10
  assert digest(again) == digest(model)
  assert sorted(os.listdir(found)) == ["10", "20"]


def test_resuming_drops_the_lines_that_come_again(tmp_path):
  path = tmp_path / "metrics.jsonl"
  rows = [{"step": s, "split": "train", "loss": 1.0} for s in (5, 10, 15)]
  path.write_text(
    "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 16, "spl'
  )
  writer = training.JsonlWriter(path)
  writer.start(10)
  writer.write(11, "eval", {"loss": float("nan")})
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    *rows[:2], {"step": 11, "split": "eval", "loss": None},
  ]  # fmt: skip


# Bad input


def interrupted(tmp_path):
  """A workdir with two checkpoints, of steps 10 and 20."""
  config, model, task = make(steps=20)
  training.fit(
    config, model, task, workdir=tmp_path, about={"model": {"width": 8}}
  )
  return config, task


def refused(tmp_path, match, about=None, model=None, **options):
  """One clear error, and every file as it was."""
  before = files(tmp_path)
  config, own, task = make(**{"steps": 20, **options})
  with pytest.raises(training.CheckpointError, match=match) as error:
    training.fit(
      config,
      model or own,
      task,
      workdir=tmp_path,
      about=about or {"model": {"width": 8}},
    )
  assert "\n" not in str(error.value)
  assert files(tmp_path) == before


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
  interrupted(tmp_path)
  refused(
    tmp_path, "learning_rate is 0.01 there and 0.5 here", learning_rate=0.5
  )
  refused(
    tmp_path,
    r"model.width is 8 there and 9 here; .*workdir",
    about={"model": {"width": 9}},
  )
  refused(
    tmp_path,
    "model.depth is absent there and 1 here",
    about={"model": {"width": 8, "depth": 1}},
  )
  # What does not change the numbers may change.
  config, model, task = make(steps=20, log_every=7, checkpoint_every=3, keep=4)
  result = training.fit(
    config, model, task, workdir=tmp_path, about={"model": {"width": 8}}
  )
  assert result["resumed_from"] == 20


def test_a_checkpoint_of_other_arrays_is_refused(tmp_path):
  interrupted(tmp_path)
  model = Tiny(jax.random.key(0), inputs=9)
  refused(
    tmp_path,
    r"params/embed is 'float32\[7, 8\]' there and 'float32\[9, 8\]' here",
    model=model,
  )


def damage(tmp_path, how):
  step = tmp_path / "checkpoints" / "20"
  data = max((step / "trainer" / "d").iterdir(), key=lambda p: p.stat().st_size)
  if how == "truncated":
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
  elif how == "emptied":
    data.write_bytes(b"")
  elif how == "flipped":
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 255
    data.write_bytes(bytes(content))
  elif how == "meta truncated":
    meta = step / "meta" / "metadata"
    meta.write_text(meta.read_text()[:30])
  elif how == "meta emptied":
    (step / "meta" / "metadata").write_text("{}")
  elif how == "manifest lost":
    (step / "model" / "manifest.ocdbt").unlink()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
@pytest.mark.parametrize(
  "how",
  [
    "truncated",
    "emptied",
    "flipped",
    "meta truncated",
    "meta emptied",
    "manifest lost",
  ],
)
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, how):
  config, task = interrupted(tmp_path)
  damage(tmp_path, how)
  refused(tmp_path, "checkpoints/20 cannot be read")
  shutil.move(tmp_path / "checkpoints" / "20", tmp_path / "damaged")
  model = Tiny(jax.random.key(0), dropout=0.1)
  result = training.fit(
    config, model, task, workdir=tmp_path, about={"model": {"width": 8}}
  )
  assert result["resumed_from"] == 10 and result["step"] == 20


def test_a_foreign_checkpoint_is_one_clear_error(tmp_path):
  (tmp_path / "checkpoints" / "7").mkdir(parents=True)
  (tmp_path / "checkpoints" / "7" / "weights.bin").write_bytes(b"not ours")
  refused(tmp_path, "checkpoints/7 was not written by this trainer")


def test_loading_from_nowhere(tmp_path):
  model = Tiny(jax.random.key(0))
  with pytest.raises(
    training.CheckpointError, match="there are no checkpoints in"
  ):
    training.load(tmp_path / "nothing", model)
  with pytest.raises(ValueError, match="'best' or 'latest', got 'first'"):
    training.load(tmp_path, model, "first")


@pytest.mark.parametrize("place", ["file", "below", "checkpoints"])
def test_an_unwritable_workdir_is_one_clear_error(tmp_path, place):
  config, model, task = make()
  path = tmp_path / "file"
  path.write_text("in the way")
  workdir = {"file": path, "below": path / "run", "checkpoints": tmp_path}[
    place
  ]
  if place == "checkpoints":
    path.rename(tmp_path / "checkpoints")
  with pytest.raises(
    training.WorkdirError, match=f"workdir '{workdir}.*cannot be"
  ) as error:
    training.fit(config, model, task, workdir=workdir)
  assert "\n" not in str(error.value)
  (kept,) = (p for p in tmp_path.iterdir() if p.is_file())
  assert kept.read_text() == "in the way"


@pytest.mark.parametrize(
  ("options", "match"),
  [
    (dict(steps=0, warmup=0), "steps must be at least 1: 0"),
    (dict(batch_size=0), "batch_size must be at least 1"),
    (dict(warmup=41), "warmup 41 is longer than steps 40"),
    (dict(learning_rate=0.0), "learning_rate must be positive"),
    (dict(learning_rate=float("nan")), "learning_rate must be positive"),
    (dict(accumulate=3), "batch_size 8 is no multiple of accumulate 3"),
    (dict(clip=-1.0), "clip must be at least 0"),
    (
      dict(best="acuracy"),
      "best is 'acuracy', and evaluations have accuracy, loss",
    ),
    (dict(eval_split="dev"), "not in tuple"),
    (dict(report_weights={"sise": 1.0}), "no report 'sise'; it has size"),
  ],
)
def test_impossible_configs(options, match):
  with pytest.raises((ValueError, KeyError), match=match):
    config, model, task = make(**options)
    training.fit(config, model, task)


def test_a_task_of_unknown_kind():
  config, model, _ = make()
  task = Tokens()
  object.__setattr__(task, "kind", "riddles")
  with pytest.raises(
    ValueError, match="unknown kind 'riddles'; known: bits, classif"
  ):
    training.Trainer(config, model, task)


# Meshes


def test_parse_mesh():
  assert parallel.parse_mesh("data:4,fsdp:2") == {"data": 4, "fsdp": 2}
  assert parallel.parse_mesh(" fsdp : 2 ") == {"fsdp": 2}
  assert parallel.parse_mesh("") == {}


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("dta:4", "unknown axis 'dta'; known: data, fsdp"),
    ("data:0", "axis 'data' needs a positive whole number.*got '0'"),
    ("data:-2", "got '-2'"),
    ("data:two", "got 'two'"),
    ("data", "got ''"),
    ("data:2,data:2", "axis 'data' is given twice"),
  ],
)
def test_bad_meshes(text, match):
  with pytest.raises(ValueError, match=match):
    parallel.parse_mesh(text)


def test_a_mesh_larger_than_the_machine():
  many = jax.device_count() + 1
  with pytest.raises(
    ValueError, match=f"'data:{many}' needs {many} devices, and {many - 1}"
  ):
    parallel.make_mesh(f"data:{many}")


def test_rules_place_by_path_name():
  mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
  largest = parallel.largest("fsdp")
  assert largest((6, 8), mesh) == P(None, "fsdp")
  assert largest((8, 8), mesh) == P("fsdp")
  assert largest((3, 5), mesh) == P() == largest((8,), mesh)
  assert largest((2, 16, 12), mesh) == P(None, "fsdp")
  tree = {
    "a": {"kernel": np.zeros((8, 4)), "bias": np.zeros((8, 4))},
    "b": [np.zeros(4)],
  }
  placed = parallel.shardings(tree, mesh)
  assert (
    placed["a"]["kernel"].spec == P("fsdp") and placed["a"]["bias"].spec == P()
  )
  own = ((r"a/ker", P(None, "fsdp")), (r"^b/0$", P("data")))
  placed = parallel.shardings(tree, mesh, own)
  assert placed["a"]["kernel"].spec == P(None, "fsdp")
  assert placed["a"]["bias"].spec == P() and placed["b"][0].spec == P("data")
  with pytest.raises(
    ValueError, match=r"'a/kernel' of shape \(8, 4\) cannot be split"
  ):
    parallel.shardings(tree, mesh, ((r"kernel", P(None, None, "fsdp")),))


def test_two_leaves_of_one_name():
  with pytest.raises(ValueError, match="path name 'a/0'"):
    parallel.named_leaves({"a": [1], "a/0": 2})


def test_incomplete_distributed_flags():
  with pytest.raises(ValueError, match="processes, process missing"):
    parallel.initialize("localhost:1")
  with pytest.raises(
    ValueError, match="process 2 is not among the 2 processes"
  ):
    parallel.initialize("localhost:1", 2, 2)


def close(result, other):
  for name, value in other["params"].items():
    np.testing.assert_allclose(
      result["params"][name], value, rtol=1e-4, atol=1e-5
    )
  np.testing.assert_allclose(
    result["eval"]["loss"], other["eval"]["loss"], rtol=1e-4
  )


def test_eight_devices_equal_one(tmp_path, uninterrupted):
  result = run(tmp_path, devices=8, mesh="data:4,fsdp:2")
  close(result, uninterrupted[0])


def test_a_checkpoint_restores_on_another_number_of_devices(
  tmp_path, uninterrupted
):
  first = run(tmp_path, devices=8, mesh="data:2,fsdp:4", stop_at=10)
  assert first["stopped"]
  result = run(tmp_path, devices=2, mesh="fsdp:2")
  assert 0 < result["resumed_from"] == first["step"] < result["step"] == 40
  close(result, uninterrupted[0])


def test_a_batch_that_does_not_divide():
  mesh = jax.sharding.AbstractMesh((4, 2), ("data", "fsdp"))
  config, model, task = make(batch_size=24, accumulate=2)
  with pytest.raises(
    ValueError, match=r"24 in 2 micro-batch\(es\) cannot be split .* the 8"
  ):
    training.Trainer(config, model, task, mesh=mesh)


def free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def pair(workdir, **options):
  where = f"localhost:{free_port()}"
  return [
    run(workdir, wait=False, distributed=[where, 2, i], **options)
    for i in range(2)
  ]


@pytest.mark.slow
def test_two_processes_equal_one_and_survive_a_death(tmp_path, uninterrupted):
  whole = [finish(p) for p in pair(tmp_path / "whole")]
  assert whole[0]["params"] == whole[1]["params"]
  close(whole[0], uninterrupted[0])
  workdir = tmp_path / "killed"
  both = pair(workdir, delay=0.1)
  wait_for(lambda: written(workdir) >= 6, both[0])
  both[1].kill()
  time.sleep(0.5)
  both[0].kill()  # a cluster restarts the whole job
  for process in both:
    process.communicate()
  again = [finish(p) for p in pair(workdir)]
  assert 0 < again[0]["resumed_from"] < 40
  close(again[0], whole[0])
  assert [x["step"] for x in lines(workdir)] == [
    x["step"] for x in uninterrupted[1]
  ]


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both(tmp_path):
  both = pair(tmp_path, delay=0.1)
  wait_for(lambda: written(tmp_path) >= 4, both[0])
  both[1].send_signal(signal.SIGTERM)
  first, second = map(finish, both)
  assert (
    first["stopped"] and second["stopped"] and first["step"] == second["step"]
  )
  assert str(first["step"]) in os.listdir(tmp_path / "checkpoints")


# The command


TINY = (
  "--cell=gru", "--d_model=8", "--depth=1", "--task=mqar_small", "--task_options=num_test=16",
  "--batch_size=8", "--steps=6", "--warmup=2", "--log_every=2", "--eval_every=4",
)  # fmt: skip


def flagged(*arguments):
  values = flags.FlagValues()
  train.define(values)
  values(["train", *TINY, *arguments])
  return values


@pytest.mark.parametrize(
  ("text", "want"),
  [
    ("", {}),
    (
      "a=1, b=true,c=.5,d=word,e=None",
      {"a": 1, "b": True, "c": 0.5, "d": "word", "e": None},
    ),
    ('{"a": [1, 2], "b": "x,y"}', {"a": [1, 2], "b": "x,y"}),
    (
      "path=/a/b c.txt,gru.reset_after=False",
      {"path": "/a/b c.txt", "gru.reset_after": False},
    ),
  ],
)
def test_parse_options(text, want):
  assert train.parse_options(text) == want


@pytest.mark.parametrize(
  ("arguments", "match"),
  [
    (["--cell=grru"], "unknown memory 'grru'.*'gru'"),
    (["--cell=gru,lstn"], "unknown memory 'lstn'.*'lstm'"),
    (
      ["--cell_options=reset_befor=1"],
      "memory 'gru' has no option 'reset_befor'",
    ),
    (["--cell_options=lru.x=1"], "'lru.x', and no cell is 'lru'"),
    (["--cell_options=reset_after"], "'reset_after' is not name=value"),
    (["--cell_options={oops"], "are no JSON"),
    (["--task=mqar_smal"], "unknown task: 'mqar_smal'"),
    (["--task_options=lenght=3"], "'lenght'"),
    (["--task=text", "--task_options="], "needs the option path"),
    (
      ["--task=text", "--task_options=path=/no/such/file"],
      "no file '/no/such/file'",
    ),
    (["--model_options=convsize=4"], "models have no option 'convsize'"),
    (
      ["--cell=gru,gru", "--depth=3"],
      "depth must be a positive multiple of the 2 cell",
    ),
    (["--dropout=1.5"], "dropout must be a rate"),
    (["--d_model=0"], "d_model"),
    (["--report_weights=balance=1"], "no report 'balance'; it has none"),
    (["--implementation=chunks"], "chunks"),
    (["--mesh=dta:1"], "unknown axis 'dta'"),
    (["--platform=tpu"], "no tpu is here; JAX found"),
    (["--eval_split=dev"], "'dev'"),
    (["--profile"], "a workdir is needed"),
    (["--distributed", "--process=1"], "coordinator, processes missing"),
  ],
)
def test_impossible_flags_are_one_clear_error(arguments, match):
  with pytest.raises(
    (ValueError, TypeError, OSError, NotImplementedError), match=match
  ):
    train.run(flagged(*arguments))


def test_a_run_is_repeated_from_its_flags(tmp_path):
  first = train.run(
    flagged(f"--workdir={tmp_path / 'a'}", "--dropout=0.2", "--final=test")
  )
  again = [
    "--flagfile=" + str(tmp_path / "a" / "run.flags"),
    f"--workdir={tmp_path / 'b'}",
  ]
  second = train.run(flagged(*again))
  assert lines(tmp_path / "a") == lines(tmp_path / "b")
  assert (
    first["final"] == second["final"] and first["final"]["test"]["loss"] > 0
  )
  task, model = train.build(flagged(*again))
  meta = training.load(tmp_path / "b", model, "latest")
  assert (
    meta["config"]["task"] == "mqar_small"
    and meta["config"]["model"]["dropout"] == 0.2
  )
  _, fresh = train.build(flagged(*again))
  assert digest(fresh) != digest(model)
  with pytest.raises(
    training.CheckpointError, match="model.dropout is 0.2 there and 0.0 here"
  ):
    train.run(flagged(*again, "--dropout=0"))


def test_bf16_computes_in_bf16_and_keeps_float32(tmp_path):
  results = []
  for dtype in ("float32", "bfloat16"):
    values = flagged(
      f"--compute_dtype={dtype}", "--cell_options=reset_after=true"
    )
    task, model = train.build(values)
    results.append(training.fit(train.settings(values), model, task))
    assert {x.dtype for x in jax.tree.leaves(checkpoint.variables(model))} == {
      jnp.dtype("float32")
    }
  a, b = (r["eval"]["loss"] for r in results)
  assert a != b and abs(a - b) < 0.01 * a


def test_decay_leaves_offsets_and_scales_alone():
  _, model = train.build(flagged("--cell=gru,gated_delta", "--depth=4"))
  params = checkpoint.variables(model)["params"]
  mask = parallel.named_leaves(training.decayed(params))
  short = lambda name: name.replace("encoder/stack/blocks/", "")
  decays = {short(n) for n, yes in mask.items() if yes}
  spared = {short(n) for n, yes in mask.items() if not yes}
  assert {
    "encoder/embedding",
    "0/memory/params/w",
    "0/mlp/up",
    "1/memory/params/qkv",
  } <= decays
  assert {
    "0/memory/params/b",
    "0/mlp_norm/scale",
    "1/memory/params/a_log",
  } <= spared
  assert {"1/memory/params/dt", "encoder/norm/scale"} <= spared
  mesh = jax.sharding.AbstractMesh((1, 2), ("data", "fsdp"))
  placed = parallel.named_leaves(parallel.shardings(params, mesh))
  assert placed["encoder/stack/blocks/0/mlp/up"].spec == P(None, None, "fsdp")
  assert placed["encoder/stack/blocks/0/memory/params/b"].spec == P()


@pytest.mark.parametrize(
  ("cell", "spared"),
  [
    ("lru", {"gamma_log", "nu_log", "theta_log", "d"}),
    ("mamba", {"a_log", "conv_bias", "d", "dt_bias"}),
    ("ttt_linear", {"b0", "conv_bias", "norm_bias", "norm_scale", "place", "post_bias"}
     | {"post_scale", "rate_b"}),
    ("gru", {"b"}),
  ],
)  # fmt: skip
def test_decay_of_cells(cell, spared):
  mask = training.decayed(memzoo.tiny(cell).init(jax.random.key(0)))
  assert {
    name for name, yes in parallel.named_leaves(mask).items() if not yes
  } == spared


def command(*arguments):
  return subprocess.Popen(
    [sys.executable, "-m", "experiments.train", *TINY, *arguments],
    env={**os.environ, "JAX_PLATFORMS": "cpu"}, cwd=ROOT, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def test_the_command_exits_0_on_sigterm_and_1_on_an_error(tmp_path):
  process = command(f"--workdir={tmp_path}", "--steps=1000000")
  wait_for(lambda: written(tmp_path) >= 3, process)
  process.send_signal(signal.SIGTERM)
  result = finish(process)
  assert result["stopped"] and result["step"] > 0
  assert str(result["step"]) in os.listdir(tmp_path / "checkpoints")
  process = command(f"--workdir={tmp_path}", "--steps=1000000", "--seed=5")
  out, err = process.communicate(timeout=120)
  assert process.returncode == 1
  assert (
    err.strip().splitlines()[-1].startswith("error: checkpoint ")
    and "seed is 0" in err
  )
  assert "Traceback" not in err


if __name__ == "__main__":
  worker(**json.loads(sys.argv[1]))
