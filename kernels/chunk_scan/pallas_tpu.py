"""Chunks on a TPU: a grid over them, what is carried in VMEM."""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memzoo.kernels.chunk_scan import lists


def serial(
  fn, carry, stacked, fixed, outs, *, every=0, reverse=False, **options
):
  """A walk over chunks, one after the other.

  Args:
    fn: (carry, of one chunk, fixed) -> (carry, outs), on lists of tiles.
    carry: tiles [M, N].
    stacked: [n, M, N], of every chunk.
    fixed: tiles.
    outs: shapes and dtypes of what a chunk gives.
    every: chunks between two carries that are kept; 0 keeps none.
    reverse: from the last chunk to the first.
    **options: of `lists.Options`.

  Returns:
    (carry, outs [n, M, N], kept [⌈n / every⌉, M, N]), lists.
  """
  options = lists.Options(**options)
  count = stacked[0].shape[0]
  sizes = [len(x) for x in (carry, stacked, fixed, outs)]
  a, b, c, n = sizes
  kept = a if every else 0

  def kernel(*refs):
    first, one, same, final, out, keep, now = lists.split(
      refs, a, b, c, a, n, kept, a
    )
    i = pl.program_id(0)

    @pl.when(i == 0)
    def _():
      for s, x in zip(now, first):
        s[...] = x[...]

    before = [s[...] for s in now]
    if keep:

      @pl.when(jax.lax.rem(i, every) == 0)
      def _():
        for k, s in zip(keep, before):
          k[...] = s

    after, ys = fn(before, [x[...] for x in one], [x[...] for x in same])
    for s, x in zip(now, after):
      s[...] = x
    for o, y in zip(out, ys):
      o[...] = y.astype(o.dtype)

    @pl.when(i == count - 1)
    def _():
      for f, x in zip(final, after):
        f[...] = x

  def spec(x, index):  # one of a stack
    return pl.BlockSpec((None, *x.shape[-2:]), lambda i: (index(i), 0, 0))

  at = (lambda i: count - 1 - i) if reverse else (lambda i: i)
  group = lambda i: jax.lax.div(i, every)
  whole = lambda x: pl.BlockSpec(x.shape, lambda i: (0, 0))
  out = pl.pallas_call(
    kernel,
    grid=(count,),
    in_specs=[
      *map(whole, carry), *(spec(x, at) for x in stacked), *map(whole, fixed)
    ],
    out_specs=[
      *map(whole, carry), *(spec(x, at) for x in outs),
      *(spec(x, group) for x in carry[:kept]),
    ],
    out_shape=[
      *map(lists.like, carry), *(lists.stack(x, count) for x in outs),
      *(lists.stack(x, -(-count // max(every, 1))) for x in carry[:kept]),
    ],
    scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in carry],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    interpret=options.interpret,
    name=options.name,
  )(*carry, *stacked, *fixed)  # fmt: skip
  return lists.split(out, a, n, kept)


def parallel(fn, stacked, fixed, outs, **options):
  """Chunks side by side.

  Args:
    fn: (of one chunk, fixed) -> outs.
    stacked, fixed, outs, **options: as for `serial`.

  Returns:
    outs [n, M, N].
  """
  options = lists.Options(**options)
  count = stacked[0].shape[0]

  def kernel(*refs):
    one, same, out = lists.split(refs, len(stacked), len(fixed), len(outs))
    ys = fn([x[...] for x in one], [x[...] for x in same])
    for o, y in zip(out, ys):
      o[...] = y.astype(o.dtype)

  spec = lambda x: pl.BlockSpec((None, *x.shape[-2:]), lambda i: (i, 0, 0))
  return pl.pallas_call(
    kernel,
    grid=(count,),
    in_specs=[
      *map(spec, stacked),
      *(pl.BlockSpec(x.shape, lambda i: (0, 0)) for x in fixed),
    ],
    out_specs=[*map(spec, outs)],
    out_shape=[lists.stack(x, count) for x in outs],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    interpret=options.interpret,
    name=options.name,
  )(*stacked, *fixed)
