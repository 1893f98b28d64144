"""How far back an output reaches."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core.cell import Cell
from memzoo.diagnostics import rollout


class Horizon(NamedTuple):
  """The effect of the input n steps back on the last output."""

  lag: np.ndarray  # int [T]: n
  effect: np.ndarray  # [T], unnormalised
  curve: np.ndarray  # [T], effect over that of the strongest earlier input
  horizon: int  # the curve is below the threshold from this lag on


def horizon_by_gradient(
  cell: Cell, params, xs, *, state=None, threshold: float = math.exp(-1)
) -> Horizon:
  """The norm of the Jacobian of the last output by each input.

    effect(n) = sqrt(mean_B ‖∂y_T / ∂x_{T−n}‖²_F)
    curve(n)  = effect(n) / max_{m >= 1} effect(m)

  Lag 0, the input itself, is no memory: the curve may be above 1 there. For a
  cell without a state it is 1 there and 0 at every other lag.

  Args:
    cell: the memory, differentiable.
    params: as `cell.init` made them, or trained.
    xs: [B, T, D]: B draws of the inputs; lags reach to T − 1.
    state: what every draw starts from; None for the cell's first state.
    threshold: of `Horizon.horizon`. The horizon is T where the curve is above
      it at the last lag: at least T.

  Raises:
    ValueError: on inputs of wrong shape, and where the cell or its inputs
      have no gradient.
  """
  who = f"horizon_by_gradient({rollout.label(cell)})"
  rollout.check_inputs("horizon_by_gradient", cell, xs, 2)
  specs = jax.tree.leaves(cell.x_spec)
  if not cell.differentiable or not all(
    jnp.issubdtype(spec.dtype, jnp.floating) for spec in specs
  ):
    raise ValueError(
      f"{who}: the cell or its inputs have no gradient; use "
      "horizon_by_perturbation"
    )
  state = rollout.start(cell, params, state)
  return _horizon(_jacobians(cell, params, state, xs), threshold)


def horizon_by_perturbation(
  cell: Cell, params, xs, *, state=None, threshold: float = math.exp(-1)
) -> Horizon:
  """How much the last output changes when one earlier input is another one.

    effect(n) = sqrt(mean_B ‖y_T' − y_T‖² / mean_B ‖y_T‖²)
    curve(n)  = effect(n) / max_{m >= 1} effect(m)

  y_T' is y_T with x_{T−n} replaced by the input at the same place of the next
  draw, so that what is put in is as likely as what is taken out. What has no
  way to the output changes no bit of it: the effect is then exactly 0.

  Args:
    cell: the memory.
    params: as `cell.init` made them, or trained.
    xs: [B, T, D]: B draws of the inputs, two or more; lags reach to T − 1.
      It takes T + 1 runs of each.
    state: what every draw starts from; None for the cell's first state.
    threshold: as in `horizon_by_gradient`.

  Raises:
    ValueError: on inputs of wrong shape, or a single draw.
  """
  who = f"horizon_by_perturbation({rollout.label(cell)})"
  batch, _ = rollout.check_inputs("horizon_by_perturbation", cell, xs, 2)
  if batch < 2:
    raise ValueError(
      f"{who}: needs 2 draws or more, to replace an input by that of another "
      f"draw; got {batch}"
    )
  state = rollout.start(cell, params, state)
  return _horizon(_changes(cell, params, state, xs), threshold)


def _horizon(effect, threshold) -> Horizon:
  effect = np.asarray(effect, np.float64)
  scale = effect[1:].max(initial=0) or effect[0] or 1.0
  curve = effect / scale
  held = np.flatnonzero(curve >= threshold)
  horizon = int(held[-1]) + 1 if effect.any() and held.size else 0
  return Horizon(np.arange(len(effect)), effect, curve, horizon)


@functools.partial(jax.jit, static_argnums=0)
def _jacobians(cell, params, state, xs):
  """[T], by lag: the root mean square norms."""

  def row(x):
    rows = jax.jacrev(lambda x: _last(cell, params, state, x))(x)
    return sum(_square(j, 1) for j in jax.tree.leaves(rows))

  return jnp.sqrt(jnp.mean(jax.lax.map(row, xs), axis=0))[::-1]


@functools.partial(jax.jit, static_argnums=0)
def _changes(cell, params, state, xs):
  others = jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), xs)
  length = jax.tree.leaves(xs)[0].shape[1]
  # Draw by draw at the same place of one computation, so that equal runs
  # round alike; at t = T nothing is replaced.
  run = jax.vmap(lambda x: _last(cell, params, state, x))

  def at(t):
    put = lambda x, other: x.at[:, t].set(other[:, t], mode="drop")
    return run(jax.tree.map(put, xs, others))

  ys = jax.lax.map(at, jnp.arange(length + 1))  # [T + 1, B, Y]
  change = _square(ys[:-1] - ys[-1], 0)
  scale = jnp.sum(jnp.square(ys[-1]))
  return jnp.sqrt(change / jnp.where(scale > 0, scale, 1))[::-1]


def _last(cell, params, state, x):
  """The last output of one sequence, as a vector."""

  def body(carry, x):
    state, _ = carry
    return cell.step(params, state, x), None

  rest = jax.tree.map(lambda x: x[1:], x)
  first = jax.tree.map(lambda x: x[0], x)
  (_, y), _ = jax.lax.scan(body, cell.step(params, state, first), rest)
  leaves = [y.astype(jnp.float32).reshape(-1) for y in jax.tree.leaves(y)]
  return jnp.concatenate(leaves)


def _square(x, axis):
  """The sum of squares over all axes but one."""
  rest = tuple(n for n in range(x.ndim) if n != axis)
  return jnp.sum(jnp.square(x), axis=rest)
