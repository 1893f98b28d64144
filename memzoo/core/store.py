"""Associative memories over items: the contract of a store.

A store has no time: `write` puts a key and a value in, `read` asks. Hopfield
and Hebbian networks, sparse codes and tables are stores first; a cell wraps
one for sequences. The capacity laboratory runs on stores.
"""

from typing import Any, Protocol

import jax

from memzoo.core.axes import State


class Store(Protocol):
  """An associative memory over items: a frozen dataclass, as a cell is."""

  def empty(self) -> State:
    """The state that holds nothing."""
    ...

  def write(self, state: State, key: jax.Array, value: jax.Array) -> State:
    """One item: key [K], value [V]."""
    ...

  def read(self, state: State, query: jax.Array) -> jax.Array:
    """What is stored under query [K]: [V]."""
    ...

  def energy(self, state: State, pattern: jax.Array) -> Any:
    """The energy of pattern [K], a scalar, where the paper has one."""
    raise NotImplementedError(f"{type(self).__name__} has no energy")


def write_all(store: Store, state: State, keys, values) -> State:
  """Writes items one after another: keys [M, K], values [M, V]."""

  def body(state, item):
    return store.write(state, *item), None

  return jax.lax.scan(body, state, (keys, values))[0]
