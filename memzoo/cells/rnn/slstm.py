"""sLSTM, the scalar memory of xLSTM."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell
from memzoo.core.initializers import uniform
from memzoo.core.linear import dot_blocks
from memzoo.core.registry import register
from memzoo.kernels.cell_scan import cell_scan, product
from memzoo.ops import arguments, norm
from memzoo.ops.conv import conv, step as conv_step

FORGET = {"sigmoid": jax.nn.log_sigmoid, "exp": lambda f: f}  # log f of f̃


class Memory(NamedTuple):
  h: jax.Array  # [D] float32, the hidden state
  c: jax.Array  # [D] float32, the cells, times exp(−m)
  n: jax.Array  # [D] float32, the normaliser, times exp(−m)
  m: jax.Array  # [D] float32, the stabiliser


class State(NamedTuple):
  memory: Memory
  conv: jax.Array  # [W − 1, D] float32, no rows where there is no conv


class Gates(NamedTuple):
  i: jax.Array  # [D], or [T, D] with the flags of every step
  f: jax.Array
  z: jax.Array
  o: jax.Array
  reset: jax.Array | None = None
  mask: jax.Array | None = None


@register(
  "slstm",
  family="rnn",
  year=2024,
  paper="Beck et al. 2024, arXiv:2405.04517",
  write="exponential gate, decay, add",
  evidence="gold",
  parity="xlstm 2.0, sLSTMLayer",
  tiny=dict(d_model=6, num_heads=2, conv_size=3),
)
@dataclasses.dataclass(frozen=True)
class SLSTM(cell.Cell):
  """sLSTM: LSTM cells with exponential gates, and a normaliser beside them.

    c_t = f_t c_{t−1} + i_t z_t ,  n_t = f_t n_{t−1} + i_t          (8, 9)
    h_t = o_t c_t / n_t                                             (10)
    z_t = tanh(z̃_t) ,  o_t = σ(õ_t)                                 (11, 14)
    i_t = exp(ĩ_t) ,  f_t = σ(f̃_t) or exp(f̃_t)                      (12, 13)
    m_t = max(log f_t + m_{t−1}, ĩ_t)                               (15)
    i'_t = exp(ĩ_t − m_t) ,  f'_t = exp(log f_t + m_{t−1} − m_t)    (16, 17)

  with each of ĩ, f̃, z̃, õ = W x_t + R h_{t−1} + b, W and R block-diagonal, in
  `num_heads` heads that do not mix. What is kept is c exp(−m) and n exp(−m).
  Around it the layer of the paper's sLSTM block: ĩ and f̃ see
  silu(conv(x)) for x, where conv_size > 0, and y = norm ⊙ LN(h), each head
  by itself.

  State: memory h, c, n, m [D] and conv [W − 1, D], float32, from zero.
  Params: w, u [D, 4N] of N = D / H (rows: the units, head after head; columns:
    i, f, z, o of the row's own head), b [4D], norm [D]; where conv_size > 0
    conv [W, D], conv_bias [D]. u (R) and b start at zero, b_f from 5 down to
    −7 over the units of a head.
  Forms: step O(DN) a token; scan hoists the conv and W x, the same order of
    work; pallas keeps the R of one head on chip, in x's dtype, heads side by
    side.
  Differs: an entry with n = 0 is a fresh one, m_t = ĩ_t there, as in the
    authors' code (NX-AI/xlstm), whose starts these are for a network of one
    block; else a first ĩ far below log f leaves 0 / 0. The gated MLP of the
    block is the model's.
  Paper: Beck, Pöppel, Spanring, Auer, Prudnikova, Kopp, Klambauer,
    Brandstetter, Hochreiter 2024, "xLSTM: Extended Long Short-Term Memory",
    arXiv:2405.04517, eq. 8-17, section 2.2 and appendix A.4.
  """

  d_model: int
  num_heads: int = 4
  forget_gate: str = "sigmoid"
  conv_size: int = 4

  implementations: ClassVar[tuple[str, ...]] = ("scan", "pallas")

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_heads")
    arguments.check_divides(self, "num_heads", "d_model")
    if self.conv_size:
      arguments.check_positive(self, "conv_size")
    if self.forget_gate not in FORGET:
      raise ValueError(
        f"SLSTM: forget_gate must be one of {tuple(FORGET)}, got "
        f"{self.forget_gate!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, heads, taps = self.d_model, self.num_heads, self.conv_size
    n, (key_w, key_c, key_b) = d // heads, jax.random.split(key, 3)
    place = jnp.arange(n, dtype=jnp.float32) / max(n - 1, 1)
    zeros, forget = jnp.zeros((d,)), jnp.tile(5 - 12 * place**0.3, heads)
    params = {
      "w": (2 / (5 * d)) ** 0.5 * jax.random.normal(key_w, (d, 4 * n)),
      "u": jnp.zeros((d, 4 * n)),
      "b": jnp.concatenate([zeros, forget, zeros, zeros]),
      "norm": jnp.ones((d,)),
    }
    if taps:
      params["conv"] = uniform(key_c, (taps, d), taps**-0.5)
      params["conv_bias"] = uniform(key_b, (d,), taps**-0.5)
    return params

  def initial_state(self, params, key=None) -> State:
    zeros = jnp.zeros((self.d_model,), jnp.float32)
    rows = max(self.conv_size - 1, 0)
    taps = jnp.zeros((rows, self.d_model), jnp.float32)
    return State(Memory(zeros, zeros, zeros, zeros), taps)

  def step(self, params, state, x):
    run = lambda w, x: conv_step(w, x, params["conv"], params["conv_bias"])
    window, gates = self._project(params, state.conv, x, run)
    memory, h = self._recur(params, state.memory, gates)
    return State(memory, window), self._read_out(params, h, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    flags = dict(reset=reset, mask=mask)
    run = lambda w, x: conv(w, x, params["conv"], params["conv_bias"], **flags)
    window, gates = self._project(params, state.conv, xs, run)
    if implementation == "pallas":
      u = params["u"].astype(xs.dtype)
      memory, hs = self._fused(u, state.memory, gates, flags)
    else:
      step = lambda memory, x: self._recur(params, memory, x)
      inputs = gates._replace(**flags)
      memory, hs = arguments.scan_steps(step, state.memory, inputs, None)
    return State(memory, window), self._read_out(params, hs, xs)

  def _project(self, params, window, x, run):
    """The conv's new state, and W x + b by gate, float32 [..., D]."""
    seen = x
    if self.conv_size:
      window, seen = run(window, x)
      seen = jax.nn.silu(seen)
    first, second = jnp.split(params["w"].astype(x.dtype), 2, axis=1)
    wx = dot_blocks(seen, first, 2), dot_blocks(x, second, 2)
    wx = jnp.concatenate(wx, axis=-1) + params["b"].astype(jnp.float32)
    return window, Gates(*jnp.split(wx, 4, axis=-1))

  def _recur(self, params, memory, x: Gates):
    ru = jnp.split(dot_blocks(memory.h, params["u"].astype(jnp.float32), 4), 4)
    return _update(FORGET[self.forget_gate], memory, x, ru)

  def _fused(self, u, memory, gates, flags):
    """One kernel over all heads, which are mapped. Behind the last unit n and
    m are not zero, but no other unit sees them: h is."""
    cut = lambda x: x.reshape(*x.shape[:-1], self.num_heads, -1)
    run = lambda memory, x, u: cell_scan(
      _STEPS[self.forget_gate], memory, x, u, inert=True, **flags
    )
    u = u.reshape(self.num_heads, -1, u.shape[1])
    memory, hs = jax.vmap(run, (0, 1, 0), (0, 1))(
      *jax.tree.map(cut, (memory, gates)), tuple(jnp.split(u, 4, axis=2))
    )
    return jax.tree.map(jnp.ravel, memory), hs.reshape(-1, self.d_model)

  def _read_out(self, params, h, x):
    heads = h.reshape(*h.shape[:-1], self.num_heads, -1)
    y = norm.layer_norm(heads).reshape(h.shape)
    return (y * params["norm"].astype(jnp.float32)).astype(x.dtype)


def _update(log_forget, memory, x: Gates, ru):
  """One step, on W x + b and R h by gate: (memory, h)."""
  i, f, z, o = (a + b for a, b in zip(x[:4], ru))
  decayed = log_forget(f) + memory.m
  m = jnp.where(memory.n == 0, i, jnp.maximum(decayed, i))
  # Above 0 in a fresh entry alone, where it meets zeros.
  i, f = jnp.exp(i - m), jnp.exp(jnp.minimum(decayed - m, 0.0))
  c, n = f * memory.c + i * jnp.tanh(z), f * memory.n + i
  h = jax.nn.sigmoid(o) * c / n
  return Memory(h, c, n, m), h


def _fused_step(log_forget):
  """One head's step, each gate with a weight of its own [N, N]."""

  def step(memory, x: Gates, u):
    h = memory.h.astype(u[0].dtype)
    return _update(log_forget, memory, x, [product(h, w) for w in u])

  return step


_STEPS = {name: _fused_step(log_forget) for name, log_forget in FORGET.items()}
