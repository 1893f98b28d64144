"""The loop on a GPU (Triton): a grid over heads and blocks of rows."""

import math
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp

from memzoo.ops import chunk

ROWS = 16  # in a block: as few as its matrix products take
MANY = 32  # where there are more blocks than a GPU has processors
PROCESSORS = 132
TILE = 2048  # entries of a block's state that four warps hold well
# Bytes of all weights, which every step reads: what a processor keeps close.
WEIGHTS = 128 * 2**10
# Three products of matrix units in place of one without: float32's digits.
TF32X3 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


class Grid(NamedTuple):
  """How a call is cut: `rows` in a block, all `steps` in one."""

  rows: int
  steps: int
  warps: int

  @classmethod
  def of(cls, rows, weights, inputs):
    """For inputs [H, T, B, ...], B whole blocks of rows."""
    size = block_rows(rows, inputs[0].shape[2])
    width = max((w.shape[2] for w in weights), default=0)
    tile = size * max(math.prod(s.shape) for s in rows.state)
    wide = width >= 128 or tile > TILE
    return cls(size, inputs[0].shape[1], 8 if wide else 4)


def block_rows(rows, count: int) -> int:
  """Rows in a block: with slots in the state, as few as the products take."""
  if all(len(s.shape) == 1 for s in rows.state):
    return ROWS if count <= ROWS * PROCESSORS else MANY
  slots = [math.prod(tap.shape[:-1]) for tap in rows.plan.taps]
  return max([-(-ROWS // n) for n in slots], default=1)


def fit(weights) -> None:
  """`NotImplementedError` where weights [H, N, M] do not fit."""
  need = sum(math.prod(w.shape[1:]) * w.dtype.itemsize for w in weights)
  if need > WEIGHTS:
    raise NotImplementedError(
      f"the weights take {need} bytes on chip, and the kernel has room for "
      f"{WEIGHTS}: make them smaller, bfloat16, or block-diagonal (a cell's "
      "num_heads; jax.vmap over heads)"
    )


def carried(start, final):
  """Where the state is: nothing was done before."""
  del final
  return start


def zeros(totals):
  """The sums so far."""
  return [jnp.zeros(total.shape, total.dtype) for total in totals]


def call(
  grid, kernel, name, weights, held, over, outs_held, outs_over, *, back,
  interpret,
):  # fmt: skip
  """One program for each head and block of rows: as `pallas_tpu.call`."""
  del back  # the loop is in the kernel
  heads, length, rows = over[0].shape[:3]

  def whole(x):
    return pl.BlockSpec((None, *x.shape[1:]), lambda h, j: (h, 0, 0))

  def of_rows(x):
    rest = x.shape[2:]
    index = lambda h, j: (h, j, *(0 for _ in rest))
    return pl.BlockSpec((None, grid.rows, *rest), index)

  def of_steps(x):
    rest = x.shape[3:]
    index = lambda h, j: (h, 0, j, *(0 for _ in rest))
    return pl.BlockSpec((None, length, grid.rows, *rest), index)

  def traced(*refs):
    if interpret:
      return kernel(*refs)
    with chunk.full_precision(TF32X3):
      return kernel(*refs)

  return pl.pallas_call(
    traced,
    grid=(heads, rows // grid.rows),
    in_specs=[*map(whole, weights), *map(of_rows, held), *map(of_steps, over)],
    out_specs=[*map(of_rows, outs_held), *map(of_steps, outs_over)],
    out_shape=[*outs_held, *outs_over],
    compiler_params=plt.CompilerParams(num_warps=grid.warps, num_stages=1),
    interpret=interpret,
    name=name,
  )(*weights, *held, *over)
