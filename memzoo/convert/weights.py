"""What the converters share: checks of weights, params and configurations."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

Weights = Mapping[str, np.ndarray]


def take(who: str, weights: Weights, shapes, optional=()) -> dict:
  """The weights named in `shapes`, as numpy arrays.

  Args:
    who: of messages.
    weights: a module's, by name.
    shapes: {name: shape}; what the module must have.
    optional: names beside them that may stand there; they are left out.

  Raises:
    ValueError: on weights that are missing, unknown, of another shape, or no
      floating numbers; all that is wrong in one message.
  """
  found = {name: np.asarray(x) for name, x in weights.items()}
  wrong = [f"{name} is missing" for name in shapes if name not in found]
  known = (*shapes, *optional)
  wrong += [f"{name} is unknown" for name in found if name not in known]
  for name, shape in shapes.items():
    x = found.get(name)
    if x is None:
      continue
    if x.shape != tuple(shape):
      wrong.append(f"{name} must be {list(shape)}, got {list(x.shape)}")
    elif not jnp.issubdtype(x.dtype, jnp.floating):
      wrong.append(f"{name} must be floating, got {x.dtype}")
  if wrong:
    raise ValueError(f"{who}: " + "; ".join(wrong))
  return {name: found[name] for name in shapes}


def check_cell(who: str, cell, cls, **options) -> None:
  """`ValueError` unless the cell is a `cls` with these options."""
  if type(cell) is not cls:
    raise ValueError(
      f"{who}: the cell must be {cls.__name__}, got {type(cell).__name__}"
    )
  for name, want in options.items():
    if getattr(cell, name) != want:
      raise ValueError(
        f"{who}: the module has no {name}={getattr(cell, name)!r}; the cell "
        f"needs {name}={want!r}"
      )


def check_config(who: str, config: Mapping, **options) -> None:
  """`ValueError` where a configuration asks for what the cell has not."""
  for name, want in options.items():
    if name in config and config[name] != want:
      raise ValueError(
        f"{who}: {name}={config[name]!r} has no equal in the cell, which is "
        f"as with {name}={want!r}"
      )


def read(who: str, config: Mapping, *names: str):
  """Entries of a configuration, or one `ValueError` that lists the missing."""
  missing = [name for name in names if name not in config]
  if missing:
    raise ValueError(f"{who}: the configuration has no {', '.join(missing)}")
  return tuple(config[name] for name in names)


def params_of(who: str, cell, params) -> dict:
  """A cell's params as numpy arrays, checked against what `init` makes."""
  want = jax.eval_shape(cell.init, jax.random.key(0))
  if not isinstance(params, Mapping):
    raise ValueError(f"{who}: params must be a dict, got {type(params)}")
  return take(
    f"{who}: params", params, {name: x.shape for name, x in want.items()}
  )


def as_params(**arrays) -> dict:
  """Arrays as a cell holds them."""
  return {name: jnp.asarray(x) for name, x in arrays.items()}


def as_weights(arrays: Mapping) -> dict:
  """Arrays as a file of weights holds them: contiguous."""
  return {name: np.ascontiguousarray(x) for name, x in arrays.items()}


def whole(x: float):
  """x as an int where it is one."""
  return int(x) if x == int(x) else x


def to_taps(kernel):
  """A depthwise Conv1d's kernel [N, 1, W] -> taps [W, N], newest last."""
  return kernel[:, 0].T


def from_taps(taps):
  """Taps [W, N] -> a depthwise Conv1d's kernel [N, 1, W]."""
  return taps.T[:, None]
