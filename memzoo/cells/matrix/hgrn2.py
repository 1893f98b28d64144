"""HGRN2."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, norm
from memzoo.ops.batched import heads
from memzoo.ops.linear_attention import linear_attention, step as attend_step


class State(NamedTuple):
  h: jax.Array  # [H, K, K] float32: forget channels by input channels


class Read(NamedTuple):
  """What a token asks, writes and forgets, before it meets the state."""

  o: jax.Array  # [..., H, K], the output gate: the query
  k: jax.Array  # [..., H, K]: 1 − f
  i: jax.Array  # [..., H, K], the input: the value
  log_f: jax.Array  # [..., H, K] float32


@register(
  "hgrn2",
  family="matrix",
  year=2024,
  paper="Qin et al. 2024, arXiv:2404.07904",
  write="forget, add what was freed",
  evidence="silver",
  parity="fla-core 0.6, gla (its op)",
  tiny=dict(d_model=6, num_heads=2, head_dim=3, layer_index=1, num_layers=3),
)
@dataclasses.dataclass(frozen=True)
class HGRN2(cell.Cell):
  """HGRN2: a gated RNN whose state an outer product expands to a matrix.

    h_t = Diag(f_t) h_{t−1} + (1 − f_t) ⊗ i_t
    y_t = W_y RMSNorm(h_tᵀ o_t)
    f_t = γ + (1 − γ) ⊙ σ(W_f x_t) ,  i_t = W_i x_t ,  o_t = silu(W_o x_t)
    γ   = Σ_{j=1}^{l} softmax(Γ)_j     over the layers j = 0 … L − 1

  The write is tied to the forget gate: as linear attention, q = o, k = 1 − f,
  v = i. γ, per channel, is the lower bound of f in layer l = `layer_index`:
  zero in the first layer, and higher the higher the layer, so that lower
  layers forget. K is the state expansion; heads are H.

  State: h [H, K, K] float32, from zero.
  Params: ofi [D, 3HK] (W_o, W_f, W_i), norm [HK], out [HK, D] (W_y); above
    the first layer bounds [L, HK] (Γ), from zero: γ starts at l / L.
  Forms: step and scan O(H K²) a token, in order; chunk O(H K (C log C + K)) a
    token, in T / C sequential steps of matmuls; pallas the same in one kernel.
  Differs: the layers of the paper's model share one Γ; a cell has its own, of
    the same shape, so that bounds stay in order between layers only while
    their Γ agree. The norm has a scale (the authors' has none). The paper has
    H K = D. Maps start with variance 1 / D.
  Paper: Qin, Yang, Sun, Shen, Li, Sun, Zhong 2024, "HGRN2: Gated Linear RNNs
    with State Expansion", arXiv:2404.07904, section 3; the lower bounds of
    Qin, Yang, Zhong 2023, "Hierarchically Gated Recurrent Neural Network for
    Sequence Modeling", arXiv:2311.04823, section 3.2; activations and norm as
    in the authors' code (hgru2-pytorch).
  """

  d_model: int
  num_heads: int = 1
  head_dim: int = 32
  layer_index: int = 0
  num_layers: int = 1

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "pallas")
  op: ClassVar[str] = "linear_attention"

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "num_heads", "head_dim", "num_layers"
    )
    if not 0 <= self.layer_index < self.num_layers:
      raise ValueError(
        "HGRN2: layer_index must be 0 … num_layers − 1 = "
        f"{self.num_layers - 1}, got {self.layer_index!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, width = self.d_model, self.num_heads * self.head_dim
    key_in, key_out = jax.random.split(key)
    params = {
      "ofi": initializers.lecun_normal(key_in, (d, 3 * width)),
      "norm": jnp.ones((width,)),
      "out": initializers.lecun_normal(key_out, (width, d)),
    }
    if self.layer_index:
      params["bounds"] = jnp.zeros((self.num_layers, width))
    return params

  def initial_state(self, params, key=None) -> State:
    shape = (self.num_heads, self.head_dim, self.head_dim)
    return State(jnp.zeros(shape, jnp.float32))

  def step(self, params, state, x):
    h, y = jax.vmap(attend_step)(state.h, *self._project(params, x))
    return State(h), self._read_out(params, y)

  def parallel(self, params, state, xs, reset, mask, implementation):
    r = self._project(params, xs)
    h, y = heads(linear_attention)(
      state.h, r.o, r.k, r.i, log_decay=r.log_f, reset=reset, mask=mask,
      implementation=implementation,
    )  # fmt: skip
    return State(h), self._read_out(params, y)

  def _project(self, params, x) -> Read:
    o, f, i = jnp.split(dot(x, params["ofi"]), 3, axis=-1)
    f = f.astype(jnp.float32)
    log_f, k = jax.nn.log_sigmoid(f), jax.nn.sigmoid(-f)
    if self.layer_index:
      log_bound, log_rest = self._bound(params)
      log_f = jnp.logaddexp(log_bound, log_rest + log_f)
      k = jnp.exp(log_rest) * k
    split = lambda z: z.reshape(z.shape[:-1] + (self.num_heads, -1))
    return Read(
      split(jax.nn.silu(o)), split(k.astype(x.dtype)), split(i), split(log_f)
    )

  def _bound(self, params):
    """log γ and log(1 − γ) of this layer, float32 [HK]."""
    share = jax.nn.log_softmax(params["bounds"].astype(jnp.float32), axis=0)
    layer = jnp.arange(self.num_layers)
    below = ((layer > 0) & (layer <= self.layer_index))[:, None]
    total = jax.scipy.special.logsumexp
    return (
      total(share, axis=0, where=below),
      total(share, axis=0, where=~below),
    )

  def _read_out(self, params, y):
    y = y.reshape(y.shape[:-2] + (-1,))
    return dot(norm.rms_norm(y, params["norm"]), params["out"])
