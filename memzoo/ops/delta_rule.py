"""The delta rule: what is stored under k_t is moved towards v_t.

  S'  = a_t S_{t−1}
  S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ ,   o_t = S_tᵀ q_t

The state S is [K, V]. The decay a_t = exp(log_decay_t) is absent, a scalar per
step, or one per key channel; it acts before the correction. Sources: Yang et
al. 2024, arXiv:2406.06484, eq. 5-11 (DeltaNet, the chunkwise WY form); Yang et
al. 2024, arXiv:2412.06464, eq. 10 (scalar decay); Kimi Team 2025,
arXiv:2510.26692, eq. 1 (decay per channel).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.kernels import external
from memzoo.kernels.chunk_scan import Axes, chunk_scan
from memzoo.ops import arguments, chunk, decay, linear_attention

# Measured: python -m experiments.bench --suite=cpu (benchmarks/).
CHUNK_SIZES = decay.ChunkSizes(
  scalar=dict(cpu=32, gpu=64, tpu=64), channel=dict(cpu=16, gpu=64, tpu=64)
)
GROUP = 8  # chunks whose state-free part is computed at once


def write(s, k, v, beta, log_decay=None):
  """One correction: s [K, V], k [K], v [V], beta scalar, log_decay scalar,
  [K] or None -> [K, V]."""
  if log_decay is not None:
    s = jnp.exp(log_decay.astype(s.dtype)).reshape(-1, 1) * s
  k = k.astype(s.dtype)
  error = v.astype(s.dtype) - k @ s
  return s + beta.astype(s.dtype) * k[:, None] * error


read = linear_attention.read


def step(s, q, k, v, beta, log_decay=None):
  """One step: (s [K, V], o [V])."""
  s = write(s, k, v, beta, log_decay)
  return s, read(s, q)


def delta_rule(
  s: axes.Matrix,
  q: axes.Queries,
  k: axes.Keys,
  v: axes.Values,
  *,
  beta: axes.Scalars,
  log_decay: axes.LogDecay | None = None,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: axes.Matrix | None = None,
  implementation: str | None = None,
  chunk_size: int | None = None,
) -> tuple[axes.Matrix, axes.Values]:
  """The delta rule over one sequence of one head.

  Args:
    s: float32 [K, V], the state to go on from.
    q: [T, K]; no scaling is applied.
    k: [T, K]; of unit norm where the paper normalises.
    v: [T, V].
    beta: [T], in [0, 2] with keys of unit norm: 0 writes nothing, 1 replaces
      what k_t held, 2 reflects.
    log_decay: [T], [T, K], or None for no decay. At most 0; −inf clears (the
      channel of) the state and has gradient 0.
    reset: bool [T]; True: the state is `fresh` before step t.
    mask: bool [T]; False: no step t; the output there is zero.
    fresh: [K, V], zeros by default.
    implementation: 'scan', 'chunk', 'pallas' (the chunk form as a kernel),
      'pallas_split' (as three, for few sequences and heads), 'jla'
      (`memzoo.kernels.external`), or None.
    chunk_size: C of the chunk form, a power of two; None for the platform's.

  Returns:
    (state float32 [K, V], outputs [T, V] in v's dtype).

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a form that does not exist.
  """
  arguments.check_matrix_op(
    "delta_rule", s, q, k, v, beta=beta, log_decay=log_decay, reset=reset,
    mask=mask, fresh=fresh,
  )  # fmt: skip
  size = decay.chunk_size(chunk_size, log_decay, CHUNK_SIZES)
  if mask is not None and reset is not None:
    reset = reset & mask
  inputs = Inputs(q, k, v, beta, log_decay, reset, mask)
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
    "jla": lambda: external.jla(
      s,
      q,
      k,
      v,
      beta=beta,
      log_decay=log_decay,
      reset=reset,
      mask=mask,
      fresh=fresh,
    ),
  }
  return dispatch.run("delta_rule", forms, implementation)


class Inputs(NamedTuple):
  q: jax.Array
  k: jax.Array
  v: jax.Array
  beta: jax.Array
  log_decay: jax.Array | None
  reset: jax.Array | None
  mask: jax.Array | None


class Local(NamedTuple):
  """What a chunk knows without the state. Its writes are Σ_j k_j u_jᵀ with
  corrections U = u − w S, linear in the state S at its start."""

  u: jax.Array  # [C, V]
  w: jax.Array  # [C, K]
  scores: jax.Array  # [C, C]
  out: jax.Array | None  # [C, V] what a learned fresh state adds
  q_in: jax.Array  # [C, K] reads the incoming state
  k_out: jax.Array  # [C, K] keys decayed to the chunk's end
  kept: jax.Array | None  # [K, V] what stays of a learned fresh state
  through: jax.Array  # [G, 1]
  live: jax.Array | None
  poison: jax.Array | None
  v: jax.Array  # for its dtype


def _prepare(inputs: Inputs, fresh, name: str | None = None) -> Local:
  bad, g, q, k, v, beta = decay.quarantine(
    inputs.reset, inputs.mask, inputs.log_decay, inputs.q, inputs.k, inputs.v,
    inputs.beta,
  )  # fmt: skip
  d = decay.decays(g, inputs.reset, inputs.mask, bad, q.shape[0])
  mm = partial(chunk.matmul, dtype=q.dtype)
  beta = beta.astype(jnp.float32)
  q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
  k_in, q_in = k32 * d.into, q32 * d.into
  right = beta * v.astype(jnp.float32)
  live = out = kept = None
  if inputs.reset is not None:
    live = d.live
    if fresh is not None:
      fresh = fresh.astype(jnp.float32)
      right -= beta * mm(chunk.where(live, 0.0, k_in), fresh)
      out = mm(chunk.where(live, 0.0, q_in), fresh)
      kept = chunk.where(d.ends_live, 0.0, chunk.last(d.into))
      kept = chunk.column(kept) * fresh
    k_in = chunk.where(live, k_in, 0.0)
    q_in = chunk.where(live, q_in, 0.0)
  u, w = chunk.unit_lower_solve(
    beta * decay.scores(k, k, d, q.dtype),
    (right, beta * k_in),
    q.dtype,
    name,
  )
  return Local(
    u=u,
    w=w,
    scores=decay.scores(q, k, d, q.dtype),
    out=out,
    q_in=q_in,
    k_out=k32 * d.onto,
    kept=kept,
    through=d.through,
    live=live,
    poison=d.poison,
    v=v,
  )


def _effect(local: Local):
  dtype = local.v.dtype
  matrix = -chunk.matmul(local.k_out.T, local.w, dtype)
  eye = jnp.eye(matrix.shape[0], dtype=jnp.float32)
  matrix += local.through * eye
  return matrix, _close(chunk.matmul(local.k_out.T, local.u, dtype), local)


def _close(added, local):
  if local.kept is not None:
    added += local.kept
  if local.poison is not None:
    added = chunk.where(chunk.last(local.poison), jnp.nan, added)
  return added


def _compose(first, second):
  return (
    chunk.matmul(second[0], first[0]),
    chunk.matmul(second[0], first[1]) + second[1],
  )


def _apply(effect, s):
  return chunk.matmul(effect[0], s) + effect[1]


def _advance(s, local: Local):
  return _both(s, local)[0]


def _emit(s, local: Local):
  return _both(s, local)[1]


def _both(s, local: Local):
  dtype = local.v.dtype
  old = s
  s, spoiled = decay.enter(s, local.live, local.live is not None)
  u = local.u - chunk.matmul(local.w, s, dtype)
  new = chunk.matmul(local.k_out.T, u, dtype)
  new = _close(local.through * s + new, local)
  if spoiled is not None:
    new = chunk.where(chunk.last(spoiled), old, new)
  out = chunk.matmul(local.q_in, s, dtype)
  out += chunk.matmul(local.scores, u, dtype)
  if local.out is not None:
    out += local.out
  return new, decay.spoil(out, local.poison, spoiled).astype(dtype)


FUNCTION = chunk.ChunkFunction(
  _prepare, _advance, _emit, _effect, _compose, _apply, _both
)


AXES = Axes(
  state="KV",
  inputs=Inputs("CK", "CK", "CV", "C1", "CK", "C1", "C1"),
  constants="KV",
  outputs="CV",
)


def _scan(s, inputs: Inputs, fresh):
  return arguments.scan_steps(
    lambda s, x: step(s, x.q, x.k, x.v, x.beta, x.log_decay), s, inputs, fresh
  )
