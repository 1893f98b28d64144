"""Chimera: a selective state space over time and over variates."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments
from memzoo.ops.plane_scan import (
  Matrices,
  Places,
  plane_scan,
  step as plane_step,
)

_DT2 = 0.1, 1.0  # of the step along the variates, at the start
# [..., G, V, E] by [G, E, F] -> [..., G, V, F].
_dot_groups = jax.vmap(dot, in_axes=(-3, 0), out_axes=-3)


class State(NamedTuple):
  h1: jax.Array  # [G, V, E, N] float32: across time
  h2: jax.Array  # [G, V, E, N] float32: across variates


@register(
  "chimera",
  family="ssm",
  year=2024,
  paper="Behrouz et al. 2024, arXiv:2406.04320",
  write="selected decay and add, on two axes",
  evidence="bronze",
  tiny=dict(d_model=6, num_variates=3, d_state=5),
)
@dataclasses.dataclass(frozen=True)
class Chimera(cell.Cell):
  """Chimera: the step along time and that along variates are both chosen.

    h¹_{v,t} = Ā_1 h¹_{v,t−1} + Ā_2 h²_{v,t−1} + B̄_1 x_{v,t}     across time
    h²_{v,t} = Ā_3 h¹_{v−1,t} + Ā_4 h²_{v−1,t} + B̄_2 x_{v,t}     across variates
    y_{v,t}  = C_1 h¹_{v,t} + C_2 h²_{v,t}
    Ā_1 = exp(Δ_1 A_1) ,  (Ā_2, B̄_1) = A_1⁻¹ (Ā_1 − 1) (A_2, B_1)   a held input
    Ā_4 = exp(Δ_2 A_4) ,  (Ā_3, B̄_2) = A_4⁻¹ (Ā_4 − 1) (A_3, B_2)
    B, C = W x_{v,t} ;  Δ = softplus(W_Δ x_{v,t} + b_Δ)

  An input of D numbers is V variates of E = D / V channels; a channel has N
  states and the A are diagonal. A small Δ_1 keeps long progressions, a large
  one seasonal patterns: each of `num_heads` heads starts with a share of
  [dt_min, dt_max] of its own. Variates have no order: a second module
  reads them from the last to the first. All modules' outputs, and d ⊙ x, are
  summed.

  State: h1, h2 [G, V, E, N] float32, from zero; G modules, heads × 2.
  Params: select [G, E, 4N + 2E] (B_1, B_2, C_1, C_2, W_Δ), dt_bias [G, 2E],
    a_log [G, 2, E, N] (A_1, A_4 = −exp), cross [G, 2, E, N] (A_2, A_3 = A_1,
    A_4 ⊙ tanh), d [D]. At the start A_1 = A_4 = −(1 … N).
  Forms: step O(G D (E + N)) a token, the variates in order; scan, assoc and
    chunk go over the variates in V serial steps, each of which has h² of all
    times at once and h¹ by that form of the linear recurrence over time. The
    backward keeps both states and takes the rest again.
  Differs: the paper's text was not to be had; the rule is put together from
    its abstract and from descriptions (mql5.com/en/articles/17210 and 17241,
    sciencestack.ai), which have: two states, what A_1, A_2 and A_3, A_4 weigh,
    zero-order hold with Δ_1, Δ_2, diagonal A, B, C and Δ functions of x_{v,t},
    two heads with different discretisations, two directions of the variates.
    Open, and chosen here: that x of the new place is written; how A_2 and A_3
    are discretised (here: the other state is held like an input, which is
    exact); that |A_2| < |A_1| and |A_3| < |A_4|, so that nothing grows; where
    Δ starts; d. A_1 and A_2 of the paper can be structured otherwise, to
    recover autoregression. Not built: its 2-D prefix sum (time is parallel
    here, the variates are in order), gating, the series decomposition and the
    closed-loop decoder.
  Paper: Behrouz, Santacatterina, Zabih 2024, "Chimera: Effectively Modeling
    Multivariate Time Series with 2-Dimensional State Space Models",
    arXiv:2406.04320; abstract, and descriptions of its section 3.
  """

  d_model: int
  num_variates: int = 4
  d_state: int = 8
  num_heads: int = 2
  bidirectional: bool = True
  dt_min: float = 1e-3
  dt_max: float = 1.0

  op: ClassVar[str] = "linear_recurrence"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "assoc", "chunk")

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_variates", "d_state", "num_heads"
    )
    arguments.check_divides(self, "num_variates", "d_model")
    if not 0 < self.dt_min < self.dt_max:
      raise ValueError(
        "Chimera: needs 0 < dt_min < dt_max, got "
        f"dt_min={self.dt_min!r}, dt_max={self.dt_max!r}"
      )

  @property
  def width(self) -> int:
    """E, the channels of a variate."""
    return self.d_model // self.num_variates

  @property
  def directions(self) -> int:
    return 2 if self.bidirectional else 1

  def init(self, key) -> dict[str, Any]:
    h, e, n = self.num_heads, self.width, self.d_state
    g = h * self.directions
    key_s, key_1, key_2, key_c = jax.random.split(key, 4)
    shares = jnp.geomspace(self.dt_min, self.dt_max, h + 1)
    share = jax.random.uniform(key_1, (g, e))
    low = jnp.repeat(jnp.log(shares[:-1]), self.directions)[:, None]
    dt1 = jnp.exp(low + share * math.log(self.dt_max / self.dt_min) / h)
    dt2 = initializers.log_uniform(key_2, (g, e), *_DT2)
    a = jnp.arange(1.0, n + 1, dtype=jnp.float32)
    return {
      "select": initializers.lecun_normal(key_s, (g, e, 4 * n + 2 * e), e),
      "dt_bias": initializers.inverse_softplus(
        jnp.concatenate([dt1, dt2], axis=-1)
      ),
      "a_log": jnp.broadcast_to(jnp.log(a), (g, 2, e, n)),
      "cross": 0.5 * jax.random.normal(key_c, (g, 2, e, n)),
      "d": jnp.ones((self.d_model,)),
    }

  def initial_state(self, params, key=None) -> State:
    g = self.num_heads * self.directions
    zero = jnp.zeros((g, self.num_variates, self.width, self.d_state))
    return State(zero, zero)

  def step(self, params, state, x):
    *state, y = plane_step(*state, self._select(params, x), _matrices(params))
    return State(*state), self._merge(params, y, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    *state, ys = plane_scan(
      *state, self._select(params, xs), _matrices(params), reset=reset,
      mask=mask, implementation=implementation,
    )  # fmt: skip
    return State(*state), self._merge(params, ys, xs)

  def _select(self, params, x) -> Places:
    """x [..., D] -> [..., G, V, ·], the variates in each module's order."""
    n = self.d_state
    u = x.reshape(*x.shape[:-1], self.num_variates, self.width)
    ways = [u, jnp.flip(u, -2)][: self.directions]
    u = jnp.stack(ways * self.num_heads, axis=-3)
    s = _dot_groups(u, params["select"]).astype(jnp.float32)
    b1, b2, c1, c2, dt = jnp.split(s, [n, 2 * n, 3 * n, 4 * n], axis=-1)
    bias = params["dt_bias"].astype(jnp.float32)[:, None]
    dt1, dt2 = jnp.split(jax.nn.softplus(dt + bias), 2, axis=-1)
    return Places(u.astype(jnp.float32), dt1, dt2, b1, b2, c1, c2)

  def _merge(self, params, y, x):
    """The sum of the modules' outputs [..., G, V, E] and d ⊙ x."""
    shape = *y.shape[:-3], self.num_heads, -1, *y.shape[-2:]
    ways = jnp.sum(y.reshape(shape), axis=-4)
    y = ways[..., 0, :, :]
    if self.bidirectional:
      y += jnp.flip(ways[..., 1, :, :], -2)
    y = y.reshape(x.shape).astype(x.dtype)
    return y + params["d"].astype(x.dtype) * x


def _matrices(params) -> Matrices:
  a = -jnp.exp(params["a_log"].astype(jnp.float32))
  cross = a * jnp.tanh(params["cross"].astype(jnp.float32))
  return Matrices(a[:, 0], cross[:, 0], cross[:, 1], a[:, 1])
