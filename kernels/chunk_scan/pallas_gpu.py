"""The walk on a GPU (Triton): a loop inside the kernel, the state in registers.

The value axis may be cut into blocks, each a program of its own: the gradients
of what has no value axis are then sums over the blocks.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp

from memzoo.kernels.chunk_scan.walk import Walk
from memzoo.ops import chunk

WARPS = 4
# Three products of matrix units in place of one without: float32's digits.
TF32X3 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def forward(walk: Walk, state, inputs, constants, every: int):
  """As `pallas_tpu.forward`."""
  count = walk.chunks(inputs)
  outs = walk.outputs(state, inputs, constants)
  a, b, c, n = len(state), len(inputs), len(constants), len(outs)
  kept = a if every else 0

  def kernel(*refs):
    state_in, inputs_in, constants_in, final, out, keep = _split(
      refs, a, b, c, a, n, kept
    )
    fixed = [x[...] for x in constants_in]

    def body(i, now):
      if keep:

        @pl.when(jax.lax.rem(i, every) == 0)
        def _():
          for k, s in zip(keep, now):
            k[jax.lax.div(i, every)] = s

      at = pl.ds(i * walk.size, walk.size)
      now, ys = walk.step(list(now), [x[at, :] for x in inputs_in], fixed)
      for o, y in zip(out, ys):
        o[at, :] = y
      return tuple(now)

    now = jax.lax.fori_loop(0, count, body, tuple(x[...] for x in state_in))
    for f, x in zip(final, now):
      f[...] = x

  s, i, k, o = walk.values
  length = count * walk.size
  out_shape = [
    *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state),
    *(jax.ShapeDtypeStruct((length,) + x.shape[1:], x.dtype) for x in outs),
  ]
  if kept:
    stack = -(-count // every)
    out_shape += [
      jax.ShapeDtypeStruct((stack,) + x.shape, x.dtype) for x in state
    ]
  out = _call(
    walk,
    kernel,
    "chunk_scan_forward",
    [*zip(state, s), *zip(inputs, i), *zip(constants, k)],
    [*zip(out_shape, [*s, *o, *(s if kept else ())])],
  )
  return _split(out, a, n, kept)


def backward(walk: Walk, starts, inputs, constants, d_state, d_outputs):
  """As `pallas_tpu.backward`."""
  count = walk.chunks(inputs)
  a, b, c, n = len(starts), len(inputs), len(constants), len(d_outputs)

  def kernel(*refs):
    parts = _split(refs, a, b, c, a, n, a, b, c)
    starts_in, inputs_in, constants_in, d_final, d_out = parts[:5]
    d_first, d_in, d_const = parts[5:]
    fixed = [x[...] for x in constants_in]

    def body(i, carry):
      d_now, total = carry
      i = count - 1 - i
      at = pl.ds(i * walk.size, walk.size)
      d_now, d_inputs, d_constants = walk.pull(
        [x[i] for x in starts_in],
        [x[at, :] for x in inputs_in],
        fixed,
        list(d_now),
        [x[at, :] for x in d_out],
      )
      for o, x in zip(d_in, d_inputs):
        o[at, :] = x.astype(o.dtype)
      total = [t + x.astype(t.dtype) for t, x in zip(total, d_constants)]
      return tuple(d_now), tuple(total)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in fixed)
    carry = tuple(x[...] for x in d_final), zeros
    d_now, total = jax.lax.fori_loop(0, count, body, carry)
    for o, x in zip(d_first, d_now):
      o[...] = x
    for o, x in zip(d_const, total):
      o[...] = x

  s, i, k, o = walk.values
  summed = [
    *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in d_state),
    *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs),
    *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in constants),
  ]
  has = [*s, *i, *k]
  blocks = walk.value_blocks
  if blocks > 1:  # a part of the sum from each block
    summed = [
      x if v else jax.ShapeDtypeStruct((blocks,) + x.shape, jnp.float32)
      for x, v in zip(summed, has)
    ]
  out = _call(
    walk,
    kernel,
    "chunk_scan_backward",
    [
      *zip(starts, s), *zip(inputs, i), *zip(constants, k), *zip(d_state, s),
      *zip(d_outputs, o),
    ],
    [*zip(summed, has)],
    parts=True,
  )  # fmt: skip
  if blocks > 1:
    out = [x if v else jnp.sum(x, axis=0) for x, v in zip(out, has)]
  like = [*d_state, *inputs, *constants]
  out = [x.astype(y.dtype) for x, y in zip(out, like)]
  return _split(out, a, b, c)


def _call(walk, kernel, name, inputs, outputs, parts=False):
  """A program for each value block.

  Args:
    walk: what is done.
    kernel: over references.
    name: of the kernel.
    inputs: (array, whether it has the value axis) each.
    outputs: (shape, the same) each.
    parts: what has no value axis has a leading axis of blocks.
  """
  blocks = walk.value_blocks

  def spec(x, values, part=False):
    shape = x.shape
    if values:
      shape = shape[:-1] + (shape[-1] // blocks,)
      return pl.BlockSpec(shape, lambda j: (0,) * (len(shape) - 1) + (j,))
    if part:
      return pl.BlockSpec(
        (None,) + shape[1:], lambda j: (j,) + (0,) * (len(shape) - 1)
      )
    return pl.BlockSpec(shape, lambda j: (0,) * len(shape))

  def traced(*refs):
    if walk.interpret:
      return kernel(*refs)
    with chunk.full_precision(TF32X3):
      return kernel(*refs)

  part = parts and blocks > 1
  return pl.pallas_call(
    traced,
    grid=(blocks,),
    in_specs=[spec(x, v) for x, v in inputs],
    out_specs=[spec(x, v, part) for x, v in outputs],
    out_shape=[x for x, _ in outputs],
    compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
    interpret=walk.interpret,
    name=name,
  )(*(x for x, _ in inputs))


def _split(items, *sizes):
  parts, at = [], 0
  for size in sizes:
    parts.append(list(items[at : at + size]))
    at += size
  return parts
