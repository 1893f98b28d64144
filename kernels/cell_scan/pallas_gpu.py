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
    """For inputs [H, T, B, N], B whole blocks of rows."""
    del rows
    width = max((w.shape[2] for w in weights), default=0)
    return cls(
      block_rows(inputs[0].shape[2]),
      inputs[0].shape[1],
      8 if width >= 128 else 4,
    )


def block_rows(count: int) -> int:
  """Rows in a block."""
  return ROWS if count <= ROWS * PROCESSORS else MANY


def fit(weights) -> None:
  """`NotImplementedError` where weights [H, N, M] do not fit."""
  need = sum(math.prod(w.shape[1:]) * w.dtype.itemsize for w in weights)
  if need > WEIGHTS:
    raise NotImplementedError(
      f"the weights take {need} bytes on chip, and the kernel has room for "
      f"{WEIGHTS}: make them smaller, bfloat16, or block-diagonal (map heads "
      "by jax.vmap)"
    )


def carried(start, final):
  """Where the state is: nothing was done before."""
  del final
  return start


def zeros(totals):
  """The sums so far."""
  return [jnp.zeros(total.shape, total.dtype) for total in totals]


def call(grid, kernel, name, args, outs, *, weights, back, interpret):
  """One program for each head and block of rows: as `pallas_tpu.call`."""
  del back  # the loop is in the kernel
  _, length, rows, _ = next(x.shape for x in args if len(x.shape) == 4)

  def spec(x):
    if len(x.shape) == 4:
      block = (None, length, grid.rows, x.shape[3])
      return pl.BlockSpec(block, lambda h, j: (h, 0, j, 0))
    block = (None, grid.rows, x.shape[2])
    return pl.BlockSpec(block, lambda h, j: (h, j, 0))

  def whole(x):
    return pl.BlockSpec((None, *x.shape[1:]), lambda h, j: (h, 0, 0))

  def traced(*refs):
    if interpret:
      return kernel(*refs)
    with chunk.full_precision(TF32X3):
      return kernel(*refs)

  return pl.pallas_call(
    traced,
    grid=(args[-1].shape[0], rows // grid.rows),
    in_specs=[*map(whole, args[:weights]), *map(spec, args[weights:])],
    out_specs=[*map(spec, outs)],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
    compiler_params=plt.CompilerParams(num_warps=grid.warps, num_stages=1),
    interpret=interpret,
    name=name,
  )(*args)
