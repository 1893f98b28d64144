"""The diagonal linear recurrence, h_t = a_t h_{t−1} + x_t, real or complex.

A kernel of its own: nothing is multiplied but entry by entry and nothing is
computed that is worth keeping on chip, so that what counts is to read x and a
and to write h once, and many of them at a time. Channels of one sequence lie
side by side and no sequence needs another as its row, so that the arrays stay
[B, T, N] as they are (`cell_scan` puts sequences side by side, [T, B, N]).

The gradient of the recurrence is the recurrence run backwards, and
`memzoo.ops.linear_recurrence` has it: this solves either direction.
"""

from functools import partial
from typing import NamedTuple

import jax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu, triton as plt
import jax.numpy as jnp

from memzoo.kernels.cell_scan import driver
from memzoo.kernels.interpret import interpreting

STEPS = 128  # in a TPU's block
GROUP = 8  # steps that its loop takes at once
LANES = dict(tpu=128, gpu=32)  # channels side by side
SUBLANES = 8  # of such in a TPU's block
AHEAD = 32  # steps that a GPU reads before it takes them


class Lanes(NamedTuple):
  """Solves h_t = M_t h_{t−1} + x_t by a kernel: a value.

  Attributes:
    platform: 'tpu' or 'gpu'.
    interpret: run by Pallas' interpreter.
  """

  platform: str
  interpret: bool

  @classmethod
  def make(cls) -> "Lanes":
    """For the platform at hand.

    Raises:
      NotImplementedError: on a platform without kernels.
    """
    return cls(driver.platform(), interpreting())

  def __call__(self, reverse, h, x, decay, reset, mask):
    """The state after each step, [T, N].

    Args:
      reverse: steps are taken from the last to the first.
      h: float32 or complex64 [N].
      x: [T, N] in h's dtype.
      decay: [T, N] or [N] in h's dtype.
      reset, mask: bool [T] or None. M is 0 at a reset, and 1 under mask False.
        A decay of zero forgets what is not finite too, as a reset does.
    """
    if reset is not None or mask is not None:
      decay = jnp.broadcast_to(decay, x.shape)
      if reset is not None:
        decay = jnp.where(reset[:, None], 0, decay)
      if mask is not None:
        decay = jnp.where(mask[:, None], decay, 1)
    parts = [_parts(y[None]) for y in (h, x, decay)]
    out = [y[0] for y in _mapped(self, reverse)(*parts)]
    return jax.lax.complex(*out) if len(out) == 2 else out[0]


def _parts(x):
  """[x], or its real and imaginary parts."""
  return [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]


def _mapped(lanes: Lanes, reverse: bool):
  """The solution for h [B, N], x [B, T, N], a [B, T, N] or [B, N], lists of
  parts; what `jax.vmap` maps goes into B."""
  solve = custom_vmap(partial(_solve, lanes, reverse))

  @solve.def_vmap
  def rule(size, batched, *args):
    def merge(x, b):
      x = x if b else jnp.broadcast_to(x, (size,) + x.shape)
      return x.reshape((-1,) + x.shape[2:])

    out = solve(*jax.tree.map(merge, list(args), list(batched)))
    out = [x.reshape((size, -1) + x.shape[1:]) for x in out]
    return out, [True] * len(out)

  return solve


def _solve(lanes, reverse, h, x, a):
  _, length, width = x[0].shape
  size = LANES[lanes.platform]
  if lanes.platform == "tpu":
    steps = min(STEPS, max(GROUP, 1 << (length - 1).bit_length()))
    some = size if width <= size * SUBLANES else size * SUBLANES
  else:
    steps = AHEAD // len(x)
    some = size
  more, late = -width % some, -length % steps

  def full(y, value):  # inert where a is 1 and x is 0
    pads = [(0, 0)] * y.ndim
    pads[-1] = (0, more)
    if y.ndim == 3:
      pads[1] = (0, late)
    return jnp.pad(y, pads, constant_values=value)

  h = [full(y, 0.0) for y in h]
  x = [full(y, 0.0) for y in x]
  a = [full(y, 1.0 - n) for n, y in enumerate(a)]
  run = _tpu if lanes.platform == "tpu" else _gpu
  return [y[:, :length, :width] for y in run(lanes, reverse, steps, h, x, a)]


def _next(h, a, x):
  """One step, on lists of parts."""
  if len(h) == 1:
    return [jnp.where(a[0] == 0, 0.0, a[0] * h[0]) + x[0]]
  nothing = (a[0] == 0) & (a[1] == 0)
  re = a[0] * h[0] - a[1] * h[1]
  im = a[0] * h[1] + a[1] * h[0]
  return [jnp.where(nothing, 0.0, y) + z for y, z in zip((re, im), x)]


def _gpu(lanes, reverse, steps, h, x, a):
  """A program for each sequence and 32 channels, its loop reading ahead."""
  batch, length, width = x[0].shape
  size, n, blocks = LANES["gpu"], len(x), length // steps
  constant = a[0].ndim == 2

  def kernel(*refs):
    h_in, x_in, a_in, out = (refs[n * i : n * (i + 1)] for i in range(4))
    fixed = [r[...] for r in a_in] if constant else None

    def body(i, now):
      first = (blocks - 1 - i if reverse else i) * steps
      times = [first + k for k in range(steps)]
      times = times[::-1] if reverse else times
      xs = [[r[t] for r in x_in] for t in times]
      decays = [fixed or [r[t] for r in a_in] for t in times]
      for t, y, decay in zip(times, xs, decays):
        now = _next(now, decay, y)
        for o, s in zip(out, now):
          o[t] = s
      return tuple(now)

    jax.lax.fori_loop(0, blocks, body, tuple(r[...] for r in h_in))

  def spec(y):
    if y.ndim == 3:
      return pl.BlockSpec((None, length, size), lambda b, j: (b, 0, j))
    return pl.BlockSpec((None, size), lambda b, j: (b, j))

  return pl.pallas_call(
    kernel,
    grid=(batch, width // size),
    in_specs=[spec(y) for y in (*h, *x, *a)],
    out_specs=[spec(y) for y in x],
    out_shape=[jax.ShapeDtypeStruct(y.shape, y.dtype) for y in x],
    compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
    interpret=lanes.interpret,
    name="linear_recurrence",
  )(*h, *x, *a)


def _tpu(lanes, reverse, steps, h, x, a):
  """A grid over sequences, channels and blocks of steps; up to 1024 channels
  of a step fill one register, [8, 128]."""
  batch, length, width = x[0].shape
  size, n, blocks = LANES["tpu"], len(x), length // steps
  tall = min(width // size, SUBLANES)
  folded = lambda y: y.reshape(y.shape[:-1] + (-1, size))
  h, x, a = ([folded(y) for y in ys] for ys in (h, x, a))
  constant = a[0].ndim == 3

  def kernel(*refs):
    parts = (refs[n * i : n * (i + 1)] for i in range(5))
    h_in, x_in, a_in, out, carry = parts

    @pl.when(pl.program_id(2) == 0)
    def _():
      for c, r in zip(carry, h_in):
        c[...] = r[...]

    fixed = [r[...] for r in a_in] if constant else None

    def body(i, now):
      for k in range(GROUP):
        t = i * GROUP + k
        t = steps - 1 - t if reverse else t
        decay = fixed or [r[t] for r in a_in]
        now = _next(now, decay, [r[t] for r in x_in])
        for o, s in zip(out, now):
          o[t] = s
      return tuple(now)

    now = jax.lax.fori_loop(
      0, steps // GROUP, body, tuple(c[...] for c in carry)
    )
    for c, s in zip(carry, now):
      c[...] = s

  step = (lambda i: blocks - 1 - i) if reverse else (lambda i: i)

  def spec(y):
    if y.ndim == 4:
      block = (None, steps, tall, size)
      return pl.BlockSpec(block, lambda b, j, i: (b, step(i), j, 0))
    return pl.BlockSpec((None, tall, size), lambda b, j, i: (b, j, 0))

  out = pl.pallas_call(
    kernel,
    grid=(batch, width // (size * tall), blocks),
    in_specs=[spec(y) for y in (*h, *x, *a)],
    out_specs=[spec(y) for y in x],
    out_shape=[jax.ShapeDtypeStruct(y.shape, y.dtype) for y in x],
    scratch_shapes=[pltpu.VMEM((tall, size), y.dtype) for y in x],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    interpret=lanes.interpret,
    name="linear_recurrence",
  )(*h, *x, *a)
  return [y.reshape(y.shape[:2] + (-1,)) for y in out]
