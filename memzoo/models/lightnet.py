"""LightNet over grids: images, video and other data of several dimensions.

The decay of LightNet's recurrence depends on sums alone. Where every place may
see all others, these are the sums over the whole grid, in whatever order, and
one pass does what others need several scans for:

  S = Σ_i softmax_i(k) v_iᵀ ,   the softmax over the grid, per channel of k
  o_n = Sᵀ silu(q_n)

The functions take the parameters of the cell `lightnet` and grids [..., D] with
one leading axis per dimension of the data; `jax.vmap` batches.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from memzoo.cells.matrix.lightnet import LightNet, turn
from memzoo.core import initializers
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
