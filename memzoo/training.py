"""The trainer: state, step, evaluation, checkpoints, and `fit`, the loop.

A run is a function of its config. Batches depend on (seed, step) alone, the
dropout key folds the step in, and what else is carried (optimiser, memory of a
streaming task, running averages) is in the checkpoint: a run that is killed at
any moment and started again ends with the same numbers.

Nothing here reads flags, prints, or installs signal handlers; `experiments/`
does.
"""

import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from memzoo import parallel

FORMAT = 1  # of the checkpoints


class CheckpointError(ValueError):
  """A checkpoint that is damaged, foreign, or of another config."""


class WorkdirError(OSError):
  """A workdir that cannot be made or written."""


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
  best: str = "loss"
  train_split: str = "train"
  eval_split: str = "valid"
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
    saves may change between two starts.
    """
    plain = dataclasses.asdict(self)
    for name in ("eval_every", "checkpoint_every", "log_every", "keep"):
      del plain[name]
    return plain


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


def _averages(batch, losses, correct=None):
  """Means of `losses` under the batch's weights and mask, and their sum."""
  weights = jnp.ones(losses.shape, jnp.float32)
  for given in (batch.weights, batch.mask):
    if given is not None and given.ndim <= losses.ndim:
      given = given.reshape(given.shape + (1,) * (losses.ndim - given.ndim))
      weights = weights * given.astype(jnp.float32)
  total = jnp.sum(weights)
  mean = lambda x: (
    jnp.sum(jnp.where(weights > 0, x * weights, 0.0))
    / jnp.where(total > 0, total, 1.0)
  )
  metrics = {"loss": mean(losses), "weight": total}
  if correct is not None:
    metrics["accuracy"] = mean(correct.astype(jnp.float32))
  return metrics


def _run(model, batch, state, key, report_weights):
  given = dict(reset=batch.reset, mask=batch.mask, key=key)
  if report_weights:
    return model(state, batch.inputs, reports=True, **given)
  return *model(state, batch.inputs, **given), {}


def _weighed(metrics, reports, report_weights):
  """Adds the reports by name: (loss, metrics)."""
  loss = metrics["loss"]
  for name, weight in report_weights.items():
    if name not in reports:
      raise ValueError(
        f"report_weights: the model has no report {name!r}; it has "
        f"{', '.join(sorted(reports)) or 'none'}"
      )
    value = jnp.mean(reports[name].astype(jnp.float32))
    metrics[f"report/{name}"] = value
    if weight:
      loss = loss + weight * value
  return loss, metrics


def _cross_entropy(logits, labels, counted):
  labels = jnp.where(counted, labels, 0)  # padding may hold any label
  logits = logits.astype(jnp.float32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses, jnp.argmax(logits, -1) == labels


def token_loss(model, batch, state, key, *, report_weights=None):
  """Cross-entropy per token, weighted and masked.

  Args:
    model: outputs logits [B, T, V].
    batch: targets int [B, T]; weights [B, T] and mask bool [B, T], or None.
    state: the model's memory before the batch.
    key: for dropout; None is deterministic.
    report_weights: {name: weight}, the model's reports to add to the loss.

  Returns:
    (loss, (state, metrics)): float32 scalars 'loss' (without the reports),
    'accuracy', 'weight' (the sum of the weights, under which metrics are
    averaged over batches) and one per report.

  Raises:
    ValueError: on a name in `report_weights` that the model does not report.
  """
  report_weights = report_weights or {}
  state, logits, reports = _run(model, batch, state, key, report_weights)
  counted = jnp.ones(batch.targets.shape, bool)
  for given in (batch.weights, batch.mask):
    counted = counted if given is None else counted & (given > 0)
  metrics = _averages(
    batch, *_cross_entropy(logits, batch.targets, counted)
  )
  loss, metrics = _weighed(metrics, reports, report_weights)
  return loss, (state, metrics)


def classification_loss(model, batch, state, key, *, report_weights=None):
  """Cross-entropy per row; as `token_loss`, for logits [B, C].

  Targets int [B]; weights [B] or None. The mask [B, T] is the model's alone.
  """
  report_weights = report_weights or {}
  state, logits, reports = _run(model, batch, state, key, report_weights)
  batch = batch._replace(mask=None)
  counted = True if batch.weights is None else batch.weights > 0
  metrics = _averages(
    batch, *_cross_entropy(logits, batch.targets, counted)
  )
  loss, metrics = _weighed(metrics, reports, report_weights)
  return loss, (state, metrics)


def regression_loss(model, batch, state, key, *, report_weights=None):
  """Mean squared error; as `token_loss`, for outputs of the targets' shape.

  Targets [B, ...] or [B, T, ...]; the weights have leading axes of theirs, and
  the mask counts where the targets have a time axis of its length.
  """
  report_weights = report_weights or {}
  state, outputs, reports = _run(model, batch, state, key, report_weights)
  targets = batch.targets.astype(jnp.float32)
  if outputs.shape != targets.shape:
    raise ValueError(
      f"regression: the model's outputs {outputs.shape} and the targets "
      f"{targets.shape} differ in shape"
    )
  if batch.mask is not None and targets.shape[:2] != batch.mask.shape:
    batch = batch._replace(mask=None)
  metrics = _averages(
    batch, jnp.square(outputs.astype(jnp.float32) - targets)
  )
  loss, metrics = _weighed(metrics, reports, report_weights)
  return loss, (state, metrics)


LOSSES = {
  "tokens": token_loss,
  "classification": classification_loss,
  "regression": regression_loss,
}


def loss_for(task, report_weights: Mapping[str, float] | None = None):
  """The `loss_fn` of a task's kind, its reports weighed.

  Raises:
    ValueError: on a kind that is not in `LOSSES`.
  """
  if task.kind not in LOSSES:
    raise ValueError(
      f"task {task!r}: unknown kind {task.kind!r}; known: "
      f"{', '.join(sorted(LOSSES))}"
    )
  weights = dict(report_weights or {})
  return functools.partial(LOSSES[task.kind], report_weights=weights)


# The optimiser


#: Path names that weight decay leaves alone, whatever their shape: offsets,
#: scales, decays and time steps, and states before the first input.
UNDECAYED = re.compile(
  r"(^|[/_])(bias|scale|norm|gain|log|decay|dt|init|initial|gate_bias)([/_]|$)"
)


def decayed(params, stacked: int = 0):
  """Which leaves weight decay shrinks: a tree of bools.

  Matrices, that is: leaves of two dimensions or more (`stacked` more, where
  the layers of a stack are in one leaf), unless `UNDECAYED` finds a word in
  their path name.
  """
  return parallel.map_named(
    lambda name, leaf: (
      leaf.ndim >= 2 + stacked and not UNDECAYED.search(name)
    ),
    params,
  )


def schedule(config: Config) -> optax.Schedule:
  """Linear warm-up to `learning_rate`, then a cosine to zero at `steps`."""

  def rate(count):
    count = jnp.asarray(count, jnp.float32)
    warm = (count + 1) / max(config.warmup, 1)
    done = (count - config.warmup) / max(config.steps - config.warmup, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
    return config.learning_rate * jnp.where(
      count < config.warmup, warm, cosine
    )

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
    self.loss_fn = loss_fn or loss_for(task, config.report_weights)
    if config.batch_size // config.accumulate % self.mesh.size:
      raise ValueError(
        f"batch_size {config.batch_size} in {config.accumulate} micro-batch"
        f"(es) cannot be split evenly over the {self.mesh.size} devices of the "
        f"mesh {dict(self.mesh.shape)}"
      )
    self._graph, params, buffers = nnx.split(model, nnx.Param, ...)
    self._params = nnx.to_pure_dict(params)
    self._buffers = nnx.to_pure_dict(buffers)
    self._refreshes = bool(getattr(model, "has_buffers", False))
    self._optimizer = optimizer(config, decayed)
    self._row_axes = _row_axes(model) if task.streams else []
    self._on_device, batch = self._batch_form()
    self.tokens_per_step = math.prod(
      jax.tree.leaves(batch.inputs)[0].shape[:2]
    )
    fresh = jax.eval_shape(self._fresh, self._params, self._buffers)
    _, _, _, metrics = jax.eval_shape(
      self._gradients, fresh, batch, jax.random.key(0)
    )
    self._window = {
      name: np.zeros((), np.float32) for name in sorted([*metrics, "grad_norm"])
    }
    fresh = fresh._replace(window=self._window)
    self.shardings = parallel.shardings(fresh, self.mesh, rules)._replace(
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
    self._begin = jax.jit(
      lambda params, buffers: self._fresh(params, buffers).memory
    )

  @property
  def parameters(self) -> int:
    """How many numbers the optimiser trains."""
    return sum(x.size for x in jax.tree.leaves(self._params))

  def init(self) -> TrainState:
    """The state before step 0, on the mesh. The model's arrays are copied."""
    state = jax.jit(self._fresh)(self._params, self._buffers)
    state = state._replace(window=self._window)
    return parallel.put(state, self.shardings, copy=True)

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

  def evaluate(self, state: TrainState, split: str) -> dict[str, float]:
    """Averages of the metrics over `split`, without dropout.

    Raises:
      ValueError: where the split holds no batch.
    """
    memory = self._begin(state.params, state.buffers)
    sums = []
    for batch in self.task.eval_batches(self.config.batch_size, split):
      memory, metrics = self._score(
        state.params, state.buffers, memory, self._put(batch)
      )
      sums.append(metrics)
      if len(sums) % 16 == 0:  # bounds the batches in flight
        jax.block_until_ready(metrics)
    if not sums:
      raise ValueError(f"task {self.task!r}: split {split!r} is empty")
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
      return True, jax.eval_shape(
        self._draw, jax.ShapeDtypeStruct((), jnp.int32)
      )
    except jax.errors.JAXTypeError:  # the task reads files, or uses NumPy
      return False, jax.eval_shape(lambda: jax.tree.map(
        jnp.asarray, self._draw(0)
      ))

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
      return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

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
    norm = optax.global_norm(grads)
    updates, opt_state = self._optimizer.update(
      grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    buffers = state.buffers
    if self._refreshes:
      model = self._merge(params, buffers)
      model.refresh(state.memory, batch.inputs, reset=batch.reset, mask=batch.mask)
      buffers = nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])
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
    name: (
      sum(float(s[name]) for s in sums) / total if total else math.nan
    )
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


# Checkpoints


class Checkpoints:
  """The checkpoints of one workdir: the latest few, and the best.

  Written in the background and committed by a rename: a run that is killed
  while one is written finds the one before. Each is a folder
  `checkpoints/<step>/` of three items: `model` and `trainer`, flat
  {path name: array}, and `meta`, the config and what was measured.

  Args:
    workdir: a local folder, or a bucket that `epath` knows.
    keep: how many of the latest are kept.
    config: plain data that a checkpoint must agree with to be restored.

  Raises:
    WorkdirError: where the workdir cannot be made or written.
  """

  def __init__(self, workdir, keep: int, config: Mapping[str, Any]):
    self.path = open_workdir(workdir) / "checkpoints"
    self.config = json.loads(json.dumps(config))
    self._policy = _Preserve(keep)
    self._manager = _manager(
      self.path, preservation_policy=self._policy, cleanup_tmp_directories=True
    )

  def latest(self) -> int | None:
    """The last committed step; None where there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
    """Saves `state` in the background; returns when its arrays may change."""
    model, trainer = _items(state)
    step = int(state.step)
    best = meta.get("best")
    self._policy.best = best["step"] if best else None
    about = {
      "format": FORMAT,
      "config": self.config,
      "arrays": {
        name: [list(x.shape), str(x.dtype)]
        for name, x in {**model, **trainer}.items()
      },
      **meta,
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardSave(model),
        trainer=ocp.args.StandardSave(trainer),
        meta=ocp.args.JsonSave(about),
      ),
    )

  def restore(self, trainer: Trainer) -> tuple[TrainState, dict] | None:
    """The latest state, placed as `trainer` places it, and its meta.

    Any number of devices may have written it. None where there is none.

    Raises:
      CheckpointError: where it is of another config, of other arrays, damaged
        or no checkpoint of this trainer. The files are left as they are.
    """
    step = self.latest()
    if step is None:
      return None
    meta = _read_meta(self._manager, self.path / str(step))
    differ = _differences(meta["config"], self.config)
    if differ:
      raise CheckpointError(
        f"checkpoint {self.path / str(step)} is of another config: "
        + "; ".join(
          f"{key} is {was} there and {now} here" for key, was, now in differ
        )
        + ". Choose another workdir, or run with the checkpoint's config"
      )
    shapes = jax.eval_shape(
      lambda: trainer._fresh(trainer._params, trainer._buffers)
    )._replace(window=trainer._window)
    model, rest = _items(shapes, trainer.shardings)
    found = _read_arrays(
      self._manager, self.path / str(step), meta, model=model, trainer=rest
    )
    self._policy.best = meta["best"]["step"] if meta["best"] else None
    return _state(shapes, {**found["model"], **found["trainer"]}), meta

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.close()


class _Preserve:
  """Keeps the latest few checkpoints and the best."""

  def __init__(self, keep: int):
    self.keep = keep
    self.best: int | None = None

  def should_preserve(self, checkpoints, *, context=None) -> list[bool]:
    first = len(checkpoints) - self.keep
    return [
      i >= first or c.step == self.best for i, c in enumerate(checkpoints)
    ]


def load(workdir, model: nnx.Module, which: str = "best") -> dict[str, Any]:
  """Puts the variables of a checkpoint into `model`.

  Args:
    workdir: of a run.
    model: as the run built it; its variables are replaced.
    which: 'best' or 'latest'. 'best' is 'latest' in a run that never
      evaluated.

  Returns:
    The checkpoint's meta: its config, 'step', metrics.

  Raises:
    CheckpointError: where there is no checkpoint, or it does not fit.
    ValueError: on another `which`.
  """
  if which not in ("best", "latest"):
    raise ValueError(f"which: 'best' or 'latest', got {which!r}")
  path = epath.Path(workdir) / "checkpoints"
  if not path.is_dir():
    raise CheckpointError(f"no checkpoints in {workdir}")
  with _manager(path, read_only=True) as manager:
    step = manager.latest_step()
    if step is None:
      raise CheckpointError(f"no checkpoints in {workdir}")
    meta = _read_meta(manager, path / str(step))
    if which == "best" and meta["best"] and meta["best"]["step"] != step:
      step = meta["best"]["step"]
      meta = _read_meta(manager, path / str(step))
    _, params, buffers = nnx.split(model, nnx.Param, ...)
    own = {
      "params": nnx.to_pure_dict(params), "buffers": nnx.to_pure_dict(buffers),
    }  # fmt: skip
    wanted = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      for name, x in _encoded(own).items()
    }
    found = _read_arrays(manager, path / str(step), meta, model=wanted)
  values = _state(own, found["model"])
  for variables in values.values():
    nnx.update(model, variables)
  return meta


def open_workdir(workdir) -> epath.Path:
  """Makes `workdir` and tries to write there.

  Raises:
    WorkdirError: where that fails.
  """
  path = epath.Path(workdir)
  probe = path / f".writable-{jax.process_index()}"
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise WorkdirError(
      f"workdir {str(workdir)!r} cannot be written: "
      f"{error.strerror or type(error).__name__}"
    ) from error
  return path


def _manager(path, **options) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    path,
    item_names=("model", "trainer", "meta"),
    options=ocp.CheckpointManagerOptions(**options),
  )


def _encoded(tree, placed=None) -> dict[str, Any]:
  """Leaves by path name as arrays that Orbax takes: keys as their bits, none
  of size 0. With `placed`, shapes that say where they are to live."""
  named = parallel.named_leaves(tree)
  where = parallel.named_leaves(placed) if placed is not None else {}
  flat = {}
  for name, leaf in named.items():
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = (
        jax.eval_shape(jax.random.key_data, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct)
        else jax.random.key_data(leaf)
      )
    if leaf.size == 0:
      continue
    if name in where:
      leaf = jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=where[name]
      )
    flat[name] = leaf
  return flat


def _items(state: TrainState, placed: TrainState | None = None):
  """The two items of a checkpoint: ({name: leaf}, {name: leaf})."""
  flat = _encoded(state, placed)
  owned = {n: x for n, x in flat.items() if n.startswith(("params/", "buffers/"))}
  return owned, {n: x for n, x in flat.items() if n not in owned}


def _state(like, found: Mapping[str, Any]):
  """`_encoded` back into a tree like `like`."""

  def leaf(name, x):
    if name not in found:
      return jnp.zeros(x.shape, x.dtype)  # of size 0
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(found[name], impl=jax.random.key_impl(x))
    return found[name]

  return parallel.map_named(leaf, like)


def _damaged(path, error) -> CheckpointError:
  reason = str(error).strip().splitlines() or [""]
  return CheckpointError(
    f"checkpoint {path} cannot be read ({type(error).__name__}: "
    f"{reason[0][:200]}). Nothing was changed; move the folder away to go on "
    "from the checkpoint before it"
  )


def _read_meta(manager, path) -> dict[str, Any]:
  if not (path / "meta").is_dir():
    raise CheckpointError(
      f"{path} is no checkpoint of this trainer: it has no 'meta'. Nothing was "
      "changed; choose another workdir"
    )
  try:
    meta = manager.restore(
      int(path.name), args=ocp.args.Composite(meta=ocp.args.JsonRestore())
    )["meta"]
    known = meta["format"]
    missing = {"config", "arrays", "best"} - set(meta)
  except Exception as error:  # whatever the storage raises
    raise _damaged(path, error) from error
  if known != FORMAT or missing:
    raise CheckpointError(
      f"checkpoint {path} has format {known!r}, and this trainer reads {FORMAT}"
    )
  return meta


def _read_arrays(manager, path, meta, **items):
  wanted = {name: x for item in items.values() for name, x in item.items()}
  kept = {n: x for n, x in meta["arrays"].items() if n in wanted}
  if len(items) > 1 or any(n.startswith("params/") for n in meta["arrays"]):
    own = ("params/", "buffers/")
    kept = {
      n: x
      for n, x in meta["arrays"].items()
      if len(items) > 1 or n.startswith(own)
    }
  here = {n: [list(x.shape), str(x.dtype)] for n, x in wanted.items()}
  differ = _differences(kept, here)
  if differ:
    raise CheckpointError(
      f"checkpoint {path} holds other arrays than the model: "
      + "; ".join(f"{n} is {a} there and {b} here" for n, a, b in differ[:5])
    )
  try:
    return manager.restore(
      int(path.name),
      args=ocp.args.Composite(
        **{n: ocp.args.StandardRestore(x) for n, x in items.items()}
      ),
    )
  except Exception as error:  # whatever the storage raises
    raise _damaged(path, error) from error


def _differences(there, here) -> list[tuple[str, str, str]]:
  """(dotted key, value there, value here) of what differs in plain data."""

  def flat(tree, prefix=""):
    if not isinstance(tree, Mapping) or not tree:
      return {prefix[:-1]: tree}
    return {
      k: v
      for name, value in tree.items()
      for k, v in flat(value, f"{prefix}{name}.").items()
    }

  there, here = flat(there), flat(here)
  absent = object()
  show = lambda x: "absent" if x is absent else repr(x)
  return [
    (key, show(there.get(key, absent)), show(here.get(key, absent)))
    for key in sorted({*there, *here})
    if there.get(key, absent) != here.get(key, absent)
  ]


# What a run writes


class Writer(Protocol):
  """Where metrics go. `start` comes first, with the step that a run goes on
  from: whatever was written for later steps is to be dropped."""

  def start(self, step: int) -> None: ...

  def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
    ...

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
    stop: asked about every second; True saves and returns.
    profile: writes a trace of a few steps to `workdir`/profile.

  Returns:
    Plain data: 'step' reached, 'steps' asked for, 'stopped', 'resumed_from',
    'parameters', 'skipped', 'train' and 'eval' (the last metrics), 'best'
    (those of the best evaluation, with its 'step'), 'seconds' (of training
    and evaluation, starts and compilation included), 'steps_per_second' and
    'tokens_per_second' (of training alone, once compiled).

  Raises:
    CheckpointError: where the workdir's checkpoint is not of this run.
    WorkdirError: where the workdir cannot be written.
    ValueError: on what cannot be trained.
  """
  began = time.perf_counter()
  if profile and workdir is None:
    raise ValueError("profile: a workdir is needed to write the trace to")
  checkpoints = None
  writers = list(writers) if jax.process_index() == 0 else []
  if workdir is not None:
    identity = {**config.identity(), **(about or {})}
    checkpoints = Checkpoints(workdir, config.keep, identity)
    if jax.process_index() == 0:
      writers.append(JsonlWriter(epath.Path(workdir) / "metrics.jsonl"))
  try:
    trainer = Trainer(
      config, model, task, loss_fn=loss_fn, mesh=mesh, rules=rules
    )
    restored = checkpoints.restore(trainer) if checkpoints else None
    state, meta = restored or (trainer.init(), {})
    record = {
      name: meta.get(name) for name in ("train", "eval", "best")
    } | {"seconds": meta.get("seconds", 0.0), "rate": meta.get("rate", 0.0)}
    before = record["seconds"]
    first = step = saved = int(state.step)
    for writer in writers:
      writer.start(step)

    def write(split, metrics):
      record[split] = metrics
      for writer in writers:
        writer.write(step, split, metrics)

    due = lambda every: step == config.steps or (every and step % every == 0)
    pace = _Pace()
    rate = schedule(config)
    stopped = False
    while step < config.steps:
      until = min(
        config.steps,
        *(
          (step // every + 1) * every
          for every in (
            config.log_every, config.eval_every, config.checkpoint_every,
          )  # fmt: skip
          if every
        ),
      )
      tracing = profile and pace.compiled
      size = min(until - step, PROFILED_STEPS if tracing else pace.steps)
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
        record["seconds"] = before + time.perf_counter() - began
      if checkpoints and (improved or due(config.checkpoint_every)):
        checkpoints.save(state, record)
        saved = step
    if checkpoints and stopped and saved != step or stopped and not step:
      checkpoints.save(state, record)
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
    "seconds": record["seconds"],
    "steps_per_second": record["rate"],
    "tokens_per_second": record["rate"] * trainer.tokens_per_step,
  }
