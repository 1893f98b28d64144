"""Leaky integrate-and-fire neurons that learn through a surrogate gradient.

  h_t = v_{t−1} + (x_t − v_{t−1}) / τ ,  s_t = [h_t >= θ] ,  v_t = h_t (1 − s_t)

The spike's step has the gradient of a sigmoid of slope 4, and v's return to
zero has none.
Sources: Neftci, Mostafa, Zenke 2019, arXiv:1901.09948 (surrogate gradients);
the rule and its constants are those of SpikingJelly's LIFNode with a detached
reset (Fang et al. 2023, doi:10.1126/sciadv.adi1480).
"""

from typing import NamedTuple

import jax

from memzoo.core import axes
from memzoo.ops import arguments

SLOPE = 4.0


@jax.custom_jvp
def spike(x: jax.Array) -> jax.Array:
  """1 where x >= 0, else 0, in x's dtype; its gradient is SLOPE σ'(SLOPE x)."""
  return (x >= 0).astype(x.dtype)


@spike.defjvp
def _spike_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  s = jax.nn.sigmoid(SLOPE * x)
  return spike(x), SLOPE * s * (1 - s) * dx


def step(v, x, tau: float = 2.0, threshold: float = 1.0):
  """One step: v [N], x [N] -> (v [N], spikes [N])."""
  v = v + (x - v) / tau
  s = spike(v - threshold)
  return v * (1 - jax.lax.stop_gradient(s)), s


def integrate_and_fire(
  v: jax.Array,
  x: axes.Xs,
  *,
  tau: float = 2.0,
  threshold: float = 1.0,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
) -> tuple[jax.Array, axes.Xs]:
  """N neurons over one sequence.

  Args:
    v: float32 [N], the potentials to go on from; zero is rest.
    x: float32 [T, N].
    tau: τ in steps.
    threshold: θ.
    reset: bool [T]; True: the neurons are at rest before step t.
    mask: bool [T]; False: no step t; there are no spikes there.

  Returns:
    (v [N], spikes [T, N], 0 or 1).

  Raises:
    ValueError: on wrong shapes or dtypes.
  """
  arguments.check_array("integrate_and_fire", "x", x, (None, None))
  length, width = x.shape
  arguments.check_array("integrate_and_fire", "v", v, (width,))
  arguments.check_flags("integrate_and_fire", length, reset, mask)
  if mask is not None and reset is not None:
    reset = reset & mask
  return arguments.scan_steps(
    lambda v, i: step(v, i.x, tau, threshold), v, Inputs(x, reset, mask), None
  )


class Inputs(NamedTuple):
  x: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None
