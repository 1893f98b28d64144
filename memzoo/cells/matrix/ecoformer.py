"""EcoFormer: attention between binary codes."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, chunk, kernel_hash, norm
from memzoo.ops.batched import heads
from memzoo.ops.linear_attention import linear_attention, step as attend_step


class State(NamedTuple):
  s: jax.Array  # [H, b + 1, V] float32: Σ [H(k), 1] vᵀ
  z: jax.Array  # [H, b + 1] float32: Σ [H(k), 1]


@register(
  "ecoformer",
  family="matrix",
  year=2022,
  paper="Liu et al. 2022, arXiv:2209.09004",
  write="add",
  evidence="silver",
  tiny=dict(d_model=6, num_heads=2, head_dim=3, num_bits=5, num_anchors=7),
)
@dataclasses.dataclass(frozen=True)
class EcoFormer(cell.Cell):
  """EcoFormer: keys and queries hashed to b signs, by hash functions that are
  fitted to the attention map.

    u = W_qk x / ‖W_qk x‖ ,  κ_j(u) = exp(−‖u − a_j‖² / 2σ)
    H(u)_r = sign(Σ_j A_rj (κ_j(u) − μ_j))         r = 1 … b
    S_t = S_{t−1} + [H(u_t), 1] v_tᵀ ,  z_t = z_{t−1} + [H(u_t), 1]
    y_t = W_o (h_tᵀ S_t / h_tᵀ z_t) ,  h_t = [H(u_t), B] ,  B = b + 1

  A pair weighs H(u)·H(u') + B = b + B − 2 · (their Hamming distance) > 0, and
  what is added up are signs. sign passes gradients where its argument is
  within ±1; the hash (anchors a, weights A, means μ, bandwidth σ) is not
  trained but fitted by `refresh`, a bit after the other, to labels of pairs:
  for every token +1 with the `top` tokens of largest u·u', −1 with those of
  the smallest (`memzoo.ops.kernel_hash`). The first call fits; so does every
  `refit_every`-th after it (0: none).

  State: s [H, b + 1, V] and z [H, b + 1] float32, from zero.
  Params: qk [D, HK], v [D, HK], out [HK, D]; buffers: anchors [H, M, K],
    weights [H, b, M], mean [H, M], bandwidth [H], calls [].
  Forms: step and scan O(H (M K + b V)) a token, in order; chunk O(H (M K +
    C (b + V) + b V)) a token, in T / C sequential steps of matmuls; pallas the
    same in one kernel. A fit takes O(B H T²) memory.
  Differs: causal, where the paper's encoders see all tokens; so σ, μ are those
    of the fit (the code takes σ from the sequence at hand). B Σ v is added as
    the algebra has it (the code adds B v_t). Heads are fitted one by one.
    Before the first fit the anchors are random unit vectors.
  Paper: Liu, Pan, He, Cai, Zhuang 2022, "EcoFormer: Energy-Saving Attention
    with Linear Complexity", arXiv:2209.09004, section 4 (kernelised hashing,
    its fit and the attention); the fit, the labels and all constants as in the
    authors' code (github.com/ziplab/EcoFormer).
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  num_bits: int = 16
  num_anchors: int = 25
  top: int = 10
  fit_steps: int = 100
  refit_every: int = 0

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "linear_attention"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "num_bits", "num_anchors",
      "top", "fit_steps",
    )  # fmt: skip
    if not isinstance(self.refit_every, int) or self.refit_every < 0:
      raise ValueError(
        "EcoFormer: refit_every must be an integer, 0 or more, got "
        f"{self.refit_every!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, h, k = self.d_model, self.num_heads, self.head_dim
    keys = jax.random.split(key, 4)
    hashed = jax.vmap(
      lambda key: kernel_hash.draw(key, self.num_bits, self.num_anchors, k)
    )(jax.random.split(keys[3], h))
    return {
      "qk": initializers.lecun_normal(keys[0], (d, h * k)),
      "v": initializers.lecun_normal(keys[1], (d, h * k)),
      "out": initializers.lecun_normal(keys[2], (h * k, d)),
      "buffers": {**hashed._asdict(), "calls": jnp.zeros(())},
    }

  def initial_state(self, params, key=None) -> State:
    h, width = self.num_heads, self.num_bits + 1
    return State(
      jnp.zeros((h, width, self.head_dim), jnp.float32),
      jnp.zeros((h, width), jnp.float32),
    )

  def step(self, params, state, x):
    sz, o = jax.vmap(attend_step)(_join(state), *self._project(params, x))
    return State(*_part(sz)), self._read_out(params, o)

  def parallel(self, params, state, xs, reset, mask, implementation):
    sz, o = heads(linear_attention)(
      _join(state), *self._project(params, xs), reset=reset, mask=mask,
      implementation=implementation,
    )  # fmt: skip
    return State(*_part(sz)), self._read_out(params, o)

  def codes(self, params, x):
    """H(u): x [..., D] -> float32 [..., H, b] of −1 and 1."""
    hashed = jax.lax.stop_gradient(_hash(params))
    one = jax.vmap(kernel_hash.encode, in_axes=(0, -2), out_axes=-2)
    return one(hashed, self._units(params, x))

  def refresh(self, params, xs):
    """Fits the hash to the tokens xs [B, T, D] where it is due."""
    old, calls = _hash(params), params["buffers"]["calls"]
    # Every fit draws other anchors: by the bits of those before it.
    bits = jax.lax.bitcast_convert_type(old.anchors[0, 0, 0], jnp.uint32)

    def fit():
      one = lambda hashed, u: kernel_hash.fit(
        hashed, u, jax.random.key(bits), top=self.top, steps=self.fit_steps,
        rate=kernel_hash.RATE / self.num_heads,
      )  # fmt: skip
      return jax.vmap(one, in_axes=(0, 2))(old, self._units(params, xs))

    new = jax.lax.cond(calls == 0, fit, lambda: old)
    every = self.refit_every
    calls = (calls + 1) % every if every else jnp.ones_like(calls)
    return {**params, "buffers": {**new._asdict(), "calls": calls}}

  def _units(self, params, x):
    """u [..., H, K], float32 whatever x is: a rounded key is another code."""
    u = chunk.matmul(x, params["qk"])
    u = u.reshape(u.shape[:-1] + (self.num_heads, self.head_dim))
    return norm.l2_normalize(u)

  def _project(self, params, x):
    code = self.codes(params, x).astype(x.dtype)
    one = jnp.ones_like(code[..., :1])
    v = dot(x, params["v"])
    v = v.reshape(v.shape[:-1] + (self.num_heads, self.head_dim))
    return (
      jnp.concatenate([code, (self.num_bits + 1) * one], axis=-1),
      jnp.concatenate([code, one], axis=-1),
      jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1),
    )

  def _read_out(self, params, o):
    o, total = o[..., :-1], o[..., -1:]
    o = o / jnp.where(total == 0, 1, total)  # 0 where there is no token
    return dot(o.reshape(o.shape[:-2] + (-1,)), params["out"])


def _hash(params) -> kernel_hash.Hash:
  buffers = params["buffers"]
  return kernel_hash.Hash(*(buffers[n] for n in kernel_hash.Hash._fields))


def _join(state):
  return jnp.concatenate([state.s, state.z[..., None]], axis=-1)


def _part(sz):
  return sz[..., :-1], sz[..., -1]
