"""B'MOJO-F."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.cells.kv.window import _RING
from memzoo.cells.ssm.mamba import Mamba, State as MambaState
from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments
from memzoo.ops.attention import State as Ring, _attend, empty, positions, write
from memzoo.ops.rotary import rotary


class State(NamedTuple):
  ssm: MambaState
  window: Ring  # k, v [G, W, K], of the tokens; position [W], count []
  fading: Ring  # k, v [G, 2 W, K], of what the SSM made of them


@register(
  "b_mojo",
  family="ssm",
  year=2024,
  paper="Zancato et al. 2024, arXiv:2407.06324",
  write="selected decay; append",
  evidence="bronze",
  tiny=dict(
    d_model=6, num_heads=2, num_kv_heads=1, head_dim=4, window=3, d_state=3,
    conv_size=2,
  ),
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class BMojo(cell.Cell):
  """B'MOJO-F: attention to a window of tokens, and to what a state space made
  of those that left it.

    z_t = Mamba(x_t)                                       fading memory
    q_t = W_Q x_t                       per head; q, k rotated by their token
    k_j, v_j = W_K x_j, W_V x_j         t − W < j <= t        the window
    k'_j, v'_j = W_K z_j, W_V z_j       t − 2W < j <= t − W   what faded
    o_t = softmax over both of (k·q_t / √K) times v
    y_t = W_O [o_t of head 1; … ; o_t of head H]

  One softmax reads W tokens as they were, and W tokens of which each sums up
  all that came before it. K = head_dim is D / H unless it is given; with fewer
  `num_kv_heads` than heads, H / G heads share keys and values.

  State: ssm, `Mamba`'s: h [E, N] and conv [taps − 1, E] float32; window and
    fading, rings of k and v [G, W, K] and [G, 2 W, K] float32 with their
    positions int32 and counts int32. Starts empty.
  Params: ssm, `Mamba`'s; qkv [D, (H + 2G) K], whose W_K and W_V make the keys
    and values of tokens and of z alike; out [H K, D].
  Forms: step O(D² + H W K) a token and Mamba's; scan hoists the projections
    and runs Mamba in blocks, the attention token by token.
  Differs: it is B'MOJO-F of the paper, without the eidetic store of the tokens
    that a short predictor of the input foretold worst: what is kept, for how
    long and by which test was not to be had in the authors' code, which is of
    B'MOJO-F. There it is trained on top of a Transformer's weights and the SSM
    is Mamba-2 or Gated KalmaNet; here it starts from nothing, with the Mamba of
    the paper. Keys of z are made by the maps of tokens (an option there). No
    biases, no norm of q and k.
  Paper: Zancato, Seshadri, Dukler, Golatkar, Shen, Bowman, Trager, Achille,
    Soatto 2024, "B'MOJO: Hybrid State Space Realizations of Foundation Models
    with Eidetic and Fading Memory", arXiv:2407.06324, section 4; positions and
    softmax as in github.com/awslabs/hybrid-model-factory (bmojo_attention.py).
  """

  d_model: int
  num_heads: int = 1
  head_dim: int | None = None
  num_kv_heads: int | None = None
  window: int = 64
  rotary_base: float = 10000.0
  d_state: int = 16
  expand: float = 2.0
  conv_size: int = 4

  op: ClassVar[str] = "attention"
  implementations: ClassVar[tuple[str, ...]] = ("scan",)

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "num_heads", "window")
    if self.head_dim is None:
      arguments.check_divides(self, "num_heads", "d_model")
    else:
      arguments.check_positive(self, "head_dim")
    if self.num_kv_heads is not None:
      arguments.check_positive(self, "num_kv_heads")
      arguments.check_divides(self, "num_kv_heads", "num_heads")
    if self.width % 2 or self.rotary_base <= 0:
      raise ValueError(
        "BMojo: rotary positions need an even width per head and a base above "
        f"0, got {self.width} and {self.rotary_base!r}"
      )
    _ = self.ssm  # checks its options

  @property
  def width(self) -> int:
    """K of every head."""
    return self.head_dim or self.d_model // self.num_heads

  @property
  def groups(self) -> int:
    """G: heads of keys and values."""
    return self.num_kv_heads or self.num_heads

  @property
  def ssm(self) -> Mamba:
    """What makes the fading memory."""
    return Mamba(
      self.d_model, d_state=self.d_state, expand=self.expand,
      conv_size=self.conv_size,
    )  # fmt: skip

  def init(self, key) -> dict[str, Any]:
    d, inner = self.d_model, self.num_heads * self.width
    key_ssm, key_qkv, key_out = jax.random.split(key, 3)
    total = inner + 2 * self.groups * self.width
    return {
      "ssm": self.ssm.init(key_ssm),
      "qkv": initializers.lecun_normal(key_qkv, (d, total)),
      "out": initializers.lecun_normal(key_out, (inner, d)),
    }

  def initial_state(self, params, key=None) -> State:
    ssm = self.ssm.initial_state(params["ssm"])
    return State(ssm, self._ring(self.window), self._ring(2 * self.window))

  def step(self, params, state, x):
    ssm, z = self.ssm.step(params["ssm"], state.ssm, x)
    token = self._project(params, x, z, state.window.count)
    window, fading, o = self._attend(state.window, state.fading, *token)
    return State(ssm, window, fading), dot(o, params["out"])

  def parallel(self, params, state, xs, reset, mask, implementation):
    ssm, zs = self.ssm.parallel(
      params["ssm"], state.ssm, xs, reset, mask, implementation
    )
    place = positions(state.window.count, len(xs), reset=reset, mask=mask)
    inputs = Inputs(self._project(params, xs, zs, place), reset, mask)

    def step(rings, i):
      *rings, o = self._attend(*rings, *i.token)
      return tuple(rings), o

    fresh = self._ring(self.window), self._ring(2 * self.window)
    (window, fading), o = arguments.scan_steps(
      step, (state.window, state.fading), inputs, fresh
    )
    return State(ssm, window, fading), dot(o, params["out"])

  def _ring(self, capacity: int) -> Ring:
    ring = empty(capacity, self.width, self.width)
    k, v = (jnp.stack([x] * self.groups) for x in (ring.k, ring.v))
    return ring._replace(k=k, v=v)

  def _project(self, params, x, z, place):
    """q [..., G, H / G, K], k, v of the token and of z [..., G, K]."""
    h, g, width = self.num_heads, self.groups, self.width
    cut = lambda y: y.reshape(*y.shape[:-1], -1, width)
    q, k, v = jnp.split(cut(dot(x, params["qkv"])), [h, h + g], axis=-2)
    keys_values = cut(dot(z, params["qkv"][:, h * width :]))
    old_k, old_v = jnp.split(keys_values, [g], axis=-2)
    q = q.reshape(*q.shape[:-2], g, h // g, width)
    turn = lambda y, at: rotary(y, at, base=self.rotary_base)
    at = place[..., None]
    return turn(q, at[..., None]), turn(k, at), v, turn(old_k, at), old_v

  def _attend(self, window, fading, q, k, v, old_k, old_v):
    """One token: (window, fading, o [H K])."""

    def one(window, fading, q, k, v, old_k, old_v):
      window, fading = write(window, k, v), write(fading, old_k, old_v)
      left = fading.position < fading.count - self.window
      seen = [window.position >= 0, (fading.position >= 0) & left]
      both = lambda a, b: jnp.concatenate([a, b]).astype(q.dtype)
      visible = jnp.broadcast_to(
        jnp.concatenate(seen), (len(q), 3 * self.window)
      )
      o = _attend(
        q, both(window.k, fading.k), both(window.v, fading.v), visible, None
      )
      return window, fading, o

    heads = jax.vmap(one, (_RING, _RING, 0, 0, 0, 0, 0), (_RING, _RING, 0))
    window, fading, o = heads(window, fading, q, k, v, old_k, old_v)
    return window, fading, o.reshape(-1)


class Inputs(NamedTuple):
  token: tuple[jax.Array, ...]  # q, k, v, k', v'
  reset: jax.Array | None
  mask: jax.Array | None
