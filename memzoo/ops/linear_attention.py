"""Linear attention: S_t = a_t S_{t−1} + k_t v_tᵀ, read o_t = S_tᵀ q_t.

The state S is [K, V], the layout of flash-linear-attention's states. The decay
a_t = exp(log_decay_t) is absent, a scalar per step, or one per key channel.
Sources: Katharopoulos et al. 2020, arXiv:2006.16236, eq. 16-20 (no decay);
Yang et al. 2023, arXiv:2312.06635, eq. 3 and section 4 (gated, chunkwise).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.kernels import external
from memzoo.kernels.chunk_scan import Axes, chunk_scan
from memzoo.ops import arguments, chunk, decay

# Measured: python -m experiments.bench --suite=cpu (benchmarks/).
CHUNK_SIZES = decay.ChunkSizes(
  scalar=dict(cpu=64), channel=dict(cpu=32, gpu=64, tpu=64)
)


def write(s, k, v, log_decay=None):
  """S ← a S + k vᵀ: s [K, V], k [K], v [V], log_decay scalar, [K] or None."""
  if log_decay is not None:
    s = jnp.exp(log_decay.astype(s.dtype)).reshape(-1, 1) * s
  return s + k.astype(s.dtype)[:, None] * v.astype(s.dtype)


def read(s, q):
  """o = Sᵀ q: s [K, V], q [K] -> [V], in q's dtype."""
  return (q.astype(s.dtype) @ s).astype(q.dtype)


def step(s, q, k, v, log_decay=None):
  """One step: (s [K, V], o [V])."""
  s = write(s, k, v, log_decay)
  return s, read(s, q)


def linear_attention(
  s: axes.Matrix,
  q: axes.Queries,
  k: axes.Keys,
  v: axes.Values,
  *,
  log_decay: axes.LogDecay | None = None,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: axes.Matrix | None = None,
  implementation: str | None = None,
  chunk_size: int | None = None,
) -> tuple[axes.Matrix, axes.Values]:
  """Linear attention over one sequence of one head.

  Args:
    s: float32 [K, V], the state to go on from.
    q: [T, K]; no scaling is applied.
    k: [T, K].
    v: [T, V].
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
    "linear_attention", s, q, k, v, log_decay=log_decay, reset=reset,
    mask=mask, fresh=fresh,
  )  # fmt: skip
  size = decay.chunk_size(chunk_size, log_decay, CHUNK_SIZES)
  if mask is not None and reset is not None:
    reset = reset & mask
  inputs = Inputs(q, k, v, log_decay, reset, mask)
  kernel = partial(
    chunk_scan, FUNCTION, s, inputs, fresh, axes=AXES, chunk_size=size
  )
  forms = {
    "scan": lambda: _scan(s, inputs, fresh),
    "chunk": lambda: chunk.run(
      FUNCTION, s, inputs, fresh, chunk_size=size, columns=True
    ),
    "pallas": lambda: kernel(split=False),
    "pallas_split": lambda: kernel(split=True),
    "jla": lambda: external.jla(
      s,
      q,
      k,
      v,
      log_decay=log_decay,
      reset=reset,
      mask=mask,
      fresh=fresh,
    ),
  }
  return dispatch.run("linear_attention", forms, implementation)


class Inputs(NamedTuple):
  q: jax.Array
  k: jax.Array
  v: jax.Array
  log_decay: jax.Array | None
  reset: jax.Array | None
  mask: jax.Array | None


class Local(NamedTuple):
  """What a chunk knows without the state; G as in `decay.Decays`."""

  out: jax.Array  # [C, V] from the chunk's own writes
  q_in: jax.Array  # [C, K] reads the incoming state
  offset: jax.Array  # [K, V] what the chunk adds to it
  through: jax.Array  # [G, 1] how much of it stays
  live: jax.Array | None  # [C, 1], where resets are served
  poison: jax.Array | None
  v: jax.Array  # for its dtype


def _prepare(inputs: Inputs, fresh) -> Local:
  bad, g, q, k, v = decay.quarantine(
    inputs.reset, inputs.mask, inputs.log_decay, inputs.q, inputs.k, inputs.v
  )
  d = decay.decays(g, inputs.reset, inputs.mask, bad, q.shape[0])
  mm = partial(chunk.matmul, dtype=q.dtype)
  out = mm(decay.scores(q, k, d, q.dtype), v)
  q_in = q.astype(jnp.float32) * d.into
  offset = mm((k.astype(jnp.float32) * d.onto).T, v)
  live = None
  if inputs.reset is not None:
    live = d.live
    if fresh is not None:
      fresh = fresh.astype(jnp.float32)
      out += mm(chunk.where(live, 0.0, q_in), fresh)
      kept = chunk.where(d.ends_live, 0.0, chunk.last(d.into))
      offset += chunk.column(kept) * fresh
    q_in = chunk.where(live, q_in, 0.0)
    if d.poison is not None:
      offset = chunk.where(chunk.last(d.poison), jnp.nan, offset)
  return Local(out, q_in, offset, d.through, live, d.poison, v)


def _effect(local: Local):
  return local.through, local.offset


def _compose(first, second):
  return second[0] * first[0], _scaled(second[0], first[1]) + second[1]


def _apply(effect, s):
  through, offset = effect
  return _scaled(through, s) + offset


def _scaled(scale, s):
  # What is cleared is cleared before it is multiplied: infinities stop there,
  # and so do their gradients.
  return scale * jnp.where(scale == 0, 0.0, s)


def _advance(s, local: Local):
  return _apply(_effect(local), s)


def _emit(s, local: Local):
  s, spoiled = decay.enter(s, local.live, local.live is not None)
  out = local.out + chunk.matmul(local.q_in, s, local.v.dtype)
  return decay.spoil(out, local.poison, spoiled).astype(local.v.dtype)


FUNCTION = chunk.ChunkFunction(
  _prepare, _advance, _emit, _effect, _compose, _apply
)


AXES = Axes(
  state="KV",
  inputs=Inputs("CK", "CK", "CV", "CK", "C1", "C1"),
  constants="KV",
  outputs="CV",
)


def _scan(s, inputs: Inputs, fresh):
  return arguments.scan_steps(
    lambda s, x: step(s, x.q, x.k, x.v, x.log_decay), s, inputs, fresh
  )
