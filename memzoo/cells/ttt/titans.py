"""Titans: the neural long-term memory."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.conv import conv, empty as conv_empty, step as conv_step
from memzoo.ops.deep_gradient_step import (
  MAX_DEPTH,
  Layer,
  Model,
  State as Inner,
  deep_gradient_step,
  read,
  start,
  step as learn_step,
)
from memzoo.ops.gradient_step import Learner

# Axes of heads: all but the phase.
_INNER, _LEARNER = Inner(0, 0, 0, None), Learner(None, 0, 0)


class State(NamedTuple):
  inner: Inner  # H memories: M, where gradients are taken, and S
  conv: jax.Array  # [W − 1, 3 H K] float32: the last inputs of q, k, v


@register(
  "titans",
  family="ttt",
  year=2024,
  paper="Behrouz et al. 2024, arXiv:2501.00663",
  write="gradient step with momentum and decay",
  evidence="gold",
  parity="titans-pytorch 0.5.5, NeuralMemory (what it learns)",
  tiny=dict(d_model=22, num_heads=2, mini_batch_size=4, conv_size=3),
)
@dataclasses.dataclass(frozen=True)
class Titans(cell.Cell):
  """Titans (LMM): a deep memory that learns what surprises it, and forgets.

    k_t = x_t W_K ,  v_t = x_t W_V ,  q_t = x_t W_Q                    (11)
    ℓ(M; x_t) = ‖M(k_t) − v_t‖²                                        (12)
    M_t = (1 − α_t) M_{t−1} + S_t                                      (13)
    S_t = η_t S_{t−1} − θ_t ∇ℓ(M_{t'}; x_t)                        (14, 18)
    o_t = M_t(q_t)                                                     (15)
    M(x) = x + LN(MLP(x)) ,  y_t = W_O (RMSNorm(o_t) ⊙ silu(W_G x_t))

  t' is the end of the mini-batch before t; with `mini_batch_size` n = 1, t − 1.
  Each projection passes a short convolution and silu; q and k have unit norm.
  Each layer has its own gates, α, η = σ(W x_t + b) and θ = σ(W x_t + b) / K.
  Each head is a memory; M at the start and LN are learned. Reports, means over
  heads: `surprise` is ‖∇ℓ(M_{t'}; x_t)‖, and `inner_loss` ℓ. As table 5 has it,
  `forgetting` False leaves out α (it is 0), `momentum` False S and its η.

  State: inner {model: M_t, anchor: M_{t'} (none where n = 1), momentum: S_t, of
    w [H, N, N'] a layer; phase int32} and conv [W − 1, 3 H K], float32. M
    starts at the learned one, the rest at zero.
  Params: qkv [D, 3 H K], conv [W, 3 H K], gates [D, 3 H L] and gate_bias
    [3, H, L] (α, η, θ), memory_0 … [H, N, N'], memory_scale and memory_bias
    [H, K] (LN), norm [K], gate [D, H K], out [H K, D].
  Forms: step and scan O(P) a token, in order, for P weights of the memory;
    chunk (the dual form) O(P + n L K) a token, in T / n sequential steps of
    matmuls; n = 1 has no such form.
  Differs: the gates' form is left open: σ, with θ over K as in titans-pytorch,
    whose loss is a mean over channels; α = 0.007, η = θ K = ½ at the start. α
    is a number, as in the first version; the published one has [0, 1]^{d_in}.
    M(x), its width 4 K and gelu are the published version's; the first says
    MLPs, which `memory_norm=False` is. LN is not learned online. Heads are
    ours. In chunks of one token titans-pytorch is this rule, but for LN.
  Paper: Behrouz, Zhong, Mirrokni 2024, "Titans: Learning to Memorize at Test
    Time", arXiv:2501.00663, eq. 8 to 18, sections 3.1, 3.2 and 4.4; and the
    published version (NeurIPS 2025), section 3.3, appendices E and F.
  """

  d_model: int
  num_heads: int = 1
  memory_depth: int = 2
  expansion: int = 4
  mini_batch_size: int = 16
  memory_norm: bool = True
  forgetting: bool = True
  momentum: bool = True
  conv_size: int = 4

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")
  op: ClassVar[str] = "deep_gradient_step"
  reports: ClassVar[tuple[str, ...]] = ("surprise", "inner_loss")
  head_dim = property(lambda self: self.d_model // self.num_heads)  # K

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "memory_depth", "expansion",
      "mini_batch_size", "conv_size",
    )  # fmt: skip
    arguments.check_divides(self, "num_heads", "d_model")
    if (n := self.memory_depth) > (most := MAX_DEPTH):
      raise ValueError(f"Titans: memory_depth must be 1 to {most}, got {n}")

  def init(self, key) -> dict[str, Any]:
    d, h, k = self.d_model, self.num_heads, self.head_dim
    keys = jax.random.split(key, 5 + self.memory_depth)
    draw, taps = initializers.lecun_normal, self.conv_size
    bias = [-5.0] * self.forgetting + [0.0] * self.momentum + [0.0]
    bias = jnp.array(bias)  # α = 0.007, η = ½, θ = ½ / K
    params = {
      "qkv": draw(keys[0], (d, 3 * d)),
      "conv": initializers.uniform(keys[1], (taps, 3 * d), taps**-0.5),
      "gates": draw(keys[2], (d, len(bias) * h * self.memory_depth)),
      "gate_bias": jnp.tile(bias[:, None, None], (1, h, self.memory_depth)),
      "norm": jnp.ones((k,)),
      "gate": draw(keys[3], (d, d)),
      "out": draw(keys[4], (d, d)),
    }
    if self.memory_norm:
      params["memory_scale"] = jnp.ones((h, k))
      params["memory_bias"] = jnp.zeros((h, k))
    wide = [k, *[self.expansion * k] * (self.memory_depth - 1), k]
    for n, (a, b) in enumerate(zip(wide, wide[1:])):
      fan = a if n else 1  # keys have unit norm
      params[f"memory_{n}"] = draw(keys[5 + n], (h, a, b), fan_in=fan)
    return params

  def initial_state(self, params, key=None) -> State:
    rule = dict(size=self.mini_batch_size, momentum=self.momentum)
    inner = start(self._fresh(params), **rule)
    return State(inner, conv_empty(params["conv"]))

  def observe(self, params, state, x):
    window, qkv = conv_step(state.conv, dot(x, params["qkv"]), params["conv"])
    one = lambda s, r, ln: learn_step(s, *r, learner=ln, **self._options)
    one = jax.vmap(one, (_INNER, 0, _LEARNER), (_INNER, 0))
    r, learner = self._project(params, x, qkv), self._learner(params)
    inner, out = one(state.inner, r, learner)
    return State(inner, window), *self._read_out(params, x, out)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    qkv = dot(xs, params["qkv"])
    window, qkv = conv(state.conv, qkv, params["conv"], **flags)
    whole = lambda s, r, ln, fresh: deep_gradient_step(
      s, *r[:3], rate=r[3], log_decay=r[4], log_momentum=r[5], learner=ln,
      fresh=fresh, implementation=implementation, **self._options, **flags,
    )  # fmt: skip
    whole = jax.vmap(whole, (_INNER, 1, _LEARNER, 0), (_INNER, 1))
    r, learner = self._project(params, xs, qkv), self._learner(params)
    inner, out = whole(state.inner, r, learner, self._fresh(params))
    return State(inner, window), *self._read_out(params, xs, out)

  def recall(self, params, model: Model, q):
    """M*(q), nothing learned: q [..., H, K] -> [..., H, K]."""
    one = lambda m, q, ln: read(m, q, learner=ln, residual=self.memory_norm)
    heads = jax.vmap(one, (0, -2, _LEARNER), -2)
    return heads(model, q, self._learner(params))

  @property
  def _options(self) -> dict[str, Any]:
    return dict(size=self.mini_batch_size, residual=self.memory_norm)

  def _fresh(self, params) -> Model:
    layer = lambda n: Layer(params[f"memory_{n}"].astype(jnp.float32))
    return tuple(layer(n) for n in range(self.memory_depth))

  def _learner(self, params) -> Learner:
    names = ["memory_scale", "memory_bias"] * self.memory_norm
    return Learner(None, *(params[name] for name in names))

  def _project(self, params, x, qkv):
    """q, k, v [..., H, K], then θ (of ½ ℓ), log(1 − α), log η [..., H, L]."""
    h, depth = self.num_heads, self.memory_depth
    split = lambda z: z.reshape(z.shape[:-1] + (h, -1))
    q, k, v = map(split, jnp.split(jax.nn.silu(qkv), 3, axis=-1))
    gates = dot(x, params["gates"]).astype(jnp.float32)
    gates = gates.reshape(x.shape[:-1] + (-1, h, depth))
    gates = gates + params["gate_bias"].astype(jnp.float32)
    *gates, theta = jnp.moveaxis(gates, -3, 0)
    log_eta = -jax.nn.softplus(-gates.pop()) if self.momentum else None
    log_keep = -jax.nn.softplus(gates.pop()) if self.forgetting else None
    return (
      norm.l2_normalize(q), norm.l2_normalize(k), v,
      jax.nn.sigmoid(theta) * (2.0 / self.head_dim), log_keep, log_eta,
    )  # fmt: skip

  def _read_out(self, params, x, out):
    reports = dict(surprise=out.surprise, inner_loss=out.loss)  # of ½ ℓ
    reports = {name: 2 * z.mean(-1) for name, z in reports.items()}
    return self.express(params, x, out.o), reports

  def express(self, params, x, o):
    """What is recalled, o [..., H, K], as an output [..., D] at input x."""
    gate = jax.nn.silu(dot(x, params["gate"])).reshape(o.shape)
    y = norm.rms_norm(o, params["norm"]) * gate
    return dot(y.reshape(x.shape), params["out"])
