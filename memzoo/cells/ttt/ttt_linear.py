"""TTT-Linear."""

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.conv import conv, step as conv_step
from memzoo.ops.gradient_step import (
  Learner,
  Model,
  State as Inner,
  gradient_step,
  positions,
  start,
  step as learn_step,
)
from memzoo.ops.rotary import rotary

BACKBONES = ("transformer", "mamba")
# Axes of heads: all but the phase and the rates of places.
_INNER, _LEARNER = Inner(0, 0, None), Learner(None, 0, 0)


class State(NamedTuple):
  inner: Inner  # H models and sums of gradients, w [H, K, K] and b [H, K]
  conv: jax.Array  # [W − 1, D] float32: the last inputs of q and k


@register(
  "ttt_linear",
  family="ttt",
  year=2024,
  paper="Sun et al. 2024, arXiv:2407.04620",
  write="mini-batch gradient step",
  evidence="gold",
  parity="fla-core 0.6, ttt (its op)",
  tiny=dict(
    d_model=12, num_heads=2, mini_batch_size=4, backbone="mamba", conv_size=3
  ),
)
@dataclasses.dataclass(frozen=True)
class TTTLinear(cell.Cell):
  """TTT-Linear: the state is a linear model, and to remember is to train it.

    f(x; W) = x + LN(x W + b)
    ℓ(W; x_t) = ½ ‖f(θ_K x_t; W) − θ_V x_t‖²        the inner loss
    W_t = W_{t'} − λ_i Σ_s η_s ∇ℓ(W_{t'}; x_s)      s from t' + 1 to t
    o_t = f(θ_Q x_t; W_t)
    η_s = η_base σ(θ_η x_s) / K ,  λ_i = max(1 / i + θ_i, 0)
    y_t = θ_O LN(o_t)                               heads side by side

  t' is the end of the mini-batch before, and t the i-th token since. q and k
  turn by rotary angles that grow with i. W_0, b_0 and the inner layer norm are
  learned, one of each a head. `backbone` is where the layer stands:
  'transformer', as above; 'mamba', where θ_Q = θ_K and short convolutions tell
  q and k apart, and y_t = θ_O (gelu(θ_g x_t) ⊙ LN(o_t)). The report
  `inner_loss` is ℓ(W_{t'}; x_t), its mean over heads.

  State: inner {model, grads: w [H, K, K], b [H, K]; phase int32} and conv
    [W − 1, D] ([0, D] without), float32; model starts at W_0, the rest at zero.
  Params: in [D, 3D] (q, k, v; mamba [D, 2D]: qk, v), rate_w [D, H],
    rate_b [H], place [n], w0 [H, K, K], b0, norm_scale, norm_bias [H, K],
    post_scale, post_bias [D], out [D, D]; mamba: conv [2, W, D] and conv_bias
    [2, D] (of q, of k), gate [D, D].
  Forms: step and scan (primal) O(D K) a token, in order; chunk (dual)
    O(D (K + n)) a token, in T / n sequential steps of matmuls.
  Differs: the loss has a ½, as the code's gradient. Maps start with variance
    1 / D (the code's 0.02² suits D near 2500). Rotary pairs are halves.
  Paper: Sun, Li, Dalal and others 2024, "Learning to (Learn at Test Time): RNNs
    with Expressive Hidden States", arXiv:2407.04620, sections 2.3 to 2.7;
    rates, norms and starting values as in the authors' code (ttt-lm-jax).
  """

  d_model: int
  num_heads: int = 1
  mini_batch_size: int = 16
  backbone: str = "transformer"
  base_lr: float = 1.0
  conv_size: int = 4
  rotary_base: float = 10000.0

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")
  op: ClassVar[str] = "gradient_step"
  reports: ClassVar[tuple[str, ...]] = ("inner_loss",)

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "mini_batch_size", "conv_size"
    )
    arguments.check_divides(self, "num_heads", "d_model")
    for field, ok, want in (
      ("num_heads", self.head_dim % 2 == 0, "such that d_model / it is even"),
      ("backbone", self.backbone in BACKBONES, f"one of {BACKBONES}"),
      ("base_lr", self.base_lr >= 0, "0 or more"),
      ("rotary_base", self.rotary_base > 0, "above 0"),
    ):
      if not ok:
        value = getattr(self, field)
        raise ValueError(f"TTTLinear: {field} must be {want}, got {value!r}")

  @property
  def head_dim(self) -> int:
    """K."""
    return self.d_model // self.num_heads

  def init(self, key) -> dict[str, Any]:
    d, h, k = self.d_model, self.num_heads, self.head_dim
    keys = jax.random.split(key, 6)
    draw, zeros = initializers.lecun_normal, jnp.zeros
    params = {
      "rate_w": 0.02 * jax.random.normal(keys[1], (d, h)),
      "rate_b": zeros((h,)),
      "place": zeros((self.mini_batch_size,)),
      "w0": 0.02 * jax.random.normal(keys[2], (h, k, k)),
      "b0": zeros((h, k)),
      "norm_scale": jnp.ones((h, k)),
      "norm_bias": zeros((h, k)),
      "post_scale": jnp.ones((d,)),
      "post_bias": zeros((d,)),
      "out": draw(keys[3], (d, d)),
    }
    if self.backbone == "transformer":
      return params | {"in": draw(keys[0], (d, 3 * d))}
    taps = (2, self.conv_size, d)
    return params | {
      "in": draw(keys[0], (d, 2 * d)),
      "conv": draw(keys[4], taps, fan_in=self.conv_size),
      "conv_bias": zeros((2, d)),
      "gate": draw(keys[5], (d, d)),
    }

  def initial_state(self, params, key=None) -> State:
    taps = self.conv_size - 1 if self.backbone == "mamba" else 0
    window = jnp.zeros((taps, self.d_model), jnp.float32)
    return State(start(self._fresh(params)), window)

  def observe(self, params, state, x):
    r, window = self._project(params, x, state, conv_step, state.inner.phase)
    one = jax.vmap(
      lambda s, r, learner: learn_step(s, *r, learner, residual=True),
      in_axes=(_INNER, 0, _LEARNER),
      out_axes=(_INNER, 0),
    )
    inner, out = one(state.inner, r, self._learner(params))
    return State(inner, window), *self._read_out(params, x, out)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    place = positions(state.inner.phase, len(xs), self.mini_batch_size, **flags)
    r, window = self._project(params, xs, state, partial(conv, **flags), place)
    whole = jax.vmap(
      lambda s, r, learner, fresh: gradient_step(
        s, *r[:3], rate=r[3], learner=learner, residual=True, fresh=fresh,
        implementation=implementation, **flags,
      ),
      in_axes=(_INNER, 1, _LEARNER, 0),
      out_axes=(_INNER, 1),
    )  # fmt: skip
    inner, out = whole(
      state.inner, r, self._learner(params), self._fresh(params)
    )
    return State(inner, window), *self._read_out(params, xs, out)

  def _fresh(self, params) -> Model:
    return Model(*(params[k].astype(jnp.float32) for k in ("w0", "b0")))

  def _learner(self, params) -> Learner:
    first = 1 / jnp.arange(1, self.mini_batch_size + 1, dtype=jnp.float32)
    rates = jnp.maximum(first + params["place"].astype(jnp.float32), 0.0)
    return Learner(rates, params["norm_scale"], params["norm_bias"])

  def _project(self, params, x, state, convolve, place):
    """x [..., D], its place in the mini-batch [...] ->
    (q, k, v [..., H, K], rate [..., H] float32), conv state."""
    d, window = self.d_model, state.conv
    z = dot(x, params["in"])
    q, k, v = z[..., :d], z[..., -2 * d : -d], z[..., -d:]
    if self.backbone == "mamba":
      taps, bias = params["conv"], params["conv_bias"]
      _, q = convolve(state.conv, q, taps[0], bias[0])
      window, k = convolve(state.conv, k, taps[1], bias[1])
    q, k, v = (u.reshape(u.shape[:-1] + (-1, self.head_dim)) for u in (q, k, v))
    q, k = (rotary(u, place[..., None], base=self.rotary_base) for u in (q, k))
    gate = dot(x, params["rate_w"]).astype(jnp.float32)
    rate = jax.nn.sigmoid(gate + params["rate_b"].astype(jnp.float32))
    return (q, k, v, rate * (self.base_lr / self.head_dim)), window

  def _read_out(self, params, x, out):
    scale, bias = params["post_scale"], params["post_bias"]
    y = norm.layer_norm(out.o.reshape(x.shape), scale, bias, eps=1e-6)
    if self.backbone == "mamba":
      y = jax.nn.gelu(dot(x, params["gate"])) * y
    return dot(y, params["out"]), {"inner_loss": out.loss.mean(-1)}
