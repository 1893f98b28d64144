"""Checkpoints: a run's arrays and its config, the latest few and the best.

Orbax writes them in the background and commits each by a rename, so that a run
that is killed while one is written finds the one before. A checkpoint is a
folder `checkpoints/<step>/` of three items: `model` and `trainer`, each a flat
{path name: array}, and `meta`: the config, what was measured, and the shapes.
Nothing in it knows how many devices wrote it.
"""

from collections.abc import Mapping
import json
from typing import Any

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from memzoo import parallel

FORMAT = 1


class CheckpointError(ValueError):
  """A checkpoint that is damaged, foreign, or of another config."""


class WorkdirError(OSError):
  """A workdir that cannot be made or written."""


class Checkpoints:
  """The checkpoints of one run.

  Args:
    workdir: a local folder, or a bucket that `epath` knows.
    keep: how many of the latest are kept, beside the best.
    config: plain data that a checkpoint must agree with to be restored.

  Raises:
    WorkdirError: where the workdir cannot be made or written.
  """

  def __init__(self, workdir, keep: int, config: Mapping[str, Any]):
    self.path = open_workdir(open_workdir(workdir) / "checkpoints")
    self.config = json.loads(json.dumps(config))
    self._policy = _Preserve(keep)
    self._manager = _manager(
      self.path, preservation_policy=self._policy, cleanup_tmp_directories=True
    )

  def latest(self) -> int | None:
    """The last committed step; None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, model, trainer, meta: Mapping[str, Any]) -> None:
    """Saves in the background; returns when the arrays may be donated.

    Args:
      step: not saved before.
      model: tree of the model's variables.
      trainer: tree of all else that the next step needs.
      meta: plain data; 'best' holds the 'step' of the best checkpoint, or is
        None.
    """
    items = {"model": _encode(model), "trainer": _encode(trainer)}
    self._policy.keep_best(meta)
    about = {
      **meta,
      "format": FORMAT,
      "config": self.config,
      "arrays": {name: _shapes(item) for name, item in items.items()},
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(
        meta=ocp.args.JsonSave(about),
        **{name: ocp.args.StandardSave(item) for name, item in items.items()},
      ),
    )

  def restore(self, model, trainer):
    """The latest checkpoint: (model, trainer, meta), or None.

    Args:
      model: a tree of `jax.ShapeDtypeStruct`s that say where arrays shall
        live, whatever wrote them.
      trainer: likewise.

    Raises:
      CheckpointError: where it is of another config, holds other arrays, is
        damaged, or was written by something else. The files stay as they are.
    """
    step = self.latest()
    if step is None:
      return None
    path = self.path / str(step)
    meta = _read_meta(self._manager, path)
    _refuse(
      meta["config"],
      self.config,
      f"checkpoint {path} is of another config",
      "choose another workdir, or run with the checkpoint's config",
    )
    found = _read(self._manager, path, meta, model=model, trainer=trainer)
    self._policy.keep_best(meta)
    return found["model"], found["trainer"], meta

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.close()


def load(workdir, model: nnx.Module, which: str = "best") -> dict[str, Any]:
  """Puts the variables of a checkpoint into `model`.

  Args:
    workdir: of a run.
    model: as the run built it; its variables are replaced.
    which: 'best' or 'latest'. In a run that never evaluated, the latest is the
      best.

  Returns:
    The checkpoint's meta: 'config', the metrics of 'train', 'eval' and 'best'.

  Raises:
    CheckpointError: where there is no checkpoint, or it does not fit `model`.
    ValueError: on another `which`.
  """
  if which not in ("best", "latest"):
    raise ValueError(f"which: 'best' or 'latest', got {which!r}")
  path = absolute(workdir) / "checkpoints"
  if not path.is_dir():
    raise CheckpointError(f"there are no checkpoints in {str(workdir)!r}")
  with _manager(path, read_only=True) as manager:
    step = manager.latest_step()
    if step is None:
      raise CheckpointError(f"there are no checkpoints in {str(workdir)!r}")
    meta = _read_meta(manager, path / str(step))
    if which == "best" and meta["best"] and meta["best"]["step"] != step:
      step = meta["best"]["step"]
      meta = _read_meta(manager, path / str(step))
    own = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      variables(model),
    )
    found = _read(manager, path / str(step), meta, model=own)
  for values in found["model"].values():
    nnx.update(model, values)
  return meta


def variables(model: nnx.Module) -> dict[str, Any]:
  """{'params': the trained, 'buffers': the other} variables, as plain dicts."""
  _, params, buffers = nnx.split(model, nnx.Param, ...)
  return {
    "params": nnx.to_pure_dict(params),
    "buffers": nnx.to_pure_dict(buffers),
  }


def absolute(workdir) -> epath.Path:
  """`workdir` from the root: Orbax takes no relative paths. A bucket's path
  (gs://…) stays as it is."""
  path = epath.Path(workdir)
  return path if "://" in str(path) else path.expanduser().absolute()


def open_workdir(workdir) -> epath.Path:
  """Makes `workdir` and tries to write there.

  Raises:
    WorkdirError: where that fails.
  """
  path = absolute(workdir)
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


class _Preserve:
  """The checkpoints that Orbax keeps: the latest few and the best."""

  def __init__(self, keep: int):
    self._keep = keep
    self._best: int | None = None

  def keep_best(self, meta: Mapping[str, Any]) -> None:
    self._best = meta["best"]["step"] if meta.get("best") else None

  def should_preserve(self, checkpoints, *, context=None) -> list[bool]:
    del context
    first = len(checkpoints) - self._keep
    return [
      i >= first or c.step == self._best for i, c in enumerate(checkpoints)
    ]


def _manager(path, **options) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    path,
    item_names=("model", "trainer", "meta"),
    options=ocp.CheckpointManagerOptions(**options),
  )


# Arrays. Orbax takes no typed keys and no arrays of size 0.


def _is_key(leaf) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf):
  if not isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.random.key_data(leaf)
  data = jax.eval_shape(jax.random.key_data, leaf)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _encode(tree) -> dict[str, Any]:
  leaves = {
    name: _key_data(leaf) if _is_key(leaf) else leaf
    for name, leaf in parallel.named_leaves(tree).items()
  }
  return {name: leaf for name, leaf in leaves.items() if leaf.size}


def _decode(like, found: Mapping[str, Any]):
  def leaf(name, x):
    if name not in found:
      return jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
    if _is_key(x):
      kind = []
      jax.eval_shape(lambda key: kind.append(jax.random.key_impl(key)), x)
      return jax.random.wrap_key_data(found[name], impl=kind[0])
    return found[name]

  return parallel.map_named(leaf, like)


def _shapes(flat: Mapping[str, Any]) -> dict[str, str]:
  return {n: f"{x.dtype}{list(x.shape)}" for n, x in flat.items()}


# Reading


def _read_meta(manager, path) -> dict[str, Any]:
  if not (path / "meta").is_dir():
    raise CheckpointError(
      f"{path} was not written by this trainer: it has no 'meta'. Nothing was "
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
      f"checkpoint {path} is of format {known!r}; this trainer reads {FORMAT}"
    )
  return meta


def _read(manager, path, meta, **items) -> dict[str, Any]:
  """The named items, as their trees of `jax.ShapeDtypeStruct` ask for them."""
  flat = {name: _encode(like) for name, like in items.items()}
  for name, wanted in flat.items():
    _refuse(
      meta["arrays"].get(name, {}),
      _shapes(wanted),
      f"checkpoint {path} holds other arrays for the {name}",
      "the code or its options have changed since",
    )
  try:
    found = manager.restore(
      int(path.name),
      args=ocp.args.Composite(
        **{n: ocp.args.StandardRestore(x) for n, x in flat.items()}
      ),
    )
  except Exception as error:  # whatever the storage raises
    raise _damaged(path, error) from error
  return {n: _decode(like, found[n]) for n, like in items.items()}


def _first_line(error) -> str:
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _damaged(path, error) -> CheckpointError:
  return CheckpointError(
    f"checkpoint {path} cannot be read ({_first_line(error)}). Nothing was "
    "changed; move that folder away to go on from the checkpoint before it"
  )


def _refuse(there, here, what: str, advice: str) -> None:
  """Raises where two nested plain dicts differ, with the keys that do."""

  def flat(tree, prefix=""):
    if not isinstance(tree, Mapping) or not tree:
      return {prefix[:-1]: repr(tree)}
    return {
      key: value
      for name, branch in tree.items()
      for key, value in flat(branch, f"{prefix}{name}.").items()
    }

  there, here = flat(there), flat(here)
  differ = [
    f"{key or 'all'} is {there.get(key, 'absent')} there and "
    f"{here.get(key, 'absent')} here"
    for key in sorted({*there, *here})
    if there.get(key) != here.get(key)
  ]
  if differ:
    rest = f" and {len(differ) - 8} more" if len(differ) > 8 else ""
    raise CheckpointError(f"{what}: {'; '.join(differ[:8])}{rest}; {advice}")
