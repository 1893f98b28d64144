"""Chunks on a GPU (Triton): a loop inside the kernel, the carry in registers.

The value axis may be cut into blocks, each a program of its own: what has no
value axis is then given by every block, and summed.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp

from memzoo.kernels.chunk_scan import lists
from memzoo.ops import chunk

WARPS = 4
# Three products of matrix units in place of one without: float32's digits.
TF32X3 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def serial(
  fn, carry, stacked, fixed, outs, *, every=0, reverse=False, **options
):
  """As `pallas_tpu.serial`."""
  options = lists.Options(**options)
  count = stacked[0].shape[0]
  a, b, c, n = (len(x) for x in (carry, stacked, fixed, outs))
  kept = a if every else 0

  def kernel(*refs):
    first, one, same, final, out, keep = lists.split(refs, a, b, c, a, n, kept)
    same = [x[...] for x in same]

    def body(step, now):
      i = count - 1 - step if reverse else step
      if keep:

        @pl.when(jax.lax.rem(step, every) == 0)
        def _():
          for k, s in zip(keep, now):
            k[jax.lax.div(step, every)] = s

      now, ys = fn(list(now), [x[i] for x in one], same)
      for o, y in zip(out, ys):
        o[i] = y.astype(o.dtype)
      return tuple(now)

    now = jax.lax.fori_loop(0, count, body, tuple(x[...] for x in first))
    for f, x in zip(final, now):
      f[...] = x

  v = options.values or tuple(
    (False,) * len(x) for x in (carry, stacked, fixed, outs)
  )
  shapes = [
    *map(lists.like, carry), *(lists.stack(x, count) for x in outs),
    *(lists.stack(x, -(-count // max(every, 1))) for x in carry[:kept]),
  ]  # fmt: skip
  out = _call(
    options, kernel, options.blocks,
    [*zip(carry, v[0]), *zip(stacked, v[1]), *zip(fixed, v[2])],
    [*zip(shapes, (*v[0], *v[3], *v[0][:kept]))],
  )  # fmt: skip
  return lists.split(out, a, n, kept)


def parallel(fn, stacked, fixed, outs, **options):
  """As `pallas_tpu.parallel`: a chunk a program."""
  options = lists.Options(**options)
  count = stacked[0].shape[0]

  def kernel(*refs):
    one, same, out = lists.split(refs, len(stacked), len(fixed), len(outs))
    ys = fn([x[...] for x in one], [x[...] for x in same])
    for o, y in zip(out, ys):
      o[...] = y.astype(o.dtype)

  spec = lambda x: pl.BlockSpec((None, *x.shape[-2:]), lambda i: (i, 0, 0))
  return pl.pallas_call(
    _traced(options, kernel),
    grid=(count,),
    in_specs=[
      *map(spec, stacked),
      *(pl.BlockSpec(x.shape, lambda i: (0, 0)) for x in fixed),
    ],
    out_specs=[*map(spec, outs)],
    out_shape=[lists.stack(x, count) for x in outs],
    compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
    interpret=options.interpret,
    name=options.name,
  )(*stacked, *fixed)


def _traced(options, kernel):
  def traced(*refs):
    with chunk.wide_flags():
      if options.interpret:
        return kernel(*refs)
      with chunk.full_precision(TF32X3):
        return kernel(*refs)

  return traced


def _call(options, kernel, blocks, inputs, outputs):
  """A program for each value block, of arrays and whether they have V."""

  def spec(x, has):
    shape, zeros = x.shape, (0,) * (len(x.shape) - 1)
    if blocks > 1 and has:
      shape = shape[:-1] + (shape[-1] // blocks,)
      return pl.BlockSpec(shape, lambda j: zeros + (j,))
    return pl.BlockSpec(shape, lambda j: zeros + (0,))

  def part(x):  # of a sum over blocks
    zeros = (0,) * len(x.shape)
    return pl.BlockSpec((None, *x.shape), lambda j: (j,) + zeros)

  summed = [blocks > 1 and not has for _, has in outputs]
  out = pl.pallas_call(
    _traced(options, kernel),
    grid=(blocks,),
    in_specs=[spec(x, has) for x, has in inputs],
    out_specs=[
      part(x) if some else spec(x, has)
      for (x, has), some in zip(outputs, summed)
    ],
    out_shape=[
      jax.ShapeDtypeStruct((blocks, *x.shape), jnp.float32) if some else x
      for (x, _), some in zip(outputs, summed)
    ],
    compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
    interpret=options.interpret,
    name=options.name,
  )(*(x for x, _ in inputs))
  return [
    jnp.sum(x, axis=0).astype(y.dtype) if some else x
    for x, (y, _), some in zip(out, outputs, summed)
  ]
