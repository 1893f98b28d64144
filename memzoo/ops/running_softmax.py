"""The weights of a softmax that grows with the sequence, channel by channel.

  z_t = logaddexp(z_{t−1}, k_t)                 the log of Σ_{i <= t} exp(k_i)
  a_t = exp(z_{t−1} − z_t) ,  w_t = exp(k_t − z_t) ,  a_t + w_t = 1

A sum that decays by a_t and to which w_t v_t is added is, at every t, the mean
of v under softmax(k_1 … k_t). Source: Qin et al. 2024, arXiv:2405.21022, the
additive recurrence of section 3 in its stable form.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.ops import arguments, chunk

CHUNK_SIZE = 16


def empty(width: int) -> jax.Array:
  """The state before the first step: log 0 in every channel."""
  return jnp.full((width,), -jnp.inf, jnp.float32)


def step(z, k):
  """One step: (z [K], k [K]) -> (z, (log a [K], w [K]))."""
  k = k.astype(z.dtype)
  new = _add(z, k)
  return new, (_minus(z, new), jnp.exp(_minus(k, new)))


def running_softmax(
  z: axes.Hidden,
  k: axes.Keys,
  *,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: axes.Hidden | None = None,
  implementation: str | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[axes.Hidden, tuple[axes.Keys, axes.Keys]]:
  """Decays and weights over one sequence.

  Args:
    z: float32 [K], the log of the sum so far; `empty` makes the first.
    k: [T, K], log-weights.
    reset: bool [T]; True: the sum is `fresh` before step t.
    mask: bool [T]; False: no step t; the outputs there are zero, which as a
      log-decay leaves what it meets as it is.
    fresh: [K], −inf by default.
    implementation: 'scan', 'assoc' (an associative scan over the sequence),
      'chunk' (the same inside chunks), or None.
    chunk_size: C of the chunk form, a power of two.

  Returns:
    (z, (log a float32 [T, K], w float32 [T, K])). log a is −inf where nothing
    came before.

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a form that does not exist.
  """
  who = "running_softmax"
  if jnp.ndim(k) != 2:
    arguments.fail(who, "k", "floating [T, K]; jax.vmap batches", k)
  length, width = jnp.shape(k)
  arguments.check_array(who, "k", k, (length, width))
  arguments.check_array(who, "z", z, (width,))
  arguments.check_flags(who, length, reset, mask)
  if fresh is not None:
    arguments.check_array(who, "fresh", fresh, (width,))
  chunk.power_of_two("chunk_size", chunk_size)
  if mask is not None and reset is not None:
    reset = reset & mask
  fresh = empty(width) if fresh is None else fresh.astype(jnp.float32)
  inputs = Inputs(k.astype(jnp.float32), reset, mask)
  forms = {
    "scan": lambda: arguments.scan_steps(
      lambda z, i: step(z, i.k), z, inputs, fresh
    ),
    "assoc": lambda: _whole(z, inputs, fresh),
    "chunk": lambda: chunk.run(_whole, z, inputs, fresh, chunk_size=chunk_size),
  }
  return dispatch.run(who, forms, implementation)


class Inputs(NamedTuple):
  k: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


def _whole(z, inputs: Inputs, fresh):
  """Any number of steps at once."""
  k, reset, mask = inputs
  if not k.shape[0]:
    return z, (k, k)
  if mask is not None:
    k = jnp.where(mask[:, None], k, -jnp.inf)
  terms, cut = k, None
  if reset is not None:
    cut = reset[:, None]
    terms = jnp.where(cut, _add(fresh, k), k)
  sums, cut = jax.lax.associative_scan(_compose, (terms, cut))
  zs = _compose((z, None), (sums, cut))[0]
  before = jnp.concatenate([z[None], zs[:-1]])
  if reset is not None:
    before = jnp.where(reset[:, None], fresh, before)
  log_decay, weight = _minus(before, zs), jnp.exp(_minus(k, zs))
  if mask is not None:
    log_decay = jnp.where(mask[:, None], log_decay, 0.0)
  return zs[-1], (log_decay, weight)


def _compose(first, second):
  z, cut = first
  if second[1] is not None:
    # Before it is added: nothing of what a reset cuts off is left.
    z = jnp.where(second[1], -jnp.inf, z)
    cut = second[1] if cut is None else cut | second[1]
  return _add(z, second[0]), cut


def _add(a, b):
  """log(exp a + exp b); −inf, with gradient 0, where both are."""
  top = jax.lax.stop_gradient(jnp.maximum(a, b))
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  total = jnp.exp(a - top) + jnp.exp(b - top)
  none = total == 0
  return jnp.where(none, -jnp.inf, top + jnp.log(jnp.where(none, 1.0, total)))


def _minus(a, z):
  """a − z for a <= z; −inf, with gradient 0, where a is −inf."""
  none = jnp.isneginf(a)
  keep = lambda x: jnp.where(none, 0.0, x)
  return jnp.where(none, -jnp.inf, keep(a) - keep(z))
