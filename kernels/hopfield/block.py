"""One block of queries meets one block of patterns: what both drivers run.

  s_ij = β q_i·x_j        p_ij = exp(s_ij − L_i)        o_i = Σ_j p_ij v_j

with L_i = ln Σ_j exp s_ij over the patterns that query i sees, to which
softmax1 adds a pattern of score 0 and value 0. The forward goes over the
blocks of patterns with a running maximum and a running sum, which stay finite
(Milakov and Gimelshein 2018, arXiv:1805.02867); the backward has L_i and forms
p again (Dao et al. 2022, arXiv:2205.14135, algorithm 4):

  ds_ij = p_ij (g_i·v_j − δ_i),  δ_i = g_i·o_i
  dv_j = Σ_i p_ij g_i   dx_j = β Σ_i ds_ij q_i   dq_i = β u_i   dβ = Σ_i q_i·u_i
  u_i = Σ_j ds_ij x_j

Everything is a matrix: what belongs to a query is a column [n, 1] or a row
[1, n], since no kernel language has all operations on vectors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Below every score, and finite: the difference of two is zero, not NaN.
LOWEST = -1e30


class Plan(NamedTuple):
  """What a kernel knows before it is compiled.

  Attributes:
    extra: softmax1 rather than softmax.
    causal: query i sees the patterns j <= i.
    block_queries: n.
    block_patterns: m.
    platform: 'tpu' or 'gpu': whose driver.
    interpret: whether Pallas' interpreter runs it.
  """

  extra: bool
  causal: bool
  block_queries: int | None
  block_patterns: int | None
  platform: str
  interpret: bool


class Running(NamedTuple):
  """The state of a block of queries between blocks of patterns."""

  top: jax.Array  # float32 [n, 1], the largest score so far
  total: jax.Array  # float32 [n, 1], Σ exp(s − top)
  answer: jax.Array  # float32 [n, V], Σ exp(s − top) v


def dot(a: jax.Array, b: jax.Array, transpose: bool = False) -> jax.Array:
  """a @ b, or a @ bᵀ: float32, from operands of one dtype.

  float32 operands are multiplied in full precision on every device.
  """
  full = a.dtype == jnp.float32
  precision = jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(
    a, b, (((1,), (1 if transpose else 0,)), ((), ())),
    precision=precision, preferred_element_type=jnp.float32,
  )  # fmt: skip


def start(queries: int, width: int, extra: bool) -> Running:
  """Before the first block; softmax1 has met its pattern of score 0."""
  return Running(
    jnp.full((queries, 1), 0.0 if extra else LOWEST, jnp.float32),
    jnp.full((queries, 1), 1.0 if extra else 0.0, jnp.float32),
    jnp.zeros((queries, width), jnp.float32),
  )


def meet(running: Running, beta, q, x, v, seen) -> Running:
  """The next block of patterns.

  Args:
    running: the state.
    beta: float32 [1, 1].
    q: [n, K].
    x: [m, K].
    v: [m, V].
    seen: bool [n, m], or None where every pair counts.
  """
  scores = beta * dot(q, x, transpose=True)
  if seen is not None:
    scores = jnp.where(seen, scores, LOWEST)
  top = jnp.maximum(running.top, jnp.max(scores, axis=1, keepdims=True))
  weights = jnp.exp(scores - top)
  if seen is not None:
    weights = jnp.where(seen, weights, 0.0)
  old = jnp.exp(running.top - top)
  total = old * running.total + jnp.sum(weights, axis=1, keepdims=True)
  answer = old * running.answer + dot(weights.astype(v.dtype), v)
  return Running(top, total, answer)


def finish(running: Running) -> tuple[jax.Array, jax.Array]:
  """(o [n, V], L [n, 1]): o is zero and L finite where no pattern was seen."""
  # A sum that holds its largest term is at least 1; this one may hold none.
  total = jnp.maximum(running.total, 1e-30)
  return running.answer / total, running.top + jnp.log(total)


def reverse(beta, a, b, c, d, norm, delta, seen):
  """(p, ds) of a block, or their transposes.

  Args:
    beta: float32 [1, 1].
    a, b: q [n, K] and x [m, K]; x and q for the transposes.
    c, d: g [n, V] and v [m, V]; v and g for the transposes.
    norm: L, float32 [n, 1]; [1, n] for the transposes.
    delta: δ, as `norm`.
    seen: bool [n, m], or [m, n], or None where every pair counts.
  """
  # No score is above L; where nothing was seen L is no bound.
  p = jnp.exp(jnp.minimum(beta * dot(a, b, transpose=True) - norm, 0.0))
  if seen is not None:
    p = jnp.where(seen, p, 0.0)
  return p, p * (dot(c, d, transpose=True) - delta)


def pairs(
  shape, query_axis, first_query, first_pattern, *,
  queries=None, patterns=None, flags=None, causal=False,
):  # fmt: skip
  """Which pairs of a block count: bool `shape`, or None for all.

  Args:
    shape: of the block, [n, m] or [m, n].
    query_axis: 0 or 1, the axis of the queries.
    first_query: index of the block's first query.
    first_pattern: index of the block's first pattern.
    queries: N, where the block may reach beyond it.
    patterns: M, where the block may reach beyond it.
    flags: float32 [1, m], the mask of the patterns, with query_axis 0.
    causal: query i sees the patterns j <= i.
  """
  iota = lambda axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
  conditions = []
  if queries is not None:
    conditions.append(first_query + iota(query_axis) < queries)
  if patterns is not None:
    conditions.append(first_pattern + iota(1 - query_axis) < patterns)
  if causal:
    pattern = first_pattern + iota(1 - query_axis)
    conditions.append(pattern <= first_query + iota(query_axis))
  if flags is not None:
    conditions.append(jnp.broadcast_to(flags, shape) > 0)
  seen = None
  for condition in conditions:
    seen = condition if seen is None else seen & condition
  return seen
