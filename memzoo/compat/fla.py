"""flash-linear-attention's functions on the ops of this zoo.

A port of a model that calls `fla.ops` changes its import:

>>> from memzoo.compat.fla import chunk_gated_delta_rule
>>> o, state = chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)

Conventions, theirs as ours: arrays are [B, T, H, ·], states [N, H, K, V] in
float32, decays are logarithms (natural ones), q is scaled by 1 / sqrt(K) where
`scale` is None, and the result is (o, state), the state None unless
`output_final_state` asks for it. Where v has more heads than q and k, theirs
are repeated. With `cu_seqlens` [N + 1] the batch is one row of N packed
sequences; under `jax.jit` it may be traced as long as no states go in or out.

  theirs                                  ours
  chunk_linear_attn, chunk_simple_gla,    linear_attention: no decay, scalar
  chunk_gla, chunk_retention,             ([B, T, H], or g_gamma [H]), or per
  chunk_lightning_attn, chunk_rwkv6       channel ([B, T, H, K])
  chunk_delta_rule, chunk_kda,            delta_rule
  chunk_gated_delta_rule (chunk_gdn),
  chunk_gated_delta_product
  chunk_gdn2, chunk_rwkv7,                diag_plus_rank_one: a reads the state
  chunk_dplr_delta_rule,                  before its decay
  chunk_iplr_delta_rule
  chunk_gsa                               value_decay, then linear_attention
  chunk_mesa_net                          mesa
  parallel_based                          linear_attention of `features.taylor`
  fused_recurrent_hgrn                    linear_recurrence

`fused_recurrent_…` are the same functions, token by token. Hints to their
kernels (`HINTS`) are accepted and have no effect. Their functions that are not
here have no counterpart: `__getattr__` says so.

Source: flash-linear-attention (github.com/fla-org/flash-linear-attention),
`fla/ops/*/chunk.py` and `naive.py`, August 2026.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core import dispatch
from memzoo.core.cell import reset_from_cu_seqlens
from memzoo.ops import features, mesa as mesa_lib, norm
from memzoo.ops.batched import batched
from memzoo.ops.delta_rule import delta_rule
from memzoo.ops.diag_plus_rank_one import diag_plus_rank_one
from memzoo.ops.linear_attention import linear_attention
from memzoo.ops.linear_recurrence import linear_recurrence
from memzoo.ops.value_decay import value_decay

HINTS = (
  "cu_seqlens_cpu", "chunk_indices", "chunk_size", "safe_gate",
  "disable_recompute", "checkpoint_level",
)  # fmt: skip


def _check_hints(name, given):
  for hint in given:
    if hint not in HINTS:
      raise TypeError(
        f"{name}: unknown argument {hint!r}; " + dispatch.nearest(hint, HINTS)
      )


def _check_arrays(name, arrays):
  """That all arrays are [B, T, ...] of one B and T; None is passed over."""
  lead = next(iter(arrays.values())).shape[:2]
  for key, x in arrays.items():
    if x is not None and (x.ndim < 3 or x.shape[:2] != lead):
      raise ValueError(
        f"{name}: {key} must be [B, T, ...] with B, T = {lead}, got shape "
        f"{x.shape}"
      )


def _grouped(v, *arrays):
  """Arrays with as many heads as v, each head's repeated side by side."""
  groups = [v.shape[2] // x.shape[2] for x in arrays]
  for x, n in zip(arrays, groups):
    if n * x.shape[2] != v.shape[2]:
      raise ValueError(
        f"the heads of v, {v.shape[2]}, must be a multiple of those of q and "
        f"k, {x.shape[2]}"
      )
  return [
    x if n == 1 else jnp.repeat(x, n, axis=2) for x, n in zip(arrays, groups)
  ]


def _scaled(q, scale):
  return q * jnp.asarray(
    q.shape[-1] ** -0.5 if scale is None else scale, q.dtype
  )


def _log_decay(g, a_log, dt_bias, lower_bound=None):
  """The log-decay of a raw gate [B, T, H, ...]: −exp(A) softplus(g + bias)."""
  g = g.astype(jnp.float32)
  shape = g.shape[2:]
  if dt_bias is not None:
    g = g + dt_bias.astype(jnp.float32).reshape(shape)
  if lower_bound is not None:
    return lower_bound * jax.nn.sigmoid(g)
  rate = jnp.exp(a_log.astype(jnp.float32))
  return -rate.reshape((-1,) + (1,) * (len(shape) - 1)) * jax.nn.softplus(g)


class _Packing:
  """One row of packed sequences as a batch of padded ones, and back."""

  def __init__(self, cu_seqlens):
    self.ends = np.asarray(cu_seqlens)
    self.lengths = np.diff(self.ends)
    place = np.arange(max(self.lengths.max(initial=1), 1))
    self.mask = place < self.lengths[:, None]
    self.index = np.where(self.mask, self.ends[:-1, None] + place, 0)
    self.row = np.repeat(np.arange(len(self.lengths)), self.lengths)
    self.place = np.arange(self.ends[-1]) - self.ends[self.row]

  def unpack(self, x):
    return None if x is None else x[0, self.index]

  def pack(self, x):
    return x[self.row, self.place][None]


def _run(name, op, start, state, arrays, cu_seqlens, wanted):
  """Runs `op` over a batch, or over one row of packed sequences.

  Args:
    name: of the public function.
    op: (state, arrays, reset, mask) -> (state, outputs [B, T, ...]).
    start: n -> the state of n sequences that have seen nothing.
    state: of each sequence, or None.
    arrays: {name: [B, T, ...] or None}.
    cu_seqlens: int [N + 1] or None.
    wanted: whether the final state is returned.

  Returns:
    (outputs, state or None).
  """
  _check_arrays(name, arrays)
  rows = next(iter(arrays.values())).shape[0]
  sequences = rows if cu_seqlens is None else len(cu_seqlens) - 1
  if cu_seqlens is not None and rows != 1:
    raise ValueError(
      f"{name}: with cu_seqlens the batch is 1 row of packed sequences, got "
      f"{rows}"
    )
  for leaf in jax.tree.leaves(state):
    if leaf.shape[0] != sequences:
      raise ValueError(
        f"{name}: initial_state must have one entry for each of the "
        f"{sequences} sequences, got {leaf.shape[0]}"
      )
  given = state is not None
  if given:
    state = jax.tree.map(lambda x: x.astype(jnp.float32), state)
  if cu_seqlens is None:
    state, o = op(state if given else start(rows), arrays, None, None)
  elif not given and not wanted:
    length = next(iter(arrays.values())).shape[1]
    reset = reset_from_cu_seqlens(cu_seqlens, length)[None]
    state, o = op(start(1), arrays, reset, None)
  elif isinstance(cu_seqlens, jax.core.Tracer):
    raise NotImplementedError(
      f"{name}: cu_seqlens is traced, and the states of packed sequences need "
      "their lengths: pass it as a numpy array that jit does not trace"
    )
  else:
    packing = _Packing(cu_seqlens)
    arrays = {key: packing.unpack(x) for key, x in arrays.items()}
    mask = jnp.asarray(packing.mask)
    state, o = op(state if given else start(sequences), arrays, None, mask)
    o = packing.pack(o)
  return o, state if wanted else None


def _matrix(
  name, op, arrays, *, initial_state, output_final_state, cu_seqlens,
  implementation, state_v_first=False,
):  # fmt: skip
  """An op on matrices [K, V]: `arrays` has q, k, v and its gates by name."""
  heads, width = arrays["k"].shape[2:]
  values = arrays["v"].shape[3]
  swap = lambda s: None if s is None else jnp.swapaxes(s, -1, -2)

  def run(state, arrays, reset, mask):
    gates = {n: x for n, x in arrays.items() if n not in "qkv"}
    return batched(op)(
      state, arrays["q"], arrays["k"], arrays["v"], **gates, reset=reset,
      mask=mask, implementation=implementation,
    )  # fmt: skip

  o, state = _run(
    name, run,
    lambda n: jnp.zeros((n, heads, width, values), jnp.float32),
    swap(initial_state) if state_v_first else initial_state,
    arrays, cu_seqlens, output_final_state,
  )  # fmt: skip
  return o, swap(state) if state_v_first else state


def _constant(g_gamma, q):
  """A log-decay for each head, [H], at every token, [B, T, H]."""
  rate = jnp.asarray(g_gamma, jnp.float32)
  return jnp.broadcast_to(rate, q.shape[:2] + rate.shape)


def chunk_linear_attn(
  q, k, v, scale=None, initial_state=None, output_final_state=False,
  normalize=True, cu_seqlens=None, implementation=None,
):  # fmt: skip
  """Linear attention; with `normalize` over q·Σ k, and the state is (s, z) with
  z [N, 1, H, K]."""
  run = functools.partial(
    _matrix, "chunk_linear_attn", linear_attention, cu_seqlens=cu_seqlens,
    output_final_state=output_final_state, implementation=implementation,
  )  # fmt: skip
  q = _scaled(q, scale)
  if not normalize:
    return run(dict(q=q, k=k, v=v), initial_state=initial_state)
  if initial_state is not None and not isinstance(initial_state, tuple):
    zeros = jnp.zeros_like(initial_state[..., 0])[:, None]
    initial_state = initial_state, zeros
  if initial_state is not None:
    s, z = initial_state
    initial_state = jnp.concatenate([s, z[:, 0, ..., None]], axis=-1)
  o, state = run(
    dict(q=q, k=k, v=jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)),
    initial_state=initial_state,
  )
  o = o[..., :-1] / (o[..., -1:] + jnp.asarray(1e-10, o.dtype))
  if state is not None:
    state = state[..., :-1], state[:, None, ..., -1]
  return o, state


def chunk_simple_gla(
  q, k, v, g=None, g_gamma=None, scale=None, initial_state=None,
  output_final_state=False, state_v_first=False, cu_seqlens=None,
  implementation=None, **hints,
):  # fmt: skip
  """Linear attention with a decay per head: g [B, T, H], or g_gamma [H]."""
  _check_hints("chunk_simple_gla", hints)
  q, k = _grouped(v, q, k)
  if g_gamma is not None:
    constant = _constant(g_gamma, v)
    g = constant if g is None else g.astype(jnp.float32) + constant
  gates = {} if g is None else dict(log_decay=g)
  return _matrix(
    "chunk_simple_gla", linear_attention,
    dict(q=_scaled(q, scale), k=k, v=v, **gates), initial_state=initial_state,
    output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    implementation=implementation, state_v_first=state_v_first,
  )  # fmt: skip


def chunk_gla(
  q, k, v, g, scale=None, initial_state=None, output_final_state=False,
  state_v_first=False, cu_seqlens=None, implementation=None, **hints,
):  # fmt: skip
  """Gated linear attention: a decay per key channel, g [B, T, H, K]."""
  _check_hints("chunk_gla", hints)
  return _matrix(
    "chunk_gla", linear_attention,
    dict(q=_scaled(q, scale), k=k, v=v, log_decay=g),
    initial_state=initial_state, output_final_state=output_final_state,
    cu_seqlens=cu_seqlens, implementation=implementation,
    state_v_first=state_v_first,
  )  # fmt: skip


def chunk_retention(
  q, k, v, scale=None, initial_state=None, output_final_state=False,
  cu_seqlens=None, implementation=None, **hints,
):  # fmt: skip
  """Retention: head h decays by 1 − 2^(−5−h)."""
  _check_hints("chunk_retention", hints)
  return chunk_simple_gla(
    q, k, v, g_gamma=np.log1p(-(2.0 ** (-5.0 - np.arange(v.shape[2])))),
    scale=scale, initial_state=initial_state,
    output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    implementation=implementation,
  )  # fmt: skip


def chunk_lightning_attn(
  q, k, v, layer_idx, num_layers, scale=None, initial_state=None,
  output_final_state=False, cu_seqlens=None, implementation=None, **hints,
):  # fmt: skip
  """Lightning attention: head h of H decays by exp(−8 h / H (1 − layer))."""
  _check_hints("chunk_lightning_attn", hints)
  heads = v.shape[2]
  rate = 8 / heads * (1 - layer_idx / num_layers)
  return chunk_simple_gla(
    q, k, v, g_gamma=-rate * np.arange(heads), scale=scale,
    initial_state=initial_state, output_final_state=output_final_state,
    cu_seqlens=cu_seqlens, implementation=implementation,
  )  # fmt: skip


def chunk_rwkv6(
  r, k, v, w, u, scale=None, initial_state=None, output_final_state=False,
  cu_seqlens=None, implementation=None, **hints,
):  # fmt: skip
  """RWKV-6: r reads the state before it decays (w [B, T, H, K]) and is written,
  and the present token under the bonus u [H, K]."""
  _check_hints("chunk_rwkv6", hints)
  r = _scaled(r, scale)
  shape = v.shape[2], k.shape[3], v.shape[3]

  def run(state, x, reset, mask):
    # Steps shifted by one: what t wrote is there for t + 1 to read.
    if mask is not None:  # no step: nothing decays and nothing is written
      live = mask[..., None, None]
      w = jnp.where(live, x["w"], jnp.zeros_like(x["w"]))
      x = x | dict(w=w, k=jnp.where(live, x["k"], jnp.zeros_like(x["k"])))
    late = lambda z: jnp.pad(z, ((0, 0), (1, 0)) + ((0, 0),) * (z.ndim - 2))
    k = late(x["k"])
    if reset is not None:
      reset = jnp.pad(reset, ((0, 0), (0, 1)))
      k = jnp.where(reset[..., None, None], jnp.zeros_like(k), k)
    state, o = batched(linear_attention)(
      state, jnp.pad(x["r"], ((0, 0), (0, 1), (0, 0), (0, 0))), k,
      late(x["v"]), log_decay=late(x["w"].astype(jnp.float32)), reset=reset,
      implementation=implementation,
    )  # fmt: skip
    return state, o[:, :-1]

  o, state = _run(
    "chunk_rwkv6", run, lambda n: jnp.zeros((n, *shape), jnp.float32),
    initial_state, dict(r=r, k=k, v=v, w=w), cu_seqlens, output_final_state,
  )  # fmt: skip
  bonus = jnp.sum(r * k * u.astype(r.dtype), axis=-1, keepdims=True)
  return o + bonus * v, state


def chunk_delta_rule(
  q, k, v, beta, scale=None, initial_state=None, output_final_state=False,
  use_qk_l2norm_in_kernel=False, cu_seqlens=None, implementation=None, **hints,
):  # fmt: skip
  """The delta rule: beta [B, T, H]."""
  _check_hints("chunk_delta_rule", hints)
  return _delta(
    "chunk_delta_rule", q, k, v, beta, None, scale, use_qk_l2norm_in_kernel,
    initial_state=initial_state, output_final_state=output_final_state,
    cu_seqlens=cu_seqlens, implementation=implementation,
  )  # fmt: skip


def chunk_gated_delta_rule(
  q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
  use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None,
  dt_bias=None, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,
  state_v_first=False, cu_seqlens=None, implementation=None, **hints,
):  # fmt: skip
  """The gated delta rule: g [B, T, HV], beta [B, T, HV]."""
  _check_hints("chunk_gated_delta_rule", hints)
  if use_gate_in_kernel:
    g = _log_decay(g, A_log, dt_bias)
  return _delta(
    "chunk_gated_delta_rule", q, k, v,
    _beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval), g, scale,
    use_qk_l2norm_in_kernel, initial_state=initial_state,
    output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    implementation=implementation, state_v_first=state_v_first,
  )  # fmt: skip


def chunk_kda(
  q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
  use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None,
  dt_bias=None, lower_bound=None, use_beta_sigmoid_in_kernel=False,
  allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
  implementation=None, **hints,
):  # fmt: skip
  """Kimi delta attention: g [B, T, HV, K], beta [B, T, HV]."""
  _check_hints("chunk_kda", hints)
  if use_gate_in_kernel:
    g = _log_decay(g, A_log, dt_bias, lower_bound)
  return _delta(
    "chunk_kda", q, k, v,
    _beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval), g, scale,
    use_qk_l2norm_in_kernel, initial_state=initial_state,
    output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    implementation=implementation, state_v_first=state_v_first,
  )  # fmt: skip


def _beta(beta, raw, doubled):
  beta = jax.nn.sigmoid(beta) if raw else beta
  return 2 * beta if doubled else beta


def _delta(name, q, k, v, beta, g, scale, normalize, **run):
  q, k = _grouped(v, q, k)
  if normalize:
    q, k = norm.l2_normalize(q), norm.l2_normalize(k)
  gates = dict(beta=beta) | ({} if g is None else dict(log_decay=g))
  return _matrix(
    name, delta_rule, dict(q=_scaled(q, scale), k=k, v=v, **gates), **run
  )


def chunk_gated_delta_product(
  q, k, v, g, beta, num_householder, scale=None, initial_state=None,
  output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None,
  implementation=None,
):  # fmt: skip
  """n corrections a token: q [B, T, H, K], g [B, T, H] or None; k, v and beta
  have n T steps."""
  n = num_householder
  if k.shape[1] != n * q.shape[1]:
    raise ValueError(
      f"chunk_gated_delta_product: k must have {n} steps a token, "
      f"{n * q.shape[1]}, got {k.shape[1]}"
    )

  def spread(z, place):
    """[B, T, ...] at one of the n steps of each token, zeros elsewhere."""
    zeros = jnp.zeros(z.shape[:2] + (n,) + z.shape[2:], z.dtype)
    z = zeros.at[:, :, place].set(z)
    return z.reshape(z.shape[:1] + (-1,) + z.shape[3:])

  if cu_seqlens is not None:
    cu_seqlens = cu_seqlens * n
  o, state = _delta(
    "chunk_gated_delta_product", spread(q, n - 1), k, v, beta,
    None if g is None else spread(g.astype(jnp.float32), 0), scale,
    use_qk_l2norm_in_kernel, initial_state=initial_state,
    output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    implementation=implementation,
  )  # fmt: skip
  return o[:, n - 1 :: n], state


def chunk_gdn2(
  q, k, v, g, b, w, scale=None, initial_state=None, output_final_state=False,
  use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None,
  dt_bias=None, lower_bound=None, state_v_first=False, cu_seqlens=None,
  implementation=None, **hints,
):  # fmt: skip
  """Gated DeltaNet-2: erases under b ∘ k, writes w ∘ v; g, b [B, T, H, K],
  w [B, T, H, V]."""
  _check_hints("chunk_gdn2", hints)
  if use_gate_in_kernel:
    g = _log_decay(g, A_log, dt_bias, lower_bound)
  if use_qk_l2norm_in_kernel:
    q, k = norm.l2_normalize(q), norm.l2_normalize(k)
  read = -jnp.exp(g.astype(jnp.float32)) * (b * k).astype(jnp.float32)
  return _matrix(
    "chunk_gdn2", diag_plus_rank_one,
    dict(
      q=_scaled(q, scale), k=k, v=w * v, a=read.astype(k.dtype), log_decay=g
    ),
    initial_state=initial_state, output_final_state=output_final_state,
    cu_seqlens=cu_seqlens, implementation=implementation,
    state_v_first=state_v_first,
  )  # fmt: skip


def chunk_dplr_delta_rule(
  q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False,
  cu_seqlens=None, implementation=None, **hints,
):  # fmt: skip
  """S_t = Diag(exp(gk_t)) S_{t−1} + b_t (aᵀ_t S_{t−1}) + k_t v_tᵀ."""
  _check_hints("chunk_dplr_delta_rule", hints)
  return _matrix(
    "chunk_dplr_delta_rule", diag_plus_rank_one,
    dict(q=_scaled(q, scale), k=k, v=v, a=a, b=b, log_decay=gk),
    initial_state=initial_state, output_final_state=output_final_state,
    cu_seqlens=cu_seqlens, implementation=implementation,
  )  # fmt: skip


def chunk_iplr_delta_rule(
  q, k, v, a, b, scale=None, initial_state=None, output_final_state=False,
  cu_seqlens=None, implementation=None, **hints,
):  # fmt: skip
  """S_t = S_{t−1} + b_t (aᵀ_t S_{t−1}) + k_t v_tᵀ."""
  _check_hints("chunk_iplr_delta_rule", hints)
  return _matrix(
    "chunk_iplr_delta_rule", diag_plus_rank_one,
    dict(q=_scaled(q, scale), k=k, v=v, a=a, b=b), initial_state=initial_state,
    output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    implementation=implementation,
  )  # fmt: skip


def chunk_rwkv7(
  r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False,
  cu_seqlens=None, implementation=None, **hints,
):  # fmt: skip
  """RWKV-7: `chunk_dplr_delta_rule` with log-decay w and no scale."""
  _check_hints("chunk_rwkv7", hints)
  return chunk_dplr_delta_rule(
    r, k, v, a, b, w, scale=scale, initial_state=initial_state,
    output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    implementation=implementation,
  )  # fmt: skip


def chunk_gsa(
  q, k, v, s, g, scale=None, initial_state=None, output_final_state=False,
  cu_seqlens=None, implementation=None, **hints,
):  # fmt: skip
  """Gated slot attention: s, g [B, T, H, M]; the state is ([N, H, K, M],
  [N, H, M, V]). k, v, s and g are repeated for q's heads, and so is the
  state."""
  _check_hints("chunk_gsa", hints)
  k, v, s, g = _grouped(q, k, v, s, g)
  heads, width, slots, values = *k.shape[2:], s.shape[3], v.shape[3]
  form = dict(implementation=implementation)

  def run(state, x, reset, mask):
    flags = form | dict(reset=reset, mask=mask, log_decay=x["g"])
    keys, scores = batched(value_decay)(
      state[0], x["q"], x["k"], x["s"], **flags
    )
    share = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    values, o = batched(linear_attention)(
      state[1], share.astype(x["q"].dtype), x["s"], x["v"], **flags
    )
    return (keys, values), o

  start = lambda n: (
    jnp.zeros((n, heads, width, slots), jnp.float32),
    jnp.zeros((n, heads, slots, values), jnp.float32),
  )
  arrays = dict(q=_scaled(q, scale), k=k, v=v, s=s, g=g)
  return _run(
    "chunk_gsa", run, start, initial_state, arrays, cu_seqlens,
    output_final_state,
  )  # fmt: skip


def chunk_mesa_net(
  q, k, v, g, beta, lamb, h_kk_init=None, h_kv_init=None,
  output_final_state=False, max_CG_iteration=30, use_qk_l2norm_in_kernel=False,
  cu_seqlens=None, implementation=None, **hints,
):  # fmt: skip
  """The Mesa layer: g, beta [B, T, H], lamb [H, K]. Returns (o, h_kk, h_kv),
  the states None unless they are asked for."""
  _check_hints("chunk_mesa_net", hints)
  if use_qk_l2norm_in_kernel:
    q, k = norm.l2_normalize(q), norm.l2_normalize(k)
  heads, width, values = *k.shape[2:], v.shape[3]
  if (h_kk_init is None) != (h_kv_init is None):
    raise ValueError("chunk_mesa_net: give h_kk_init and h_kv_init, or neither")
  state = None if h_kk_init is None else mesa_lib.State(h_kk_init, h_kv_init)

  def run(state, x, reset, mask):
    one = lambda state, ridge, q, k, v, g, beta, reset, mask: mesa_lib.mesa(
      state, q, k, v, beta=beta, ridge=ridge, log_decay=g, reset=reset,
      mask=mask, implementation=implementation, solver_steps=max_CG_iteration,
    )  # fmt: skip
    heads = jax.vmap(one, (0, 0, 1, 1, 1, 1, 1, None, None), (0, 1))
    rows = jax.vmap(heads, (0, None, 0, 0, 0, 0, 0, 0, 0))
    return rows(
      state, lamb, x["q"], x["k"], x["v"], x["g"], x["beta"], reset, mask
    )

  o, state = _run(
    "chunk_mesa_net", run,
    lambda n: mesa_lib.State(
      jnp.zeros((n, heads, width, width), jnp.float32),
      jnp.zeros((n, heads, width, values), jnp.float32),
    ),
    state, dict(q=q, k=k, v=v, g=g, beta=beta), cu_seqlens, output_final_state,
  )  # fmt: skip
  return (o, None, None) if state is None else (o, state.kk, state.kv)


def parallel_based(q, k, v, scale=None, use_norm=True, implementation=None):
  """Based's attention, 1 + s + s² / 2 of s = q·k: o alone is returned."""
  width = q.shape[-1]
  factor = width**-0.5 if scale is None else scale
  # `taylor` divides s by sqrt(K).
  q = features.taylor(q * jnp.asarray(factor * width**0.5, q.dtype))
  o, _ = chunk_linear_attn(
    q, features.taylor(k), jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1),
    scale=1.0, normalize=False, implementation=implementation,
  )  # fmt: skip
  if not use_norm:
    return o[..., :-1]
  return o[..., :-1] / (o[..., -1:] + jnp.asarray(1e-6, o.dtype))


def fused_recurrent_hgrn(
  x, g, initial_state=None, output_final_state=False, cu_seqlens=None
):
  """h = exp(g) h + x: x, g [B, T, D], states [N, D]."""

  def run(h, z, reset, mask):
    decay = jnp.exp(z["g"].astype(jnp.float32))
    one = lambda h, x, decay, reset, mask: linear_recurrence(
      h, x.astype(jnp.float32), decay=decay, reset=reset, mask=mask
    )
    h, o = jax.vmap(one)(h, z["x"], decay, reset, mask)
    return h, o.astype(x.dtype)

  return _run(
    "fused_recurrent_hgrn", run,
    lambda n: jnp.zeros((n, x.shape[-1]), jnp.float32), initial_state,
    dict(x=x, g=g), cu_seqlens, output_final_state,
  )  # fmt: skip


def _fused_recurrent(chunk):
  """A function of this file, token by token."""

  @functools.wraps(chunk)
  def call(*args, **kwargs):
    return chunk(*args, implementation="scan", **kwargs)

  call.__name__ = chunk.__name__.replace("chunk", "fused_recurrent")
  call.__qualname__ = call.__name__
  return call


chunk_gdn = chunk_gated_delta_rule
fused_chunk_linear_attn = chunk_linear_attn
fused_chunk_simple_gla = chunk_simple_gla
fused_chunk_gla = chunk_gla
fused_chunk_retention = chunk_retention
fused_chunk_delta_rule = chunk_delta_rule
fused_recurrent_linear_attn = _fused_recurrent(chunk_linear_attn)
fused_recurrent_simple_gla = _fused_recurrent(chunk_simple_gla)
fused_recurrent_gla = _fused_recurrent(chunk_gla)
fused_recurrent_retention = _fused_recurrent(chunk_retention)
fused_recurrent_lightning_attn = _fused_recurrent(chunk_lightning_attn)
fused_recurrent_rwkv6 = _fused_recurrent(chunk_rwkv6)
fused_recurrent_delta_rule = _fused_recurrent(chunk_delta_rule)
fused_recurrent_gated_delta_rule = _fused_recurrent(chunk_gated_delta_rule)
fused_recurrent_gdn = fused_recurrent_gated_delta_rule
fused_recurrent_kda = _fused_recurrent(chunk_kda)
fused_recurrent_dplr_delta_rule = _fused_recurrent(chunk_dplr_delta_rule)
fused_recurrent_iplr_delta_rule = _fused_recurrent(chunk_iplr_delta_rule)
fused_recurrent_rwkv7 = _fused_recurrent(chunk_rwkv7)
fused_recurrent_gsa = _fused_recurrent(chunk_gsa)


def __getattr__(name):
  """Names that flash-linear-attention has and this module has not."""
  known = [
    n for n in globals() if n.startswith(("chunk_", "fused_", "parallel"))
  ]
  raise AttributeError(
    f"memzoo.compat.fla has no {name!r}; " + dispatch.nearest(name, known)
  )
