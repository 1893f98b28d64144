"""Runs of a cell that keep every state, and states as vectors."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core.cell import Cell, state_size


class Trajectory(NamedTuple):
  """What a cell held and gave, of B sequences."""

  states: Any  # leaves [B, T + 1, ...]; the first is before the first input
  ys: Any  # leaves [B, T, ...]


def draw(cell: Cell, key: jax.Array, *shape: int):
  """Inputs of `cell.x_spec` with leading axes `shape`.

  Floats are standard normal; integers are uniform in 0..4, which every cell
  of the zoo with integer inputs takes.
  """

  def leaf(spec, key):
    size = (*shape, *spec.shape)
    if jnp.issubdtype(spec.dtype, jnp.floating):
      return jax.random.normal(key, size, spec.dtype)
    if spec.dtype == jnp.bool_:
      return jax.random.bernoulli(key, 0.5, size)
    return jax.random.randint(key, size, 0, 5, spec.dtype)

  specs, tree = jax.tree.flatten(cell.x_spec)
  keys = jax.random.split(key, len(specs))
  return tree.unflatten([leaf(s, k) for s, k in zip(specs, keys)])


def trajectory(cell: Cell, params, xs, state=None) -> Trajectory:
  """Every state and output of `cell.step` over B sequences.

  Args:
    cell: the memory.
    params: as `cell.init` made them, or trained.
    xs: [B, T, D], or what `cell.x_spec` says with leading B and T.
    state: the one state that all sequences start from; None for
      `cell.initial_state(params)`.

  Raises:
    ValueError: on inputs of wrong shape, or more than the cell can take.
  """
  check_inputs("trajectory", cell, xs, 2)
  return _trajectory(cell, params, start(cell, params, state), xs)


@functools.partial(jax.jit, static_argnums=0)
def _trajectory(cell, params, state, xs):
  def body(state, x):
    state, y = cell.step(params, state, x)
    return state, (state, y)

  def row(xs):
    _, (states, ys) = jax.lax.scan(body, state, xs)
    first = jax.tree.map(lambda s: s[None], state)
    join = lambda a, b: jnp.concatenate([a, b])
    return Trajectory(jax.tree.map(join, first, states), ys)

  return jax.vmap(row)(xs)


def start(cell: Cell, params, state):
  """`state`, or the cell's first one where it is None."""
  return cell.initial_state(params) if state is None else state


def check_inputs(who: str, cell: Cell, xs, axes: int) -> tuple[int, ...]:
  """The sizes of the leading `axes` (B, T or T alone) of xs.

  Raises:
    ValueError: where xs is not of `cell.x_spec`, or longer than the cell can
      take.
  """
  who = f"{who}({label(cell)})"
  specs, tree = jax.tree.flatten(cell.x_spec)
  leaves, given = jax.tree.flatten(xs)
  if tree != given:
    raise ValueError(f"{who}: the inputs are {given}, expected {tree}")
  names = ["B", "T"][-axes:]
  lead = jnp.shape(leaves[0])[:axes]
  for x, spec in zip(leaves, specs):
    shape = jnp.shape(x)
    if len(shape) != axes + len(spec.shape) or shape != (*lead, *spec.shape):
      raise ValueError(
        f"{who}: the inputs must be [{', '.join(map(str, names))}, "
        f"{', '.join(map(str, spec.shape))}], got {shape}"
      )
  if 0 in lead:
    raise ValueError(f"{who}: there are no inputs in {lead}")
  check_length(who, cell, lead[-1])
  return tuple(lead)


def check_length(who: str, cell: Cell, length: int) -> None:
  """`ValueError` where a fresh state cannot take `length` inputs."""
  limit = cell.max_length
  if limit is not None and length > limit:
    raise ValueError(f"{who}: got {length} inputs, holds at most {limit}")


def check_state(who: str, cell: Cell, state) -> None:
  """`ValueError` where the state holds no number."""
  if not any(_numeric(x) and x.size for x in jax.tree.leaves(state)):
    raise ValueError(
      f"{who}({label(cell)}): the cell has no state; only its horizon can be "
      "measured"
    )


def label(cell: Cell) -> str:
  """The cell's name, or its class's."""
  return cell.name or type(cell).__name__


def named_leaves(states) -> dict[str, jax.Array]:
  """{path: leaf} of the leaves that hold numbers; random keys are no memory.

  −inf, the log of a sum over nothing, is 0 here: nothing is held.
  """
  found = jax.tree_util.tree_leaves_with_path(states)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {
    name(path) or "state": jnp.where(jnp.isneginf(x), jnp.zeros_like(x), x)
    if jnp.issubdtype(x.dtype, jnp.floating)
    else x
    for path, x in found
    if _numeric(x) and x.size
  }


def features(state) -> jax.Array:
  """float32 [F]: every number of one state, complex ones as two."""
  return _vector(named_leaves(state).values())


def size(cell: Cell, state) -> int:
  """Floats held (`memzoo.state_size`); of a state without any, its numbers."""
  return state_size(cell) or sum(x.size for x in named_leaves(state).values())


def split(state):
  """The floats of a state as one vector: (float32 [N], how to put them back).

  Complex numbers count twice. What is no float stays as it is in `state`.
  """
  leaves, tree = jax.tree.flatten(state)
  moving = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
  floats = [x for x, moves in zip(leaves, moving) if moves]
  vector = _vector(floats) if floats else jnp.zeros((0,), jnp.float32)

  def join(vector):
    place, out = 0, []
    for x, moves in zip(leaves, moving):
      if not moves:
        out.append(x)
        continue
      count = 2 if jnp.iscomplexobj(x) else 1
      part = vector[place : place + count * x.size]
      place += count * x.size
      part = part.reshape(count, *x.shape)
      part = jax.lax.complex(*part) if count == 2 else part[0]
      out.append(part.astype(x.dtype))
    return tree.unflatten(out)

  return vector, join


def _vector(leaves) -> jax.Array:
  """The numbers of all leaves, complex ones as two: float32 [N]."""
  parts = []
  for x in leaves:
    parts += [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
  return jnp.concatenate([x.astype(jnp.float32).reshape(-1) for x in parts])


def check_count(who: str, what: str, value, least: int = 1) -> None:
  """`ValueError` unless `value` is an integer of at least `least`."""
  whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  if not whole or value < least:
    raise ValueError(
      f"{who}: {what} must be an integer, {least} or more, got {value!r}"
    )


def _numeric(x) -> bool:
  return not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
