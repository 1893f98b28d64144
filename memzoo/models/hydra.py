"""Hydra: state spaces, attention, experts by the chunk, and two memories.

Every block holds a state space; some have attention to a window beside it, some
a mixture of experts, all of them on the same input:

  x ← LN(x + g_1 LN(SSM(x)) + g_2 Attn(LN(x)) + g_3 MoE(LN(x)))
  SSM:  δ, B, C, U = W x ;  α = exp(−softplus(δ) softplus(λ))
        y_t = C_t ⊙ s_{t−1} + W_s x_t ,  s_t = α_t ⊙ s_{t−1} + B_t ⊙ U_t
  MoE:  of a chunk of tokens, I = the k largest of W_r mean(x) ,
        y_t = Σ_{e ∈ I} softmax_I(W_r mean(x))_e SwiGLU_e(x_t)

After every block come two memories, the same ones each time. The workspace is
slots M [S, D], into which a segment of tokens writes what it is on the whole,
z = mean_t x_t, where the slots hold least, and from which all of it reads:

  r, w = softmax(W_c z)
  M_i ← 0.9 M_i + 0.1 w z ,  i = argmin ‖M_i‖
  x_t ← x_t + r W_o Σ_i softmax_i(W_q LN(z)·W_k LN(M_i) / √R) W_v LN(M_i)

The factual memory is a table of n² values behind product keys, read by each
token at the k² pairs of its k best half keys:

  x_t ← x_t + σ(w_g·x_t + b) W_v Σ_{i, j} softmax(q_1·c_i + q_2·c'_j) v_ij

The unit is the segment: its tokens see the mean of their chunk and, through the
workspace, of their segment, later tokens among them; segments see no later
ones. The slots, which start from learned ones, the state spaces and the windows
go on from segment to segment.

Differs: of the paper its abstract alone was to be had; every rule is that of
the authors' prototype, whose README calls the memories toys. There a call is
one segment and its batch shares the slots, which are parameters that every call
changes for good, one slot for each row; here each row has its own, from the
learned start, to which their gradient goes: what is written has none, as there.
Their state space is the slow, exact one; the gated convolution that stands for
it in their timings is no state space and is left out, as is the loss that
balances experts. The last chunk's mean counts tokens that are there alone.
Nothing of the 1.6 billion parameters or of the staged curriculum is here.

Paper: Chaudhary, Browning 2025, "Hydra: A 1.6B-Parameter State-Space Language
  Model with Sparse Attention, Mixture-of-Experts, and Memory",
  arXiv:2508.15099; code github.com/sidcraftscode/hydra (toy_hydra,
  workspace_memory, pkm_memory).
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.cells.kv.window import Window
from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.models import layers
from memzoo.models.block import Norm
from memzoo.models.encoder import check_size
from memzoo.ops.conv import conv
from memzoo.ops.linear_recurrence import linear_recurrence
from memzoo.ops.product_key import read


@dataclasses.dataclass(frozen=True)
class HydraSSM(cell.Cell):
  """The state space; params: in [D, 4 D], decay [D] (λ), skip [D, D]."""

  d_model: int

  op: ClassVar[str] = "linear_recurrence"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "assoc", "chunk")

  def init(self, key) -> dict[str, Any]:
    d, (k_in, k_skip) = self.d_model, jax.random.split(key)
    return {
      "in": initializers.lecun_normal(k_in, (d, 4 * d)),
      "decay": jnp.ones((d,)),
      "skip": initializers.lecun_normal(k_skip, (d, d)),
    }

  def initial_state(self, params, key=None):
    return jnp.zeros((self.d_model,), jnp.float32)

  def step(self, params, state, x):
    decay, write, c = self._project(params, x)
    return decay * state + write, self._read_out(params, state, c, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    decay, write, c = self._project(params, xs)
    flags = dict(reset=reset, mask=mask)
    end, states = linear_recurrence(
      state, write, decay=decay, implementation=implementation, **flags
    )
    # Read before the write: the states of one token earlier.
    earlier = jnp.array([[1.0], [0.0]]) * jnp.ones(self.d_model)
    _, states = conv(state[None], states, earlier, **flags)
    return end, self._read_out(params, states, c, xs)

  def _project(self, params, x):
    """α, B ⊙ U and C, float32 [..., D]."""
    x = dot(x, params["in"]).astype(jnp.float32)
    delta, b, c, u = jnp.split(x, 4, axis=-1)
    rate = jax.nn.softplus(params["decay"].astype(jnp.float32))
    return jnp.exp(-jax.nn.softplus(delta) * rate), b * u, c

  def _read_out(self, params, state, c, x):
    return (c * state).astype(x.dtype) + dot(x, params["skip"])


def _draw(rngs, *shape, fan_in: int | None = None):
  return nnx.Param(initializers.lecun_normal(rngs.params(), shape, fan_in))


class ChunkExperts(nnx.Module):
  """A few of E gated MLPs for each chunk of tokens.

  Args:
    width: D.
    experts: E.
    hidden: of an expert.
    knn: k.
    chunk: tokens of a chunk.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, width, experts, hidden, knn, chunk, *, rngs: nnx.Rngs):
    self.knn, self.chunk = knn, chunk
    self.route = _draw(rngs, width, experts)
    self.up = _draw(rngs, experts, width, 2 * hidden, fan_in=width)
    self.down = _draw(rngs, experts, hidden, width, fan_in=hidden)

  def __call__(self, x, there):
    """x [B, L, D] of a segment, there bool [B, L]."""
    rows, length, width = x.shape
    shape = rows, length // self.chunk, self.chunk
    mean = _mean(x.reshape(*shape, width), there.reshape(shape))
    best, index = jax.lax.top_k(dot(mean, self.route[...]), self.knn)
    share = jax.nn.one_hot(index, self.route.shape[1])
    share = jnp.einsum("bnk,bnke->bne", jax.nn.softmax(best, axis=-1), share)
    share = jnp.repeat(share, self.chunk, axis=1)
    # All experts: there are few, and a chunk's tokens go to the same ones.
    gate, up = jnp.split(
      jnp.einsum("bld,edh->bleh", x, self.up[...]), 2, axis=-1
    )
    hidden = jax.nn.silu(gate) * up * share[..., None]
    return jnp.einsum("bleh,ehd->bld", hidden, self.down[...])


class Workspace(nnx.Module):
  """Slots that segments write into and read.

  Args:
    width: D.
    slots: S.
    rank: R of the maps.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, width: int, slots: int, rank: int, *, rngs: nnx.Rngs):
    self.start = nnx.Param(
      0.01 * jax.random.normal(rngs.params(), (slots, width))
    )
    self.control, self.norm = _draw(rngs, width, 2), Norm(width, "layer")
    self.q, self.k = _draw(rngs, width, rank), _draw(rngs, width, rank)
    self.v, self.out = _draw(rngs, width, rank), _draw(rngs, rank, width)

  def __call__(self, slots, x, there):
    """(slots [B, S, D], x [B, L, D]) after a segment x."""
    z = _mean(x, there)
    gate = jax.nn.softmax(dot(z, self.control[...]), axis=-1)
    least = jnp.argmin(jnp.sum(jnp.square(slots), axis=-1), axis=-1)
    here = jax.nn.one_hot(least, slots.shape[1])[..., None]
    here *= jnp.any(there, axis=1)[:, None, None].astype(here.dtype)
    new = gate[:, None, 1:] * z[:, None] - slots
    slots = slots + jax.lax.stop_gradient(0.1 * here * new)
    q, m = dot(self.norm(z), self.q[...]), self.norm(slots)
    k, v = dot(m, self.k[...]), dot(m, self.v[...])
    score = jnp.einsum("br,bsr->bs", q, k) * q.shape[-1] ** -0.5
    out = jnp.einsum("bs,bsr->br", jax.nn.softmax(score, axis=-1), v)
    return slots, x + (gate[:, :1] * dot(out, self.out[...]))[:, None]


class Facts(nnx.Module):
  """A table of n² values that each token reads.

  Args:
    width: D.
    num_keys: n.
    key_dim: of a half key.
    value_dim: of the values.
    knn: k half keys of each kind, and so k² values.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, width, num_keys, key_dim, value_dim, knn, *, rngs):
    self.knn = knn
    normal = lambda scale, *shape: nnx.Param(
      scale * jax.random.normal(rngs.params(), shape)
    )
    self.keys = normal(0.02, 2, num_keys, key_dim)
    self.values = normal(0.01, num_keys**2, value_dim)
    self.query = _draw(rngs, width, 2 * key_dim)
    self.out, self.gate = _draw(rngs, value_dim, width), _draw(rngs, width, 1)
    self.gate_bias = nnx.Param(jnp.zeros((1,)))

  def __call__(self, x):
    halves = jnp.split(dot(x, self.query[...]), 2, axis=-1)
    (s1, i1), (s2, i2) = (
      jax.lax.top_k(dot(q, keys.T), self.knn)
      for q, keys in zip(halves, self.keys[...])
    )
    flat = lambda y: y.reshape(*x.shape[:-1], self.knn**2)
    scores = flat(s1[..., None] + s2[..., None, :])
    index = flat(i1[..., None] * self.keys.shape[1] + i2[..., None, :])
    found = read(self.values[...], jax.nn.softmax(scores, axis=-1), index)
    gate = jax.nn.sigmoid(dot(x, self.gate[...]) + self.gate_bias[...])
    return x + gate * dot(found, self.out[...])


class Block(nnx.Module):
  """One block; `attention` is its cell or None, `experts` its module or None.

  Args:
    width: D.
    attention: a cell or None.
    experts: as of `ChunkExperts` between its width and rngs, or None.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, width, attention, experts, *, rngs: nnx.Rngs):
    self.ssm = layers.MemoryLayer(HydraSSM(width), rngs=rngs)
    self.ssm_norm, self.norm = Norm(width, "layer"), Norm(width, "layer")
    self.ssm_scale = nnx.Param(jnp.ones(()))
    scale = lambda value: nnx.Param(jnp.full((), value))
    if attention is None:
      self.attention = None
    else:
      self.attention = layers.MemoryLayer(attention, rngs=rngs)
      self.attention_norm = Norm(width, "layer")
      self.attention_scale = scale(0.15)
    if experts is None:
      self.experts = None
    else:
      self.experts = ChunkExperts(width, *experts, rngs=rngs)
      self.experts_norm = Norm(width, "layer")
      self.experts_scale = scale(0.5)

  def initial_state(self, batch: int):
    near = self.attention
    return (
      self.ssm.initial_state(batch),
      () if near is None else near.initial_state(batch),
    )

  def __call__(self, state, x, there, form):
    given = dict(mask=there, implementation=form)
    ssm, y = self.ssm(state[0], x, **given)
    out, near = x + self.ssm_scale[...] * self.ssm_norm(y), ()
    if self.attention is not None:
      near, y = self.attention(state[1], self.attention_norm(x), **given)
      out += self.attention_scale[...] * y
    if self.experts is not None:
      y = self.experts(self.experts_norm(x), there)
      out += self.experts_scale[...] * y
    return (ssm, near), self.norm(out)


class State(NamedTuple):
  """What the model holds between two segments, of every row. Float32."""

  blocks: Any  # per block, of the state space [B, D] and of its window
  slots: Any  # [B, S, D]


class Hydra(nnx.Module):
  """Tokens to logits, by the segment.

  >>> model = Hydra(256, d_model=64, segment=32, chunk=16, rngs=nnx.Rngs(0))
  >>> state, logits = model(None, tokens)  # int [B, 96] -> float32 [B, 96, V]

  Args:
    vocab_size: V.
    d_model: D.
    depth: blocks.
    segment: L, tokens of a segment, a multiple of `chunk`.
    chunk: tokens of a chunk.
    attention_every: the last of so many blocks has attention.
    window: tokens that attention reads, the present one among them.
    num_heads: of attention.
    num_experts: E, in every second block, from the first on.
    expert_width: hidden width of an expert.
    knn_experts: k of the experts.
    slots: S of the workspace.
    rank: R of its maps.
    num_keys: n of the factual memory.
    key_dim: of a half key.
    value_dim: of its values.
    knn: k of its half keys.
    rngs: its `params` stream draws the parameters.

  Raises:
    ValueError: on an option out of range.
  """

  def __init__(
    self, vocab_size: int, *, d_model: int = 256, depth: int = 8,
    segment: int = 256, chunk: int = 32, attention_every: int = 4,
    window: int = 257, num_heads: int = 4, num_experts: int = 4,
    expert_width: int = 256, knn_experts: int = 2, slots: int = 64,
    rank: int = 128, num_keys: int = 64, key_dim: int = 64,
    value_dim: int = 128, knn: int = 4, rngs: nnx.Rngs,
  ):  # fmt: skip
    given = dict(locals())
    for name, value in given.items():
      if name not in ("self", "rngs"):
        check_size(name, value)
    if segment % chunk:
      raise ValueError(f"Hydra: chunk={chunk} must divide segment={segment}")
    if knn_experts > num_experts or knn > num_keys:
      raise ValueError(
        "Hydra: needs knn_experts <= num_experts and knn <= num_keys, got "
        f"{knn_experts}, {num_experts}, {knn}, {num_keys}"
      )
    self.segment, self.vocab_size = segment, vocab_size
    near = Window(d_model, num_heads, capacity=window, rotary=False)
    experts = num_experts, expert_width, knn_experts, chunk
    self.embedding = nnx.Param(
      0.02 * jax.random.normal(rngs.params(), (vocab_size, d_model))
    )
    self.blocks = nnx.List(
      Block(
        d_model,
        None if (i + 1) % attention_every else near,
        None if i % 2 else experts,
        rngs=rngs,
      )
      for i in range(depth)
    )
    self.workspace = Workspace(d_model, slots, rank, rngs=rngs)
    self.facts = Facts(d_model, num_keys, key_dim, value_dim, knn, rngs=rngs)
    self.norm = Norm(d_model, "layer")

  def initial_state(self, batch: int) -> State:
    """The memory of `batch` rows before their first segment."""
    start = self.workspace.start[...]
    return State(
      tuple(block.initial_state(check_size("batch", batch)) for block in
            self.blocks),
      jnp.broadcast_to(start, (batch, *start.shape)),
    )  # fmt: skip

  def __call__(
    self, state, inputs, *, reset=None, mask=None, implementation=None
  ):
    """(state, logits float32 [B, S L, V]), zero where there is no token.

    Args:
      state: as `initial_state` makes it, or None for that.
      inputs: int [B, S L], whole segments; mask fills what is short.
      reset: bool [B, S] or None. True: fresh before this segment, if there is
        a token in it.
      mask: bool [B, S L] or None. False: no token here.
      implementation: 'scan', 'chunk' or None, of state spaces and attention.

    Raises:
      ValueError: on arguments of wrong shape or dtype.
    """
    shape, kind = jnp.shape(inputs), jnp.result_type(inputs)
    tokens = len(shape) == 2 and jnp.issubdtype(kind, jnp.integer)
    if not tokens or not shape[1] or shape[1] % self.segment:
      raise ValueError(
        f"Hydra: inputs must be int [B, S · {self.segment}], whole segments, "
        f"got {kind} {shape}"
      )
    count = shape[1] // self.segment
    layers.check_flags("Hydra", shape, None, mask)
    layers.check_flags("Hydra", (shape[0], count), reset, None)
    there = jnp.ones(shape, bool) if mask is None else mask
    start = self.initial_state(shape[0])
    state = start if state is None else state
    fresh = jnp.zeros((shape[0], count), bool) if reset is None else reset
    cut = lambda x: jnp.swapaxes(x.reshape(shape[0], count, self.segment), 0, 1)

    def step(state, segment):
      tokens, there, fresh = segment
      fresh &= jnp.any(there, axis=1)
      wide = lambda x: fresh.reshape((-1,) + (1,) * (x.ndim - 1))
      state = jax.tree.map(lambda s, f: jnp.where(wide(s), f, s), state, start)
      return self._segment(state, tokens, there, implementation)

    state, logits = jax.lax.scan(
      step, state, (cut(jnp.where(there, inputs, 0)), cut(there), fresh.T)
    )
    return state, jnp.swapaxes(logits, 0, 1).reshape(*shape, self.vocab_size)

  def _segment(self, state: State, tokens, there, form):
    table = self.embedding[...]
    x, blocks, slots = jnp.take(table, tokens, axis=0), [], state.slots
    for block, old in zip(self.blocks, state.blocks):
      new, x = block(old, x, there, form)
      blocks.append(new)
      slots, x = self.workspace(slots, x, there)
      x = self.facts(x)
    logits = jnp.where(there[..., None], dot(self.norm(x), table.T), 0)
    return State(tuple(blocks), slots), logits


def _mean(x, there):
  """Of x [..., L, D] over what is there, bool [..., L]: [..., D]."""
  count = jnp.maximum(jnp.sum(there, axis=-1, keepdims=True), 1)
  x = jnp.where(there[..., None], x, 0)
  return jnp.sum(x, axis=-2) / count.astype(x.dtype)
