"""Linear attention whose writes weigh the two ends of a time step, in R ranks.

  S_t = a_t (S_{t−1} + β_t Σ_r k_{t−1,r} v_{t−1,r}ᵀ) + γ_t Σ_r k_{t,r} v_{t,r}ᵀ
  o_{t,r} = S_tᵀ q_{t,r}

The state is S [K, V] and the last k [R, K] and v [R, V]. The state that token t
finds holds what the last token wrote once, with the weight γ_{t−1} + β_t: that
is `linear_attention` of rows moved by one token, R rows a token, and what t
itself writes is added to what it reads. No output sees a later input.

Source: Lahoti et al. 2026, arXiv:2603.15569, proposition 1 (eq. 5; their β is
a β here) and appendix C.
"""

from functools import partial
from typing import NamedTuple

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

from memzoo.core import axes
from memzoo.ops import arguments
from memzoo.ops.conv import shift
from memzoo.ops.linear_attention import linear_attention

_einsum = partial(jnp.einsum, precision="highest")


class State(NamedTuple):
  s: jax.Array  # [K, V] float32
  k: jax.Array  # [R, K] float32: the last k
  v: jax.Array  # [R, V] float32: the last v


def step(state: State, q, k, v, *, log_decay, gamma, beta):
  """One step: q, k [R, K], v [R, V] and scalars -> (state, o [R, V])."""
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  s = state.s + beta * _write(state.k, state.v)
  s = jnp.exp(log_decay) * s + gamma * _write(k, v)
  return State(s, k, v), _einsum("kv,rk->rv", s, q)


def trapezoid(
  state: State,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  log_decay: axes.Scalars,
  gamma: axes.Scalars,
  beta: axes.Scalars,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: State | None = None,
  implementation: str | None = None,
) -> tuple[State, jax.Array]:
  """The recurrence over one sequence of one head.

  Args:
    state: the state to go on from.
    q: [T, R, K].
    k: [T, R, K].
    v: [T, R, V].
    log_decay: float32 [T], log a.
    gamma: float32 [T], the weight of a token's own write.
    beta: float32 [T], the weight of the last token's, before the decay.
    reset: bool [T]; True: the state is zero before step t.
    mask: bool [T]; False: no step t; the output there is zero.
    fresh: None.
    implementation: of `linear_attention`, over R T rows.

  Returns:
    (state, o float32 [T, R, V]).

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a form that does not exist, or a fresh state.
  """
  if fresh is not None:
    raise NotImplementedError("trapezoid: a fresh state other than zero")
  gates = dict(log_decay=log_decay, gamma=gamma, beta=beta)
  _check(state, q, k, v, gates, reset, mask)
  length, ranks = q.shape[:2]
  # What the last token wrote, and the decay that it left to be applied.
  none = jnp.zeros((), jnp.float32)
  first, unravel = ravel_pytree((state.k, state.v, none, none))
  rows = jax.tree.map(lambda x: x.astype(jnp.float32), (k, v, gamma, log_decay))
  rows = jax.vmap(lambda row: ravel_pytree(row)[0])(rows)
  last, rows = shift(first, rows, reset=reset, mask=mask)
  keys, values, weight, decay = jax.vmap(unravel)(rows)
  values *= (weight + beta)[:, None, None]
  # R rows a token; the first has the decay and the reset.
  flat = lambda x: x.astype(q.dtype).reshape(length * ranks, -1)
  head = lambda x: jnp.zeros((length, ranks), x.dtype).at[:, 0].set(x).ravel()
  s, o = linear_attention(
    state.s, flat(q), flat(keys), flat(values), log_decay=head(decay),
    reset=None if reset is None else head(reset),
    mask=None if mask is None else jnp.repeat(mask, ranks),
    implementation=implementation,
  )  # fmt: skip
  o = o.reshape(v.shape).astype(jnp.float32)
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  met = lambda k: _einsum("tik,tjk->tij", q, k)
  # Row i has not seen the rows after it.
  o += _einsum("tij,tjv->tiv", jnp.triu(met(keys), 1), values)
  o *= jnp.exp(log_decay)[:, None, None]
  o += _einsum("tij,tjv->tiv", met(k) * gamma[:, None, None], v)
  if mask is not None:
    o = jnp.where(mask[:, None, None], o, 0)
  k, v, weight, decay = unravel(last)
  return State(jnp.exp(decay) * s + weight * _write(k, v), k, v), o


def _write(k, v):
  """Σ_r k_r v_rᵀ."""
  return _einsum("rk,rv->kv", k, v)


def _check(state, q, k, v, gates, reset, mask):
  who = "trapezoid"
  arguments.check_array(who, "q", q, (None, None, None))
  length, ranks, width = q.shape
  arguments.check_array(who, "k", k, q.shape)
  arguments.check_array(who, "v", v, (length, ranks, None))
  values = v.shape[2]
  shapes = (width, values), (ranks, width), (ranks, values)
  for name, x, shape in zip(State._fields, state, shapes):
    arguments.check_array(who, "the state's " + name, x, shape)
  for name, gate in gates.items():
    arguments.check_array(who, name, gate, (length,))
  arguments.check_flags(who, length, reset, mask)
