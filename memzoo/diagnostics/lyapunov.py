"""How fast two nearby states part, or meet."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core.cell import Cell
from memzoo.diagnostics import rollout


class Lyapunov(NamedTuple):
  """Lyapunov exponents, in nats a step."""

  exponents: np.ndarray  # [K], largest first, mean over B
  spread: np.ndarray  # [K], standard deviation over B
  running: np.ndarray  # [T', K]: the mean over the steps so far and over B


def lyapunov(
  cell: Cell, params, xs, *, count: int = 8, burn_in: int = 0, state=None
) -> Lyapunov:
  """The leading Lyapunov exponents of s -> step(params, s, x)[0].

    J_t Q_{t−1} = Q_t R_t        QR, Q_0 orthonormal [N, K]
    λ_i = mean_t log |R_t[i, i]|

  along the trajectory that the inputs drive, with J_t the Jacobian by the
  floats of the state (complex ones as two, N in all) at s_{t−1}. Below zero a
  difference of states fades as exp(λ t), the state is a function of recent
  inputs; at zero it stays; above zero the memory is chaotic.

  |R| counts as 1.2e-7, the resolution of float32, where it is less: a
  direction that a step erases gives −15.9 for that step. A memory that
  forgets exactly after W steps then shows about −15.9 / W, in place of −∞.

  Args:
    cell: the memory, differentiable.
    params: as `cell.init` made them, or trained.
    xs: [B, T, D]: B sequences of inputs.
    count: K; all N where there are fewer.
    burn_in: first steps that are not counted: Q turns to the leading
      directions and the state leaves its start. T' = T − burn_in.
    state: what every sequence starts from; None for the cell's first state.

  Raises:
    ValueError: where the cell has no float state or no gradient, on inputs of
      wrong shape, and on a count or burn-in out of range.
  """
  who = "lyapunov"
  _, length = rollout.check_inputs(who, cell, xs, 2)
  rollout.check_count(who, "count", count)
  rollout.check_count(who, "burn_in", burn_in, 0)
  if burn_in >= length:
    raise ValueError(f"{who}: burn_in={burn_in} leaves none of {length} inputs")
  state = rollout.start(cell, params, state)
  rollout.check_state(who, cell, state)
  total = rollout.split(state)[0].size
  if not total or not cell.differentiable:
    raise ValueError(f"{who}({rollout.label(cell)}): the state has no gradient")
  shape = total, min(count, total)
  basis = np.random.default_rng(0).normal(size=shape)
  basis = jnp.asarray(np.linalg.qr(basis)[0], jnp.float32)
  logs = np.asarray(_logs(cell, params, state, xs, basis), np.float64)
  logs = logs[:, burn_in:]  # [B, T', K]
  mean = logs.mean(1)
  order = np.argsort(-mean.mean(0))
  mean, logs = mean[:, order], logs.mean(0)[:, order]
  steps = np.arange(1, len(logs) + 1)[:, None]
  return Lyapunov(
    exponents=mean.mean(0),
    spread=mean.std(0),
    running=np.cumsum(logs, axis=0) / steps,
  )


@functools.partial(jax.jit, static_argnums=0)
def _logs(cell, params, state, xs, basis):
  """[B, T, K]: log |R_t[i, i]|."""
  floor = jnp.finfo(jnp.float32).eps

  def body(carry, x):
    state, basis = carry
    vector, join = rollout.split(state)

    def move(vector):
      new, _ = cell.step(params, join(vector), x)
      return rollout.split(new)[0], new

    _, pushed, new = jax.linearize(move, vector, has_aux=True)
    basis, r = jnp.linalg.qr(jax.vmap(pushed, 1, 1)(basis))
    size = jnp.maximum(jnp.abs(jnp.diagonal(r)), floor)
    return (new, basis), jnp.log(size)

  row = lambda xs: jax.lax.scan(body, (state, basis), xs)[1]
  return jax.vmap(row)(xs)
