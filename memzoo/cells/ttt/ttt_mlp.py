"""TTT-MLP."""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from memzoo.cells.ttt.ttt_linear import State, TTTLinear
from memzoo.core.registry import register
from memzoo.ops.conv import conv, step as conv_step
from memzoo.ops.deep_gradient_step import (
  Layer,
  Model,
  State as Inner,
  deep_gradient_step,
  start,
  step as learn_step,
)
from memzoo.ops.gradient_step import Learner, positions

EXPANSION = 4  # hidden units for each input of the inner model
# Axes of heads: all but the phase and the rates of places.
_INNER, _LEARNER = Inner(0, 0, None, None), Learner(None, 0, 0)


@register(
  "ttt_mlp",
  family="ttt",
  year=2024,
  paper="Sun et al. 2024, arXiv:2407.04620",
  write="mini-batch gradient step of an MLP",
  evidence="silver",
  tiny=dict(
    d_model=12, num_heads=2, mini_batch_size=4, backbone="mamba", conv_size=3
  ),
)
@dataclasses.dataclass(frozen=True)
class TTTMLP(TTTLinear):
  """TTT-MLP: the state is a two-layer MLP, and to remember is to train it.

    f(x; W) = x + LN(gelu(x W_1 + b_1) W_2 + b_2)
    ℓ(W; x_t) = ½ ‖f(θ_K x_t; W) − θ_V x_t‖²        the inner loss
    W_t = W_{t'} − λ_i Σ_s η_s ∇ℓ(W_{t'}; x_s)      s from t' + 1 to t
    o_t = f(θ_Q x_t; W_t)
    η_s = η_base σ(θ_η x_s) / K ,  λ_i = max(1 / i + θ_i, 0)
    y_t = θ_O LN(o_t)                               heads side by side

  W stands for W_1, b_1, W_2 and b_2; the hidden layer has 4 K units. All else
  is as in `TTTLinear`: t' is the end of the mini-batch before, and t the i-th
  token since; q and k turn by rotary angles that grow with i; W at the start
  and the inner layer norm are learned, one of each a head; with `backbone`
  'mamba' θ_Q = θ_K, short convolutions tell q and k apart, and
  y_t = θ_O (gelu(θ_g x_t) ⊙ LN(o_t)). The report `inner_loss` is
  ℓ(W_{t'}; x_t), its mean over heads.

  State: inner {model: W with unit λ, anchor: W_{t'}, each w [H, K, 4K],
    b [H, 4K], w [H, 4K, K], b [H, K]; phase int32} (no anchor where the
    mini-batch is one token) and conv [W − 1, D] ([0, D] without), float32;
    both start at the learned W, the rest at zero.
  Params: as TTTLinear's, with w1 [H, K, 4K], b1 [H, 4K], w2 [H, 4K, K],
    b2 [H, K] in the place of w0 and b0.
  Forms: step and scan (primal) O(D K) a token, in order; chunk (dual)
    O(D (K + n)) a token, in T / n sequential steps of matmuls (not for n = 1).
  Differs: the loss has a ½, as the code's gradient. Maps start with variance
    1 / D (the code's 0.02² suits D near 2500), and W_2 with deviation
    0.02 / √2: the code divides by √(2 · layers of the network), which a cell
    does not know. η_base is 0.1 throughout: the authors' scripts let it rise to
    that from 0.01. Rotary pairs are halves.
  Paper: Sun, Li, Dalal, Xu, Vikram, Zhang, Dubois, Chen, Wang, Koyejo,
    Hashimoto, Guestrin 2024, "Learning to (Learn at Test Time): RNNs with
    Expressive Hidden States", arXiv:2407.04620, sections 2.3 to 2.7; rates,
    norms and starting values as in the authors' code (ttt-lm-jax).
  """

  base_lr: float = 0.1

  op: ClassVar[str] = "deep_gradient_step"

  def init(self, key) -> dict[str, Any]:
    h, k, hidden = self.num_heads, self.head_dim, EXPANSION * self.head_dim
    key, *keys = jax.random.split(key, 3)
    params = super().init(key)
    del params["w0"], params["b0"]
    return params | {
      "w1": 0.02 * jax.random.normal(keys[0], (h, k, hidden)),
      "b1": jnp.zeros((h, hidden)),
      "w2": 0.02 * 2**-0.5 * jax.random.normal(keys[1], (h, hidden, k)),
      "b2": jnp.zeros((h, k)),
    }

  def initial_state(self, params, key=None) -> State:
    inner = start(self._fresh(params), size=self.mini_batch_size)
    taps = self.conv_size - 1 if self.backbone == "mamba" else 0
    return State(inner, jnp.zeros((taps, self.d_model), jnp.float32))

  def observe(self, params, state, x):
    r, window = self._project(params, x, state, conv_step, state.inner.phase)
    one = jax.vmap(
      lambda s, r, learner: learn_step(
        s, *r, learner=learner, size=self.mini_batch_size, residual=True
      ),
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
      lambda s, r, learner, fresh: deep_gradient_step(
        s, *r[:3], rate=r[3], size=self.mini_batch_size, learner=learner,
        residual=True, fresh=fresh, implementation=implementation, **flags,
      ),
      in_axes=(_INNER, 1, _LEARNER, 0),
      out_axes=(_INNER, 1),
    )  # fmt: skip
    inner, out = whole(
      state.inner, r, self._learner(params), self._fresh(params)
    )
    return State(inner, window), *self._read_out(params, xs, out)

  def _fresh(self, params) -> Model:
    single = lambda name: params[name].astype(jnp.float32)
    return tuple(Layer(single(f"w{n}"), single(f"b{n}")) for n in (1, 2))
