"""The loop on a TPU: a grid over heads, blocks of rows and blocks of steps."""

import math
from typing import NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

ROWS = 128  # the most in a block
STEPS = 16  # the most in a block, and what sequences are padded to
TILE = 256  # rows × steps in a block, at most
BLOCKS = 16 * 2**20  # bytes of all blocks of a sequence
WEIGHTS = 12 * 2**20  # bytes of all weights
MEMORY = 64 * 2**20  # bytes of VMEM that a kernel asks for


class Grid(NamedTuple):
  """How a call is cut: `rows` in a block, `steps` in a block."""

  rows: int
  steps: int

  @classmethod
  def of(cls, rows, weights, inputs):
    """For inputs [H, T, B, ...], B whole blocks of rows."""
    del weights
    size = block_rows(rows, inputs[0].shape[2])
    most = min(TILE, max(BLOCKS // (8 * _width(rows)), 1)) // size
    steps = math.gcd(STEPS, inputs[0].shape[1])
    while steps > max(most, 1):
      steps //= 2
    return cls(size, steps)


def _width(rows) -> int:
  """Entries that the blocks have for a row and step."""

  def entries(shape):
    *lead, last = shape
    if not lead:
      return last + 128  # narrow ones take 128 lanes
    lead[-1] += -lead[-1] % 8
    return math.prod(lead) * (last + -last % 128)

  leaves = *rows.state, *rows.inputs, *rows.plan.outputs
  width = sum(2 * entries(s.shape) for s in leaves)
  taps = [tap.shape for tap in rows.plan.taps]
  return width + sum(s[-1] if len(s) == 1 else entries(s) for s in taps)


def block_rows(rows, count: int) -> int:
  """Rows in a block: a multiple of 16, of blocks that are as full as can be."""
  most = ROWS
  if any(len(s.shape) > 1 for s in rows.state):
    most = min(ROWS, max(16, BLOCKS // (8 * _width(rows)) // 16 * 16))
  blocks = -(-count // most)
  rows = -(-count // blocks)
  return rows + -rows % 16


def fit(weights) -> None:
  """`NotImplementedError` where weights [H, N, M] do not fit."""
  need = sum(math.prod(w.shape[1:]) * w.dtype.itemsize for w in weights)
  if need > WEIGHTS:
    raise NotImplementedError(
      f"the weights take {need} bytes on chip, and the kernel has room for "
      f"{WEIGHTS}: make them smaller, or block-diagonal (a cell's num_heads; "
      "jax.vmap over heads)"
    )


def carried(start, final):
  """Where the state is: put into `final` before the first steps."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    for s, f in zip(start, final):
      f[...] = s[...]

  return final


def zeros(totals):
  """The sums so far: zeros before the first steps."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    for total in totals:
      total[...] = jnp.zeros(total.shape, total.dtype)

  return [total[...] for total in totals]


def call(
  grid, kernel, name, weights, held, over, outs_held, outs_over, *, back,
  interpret,
):  # fmt: skip
  """One program for each head, block of rows and block of steps, in order.

  Args:
    grid: how it is cut.
    kernel: over references.
    name: of the kernel.
    weights: arrays [H, N, M].
    held: arrays [H, B, ...].
    over: arrays [H, T, B, ...].
    outs_held, outs_over: the shapes of the results, likewise.
    back: whether steps are taken from the last to the first.
    interpret: run by Pallas' interpreter.
  """
  heads, length, rows = over[0].shape[:3]
  count = length // grid.steps
  step = (lambda i: count - 1 - i) if back else (lambda i: i)

  def whole(x):
    return pl.BlockSpec((None, *x.shape[1:]), lambda h, j, i: (h, 0, 0))

  def of_rows(x):
    rest = x.shape[2:]
    index = lambda h, j, i: (h, j, *(0 for _ in rest))
    return pl.BlockSpec((None, grid.rows, *rest), index)

  def of_steps(x):
    rest = x.shape[3:]
    index = lambda h, j, i: (h, step(i), j, *(0 for _ in rest))
    return pl.BlockSpec((None, grid.steps, grid.rows, *rest), index)

  return pl.pallas_call(
    kernel,
    grid=(heads, rows // grid.rows, count),
    in_specs=[*map(whole, weights), *map(of_rows, held), *map(of_steps, over)],
    out_specs=[*map(of_rows, outs_held), *map(of_steps, outs_over)],
    out_shape=[*outs_held, *outs_over],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=MEMORY,
    ),
    interpret=interpret,
    name=name,
  )(*weights, *held, *over)
