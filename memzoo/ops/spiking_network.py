"""A network of leaky integrate-and-fire neurons whose synapses tire and ease.

Sources: Maass, Natschläger, Markram 2002, Neural Computation 14(11), appendix
B; Markram, Wang, Tsodyks 1998, PNAS 95(9), eq. 1 and 2 (the synapses: the n-th
spike gives A u_n R_n, with u_{n+1} = U + u_n (1 − U) exp(−Δ / F) and R_{n+1} =
1 + (R_n − u_n R_n − 1) exp(−Δ / D), Δ after it).

Everything that starts or rests at another number is held as what it is above
that number, so that zeros stand for neurons that are not there.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.kernels.cell_scan import product


class Synapses(NamedTuple):
  """Of all neurons, onto targets of one kind."""

  spent: jax.Array  # [N] float32, 1 − R
  eased: jax.Array  # [N] float32, u − U


class State(NamedTuple):
  v: jax.Array  # [N] float32, potential above the neuron's reset
  s: jax.Array  # [N] float32, 1 where the neuron has just fired
  wait: jax.Array  # [N] float32, steps that it still rests
  i_e: jax.Array  # [N] float32, current from excitatory neurons
  i_i: jax.Array  # [N] float32, current from inhibitory neurons
  r: jax.Array  # [N] float32, its spikes through an exponential filter
  onto: tuple[Synapses, Synapses]  # excitatory, inhibitory neurons


class Kind(NamedTuple):
  """The synapses onto targets of one kind."""

  w: jax.Array  # [N, N] A, row: from; zero in the other kind's columns
  use: jax.Array  # [N] U
  recover: jax.Array  # [N] exp(−dt / D)
  relax: jax.Array  # [N] exp(−dt / F)


class Network(NamedTuple):
  onto: tuple[Kind, Kind]  # excitatory, inhibitory neurons
  excites: jax.Array  # [N], 1 or 0
  inhibits: jax.Array  # [N], 1 or 0
  background: jax.Array  # [N] R I_b above the reset
  threshold: jax.Array  # [N] above the reset
  rest: jax.Array  # [N] steps


class Step(NamedTuple):
  """One step of `dt`, a value: what `memzoo.ops.step_loop` takes.

  Attributes:
    dt: milliseconds.
    tau_m: of the membranes.
    tau_e: of the currents from excitatory neurons.
    tau_i: of the currents from inhibitory neurons.
    tau_r: of the filter on spikes.
  """

  dt: float
  tau_m: float
  tau_e: float
  tau_i: float
  tau_r: float

  def __call__(self, state: State, drive, net: Network):
    """The state and r, after the current `drive` [N] from outside."""
    k_m, k_e, k_i, k_r = (math.exp(-self.dt / tau) for tau in self[1:])
    i_e, i_i, onto = k_e * state.i_e, k_i * state.i_i, []
    for old, kind in zip(state.onto, net.onto):
      u = kind.use + old.eased
      given = state.s * u * (1 - old.spent)
      i_e += product(given * net.excites, kind.w)
      i_i += product(given * net.inhibits, kind.w)
      eased = old.eased + state.s * kind.use * (1 - u)
      onto.append(
        Synapses(kind.recover * (old.spent + given), kind.relax * eased)
      )
    v = k_m * state.v + (1 - k_m) * (net.background + i_e + i_i + drive)
    v = jnp.where(state.wait > 0, 0.0, v)
    fired = v > net.threshold
    s = fired.astype(jnp.float32)
    wait = jnp.where(fired, net.rest, jnp.maximum(state.wait - 1, 0.0))
    r = k_r * state.r + s
    v = jnp.where(fired, 0.0, v)
    return State(v, s, wait, i_e, i_i, r, tuple(onto)), r
