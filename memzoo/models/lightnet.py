"""LightNet over grids: images, video and other data of several dimensions.

The decay of LightNet's recurrence depends on sums alone. Where every place may
see all others, these are the sums over the whole grid, in whatever order, and
one pass does what others need several scans for:

  S = Σ_i softmax_i(k) v_iᵀ ,   the softmax over the grid, per channel of k
  o_n = Sᵀ silu(q_n)

`GridClassifier` is a stack of such layers, MD-TPE behind the embedding, for
images and the like. The functions take the parameters of the cell `lightnet`
and grids [..., D] with one leading axis per dimension of the data; `jax.vmap`
batches.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.cells.matrix.lightnet import LightNet, turn
from memzoo.core import initializers
from memzoo.models.block import Block
from memzoo.models.classifier import SequenceClassifier
from memzoo.models.encoder import check_size
from memzoo.models.layers import MemoryLayer
from memzoo.models.stack import Stack
from memzoo.ops import arguments, chunk
from memzoo.ops.linear_recurrence import linear_recurrence


def one_pass(
  cell: LightNet, params, xs: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
  """LightNet's layer where every place of a grid sees all of them.

  With `cell.lrpe` places are told apart by MD-LRPE (`angles`); without it the
  layer does not know the order.

  Args:
    cell: the layer.
    params: as `cell.init` made them.
    xs: [n_1, …, n_m, D].
    mask: bool [n_1, …, n_m]; False: nothing is there, and y is zero.

  Returns:
    ys like xs.

  Raises:
    ValueError: on wrong shapes or dtypes.
  """
  grid = jnp.shape(xs)[:-1]
  if not grid or 0 in grid:
    arguments.fail("one_pass", "xs", "floating [n_1, …, n_m, D]", xs)
  arguments.check_array("one_pass", "xs", xs, (*grid, cell.d_model))
  rows = xs.reshape(-1, cell.d_model)
  there = jnp.ones((len(rows), 1, 1), bool)
  if mask is not None:
    arguments.check_array("one_pass", "mask", mask, grid, jnp.bool_)
    there = mask.reshape(-1, 1, 1)
  rows = jnp.where(there[:, 0], rows, jnp.zeros_like(rows))
  q, k, v = cell.project(params, rows)
  # The finite stand-in for −inf serves a grid where nothing is.
  k = jnp.where(there, k.astype(jnp.float32), jnp.finfo(jnp.float32).min)
  weight = jax.nn.softmax(k, axis=0).astype(xs.dtype)
  if cell.lrpe:
    angle = angles(cell, grid)[:, None]
    q, weight = turn(q, angle), turn(weight, angle)
  v = jnp.where(there, v, jnp.zeros_like(v))
  first = lambda x: jnp.swapaxes(x, 0, 1)  # heads
  s = chunk.matmul(jnp.swapaxes(first(weight), 1, 2), first(v))
  o = first(chunk.matmul(first(q), s)).astype(xs.dtype)
  ys = cell.read_out(params, rows, o)
  return jnp.where(there[:, 0], ys, jnp.zeros_like(ys)).reshape(xs.shape)


def angles(cell: LightNet, grid: Sequence[int]) -> jax.Array:
  """MD-LRPE's angles of a grid's places, in row-major order: [Π n, K].

  The K channels are split among the m dimensions; those of dimension j turn
  with the place's coordinate there, by θ_i = lrpe_base^(−2 i / K), i = 0 …
  ⌈K / m⌉ − 1. With one dimension these are the cell's own.
  """
  k, m = cell.head_dim, len(grid)
  channel = jnp.arange(-(-k // m), dtype=jnp.float32)
  theta = cell.lrpe_base ** (channel * (-2.0 / k))
  places = jnp.indices(tuple(grid)).reshape(m, -1, 1).astype(jnp.float32)
  return jnp.concatenate(list(places * theta), axis=1)[:, :k]


def init_md_tpe(key, d_model: int, dims: int, states: int):
  """Parameters of `md_tpe`: write [m, D, E] and decay [m, E], whose sigmoids
  are the decays."""
  key_write, key_decay = jax.random.split(key)
  return {
    "write": initializers.lecun_normal(
      key_write, (dims, d_model, states), states
    ),
    "decay": jax.random.normal(key_decay, (dims, states)),
  }


def md_tpe(params, xs: jax.Array) -> jax.Array:
  """MD-TPE: positions of a grid by exponential sums along each dimension.

    y_n = Σ_j Σ_{i <= n_j} t^j_{n_j − i} ⊙ x_{n with n_j = i}
    t^j_s[d] = Σ_e b^j[d, e] (λ^j_e)^s

  A Toeplitz matrix whose entries are sums of E exponentials, so that a linear
  recurrence applies it; the dimensions' results are added.

  Args:
    params: as `init_md_tpe` makes them.
    xs: [n_1, …, n_m, D].

  Returns:
    ys like xs; the caller adds its own norm, projection or residual.

  Raises:
    ValueError: where xs and the parameters differ in m or D.
  """
  dims, width, states = params["write"].shape
  if jnp.ndim(xs) != dims + 1 or jnp.shape(xs)[-1] != width:
    want = f"floating with {dims} axes and D = {width} in the last"
    arguments.fail("md_tpe", "xs", want, xs)
  total = 0.0
  for axis in range(dims):
    lines = jnp.moveaxis(xs.astype(jnp.float32), axis, -2)
    write = params["write"][axis].astype(jnp.float32)
    decay = jax.nn.sigmoid(params["decay"][axis].astype(jnp.float32))
    decay = jnp.tile(decay, width)

    def along(line, write=write, decay=decay):
      x = jnp.repeat(line, states, axis=1)
      hs = linear_recurrence(jnp.zeros_like(x[0]), x, decay=decay)[1]
      return jnp.sum(hs.reshape(-1, width, states) * write, axis=-1)

    ys = jax.vmap(along)(lines.reshape(-1, *lines.shape[-2:]))
    total += jnp.moveaxis(ys.reshape(lines.shape), -2, axis)
  return total.astype(xs.dtype)


class GridLayer(MemoryLayer):
  """`one_pass` over the grids of a batch; it holds nothing between calls.

  Args:
    cell: the layer.
    grid: [n_1, …, n_m].
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, cell: LightNet, grid: tuple[int, ...], *, rngs: nnx.Rngs):
    super().__init__(cell, rngs=rngs)
    self.grid = grid

  def initial_state(self, batch: int, key: jax.Array | None = None):
    """Nothing."""
    return ()

  def __call__(
    self, state, xs, *, reset=None, mask=None, implementation=None,
    reports=False,
  ):  # fmt: skip
    """As a `MemoryLayer`, xs [B, Π n, D]; it has one form and no reports."""
    del implementation
    if reset is not None:
      raise ValueError("GridLayer: every row is one grid, there is no reset")
    shape = (xs.shape[0], *self.grid)
    if mask is not None:
      mask = mask.reshape(shape)
    run = functools.partial(one_pass, self.cell, self.values)
    ys = jax.vmap(run)(xs.reshape(*shape, -1), mask).reshape(xs.shape)
    return (state, ys, {}) if reports else (state, ys)


class GridStack(Stack):
  """A `Stack` of `GridLayer`s, behind x + MD-TPE(x) where it has states.

  Args:
    cells: the pattern of LightNets, bottom first.
    depth: number of blocks.
    grid: [n_1, …, n_m].
    states: E of MD-TPE; 0 for none.
    options: of every block.
    unroll: as in `Stack`.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, cells, depth, grid, states, options, *, unroll=1, rngs):
    self.grid = grid
    super().__init__(cells, depth, options, unroll=unroll, rngs=rngs)
    tpe = {}
    if states:
      width = self.cells[0].d_model
      tpe = init_md_tpe(rngs.params(), width, len(grid), states)
    self.tpe = nnx.data(jax.tree.map(nnx.Param, tpe))

  def _block(self, cell, options, rngs):
    block = Block(cell, options, rngs=rngs)
    block.memory = GridLayer(cell, self.grid, rngs=rngs)
    return block

  @property
  def max_length(self) -> int:
    """Places of the grid."""
    return math.prod(self.grid)

  def __call__(self, state, x, *, mask=None, **kwargs):
    """As a `Stack`, over x [B, Π n, D].

    Raises:
      ValueError: where x has another length than the grid.
    """
    if x.shape[1] != self.max_length:
      raise ValueError(
        f"GridStack: got {x.shape[1]} inputs for a grid of "
        f"{' x '.join(map(str, self.grid))} places"
      )
    if self.tpe:
      params = {name: value[...] for name, value in self.tpe.items()}
      there = x if mask is None else jnp.where(mask[..., None], x, 0)
      there = there.reshape(x.shape[0], *self.grid, -1)
      ys = jax.vmap(functools.partial(md_tpe, params))(there)
      x = x + ys.reshape(x.shape)
    return super().__call__(state, x, mask=mask, **kwargs)


class GridClassifier(SequenceClassifier):
  """A grid of floats or tokens to one class, seen as a whole.

  >>> cell = memzoo.make('lightnet', d_model=64, lrpe=True)
  >>> model = GridClassifier(cell, 2, 10, grid=(8, 8), tpe_states=4,
  ...                        d_input=1, rngs=nnx.Rngs(0))
  >>> _, logits = model(None, xs)  # float [B, 64, 1] -> float32 [B, 10]

  Calls are `SequenceModel`'s, without `reset`. The inputs are the grid's places
  in row-major order, all of them in every call; it holds nothing from call to
  call.

  Args:
    cells: one LightNet, or a list, bottom first; `lrpe` is MD-LRPE.
    depth: number of blocks; None for the length of the list.
    num_classes: C.
    grid: [n_1, …, n_m].
    tpe_states: E of MD-TPE, whose result is added to the embedding; 0: none.
    rngs: its `params` stream draws the parameters.
    **options: of `SequenceClassifier`, but conv_size.

  Raises:
    ValueError: on an option out of range.
    TypeError: on an unknown option, or another cell than LightNet.
  """

  kind: ClassVar[str] = "grid_classifier"

  def __init__(
    self,
    cells: LightNet | Sequence[LightNet],
    depth: int | None,
    num_classes: int,
    *,
    grid: Sequence[int],
    tpe_states: int = 0,
    rngs: nnx.Rngs,
    **options,
  ):
    cells = tuple(cells) if isinstance(cells, (list, tuple)) else (cells,)
    for cell in cells:
      if not isinstance(cell, LightNet):
        raise TypeError(f"GridClassifier: needs LightNet cells, got {cell!r}")
    if options.get("conv_size"):
      raise ValueError("GridClassifier: its layers have no convolution")
    grid = tuple(check_size("grid", n) for n in grid)
    self.tpe_states = check_size("tpe_states", tpe_states, 0)
    make = functools.partial(GridStack, cells, depth, grid, self.tpe_states)
    super().__init__(make, None, num_classes, rngs=rngs, **options)

  def config(self) -> dict[str, Any]:
    """The constructor's arguments as plain data, without `rngs`."""
    return {
      **super().config(),
      "grid": list(self.encoder.stack.grid),
      "tpe_states": self.tpe_states,
    }
