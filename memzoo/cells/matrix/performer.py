"""Performer: FAVOR+."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, features
from memzoo.ops.batched import heads
from memzoo.ops.linear_attention import linear_attention, step as attend_step
from memzoo.ops.running_softmax import running_softmax, step as softmax_step


class State(NamedTuple):
  s: jax.Array  # [H, M, V] float32: Σ φ(k) vᵀ / Σ φ(k)·1
  n: jax.Array  # [H, M] float32: Σ φ(k) / Σ φ(k)·1
  z: jax.Array  # [H] float32: log Σ φ(k)·1, −inf before the first token


@register(
  "performer",
  family="matrix",
  year=2020,
  paper="Choromanski et al. 2020, arXiv:2009.14794",
  write="add",
  evidence="silver",
  tiny=dict(d_model=6, num_heads=2, head_dim=3, num_features=5),
)
@dataclasses.dataclass(frozen=True)
class Performer(cell.Cell):
  """Performer: softmax attention estimated by positive random features.

    φ(x)_i = exp(ω_i·x − ‖x‖² / 2) / sqrt(M) ,  E[φ(q)·φ(k)] = exp(q·k)
    S_t = S_{t−1} + φ(k_t / K^¼) v_tᵀ ,  n_t = n_{t−1} + φ(k_t / K^¼)
    y_t = W_o (φ(q_t / K^¼)ᵀ S_t / φ(q_t / K^¼)ᵀ n_t)

  The rows ω_i are normal vectors, orthogonal in blocks of K, which lowers the
  variance; they are not trained, all heads share them, and `refresh` draws
  them anew every `redraw_every` calls (0: never). A state is of the features
  that it was made with.

  S and n are held divided by exp(z_t) = Σ_{j <= t} Σ_i φ(k_j)_i, so that no
  exponential leaves its range: a token decays them by exp(z_{t−1} − z_t), and
  z and the maximum of a query's exponents cancel in y.

  State: s [H, M, V] and n [H, M] float32 from zero, z [H] float32 from −inf.
  Params: qkv [D, 3HK], out [HK, D]; buffers: projection [M, K] and calls [],
    refreshes since the last draw.
  Forms: step and scan O(H M V) a token, in order; chunk O(H (C (M + V) + M V))
    a token, in T / C sequential steps of matmuls; pallas the same in one
    kernel.
  Differs: `eps` is added to the features of queries alone (after they are
    scaled to a maximum of one), in the authors' code to those of keys too,
    which it scales by their maximum over the whole sequence. The new draw is
    made from the bits of the old one.
  Paper: Choromanski, Likhosherstov, Dohan, Song, Gane, Sarlos, Hawkins, Davis,
    Mohiuddin, Kaiser, Belanger, Colwell, Weller 2020, "Rethinking Attention
    with Performers", arXiv:2009.14794, sections 2.2 to 2.4 (Lemma 1) and the
    prefix sums of appendix B.1; scales and stabilisers as in the authors' code
    (google-research/performer).
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  num_features: int = 128
  redraw_every: int = 1000
  eps: float = 1e-6

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "linear_attention"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "num_features"
    )
    if not isinstance(self.redraw_every, int) or self.redraw_every < 0:
      raise ValueError(
        "Performer: redraw_every must be an integer, 0 or more, got "
        f"{self.redraw_every!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, width = self.d_model, self.num_heads * self.head_dim
    key_qkv, key_out, key_rows = jax.random.split(key, 3)
    return {
      "qkv": initializers.lecun_normal(key_qkv, (d, 3 * width)),
      "out": initializers.lecun_normal(key_out, (width, d)),
      "buffers": {"projection": self.draw(key_rows), "calls": jnp.zeros(())},
    }

  def draw(self, key) -> jax.Array:
    """A projection [M, K]."""
    return features.orthogonal_rows(key, self.num_features, self.head_dim)

  def initial_state(self, params, key=None) -> State:
    h, m = self.num_heads, self.num_features
    return State(
      jnp.zeros((h, m, self.head_dim), jnp.float32),
      jnp.zeros((h, m), jnp.float32),
      jnp.full((h,), -jnp.inf, jnp.float32),
    )

  def step(self, params, state, x):
    q, k, v, total = self._project(params, x)
    z, (log_decay, weight) = softmax_step(state.z, total)
    k = _weighted(k, weight, x.dtype)
    s, o = jax.vmap(attend_step)(_join(state), q, k, v, log_decay)
    return State(*_part(s), z), self._read_out(params, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    q, k, v, total = self._project(params, xs)
    z, (log_decay, weight) = running_softmax(state.z, total, **flags)
    s, o = heads(linear_attention)(
      _join(state), q, _weighted(k, weight, xs.dtype), v, log_decay=log_decay,
      implementation=implementation, **flags,
    )  # fmt: skip
    return State(*_part(s), z), self._read_out(params, o)

  def refresh(self, params, xs):
    """Counts a call, and draws the projection anew when it is due."""
    del xs
    if not self.redraw_every:
      return params
    old, calls = (params["buffers"][n] for n in ("projection", "calls"))
    bits = jax.lax.bitcast_convert_type(old[0, 0], jnp.uint32)
    due = calls + 1 >= self.redraw_every
    new = jax.lax.cond(
      due,
      lambda: self.draw(jax.random.key(bits)).astype(old.dtype),
      lambda: old,
    )
    calls = jnp.where(due, jnp.zeros_like(calls), calls + 1)
    return {**params, "buffers": {"projection": new, "calls": calls}}

  def _project(self, params, x):
    """φ(q) [..., H, M] up to a factor, the shares of φ(k) in its sum [..., H,
    M] float32, [v, 1], and the log of the sum [..., H] float32."""
    qkv = dot(x, params["qkv"])
    qkv = qkv.reshape(qkv.shape[:-1] + (3, self.num_heads, self.head_dim))
    projection = jax.lax.stop_gradient(params["buffers"]["projection"])
    scaled = qkv[..., :2, :, :].astype(jnp.float32) * self.head_dim**-0.25
    exponents = features.favor_exponents(scaled, projection)
    q, k = exponents[..., 0, :, :], exponents[..., 1, :, :]
    top = jax.lax.stop_gradient(jnp.max(q, axis=-1, keepdims=True))
    v = qkv[..., 2, :, :]
    return (
      (jnp.exp(q - top) + self.eps).astype(x.dtype),
      jax.nn.softmax(k, axis=-1),
      jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1),
      jax.nn.logsumexp(k, axis=-1),
    )

  def _read_out(self, params, o):
    o, total = o[..., :-1], o[..., -1:]
    o = o / jnp.where(total == 0, 1, total)  # 0 where there is no token
    return dot(o.reshape(o.shape[:-2] + (-1,)), params["out"])


def _weighted(k, weight, dtype):
  return (k * weight[..., None]).astype(dtype)


def _join(state):
  return jnp.concatenate([state.s, state.n[..., None]], axis=-1)


def _part(s):
  return s[..., :-1], s[..., -1]
