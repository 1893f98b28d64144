"""Longhorn."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, chunk
from memzoo.ops.conv import conv, empty as conv_empty, step as conv_step
from memzoo.ops.linear_recurrence import linear_recurrence
from memzoo.ops.selective_scan import even_blocks


class State(NamedTuple):
  s: jax.Array  # [E, N] float32
  conv: jax.Array  # [W − 1, E] float32: the last inputs of the convolution


class Write(NamedTuple):
  """What a token asks, binds, and how far it moves the memory."""

  x: jax.Array  # [..., E]
  delta: jax.Array  # [..., E] float32: β / (1 + β kᵀk)
  k: jax.Array  # [..., N] float32
  q: jax.Array  # [..., N] float32


@register(
  "longhorn",
  family="matrix",
  year=2024,
  paper="Liu et al. 2024, arXiv:2407.14207",
  write="implicit least squares",
  evidence="silver",
  tiny=dict(d_model=6, d_state=5, expand=1.5, conv_size=3, rank=2),
)
@dataclasses.dataclass(frozen=True)
class Longhorn(cell.Cell):
  """Longhorn: each token moves the memory to where it recalls the token.

    s_t = argmin_s ‖s − s_{t−1}‖² + β_t (s·k_t − x_t)²     each row s of S
        = s_{t−1} (I − Δ_t k_t k_tᵀ) + Δ_t x_t k_t         in closed form
    S_t = (1 − Δ_t ⊗ k_t²) ⊙ S_{t−1} + (Δ_t ⊙ x_t) k_tᵀ    its diagonal, kept
    Δ_t = β_t / (1 + β_t k_tᵀ k_t)
    x, z = W_in u_t ,  x = silu(conv(x)) ,  β = σ(W_β (W_r x) + b_β)
    k, q = W_k x, W_q x
    y_t = W_out ((S_t q_t + D ⊙ x_t) ⊙ silu(z))

  E = expand D channels, each a regression on N features. Δ k² < 1, so that the
  decay needs no parameter and no channel moves past its target.

  State: s [E, N] and conv [W − 1, E] float32, from zero.
  Params: in [D, 2E], conv [W, E], conv_bias [E], select [E, R + 2N] (W_r, W_k,
    W_q), beta [R, E], beta_bias [E] (from zero), d [E], out [E, D].
  Forms: step O(E (N + D)) a token; scan the same, with everything but the
    recurrence hoisted into blocks of at most 64 tokens; chunk in passes over 16
    tokens and T / 16 serial steps. In scan and chunk a block's [64, E, N] is
    built and recomputed in the backward, nothing of shape [T, E, N].
  Differs: nothing: the diagonal in place of the rank-one transition is the
    paper's. R is ceil(D / 16) unless given, as in the authors' code.
  Paper: Liu, Wang, Wu, Feng, Stone, Liu 2024, "Longhorn: State Space Models are
    Amortized Online Learners", arXiv:2407.14207, section 3, theorem 3.1 and
    algorithm 1; the layer as in the authors' code.
  """

  d_model: int
  d_state: int = 16
  expand: float = 2.0
  conv_size: int = 4
  rank: int | None = None

  op: ClassVar[str] = "linear_recurrence"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "d_state", "conv_size")
    if self.rank is not None:
      arguments.check_positive(self, "rank")
    if self.expand <= 0 or self.expand * self.d_model % 1:
      raise ValueError(
        f"Longhorn: expand · d_model must be a positive whole number, got "
        f"expand={self.expand!r}, d_model={self.d_model!r}"
      )

  @property
  def d_inner(self) -> int:
    """E, the channels of the memory."""
    return int(self.expand * self.d_model)

  def init(self, key) -> dict[str, Any]:
    d, e, n, w = self.d_model, self.d_inner, self.d_state, self.conv_size
    r, keys = self.rank or -(-d // 16), jax.random.split(key, 6)

    def uniform(key, shape, fan_in):
      return initializers.uniform(key, shape, fan_in**-0.5)

    return {
      "in": uniform(keys[0], (d, 2 * e), d),
      "conv": uniform(keys[1], (w, e), w),
      "conv_bias": uniform(keys[2], (e,), w),
      "select": uniform(keys[3], (e, r + 2 * n), e),
      "beta": uniform(keys[4], (r, e), r),
      "beta_bias": jnp.zeros((e,)),
      "d": jnp.ones((e,)),
      "out": uniform(keys[5], (e, d), e),
    }

  def initial_state(self, params, key=None) -> State:
    s = jnp.zeros((self.d_inner, self.d_state), jnp.float32)
    return State(s, conv_empty(params["conv"]))

  def step(self, params, state, x):
    x, z = jnp.split(dot(x, params["in"]), 2, axis=-1)
    window, x = conv_step(state.conv, x, params["conv"], params["conv_bias"])
    w = self._select(params, x)
    decay, write = _transition(w)
    s = decay * state.s + write
    o = chunk.matmul(s, w.q)
    return State(s, window), self._read_out(params, o, w.x, z)

  def parallel(self, params, state, xs, reset, mask, implementation):
    def block(state, i, _):
      flags = dict(reset=i.reset, mask=i.mask)
      x, z = jnp.split(dot(i.xs, params["in"]), 2, axis=-1)
      window, x = conv(
        state.conv, x, params["conv"], params["conv_bias"], **flags
      )
      w = self._select(params, x)
      flat = lambda a: a.reshape(a.shape[:-2] + (-1,))
      decay, write = map(flat, _transition(w))
      s, states = linear_recurrence(
        flat(state.s), write, decay=decay, implementation=implementation,
        **flags,
      )  # fmt: skip
      states = states.reshape(states.shape[:1] + state.s.shape)
      o = jnp.einsum("ten,tn->te", states, w.q, precision="highest")
      s = s.reshape(state.s.shape)
      return State(s, window), self._read_out(params, o, w.x, z)

    inputs = Inputs(xs, reset, mask)
    return chunk.run(block, state, inputs, chunk_size=even_blocks(len(xs)))

  def _select(self, params, x) -> Write:
    x, n = jax.nn.silu(x), self.d_state
    select = dot(x, params["select"])
    r = select.shape[-1] - 2 * n
    low, k, q = jnp.split(select, [r, r + n], axis=-1)
    k, q = k.astype(jnp.float32), q.astype(jnp.float32)
    logits = dot(low, params["beta"]).astype(jnp.float32)
    beta = jax.nn.sigmoid(logits + params["beta_bias"].astype(jnp.float32))
    square = jnp.sum(jnp.square(k), axis=-1, keepdims=True)
    return Write(x, beta / (1 + beta * square), k, q)

  def _read_out(self, params, o, x, z):
    y = o.astype(x.dtype) + params["d"].astype(x.dtype) * x
    return dot(y * jax.nn.silu(z), params["out"])


class Inputs(NamedTuple):
  xs: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


def _transition(w: Write):
  """Decay and write, [..., E, N] each, in float32."""
  delta, k = w.delta[..., None], w.k[..., None, :]
  return 1 - delta * k**2, delta * w.x.astype(jnp.float32)[..., None] * k
