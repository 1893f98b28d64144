"""A selective scan over a plane: time is one axis, variates the other.

  h¹_{v,t} = Ā_1 h¹_{v,t−1} + Ā_2 h²_{v,t−1} + B̄_1 x_{v,t}
  h²_{v,t} = Ā_3 h¹_{v−1,t} + Ā_4 h²_{v−1,t} + B̄_2 x_{v,t}
  y_{v,t}  = C_1 h¹_{v,t} + C_2 h²_{v,t}

with diagonal A and steps Δ_1, Δ_2 that the input chooses. The continuous
∂_1 h¹ = A_1 h¹ + A_2 h² + B_1 x and ∂_2 h² = A_3 h¹ + A_4 h² + B_2 x are held
constant over a step in all but the state that moves:

  Ā_1 = exp(Δ_1 A_1) ,  (Ā_2, B̄_1) = A_1⁻¹ (Ā_1 − 1) (A_2, B_1)
  Ā_4 = exp(Δ_2 A_4) ,  (Ā_3, B̄_2) = A_4⁻¹ (Ā_4 − 1) (A_3, B_2)

At one time h² is a recurrence over the variates; at one variate h² needs no
other time, and h¹ is a recurrence over them. Sources: Roesser 1975, "A discrete
state-space model for linear image processing", IEEE Transactions on Automatic
Control 20 (the two states); Behrouz et al. 2024, arXiv:2406.04320 (chosen
steps).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core.cell import where
from memzoo.ops.linear_recurrence import linear_recurrence


class Places(NamedTuple):
  """What the places of the plane bring. Float32, [..., G, V, ·]: G modules."""

  x: jax.Array  # [..., E]
  dt1: jax.Array  # [..., E], positive
  dt2: jax.Array  # [..., E], positive
  b1: jax.Array  # [..., N]
  b2: jax.Array  # [..., N]
  c1: jax.Array  # [..., N]
  c2: jax.Array  # [..., N]


class Matrices(NamedTuple):
  """Diagonals, [G, E, N] each; a1 and a4 negative."""

  a1: jax.Array
  a2: jax.Array
  a3: jax.Array
  a4: jax.Array


def step(h1, h2, places: Places, a: Matrices):
  """One time: h1, h2 [G, V, E, N], places [G, V, ·] -> (h1, h2, y)."""
  decay, new = _time(places, a.a1[:, None], a.a2[:, None], h2)
  h1 = decay * h1 + new

  def next_variate(before, inputs):
    p, h1 = inputs
    h2 = _variate(p, a.a3, a.a4, *before)
    return (h1, h2), h2

  zero = jnp.zeros_like(h1[:, 0])
  inputs = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), (places, h1))
  h2 = jax.lax.scan(next_variate, (zero, zero), inputs)[1]
  h2 = jnp.moveaxis(h2, 0, 1)
  return h1, h2, _read(places, h1, h2)


def plane_scan(
  h1, h2, places: Places, a: Matrices, *, reset=None, mask=None,
  implementation=None,
):  # fmt: skip
  """All times: V serial steps, each over the whole of time.

  Args:
    h1: float32 [G, V, E, N], the state to go on from.
    h2: float32 [G, V, E, N].
    places: [T, G, V, ·].
    a: the diagonals.
    reset: bool [T]; True: both states are zero before time t.
    mask: bool [T]; False: no time t; y means nothing there.
    implementation: of `linear_recurrence` over time.

  Returns:
    (h1, h2, y float32 [T, G, V, E]). What is kept for the backward is
    [V, T, G, E, N] of both states; the rest is computed again.
  """
  last = _last(places.x.shape[0], mask)
  flat = lambda y: y.reshape(y.shape[0], -1)

  @jax.checkpoint
  def next_variate(before, inputs):
    p, start1, start2 = inputs
    h2 = _variate(p, a.a3, a.a4, *before)
    held = jnp.concatenate([start2[None], h2])[last]
    seen, end2 = held[:-1], held[-1]
    if reset is not None:
      seen = where(reset, jnp.zeros_like(seen), seen)
    decay, new = _time(p, a.a1, a.a2, seen)
    end1, h1 = linear_recurrence(
      start1.reshape(-1), flat(new), decay=flat(decay), reset=reset,
      mask=mask, implementation=implementation,
    )  # fmt: skip
    h1 = h1.reshape(h2.shape)
    end1 = end1.reshape(start1.shape)
    return (h1, h2), (end1, end2, _read(p, h1, h2))

  zero = jnp.zeros((places.x.shape[0], *a.a1.shape), jnp.float32)
  first = lambda axis: lambda y: jnp.moveaxis(y, axis, 0)
  inputs = jax.tree.map(first(2), places), first(1)(h1), first(1)(h2)
  h1, h2, y = jax.lax.scan(next_variate, (zero, zero), inputs)[1]
  back = lambda y: jnp.moveaxis(y, 0, 1)
  return back(h1), back(h2), jnp.moveaxis(y, 0, 2)


def _hold(dt, a):
  """Over a step dt [..., E]: what is left of a state, and what a held input
  becomes; [..., E, N] each."""
  z = dt[..., None] * a
  return jnp.exp(z), jnp.expm1(z) / a


def _time(p: Places, a1, a2, h2):
  """Ā_1 and what is added to Ā_1 h¹, h2 being that of the time before."""
  decay, hold = _hold(p.dt1, a1)
  return decay, hold * (a2 * h2 + p.x[..., None] * p.b1[..., None, :])


def _variate(p: Places, a3, a4, h1, h2):
  """h² after h1, h2 of the variate before."""
  decay, hold = _hold(p.dt2, a4)
  return decay * h2 + hold * (a3 * h1 + p.x[..., None] * p.b2[..., None, :])


def _read(p: Places, h1, h2):
  read = lambda h, c: jnp.einsum("...en,...n->...e", h, c)
  return read(h1, p.c1) + read(h2, p.c2)


def _last(length, mask):
  """int32 [T + 1]: before each time and at the end, 1 + the last time that is
  there; 0 where there is none."""
  time = jnp.arange(1, length + 1)
  if mask is not None:
    time = jax.lax.cummax(jnp.where(mask, time, 0))
  return jnp.concatenate([jnp.zeros_like(time[:1]), time])
