"""The generalised delta rule: a transition that is diagonal plus rank one.

  S_t = Diag(d_t) S_{t−1} + b_t (S_{t−1}ᵀ a_t)ᵀ + k_t v_tᵀ ,   o_t = S_tᵀ q_t

The state S is [K, V]; the decay d_t = exp(log_decay_t) is absent, a scalar per
step, or one per key channel. a_t reads the state before it decays, and what it
reads is written under b_t: a = −k, b = β k erases as the delta rule does. Where
b_t is k_t, what is erased and what is written share their direction, and half
of the work is left.

A chunk solves (I − A_ab) U = A_ak V + A_in S for the readings U, where A_ab and
A_ak hold a_i·b_j and a_i·k_j under the decay of the steps between. What is left
is the delta rule with keys b and corrections U, and its code serves both.
Sources: Peng et al. 2025, arXiv:2503.14456, section 3 (RWKV-7); Yang et al.
2024, arXiv:2406.06484, section 3 and appendix B (the chunkwise WY form).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.kernels.chunk_scan import Axes, chunk_scan
from memzoo.ops import arguments, chunk, decay, linear_attention
from memzoo.ops.delta_rule import (
  CHUNK_SIZES,
  FUNCTION as DELTA_RULE,
  GROUP,
  Local,
)


def write(s, k, v, a, b=None, log_decay=None):
  """One update: s [K, V], k [K], v [V], a [K], b [K] or None for k, log_decay
  scalar, [K] or None -> [K, V]."""
  k, v = k.astype(s.dtype), v.astype(s.dtype)
  reading = a.astype(s.dtype) @ s
  if log_decay is not None:
    s = jnp.exp(log_decay.astype(s.dtype)).reshape(-1, 1) * s
  if b is None:
    return s + k[:, None] * (v + reading)
  return s + k[:, None] * v + b.astype(s.dtype)[:, None] * reading


read = linear_attention.read


def step(s, q, k, v, a, b=None, log_decay=None):
  """One step: (s [K, V], o [V])."""
  s = write(s, k, v, a, b, log_decay)
  return s, read(s, q)


def diag_plus_rank_one(
  s: axes.Matrix,
  q: axes.Queries,
  k: axes.Keys,
  v: axes.Values,
  *,
  a: axes.Keys,
  b: axes.Keys | None = None,
  log_decay: axes.LogDecay | None = None,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: axes.Matrix | None = None,
  implementation: str | None = None,
  chunk_size: int | None = None,
) -> tuple[axes.Matrix, axes.Values]:
  """The generalised delta rule over one sequence of one head.

  Args:
    s: float32 [K, V], the state to go on from.
    q: [T, K]; no scaling is applied.
    k: [T, K].
    v: [T, V].
    a: [T, K], what is read of the state before it decays. The transition
      Diag(d) + b aᵀ is for the caller to keep from growing.
    b: [T, K], under which the reading is written; None for k.
    log_decay: [T], [T, K], or None for no decay. At most 0; −inf clears (the
      channel of) the state, but for what a reads of it, and has gradient 0.
    reset: bool [T]; True: the state is `fresh` before step t.
    mask: bool [T]; False: no step t; the output there is zero.
    fresh: [K, V], zeros by default.
    implementation: 'scan', 'chunk', 'pallas' (the chunk form as a kernel),
      'pallas_split' (as three, for few sequences and heads), or None.
    chunk_size: C of the chunk form, a power of two; None for the platform's.

  Returns:
    (state float32 [K, V], outputs [T, V] in v's dtype).

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a form that does not exist.
  """
  who = "diag_plus_rank_one"
  arguments.check_matrix_op(
    who, s, q, k, v, log_decay=log_decay, reset=reset, mask=mask, fresh=fresh
  )
  arguments.check_array(who, "a", a, jnp.shape(q))
  if b is not None:
    arguments.check_array(who, "b", b, jnp.shape(q))
  size = decay.chunk_size(chunk_size, log_decay, CHUNK_SIZES)
  if mask is not None and reset is not None:
    reset = reset & mask
  inputs = Inputs(q, k, v, a, b, log_decay, reset, mask)
  kernel = partial(
    chunk_scan, FUNCTION, s, inputs, fresh, axes=AXES, chunk_size=size
  )
  forms = {
    "scan": lambda: _scan(s, inputs, fresh),
    "chunk": lambda: chunk.run(
      FUNCTION._replace(prepare=partial(_prepare, name="inverse")),
      s,
      inputs,
      fresh,
      chunk_size=size,
      group=GROUP,
      save=("inverse",),
      columns=True,
    ),
    "pallas": lambda: kernel(split=False),
    "pallas_split": lambda: kernel(split=True),
  }
  return dispatch.run(who, forms, implementation)


class Inputs(NamedTuple):
  q: jax.Array
  k: jax.Array
  v: jax.Array
  a: jax.Array
  b: jax.Array | None
  log_decay: jax.Array | None
  reset: jax.Array | None
  mask: jax.Array | None


def _prepare(inputs: Inputs, fresh, name: str | None = None) -> Local:
  """The delta rule's `Local`: keys b, corrections U = u − w S, and in `out`
  and `kept` what k and v add by themselves."""
  bad, g, q, k, v, a, b = decay.quarantine(
    inputs.reset, inputs.mask, inputs.log_decay, inputs.q, inputs.k, inputs.v,
    inputs.a, inputs.b,
  )  # fmt: skip
  d = decay.decays(g, inputs.reset, inputs.mask, bad, q.shape[0])
  before = _before(d, g, inputs.mask)
  mm = partial(chunk.matmul, dtype=q.dtype)
  scores = partial(decay.scores, dtype=q.dtype)
  a_in = a.astype(jnp.float32) * before.into
  q_in = q.astype(jnp.float32) * d.into
  right, out, kept, live = v.astype(jnp.float32), None, None, None
  if b is None:
    b = k
  else:
    right = mm(scores(a, k, before), v)
    out = mm(scores(q, k, d), v)
    kept = mm((k.astype(jnp.float32) * d.onto).T, v)
  if inputs.reset is not None:
    live = d.live
    if fresh is not None:
      fresh = fresh.astype(jnp.float32)
      right += mm(chunk.where(live, 0.0, a_in), fresh)
      out = _add(out, mm(chunk.where(live, 0.0, q_in), fresh))
      stays = chunk.where(d.ends_live, 0.0, chunk.last(d.into))
      kept = _add(kept, chunk.column(stays) * fresh)
    a_in = chunk.where(live, a_in, 0.0)
    q_in = chunk.where(live, q_in, 0.0)
  u, w = chunk.unit_lower_solve(
    -scores(a, b, before), (right, -a_in), q.dtype, name
  )
  return Local(
    u=u,
    w=w,
    scores=scores(q, b, d),
    out=out,
    q_in=q_in,
    k_out=b.astype(jnp.float32) * d.onto,
    kept=kept,
    through=d.through,
    live=live,
    poison=d.poison,
    v=v,
  )


def _before(d: decay.Decays, g, mask) -> decay.Decays:
  """`d` up to each step, without the step's own decay: for a reader of the
  state before it decays. `pairs`, `factor`, `levels` and `into` alone."""
  size = d.pairs.shape[0]
  strict = chunk.lower(size, strict=True)
  pairs = d.pairs & strict
  if g is None:
    return d._replace(pairs=pairs, factor=pairs.astype(jnp.float32))
  g = jnp.maximum(g.astype(jnp.float32), decay.FLOOR)
  if mask is not None:
    g = g * mask
  d = d._replace(pairs=pairs, into=jnp.exp(decay.sums(pairs, g)))
  if d.levels is None:
    between = chunk.masked_sum(strict, jnp.where(strict, g, 0.0))
    factor = jnp.exp(jnp.where(pairs, between, 0.0))
    return d._replace(factor=jnp.where(pairs, factor, 0.0))
  i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
  j = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
  levels = []
  for n, level in enumerate(d.levels):
    half = (i >> n == j >> n) & (j < i)  # of the block of 2ⁿ⁺¹ steps
    levels.append(level._replace(head=jnp.exp(decay.sums(half, g))))
  return d._replace(levels=tuple(levels))


def _add(x, y):
  return y if x is None else x + y


FUNCTION = DELTA_RULE._replace(prepare=_prepare)


AXES = Axes(
  state="KV",
  inputs=Inputs("CK", "CK", "CV", "CK", "CK", "CK", "C1", "C1"),
  constants="KV",
  outputs="CV",
)


def _scan(s, inputs: Inputs, fresh):
  return arguments.scan_steps(
    lambda s, x: step(s, x.q, x.k, x.v, x.a, x.b, x.log_decay), s, inputs, fresh
  )
