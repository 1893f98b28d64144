"""Diagonal linear recurrence: h_t = a_t ⊙ h_{t−1} + x_t, real or complex.

The decay a is given at every step, or once for all of them (time invariant).
Sources: Blelloch 1990, "Prefix Sums and Their Applications" (the associative
operator); Martin and Cundy 2018, arXiv:1709.04057, section 2.2 (the gradient
is the same recurrence, run backwards).

The gradient is written out: it keeps the states and the decays, and nothing of
a form's inner steps. It serves reverse mode, to any order; forward mode
(`jax.jvp`, `jax.hessian`) raises.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.kernels.cell_scan import Lanes
from memzoo.ops import arguments, chunk

CHUNK_SIZE = 16


def step(h, x, decay):
  """One step: h [N], x [N], decay [N] -> (h, h)."""
  h = decay * h + x
  return h, h


def linear_recurrence(
  h: axes.Hidden,
  x: axes.Hiddens,
  *,
  decay: axes.Hiddens | axes.Hidden,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: axes.Hidden | None = None,
  implementation: str | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[axes.Hidden, axes.Hiddens]:
  """The recurrence over one sequence.

  Args:
    h: float32 or complex64 [N], the state to go on from.
    x: [T, N]; real, or complex where h is.
    decay: [T, N], or [N] for the same at every step; real, or complex where h
      is.
    reset: bool [T]; True: the state is `fresh` before step t.
    mask: bool [T]; False: no step t; the output there is zero.
    fresh: [N], zeros by default.
    implementation: 'scan' (the step loop), 'assoc' (an associative scan over
      the sequence), 'chunk' (the same inside chunks, and a walk over their
      boundaries), 'pallas' (the step loop as one kernel), or None.
    chunk_size: C of the chunk form, a power of two.

  Returns:
    (state [N], states [T, N] after each step), both in h's dtype.

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a form that does not exist or does not serve.
  """
  _check(h, x, decay, reset, mask, fresh)
  chunk.power_of_two("chunk_size", chunk_size)
  if not x.shape[0]:
    return h, jnp.zeros_like(x, dtype=h.dtype)
  x, decay = x.astype(h.dtype), decay.astype(h.dtype)
  if mask is not None:
    reset = None if reset is None else reset & mask
    x = jnp.where(mask[:, None], x, 0)
  if fresh is not None and reset is not None:
    into = decay
    if decay.ndim == 2:
      into = jnp.where(reset[:, None], decay, 0)
    x += jnp.where(reset[:, None], into * fresh.astype(h.dtype), 0)

  def form(solve):
    states = _recur(solve, False, h, x, decay, reset, mask)
    outputs = states
    if mask is not None:
      outputs = jnp.where(mask[:, None], states, 0)
    return states[-1], outputs

  forms = {
    "scan": lambda: form(_scan),
    "assoc": lambda: form(_assoc),
    "chunk": lambda: form(Chunks(chunk_size)),
    "pallas": lambda: form(Lanes.make()),
  }
  return dispatch.run("linear_recurrence", forms, implementation)


def _check(h, x, decay, reset, mask, fresh):
  who = "linear_recurrence"
  kind = jnp.inexact if jnp.iscomplexobj(h) else jnp.floating
  if jnp.ndim(x) != 2:
    arguments.fail(who, "x", f"{kind.__name__} [T, N]; jax.vmap batches", x)
  length, width = jnp.shape(x)
  if jnp.shape(h) != (width,) or jnp.result_type(h) not in (
    jnp.float32,
    jnp.complex64,
  ):
    arguments.fail(who, "h", f"float32 or complex64 [{width}]", h)
  arguments.check_array(who, "x", x, (length, width), kind)
  want = (width,) if jnp.ndim(decay) == 1 else (length, width)
  arguments.check_array(who, "decay", decay, want, kind)
  arguments.check_flags(who, length, reset, mask)
  if fresh is not None:
    arguments.check_array(who, "fresh", fresh, (width,), kind)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recur(solve, reverse, h, x, decay, reset, mask):
  """The state after each step, there or not: h_t = M_t h_{t−1} + x_t.

  M_t is a_t, 0 at a reset, 1 under mask False. With `reverse` the steps are
  taken from the last to the first.
  """
  return solve(reverse, h, x, decay, reset, mask)


def _recur_fwd(solve, reverse, h, x, decay, reset, mask):
  states = _recur(solve, reverse, h, x, decay, reset, mask)
  return states, (h, states, decay, reset, mask)


def _recur_bwd(solve, reverse, kept, g):
  h, states, decay, reset, mask = kept
  first = -1 if reverse else 0

  def moved(y, at_end):  # y of the step that comes after
    end = jnp.full_like(y[:1], at_end)
    return jnp.concatenate([end, y[:-1]] if reverse else [y[1:], end])

  d_x = _recur(
    solve,
    not reverse,
    jnp.zeros_like(h),
    g,
    moved(decay, 1) if decay.ndim == 2 else decay,
    None if reset is None else moved(reset, False),
    None if mask is None else moved(mask, True),
  )
  before = (
    jnp.concatenate([states[1:], h[None]])
    if reverse
    else jnp.concatenate([h[None], states[:-1]])
  )
  seen = None
  if reset is not None:
    seen = ~reset
  if mask is not None:
    seen = mask if seen is None else mask & seen
  if seen is not None:
    before = jnp.where(seen[:, None], before, 0)
  d_decay = d_x * before
  a = decay if decay.ndim == 1 else decay[first]
  if decay.ndim == 1:
    d_decay = jnp.sum(d_decay, axis=0)
  d_h = _through(
    d_x[first],
    a,
    None if reset is None else reset[first],
    None if mask is None else mask[first],
  )
  return d_h, d_x, d_decay, None, None


_recur.defvjp(_recur_fwd, _recur_bwd)


def _through(h, decay, reset, mask):
  """M h of one step: h [N], decay [N], reset and mask bool [] or None."""
  new = decay * h
  if reset is not None:
    new = jnp.where(reset, 0, new)
  if mask is not None:
    new = jnp.where(mask, new, h)
  return new


class Inputs(NamedTuple):
  x: jax.Array
  decay: jax.Array | None  # None: the same at every step, in `constants`
  reset: jax.Array | None
  mask: jax.Array | None


def _scan(reverse, h, x, decay, reset, mask):
  inputs = Inputs(x, decay if decay.ndim == 2 else None, reset, mask)

  def body(h, i):
    a = decay if i.decay is None else i.decay
    h = _through(h, a, i.reset, i.mask) + i.x
    return h, h

  return jax.lax.scan(body, h, inputs, reverse=reverse)[1]


def _assoc(reverse, h, x, decay, reset, mask):
  inputs = Inputs(x, decay if decay.ndim == 2 else None, reset, mask)
  return _emit(h, _prepare(inputs, decay, reverse))


class Chunks(NamedTuple):
  """The chunk form: as `_assoc`, in chunks of `size` steps."""

  size: int

  def __call__(self, reverse, h, x, decay, reset, mask):
    inputs = Inputs(x, decay if decay.ndim == 2 else None, reset, mask)
    if reverse:
      inputs = jax.tree.map(lambda y: y[::-1], inputs)
    states = chunk.run(FUNCTION, h, inputs, decay, chunk_size=self.size)[1]
    return states[::-1] if reverse else states


class Local(NamedTuple):
  """What a run of steps does to the state before it, after each step."""

  decay: jax.Array  # [C, N] what is left of it
  x: jax.Array  # [C, N] what was added
  cut: jax.Array | None  # bool [C, 1] a reset came between


def _prepare(inputs: Inputs, constants, reverse: bool = False) -> Local:
  decay = constants if inputs.decay is None else inputs.decay
  decay = jnp.broadcast_to(decay, inputs.x.shape)
  if inputs.mask is not None:
    decay = jnp.where(inputs.mask[:, None], decay, 1)
  cut = None
  if inputs.reset is not None:
    cut = inputs.reset[:, None]
    if inputs.mask is not None:
      cut &= inputs.mask[:, None]
    decay = jnp.where(cut, 0, decay)
  return Local(
    *jax.lax.associative_scan(_compose, (decay, inputs.x, cut), reverse=reverse)
  )


def _effect(local: Local):
  return jax.tree.map(lambda y: y[-1], tuple(local))


def _compose(first, second):
  decay, x, cut = first
  if cut is not None:
    # Zeroed before it is multiplied: infinities stop at a reset.
    decay = jnp.where(second[2], 0, decay)
    x = jnp.where(second[2], 0, x)
    cut = cut | second[2]
  return second[0] * decay, second[0] * x + second[1], cut


def _apply(effect, h):
  decay, x, cut = effect
  if cut is not None:
    h = jnp.where(cut, 0, h)
  return decay * h + x


def _advance(h, local: Local):
  return _apply(_effect(local), h)


def _emit(h, local: Local):
  return _apply(local, h)


FUNCTION = chunk.ChunkFunction(
  _prepare, _advance, _emit, _effect, _compose, _apply
)
