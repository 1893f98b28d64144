"""Mixture-of-Memories."""

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.initializers import lecun_normal
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm, routing
from memzoo.ops.batched import heads
from memzoo.ops.conv import conv, step as conv_step
from memzoo.ops.delta_rule import delta_rule, step as delta_step
from memzoo.ops.linear_attention import linear_attention, step as add_step

RULES = {
  "gated_delta": (delta_rule, delta_step),
  "linear": (linear_attention, add_step),
}


class State(NamedTuple):
  s: jax.Array  # [M, H, K, V] float32, the shared memory last
  conv: jax.Array  # [M, W − 1, H (2K + V)] float32: last inputs of q, k, v
  counts: jax.Array  # int32 [M]: tokens that each memory was sent


@register(
  "mixture_of_memories",
  family="matrix",
  year=2025,
  paper="Du et al. 2025, arXiv:2502.13685",
  write="routed: decay, erase, add",
  evidence="silver",
  tiny=dict(d_model=6, num_heads=2, head_dim=3, num_memories=3, conv_size=3),
)
@dataclasses.dataclass(frozen=True)
class MixtureOfMemories(cell.Cell):
  """Mixture-of-Memories (MoM): a token writes to the few memories it is sent.

    TopK(softmax(W_r x_t)) chooses memories m; their shares g_m sum to 1
    M^m_t = M^m_{t−1} + (k^m_t)ᵀ v^m_t , m chosen;  M^m_{t−1} where it is not
    o_t = q_t (Σ_m g_m M^m_t + M^s_t) ,  M^s, shared, takes every token
    k^m_t = W^m_k x_t ,  v^m_t = W^m_v x_t
    y_t = W_o (RMSNorm(o_t) ⊙ silu(W_g x_t)), norm and gate per head

  The `rule` is 'gated_delta' (arXiv:2412.06464; α and β of each memory) or
  'linear', as above. q, k and v pass a short convolution, in each memory over
  the tokens that it is sent, and silu; with 'gated_delta' q and k have unit
  norm. q is scaled by 1/sqrt(K). The number M of memories counts the shared
  one. The report `balance` is E Σ_m f_m g_m, with E = num_memories and f_m the
  share of the segment's tokens so far that m was sent: top_k where memories
  are in equal use, more where they are not.

  State: s [M, H, K, V] and conv [M, W − 1, H (2K + V)], float32, counts int32
    [M], from zero.
  Params: router [D, E], q [D, HK], kv [M, D, H (K + V)], conv [W, H (2K + V)],
    gate [D, HV], norm [V], out [HV, D]; gated_delta: ab [M, D, 2H] (decay,
    beta), a_log [H], dt [H].
  Forms: step and scan O(M H K V) a token, in order; chunk, each memory with a
    mask of its own, O(M H (C (K + V) + K V)) a token, in T / C sequential
    steps of matmuls; pallas the same in one kernel.
  Differs: the convolution is that of the authors' code, which in training
    runs on from one memory's tokens into another's; here it never does. Their
    balance takes f over the batch, here over the past. Maps and gates start as
    in `gated_delta`. With top_k = 1 the router gets no gradient, as there.
  Paper: Du, Sun, Lan, Hu, Cheng 2025, "MoM: Linear Sequence Modeling with
    Mixture-of-Memories", arXiv:2502.13685, section 3; gates, norms and balance
    as in the authors' code (OpenSparseLLMs/MoM, flash-linear-attention `mom`).
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  expand_v: int = 1
  num_memories: int = 4
  top_k: int = 2
  shared: bool = True
  rule: str = "gated_delta"
  conv_size: int = 4

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "delta_rule"
  reports: ClassVar[tuple[str, ...]] = ("balance",)

  def __post_init__(self):
    sizes = ("num_heads", "head_dim", "expand_v", "num_memories", "top_k")
    arguments.check_positive(self, "d_model", *sizes, "conv_size")
    for field, ok, want in (
      ("top_k", self.top_k <= self.num_memories, "num_memories or less"),
      ("rule", self.rule in RULES, f"one of {tuple(RULES)}"),
    ):
      if not ok:
        got = f"must be {want}, got {getattr(self, field)!r}"
        raise ValueError(f"MixtureOfMemories: {field} {got}")

  @property
  def _widths(self) -> tuple[int, int, int, int]:
    """M, HK, HV, and q, k and v together."""
    k = self.num_heads * self.head_dim
    v = k * self.expand_v
    return self.num_memories + int(self.shared), k, v, 2 * k + v

  def init(self, key) -> dict[str, Any]:
    (m, k, v, width), keys = self._widths, jax.random.split(key, 9)
    d, h, w, draw = self.d_model, self.num_heads, self.conv_size, lecun_normal
    params = {
      "router": draw(keys[0], (d, self.num_memories)),
      "q": draw(keys[1], (d, k)),
      "kv": draw(keys[2], (m, d, k + v), fan_in=d),
      "conv": initializers.uniform(keys[3], (w, width), w**-0.5),
      "gate": draw(keys[4], (d, v)),
      "norm": jnp.ones((v // h,)),
      "out": draw(keys[5], (v, d)),
    }
    if self.rule == "linear":
      return params
    dt = initializers.log_uniform(keys[8], (h,), 0.001, 0.1)
    return params | {
      "ab": draw(keys[6], (m, d, 2 * h), fan_in=d),
      "a_log": jnp.log(jax.random.uniform(keys[7], (h,), minval=1, maxval=16)),
      "dt": initializers.inverse_softplus(dt),
    }

  def initial_state(self, params, key=None) -> State:
    (m, _, v, width), h = self._widths, self.num_heads
    return State(
      jnp.zeros((m, h, self.head_dim, v // h), jnp.float32),
      jnp.zeros((m, self.conv_size - 1, width), jnp.float32),
      jnp.zeros((m,), jnp.int32),
    )

  def observe(self, params, state, x):
    route = self._route(params, x)
    one = jax.vmap(lambda w, u: conv_step(w, u, params["conv"]))
    run = partial(one, state.conv)
    window, qkv, gates = self._project(params, x, run)
    one = jax.vmap(jax.vmap(RULES[self.rule][1]))
    s, o = one(state.s, *qkv, **gates)
    new = State(s, window, state.counts + 1)
    state = jax.tree.map(partial(cell.where, route.chosen), new, state)
    return state, *self._read_out(params, x, o, route, state.counts)

  def parallel(self, params, state, xs, reset, mask, implementation):
    route = self._route(params, xs)
    sent = routing.sent(state.counts, route.chosen, reset, mask)
    flags = dict(reset=sent.reset, mask=sent.mask)
    one = jax.vmap(lambda w, f, u: conv(w, u, params["conv"], **f))
    run = partial(one, state.conv, flags)
    window, qkv, gates = self._project(params, xs, run)
    op = partial(heads(RULES[self.rule][0]), implementation=implementation)
    run = jax.vmap(lambda s, qkv, more: op(s, *qkv, **more))
    s, o = run(state.s, qkv, gates | flags)
    state = State(s, window, sent.counts[-1])
    if sent.empty is not None:
      empty = jax.tree.map(jnp.zeros_like, state)
      state = jax.tree.map(partial(cell.where, sent.empty), empty, state)
    return state, *self._read_out(params, xs, o, route, sent.counts)

  def _route(self, params, x) -> routing.Route:
    x, router = (z.astype(jnp.float32) for z in (x, params["router"]))
    return routing.top_k(dot(x, router), self.top_k, int(self.shared))

  def _project(self, params, x, run):
    """-> what `run`, the convolutions, keeps; (q, k, v) and gates, all
    [M, ..., H, ·]."""
    (m, width, _, _), k = self._widths, self.head_dim
    q = dot(x, params["q"])
    maps = jnp.broadcast_to(q, (m, *q.shape)), _each(x, params["kv"])
    window, qkv = run(jnp.concatenate(maps, axis=-1))
    qkv = jnp.split(jax.nn.silu(qkv), [width, 2 * width], axis=-1)
    q, key, v = (z.reshape(z.shape[:-1] + (self.num_heads, -1)) for z in qkv)
    if self.rule == "linear":
      return window, (q * k**-0.5, key, v), {}
    a, b = jnp.split(_each(x, params["ab"]).astype(jnp.float32), 2, axis=-1)
    dt = jax.nn.softplus(a + params["dt"].astype(jnp.float32))
    log_decay = -jnp.exp(params["a_log"].astype(jnp.float32)) * dt
    gates = dict(beta=jax.nn.sigmoid(b), log_decay=log_decay)
    q, key = norm.l2_normalize(q) * k**-0.5, norm.l2_normalize(key)
    return window, (q, key, v), gates

  def _read_out(self, params, x, o, route, counts):
    """o [M, ..., H, V] -> (y [..., D], reports)."""
    here, weight = (jnp.moveaxis(z, -1, 0)[..., None, None] for z in route)
    o = jnp.sum(weight * jnp.where(here, o, 0).astype(jnp.float32), axis=0)
    # One memory's NaN is not to reach the others in the backward.
    o = jnp.where(jnp.isfinite(o), o, jax.lax.stop_gradient(o)).astype(x.dtype)
    gate = dot(x, params["gate"])
    o = norm.rms_norm(o, params["norm"]).reshape(gate.shape)
    report = routing.balance(route, counts, self.top_k, int(self.shared))
    return dot(o * jax.nn.silu(gate), params["out"]), {"balance": report}


def _each(x, w):
  """x [..., D] by each of w [M, D, N] -> [M, ..., N]."""
  return jax.vmap(dot, (None, 0))(x, w)
