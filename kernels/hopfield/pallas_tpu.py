"""The TPU driver: grids with a sequential axis, sums kept in VMEM.

Blocks that reach beyond an array hold whatever is there. Such rows spoil
nothing but themselves, and are not written, except along the axis that a
kernel sums over: there they are replaced by zeros.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from memzoo.kernels.hopfield import block
from memzoo.ops import chunk

LANES = 128
BLOCK = 512
# Of the 16 MiB of VMEM that a kernel may use on a v5e.
BUDGET = 14 * 2**20


def forward(plan, beta, q, x, v, flags):
  """(o [N, V] in q's dtype, L float32 [N]) for q [N, K]."""
  grid = _Grid(plan, q, x, v, by_pattern=False)
  n = grid.n
  o, norm = grid.call(
    functools.partial(_forward, grid=grid),
    inputs=[beta, q, x, v, flags],
    specs=[grid.one(), grid.query(q), grid.pattern(x), grid.pattern(v),
           grid.pattern_row(flags)],
    outputs=[(q.dtype, v.shape[1]), None],
    scratch=[(n, 1), (n, 1), (n, v.shape[1])],
  )  # fmt: skip
  return o, norm[0]


def backward_query(plan, beta, q, x, v, flags, g, norm, delta):
  """u, float32 [N, K]."""
  grid = _Grid(plan, q, x, v, by_pattern=False)
  n = grid.n
  (u,) = grid.call(
    functools.partial(_backward_query, grid=grid),
    inputs=[beta, q, x, v, flags, g, norm[None], delta[None]],
    specs=[grid.one(), grid.query(q), grid.pattern(x), grid.pattern(v),
           grid.pattern_row(flags), grid.query(g), grid.query_row(),
           grid.query_row()],
    outputs=[(jnp.float32, q.shape[1])],
    scratch=[(n, 1), (n, 1), (n, q.shape[1])],
  )  # fmt: skip
  return u


def backward_patterns(plan, beta, q, x, v, flags, g, norm, delta):
  """(dx [M, K], dv [M, V]) in x's dtype."""
  grid = _Grid(plan, q, x, v, by_pattern=True)
  return grid.call(
    functools.partial(_backward_patterns, grid=grid),
    inputs=[beta, q, x, v, flags, g, norm[None], delta[None]],
    specs=[grid.one(), grid.query(q), grid.pattern(x), grid.pattern(v),
           grid.pattern_row(flags), grid.query(g), grid.query_row(),
           grid.query_row()],
    outputs=[(x.dtype, x.shape[1]), (v.dtype, v.shape[1])],
    scratch=[(grid.m, x.shape[1]), (grid.m, v.shape[1])],
  )  # fmt: skip


def _forward(beta, q, x, v, flags, o, norm, top, total, answer, *, grid):
  i, j = pl.program_id(0), pl.program_id(1)
  running = block.Running(top, total, answer)

  def write(values):
    for ref, value in zip(running, values):
      ref[...] = value

  @pl.when(j == 0)
  def _():
    write(block.start(grid.n, v.shape[1], grid.plan.extra))

  @grid.meets(i, j)
  def _():
    before = block.Running(*(ref[...] for ref in running))
    here = grid.clean(x[...], j), grid.clean(v[...], j)
    write(block.meet(before, beta[...], q[...], *here, grid.seen(i, j, flags)))

  @pl.when(j == grid.shape[1] - 1)
  def _():
    out, column = block.finish(block.Running(*(ref[...] for ref in running)))
    o[...] = out.astype(o.dtype)
    norm[...] = chunk.row(column)


def _backward_query(
  beta, q, x, v, flags, g, norm, delta, u, norms, deltas, total, *, grid
):
  i, j = pl.program_id(0), pl.program_id(1)

  @pl.when(j == 0)
  def _():
    norms[...] = chunk.column(norm[...])
    deltas[...] = chunk.column(delta[...])
    total[...] = jnp.zeros_like(total)

  @grid.meets(i, j)
  def _():
    here, contents = grid.clean(x[...], j), grid.clean(v[...], j)
    _, ds = block.reverse(
      beta[...], q[...], here, g[...], contents, norms[...], deltas[...],
      grid.seen(i, j, flags),
    )  # fmt: skip
    total[...] += block.dot(ds.astype(here.dtype), here)

  @pl.when(j == grid.shape[1] - 1)
  def _():
    u[...] = total[...]


def _backward_patterns(
  beta, q, x, v, flags, g, norm, delta, dx, dv, total_x, total_v, *, grid
):
  j, i = pl.program_id(0), pl.program_id(1)

  @pl.when(i == 0)
  def _():
    total_x[...] = jnp.zeros_like(total_x)
    total_v[...] = jnp.zeros_like(total_v)

  @grid.meets(i, j)
  def _():
    queries, grads = grid.clean(q[...], i), grid.clean(g[...], i)
    p, ds = block.reverse(
      beta[...], x[...], queries, v[...], grads, norm[...],
      grid.clean(delta[...], i, axis=1), grid.seen(i, j),
    )  # fmt: skip
    total_v[...] += block.dot(p.astype(grads.dtype), grads)
    total_x[...] += block.dot(ds.astype(queries.dtype), queries)

  @pl.when(i == grid.shape[1] - 1)
  def _():
    sum_x, sum_v = beta[...] * total_x[...], total_v[...]
    if flags is not None:
      there = chunk.column(flags[...])
      sum_x, sum_v = chunk.where(there, sum_x, 0), chunk.where(there, sum_v, 0)
    dx[...], dv[...] = sum_x.astype(dx.dtype), sum_v.astype(dv.dtype)


class _Grid:
  """Blocks of queries and blocks of patterns; the last axis is summed over.

  Attributes:
    plan: the kernel's.
    n, m: queries and patterns of a block.
    shape: blocks of queries and of patterns; the other way with `by_pattern`.
  """

  def __init__(self, plan, q, x, v, by_pattern):
    self.plan, self.by_pattern = plan, by_pattern
    self.queries, self.patterns = q.shape[0], x.shape[0]
    n, m = plan.block_queries, plan.block_patterns
    fit_n, fit_m = blocks(x.shape[1], v.shape[1], q.dtype)
    self.n = min(n or fit_n, self.queries)
    self.m = min(m or fit_m, self.patterns)
    for what, size, whole in (
      ("block_queries", self.n, self.queries),
      ("block_patterns", self.m, self.patterns),
    ):
      if size < whole and size % LANES and not plan.interpret:
        raise ValueError(
          f"hopfield kernel: {what} must be a multiple of {LANES} on TPU, got "
          f"{size}"
        )
    self.rows = pl.cdiv(self.queries, self.n)
    self.columns = pl.cdiv(self.patterns, self.m)
    self.shape = self.rows, self.columns
    if by_pattern:
      self.shape = self.columns, self.rows

  def one(self):
    return pl.BlockSpec((1, 1), lambda *_: (0, 0))

  def query(self, a):
    return pl.BlockSpec(
      (self.n, a.shape[1]), lambda *at: (self._index(at)[0], 0)
    )

  def query_row(self):
    return pl.BlockSpec((1, self.n), lambda *at: (0, self._index(at)[0]))

  def pattern(self, a):
    return pl.BlockSpec(
      (self.m, a.shape[1]), lambda *at: (self._index(at)[1], 0)
    )

  def pattern_row(self, a):
    if a is None:
      return None
    return pl.BlockSpec((1, self.m), lambda *at: (0, self._index(at)[1]))

  def call(self, kernel, inputs, specs, outputs, scratch):
    """`pallas_call`; an output is (dtype, width), or None for a row."""
    size = self.patterns if self.by_pattern else self.queries
    shapes, outs = [], []
    for output in outputs:
      if output is None:
        shapes.append(jax.ShapeDtypeStruct((1, size), jnp.float32))
        outs.append(self.query_row())
        continue
      shapes.append(jax.ShapeDtypeStruct((size, output[1]), output[0]))
      spec = self.pattern if self.by_pattern else self.query
      outs.append(spec(shapes[-1]))
    return pl.pallas_call(
      kernel,
      out_shape=shapes,
      grid=self.shape,
      in_specs=specs,
      out_specs=outs,
      scratch_shapes=[pltpu.VMEM(s, jnp.float32) for s in scratch],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary")
      ),
      interpret=self.plan.interpret,
      name="hopfield" + kernel.func.__name__,
    )(*inputs)

  def meets(self, i, j):
    """Runs a body unless causality leaves no pair of blocks i and j."""
    if not self.plan.causal:
      return lambda body: body()
    return pl.when(j * self.m <= i * self.n + self.n - 1)

  def seen(self, i, j, flags=None):
    shape = (self.m, self.n) if self.by_pattern else (self.n, self.m)
    tail = {}
    if self.by_pattern and self.queries % self.n:
      tail["queries"] = self.queries
    if not self.by_pattern and self.patterns % self.m:
      tail["patterns"] = self.patterns
    return block.pairs(
      shape, int(self.by_pattern), i * self.n, j * self.m, **tail,
      flags=None if flags is None else flags[...], causal=self.plan.causal,
    )  # fmt: skip

  def clean(self, a, at, axis=0):
    """Block `at` of the axis summed over, with zeros beyond the array."""
    size, whole = self.m, self.patterns
    if self.by_pattern:
      size, whole = self.n, self.queries
    if whole % size == 0:
      return a
    index = at * size + jax.lax.broadcasted_iota(jnp.int32, a.shape, axis)
    return jnp.where(index < whole, a, jnp.zeros_like(a))

  def _index(self, at):
    """(i, j) of the blocks to fetch: those that meet, under causality."""
    i, j = (at[1], at[0]) if self.by_pattern else at
    if not self.plan.causal:
      return i, j
    if self.by_pattern:
      first = jnp.minimum((j * self.m) // self.n, self.rows - 1)
      return jnp.maximum(i, first), j
    return i, jnp.minimum(j, (i * self.n + self.n - 1) // self.m)


def blocks(key_width: int, value_width: int, dtype) -> tuple[int, int]:
  """(queries, patterns) of a block that the kernels have room for.

  Raises:
    NotImplementedError: where they have none for the smallest ones.
  """
  itemsize = jnp.dtype(dtype).itemsize
  width = sum(-(-w // LANES) * LANES for w in (key_width, value_width))
  # The most is what the backward for the patterns takes: two copies of the
  # operands of both sides and of the outputs, the sums, what the compiler adds
  # for float32 products, and four [n, m] intermediates.
  row = 6 * itemsize + 4 + (18 if itemsize == 4 else 0)
  size = BLOCK
  while row * size * width + 16 * size**2 > BUDGET:
    size //= 2
    if size < LANES:
      raise NotImplementedError(
        f"a block of width {key_width} + {value_width} in "
        f"{jnp.dtype(dtype).name} is more than a TPU's kernel has memory for"
      )
  return size, size


def check(key_width: int, value_width: int, dtype) -> None:
  """`NotImplementedError` where a block has no room."""
  blocks(key_width, value_width, dtype)
