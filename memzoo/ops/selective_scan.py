"""Mamba's scan: a diagonal recurrence whose step size is chosen by the input.

  h_t = exp(Δ_t ⊗ A) ⊙ h_{t−1} + (Δ_t ⊙ x_t) B_tᵀ ,   y_t = h_t C_t

with Δ here `dt`. Decays and writes are made from dt, A and B inside a block of
steps, and again in its backward: nothing of shape [T, D, N] is ever built.
Source: Gu and Dao 2023, arXiv:2312.00752, eq. 2 and 4, algorithm 2 and section
3.3.2; the write Δ B x is what the authors compute in place of (4)'s exact
integral.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.ops import arguments, chunk
from memzoo.ops.linear_recurrence import (
  FUNCTION as RECURRENCE,
  Inputs as RecurrenceInputs,
  Local as RecurrenceLocal,
  linear_recurrence,
)

BLOCK_SIZE = 64  # at most so many steps between two states that are kept
CHUNK_SIZE = 16


def even_blocks(length: int) -> int:
  """The size of equal blocks, at most `BLOCK_SIZE`, with the least padding."""
  count = max(1, -(-length // BLOCK_SIZE))
  return max(1, -(-length // count))


def step(h, x, dt, a, b, c):
  """One step: h [D, N], x [D], dt [D], a [D, N], b [N], c [N] ->
  (h [D, N], y [D] in x's dtype)."""
  decay, write = _discretize(x, dt, a, b)
  h = decay * h + write
  return h, (h @ c.astype(h.dtype)).astype(x.dtype)


def selective_scan(
  h: axes.Matrix,
  x: axes.Xs,
  dt: axes.Xs,
  a: axes.Matrix,
  b: axes.Hiddens,
  c: axes.Hiddens,
  *,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: axes.Matrix | None = None,
  implementation: str | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[axes.Matrix, axes.Xs]:
  """The selective scan over one sequence.

  Args:
    h: float32 [D, N], the state to go on from.
    x: [T, D].
    dt: [T, D], positive: what softplus made of it. 0 leaves the channel of the
      state as it is.
    a: [D, N], negative.
    b: [T, N], what is written.
    c: [T, N], what is read.
    reset: bool [T]; True: the state is `fresh` before step t.
    mask: bool [T]; False: no step t; the output there is zero.
    fresh: [D, N], zeros by default.
    implementation: 'scan' (the step loop, in checkpointed blocks; with N = 1
      a linear recurrence),
      'chunk' (an associative scan in checkpointed chunks), or None.
    chunk_size: C of the chunk form, a power of two. A chunk holds a few
      [C, D, N] at a time.

  Returns:
    (state float32 [D, N], y [T, D] in x's dtype). The skip D ⊙ x is the
    caller's.

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a form that does not exist.
  """
  _check(h, x, dt, a, b, c, reset, mask, fresh)
  chunk.power_of_two("chunk_size", chunk_size)
  if mask is not None and reset is not None:
    reset = reset & mask
  inputs = Inputs(x, dt, b, c, reset, mask)

  def scan():
    if h.shape[1] == 1:
      return _thin(h, inputs, (a, fresh))
    size = even_blocks(x.shape[0])
    return chunk.run(_block, h, inputs, (a, fresh), chunk_size=size)

  forms = {
    "scan": scan,
    "chunk": lambda: chunk.run(
      FUNCTION, h, inputs, (a, fresh), chunk_size=chunk_size
    ),
  }
  return dispatch.run("selective_scan", forms, implementation)


def _check(h, x, dt, a, b, c, reset, mask, fresh):
  who = "selective_scan"
  if jnp.ndim(x) != 2:
    arguments.fail(who, "x", "floating [T, D]; jax.vmap batches", x)
  if jnp.ndim(h) != 2:
    arguments.fail(who, "h", "float32 [D, N]", h)
  length, width = jnp.shape(x)
  states = jnp.shape(h)[1]
  arguments.check_array(who, "x", x, (length, width))
  if jnp.shape(h)[0] != width or jnp.result_type(h) != jnp.float32:
    arguments.fail(who, "h", f"float32 [{width}, N]", h)
  arguments.check_array(who, "dt", dt, (length, width))
  arguments.check_array(who, "a", a, (width, states))
  arguments.check_array(who, "b", b, (length, states))
  arguments.check_array(who, "c", c, (length, states))
  arguments.check_flags(who, length, reset, mask)
  if fresh is not None:
    arguments.check_array(who, "fresh", fresh, (width, states))


class Inputs(NamedTuple):
  x: jax.Array
  dt: jax.Array
  b: jax.Array
  c: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


def _discretize(x, dt, a, b):
  """Decay and write, [..., D, N] each, in float32."""
  x, dt, a, b = (y.astype(jnp.float32) for y in (x, dt, a, b))
  return jnp.exp(dt[..., None] * a), (dt * x)[..., None] * b[..., None, :]


def _block(h, inputs: Inputs, constants):
  a, fresh = constants
  return arguments.scan_steps(
    lambda h, i: step(h, i.x, i.dt, a, i.b, i.c), h, inputs, fresh
  )


def _thin(h, inputs: Inputs, constants):
  """With N = 1 decays and writes are no larger than x: a linear recurrence
  takes them as they are."""
  a, fresh = constants
  x, dt, b, c, reset, mask = inputs
  if mask is not None:
    x, dt, b, c = (jnp.where(mask[:, None], y, 0) for y in (x, dt, b, c))
  decay, write = _discretize(x, dt, a, b)
  state, states = linear_recurrence(
    h[:, 0], write[..., 0], decay=decay[..., 0], reset=reset, mask=mask,
    fresh=None if fresh is None else fresh[:, 0], implementation="scan",
  )  # fmt: skip
  return state[:, None], (states * c.astype(h.dtype)).astype(x.dtype)


class Local(NamedTuple):
  """What a chunk does to the state before it, with D N in one axis."""

  states: RecurrenceLocal
  c: jax.Array  # [C, N]
  x: jax.Array  # for its dtype


def _prepare(inputs: Inputs, constants) -> Local:
  a, fresh = constants
  x, dt, b, c, reset, mask = inputs
  if mask is not None:
    x, dt, b, c = (jnp.where(mask[:, None], y, 0) for y in (x, dt, b, c))
  decay, write = _discretize(x, dt, a, b)
  if fresh is not None and reset is not None:
    at = reset[:, None, None]
    write += jnp.where(at, decay, 0) * fresh.astype(jnp.float32)
  flat = lambda y: y.reshape(y.shape[0], -1)
  states = RECURRENCE.prepare(
    RecurrenceInputs(flat(write), flat(decay), reset, mask), None
  )
  return Local(states, c.astype(jnp.float32), x)


def _effect(local: Local):
  return RECURRENCE.effect(local.states)


def _apply(effect, h):
  new = RECURRENCE.apply(effect, h.reshape(-1))
  return new.reshape(h.shape)


def _advance(h, local: Local):
  return _apply(_effect(local), h)


def _emit(h, local: Local):
  states = RECURRENCE.emit(h.reshape(-1), local.states)
  states = states.reshape((-1,) + h.shape)
  y = jnp.einsum("cdn,cn->cd", states, local.c, precision="highest")
  return y.astype(local.x.dtype)


FUNCTION = chunk.ChunkFunction(
  _prepare,
  _advance,
  _emit,
  _effect,
  RECURRENCE.compose,
  _apply,
)
