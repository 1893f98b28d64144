"""mLSTM, the matrix memory of xLSTM."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.batched import heads
from memzoo.ops.conv import conv, step as conv_step
from memzoo.ops.exponential_attention import (
  State as Memory,
  exponential_attention,
  step as memory_step,
)

BACKBONES = ("xlstm", "xlstm_7b")
FORGET = {"sigmoid": jax.nn.log_sigmoid, "exp": lambda f: f}  # log f of f̃
FORGET = {"sigmoid": jax.nn.log_sigmoid, "exp": lambda f: f}  # log f of f̃


class State(NamedTuple):
  memory: Memory  # s [H, K, V], n [H, K], m [H]: C, n and m of the paper
  conv: jax.Array  # [W − 1, E] float32, no rows where there is no conv


@register(
  "mlstm",
  family="matrix",
  year=2024,
  paper="Beck et al. 2024, arXiv:2405.04517",
  write="exponential gate, decay, add",
  evidence="gold",
  parity="transformers 5.23, xLSTMLayer; mlstm_kernels 2.0.6 (its op)",
  tiny=dict(d_model=6, num_heads=2, conv_size=3, block_size=3),
)
@dataclasses.dataclass(frozen=True)
class MLSTM(cell.Cell):
  """mLSTM: a matrix with an exponential input gate and a normaliser.

    C_t = f_t C_{t−1} + i_t v_t k_tᵀ ,  n_t = f_t n_{t−1} + i_t k_t   (19, 20)
    h̃_t = C_t q_t / max(|n_tᵀ q_t|, 1)                               (21)
    i_t = exp(ĩ_t) ,  f_t = σ(f̃_t) or exp(f̃_t) ,  k_t = W_k x_t / √K (23-26)
    m_t = max(log f_t + m_{t−1}, ĩ_t)                                (15)

  What is kept is C exp(−m) and n exp(−m), C transposed, [K, V]. Around it, by
  `backbone`, with LN the norm of each head:
    xlstm:    u, z = W_up x;  c = silu(conv(u));  q, k, v = W_q c, W_k c, W_v u
              in blocks of `block_size`;  ĩ, f̃ from [q; k; v];
              y = W_down ((LN(h̃) + skip ⊙ c) ⊙ silu(z))
    xlstm_7b: q, k, v = W x, with K = qk_ratio V;  ĩ, f̃ from x, each as
              soft_cap tanh(· / soft_cap);  y = W_o (LN(h̃) ⊙ σ(W_z x))
  E = expand D is the width of all heads' values. xLSTM 7B has expand = 1 and
  qk_ratio = 0.5.

  State: memory s [H, K, V], n [H, K], m [H] and conv [W − 1, E], float32, from
    zero.
  Params: gates [·, 2H] (ĩ, f̃), gates_bias [2H], norm [E], out [E, D]; xlstm: up
    [D, 2E], conv [W, E], conv_bias [E], qkv [3, E / b, b, b], skip [E];
    xlstm_7b: qkv [D, 2HK + E], z [D, E]. The gates start from their biases
    alone, f̃ from 3 to 6 over the heads.
  Forms: step and scan O(H K V) a token, in order; chunk O(H (C (K + V) + K V))
    a token, in T / C sequential steps of matmuls.
  Differs: 1e-6 is added to the stabilised denominator, as in the authors' code,
    whose order of norm, skip and gate this is. Projections have no bias. W_down
    starts as for a network of one block.
  Paper: Beck, Pöppel, Spanring, Auer, Prudnikova, Kopp, Klambauer,
    Brandstetter, Hochreiter 2024, "xLSTM: Extended Long Short-Term Memory",
    arXiv:2405.04517, eq. 15-27 and section 2.4. Beck et al. 2025, "xLSTM 7B: A
    Recurrent LLM for Fast and Efficient Inference", arXiv:2503.13427
    (xlstm_7b).
  """

  d_model: int
  num_heads: int = 4
  backbone: str = "xlstm"
  forget_gate: str = "sigmoid"
  forget_gate: str = "sigmoid"
  expand: float = 2.0
  conv_size: int = 4
  block_size: int = 4
  qk_ratio: float = 1.0
  soft_cap: float = 15.0

  op: ClassVar[str] = "exponential_attention"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "conv_size", "block_size"
    )
    total = self.d_model * self.expand
    blocks = self.block_size if self._first else 1
    keys = total / self.num_heads * self.qk_ratio
    for field, fits, want in (
      ("backbone", self.backbone in BACKBONES, f"one of {BACKBONES}"),
      ("soft_cap", self.soft_cap > 0, "above 0"),
      ("forget_gate", self.forget_gate in FORGET, f"one of {tuple(FORGET)}"),
      ("expand", total > 0 == total % self.num_heads, "such that V is whole"),
      ("block_size", total % blocks == 0, "a divisor of expand · d_model"),
      ("qk_ratio", keys >= 1 and keys % 1 == 0, "such that K is whole"),
      ("qk_ratio", self.qk_ratio == 1 or not self._first, "1 in 'xlstm'"),
    ):
      if not fits:
        value = getattr(self, field)
        raise ValueError(f"MLSTM: {field} must be {want}, got {value!r}")

  @property
  def _first(self) -> bool:
    return self.backbone == "xlstm"

  @property
  def sizes(self) -> tuple[int, int, int]:
    """H, K and V."""
    v = int(self.d_model * self.expand) // self.num_heads
    return self.num_heads, int(v * self.qk_ratio), v

  def init(self, key) -> dict[str, Any]:
    d, w, b = self.d_model, self.conv_size, self.block_size
    (h, k, v), keys = self.sizes, jax.random.split(key, 6)
    e, small = h * v, (2 / (5 * d)) ** 0.5
    normal = lambda key, shape, scale: scale * jax.random.normal(key, shape)
    write = normal(keys[0], (h,), 0.1) if self._first else jnp.full((h,), -10.0)
    params = {
      "gates": jnp.zeros((3 * e if self._first else d, 2 * h)),
      "gates_bias": jnp.concatenate([write, jnp.linspace(3.0, 6.0, h)]),
      "norm": jnp.ones((e,)),
      "out": normal(keys[1], (e, d), 2 * d**-0.5),
    }
    if not self._first:
      qkv = normal(keys[2], (d, 2 * h * k + e), small)
      return {**params, "qkv": qkv, "z": normal(keys[3], (d, e), small)}
    return {
      **params,
      "up": normal(keys[2], (d, 2 * e), small),
      "conv": initializers.uniform(keys[3], (w, e), w**-0.5),
      "conv_bias": initializers.uniform(keys[4], (e,), w**-0.5),
      "qkv": normal(keys[5], (3, e // b, b, b), small),
      "skip": jnp.ones((e,)),
    }

  def initial_state(self, params, key=None) -> State:
    h, k, v = self.sizes
    rows = self.conv_size - 1 if self._first else 0
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    memory = Memory(zeros(h, k, v), zeros(h, k), zeros(h))
    return State(memory, zeros(rows, h * v))

  def step(self, params, state, x):
    run = lambda w, u: conv_step(w, u, params["conv"], params["conv_bias"])
    window, tensors, gates, around = self._project(params, state.conv, x, run)
    memory, h = jax.vmap(memory_step)(state.memory, *tensors, *gates.values())
    return State(memory, window), self._read_out(params, h, *around)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    run = lambda w, u: conv(w, u, params["conv"], params["conv_bias"], **flags)
    window, tensors, gates, around = self._project(params, state.conv, xs, run)
    memory, h = heads(exponential_attention)(
      state.memory, *tensors, **gates, implementation=implementation, **flags
    )
    return State(memory, window), self._read_out(params, h, *around)

  def _project(self, params, window, x, run):
    h, k, v = self.sizes
    if self._first:
      u, z = jnp.split(dot(x, params["up"]), 2, axis=-1)
      window, c = run(window, u)
      c, gate = jax.nn.silu(c), jax.nn.silu(z)
      qkv = [_blocks(a, w) for a, w in zip((c, c, u), params["qkv"])]
      source = jnp.concatenate(qkv, axis=-1)
      skip = c * params["skip"].astype(c.dtype)
    else:
      qkv = jnp.split(dot(x, params["qkv"]), [h * k, 2 * h * k], axis=-1)
      gate, source, skip = jax.nn.sigmoid(dot(x, params["z"])), x, None
    gates = dot(source, params["gates"]).astype(jnp.float32)
    gates = gates + params["gates_bias"].astype(jnp.float32)
    if not self._first:
      gates = self.soft_cap * jnp.tanh(gates / self.soft_cap)
    i, f = jnp.split(gates, 2, axis=-1)
    q, key, value = (a.reshape(a.shape[:-1] + (h, -1)) for a in qkv)
    gates = dict(log_input=i, log_decay=FORGET[self.forget_gate](f))
    return window, (q, key * k**-0.5, value), gates, (gate, skip)

  def _read_out(self, params, h, gate, skip):
    h = norm.layer_norm(h, eps=1e-5 if self._first else 1e-6)
    y = h.reshape(gate.shape) * params["norm"].astype(h.dtype)
    return dot((y if skip is None else y + skip) * gate, params["out"])


def _blocks(x, w):
  """x [..., E] through the blocks w [E / b, b, b] of a block-diagonal map."""
  parts = x.reshape(x.shape[:-1] + (w.shape[0], 1, w.shape[1]))
  w = w.astype(x.dtype)
  y = jnp.matmul(parts, w, preferred_element_type=jnp.float32)
  return y.astype(x.dtype).reshape(x.shape)
