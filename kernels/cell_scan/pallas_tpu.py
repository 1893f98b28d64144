"""The loop on a TPU: a grid over heads, blocks of rows and blocks of steps."""

import math
from typing import NamedTuple

import jax
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
    """For inputs [H, T, B, N], B whole blocks of rows."""
    del weights
    size = block_rows(inputs[0].shape[2])
    width = sum(
      2 * math.prod(s.shape) + 2 * 128  # narrow ones take 128 lanes
      for s in (*rows.state, *rows.inputs, *rows.plan.outputs)
    )
    width += sum(tap.width for tap in rows.plan.taps)
    most = min(TILE, max(BLOCKS // (8 * width), 1)) // size
    steps = math.gcd(STEPS, inputs[0].shape[1])
    while steps > max(most, 1):
      steps //= 2
    return cls(size, steps)


def block_rows(count: int) -> int:
  """Rows in a block: a multiple of 16, of blocks that are as full as can be."""
  blocks = -(-count // ROWS)
  rows = -(-count // blocks)
  return rows + -rows % 16


def fit(weights) -> None:
  """`NotImplementedError` where weights [H, N, M] do not fit."""
  need = sum(math.prod(w.shape[1:]) * w.dtype.itemsize for w in weights)
  if need > WEIGHTS:
    raise NotImplementedError(
      f"the weights take {need} bytes on chip, and the kernel has room for "
      f"{WEIGHTS}: make them smaller, or block-diagonal (map heads by jax.vmap)"
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


def call(grid, kernel, name, args, outs, *, weights, back, interpret):
  """One program for each head, block of rows and block of steps, in order.

  Args:
    grid: how it is cut.
    kernel: over references.
    name: of the kernel.
    args: arrays [H, N, M] (as many as `weights` says), [H, B, N] and
      [H, T, B, N].
    outs: the shapes of the others.
    weights: how many.
    back: whether steps are taken from the last to the first.
    interpret: run by Pallas' interpreter.
  """
  _, length, rows, _ = next(x.shape for x in args if len(x.shape) == 4)
  heads, count = args[-1].shape[0], length // grid.steps
  step = (lambda i: count - 1 - i) if back else (lambda i: i)

  def spec(x):
    if len(x.shape) == 4:
      block = (None, grid.steps, grid.rows, x.shape[3])
      return pl.BlockSpec(block, lambda h, j, i: (h, step(i), j, 0))
    block = (None, grid.rows, x.shape[2])
    return pl.BlockSpec(block, lambda h, j, i: (h, j, 0))

  def whole(x):
    return pl.BlockSpec((None, *x.shape[1:]), lambda h, j, i: (h, 0, 0))

  return pl.pallas_call(
    kernel,
    grid=(heads, rows // grid.rows, count),
    in_specs=[*map(whole, args[:weights]), *map(spec, args[weights:])],
    out_specs=[*map(spec, outs)],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=MEMORY,
    ),
    interpret=interpret,
    name=name,
  )(*args)
