"""How writing one item changes what is read of another."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core.cell import Cell
from memzoo.diagnostics import rollout


class Interference(NamedTuple):
  """Rows: the item that is read, i. Columns: the item that is written, j."""

  change: jax.Array  # [I, I]: how far writing j moved the read-out of i
  relative: jax.Array  # [I, I]: the same over the read-out of i once written
  retroactive: jax.Array  # []: mean of `relative` over j > i
  proactive: jax.Array  # []: mean of `relative` over j < i
  lost: jax.Array  # [I]: relative distance of the last from the first read-out


def interference(
  cell: Cell, params, items, queries=None, *, state=None
) -> Interference:
  """`interference_of` a cell: writes by `step`, reads by a step not kept.

  A query is an input too, and what it writes is in its own read-out. Give
  queries that write nothing, where the cell has them; a cell that overwrites
  what is under a key hides its interference from the item as query.

  Args:
    cell: the memory.
    params: as `cell.init` made them, or trained.
    items: [I, D], presented in this order.
    queries: [I, D], the inputs that ask for them; None for the items.
    state: what is there before; None for the cell's first state.

  Raises:
    ValueError: where the cell has no state, on inputs of wrong shape, and
      unless every item has a query.
  """
  who = "interference"
  queries = items if queries is None else queries
  state = rollout.start(cell, params, state)
  rollout.check_state(who, cell, state)
  count = rollout.check_inputs(who, cell, items, 1)
  asked = rollout.check_inputs(who, cell, queries, 1)
  if count != asked:
    raise ValueError(
      f"{who}({rollout.label(cell)}): every item needs its query, got "
      f"{count[0]} items and {asked[0]} queries"
    )
  return _cell(cell, params, state, items, queries)


@functools.partial(jax.jit, static_argnums=0)
def _cell(cell, params, state, items, queries):
  return interference_of(
    lambda state, x: cell.step(params, state, x)[0],
    lambda state, x: cell.step(params, state, x)[1],
    state,
    items,
    queries,
  )


def interference_of(
  write: Callable[[Any, Any], Any],
  read: Callable[[Any, Any], Any],
  state,
  items,
  queries,
) -> Interference:
  """How much writing item j changes the read-out of item i.

    r_i(j)         = read(S_j, q_i)        S_j: after the items 0 … j
    change[i, j]   = ‖r_i(j) − r_i(j − 1)‖
    relative[i, j] = change[i, j] / ‖r_i(i)‖
    lost[i]        = ‖r_i(I − 1) − r_i(i)‖ / ‖r_i(i)‖

  The diagonal is what an item's own writing did. 0 / 0 is 0.

  Args:
    write: (state, item) -> state.
    read: (state, query) -> arrays.
    state: what is there before.
    items: what is written, leaves [I, ...], in this order.
    queries: what asks for each, leaves [I, ...].
  """

  def vector(y):
    parts = [y.astype(jnp.float32).reshape(-1) for y in jax.tree.leaves(y)]
    return jnp.concatenate(parts)

  read_all = jax.vmap(lambda s, q: vector(read(s, q)), in_axes=(None, 0))

  def body(carry, item):
    state, before = carry
    state = write(state, item)
    now = read_all(state, queries)
    return (state, now), (now, _norm(now - before))

  carry = state, read_all(state, queries)
  (_, last), (reads, change) = jax.lax.scan(body, carry, items)
  change = change.T
  count = len(change)
  own = reads[jnp.arange(count), jnp.arange(count)]  # [I, Y]: r_i(i)
  scale = _norm(own)
  over = lambda x, scale: jnp.where(
    scale > 0, x / jnp.where(scale > 0, scale, 1), 0
  )
  relative = over(change, scale[:, None])
  later = jnp.triu(jnp.ones((count, count), bool), 1)
  pairs = max(count * (count - 1) // 2, 1)
  mean = lambda where: jnp.sum(jnp.where(where, relative, 0)) / pairs
  lost = over(_norm(last - own), scale)
  return Interference(change, relative, mean(later), mean(later.T), lost)


def _norm(x):
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))
