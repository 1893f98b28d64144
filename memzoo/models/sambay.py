"""SambaY: a Samba that is read by a second decoder, through one cache.

The lower half of the layers is the self-decoder: Samba (`models/samba.py`). Its
last two layers leave what the upper half, the cross-decoder, reads:

  a Mamba, whose read-out before its gate is the memory m_t of token t,
    m = h C + D ⊙ x  [E] ;
  one layer of full attention, whose keys and values are kept once.

The cross-decoder alternates gated memory units with attention to those keys
and values, which has queries alone:

  GMU(x, m) = (m ⊙ silu(x W_1)) W_2
  CrossAttn(x) = W_O softmax(x W_Q · Kᵀ / √K) V

Every layer is followed by an MLP, with RMS norms before and skips around both.
There are no positions: Mamba orders the text. Between two tokens the
cross-decoder holds nothing of its own, and a gated memory unit reads E numbers
where attention reads the whole cache. A prompt goes through the self-decoder
alone: `next_logits` runs full attention, and what is above it, for the last
token only, in time that is linear in the prompt.

With L = depth layers of a mixer and an MLP, a multiple of four:

  0 … L/2 − 1        Mamba, sliding window, over and over
  L/2, L/2 + 1       Mamba (m), full attention (K, V)
  L/2 + 2 … L − 1    GMU, cross-attention, over and over

Differs: differential attention, of the authors' largest model, is left out.
Maps start as the cells do, not by μP++. The cache holds `capacity` tokens and
no more. Embeddings are tied unless asked otherwise.

Paper: Ren, Chen, Xu, Kim, Atkinson, Zhan, Sun, Peng, Liu, Wang, Cheng, Gao,
  Chen, Shen 2025, "Decoder-Hybrid-Decoder Architecture for Efficient Reasoning
  with Long Generation", arXiv:2507.06607, section 2 (the unit y = (m ⊙ σ(W_1
  x)) W_2, σ = SiLU) and figure 1; order of layers as in the authors' code
  (github.com/microsoft/ArchScale). Sun et al. 2024, "You Only Cache Once",
  arXiv:2405.05254 (the shared cache).
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.cells.kv.window import Window
from memzoo.cells.ssm.mamba import Mamba
from memzoo.core import initializers
from memzoo.core.linear import dot
from memzoo.models.block import MLP, Block, BlockOptions, Norm, dropout
from memzoo.models.encoder import State as EncoderState
from memzoo.models.lm import LanguageModel
from memzoo.models.pooling import last
from memzoo.models.stack import Stack
from memzoo.ops.attention import (
  State as Ring,
  attention,
  empty,
  positions,
  read,
)

# One position and one count serve all heads.
_RING = Ring(k=0, v=0, position=None, count=None)


@dataclasses.dataclass(frozen=True)
class MemoryMamba(Mamba):
  """`Mamba` that reports its read-out before the gate: m [E] of every token."""

  reports: ClassVar[tuple[str, ...]] = ("memory",)

  def step(self, params, state, x):
    return self.observe(params, state, x)[:2]

  def observe(self, params, state, x):
    state, (y, m) = super().step(params, state, x)
    return state, y, {"memory": m}

  def parallel(self, params, state, xs, reset, mask, implementation):
    state, (ys, m) = super().parallel(
      params, state, xs, reset, mask, implementation
    )
    return state, ys, {"memory": m}

  def _output(self, params, y, x, z):
    m = y + params["d"].astype(x.dtype) * x
    return super()._output(params, y, x, z), m


class Cache(NamedTuple):
  """What attention of the cross-decoder reads: every layer the same."""

  before: Ring  # at the start of the call, [B, G, S, K]
  after: Ring  # at its end
  k: jax.Array  # [B, T, G, K], of the call
  v: jax.Array
  reset: jax.Array | None  # bool [B, T]
  mask: jax.Array | None


class GatedMemoryUnit(nnx.Module):
  """(m ⊙ silu(x W_1)) W_2: x [..., D] and m [..., E] to [..., D].

  Args:
    width: D.
    memory: E.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, width: int, memory: int, *, rngs: nnx.Rngs):
    draw = lambda *shape: nnx.Param(
      initializers.lecun_normal(rngs.params(), shape)
    )
    self.gate, self.out = draw(width, memory), draw(memory, width)

  def __call__(self, x, m):
    return dot(m * jax.nn.silu(dot(x, self.gate[...])), self.out[...])


class CrossAttention(nnx.Module):
  """Attention of own queries to keys and values that another layer made.

  Args:
    width: D.
    heads: H of the queries; D / H channels each.
    groups: G of keys and values.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, width: int, heads: int, groups: int, *, rngs: nnx.Rngs):
    self.heads, self.groups = heads, groups
    draw = lambda: nnx.Param(
      initializers.lecun_normal(rngs.params(), (width, width))
    )
    self.query, self.out = draw(), draw()

  def __call__(self, x, cache: Cache, form: str | None = None):
    """x [B, T, D]; T = 1 reads what the cache holds after the call."""
    q = dot(x, self.query[...])
    q = q.reshape(*x.shape[:2], self.groups, self.heads // self.groups, -1)

    def ahead(q, cache):  # one row: q [T, G, H / G, K]
      one = lambda ring, q, k, v: attention(
        ring, q, k, v, reset=cache.reset, mask=cache.mask, implementation=form
      )[1]
      shared = jax.vmap(one, (None, 1, None, None), 1)
      return jax.vmap(shared, (_RING, 1, 1, 1), 1)(
        cache.before, q, cache.k, cache.v
      )

    def at_end(q, cache):
      shared = jax.vmap(read, (None, 0))
      return jax.vmap(shared, (_RING, 0))(cache.after, q[0])[None]

    o = jax.vmap(at_end if x.shape[1] == 1 else ahead)(q, cache)
    return dot(o.reshape(x.shape), self.out[...])


class Layer(nnx.Module):
  """x ← x + mixer(norm(x)) ,  x ← x + MLP(norm(x)).

  Args:
    mixer: a module, called as mixer(x, *seen).
    width: D.
    options: of the norms and the MLP.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, mixer, width: int, options: BlockOptions, *, rngs):
    self.mixer, self.options = mixer, options
    self.mixer_norm = Norm(width, options.norm)
    self.mlp_norm = Norm(width, options.norm)
    hidden = 4 * width if options.mlp_width is None else options.mlp_width
    self.mlp = MLP(width, hidden, options.mlp, rngs=rngs)

  def __call__(self, x, *seen, key=None):
    keys = (None, None) if key is None else jax.random.split(key)
    rate = self.options.dropout
    x = x + dropout(self.mixer(self.mixer_norm(x), *seen), rate, keys[0])
    return x + dropout(self.mlp(self.mlp_norm(x)), rate, keys[1])


class State(NamedTuple):
  """What the layers hold between two tokens."""

  samba: Any  # of `Stack`: Mamba and the windows
  source: Any  # of the Mamba whose read-out is shared
  cache: Ring  # k, v [B, G, S, K], position [B, S], count [B]


class Decoders(nnx.Module):
  """Self-decoder and cross-decoder; takes the place of a `Stack`.

  Args:
    depth: L, a multiple of four, eight or more.
    mamba: the cell of the self-decoder.
    window: its sliding-window attention; the full and the cross-attention have
      as many heads.
    capacity: tokens that the cache holds.
    options: of every layer.
    cache_dtype: of keys and values in the cache.
    unroll: as in `Stack`.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(
    self, depth: int, mamba: Mamba, window: Window, capacity: int,
    options: BlockOptions, *, cache_dtype: str, unroll: int = 1, rngs,
  ):  # fmt: skip
    if type(depth) is not int or depth < 8 or depth % 4:
      raise ValueError(
        f"SambaY: depth must be a multiple of 4, 8 or more, got {depth!r}"
      )
    if type(capacity) is not int or capacity < 1:
      raise ValueError(
        f"SambaY: capacity must be a positive integer, got {capacity!r}"
      )
    if options.conv_size or not isinstance(options.mlp_width, int | None):
      raise ValueError("SambaY: its layers have one MLP and no convolution")
    if options.mlp_width == 0:
      raise ValueError("SambaY: mlp_width must be positive, got 0")
    width, heads, groups = mamba.d_model, window.num_heads, window.groups
    if heads * window.width != width:
      raise ValueError(f"SambaY: num_heads={heads} must divide d_model={width}")
    self.depth, self.max_length, self.cache_dtype = depth, capacity, cache_dtype
    self.options, self.groups, self.head_dim = options, groups, window.width
    self.cells = mamba, window
    fields = {f.name: getattr(mamba, f.name) for f in dataclasses.fields(mamba)}
    self.samba = Stack(
      (mamba, window), depth // 2, options, unroll=unroll, rngs=rngs
    )
    self.source = Block(MemoryMamba(**fields), options, rngs=rngs)
    shape = width, 2 * groups * self.head_dim
    self.keys_values = nnx.Param(
      initializers.lecun_normal(rngs.params(), shape)
    )
    own = lambda mixer, rngs: Layer(mixer, width, options, rngs=rngs)
    look = lambda rngs: own(
      CrossAttention(width, heads, groups, rngs=rngs), rngs
    )
    gate = lambda rngs: own(
      GatedMemoryUnit(width, mamba.d_inner, rngs=rngs), rngs
    )
    self.full = look(rngs)
    self.repeats = depth // 4 - 1
    draw = lambda make: jax.vmap(lambda key: make(nnx.Rngs(params=key)))(
      jax.random.split(rngs.params(), self.repeats)
    )
    self.cross = nnx.List([draw(gate), draw(look)])

  def initial_state(self, batch: int, key=None) -> State:
    """The memory of `batch` rows before their first token."""
    del key
    one = empty(
      self.max_length, self.head_dim, self.head_dim, jnp.dtype(self.cache_dtype)
    )
    k, v = (jnp.stack([x] * self.groups) for x in (one.k, one.v))
    ring = jax.tree.map(
      lambda x: jnp.broadcast_to(x, (batch, *x.shape)), one._replace(k=k, v=v)
    )
    return State(
      self.samba.initial_state(batch), self.source.initial_state(batch), ring
    )

  def __call__(
    self, state, x, *, reset=None, mask=None, key=None, implementation=None,
    reports=False,
  ):  # fmt: skip
    """As a `Stack`: (state, x [B, T, D]), and no reports."""
    state, x, m, cache = self.read_in(
      state, x, reset, mask, key, implementation
    )
    form = implementation
    if not isinstance(form, str):
      form = (form or {}).get("window")
    form = "scan" if form == "step" else form
    x = self.read_out(x, m, cache, key, form)
    return (state, x, {}) if reports else (state, x)

  def read_in(self, state, x, reset, mask, key=None, implementation=None):
    """The self-decoder up to what the cross-decoder reads.

    Returns:
      (state, x [B, T, D], m [B, T, E], cache).
    """
    given = dict(reset=reset, mask=mask, implementation=implementation)
    keys = (None, None)
    if key is not None:
      keys = [jax.random.fold_in(key, i) for i in range(2)]
    samba, x = self.samba(state.samba, x, key=keys[0], **given)
    given["implementation"] = self.samba._forms(implementation)[0]
    source, x, found = self.source(
      state.source, x, key=keys[1], reports=True, **given
    )
    kv = dot(self.full.mixer_norm(x), self.keys_values[...])
    kv = kv.reshape(*x.shape[:2], 2, self.groups, self.head_dim)
    k, v = kv[:, :, 0], kv[:, :, 1]
    after = jax.vmap(remember)(state.cache, k, v, reset, mask)
    cache = Cache(state.cache, after, k, v, reset, mask)
    return State(samba, source, after), x, found["memory"], cache

  def read_out(self, x, m, cache, key=None, form=None):
    """Full attention and the cross-decoder; T = 1 for the last token alone."""
    keys = [None] * (1 + self.repeats)
    if key is not None:
      keys = jax.random.split(jax.random.fold_in(key, 2), 1 + self.repeats)
    x = self.full(x, cache, form, key=keys[0])

    def body(x, repeat):
      (gate, look), key = repeat
      one = (None, None) if key is None else jax.random.split(key)
      x = gate(x, m, key=one[0])
      return look(x, cache, form, key=one[1]), None

    if self.options.remat:
      body = jax.checkpoint(body, prevent_cse=False)
    keys = None if key is None else keys[1:]
    return jax.lax.scan(body, x, (tuple(self.cross), keys))[0]

  def refresh(self, state, x, *, reset=None, mask=None) -> None:
    """These layers have no buffers."""


def remember(ring: Ring, k, v, reset=None, mask=None) -> Ring:
  """The ring after T tokens, k and v [T, G, K], in time linear in T: what
  `attention` leaves in it. What is beyond its capacity is not kept."""
  place = positions(ring.count, len(k), reset=reset, mask=mask)
  stays = jnp.ones(len(k), bool) if mask is None else mask
  if reset is not None:
    live = jnp.cumsum(reset.astype(jnp.int32))
    stays &= live == live[-1]
    start = jax.tree.map(jnp.zeros_like, ring)
    start = start._replace(position=jnp.full_like(ring.position, -1))
    ring = jax.tree.map(
      lambda new, old: jnp.where(live[-1] > 0, new, old), start, ring
    )
  capacity = ring.position.shape[0]
  slot = jnp.where(stays, place, capacity)
  put = lambda row, x: row.at[slot].set(x.astype(row.dtype), mode="drop")
  return Ring(
    k=jax.vmap(put, (0, 1))(ring.k, k),
    v=jax.vmap(put, (0, 1))(ring.v, v),
    position=put(ring.position, place),
    count=place[-1] + 1,
  )


class SambaY(LanguageModel):
  """A language model of a self-decoder and a cross-decoder.

  >>> model = SambaY(8, 256, d_model=64, num_heads=4, capacity=512,
  ...                rngs=nnx.Rngs(0))
  >>> state, logits = model(None, tokens)  # int [B, T] -> float32 [B, T, V]

  Calls are `SequenceModel`'s; they take `capacity` tokens since a reset.

  Args:
    depth: L, a multiple of four, eight or more.
    vocab_size: V.
    d_model: D.
    num_heads: of all attention.
    num_kv_heads: of its keys and values; None for as many.
    window: tokens that the self-decoder's attention reads.
    capacity: tokens that the cache holds.
    mamba: options of `Mamba`, as a dict, without d_model.
    mlp: as in `BlockOptions`.
    mlp_width: hidden width of the MLP; None for 4 D.
    dtype: of activations and of the cache.
    rngs: its `params` stream draws the parameters.
    **options: of `LanguageModel`.

  Raises:
    ValueError: on an option out of range.
    TypeError: on an unknown option.
  """

  kind: ClassVar[str] = "sambay"

  def __init__(
    self, depth: int, vocab_size: int, *, d_model: int, num_heads: int = 1,
    num_kv_heads: int | None = None, window: int = 128, capacity: int = 4096,
    mamba: dict[str, Any] | None = None, mlp: str = "swiglu",
    mlp_width: int | None = None, dtype: str = "float32", rngs: nnx.Rngs,
    **options,
  ):  # fmt: skip
    near = Window(
      d_model, num_heads, capacity=window, num_kv_heads=num_kv_heads,
      rotary=False,
    )  # fmt: skip
    far = Mamba(d_model, **(mamba or {}))
    make = functools.partial(
      Decoders, depth, far, near, capacity, cache_dtype=jnp.dtype(dtype).name
    )
    super().__init__(
      make, None, vocab_size, mlp=mlp, dtype=dtype, rngs=rngs,
      mlp_width=4 * d_model if mlp_width is None else mlp_width, **options,
    )  # fmt: skip

  def next_logits(
    self, state, inputs, *, reset=None, mask=None, implementation=None
  ):
    """(state, logits float32 [B, V]) after each row's last token: the prompt
    is read by the self-decoder alone, the rest is done for one token."""
    encoder = self.encoder
    state, x, reset = encoder._enter(state, inputs, reset, mask)
    held, x, m, cache = encoder.stack.read_in(
      state.layers, x, reset, mask, implementation=implementation
    )
    x, m = last(x, mask)[:, None], last(m, mask)[:, None]
    x = encoder.norm(encoder.stack.read_out(x, m, cache))[:, 0]
    if mask is not None:
      x = jnp.where(jnp.any(mask, axis=1, keepdims=True), x, 0)
    return EncoderState(state.position, held), self._logits(x)

  def config(self) -> dict[str, Any]:
    """The constructor's arguments as plain data, without `rngs`."""
    encoder, stack = self.encoder, self.encoder.stack
    mamba, near = map(dataclasses.asdict, stack.cells)
    return {
      "depth": stack.depth,
      "vocab_size": self.vocab_size,
      "d_model": mamba.pop("d_model"),
      "num_heads": near["num_heads"],
      "num_kv_heads": near["num_kv_heads"],
      "window": near["capacity"],
      "capacity": stack.max_length,
      "mamba": mamba,
      "positions": encoder.positions,
      "dtype": encoder.dtype,
      "unroll": stack.samba.unroll,
      "tie_embeddings": self.tie_embeddings,
      **dataclasses.asdict(stack.options),
    }
