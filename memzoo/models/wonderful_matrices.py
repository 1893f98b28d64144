"""Wonderful Matrices (Cheems): state spaces and masked attention, one rotation.

Most layers hold a state space (SSD, that of Mamba-2), every eighth dynamic mask
attention; both turn by the token's position p, C and B as queries and keys:

  SSD:  C, B, x, Δ = W_C u, W_B u, W_x u, softplus(W_Δ u) ;  C, B rotated by p
        h_t = exp(Δ_t A) h_{t−1} + B_t (Δ_t x_t)ᵀ ,  y_t = h_tᵀ C_t + D x_t
  DMA:  q, k, v = W_q u, W_k u, W_v u ;  q, k rotated by p
        m_j = exp(A softplus(W_Δ v_j))     a head's weight of token j
        o_t = Σ_j softmax_j(k_j·q_t / √K + m_j) v_j ,  j among the `keep`
              largest m of the tokens up to t

and every layer a cross-domain mixture of experts (CDMoE): a gated MLP that all
tokens share, and k of n² experts of one hidden unit each, found by product
keys (`memzoo.ops.product_key`), in each of its heads:

  FFN(x) = W_d(silu(W_g x) ⊙ W_u x) + Σ_heads Σ_{i ∈ I} w_i silu(x·d_i) u_i
  I = the k largest of q(x)·key_i ,  w = softmax over I
  x ← r ⊙ x + mixer(norm(x)) ,  x ← r' ⊙ x + FFN(norm(x))

with learned r, r' and one head size for both mixers, which is also the width of
C and B. What attention holds of the past is bounded by `keep`: a token that has
fallen out of the largest does not come back.

Differs: the state space decays, A = −exp(a) from −1 … −H, as in the authors'
module of it; their whole model hands A = 1 to the same kernel, which grows. D
is that module's. They choose the largest m among all tokens of a call, of
which a share stays (none is dropped by default); among those up to t, as here,
in their later code. Half keys start away from zero, where theirs all tie.
Attention has as many heads of keys as of queries, embeddings are tied, no
dynamic scaling of the rotation; nothing has a bias.

Paper: Shi, Wu 2024, "Wonderful Matrices: Combining for a More Efficient and
  Effective Foundation Model Architecture", arXiv:2412.11834; every rule as in
  the authors' code (github.com/LoserCheems/WonderfulMatrices: modeling_cheems,
  modules/ssd, modules/dmattn, modules/cdmoe), the choice of tokens as in Doge
  (huggingface/transformers). He 2024, "Mixture of A Million Experts",
  arXiv:2407.04153 (experts of one unit behind product keys).
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.models.block import Block, BlockOptions, BlockState, dropout
from memzoo.models.encoder import check_size
from memzoo.models.lm import LanguageModel
from memzoo.models.stack import Stack
from memzoo.ops import arguments, dynamic_mask_attention as dma
from memzoo.ops.attention import positions
from memzoo.ops.batched import heads
from memzoo.ops.linear_attention import linear_attention, step as attend_step
from memzoo.ops.product_key import read, top_k
from memzoo.ops.rotary import rotary


class _Mixer(cell.Cell):
  """Checks of the two mixers, and what they share."""

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_heads")
    arguments.check_divides(self, "num_heads", "d_model")
    if self.width % 2:
      raise ValueError(
        f"{type(self).__name__}: rotary positions need an even width per head, "
        f"got {self.width}"
      )

  @property
  def width(self) -> int:
    """K of every head."""
    return self.d_model // self.num_heads

  def _split(self, x):
    """[..., D] as [..., H, K]."""
    return x.reshape(*x.shape[:-1], self.num_heads, self.width)


class SpaceState(NamedTuple):
  h: jax.Array  # [H, K, K] float32
  count: jax.Array  # int32 [], tokens since the last reset


@dataclasses.dataclass(frozen=True)
class RotarySSD(_Mixer):
  """State space duality whose C and B turn with the position.

  Params: c, b, x [D, D], dt [D, H], a_log [H], d [H], out [D, D].
  """

  d_model: int
  num_heads: int = 1

  op: ClassVar[str] = "linear_attention"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")

  def init(self, key) -> dict[str, Any]:
    d, h = self.d_model, self.num_heads
    keys = jax.random.split(key, 5)
    draw = lambda n, width=d: initializers.lecun_normal(keys[n], (d, width))
    return {
      "c": draw(0),
      "b": draw(1),
      "x": draw(2),
      "dt": draw(3, h),
      "a_log": jnp.log(1 + jnp.arange(h, dtype=jnp.float32)),
      "d": jnp.ones((h,)),
      "out": draw(4),
    }

  def initial_state(self, params, key=None) -> SpaceState:
    shape = self.num_heads, self.width, self.width
    return SpaceState(jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.int32))

  def step(self, params, state, u):
    c, b, x, dx, log_decay = self._project(params, u, state.count)
    h, y = jax.vmap(attend_step)(state.h, c, b, dx, log_decay)
    return SpaceState(h, state.count + 1), self._read_out(params, y, x)

  def parallel(self, params, state, us, reset, mask, implementation):
    place = positions(state.count, len(us), reset=reset, mask=mask)
    c, b, x, dx, log_decay = self._project(params, us, place)
    h, y = heads(linear_attention)(
      state.h, c, b, dx, log_decay=log_decay, reset=reset, mask=mask,
      implementation=implementation,
    )  # fmt: skip
    return SpaceState(h, place[-1] + 1), self._read_out(params, y, x)

  def _project(self, params, u, place):
    """C, B, x, Δ x [..., H, K] and Δ A [..., H]."""
    c, b, x = (self._split(dot(u, params[n])) for n in "cbx")
    c, b = (rotary(y, place[..., None]) for y in (c, b))
    dt = jax.nn.softplus(dot(u, params["dt"]).astype(jnp.float32))
    dx = (x.astype(jnp.float32) * dt[..., None]).astype(x.dtype)
    return c, b, x, dx, -jnp.exp(params["a_log"].astype(jnp.float32)) * dt

  def _read_out(self, params, y, x):
    y = y + params["d"].astype(x.dtype)[:, None] * x
    return dot(y.reshape(*y.shape[:-2], self.d_model), params["out"])


class MaskState(NamedTuple):
  kept: dma.State  # k, v [H, S, K], weight [H, S]; S = keep
  count: jax.Array  # int32 [], tokens since the last reset


@dataclasses.dataclass(frozen=True)
class DynamicMaskAttention(_Mixer):
  """Attention to the tokens whose values weigh most.

  Params: qkv [D, 3 D], dt [D, H] (of v), a [H], out [D, D].
  """

  d_model: int
  num_heads: int = 1
  keep: int = 2048

  op: ClassVar[str] = "dynamic_mask_attention"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")

  def __post_init__(self):
    super().__post_init__()
    arguments.check_positive(self, "keep")

  def init(self, key) -> dict[str, Any]:
    d, h = self.d_model, self.num_heads
    keys = jax.random.split(key, 3)
    draw = lambda n, width: initializers.lecun_normal(keys[n], (d, width))
    return {
      "qkv": draw(0, 3 * d),
      "dt": draw(1, h),
      "a": jnp.ones((h,)),
      "out": draw(2, d),
    }

  def initial_state(self, params, key=None) -> MaskState:
    one = dma.empty(self.keep, self.width, self.width)
    kept = jax.tree.map(lambda x: jnp.stack([x] * self.num_heads), one)
    return MaskState(kept, jnp.zeros((), jnp.int32))

  def step(self, params, state, u):
    kept, o = jax.vmap(dma.step)(
      state.kept, *self._project(params, u, state.count)
    )
    return MaskState(kept, state.count + 1), dot(o.reshape(-1), params["out"])

  def parallel(self, params, state, us, reset, mask, implementation):
    place = positions(state.count, len(us), reset=reset, mask=mask)

    def one(kept, q, k, v, weight):
      return dma.dynamic_mask_attention(
        kept, q, k, v, weight=weight, reset=reset, mask=mask,
        implementation=implementation,
      )  # fmt: skip

    kept, o = jax.vmap(one, (0, 1, 1, 1, 1), (0, 1))(
      state.kept, *self._project(params, us, place)
    )
    o = dot(o.reshape(us.shape), params["out"])
    return MaskState(kept, place[-1] + 1), o

  def _project(self, params, u, place):
    """q, k, v [..., H, K] and m float32 [..., H]."""
    qkv = dot(u, params["qkv"])
    q, k, v = jnp.split(qkv, 3, axis=-1)
    dt = jax.nn.softplus(dot(v, params["dt"]).astype(jnp.float32))
    weight = jnp.exp(params["a"].astype(jnp.float32) * dt)
    q, k = (rotary(self._split(x), place[..., None]) for x in (q, k))
    return q, k, self._split(v), weight


class ExpertOptions(NamedTuple):
  """Of the experts.

  Attributes:
    num_keys: n; there are n² experts.
    heads: that each choose.
    knn: k, experts a head chooses.
    key_dim: width of a query, two halves.
  """

  num_keys: int = 128
  heads: int = 4
  knn: int = 8
  key_dim: int = 64


class Experts(nnx.Module):
  """n² experts of one hidden unit, some of which each token asks.

  Args:
    width: D.
    options: how many.
    rngs: its `params` stream draws the parameters.

  Raises:
    ValueError: on a size out of range.
  """

  def __init__(self, width: int, options: ExpertOptions, *, rngs: nnx.Rngs):
    for name, value in options._asdict().items():
      check_size(name, value)
    if options.key_dim % 2 or options.knn > options.num_keys**2:
      raise ValueError(
        "Experts: key_dim must be even and knn at most num_keys², got "
        f"{options}"
      )
    self.options = o = options
    half = o.key_dim // 2
    self.query = nnx.Param(
      initializers.lecun_normal(rngs.params(), (width, o.heads * o.key_dim))
    )
    self.keys = nnx.Param(
      initializers.uniform(
        rngs.params(), (o.heads, 2, o.num_keys, half), half**-0.5
      )
    )
    table = lambda: nnx.Param(
      0.02 * jax.random.normal(rngs.params(), (o.num_keys**2, width))
    )
    self.down, self.up = table(), table()

  def __call__(self, x):
    """x [..., D] -> [..., D]."""
    o = self.options
    query = dot(x, self.query[...]).reshape(*x.shape[:-1], o.heads, o.key_dim)
    search = lambda q, keys: top_k(q, keys, o.knn)
    scores, index = jax.vmap(search, (-2, 0), -2)(query, self.keys[...])
    down = jnp.take(self.down[...], index, axis=0).astype(x.dtype)
    hidden = jnp.einsum(
      "...d,...hkd->...hk", x, down, preferred_element_type=jnp.float32
    )
    weights = jax.nn.silu(hidden) * jax.nn.softmax(scores, axis=-1)
    flat = lambda y: y.reshape(*x.shape[:-1], o.heads * o.knn)
    return read(self.up[...], flat(weights), flat(index)).astype(x.dtype)


class Layer(Block):
  """r ⊙ x + mixer(norm(x)) ,  r' ⊙ x + MLP(norm(x)) + experts(norm(x)).

  Args:
    cell: the mixer.
    options: of the block.
    experts: as of `Experts`.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, cell, options: BlockOptions, experts, *, rngs):
    super().__init__(cell, options, rngs=rngs)
    width = cell.d_model
    self.experts = Experts(width, experts, rngs=rngs)
    self.memory_residual = nnx.Param(jnp.ones((width,)))
    self.mlp_residual = nnx.Param(jnp.ones((width,)))

  def __call__(
    self, state, x, *, reset=None, mask=None, key=None, implementation=None,
    reports=False,
  ):  # fmt: skip
    """As a `Block`."""
    keys = (None, None) if key is None else jax.random.split(key)
    rate = self.options.dropout
    memory, y, *rest = self.memory(
      state.memory, self.memory_norm(x), reset=reset, mask=mask,
      implementation=implementation, reports=reports,
    )  # fmt: skip
    x = self.memory_residual[...].astype(x.dtype) * x
    x = x + dropout(y, rate, keys[0])
    u = self.mlp_norm(x)
    y = self.mlp(u) + self.experts(u)
    x = self.mlp_residual[...].astype(x.dtype) * x + dropout(y, rate, keys[1])
    return BlockState((), memory), x, *rest


class Layers(Stack):
  """A `Stack` of `Layer`s.

  Args:
    cells: the pattern, bottom first.
    depth: number of layers.
    experts: as of `Experts`.
    options: of every layer.
    unroll: as in `Stack`.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, cells, depth, experts, options, *, unroll=1, rngs):
    self.experts = experts
    super().__init__(cells, depth, options, unroll=unroll, rngs=rngs)

  def _block(self, cell, options, rngs):
    return Layer(cell, options, self.experts, rngs=rngs)


class WonderfulMatrices(LanguageModel):
  """A language model of state spaces, masked attention and many experts.

  >>> model = WonderfulMatrices(8, 256, d_model=64, num_heads=4, keep=512,
  ...                           rngs=nnx.Rngs(0))
  >>> state, logits = model(None, tokens)  # int [B, T] -> float32 [B, T, V]

  Calls are `SequenceModel`'s.

  Args:
    depth: number of layers, a multiple of `period`.
    vocab_size: V.
    d_model: D.
    num_heads: H of all mixers.
    period: the last of so many layers is attention; 1 for attention alone.
    keep: tokens that a head of attention keeps.
    experts: as of `ExpertOptions`, as a dict.
    mlp: as in `BlockOptions`.
    mlp_width: hidden width of the shared MLP; None for 2 D.
    rngs: its `params` stream draws the parameters.
    **options: of `LanguageModel`, but conv_size.

  Raises:
    ValueError: on an option out of range.
    TypeError: on an unknown option.
  """

  kind: ClassVar[str] = "wonderful_matrices"

  def __init__(
    self, depth: int, vocab_size: int, *, d_model: int, num_heads: int = 1,
    period: int = 8, keep: int = 2048, experts: dict[str, int] | None = None,
    mlp: str = "swiglu", mlp_width: int | None = None, rngs: nnx.Rngs,
    **options,
  ):  # fmt: skip
    far = RotarySSD(d_model, num_heads)
    near = DynamicMaskAttention(d_model, num_heads, keep)
    cells = (*[far] * (check_size("period", period) - 1), near)
    if options.get("conv_size"):
      raise ValueError("WonderfulMatrices: its layers have no convolution")
    mlp_width = 2 * d_model if mlp_width is None else mlp_width
    check_size("mlp_width", mlp_width)
    experts = ExpertOptions(**(experts or {}))
    make = functools.partial(Layers, cells, depth, experts)
    super().__init__(
      make, None, vocab_size, mlp=mlp, mlp_width=mlp_width, rngs=rngs, **options
    )

  def config(self) -> dict[str, Any]:
    """The constructor's arguments as plain data, without `rngs`."""
    encoder, stack = self.encoder, self.encoder.stack
    near = stack.cells[-1]
    return {
      "depth": stack.depth,
      "vocab_size": self.vocab_size,
      **dataclasses.asdict(near),
      "period": len(stack.cells),
      "experts": stack.experts._asdict(),
      "positions": encoder.positions,
      "dtype": encoder.dtype,
      "unroll": stack.unroll,
      "tie_embeddings": self.tie_embeddings,
      **dataclasses.asdict(stack.options),
    }
