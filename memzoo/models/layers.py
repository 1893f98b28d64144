"""`MemoryLayer`, the one adapter of a cell to Flax NNX.

A module of this package holds parameters and static values, nothing else:
memory is passed in and returned, and randomness is a key argument. It is a
plain pytree, so `jax.jit`, `jax.grad`, `jax.vmap` and `optax` take it as they
take a dict.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.core import cell as cell_lib


class Buffer(nnx.Variable):
  """A variable that no optimiser trains: a leaf of a `buffers` branch."""


def is_buffer(path) -> bool:
  """Whether a key path of a cell's params goes through a `buffers` branch."""
  return any(getattr(key, "key", None) == "buffers" for key in path)


def variables(params):
  """Params as a module holds them: every leaf an `nnx.Param`, or a `Buffer`."""
  return nnx.data(
    jax.tree_util.tree_map_with_path(
      lambda path, x: (Buffer if is_buffer(path) else nnx.Param)(x), params
    )
  )


def initial_state(
  cell: cell_lib.Cell, params, batch: int, key: jax.Array | None = None
):
  """The cell's first state with a leading axis B; drawn by row with a key."""
  if key is not None:
    return jax.vmap(lambda key: cell.initial_state(params, key))(
      jax.random.split(key, batch)
    )
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x, (batch, *jnp.shape(x))),
    cell.initial_state(params),
  )


def scan_rows(cell, params, state, xs, *, reset, mask, **options):
  """`memzoo.scan` of each row of xs [B, T, ...], with the same params."""
  shape = jnp.shape(jax.tree.leaves(xs)[0])[:2]
  check_flags(f"MemoryLayer({name_of(cell)})", shape, reset, mask)
  if state is None:
    state = initial_state(cell, params, shape[0])

  def row(state, xs, reset, mask):
    return cell_lib.scan(
      cell, params, state, xs, reset=reset, mask=mask, **options
    )

  return jax.vmap(row)(state, xs, reset, mask)


class MemoryLayer(nnx.Module):
  """A cell with its parameters, over a batch.

  Args:
    cell: the memory, any of the contract.
    rngs: its `params` stream draws the parameters.

  Attributes:
    cell: the memory, static.
    params: the tree that `cell.init` made; every leaf an `nnx.Param`, or a
      `Buffer` where it is untrained.
  """

  def __init__(self, cell: cell_lib.Cell, *, rngs: nnx.Rngs):
    self.cell = cell
    self.params = variables(cell.init(rngs.params()))

  @property
  def values(self):
    """The parameters as the cell takes them: plain arrays."""
    return jax.tree.map(
      lambda variable: variable[...],
      self.params,
      is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )

  def initial_state(self, batch: int, key: jax.Array | None = None):
    """The memory of `batch` rows before their first input.

    Args:
      batch: B.
      key: for stochastic memories alone; each row draws its own.

    Returns:
      The cell's state with a leading axis B.
    """
    return initial_state(self.cell, self.values, batch, key)

  def __call__(
    self, state, xs, *, reset=None, mask=None, implementation=None,
    reports=False,
  ):  # fmt: skip
    """`memzoo.scan` of each row.

    Args:
      state: as `initial_state` makes it, or None for that.
      xs: [B, T, D], or what `cell.x_spec` says with leading B and T.
      reset: bool [B, T] or None.
      mask: bool [B, T] or None.
      implementation: a form of the cell, or None for the first that serves.
      reports: also return what the cell reports.

    Returns:
      (state, ys [B, T, D]), or (state, ys, {name: [B, T, ...]}).

    Raises:
      ValueError: as `memzoo.scan` does, and on flags that are no bool [B, T].
    """
    return scan_rows(
      self.cell, self.values, state, xs, reset=reset, mask=mask,
      implementation=implementation, reports=reports,
    )  # fmt: skip

  def refresh(self, xs) -> None:
    """Sets the buffers to what the cell makes of the inputs xs [B, T, D]."""
    params = self.cell.refresh(self.values, xs)

    def put(path, variable, value):
      if is_buffer(path):
        variable[...] = value

    jax.tree_util.tree_map_with_path(
      put,
      self.params,
      params,
      is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def name_of(cell) -> str:
  """The cell's registry name, or its class's."""
  return getattr(cell, "name", "") or type(cell).__name__


def check_cell(who: str, cell) -> None:
  """`ValueError` unless the cell takes and gives float [D]."""
  want = jax.ShapeDtypeStruct((cell.d_model,), jnp.float32)
  for what in ("x_spec", "y_spec"):
    if getattr(cell, what) != want:
      raise ValueError(
        f"{who}: {name_of(cell)} has {what} {getattr(cell, what)}; a block "
        f"needs float32 [d_model] = [{cell.d_model}]: use MemoryLayer"
      )


def check_flags(who: str, shape, reset, mask) -> None:
  """`ValueError` unless reset and mask are None or bool of `shape` [B, T]."""
  for what, flags in (("reset", reset), ("mask", mask)):
    if flags is not None and (
      jnp.shape(flags) != tuple(shape) or jnp.result_type(flags) != jnp.bool_
    ):
      raise ValueError(
        f"{who}: {what} must be bool {list(shape)}, got "
        f"{jnp.result_type(flags)} {list(jnp.shape(flags))}"
      )
