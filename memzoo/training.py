"""The trainer: state, step, evaluation, checkpoints, and `fit`, the loop.

A run is a function of its config. Batches depend on (seed, step) alone, the
dropout key folds the step in, and what else is carried (optimiser, memory of a
streaming task, running averages) is in the checkpoint: a run that is killed at
any moment and started again ends with the same numbers.

Nothing here reads flags, prints, or installs signal handlers; `experiments/`
does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import math
import re
import time
from typing import Any, NamedTuple, Protocol

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from memzoo import checkpoint, parallel
from memzoo.checkpoint import (
  CheckpointError as CheckpointError,
  WorkdirError as WorkdirError,
  load as load,
  open_workdir as open_workdir,
)


@dataclasses.dataclass(frozen=True)
class Config:
  """What a run is, beside its model and its task.

  Attributes:
    steps: optimiser steps.
    batch_size: rows of one step, over all devices and micro-batches.
    learning_rate: peak of the schedule.
    warmup: steps of linear warm-up before the cosine decay to zero.
    weight_decay: AdamW's, on matrices alone (`decayed`).
    clip: largest global norm of the gradient; 0 does not clip.
    accumulate: micro-batches that a step is cut into.
    seed: of the batches and of dropout.
    report_weights: {name: weight} of the model's reports in the loss; those
      of weight 0 are logged alone.
    implementation: form of the cells, or {cell: form}; None for the first that
      serves.
    best: the metric by which the best checkpoint is kept; 'accuracy' is
      better high, any other low.
    train_split: of the task.
    eval_split: of the task.
    eval_every: steps between evaluations; 0 evaluates at the end alone.
    checkpoint_every: steps between checkpoints; 0 saves at the end alone.
    log_every: steps that one line of training metrics averages.
    keep: how many of the latest checkpoints are kept, beside the best.
  """

  steps: int = 1000
  batch_size: int = 64
  learning_rate: float = 1e-3
  warmup: int = 100
  weight_decay: float = 0.1
  clip: float = 1.0
  accumulate: int = 1
  seed: int = 0
  report_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  implementation: str | Mapping[str, str] | None = None
  best: str = "loss"
  train_split: str = "train"
  eval_split: str = "validation"
  eval_every: int = 0
  checkpoint_every: int = 0
  log_every: int = 100
  keep: int = 2

  def __post_init__(self):
    for name, least in (
      ("steps", 1), ("batch_size", 1), ("accumulate", 1), ("log_every", 1),
      ("keep", 1), ("warmup", 0), ("eval_every", 0), ("checkpoint_every", 0),
      ("seed", 0), ("clip", 0), ("weight_decay", 0),
    ):  # fmt: skip
      value = getattr(self, name)
      if not value >= least:
        raise ValueError(f"config: {name} must be at least {least}: {value!r}")
    if not 0 < self.learning_rate < math.inf:
      raise ValueError(
        f"config: learning_rate must be positive: {self.learning_rate!r}"
      )
    if self.warmup > self.steps:
      raise ValueError(
        f"config: warmup {self.warmup} is longer than steps {self.steps}"
      )
    if self.batch_size % self.accumulate:
      raise ValueError(
        f"config: batch_size {self.batch_size} is no multiple of accumulate "
        f"{self.accumulate}"
      )

  def identity(self) -> dict[str, Any]:
    """The fields that the numbers of a run depend on, as plain data.

    A checkpoint belongs to one identity. How often a run logs, evaluates and
    saves may change between two starts, and so may the form that computes it.
    """
    free = (
      "implementation", "eval_every", "checkpoint_every", "log_every", "keep",
    )  # fmt: skip
    plain = dataclasses.asdict(self)
    return {name: x for name, x in plain.items() if name not in free}


class TrainState(NamedTuple):
  """All that a step carries to the next; all of it is in the checkpoint."""

  step: jax.Array  # int32 [], steps done, rejected ones too
  params: Any  # the model's nnx.Param, by path
  buffers: Any  # its other variables
  opt_state: Any
  memory: Any  # carried by streaming tasks, else ()
  skipped: jax.Array  # int32 [], rejected steps
  window: Any  # {metric: float32 []}, weighted sums since the last line


# Losses


def token_loss(
  model, batch, state, key, *, report_weights=None, implementation=None
):
  """Cross-entropy per token, weighted and masked.

  Args:
    model: outputs logits [B, T, V].
    batch: targets int [B, T]; weights [B, T] and mask bool [B, T], or None.
      Targets may hold anything where these are 0.
    state: the model's memory before the batch.
    key: for dropout; None is deterministic.
    report_weights: {name: weight}, the model's reports to add to the loss.
    implementation: form of the cells, or {cell: form}; None for the model's
      choice.

  Returns:
    (loss, (state, metrics)): float32 scalars 'loss' (without the reports),
    'accuracy', 'weight' (the sum of the weights, under which metrics are
    averaged over batches) and one per report.

  Raises:
    ValueError: on a name in `report_weights` that the model does not report.
  """
  state, logits, reports = _call(
    model, batch, state, key, report_weights, implementation
  )
  weights = _weights(batch.targets, batch.weights, batch.mask)
  metrics = _cross_entropy(logits, batch.targets, weights)
  loss, metrics = _weigh(metrics, reports, report_weights)
  return loss, (state, metrics)


def classification_loss(
  model, batch, state, key, *, report_weights=None, implementation=None
):
  """Cross-entropy per row; as `token_loss`, for logits [B, C].

  Targets int [B]; weights [B] or None. The mask [B, T] is the model's alone.
  """
  state, logits, reports = _call(
    model, batch, state, key, report_weights, implementation
  )
  weights = _weights(batch.targets, batch.weights)
  metrics = _cross_entropy(logits, batch.targets, weights)
  loss, metrics = _weigh(metrics, reports, report_weights)
  return loss, (state, metrics)


def regression_loss(
  model, batch, state, key, *, report_weights=None, implementation=None
):
  """Mean squared error; as `token_loss`, for outputs of the targets' shape.

  Targets [B, ...] or [B, T, ...]; the weights have leading axes of theirs, and
  the mask counts where the targets have a time axis of its length.

  Raises:
    ValueError: where outputs and targets differ in shape, too.
  """
  state, outputs, reports = _call(
    model, batch, state, key, report_weights, implementation
  )
  targets = batch.targets
  if outputs.shape != targets.shape:
    raise ValueError(
      f"regression: the model's outputs {outputs.shape} and the targets "
      f"{targets.shape} differ in shape"
    )
  mask = batch.mask
  if mask is not None and targets.shape[:2] != mask.shape:
    mask = None
  weights = _weights(targets, batch.weights, mask)
  errors = outputs.astype(jnp.float32) - targets.astype(jnp.float32)
  metrics = {
    "loss": _mean(jnp.square(errors), weights), "weight": jnp.sum(weights),
  }  # fmt: skip
  loss, metrics = _weigh(metrics, reports, report_weights)
  return loss, (state, metrics)


def bits_loss(
  model, batch, state, key, *, report_weights=None, implementation=None
):
  """Sigmoid cross-entropy per bit; as `regression_loss`, for logits.

  Targets are float 0 or 1 [B, T, N]; 'accuracy' is the share of right bits.
  """
  state, logits, reports = _call(
    model, batch, state, key, report_weights, implementation
  )
  targets = batch.targets
  if logits.shape != targets.shape:
    raise ValueError(
      f"bits: the model's outputs {logits.shape} and the targets "
      f"{targets.shape} differ in shape"
    )
  weights = _weights(targets, batch.weights, batch.mask)
  logits = jnp.where(weights > 0, logits.astype(jnp.float32), 0.0)
  losses = optax.sigmoid_binary_cross_entropy(logits, targets)
  right = ((logits > 0) == (targets > 0.5)).astype(jnp.float32)
  metrics = {
    "loss": _mean(losses, weights), "accuracy": _mean(right, weights),
    "weight": jnp.sum(weights),
  }  # fmt: skip
  loss, metrics = _weigh(metrics, reports, report_weights)
  return loss, (state, metrics)


def _call(model, batch, state, key, report_weights, implementation):
  """(state, outputs, reports)."""
  options = dict(reset=batch.reset, mask=batch.mask, key=key)
  if implementation is not None:
    options["implementation"] = implementation
  if report_weights:
    return model(state, batch.inputs, reports=True, **options)
  return *model(state, batch.inputs, **options), {}


def _weights(targets, *factors):
  """The product of the factors, each over leading axes of the targets'."""
  weights = jnp.ones(targets.shape, jnp.float32)
  for factor in factors:
    if factor is not None:
      axes = (1,) * (targets.ndim - factor.ndim)
      weights = weights * factor.reshape(factor.shape + axes).astype(
        jnp.float32
      )
  return weights


def _mean(values, weights):
  total = jnp.sum(weights)
  values = jnp.where(weights > 0, values * weights, 0.0)
  return jnp.sum(values) / jnp.where(total > 0, total, 1.0)


def _cross_entropy(logits, labels, weights) -> dict[str, jax.Array]:
  logits = logits.astype(jnp.float32)
  counted = weights > 0
  labels = jnp.where(counted, labels, 0)
  logits = jnp.where(counted[..., None], logits, 0.0)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  correct = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
  return {
    "loss": _mean(losses, weights),
    "accuracy": _mean(correct, weights),
    "weight": jnp.sum(weights),
  }


def _weigh(metrics, reports, report_weights):
  """Adds the reports by name: (loss, metrics)."""
  loss = metrics["loss"]
  for name, weight in (report_weights or {}).items():
    if name not in reports:
      raise ValueError(
        f"report_weights: the model has no report {name!r}; it has "
        f"{', '.join(sorted(reports)) or 'none'}"
      )
    value = jnp.mean(reports[name].astype(jnp.float32))
    metrics = {**metrics, f"report/{name}": value}
    if weight:
      loss = loss + weight * value
  return loss, metrics


LOSSES = {
  "tokens": token_loss,
  "labels": token_loss,
  "bits": bits_loss,
  "classification": classification_loss,
  "regression": regression_loss,
}


def loss_for(config: Config, task) -> Callable:
  """The `loss_fn` of a task's kind, with the options that `config` has.

  Raises:
    ValueError: on a kind that is not in `LOSSES`.
  """
  if task.kind not in LOSSES:
    raise ValueError(
      f"task {task!r}: unknown kind {task.kind!r}; known: "
      f"{', '.join(sorted(LOSSES))}"
    )
  return functools.partial(
    LOSSES[task.kind],
    report_weights=dict(config.report_weights),
    implementation=config.implementation,
  )


# The optimiser


#: Path names that weight decay leaves alone, whatever their shape: offsets
#: (`b`, `b0`, `out_b`), scales, rates of decay, states before the first input.
UNDECAYED = re.compile(
  r"(^|[/_])b\d*$"
  r"|(^|[/_])(bias|scale|norm|gain|log|decay|init|initial)([/_]|$)"
)


def decayed(params):
  """Which leaves weight decay shrinks: a tree of bools.

  Matrices, that is: leaves of two axes or more, the layers' axis of a stack
  not counted, unless `UNDECAYED` finds a word in their path name.
  """

  def decays(name, leaf):
    stacked = bool(parallel.STACKED.search(name))
    return leaf.ndim - stacked >= 2 and not UNDECAYED.search(name)

  return parallel.map_named(decays, params)


def schedule(config: Config) -> optax.Schedule:
  """Linear warm-up to `learning_rate`, then a cosine to zero at `steps`."""

  def rate(count):
    count = jnp.asarray(count, jnp.float32)
    warm = (count + 1) / max(config.warmup, 1)
    done = (count - config.warmup) / max(config.steps - config.warmup, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
    return config.learning_rate * jnp.where(count < config.warmup, warm, cosine)

  return rate


def optimizer(config: Config, mask) -> optax.GradientTransformation:
  """AdamW under `schedule`; `mask` says which leaves decay."""
  adamw = optax.adamw(
    schedule(config), weight_decay=config.weight_decay, mask=mask
  )
  if not config.clip:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


# The step


class Trainer:
  """A model on a task, compiled: `init`, `run`, `evaluate`.

  `fit` drives it; drive it yourself for another loop.

  Args:
    config: the run.
    model: an NNX module of `memzoo.models`, or one of your own with
      `initial_state(batch)` and `(state, inputs, reset, mask, key)`.
    task: of `memzoo.tasks`, or what has `kind`, `streams`, `batch` and
      `eval_batches`.
    loss_fn: `(model, batch, state, key) -> (loss, (state, metrics))`; that of
      the task's kind by default. `metrics` are float32 scalars, averaged over
      batches under 'weight' (1 where it is missing).
    mesh: of `parallel.make_mesh`; every device on `data` by default.
    rules: how parameters are sharded (`parallel.RULES`).

  Raises:
    ValueError: where the batch cannot be split over micro-batches and devices.
  """

  def __init__(
    self,
    config: Config,
    model: nnx.Module,
    task,
    *,
    loss_fn: Callable | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: parallel.Rules = parallel.RULES,
  ):
    self.config = config
    self.task = task
    self.mesh = parallel.make_mesh() if mesh is None else mesh
    self.loss_fn = loss_fn or loss_for(config, task)
    if config.batch_size // config.accumulate % self.mesh.size:
      raise ValueError(
        f"batch_size {config.batch_size} in {config.accumulate} micro-batch"
        f"(es) cannot be split evenly over the {self.mesh.size} devices of the "
        f"mesh {dict(self.mesh.shape)}"
      )
    self._graph = nnx.split(model, nnx.Param, ...)[0]
    self._variables = checkpoint.variables(model)
    self._refreshes = bool(getattr(model, "has_buffers", False))
    self._optimizer = optimizer(config, decayed)
    self._row_axes = _row_axes(model) if task.streams else []
    self._on_device, batch = self._batch_form()
    self.tokens_per_step = math.prod(jax.tree.leaves(batch.inputs)[0].shape[:2])
    fresh = jax.eval_shape(self._fresh, **self._variables)
    _, (_, metrics) = jax.eval_shape(
      self._objective, *fresh[1:3], fresh.memory, batch, jax.random.key(0)
    )
    self._window = {
      name: np.zeros((), np.float32) for name in sorted([*metrics, "grad_norm"])
    }
    self._shapes = fresh._replace(window=self._window)
    self.shardings = parallel.shardings(
      self._shapes, self.mesh, rules
    )._replace(
      memory=self._by_row(
        lambda _, axis: parallel.batch_sharding(self.mesh, axis), fresh.memory
      )
    )
    compiled = functools.partial(
      jax.jit, donate_argnums=0, out_shardings=self.shardings
    )
    self._many = compiled(self._steps)
    self._one = compiled(self._step)
    self._score = jax.jit(self._scores)
    self._begin = jax.jit(lambda *args: self._fresh(*args).memory)

  @property
  def metrics(self) -> tuple[str, ...]:
    """What an evaluation averages."""
    return tuple(n for n in self._window if n not in ("weight", "grad_norm"))

  @property
  def parameters(self) -> int:
    """How many numbers the optimiser trains."""
    return sum(x.size for x in jax.tree.leaves(self._shapes.params))

  def init(self) -> TrainState:
    """The state before step 0, on the mesh. The model's arrays are copied."""
    state = jax.jit(self._fresh)(**self._variables)
    state = state._replace(window=self._window)
    return parallel.put(state, self.shardings, copy=True)

  def abstract(self) -> TrainState:
    """Shapes, dtypes and places of the state: what a checkpoint is read to."""
    return jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      self._shapes,
      self.shardings,
    )

  def run(self, state: TrainState, steps: int) -> TrainState:
    """`steps` steps from `state`, whose buffers are donated.

    Where the task's batches can be traced they are drawn on the device, and
    the steps are one call of one compiled loop, whatever their number.
    """
    if self._on_device:
      return self._many(state, np.int32(steps))
    first = int(state.step)
    for step in range(first, first + steps):
      state = self._one(state, self._put(self._draw(step)))
    return state

  def summary(self, state: TrainState) -> tuple[dict[str, float], TrainState]:
    """The averages since the last summary, and the state that starts anew."""
    window = jax.device_get(state.window)
    metrics = _means([window])
    metrics["skipped"] = int(state.skipped)
    zeros = parallel.put(self._window, self.shardings.window, copy=True)
    return metrics, state._replace(window=zeros)

  def evaluate(
    self, state: TrainState, split: str, task=None
  ) -> dict[str, float]:
    """Averages of the metrics over `split`, without dropout.

    Args:
      state: of the run.
      split: of the task.
      task: another than the one trained on: of its kind and vocabulary, of
        another length, say.

    Raises:
      ValueError: where the split holds no batch.
    """
    task = self.task if task is None else task
    memory = self._begin(state.params, state.buffers)
    sums = []
    for batch in task.eval_batches(self.config.batch_size, split):
      memory, metrics = self._score(
        state.params, state.buffers, memory, self._put(batch)
      )
      sums.append(metrics)
      if len(sums) % 16 == 0:  # bounds the batches in flight
        jax.block_until_ready(metrics)
    if not sums:
      raise ValueError(f"task {task!r}: split {split!r} is empty")
    return _means(jax.device_get(sums))

  def update(self, model: nnx.Module, state: TrainState) -> None:
    """Writes the trained variables of `state` into `model`."""
    copies = jax.tree.map(jnp.copy, (state.params, state.buffers))
    for variables in copies:
      nnx.update(model, variables)

  def _by_row(self, fn: Callable, memory):
    """Maps `fn(leaf, its row axis or None)` over a memory."""
    leaves, treedef = jax.tree.flatten(memory)
    return treedef.unflatten(map(fn, leaves, self._row_axes))

  def _merge(self, params, buffers) -> nnx.Module:
    return nnx.merge(self._graph, params, buffers)

  def _fresh(self, params, buffers) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    memory = ()
    if self.task.streams:
      model = self._merge(params, buffers)
      memory = model.initial_state(self.config.batch_size)
    return TrainState(
      zero, params, buffers, self._optimizer.init(params), memory, zero, {}
    )

  def _draw(self, step):
    config = self.config
    return self.task.batch(
      config.seed, step, config.batch_size, config.train_split
    )

  def _batch_form(self):
    """Whether batches can be drawn on the device, and their shapes."""
    try:
      step = jax.ShapeDtypeStruct((), jnp.int32)
      return True, jax.eval_shape(self._draw, step)
    except TypeError:  # the task reads files, uses NumPy, or varies its shape
      return False, jax.eval_shape(lambda batch: batch, self._draw(0))

  def _put(self, batch):
    return parallel.put(batch, parallel.batch_sharding(self.mesh))

  def _objective(self, params, buffers, memory, batch, key):
    model = self._merge(params, buffers)
    if not self.task.streams:
      rows = jax.tree.leaves(batch.inputs)[0].shape[0]
      memory = model.initial_state(rows)
    loss, (memory, metrics) = self.loss_fn(model, batch, memory, key)
    metrics = {"weight": jnp.ones((), jnp.float32), **metrics}
    return loss, (memory if self.task.streams else (), metrics)

  def _gradients(self, state: TrainState, batch, key):
    """(loss, gradient, memory, metrics) of a batch, cut where config says."""
    gradient = jax.value_and_grad(self._objective, has_aux=True)
    parts = self.config.accumulate
    if parts == 1:
      (loss, (memory, metrics)), grads = gradient(
        state.params, state.buffers, state.memory, batch, key
      )
      return loss, grads, memory, metrics

    # Row r goes to part r % parts, so that no row leaves its device.
    def cut(x, axis):
      if axis is None:
        return jnp.broadcast_to(x, (parts, *x.shape))
      rows = (x.shape[axis] // parts, parts)
      x = x.reshape(*x.shape[:axis], *rows, *x.shape[axis + 1 :])
      return jnp.moveaxis(x, axis + 1, 0)

    def join(x, axis):
      if axis is None:
        return x[-1]
      x = jnp.moveaxis(x, 0, axis + 1)
      rows = x.shape[axis] * parts
      return x.reshape(*x.shape[:axis], rows, *x.shape[axis + 2 :])

    def one(part):
      index, batch, memory = part
      (loss, (memory, metrics)), grads = gradient(
        state.params,
        state.buffers,
        memory,
        batch,
        jax.random.fold_in(key, index),
      )
      weight = metrics.pop("weight")
      sums = jax.tree.map(
        lambda x: (weight * x).astype(x.dtype), (loss, grads, metrics)
      )
      return (*sums, weight), memory

    def body(sums, part):
      new, memory = one(part)
      return jax.tree.map(jnp.add, sums, new), memory

    pieces = (
      jnp.arange(parts),
      jax.lax.with_sharding_constraint(
        jax.tree.map(lambda x: cut(x, 0), batch),
        parallel.batch_sharding(self.mesh, 1),
      ),
      self._by_row(cut, state.memory),
    )
    shapes, _ = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (*sums, weight), memory = jax.lax.scan(body, zeros, pieces)
    total = jnp.where(weight > 0, weight, 1.0)
    loss, grads, metrics = jax.tree.map(
      lambda x: (x / total).astype(x.dtype), tuple(sums)
    )
    memory = self._by_row(join, memory)
    return loss, grads, memory, {**metrics, "weight": weight}

  def _step(self, state: TrainState, batch) -> TrainState:
    """One step; a non-finite one leaves all but the counters as they were."""
    key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
    loss, grads, memory, metrics = self._gradients(state, batch, key)
    norm = optax.tree.norm(grads)
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
      updates, opt_state = self._optimizer.update(
        grads, state.opt_state, state.params
      )
      params = optax.apply_updates(state.params, updates)
    buffers = state.buffers
    if self._refreshes:
      model = self._merge(params, buffers)
      model.refresh(
        state.memory, batch.inputs, reset=batch.reset, mask=batch.mask
      )
      buffers = checkpoint.variables(model)["buffers"]
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    for leaf in jax.tree.leaves((memory, buffers)):
      if jnp.issubdtype(leaf.dtype, jnp.inexact):
        good &= ~jnp.any(jnp.isnan(leaf))  # a running maximum may be -inf
    params, buffers, opt_state, memory = jax.tree.map(
      lambda new, old: jnp.where(good, new, old),
      (params, buffers, opt_state, memory),
      (state.params, state.buffers, state.opt_state, state.memory),
    )
    weight = metrics.pop("weight")
    metrics["grad_norm"] = norm
    added = {name: weight * value for name, value in metrics.items()}
    added["weight"] = weight
    window = {
      name: total + jnp.where(good, added[name], 0.0)
      for name, total in state.window.items()
    }
    return TrainState(
      step=state.step + 1,
      params=params,
      buffers=buffers,
      opt_state=opt_state,
      memory=memory,
      skipped=state.skipped + (~good).astype(jnp.int32),
      window=window,
    )

  def _steps(self, state: TrainState, steps) -> TrainState:
    def body(_, state):
      batch = jax.lax.with_sharding_constraint(
        self._draw(state.step), parallel.batch_sharding(self.mesh)
      )
      return self._step(state, batch)

    return jax.lax.fori_loop(0, steps, body, state)

  def _scores(self, params, buffers, memory, batch):
    _, (memory, metrics) = self._objective(params, buffers, memory, batch, None)
    weight = metrics.pop("weight")
    sums = {name: weight * value for name, value in metrics.items()}
    return memory, {**sums, "weight": weight}


def _means(sums: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Weighted sums to averages; NaN where nothing had weight."""
  total = sum(float(s["weight"]) for s in sums)
  return {
    name: (sum(float(s[name]) for s in sums) / total if total else math.nan)
    for name in sorted(sums[0])
    if name != "weight"
  }


def _row_axes(model: nnx.Module) -> list[int | None]:
  """Which axis of each leaf of the model's memory counts rows, if any does."""
  two, three = (
    jax.tree.leaves(jax.eval_shape(lambda n=n: model.initial_state(n)))
    for n in (2, 3)
  )
  differ = lambda a, b: [i for i, n in enumerate(a.shape) if n != b.shape[i]]
  return [next(iter(differ(a, b)), None) for a, b in zip(two, three)]


# What a run writes


class Writer(Protocol):
  """Where metrics go. `start` comes first, with the step that a run goes on
  from: whatever was written for later steps is to be dropped."""

  def start(self, step: int) -> None: ...

  def write(
    self, step: int, split: str, metrics: Mapping[str, float]
  ) -> None: ...

  def close(self) -> None: ...


class JsonlWriter:
  """`metrics.jsonl`: one line per step and split; NaN is null."""

  def __init__(self, path):
    self.path = epath.Path(path)

  def start(self, step: int) -> None:
    if not self.path.exists():
      return
    kept = []
    for line in self.path.read_text().splitlines():
      try:
        if json.loads(line)["step"] <= step and step > 0:
          kept.append(line + "\n")
      except (ValueError, KeyError, TypeError):
        continue  # cut off by a kill
    new = self.path.parent / (self.path.name + ".new")
    new.write_text("".join(kept))
    new.replace(self.path)

  def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
    plain = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    line = json.dumps({"step": step, "split": split, **plain})
    with self.path.open("a") as file:
      file.write(line + "\n")

  def close(self) -> None:
    pass


class TensorBoardWriter:
  """TensorBoard events, by `tensorboardX` (the `tensorboard` extra).

  Raises:
    ImportError: where `tensorboardX` is not installed.
  """

  def __init__(self, path):
    import tensorboardX  # an extra

    self._open = functools.partial(tensorboardX.SummaryWriter, str(path))
    self._writer = None

  def start(self, step: int) -> None:
    self._writer = self._open(purge_step=step + 1)

  def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
      self._writer.add_scalar(f"{split}/{name}", value, step)

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()


# The loop


CHUNK_SECONDS = 1.0  # how long `stop` may have to wait
PROFILED_STEPS = 10


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
  """The two halves of a checkpoint: the model's variables, and the rest."""
  rest = state._asdict()
  return {name: rest.pop(name) for name in ("params", "buffers")}, rest


def _state(model, rest) -> TrainState:
  return TrainState(**model, **rest)


class _Pace:
  """How many steps fill a chunk, by the steps so far; the first compiles."""

  def __init__(self):
    self.steps = 1
    self.rate = 0.0  # steps a second
    self._calls = self._done = 0
    self._spent = 0.0

  @property
  def compiled(self) -> bool:
    return self._calls > 0

  @contextlib.contextmanager
  def measure(self, size: int):
    began = time.perf_counter()
    yield
    took = time.perf_counter() - began
    if self.compiled:
      self._done += size
      self._spent += took
      self.rate = self._done / self._spent
      self.steps = max(1, min(2 * size, int(CHUNK_SECONDS * size / took)))
    self._calls += 1


def _next_stop(config: Config, step: int) -> int:
  """The first step after `step` at which something is to be done."""
  every = (config.log_every, config.eval_every, config.checkpoint_every)
  return min(config.steps, *((step // n + 1) * n for n in every if n))


def _better(new, old, metric: str) -> bool:
  """Whether evaluation `new` beats `old`, which may be None."""
  if not math.isfinite(new[metric]):
    return False
  sign = 1 if metric == "accuracy" else -1
  return old is None or sign * new[metric] > sign * old[metric]


def fit(
  config: Config,
  model: nnx.Module,
  task,
  *,
  workdir=None,
  about: Mapping[str, Any] | None = None,
  loss_fn: Callable | None = None,
  mesh: jax.sharding.Mesh | None = None,
  rules: parallel.Rules = parallel.RULES,
  writers: Iterable[Writer] = (),
  final: Sequence[str] | Mapping[str, tuple[Any, str]] = (),
  stop: Callable[[], bool] = lambda: False,
  profile: bool = False,
) -> dict[str, Any]:
  """Trains `model` on `task`, from the last checkpoint of `workdir` on.

  Args:
    config: the run.
    model: trained in place: it holds the last step's variables on return.
    task: of `memzoo.tasks`.
    workdir: for checkpoints, `metrics.jsonl` and the trace. None keeps
      nothing and starts from the model as it is.
    about: plain data that names the model and the task. It is saved beside
      each checkpoint, and a checkpoint of another is refused.
    loss_fn: as for `Trainer`.
    mesh: as for `Trainer`.
    rules: as for `Trainer`.
    writers: get the metrics too; of process 0 alone.
    final: splits to evaluate once, after the last step; or
      {name: (task, split)} for other tasks too.
    stop: asked about every second; True saves and returns.
    profile: writes a trace of a few steps to `workdir`/profile.

  Returns:
    Plain data: 'step' reached, 'steps' asked for, 'stopped', 'resumed_from',
    'parameters', 'skipped', 'train' and 'eval' (the last metrics), 'best'
    (those of the best evaluation, with its 'step'), 'final' ({name: metrics}),
    'seconds' (of training and evaluation, starts and compilation included),
    'steps_per_second' and 'tokens_per_second' (of training alone, once
    compiled).

  Raises:
    CheckpointError: where the workdir's checkpoint is not of this run.
    WorkdirError: where the workdir cannot be written.
    ValueError: on what cannot be trained.
  """
  began = time.perf_counter()
  if profile and workdir is None:
    raise ValueError("profile: a workdir is needed to write the trace to")
  if not isinstance(final, Mapping):
    final = {split: (task, split) for split in final}
  checkpoints = None
  writers = list(writers) if jax.process_index() == 0 else []
  if workdir is not None:
    identity = {**config.identity(), **(about or {})}
    checkpoints = checkpoint.Checkpoints(workdir, config.keep, identity)
    if jax.process_index() == 0:
      writers.append(JsonlWriter(epath.Path(workdir) / "metrics.jsonl"))
  try:
    trainer = Trainer(
      config, model, task, loss_fn=loss_fn, mesh=mesh, rules=rules
    )
    if config.best not in trainer.metrics:
      raise ValueError(
        f"config: best is {config.best!r}, and evaluations have "
        + ", ".join(trainer.metrics)
      )
    for other, split in ((task, config.eval_split), *final.values()):
      # What cannot be evaluated fails now, not at the end.
      next(iter(other.eval_batches(config.batch_size, split)), None)
    restored = None
    if checkpoints:
      restored = checkpoints.restore(*_items(trainer.abstract()))
    meta = restored[2] if restored else {}
    state = _state(*restored[:2]) if restored else trainer.init()
    record = {name: meta.get(name) for name in ("train", "eval", "best")} | {
      "seconds": meta.get("seconds", 0.0),
      "rate": meta.get("rate", 0.0),
      "final": meta.get("final", {}),
    }
    before = record["seconds"]
    first = step = int(state.step)
    saved = first if restored else None
    for writer in writers:
      writer.start(step)

    def write(split, metrics, record=record):
      record[split] = metrics
      for writer in writers:
        writer.write(step, split, metrics)

    due = lambda every: step == config.steps or (every and step % every == 0)
    pace = _Pace()
    rate = schedule(config)
    stopped = False
    while step < config.steps:
      tracing = profile and pace.compiled
      size = min(
        _next_stop(config, step) - step,
        PROFILED_STEPS if tracing else pace.steps,
      )
      size, stopped = parallel.agree(size, stop())
      if stopped:
        break
      with pace.measure(size):
        if tracing:
          with jax.profiler.trace(str(epath.Path(workdir) / "profile")):
            state = jax.block_until_ready(trainer.run(state, size))
          profile = False
        else:
          state = jax.block_until_ready(trainer.run(state, size))
      step += size
      record["rate"] = pace.rate or record["rate"]
      record["seconds"] = before + time.perf_counter() - began
      if due(config.log_every):
        metrics, state = trainer.summary(state)
        metrics["learning_rate"] = float(rate(step - 1 - metrics["skipped"]))
        metrics["steps_per_second"] = record["rate"]
        metrics["seconds"] = record["seconds"]
        write("train", metrics)
      improved = False
      if due(config.eval_every):
        write("eval", trainer.evaluate(state, config.eval_split))
        improved = _better(record["eval"], record["best"], config.best)
        if improved:
          record["best"] = {"step": step, **record["eval"]}
        for name, (other, split) in final.items():
          if step == config.steps:
            metrics = trainer.evaluate(state, split, other)
            write(name, metrics, record["final"])
        record["seconds"] = before + time.perf_counter() - began
      if checkpoints and (improved or due(config.checkpoint_every)):
        checkpoints.save(step, *_items(state), record)
        saved = step
    if checkpoints and stopped and saved != step:
      checkpoints.save(step, *_items(state), record)
    for name, (other, split) in final.items():
      if not stopped and name not in record["final"]:  # asked for since then
        record["final"][name] = trainer.evaluate(state, split, other)
    trainer.update(model, state)
  finally:
    if checkpoints:
      checkpoints.close()
    for writer in writers:
      writer.close()
  return {
    "step": step,
    "steps": config.steps,
    "stopped": stopped,
    "resumed_from": first,
    "parameters": trainer.parameters,
    "skipped": int(state.skipped),
    "train": record["train"],
    "eval": record["eval"],
    "best": record["best"],
    "final": record["final"],
    "seconds": record["seconds"],
    "steps_per_second": record["rate"],
    "tokens_per_second": record["rate"] * trainer.tokens_per_step,
  }
