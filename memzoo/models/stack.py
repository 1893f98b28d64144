"""Many blocks: a pattern of cells, repeated, compiled once per pattern."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.core import dispatch
from memzoo.core.cell import Cell
from memzoo.models import layers
from memzoo.models.block import Block, BlockOptions

Cells = Cell | Sequence[Cell]
Implementation = str | Mapping[str, str] | None


def pattern(cells: Cells, depth: int | None = None) -> tuple[Cell, ...]:
  """The shortest list of cells that, repeated, is the stack's.

  >>> pattern([gru, window, gru, window])
  (gru, window)

  Args:
    cells: one cell, or a list of them, bottom first.
    depth: number of blocks, a multiple of the list's length; None for its
      length.

  Raises:
    ValueError: on an empty list, a depth that is no multiple of its length, or
      cells of different `d_model`.
  """
  cells = tuple(cells) if isinstance(cells, (list, tuple)) else (cells,)
  if not cells:
    raise ValueError("Stack: got no cell; it needs one or more")
  depth = len(cells) if depth is None else depth
  if type(depth) is not int or depth < 1 or depth % len(cells):
    raise ValueError(
      f"Stack: depth must be a positive multiple of the {len(cells)} cell(s) "
      f"given, got {depth!r}"
    )
  for cell in cells:
    layers.check_cell("Stack", cell)
  if len({cell.d_model for cell in cells}) > 1:
    raise ValueError(
      "Stack: all cells must have one d_model, got "
      + ", ".join(f"{layers.name_of(c)}: {c.d_model}" for c in cells)
    )
  for period in range(1, len(cells) + 1):
    if len(cells) % period == 0 and cells == cells[:period] * (
      len(cells) // period
    ):
      return cells[:period]


class Stack(nnx.Module):
  """Blocks on blocks, scanned over the repeats of their pattern.

  Block i is the (i mod P)-th of the pattern in its (i div P)-th repeat. All
  repeats lie in one array per parameter, with a leading axis R, so that
  compile time grows with the pattern and not with the depth.

  Args:
    cells: one cell, or a list (a hybrid), bottom first.
    depth: number of blocks; None for the length of the list.
    options: of every block; None for the defaults.
    unroll: repeats that are compiled together, as in `jax.lax.scan`.
    rngs: its `params` stream draws the parameters.

  Attributes:
    cells: the pattern.
    repeats: R.
    blocks: one `Block` per cell of the pattern, leaves with a leading axis R.
  """

  def __init__(
    self,
    cells: Cells,
    depth: int | None = None,
    options: BlockOptions | None = None,
    *,
    unroll: int = 1,
    rngs: nnx.Rngs,
  ):
    self.cells = pattern(cells, depth)
    given = tuple(cells) if isinstance(cells, (list, tuple)) else (cells,)
    depth = len(given) if depth is None else depth
    self.options = options = options or BlockOptions()
    widths = options.mlp_width
    if isinstance(widths, tuple):
      if len(widths) != len(given):
        raise ValueError(
          f"Stack: mlp_width has {len(widths)} widths for a list of "
          f"{len(given)} cell(s): {widths}"
        )
      self.cells = given
    else:
      widths = (widths,) * len(self.cells)
    self.repeats = depth // len(self.cells)
    if type(unroll) is not int or unroll < 1:
      raise ValueError(
        f"Stack: unroll must be a positive integer, got {unroll!r}"
      )
    self.unroll = unroll

    def block(key, cell, width):
      own = dataclasses.replace(options, mlp_width=width)
      return self._block(cell, own, nnx.Rngs(params=key))

    self.blocks = nnx.List(
      jax.vmap(functools.partial(block, cell=cell, width=width))(
        jax.random.split(rngs.params(), self.repeats)
      )
      for cell, width in zip(self.cells, widths)
    )

  def _block(self, cell, options, rngs):
    """What a layer is made of: other stacks have other blocks."""
    return Block(cell, options, rngs=rngs)

  @property
  def depth(self) -> int:
    """Number of blocks."""
    return self.repeats * len(self.cells)

  @property
  def max_length(self) -> int | None:
    """The most inputs that a fresh state can take; None for no limit."""
    limits = [cell.max_length for cell in self.cells]
    return min((n for n in limits if n is not None), default=None)

  def initial_state(self, batch: int, key: jax.Array | None = None):
    """The memory of `batch` rows before their first input.

    Returns:
      One `BlockState` per cell of the pattern, leaves [R, B, ...].
    """
    keys = [None] * len(self.cells)
    if key is not None:
      keys = jax.random.split(key, (len(self.cells), self.repeats))
    return tuple(
      jax.vmap(lambda block, key: block.initial_state(batch, key))(block, key)
      for block, key in zip(self.blocks, keys)
    )

  def __call__(
    self,
    state,
    x,
    *,
    reset=None,
    mask=None,
    key=None,
    implementation: Implementation = None,
    reports: bool = False,
  ):
    """All blocks over x [B, T, D].

    Args:
      state: as `initial_state` makes it, or None for that.
      x: [B, T, D].
      reset: bool [B, T] or None.
      mask: bool [B, T] or None.
      key: for dropout; None is deterministic.
      implementation: a form for all cells, or {cell name: form}, or None.
      reports: also return what the cells report.

    Returns:
      (state, x [B, T, D]), or (state, x, reports): {'layers/i/name': []},
      means over the inputs that are there, and {'name': []}, their mean over
      the layers that report it.

    Raises:
      ValueError: on an `implementation` for a cell that is not in the stack.
    """
    forms = self._forms(implementation)
    if state is None:
      state = self.initial_state(x.shape[0])

    def body(x, repeat):
      blocks, states, key = repeat
      new, found = [], []
      for i, (block, old, form) in enumerate(zip(blocks, states, forms)):
        one = None if key is None else jax.random.fold_in(key, i)
        updated, x, *report = block(
          old, x, reset=reset, mask=mask, key=one, implementation=form,
          reports=reports,
        )  # fmt: skip
        new.append(updated)
        found.append(
          {n: _mean(r, mask) for n, r in report[0].items()} if report else {}
        )
      return x, (tuple(new), tuple(found))

    keys = None if key is None else jax.random.split(key, self.repeats)
    x, (state, found) = self._scan(body, x, state, keys)
    if not reports:
      return state, x
    return state, x, self._named(found)

  def refresh(self, state, x, *, reset=None, mask=None) -> None:
    """Sets the buffers of every block from a deterministic pass over x."""
    if state is None:
      state = self.initial_state(x.shape[0])

    def body(x, repeat):
      blocks, states, _ = repeat
      buffers = []
      for block, old in zip(blocks, states):
        _, y = block(old, x, reset=reset, mask=mask)
        block.refresh(old, x, reset=reset, mask=mask)
        buffers.append(nnx.state(block, layers.Buffer))
        x = y
      return x, tuple(buffers)

    _, buffers = self._scan(body, x, state, None)
    for block, new in zip(self.blocks, buffers):
      nnx.update(block, new)

  def _scan(self, body, x, state, keys):
    if self.options.remat:
      body = jax.checkpoint(body, prevent_cse=False)
    return jax.lax.scan(
      body, x, (tuple(self.blocks), state, keys), unroll=self.unroll
    )

  def _forms(self, implementation):
    if not isinstance(implementation, Mapping):
      return [implementation] * len(self.cells)
    names = [layers.name_of(cell) for cell in self.cells]
    for name in implementation:
      if name not in names:
        raise ValueError(
          f"implementation: the stack has no cell {name!r}; "
          + dispatch.nearest(name, names)
        )
    return [implementation.get(name) for name in names]

  def _named(self, found):
    """Reports of a pattern, [R] each, by layer and by name."""
    named, every = {}, {}
    for i, reports in enumerate(found):
      for name, values in reports.items():
        every.setdefault(name, []).append(jnp.mean(values))
        for r in range(self.repeats):
          named[f"layers/{r * len(self.cells) + i}/{name}"] = values[r]
    for name, values in every.items():
      named[name] = sum(values) / len(values)
    return named


def make_options(**options) -> BlockOptions:
  """`BlockOptions` by name; `TypeError` on an unknown one, with the nearest."""
  known = {field.name for field in dataclasses.fields(BlockOptions)}
  for name in options:
    if name not in known:
      raise TypeError(
        f"models have no option {name!r}: " + dispatch.nearest(name, known)
      )
  return BlockOptions(**options)


def _mean(report, mask):
  """The mean of [B, T, ...] over what is there."""
  report = report.astype(jnp.float32)
  report = jnp.mean(report, axis=tuple(range(2, report.ndim)))
  if mask is None:
    return jnp.mean(report)
  total = jnp.sum(jnp.where(mask, report, 0))
  return total / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
