"""Atlas, and OmegaNet, Atlas++, DLA and SWLA as options."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, features, norm
from memzoo.ops.conv import conv, empty as conv_empty, step as conv_step
from memzoo.ops.deep_gradient_step import MAX_DEPTH, Layer, Model
from memzoo.ops.windowed_gradient_step import (
  State as Inner,
  start,
  step as learn_step,
  windowed_gradient_step,
)

_INNER = Inner(0, 0, 0, 0, 0, None, None)  # axes of heads


class State(NamedTuple):
  inner: Inner  # H memories and their windows
  conv: jax.Array  # [W − 1, 3 H K] float32: the last inputs of q, k, v


@register(
  "atlas",
  family="ttt",
  year=2025,
  paper="Behrouz et al. 2025, arXiv:2505.23735",
  write="orthogonalised gradient step on a window",
  evidence="silver",
  tiny=dict(d_model=10, num_heads=2, window=3, iterations=2, mini_batch_size=4),
)
@dataclasses.dataclass(frozen=True)
class Atlas(cell.Cell):
  """Atlas: a memory that learns the last c tokens again at every token.

    S_t = θ_t S_{t−1} + ∇ Σ_{i = t−c+1 … t} γ_i^(t) ‖M_{t'}(φ(k_i)) − v_i‖²
    M_t = α_t M_{t−1} − η_t NewtonSchulz-k(S_t)                    (32, 33)
    M(φ(x)) = x + W_1 gelu(W_2 φ(x))                                   (42)
    φ(q)·φ(k) = a_0 + a_1 q·k + … + a_p (q·k)^p ,  a_i = 1 / i! at first (5)
    o_t = M_t(φ(q_t)) ,  y_t = W_O (RMSNorm(o_t) ⊙ silu(W_G x_t))

  t' is the end of the mini-batch before t (16, 35); with `mini_batch_size`
  n = 1, t − 1. q, k, v pass a short convolution and silu; q and k have unit
  norm. α, θ, η and γ (c a token) are σ(W x_t + b), numbers of each head.
  `optimizer='gradient'` is OmegaNet (10, 15), M_t = α_t M_{t−1} − η_t ∇ Σ …;
  with `objective='dot'`, −⟨M(φ(k_i)), v_i⟩ for the square, it is SWLA (20), and
  DLA (19) where c = 1. `activation='geglu'` is Atlas++ (43); `memory_depth=1`
  is W φ(x) alone. Reports: `surprise`, ‖∇ Σ …‖, and `inner_loss`, the Σ.

  State: inner {model: M_t, anchor: M_{t'} (none where n = 1), momentum: S_t
    (muon alone): w [H, N, N'] a layer; keys φ(k) [H, c − 1, F], values
    [H, c − 1, K]; count, phase int32}, conv [W − 1, 3 H K], float32. M starts
    at the learned one, the rest at zero. F = (K + p)! / (K! p!).
  Params: qkv [D, 3 H K], conv [W, 3 H K], gates [D, 3 H] and gate_bias [3, H]
    (α, η, and θ of muon), gamma [D, H c] and gamma_bias [H, c] (newest first),
    taylor [H, p + 1] (√a_i), memory_0 … [H, N, N'], norm [K], gate, out [D, D].
  Forms: step and scan O(c P) a token, for P weights of the memory; chunk
    O((1 + c / n) P + (c + n) F) in T / n steps (muon: n P numbers each), n > 1.
  Differs: gates are left open: ours are σ, at first α = 0.993, γ = θ = ½ and
    η = 0.1, of 'gradient' 1 / 2cn, or 1 / 2cnK where a deep memory learns ‖·‖²
    (η_i^(t) of 56 is η_t γ_i^(t)). α is no diagonal (11). The residual is x,
    φ(x)'s linear part, as φ(x) is wider than v. The layer norm "at the end of
    each chunk" (appendix E) is not defined, nor here. a_i ≥ 0, a set a head.
    Signs as in (32, 33); (11, 19, 20) misprint them. DeepTransformers and Dot
    have an endless φ, so no state: DLA and OmegaNet are their Taylor form.
  Paper: Behrouz, Li, Kacham, Daliri, Deng, Zhong, Razaviyayn, Mirrokni 2025,
    "ATLAS: Learning to Optimally Memorize the Context at Test Time",
    arXiv:2505.23735, eq. 5, 9, 10, 15, 16, 19, 20, 32 to 43, appendix D.
  """

  d_model: int
  num_heads: int = 1
  window: int = 8
  degree: int = 2
  objective: str = "l2"
  optimizer: str = "muon"
  iterations: int = 5
  activation: str = "gelu"
  memory_depth: int = 2
  expansion: int = 4
  mini_batch_size: int = 16
  conv_size: int = 4

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")
  op: ClassVar[str] = "windowed_gradient_step"
  reports: ClassVar[tuple[str, ...]] = ("surprise", "inner_loss")
  head_dim = property(lambda self: self.d_model // self.num_heads)  # K
  _muon = property(lambda self: self.optimizer == "muon")
  _residual = property(lambda c: c.objective == "l2" and c.memory_depth > 1)

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "window", "degree", "iterations",
      "memory_depth", "expansion", "mini_batch_size", "conv_size",
    )  # fmt: skip
    arguments.check_divides(self, "num_heads", "d_model")
    for field, values in dict(
      memory_depth=tuple(range(1, MAX_DEPTH + 1)), objective=("l2", "dot"),
      optimizer=("muon", "gradient"), activation=("gelu", "geglu"),
    ).items():  # fmt: skip
      if (got := getattr(self, field)) not in values:
        raise ValueError(f"Atlas: {field} must be in {values}, got {got!r}")

  def init(self, key) -> dict[str, Any]:
    d, h, k, muon = self.d_model, self.num_heads, self.head_dim, self._muon
    keys = jax.random.split(key, 6 + self.memory_depth)
    draw, taps = initializers.lecun_normal, self.conv_size
    most = 2 * self.window * self.mini_batch_size * (k if self._residual else 1)
    bias = [5.0, -math.log(9 if muon else most - 1)] + [0.0] * muon
    roots = [math.factorial(i) ** -0.5 for i in range(self.degree + 1)]
    params = {
      "qkv": draw(keys[0], (d, 3 * d)),
      "conv": initializers.uniform(keys[1], (taps, 3 * d), taps**-0.5),
      "gates": draw(keys[2], (d, len(bias) * h)),
      "gate_bias": jnp.tile(jnp.array(bias)[:, None], (1, h)),
      "gamma": draw(keys[3], (d, h * self.window)),
      "gamma_bias": jnp.zeros((h, self.window)),
      "taylor": jnp.tile(jnp.array(roots), (h, 1)),
      "norm": jnp.ones((k,)),
      "gate": draw(keys[4], (d, d)),
      "out": draw(keys[5], (d, d)),
    }
    size, fan = math.comb(k + self.degree, k), math.e  # nearly ‖φ(k)‖²
    for n in range(self.memory_depth - 1):
      shape = h, size, self.expansion * k * (1 + (self.activation == "geglu"))
      params[f"memory_{n}"] = draw(keys[6 + n], shape, fan_in=fan)
      size = fan = self.expansion * k
    last = f"memory_{self.memory_depth - 1}"
    return params | {last: draw(keys[-1], (h, size, k), fan_in=fan)}

  def initial_state(self, params, key=None) -> State:
    sizes = dict(window=self.window, size=self.mini_batch_size)
    begin = lambda model: start(model, **sizes, momentum=self._muon)
    inner = jax.vmap(begin, out_axes=_INNER)(self._fresh(params))
    return State(inner, conv_empty(params["conv"]))

  def observe(self, params, state, x):
    window, qkv = conv_step(state.conv, dot(x, params["qkv"]), params["conv"])
    one = lambda s, r: learn_step(s, *r, **self._options)
    q, r = self._project(params, x, qkv)
    inner, out = jax.vmap(one, (_INNER, 0), (_INNER, 0))(state.inner, r)
    return State(inner, window), *self._read_out(params, x, q, out)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    qkv = dot(xs, params["qkv"])
    window, qkv = conv(state.conv, qkv, params["conv"], **flags)
    whole = lambda s, r, fresh: windowed_gradient_step(
      s, *r[:3], gate=r[3], rate=r[4], log_decay=r[5], log_momentum=r[6],
      fresh=fresh, implementation=implementation, **self._options, **flags,
    )  # fmt: skip
    whole = jax.vmap(whole, (_INNER, 1, 0), (_INNER, 1))
    q, r = self._project(params, xs, qkv)
    inner, out = whole(state.inner, r, self._fresh(params))
    return State(inner, window), *self._read_out(params, xs, q, out)

  @property
  def _options(self) -> dict[str, Any]:
    return dict(
      size=self.mini_batch_size, objective=self.objective,
      iterations=self.iterations * self._muon, activation=self.activation,
    )  # fmt: skip

  def _fresh(self, params) -> Model:
    single = lambda n: params[f"memory_{n}"].astype(jnp.float32)
    return tuple(Layer(single(n)) for n in range(self.memory_depth))

  def _project(self, params, x, qkv):
    """q [..., H, K], and φ(q), φ(k), v, γ, η, log α, log θ for the op."""
    h, twice = self.num_heads, 2 if self.objective == "l2" else 1
    split = lambda z: z.reshape(z.shape[:-1] + (h, -1))
    q, k, v = map(split, jnp.split(jax.nn.silu(qkv), 3, axis=-1))
    q, k = norm.l2_normalize(q), norm.l2_normalize(k)
    v = v - k if self._residual else v  # ∇⟨x + …, v⟩ is ∇⟨…, v⟩
    single = lambda z: z.astype(jnp.float32)
    add = lambda y, name: single(y) + single(params[name]).reshape(-1)
    gamma = add(dot(x, params["gamma"]), "gamma_bias")
    gates = add(dot(x, params["gates"]), "gate_bias")
    alpha, eta, *theta = jnp.split(gates, gates.shape[-1] // h, axis=-1)
    return q, (
      *(features.polynomial(u, params["taylor"]) for u in (q, k)), v,
      split(twice * jax.nn.sigmoid(gamma)),  # of ½ ‖·‖²
      jax.nn.sigmoid(eta), -jax.nn.softplus(-alpha),
      -jax.nn.softplus(-theta[0]) if theta else None,
    )  # fmt: skip

  def _read_out(self, params, x, q, out):
    o = out.o + q if self.memory_depth > 1 else out.o
    gate = jax.nn.silu(dot(x, params["gate"])).reshape(o.shape)
    y = norm.rms_norm(o, params["norm"]) * gate
    reports = dict(surprise=out.surprise.mean(-1), inner_loss=out.loss.mean(-1))
    return dot(y.reshape(x.shape), params["out"]), reports
