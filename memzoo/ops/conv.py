"""Causal convolution of W taps, depthwise, with its state.

  y_t = Σ_w kernel_w ⊙ x_{t−W+1+w} + bias ,  w = 0 … W − 1

The state is the last W − 1 inputs. It resets, and inputs that are not there
are skipped, as everywhere: the taps before a reset are zero, and the taps of
step t are the last W inputs that exist.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.ops import arguments


def empty(kernel: jax.Array, dtype=jnp.float32) -> jax.Array:
  """The state before the first input: zeros [W − 1, D]."""
  return jnp.zeros((kernel.shape[0] - 1, kernel.shape[1]), dtype)


def step(state, x, kernel, bias=None):
  """One input: (state [W − 1, D], x [D]) -> (state, y [D])."""
  taps = jnp.concatenate([state, x[None].astype(state.dtype)])
  return taps[1:], _taps_to_output(taps[:, None], kernel, bias, x.dtype)[0]


def conv(
  state: jax.Array,
  x: axes.Xs,
  kernel: jax.Array,
  bias: jax.Array | None = None,
  *,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, axes.Xs]:
  """A causal depthwise convolution over one sequence.

  Args:
    state: [W − 1, D], as `empty` makes it; x's dtype.
    x: [T, D].
    kernel: [W, D]; the last row meets the newest input.
    bias: [D] or None.
    reset: bool [T]; True: the inputs before step t are forgotten.
    mask: bool [T]; False: no step t.
    implementation: 'scan', 'chunk' (the whole sequence at once, W times),
      'fft' (the same by Fourier transforms, for as many taps as there are
      steps: no reset, and an output feels later inputs by about 1e-7 of their
      size), or None.

  Returns:
    (state [W − 1, D], y [T, D] in x's dtype).

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a reset in the 'fft' form.
  """
  if jnp.ndim(x) != 2:
    arguments.fail("conv", "x", "floating [T, D]", x)
  length, width = x.shape
  arguments.check_array("conv", "x", x, (length, width))
  arguments.check_array("conv", "kernel", kernel, (None, width))
  taps = kernel.shape[0]
  arguments.check_array("conv", "state", state, (taps - 1, width))
  if bias is not None:
    arguments.check_array("conv", "bias", bias, (width,))
  arguments.check_flags("conv", length, reset, mask)
  if mask is not None and reset is not None:
    reset = reset & mask
  inputs = Inputs(x, reset, mask)
  forms = {
    "scan": lambda: arguments.scan_steps(
      lambda s, i: step(s, i.x, kernel, bias), state, inputs, None
    ),
    "chunk": lambda: _whole(state, inputs, kernel, bias),
    "fft": lambda: _whole(state, inputs, kernel, bias, fourier=True),
  }
  return dispatch.run("conv", forms, implementation)


def shift(last, x, *, reset=None, mask=None):
  """The last input and the input before each: zeros before the first one.

  Args:
    last: float32 [D], the input before x.
    x: [T, D].
    reset: bool [T] or None.
    mask: bool [T] or None.

  Returns:
    ([D] float32, [T, D] in x's dtype).
  """
  rows = jnp.concatenate([last[None], x.astype(last.dtype)])
  end, before = rows[-1], rows[:-1]
  if mask is not None:
    newest = jax.lax.cummax(jnp.where(mask, jnp.arange(1, len(rows)), 0))
    end, before = rows[newest[-1]], rows[jnp.roll(newest, 1).at[0].set(0)]
    reset = None if reset is None else reset & mask
  if reset is not None:
    before = jnp.where(reset[:, None], 0, before)
  return end, before.astype(x.dtype)


class Inputs(NamedTuple):
  x: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


def _whole(state, inputs: Inputs, kernel, bias, fourier: bool = False):
  x, reset, mask = inputs
  if fourier and reset is not None:
    raise NotImplementedError(
      "a Fourier transform of the whole sequence cannot reset; use 'scan' or "
      "'chunk', or one call for each document"
    )
  length, taps = x.shape[0], kernel.shape[0]
  dtype = x.dtype
  count = length
  if mask is not None:
    # Inputs that exist are moved together, and the outputs moved back.
    place = jnp.cumsum(mask.astype(jnp.int32)) - 1
    target = jnp.where(mask, place, length)
    x = jnp.zeros_like(x).at[target].set(x, mode="drop")
    if reset is not None:
      reset = jnp.zeros_like(reset).at[target].set(reset, mode="drop")
    count = place[-1] + 1
  rows = jnp.concatenate([state, x.astype(state.dtype)])
  index = jnp.arange(length)
  segment = None
  if reset is not None:
    segment = jnp.concatenate(
      [jnp.zeros((taps - 1,), jnp.int32), jnp.cumsum(reset.astype(jnp.int32))]
    )
  if fourier:
    y = _fourier(rows, kernel, bias, dtype)
  else:
    windows = [rows[w : w + length] for w in range(taps)]
    if segment is not None:
      here = segment[taps - 1 :]
      windows = [
        jnp.where((segment[w : w + length] == here)[:, None], r, 0)
        for w, r in enumerate(windows)
      ]
    y = _taps_to_output(jnp.stack(windows), kernel, bias, dtype)
  last = jax.lax.dynamic_slice_in_dim(rows, count, taps - 1)
  if segment is not None:
    held = jax.lax.dynamic_slice_in_dim(segment, count, taps - 1)
    # `count` inputs in, the newest row of `rows` is count + taps − 2.
    now = segment[count + taps - 2]
    last = jnp.where((held == now)[:, None], last, 0)
  if mask is not None:
    y = jnp.where(mask[:, None], y[jnp.where(mask, place, index)], 0)
  return last, y


def _fourier(rows, kernel, bias, dtype):
  """rows [W − 1 + T, D], kernel [W, D] -> [T, D]."""
  # Circular: what wraps around meets the first W − 1 outputs alone.
  size = rows.shape[0]
  spectrum = lambda x: jnp.fft.rfft(x.astype(jnp.float32), n=size, axis=0)
  y = jnp.fft.irfft(spectrum(rows) * spectrum(kernel[::-1]), n=size, axis=0)
  y = y[kernel.shape[0] - 1 :]
  if bias is not None:
    y = y + bias.astype(jnp.float32)
  return y.astype(dtype)


def _taps_to_output(taps, kernel, bias, dtype):
  """taps [W, T, D], kernel [W, D] -> [T, D]."""
  y = jnp.sum(
    taps.astype(jnp.float32) * kernel.astype(jnp.float32)[:, None], axis=0
  )
  if bias is not None:
    y = y + bias.astype(jnp.float32)
  return y.astype(dtype)
