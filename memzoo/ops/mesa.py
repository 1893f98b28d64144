"""The Mesa layer's memory: keys and values that a query solves for.

  H_t = a_t H_{t−1} + β_t k_t k_tᵀ ,   G_t = a_t G_{t−1} + β_t k_t v_tᵀ
  o_t = G_tᵀ (H_t + Diag(λ))⁻¹ q_t

o_t is what the ridge regression from all keys to all values, weighted by decay
and β, predicts at q_t. The system is solved by conjugate gradients, which need
H only in products: in a chunk these are two matmuls for all of its queries, and
no H_t is built but at the chunk's start. The gradient is that of the solution
(one more solve); with few steps it is approximate. Source:
von Oswald et al. 2025, arXiv:2506.05233, section 3 (the recurrence, the solver,
its chunkwise products and its gradient).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.ops import arguments, chunk, decay

CHUNK_SIZE = 64
SOLVER_STEPS = 30  # of the authors' code


class State(NamedTuple):
  kk: jax.Array  # [K, K] float32: H
  kv: jax.Array  # [K, V] float32: G


def empty(keys: int, values: int) -> State:
  """The state before the first step: zeros."""
  zeros = partial(jnp.zeros, dtype=jnp.float32)
  return State(zeros((keys, keys)), zeros((keys, values)))


def step(
  state: State, q, k, v, beta, ridge, log_decay=None,
  solver_steps: int = SOLVER_STEPS,
):  # fmt: skip
  """One step: (state, q [K], k [K], v [V], beta scalar, ridge [K], log_decay
  scalar or None) -> (state, o [V] in v's dtype)."""
  dtype = v.dtype
  q, k, v, beta, ridge = (x.astype(jnp.float32) for x in (q, k, v, beta, ridge))
  kk, kv = state
  if log_decay is not None:
    a = jnp.exp(log_decay.astype(jnp.float32))
    kk, kv = a * kk, a * kv
  kb = (beta * k)[:, None]
  kk, kv = kk + kb * k, kv + kb * v
  x = solve(lambda p: chunk.matmul(p, kk) + ridge * p, q, solver_steps)
  return State(kk, kv), chunk.matmul(x, kv).astype(dtype)


def solve(product, q, steps: int):
  """x with product(x) = q, by conjugate gradients from x = 0, row by row.

  A row rests once its residual is below float32's rounding of q.

  Args:
    product: x [..., K] -> [..., K], linear, symmetric and positive definite in
      each row.
    q: float32 [..., K].
    steps: at most so many; K are enough for an exact solution, but for
      rounding.
  """
  dots = lambda x, y: jnp.sum(x * y, axis=-1, keepdims=True)

  def iterate(product, q):
    size = dots(q, q)
    enough = size * float(jnp.finfo(jnp.float32).eps) ** 2

    def body(_, carry):
      x, r, p, delta = carry
      image = product(p)
      curvature = dots(p, image)
      go = (delta > enough) & (curvature > 0)
      rate = jnp.where(go, delta / jnp.where(go, curvature, 1.0), 0.0)
      x, r = x + rate * p, r - rate * image
      new = dots(r, r)
      turn = jnp.where(go, new / jnp.where(go, delta, 1.0), 0.0)
      return x, r, r + turn * p, jnp.where(go, new, delta)

    start = jnp.zeros_like(q), q, q, size
    return jax.lax.fori_loop(0, steps, body, start)[0]

  return jax.lax.custom_linear_solve(product, q, iterate, symmetric=True)


def mesa(
  state: State,
  q: axes.Queries,
  k: axes.Keys,
  v: axes.Values,
  *,
  beta: axes.Scalars,
  ridge: axes.Hidden,
  log_decay: axes.Scalars | None = None,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: State | None = None,
  implementation: str | None = None,
  chunk_size: int = CHUNK_SIZE,
  solver_steps: int = SOLVER_STEPS,
) -> tuple[State, axes.Values]:
  """The recurrence over one sequence of one head.

  Args:
    state: to go on from; `empty` makes the first.
    q: [T, K]; no scaling is applied.
    k: [T, K]; of unit norm where the paper normalises.
    v: [T, V].
    beta: [T], at least 0.
    ridge: λ [K], above 0, the same at every step.
    log_decay: [T], at most 0, or None for no decay; −inf clears the state.
    reset: bool [T]; True: the state is `fresh` before step t.
    mask: bool [T]; False: no step t; the output there is zero.
    fresh: a `State`, zeros by default.
    implementation: 'scan', 'chunk', or None.
    chunk_size: C of the chunk form, a power of two.
    solver_steps: of conjugate gradients, static.

  Returns:
    (state, outputs [T, V] in v's dtype).

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a form that does not exist.
  """
  who = "mesa"
  arguments.check_matrix_op(
    who, state.kv, q, k, v, beta=beta, reset=reset, mask=mask
  )
  length, width = q.shape
  arguments.check_array(who, "state.kk", state.kk, (width, width))
  arguments.check_array(who, "ridge", ridge, (width,))
  if log_decay is not None:
    arguments.check_array(who, "log_decay", log_decay, (length,))
  if fresh is not None:
    arguments.check_array(who, "fresh.kk", fresh.kk, (width, width))
    arguments.check_array(who, "fresh.kv", fresh.kv, state.kv.shape)
  chunk.power_of_two("chunk_size", chunk_size)
  if solver_steps < 1:
    raise ValueError(f"{who}: solver_steps must be above 0, got {solver_steps}")
  if mask is not None and reset is not None:
    reset = reset & mask
  inputs = Inputs(q, k, v, beta, log_decay, reset, mask)

  def one(state, i):
    return step(state, i.q, i.k, i.v, i.beta, ridge, i.log_decay, solver_steps)

  function = chunk.ChunkFunction(
    _prepare, _advance, partial(_emit, steps=solver_steps)
  )
  forms = {
    "scan": lambda: arguments.scan_steps(one, state, inputs, fresh),
    "chunk": lambda: chunk.run(
      function, state, inputs, (ridge, fresh), chunk_size=chunk_size,
      columns=True,
    ),
  }  # fmt: skip
  return dispatch.run(who, forms, implementation)


class Inputs(NamedTuple):
  q: jax.Array
  k: jax.Array
  v: jax.Array
  beta: jax.Array
  log_decay: jax.Array | None
  reset: jax.Array | None
  mask: jax.Array | None


class Local(NamedTuple):
  """What a chunk knows without the state."""

  q: jax.Array  # [C, K] float32
  k: jax.Array  # [C, K] float32
  v: jax.Array  # [C, V] float32
  weights: jax.Array  # [C, C]: β_j and the decay over (j, i]
  into: jax.Array  # [C, 1] decay of the incoming state; 0 where it is not seen
  stale: jax.Array  # [C, 1] that of a learned fresh state; 0 likewise
  ridge: jax.Array  # [1, K]
  fresh: State | None
  add: State  # what the chunk adds
  through: jax.Array  # [1, 1]
  live: jax.Array
  poison: jax.Array | None
  like: jax.Array  # for its dtype


def _prepare(inputs: Inputs, constants) -> Local:
  ridge, fresh = constants
  bad, g, q, k, v, beta = decay.quarantine(
    inputs.reset, inputs.mask, inputs.log_decay, inputs.q, inputs.k, inputs.v,
    inputs.beta,
  )  # fmt: skip
  d = decay.decays(g, inputs.reset, inputs.mask, bad, q.shape[0])
  like, (q, k, v, beta) = v, (x.astype(jnp.float32) for x in (q, k, v, beta))
  k_out = k * d.onto * beta
  add = State(chunk.matmul(k_out.T, k), chunk.matmul(k_out.T, v))
  if inputs.reset is not None:
    if fresh is not None:
      kept = chunk.where(d.ends_live, 0.0, chunk.last(d.into))
      add = jax.tree.map(lambda x, f: x + kept * f, add, fresh)
    spoilt = chunk.last(d.poison)
    add = jax.tree.map(lambda x: chunk.where(spoilt, jnp.nan, x), add)
  return Local(
    q=q,
    k=k,
    v=v,
    weights=d.factor * chunk.row(beta),
    into=d.into * d.live,
    stale=d.into * (1.0 - d.live),
    ridge=ridge.astype(jnp.float32),
    fresh=fresh,
    add=add,
    through=d.through,
    live=d.live,
    poison=d.poison,
    like=like,
  )


def _advance(state: State, local: Local):
  # What is cleared is cleared, infinities too.
  cleared, stays = local.through == 0, local.through
  return jax.tree.map(
    lambda s, x: jnp.where(cleared, 0.0, stays * s) + x, state, local.add
  )


def _emit(state: State, local: Local, steps: int):
  spoiled = None
  if local.poison is not None:
    bad = decay.any_bad(state.kk) + decay.any_bad(state.kv)
    state = jax.tree.map(lambda s: chunk.where(bad, 0.0, s), state)
    spoiled = local.live * bad

  def read(p, which, values):
    """p_i times what step i sees: [C, K] -> [C, N]."""
    out = chunk.matmul(p * local.into, getattr(state, which))
    if local.fresh is not None:
      out += chunk.matmul(p * local.stale, getattr(local.fresh, which))
    scores = chunk.matmul(p, local.k.T) * local.weights
    return out + chunk.matmul(scores, values)

  x = solve(lambda p: read(p, "kk", local.k) + local.ridge * p, local.q, steps)
  out = decay.spoil(read(x, "kv", local.v), local.poison, spoiled)
  return out.astype(local.like.dtype)
