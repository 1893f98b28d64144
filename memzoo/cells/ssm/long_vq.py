"""LongVQ: attention to a codebook and a window, between gates."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, code_attention as attention, norm
from memzoo.ops.linear_recurrence import linear_recurrence


class State(NamedTuple):
  h: jax.Array  # [D, N] float32, of the averages
  attended: attention.State  # totals [S, V], numbers [S], and the last W tokens


@register(
  "long_vq",
  family="ssm",
  year=2024,
  paper="Liu et al. 2024, arXiv:2404.11163",
  write="decay and add; add to a code",
  evidence="bronze",
  tiny=dict(d_model=6, num_codes=5, window=3, key_dim=4, num_averages=2),
)
@dataclasses.dataclass(frozen=True)
class LongVQ(cell.Cell):
  """LongVQ: a state space tells attention what to ask for, a codebook holds
  what it finds.

    h_t = σ(α) ⊙ β x_t + (1 − σ(α) σ(δ)) ⊙ h_{t−1} ,  s = silu(η·h + ω ⊙ x)
    c   = silu(W_c s + b_c) ,  q, k = norm(κ ⊙ c + μ) ,  v = silu(W_v x + b_v)
    z_t = argmin_s ‖k_t − C_s‖² ,  k̂_t = C_{z_t}           straight through
    o_t = Σ_{i <= t} softmax_i(q_t·k̂_i / √K + p_{t−i}) v_i
    y_t = φ ⊙ silu(W_h s + U (γ ⊙ o) + b_h) + (1 − φ) ⊙ x_t
    γ, φ = silu(W_γ s + b_γ), σ(W_φ s + b_φ)

  All of the past is attended to, in linear time: keys further back than the
  window W have p = 0, so that for each code the number of its keys and the sum
  of their values is enough. `refresh` moves the codebook to the means of the
  keys; in the loss, the report `commitment`, ‖k − C_z‖², keeps keys near it.

  State: h [D, N], totals [S, V], numbers [S], k̂ [W, K], v [W, V] float32 from
    zero; codes and positions [W] and a count [] int32, −1 without a token. V
    is 2 D.
  Params: alpha, delta, beta, eta [D, N], omega [D]; query [D, K], query_bias
    [K] (W_c), kappa, mu [2, K]; value [D, V], value_bias; gates [D, V + 2D]
    (W_γ, W_φ, W_h), gates_bias; out [V, D] (U), bias [W] (p). Buffers: codes
    [S, K], the sums of keys, and uses [S]; C = codes / uses.
  Forms: step and scan O(D (D + N + V + K) + (S + W)(K + V)) a token, in order;
    chunk the same with C more keys a token, in T / C serial steps.
  Differs: of the paper's text the abstract and descriptions were to be had
    (themoonlight.io, liner.com), which have: z, k̂, the straight-through
    gradient; quantised keys in gated attention with a state space in it; a
    codebook of fixed length for what is global, a window with a bias for what
    is near. Taken from what it builds on, and so possibly not its own: the
    averages and all gates (Mega), how codes are counted, moved and committed
    to, normed q and k (Transformer-VQ; there layer norms, here root mean
    square). p is a table; one head.
  Paper: Liu, Wang, Li, Wang, Lin, Li 2024, "LongVQ: Long Sequence Modeling
    with Vector Quantization on Structured Memory", arXiv:2404.11163. Ma et al.
    2022, "Mega", arXiv:2209.10655; Lingle 2023, arXiv:2309.16354.
  """

  d_model: int
  num_codes: int = 32
  window: int = 16
  key_dim: int = 16
  num_averages: int = 4
  momentum: float = 0.99

  op: ClassVar[str] = "code_attention"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")
  reports: ClassVar[tuple[str, ...]] = ("commitment",)

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_codes", "window", "key_dim", "num_averages"
    )
    if not 0 <= self.momentum < 1:
      raise ValueError(
        f"LongVQ: momentum must be in [0, 1), got {self.momentum!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, k, n = self.d_model, self.key_dim, self.num_averages
    v = 2 * d
    keys = jax.random.split(key, 8)
    a = jax.random.normal(keys[0], (3, d, n))
    draw, zeros = initializers.lecun_normal, jnp.zeros
    codes = jax.random.normal(keys[1], (self.num_codes, k))
    return {
      **dict(zip(("alpha", "delta", "beta"), a)),
      "eta": draw(keys[2], (d, n), n),
      "omega": jax.random.normal(keys[3], (d,)),
      **{"query": draw(keys[4], (d, k)), "query_bias": zeros((k,))},
      **{"kappa": jax.random.normal(keys[5], (2, k)), "mu": zeros((2, k))},
      **{"value": draw(keys[6], (d, v)), "value_bias": zeros((v,))},
      "gates": draw(keys[7], (d, v + 2 * d)),
      "gates_bias": zeros((v + 2 * d,)),
      "out": draw(jax.random.fold_in(key, 1), (v, d)),
      "bias": zeros((self.window,)),
      "buffers": {
        "codes": norm.rms_norm(codes),
        "uses": jnp.ones((self.num_codes,)),
      },
    }

  def initial_state(self, params=None, key=None) -> State:
    h = jnp.zeros((self.d_model, self.num_averages), jnp.float32)
    sizes = self.num_codes, self.window, self.key_dim, 2 * self.d_model
    return State(h, attention.empty(*sizes))

  def observe(self, params, state, x):
    decay, new = _average(params, x)
    h = decay * state.h + new
    s, i, report = _ask(params, h, x)
    codes = _codes(params), params["bias"].astype(jnp.float32)
    attended, o = attention.step(state.attended, i, *codes)
    return State(h, attended), _gate(params, s, o, x), report

  def parallel(self, params, state, xs, reset, mask, implementation):
    h, hs = _averages(params, state.h, xs, reset, mask)
    s, i, report = _ask(params, hs, xs)
    codes = _codes(params), params["bias"].astype(jnp.float32)
    attended, o = attention.code_attention(
      state.attended, i._replace(reset=reset, mask=mask), *codes,
      implementation=implementation,
    )  # fmt: skip
    return State(h, attended), _gate(params, s, o, xs), report

  def refresh(self, params, xs):
    """Moves the codebook towards the means of the keys of xs [B, T, D],
    padding among them."""
    h = self.initial_state().h
    row = lambda xs: _keys(params, _averages(params, h, xs)[1], xs)[2]
    keys = jax.vmap(row)(xs).reshape(-1, self.key_dim)
    code, _, _ = attention.quantize(keys, _codes(params))
    of_code = jax.nn.one_hot(code, self.num_codes)
    new = {"codes": of_code.T @ keys, "uses": jnp.sum(of_code, axis=0)}
    rate = 1 - self.momentum
    move = lambda old, new: (old + rate * (new - old)).astype(old.dtype)
    return {**params, "buffers": jax.tree.map(move, params["buffers"], new)}


def _codes(params):
  buffers = params["buffers"]
  codes = buffers["codes"] / jnp.maximum(buffers["uses"], 1e-6)[:, None]
  return jax.lax.stop_gradient(codes.astype(jnp.float32))


def _average(params, x):
  """What is left of h, [D, N], and what is added, [..., D, N]."""
  p = {k: params[k].astype(jnp.float32) for k in ("alpha", "delta", "beta")}
  a = jax.nn.sigmoid(p["alpha"])
  new = a * p["beta"] * x.astype(jnp.float32)[..., None]
  return 1 - a * jax.nn.sigmoid(p["delta"]), new


def _averages(params, h, xs, reset=None, mask=None):
  decay, new = _average(params, xs)
  end, hs = linear_recurrence(
    h.reshape(-1), new.reshape(len(xs), -1), decay=decay.reshape(-1),
    reset=reset, mask=mask,
  )  # fmt: skip
  return end.reshape(h.shape), hs.reshape(new.shape)


def _keys(params, h, x):
  """s [..., D], and q and k [..., K]. Float32: which code is nearest must not
  hang on how numbers are rounded."""
  p = {k: v.astype(jnp.float32) for k, v in params.items() if k != "buffers"}
  x = x.astype(jnp.float32)
  s = jax.nn.silu(jnp.sum(p["eta"] * h, axis=-1) + p["omega"] * x)
  c = jax.nn.silu(dot(s, p["query"]) + p["query_bias"])
  qk = norm.rms_norm(p["kappa"] * c[..., None, :] + p["mu"])
  return s, qk[..., 0, :], qk[..., 1, :]


def _ask(params, h, x):
  """s, what attention takes, and the reports."""
  s, q, k = _keys(params, h, x)
  code, k, error = attention.quantize(k, _codes(params))
  v = dot(x, params["value"]) + params["value_bias"].astype(x.dtype)
  v = jax.nn.silu(v).astype(jnp.float32)
  i = attention.Inputs(q * q.shape[-1] ** -0.5, k, code, v)
  return s, i, {"commitment": error}


def _gate(params, s, o, x):
  d = x.shape[-1]
  s, o = s.astype(x.dtype), o.astype(x.dtype)
  gates = dot(s, params["gates"]) + params["gates_bias"].astype(x.dtype)
  reset, update, new = jnp.split(gates, [2 * d, 3 * d], axis=-1)
  new = jax.nn.silu(new + dot(jax.nn.silu(reset) * o, params["out"]))
  return x + jax.nn.sigmoid(update) * (new - x)
