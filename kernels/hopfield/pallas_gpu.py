"""The GPU driver, by Pallas' Triton route: a program per block, and a loop.

A forward program has a block of queries and loops over the patterns; so has
the backward one for the queries, and that for the patterns has a block of
patterns and loops over the queries. Widths are padded to powers of two by
masked loads, which read zeros beyond an array.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from memzoo.kernels.hopfield import block
from memzoo.ops import chunk

LEAST = 16  # the least size of a dot's operand
# Of shared memory a program may take 227 KiB on Hopper, 163 on an A100 and 99
# on Ada: blocks are as large as BUDGET lets them, and where the smallest ones
# need more than LIMIT there is no kernel.
BUDGET, LIMIT = 96 * 2**10, 227 * 2**10


def forward(plan, beta, q, x, v, flags):
  """(o [N, V] in q's dtype, L float32 [N]) for q [N, K]."""
  grid = _Grid(plan, q, x, v, backward=False)
  o, norm = grid.call(
    functools.partial(_forward, grid=grid),
    inputs=[beta, q, x, v, flags],
    specs=[grid.one(), grid.part(q), grid.whole(x), grid.whole(v),
           grid.whole(flags, row=True)],
    outputs=[(q.dtype, v.shape[1]), None],
  )  # fmt: skip
  return o, norm[:, 0]


def backward_query(plan, beta, q, x, v, flags, g, norm, delta):
  """u, float32 [N, K]."""
  grid = _Grid(plan, q, x, v, backward=True)
  norm, delta = norm[:, None], delta[:, None]
  (u,) = grid.call(
    functools.partial(_backward_query, grid=grid),
    inputs=[beta, q, x, v, flags, g, norm, delta],
    specs=[grid.one(), grid.part(q), grid.whole(x), grid.whole(v),
           grid.whole(flags, row=True), grid.part(g), grid.column(),
           grid.column()],
    outputs=[(jnp.float32, q.shape[1])],
  )  # fmt: skip
  return u


def backward_patterns(plan, beta, q, x, v, flags, g, norm, delta):
  """(dx [M, K], dv [M, V]) in x's dtype."""
  grid = _Grid(plan, q, x, v, backward=True, by_pattern=True)
  norm, delta = norm[None], delta[None]
  there = None if flags is None else flags.reshape(-1, 1)
  return grid.call(
    functools.partial(_backward_patterns, grid=grid),
    inputs=[beta, q, x, v, there, g, norm, delta],
    specs=[grid.one(), grid.whole(q), grid.part(x), grid.part(v),
           None if there is None else grid.column(), grid.whole(g),
           grid.whole(norm, row=True), grid.whole(delta, row=True)],
    outputs=[(x.dtype, x.shape[1]), (v.dtype, v.shape[1])],
  )  # fmt: skip


def _forward(beta, q, x, v, flags, o, norm, *, grid):
  i = pl.program_id(0)
  scale, query = beta[...], grid.own(q, i, grid.key_width)

  def body(j, running):
    here = grid.other(x, j, grid.key_width)
    contents = grid.other(v, j, grid.value_width)
    seen = grid.seen(i, j, flags)
    return block.meet(running, scale, query, here, contents, seen)

  running = block.start(grid.n, v.shape[1], grid.plan.extra)
  running = jax.lax.fori_loop(0, grid.end(i), body, running)
  out, column = block.finish(running)
  grid.write(o, i, out, grid.value_width)
  grid.write(norm, i, column, 1)


def _backward_query(beta, q, x, v, flags, g, norm, delta, u, *, grid):
  i = pl.program_id(0)
  scale, query = beta[...], grid.own(q, i, grid.key_width)
  grad = grid.own(g, i, grid.value_width)
  column, shift = grid.own(norm, i, 1), grid.own(delta, i, 1)

  def body(j, total):
    here = grid.other(x, j, grid.key_width)
    contents = grid.other(v, j, grid.value_width)
    _, ds = block.reverse(
      scale, query, here, grad, contents, column, shift, grid.seen(i, j, flags)
    )
    return total + block.dot(ds.astype(here.dtype), here)

  total = jnp.zeros(u.shape, jnp.float32)
  total = jax.lax.fori_loop(0, grid.end(i), body, total)
  grid.write(u, i, total, grid.key_width)


def _backward_patterns(beta, q, x, v, flags, g, norm, delta, dx, dv, *, grid):
  j = pl.program_id(0)
  scale, here = beta[...], grid.own(x, j, grid.key_width)
  contents = grid.own(v, j, grid.value_width)

  def body(i, totals):
    query = grid.other(q, i, grid.key_width)
    grad = grid.other(g, i, grid.value_width)
    p, ds = block.reverse(
      scale, here, query, contents, grad, grid.row(norm, i),
      grid.row(delta, i), grid.seen(i, j),
    )  # fmt: skip
    return (
      totals[0] + block.dot(ds.astype(query.dtype), query),
      totals[1] + block.dot(p.astype(grad.dtype), grad),
    )

  totals = tuple(jnp.zeros(d.shape, jnp.float32) for d in (dx, dv))
  first = (j * grid.m) // grid.n if grid.plan.causal else 0
  totals = jax.lax.fori_loop(first, grid.rows, body, totals)
  sum_x, sum_v = scale * totals[0], totals[1]
  if flags is not None:
    there = grid.own(flags, j, 1)
    sum_x, sum_v = chunk.where(there, sum_x, 0), chunk.where(there, sum_v, 0)
  grid.write(dx, j, sum_x, grid.key_width)
  grid.write(dv, j, sum_v, grid.value_width)


class _Grid:
  """A program per block of one side, with all of the other side in reach.

  Attributes:
    plan: the kernel's.
    n, m: queries and patterns of a block.
    rows, columns: how many blocks of each.
    key_width, value_width: K and V, before padding.
  """

  def __init__(self, plan, q, x, v, backward, by_pattern=False):
    self.plan, self.by_pattern = plan, by_pattern
    self.queries, self.patterns = q.shape[0], x.shape[0]
    self.key_width, self.value_width = x.shape[1], v.shape[1]
    n, m = blocks(x.shape[1], v.shape[1], q.dtype, backward)
    n, m = plan.block_queries or n, plan.block_patterns or m
    for what, size in (("block_queries", n), ("block_patterns", m)):
      chunk.power_of_two(f"hopfield kernel: {what}", size)
      if size < LEAST:
        raise ValueError(
          f"hopfield kernel: {what} must be at least {LEAST} on GPU, got {size}"
        )
    self.n = min(n, _pad(self.queries))
    self.m = min(m, _pad(self.patterns))
    self.rows = pl.cdiv(self.queries, self.n)
    self.columns = pl.cdiv(self.patterns, self.m)
    width = _pad(self.key_width) + _pad(self.value_width)
    self.warps = 8 if max(self.n, self.m) * width >= 2**14 else 4
    # Of the side that a program has a block of, and of the other.
    sides = (self.n, self.queries), (self.m, self.patterns)
    (self.size, self.count), (self.step, self.length) = (
      reversed(sides) if by_pattern else sides
    )

  def one(self):
    return pl.BlockSpec((1, 1), lambda _: (0, 0))

  def part(self, a):
    return pl.BlockSpec((self.size, _pad(a.shape[1])), lambda b: (b, 0))

  def column(self):
    return pl.BlockSpec((self.size, 1), lambda b: (b, 0))

  def whole(self, a, row=False):
    if a is None:
      return None
    length = pl.cdiv(self.length, self.step) * self.step
    shape = (1, length) if row else (length, _pad(a.shape[1]))
    return pl.BlockSpec(shape, lambda _: (0, 0))

  def call(self, kernel, inputs, specs, outputs):
    """`pallas_call`; an output is (dtype, width), or None for a column."""
    shapes, outs = [], []
    for output in outputs:
      dtype, width = output or (jnp.float32, 1)
      shapes.append(jax.ShapeDtypeStruct((self.count, width), dtype))
      outs.append(self.part(shapes[-1]) if output else self.column())
    return pl.pallas_call(
      kernel,
      out_shape=shapes,
      grid=(pl.cdiv(self.count, self.size),),
      in_specs=specs,
      out_specs=outs,
      compiler_params=plgpu.CompilerParams(num_warps=self.warps, num_stages=2),
      interpret=self.plan.interpret,
      name="hopfield" + kernel.func.__name__,
    )(*inputs)

  def end(self, i):
    """Behind the last block of patterns that a block of queries meets."""
    if not self.plan.causal:
      return self.columns
    return jnp.minimum(pl.cdiv((i + 1) * self.n, self.m), self.columns)

  def seen(self, i, j, flags=None):
    shape = (self.m, self.n) if self.by_pattern else (self.n, self.m)
    tail = {}
    if self.by_pattern and self.queries % self.n:
      tail["queries"] = self.queries
    if not self.by_pattern and self.patterns % self.m:
      tail["patterns"] = self.patterns
    return block.pairs(
      shape, int(self.by_pattern), i * self.n, j * self.m, **tail,
      flags=None if flags is None else self.row(flags, j),
      causal=self.plan.causal,
    )  # fmt: skip

  def own(self, ref, at, width):
    """The program's block, block `at` of its side."""
    inside = self._inside(ref.shape, at, self.size, self.count, width)
    return _load(ref, inside)

  def other(self, ref, at, width):
    """Block `at` of the other side."""
    shape = (self.step, ref.shape[1])
    inside = self._inside(shape, at, self.step, self.length, width)
    return _load(ref.at[pl.ds(at * self.step, self.step), :], inside)

  def row(self, ref, at):
    """Block `at` of a row [1, …] of the other side."""
    inside = None
    if self.length % self.step:
      index = jax.lax.broadcasted_iota(jnp.int32, (1, self.step), 1)
      inside = at * self.step + index < self.length
    return _load(ref.at[:, pl.ds(at * self.step, self.step)], inside)

  def write(self, ref, at, value, width):
    inside = self._inside(ref.shape, at, self.size, self.count, width)
    value = value.astype(ref.dtype)
    if inside is None:
      ref[...] = value
    else:
      plgpu.store(ref, value, mask=inside)

  def _inside(self, shape, at, size, count, width):
    """bool `shape`: what lies in an array [count, width], or None for all."""
    iota = lambda axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    inside = None
    if count % size:
      inside = at * size + iota(0) < count
    if shape[1] != width:
      columns = iota(1) < width
      inside = columns if inside is None else inside & columns
    return inside


def blocks(
  key_width: int, value_width: int, dtype, backward: bool
) -> tuple[int, int]:
  """(queries, patterns) of a block that shared memory has room for.

  Raises:
    NotImplementedError: where it has none for the smallest ones.
  """
  itemsize = jnp.dtype(dtype).itemsize
  keys, values = _pad(key_width), _pad(value_width)
  width = keys + values

  def room(n, m):
    # A program's own operands, and those of its loop twice: one is fetched
    # while the other is used.
    if not backward:
      return itemsize * (n * keys + 2 * m * width)
    return itemsize * width * max(n + 2 * m, m + 2 * n)

  if room(LEAST, LEAST) > LIMIT:
    raise NotImplementedError(
      f"a block of width {keys} + {values} in {jnp.dtype(dtype).name} is more "
      "than the shared memory of a GPU"
    )
  scale = 1 if itemsize == 2 else 2
  n, m = (64 if backward else 128) // scale, 64 // scale
  while room(n, m) > BUDGET and max(n, m) > LEAST:
    wide = n > (m if backward else 2 * m) or m == LEAST
    n, m = (n // 2, m) if wide else (n, m // 2)
  return n, m


def check(key_width: int, value_width: int, dtype) -> None:
  """`NotImplementedError` where a block has no room."""
  blocks(key_width, value_width, dtype, backward=True)


def _load(ref, inside):
  if inside is None:
    return ref[...]
  return plgpu.load(ref, mask=inside, other=0.0)


def _pad(size):
  return max(LEAST, pl.next_power_of_2(size))
