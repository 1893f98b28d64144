"""The walk on a TPU: a sequential grid over chunks, the state in VMEM."""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from memzoo.kernels.chunk_scan.walk import Walk


def forward(walk: Walk, state, inputs, constants, every: int):
  """Values, and the state at every `every`-th chunk's start.

  Args:
    walk: what is done.
    state: float tiles [M, N], a list.
    inputs: columns [T, N], T a multiple of C, a list.
    constants: tiles, a list.
    every: chunks between two states that are kept; 0 keeps none.

  Returns:
    (state, outputs [T, N], kept [⌈T / C every⌉, M, N]), lists.
  """
  count = walk.chunks(inputs)
  outs = walk.outputs(state, inputs, constants)
  a, b, c, n = len(state), len(inputs), len(constants), len(outs)
  kept = a if every else 0

  def kernel(*refs):
    refs = _split(refs, a, b, c, a, n, kept, a)
    state_in, inputs_in, constants_in, final, out, keep, scratch = refs
    i = pl.program_id(0)

    @pl.when(i == 0)
    def _():
      for s, x in zip(scratch, state_in):
        s[...] = x[...]

    now = [s[...] for s in scratch]
    if keep:

      @pl.when(i % every == 0)
      def _():
        for k, s in zip(keep, now):
          k[0] = s

    new, ys = walk.step(now, _load(inputs_in), _load(constants_in))
    for s, x in zip(scratch, new):
      s[...] = x
    for o, y in zip(out, ys):
      o[...] = y

    @pl.when(i == count - 1)
    def _():
      for f, x in zip(final, new):
        f[...] = x

  step = lambda i: (i, 0)
  out = pl.pallas_call(
    kernel,
    grid=(count,),
    in_specs=[
      *map(_whole, state),
      *(_chunk(walk, x, step) for x in inputs),
      *map(_whole, constants),
    ],
    out_specs=[
      *map(_whole, state),
      *(_chunk(walk, x, step) for x in outs),
      *(
        [_kept(x, lambda i: (i // every, 0, 0)) for x in state] if kept else []
      ),
    ],
    out_shape=[
      *map(_like, state),
      *(_rows(x, count * walk.size) for x in outs),
      *([_states(x, -(-count // every)) for x in state] if kept else []),
    ],
    scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in state],
    compiler_params=_sequential(),
    interpret=walk.interpret,
    name="chunk_scan_forward",
  )(*state, *inputs, *constants)
  return _split(out, a, n, kept)


def backward(walk: Walk, starts, inputs, constants, d_state, d_outputs):
  """Gradients, from the state at every chunk's start.

  Args:
    walk: what is done.
    starts: [T / C, M, N], a list.
    inputs: columns [T, N].
    constants: tiles.
    d_state: of the final state.
    d_outputs: [T, N].

  Returns:
    (d_state, d_inputs, d_constants), lists.
  """
  count = walk.chunks(inputs)
  a, b, c, n = len(starts), len(inputs), len(constants), len(d_outputs)

  def kernel(*refs):
    refs = _split(refs, a, b, c, a, n, a, b, c, a, c)
    starts_in, inputs_in, constants_in, d_final, d_out = refs[:5]
    d_first, d_in, d_const, carry, total = refs[5:]
    i = pl.program_id(0)

    @pl.when(i == 0)
    def _():
      for s, x in zip(carry, d_final):
        s[...] = x[...]
      for s in total:
        s[...] = jnp.zeros(s.shape, s.dtype)

    d_now, d_inputs, d_constants = walk.pull(
      [x[0] for x in starts_in],
      _load(inputs_in),
      _load(constants_in),
      _load(carry),
      _load(d_out),
    )
    for s, x in zip(carry, d_now):
      s[...] = x
    for o, x in zip(d_in, d_inputs):
      o[...] = x.astype(o.dtype)
    for s, x in zip(total, d_constants):
      s[...] += x.astype(s.dtype)

    @pl.when(i == count - 1)
    def _():
      for o, x in zip(d_first, d_now):
        o[...] = x
      for o, s in zip(d_const, total):
        o[...] = s[...]

  back = lambda i: (count - 1 - i, 0)
  out = pl.pallas_call(
    kernel,
    grid=(count,),
    in_specs=[
      *(_kept(x, lambda i: (count - 1 - i, 0, 0), True) for x in starts),
      *(_chunk(walk, x, back) for x in inputs),
      *map(_whole, constants),
      *map(_whole, d_state),
      *(_chunk(walk, x, back) for x in d_outputs),
    ],
    out_specs=[
      *map(_whole, d_state),
      *(_chunk(walk, x, back) for x in inputs),
      *map(_whole, constants),
    ],
    out_shape=[
      *map(_like, d_state),
      *map(_like, inputs),
      *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in constants),
    ],
    scratch_shapes=[
      *(pltpu.VMEM(x.shape, x.dtype) for x in d_state),
      *(pltpu.VMEM(x.shape, jnp.float32) for x in constants),
    ],
    compiler_params=_sequential(),
    interpret=walk.interpret,
    name="chunk_scan_backward",
  )(*starts, *inputs, *constants, *d_state, *d_outputs)
  d_state, d_inputs, d_constants = _split(out, a, b, c)
  return (
    d_state,
    d_inputs,
    [d.astype(x.dtype) for d, x in zip(d_constants, constants)],
  )


def _sequential():
  return pltpu.CompilerParams(dimension_semantics=("arbitrary",))


def _split(items, *sizes):
  parts, at = [], 0
  for size in sizes:
    parts.append(list(items[at : at + size]))
    at += size
  return parts


def _load(refs):
  return [ref[...] for ref in refs]


def _like(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _rows(x, length):
  return jax.ShapeDtypeStruct((length,) + x.shape[1:], x.dtype)


def _states(x, count):
  return jax.ShapeDtypeStruct((count,) + x.shape, x.dtype)


def _whole(x):
  return pl.BlockSpec(x.shape, lambda i: (0,) * len(x.shape))


def _chunk(walk, x, index):
  return pl.BlockSpec((walk.size,) + x.shape[1:], index)


def _kept(x, index, stacked=False):
  return pl.BlockSpec((1,) + (x.shape[1:] if stacked else x.shape), index)
