"""Titans: attention with the neural long-term memory beside it.

Three ways to put the memory of `memzoo.cells.ttt.titans` into a layer, and the
language model of them. All have persistent tokens p_1 … p_N, learned vectors
that attention sees before anything else.

  MAC, memory as a context, over segments S(t):
    h = M*_{t−1}(S(t) W_Q)                                          (21)
    y = Attn([p_1 … p_N] ‖ h ‖ S(t))                           (22, 23)
    M_t = M_{t−1}(y) ,  o = y ⊗ M*_t(y)                        (24, 25)
  MAG, memory as a gate, with a sliding window:
    y = SW-Attn*([p_1 … p_N] ‖ x) ,  o = y ⊗ M(x)                (26-28)
  MAL, memory as a layer:
    y = M(x) ,  o = SW-Attn([p_1 … p_N] ‖ y)                     (29-31)
  y ⊗ m = RMSNorm(y) ⊙ σ(RMSNorm(m))

M(·) learns as it reads, M*(·) only reads. The unit of all three is the token:
what a call gives does not depend on how a stream is cut.

Differs: in MAC the paper lets a token of a segment see h of all its tokens,
and reads (25) from the memory that has learned all of y. Both tell it of
tokens to come. Here it sees h of those up to itself, in every column of the
attention mask, and (25) is read after its own step, as everywhere in this
memory. The memory does not read the persistent tokens: what it would learn of
them is the same at every start, and its start is learned; what it would give
for them in MAL is a learned vector as they are. Their number and that of h (one
a token; the authors have 256 for 512) are free. Attention has rotary positions
(at the place in the segment for MAC) and short convolutions behind its
projections, of tokens alone, and neither silu nor unit norms. ⊗ may be any
gating; the authors normalise both sides with learned scales before σ.

Source: Behrouz, Zhong, Mirrokni 2024, arXiv:2501.00663, section 4 and eq. 21 to
31; sizes, rotary positions and SwiGLU blocks from the published version
(NeurIPS 2025), section 3.3 and appendix E.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.cells.kv.window import _RING, State as WindowState, Window
from memzoo.cells.ttt.titans import State as MemoryState, Titans
from memzoo.core import cell as cell_lib, dispatch, registry
from memzoo.core.linear import dot
from memzoo.models.lm import LanguageModel
from memzoo.ops import arguments, norm
from memzoo.ops.attention import State as Ring, attention, positions
from memzoo.ops.conv import conv, step as conv_step
from memzoo.ops.deep_gradient_step import Model, aligned


@dataclasses.dataclass(frozen=True)
class PrefixWindow(Window):
  """`Window` behind tokens that are learned and not given.

  Beside Window's parameters: persistent [N, D]. They have the first N places of
  a segment, and stay as long as the window, or for good where `sinks` is N.
  """

  persistent: int = 0

  def init(self, key) -> dict[str, Any]:
    params = super().init(key)
    shape = self.persistent, self.d_model
    drawn = 0.02 * jax.random.normal(jax.random.fold_in(key, 1), shape)
    return params | {"persistent": drawn}

  def initial_state(self, params, key=None) -> WindowState:
    state, count = super().initial_state(params), self.persistent
    place = jnp.arange(count, dtype=jnp.int32)
    qkv = dot(params["persistent"], params["qkv"])
    _, k, v = self._split(qkv, place)  # [N, G, K]
    put = lambda ring, x: ring.at[:, :count].set(
      jnp.swapaxes(x, 0, 1).astype(ring.dtype)
    )
    ring = Ring(
      put(state.ring.k, k),
      put(state.ring.v, v),
      state.ring.position.at[:count].set(place),
      jnp.int32(count),
    )
    return state._replace(ring=ring)

  def parallel(self, params, state, xs, reset, mask, implementation):
    qkv, taps = dot(xs, params["qkv"]), state.conv
    if self.conv_size:
      taps, qkv = conv(taps, qkv, params["conv"], reset=reset, mask=mask)
    first = state.ring.count - self.persistent
    place = positions(first, len(xs), reset=reset, mask=mask) + self.persistent
    ring, o = self.attend(
      params, state.ring, qkv, place, reset, mask, implementation
    )
    return WindowState(ring, taps), dot(o, params["out"])

  def attend(self, params, ring, qkv, place, reset, mask, form=None):
    """Attention of projected tokens [T, (H + 2G) K]: (ring, o [T, H K])."""
    fresh = self.initial_state(params).ring
    one = lambda *a: attention(
      *a[:4], fresh=a[4], sinks=self.sinks, reset=reset, mask=mask,
      implementation=form,
    )  # fmt: skip
    shared = jax.vmap(one, (None, 1, None, None, None), (None, 1))
    heads = jax.vmap(shared, (_RING, 1, 1, 1, _RING), (_RING, 1))
    ring, o = heads(ring, *self._split(qkv, place), fresh)
    return ring, o.reshape(len(qkv), -1)


@dataclasses.dataclass(frozen=True)
class Architecture(cell_lib.Cell):
  """What the three have in common.

  Attributes:
    d_model: D.
    num_heads: of the attention.
    persistent: N, the persistent tokens.
    attention_conv: taps behind the projections of the attention; 0 for none.
    rotary_base: of the attention's positions.
    memory: the long-term memory, of the same D; None for Titans' defaults.
  """

  d_model: int
  num_heads: int = 1
  persistent: int = 4
  attention_conv: int = 4
  rotary_base: float = 10000.0
  memory: Titans | None = None

  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk")
  op: ClassVar[str] = "deep_gradient_step"
  reports: ClassVar[tuple[str, ...]] = Titans.reports
  gated: ClassVar[bool] = True

  def __post_init__(self):
    who = type(self).__name__
    arguments.check_positive(self, "d_model", "num_heads")
    if type(self.persistent) is not int or self.persistent < 0:
      raise ValueError(
        f"{who}: persistent must be 0 or more, got {self.persistent!r}"
      )
    if self.lmm.d_model != self.d_model:
      raise ValueError(
        f"{who}: its memory must have d_model={self.d_model}, got "
        f"{self.lmm.d_model}"
      )
    self._window(1 + self.persistent, 0)  # checks the other options

  @property
  def lmm(self) -> Titans:
    """The long-term memory."""
    return self.memory or Titans(self.d_model)

  @property
  def attention(self) -> PrefixWindow:
    raise NotImplementedError

  def _window(self, capacity: int, sinks: int) -> PrefixWindow:
    return PrefixWindow(
      self.d_model, self.num_heads, capacity=capacity, sinks=sinks,
      persistent=self.persistent, conv_size=self.attention_conv,
      rotary_base=self.rotary_base,
    )  # fmt: skip

  def init(self, key) -> dict[str, Any]:
    keys = jax.random.split(key)
    params = {
      "attention": self.attention.init(keys[0]),
      "memory": self.lmm.init(keys[1]),
    }
    if self.gated:
      one = jnp.ones((self.d_model,))
      params |= {"norm_attention": one, "norm_memory": one}
    return params

  def _gate(self, params, y, m):
    """y ⊗ m."""
    y = norm.rms_norm(y, params["norm_attention"])
    return y * jax.nn.sigmoid(norm.rms_norm(m, params["norm_memory"]))


class State(NamedTuple):
  """Of MAG and MAL."""

  attention: WindowState
  memory: MemoryState


@dataclasses.dataclass(frozen=True)
class Sliding(Architecture):
  """What MAG and MAL have in common.

  Attributes:
    window: W, the tokens that attention sees.
  """

  window: int = 64

  def __post_init__(self):
    arguments.check_positive(self, "window")
    super().__post_init__()

  def initial_state(self, params, key=None) -> State:
    return State(
      self.attention.initial_state(params["attention"]),
      self.lmm.initial_state(params["memory"]),
    )

  def observe(self, params, state, x):
    attend = lambda x: self.attention.step(
      params["attention"], state.attention, x
    )
    learn = lambda x: self.lmm.observe(params["memory"], state.memory, x)
    return self._layer(params, x, attend, learn)

  def parallel(self, params, state, xs, reset, mask, implementation):
    attend = lambda xs: self.attention.parallel(
      params["attention"], state.attention, xs, reset, mask, None
    )
    learn = lambda xs: self.lmm.parallel(
      params["memory"], state.memory, xs, reset, mask, implementation
    )
    return self._layer(params, xs, attend, learn)


class MAG(Sliding):
  """Memory as a gate: y = SW-Attn*([p_1 … p_N] ‖ x) ,  o = y ⊗ M(x).

  State: attention (`Window`'s, of N + W places), memory (`Titans`').
  Params: attention (PrefixWindow's), memory (Titans'), norm_attention [D],
    norm_memory [D].
  """

  @property
  def attention(self) -> PrefixWindow:
    return self._window(self.persistent + self.window, self.persistent)

  def _layer(self, params, x, attend, learn):
    window, y = attend(x)
    memory, m, reports = learn(x)
    return State(window, memory), self._gate(params, y, m), reports


class MAL(Sliding):
  """Memory as a layer: y = M(x) ,  o = SW-Attn([p_1 … p_N] ‖ y).

  The persistent tokens leave the window as it slides; N is at most W.

  State: attention (`Window`'s, of W places), memory (`Titans`').
  Params: attention (PrefixWindow's), memory (Titans').
  """

  gated: ClassVar[bool] = False

  def __post_init__(self):
    super().__post_init__()
    if self.persistent > self.window:
      raise ValueError(
        f"MAL: persistent must be at most window={self.window}, got "
        f"{self.persistent}"
      )

  @property
  def attention(self) -> PrefixWindow:
    return self._window(self.window, 0)

  def _layer(self, params, x, attend, learn):
    memory, y, reports = learn(x)
    window, o = attend(y)
    return State(window, memory), o, reports


class SegmentState(NamedTuple):
  """Of MAC."""

  attention: WindowState  # of the segment: p, then h and x of each token
  queries: jax.Array  # [W − 1, D] float32: the memory's last queries
  memory: MemoryState
  past: Model  # M_{t−1}, of the segment before
  phase: jax.Array  # int32 [], tokens of the segment so far: 0 … L − 1


class Tokens(NamedTuple):
  """What of a token does not depend on the memory."""

  x: jax.Array  # [T, D]
  q: jax.Array  # [T, H, K], what the memory is asked
  qkv: jax.Array  # [T, (H + 2G) K], of the attention
  reset: jax.Array | None
  mask: jax.Array | None


@dataclasses.dataclass(frozen=True)
class MAC(Architecture):
  """Memory as a context, over segments of L tokens.

    h = M*_{t−1}(S(t) W_Q)                                          (21)
    y = Attn([p_1 … p_N] ‖ h ‖ S(t))                           (22, 23)
    M_t = M_{t−1}(y) ,  o = y ⊗ M*_t(y)                        (24, 25)

  Token i sees h_j and x_j of the segment with j <= i. A reset starts a segment.

  State: attention (`Window`'s, of N + 2 L places: h and x take two a token),
    queries [W − 1, D], memory (`Titans`'), past (its weights at the segment's
    start, as `memory.inner.model`), phase int32.
  Params: attention (PrefixWindow's), memory (Titans'), norm_attention [D],
    norm_memory [D].
  Forms: step; scan and chunk walk over T / L segments (2 passes over each with
    resets: one for the segment that goes on, one for those that start), whose
    attention is one matmul of scores, and name the memory's form.

  Attributes:
    segment: L.
  """

  segment: int = 32

  def __post_init__(self):
    arguments.check_positive(self, "segment")
    super().__post_init__()

  @property
  def attention(self) -> PrefixWindow:
    return self._window(self.persistent + 2 * self.segment, 0)

  def initial_state(self, params, key=None) -> SegmentState:
    memory = self.lmm.initial_state(params["memory"])
    return SegmentState(
      self.attention.initial_state(params["attention"]),
      memory.conv[:, : self.d_model],
      memory,
      memory.inner.model,
      jnp.zeros((), jnp.int32),
    )

  def observe(self, params, state, x):
    whole = jax.tree.map(lambda y: y[None], x)
    tokens, state = self._enter(params, state, whole, _conv_one, None, None)
    state, (o, reports) = self._first(params, state, tokens, None)
    phase = (state.phase + 1) % self.segment
    first = lambda y: y[0]
    return state._replace(phase=phase), first(o), jax.tree.map(first, reports)

  def parallel(self, params, state, xs, reset, mask, implementation):
    size = self.segment
    tokens, state = self._enter(params, state, xs, conv, reset, mask)
    back, segments = (lambda y: y), self._segment
    if reset is None:
      tokens, back = aligned(tokens, state.phase, size)
      segments = self._continue
    length = len(tokens.x)
    count = -(-length // size)
    if tokens.mask is None:
      tokens = tokens._replace(mask=jnp.ones((length,), bool))
    pad = lambda x: jnp.pad(
      x, [(0, count * size - length)] + [(0, 0)] * (x.ndim - 1)
    )
    split = lambda x: pad(x).reshape((count, size) + x.shape[1:])
    body = jax.checkpoint(
      lambda state, tokens: segments(params, state, tokens, implementation),
      prevent_cse=False,
    )
    state, out = jax.lax.scan(body, state, jax.tree.map(split, tokens))
    join = lambda y: back(y.reshape((-1,) + y.shape[2:])[:length])
    return state, *jax.tree.map(join, out)

  def _enter(self, params, state, xs, convolve, reset, mask):
    """What the tokens are before they meet the memory."""
    flags = dict(reset=reset, mask=mask)
    d, memory = self.d_model, params["memory"]
    window, q = convolve(
      state.queries, dot(xs, memory["qkv"][:, :d]), memory["conv"][:, :d],
      **flags,
    )  # fmt: skip
    q = jax.nn.silu(q).reshape(len(xs), self.lmm.num_heads, -1)
    taps, qkv = state.attention.conv, dot(xs, params["attention"]["qkv"])
    if self.attention_conv:
      kernel = params["attention"]["conv"]
      taps, qkv = convolve(taps, qkv, kernel, **flags)
    tokens = Tokens(xs, norm.l2_normalize(q), qkv, reset, mask)
    attention = state.attention._replace(conv=taps)
    return tokens, state._replace(queries=window, attention=attention)

  def _continue(self, params, state, tokens: Tokens, form):
    """Tokens of the segment that goes on, or of one that starts first."""
    state, out = self._first(params, state, tokens, form)
    count = jnp.sum(tokens.mask.astype(jnp.int32))
    return state._replace(phase=(state.phase + count) % self.segment), out

  def _segment(self, params, state, tokens: Tokens, form):
    """L slots with resets: what goes on first, then what starts."""
    there = tokens.mask.astype(jnp.int32)
    number = jnp.cumsum(there)
    index = jnp.cumsum(tokens.reset.astype(jnp.int32))
    before = jax.lax.cummax(jnp.where(tokens.reset, number - 1, 0))
    live = index == 0
    # Tokens of the reset's segments, or of the one that came in, up to here.
    number = number - before + jnp.where(live, state.phase, 0)
    goes_on = live & (number <= self.segment)
    first = tokens._replace(mask=tokens.mask & goes_on, reset=None)
    held, (o, reports) = self._first(params, state, first, form)

    second = tokens.mask & ~goes_on
    place = (number - 1) % self.segment
    model, fresh = held.memory.inner.model, self.initial_state(params).past
    recall = lambda m: self.lmm.recall(params["memory"], m, tokens.q)
    past = jnp.where(live[:, None, None], recall(model), recall(fresh))
    new, (more, later) = self._attend_and_learn(
      params, held, tokens._replace(mask=second), place, place == 0, past, form
    )
    reports = {n: jnp.where(second, later[n], y) for n, y in reports.items()}
    past = _pick(live[-1], model, fresh)
    past = _pick(jnp.any(second), past, held.past)
    new = new._replace(past=past, phase=number[-1] % self.segment)
    return new, (jnp.where(second[:, None], more, o), reports)

  def _first(self, params, state, tokens: Tokens, form):
    """Tokens of one segment: the one that goes on, or one that starts."""
    place, starts = state.phase[None], state.phase == 0
    if tokens.mask is not None:
      place = state.phase + jnp.cumsum(tokens.mask.astype(jnp.int32)) - 1
      starts &= jnp.any(tokens.mask)
    fresh = self.attention.initial_state(params["attention"]).ring
    ring = _pick(starts, fresh, state.attention.ring)
    state = state._replace(
      past=_pick(starts, state.memory.inner.model, state.past),
      attention=state.attention._replace(ring=ring),
    )
    o = self.lmm.recall(params["memory"], state.past, tokens.q)
    return self._attend_and_learn(
      params, state, tokens._replace(reset=None), place, None, o, form
    )

  def _attend_and_learn(self, params, state, tokens, place, starts, o, form):
    """(22) to (25) for tokens with places [T], of which some start a segment
    and some are reset; o [T, H, K] is what the past gives."""
    h = self.lmm.express(params["memory"], tokens.x, o)
    weave = lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:])
    both = lambda a: None if a is None else weave(a, a)
    qkv = weave(dot(h, params["attention"]["qkv"]), tokens.qkv)
    begin = None
    if starts is not None:
      begin = weave(starts & tokens.mask, jnp.zeros_like(starts))
    ring, y = self.attention.attend(
      params["attention"], state.attention.ring, qkv,
      both(place) + self.persistent, begin, both(tokens.mask),
    )  # fmt: skip
    y = dot(y[1::2], params["attention"]["out"])
    if form is None:
      memory, m, reports = self.lmm.observe(
        params["memory"], state.memory, y[0]
      )
      m, reports = jax.tree.map(lambda z: z[None], (m, reports))
    else:
      reset = None
      if tokens.reset is not None:
        reset = tokens.reset & tokens.mask
      memory, m, reports = self.lmm.parallel(
        params["memory"], state.memory, y, reset, tokens.mask, form
      )
    attention = state.attention._replace(ring=ring)
    state = state._replace(attention=attention, memory=memory)
    return state, (self._gate(params, y, m), reports)


def _pick(flag, a, b):
  return jax.tree.map(lambda x, y: jnp.where(flag, x, y), a, b)


def _conv_one(state, x, kernel, reset, mask):
  """`conv` of one token [1, D]."""
  state, y = conv_step(state, x[0], kernel)
  return state, y[None]


ARCHITECTURES = {"mac": MAC, "mag": MAG, "mal": MAL}


class TitansLM(LanguageModel):
  """A language model of MAC, MAG or MAL layers. Calls are `SequenceModel`'s.

  >>> model = TitansLM('mac', 2, 256, d_model=64, num_heads=4, segment=16,
  ...                  rngs=nnx.Rngs(0))
  >>> state, logits = model(None, tokens)  # int [B, T] -> float32 [B, T, V]

  Args:
    architecture: 'mac', 'mag' or 'mal'.
    depth: number of blocks.
    vocab_size: V.
    d_model: D.
    memory: options of `Titans`, as a dict, without d_model.
    rngs: its `params` stream draws the parameters.
    **options: of the architecture (num_heads, persistent, segment, window, …),
      and of `LanguageModel`; the MLP is 'swiglu' by default.

  Raises:
    ValueError: on an unknown architecture, or an option out of range.
    TypeError: on an unknown option.
  """

  kind: ClassVar[str] = "titans"

  def __init__(
    self, architecture: str, depth: int, vocab_size: int, *, d_model: int,
    memory: dict[str, Any] | None = None, mlp: str = "swiglu",
    rngs: nnx.Rngs, **options,
  ):  # fmt: skip
    if architecture not in ARCHITECTURES:
      raise ValueError(
        f"TitansLM: unknown architecture {architecture!r}; "
        + dispatch.nearest(str(architecture), ARCHITECTURES)
      )
    cls = ARCHITECTURES[architecture]
    fields = {field.name for field in dataclasses.fields(cls)}
    own = {name: options.pop(name) for name in fields & options.keys()}
    lmm = registry.make("titans", d_model=d_model, **(memory or {}))
    layer = cls(d_model, memory=lmm, **own)
    super().__init__(layer, depth, vocab_size, mlp=mlp, rngs=rngs, **options)
    self.architecture = architecture

  def config(self) -> dict[str, Any]:
    """The constructor's arguments as plain data, without `rngs`."""
    layer, encoder = self.encoder.stack.cells[0], self.encoder
    own = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}
    memory = registry.to_config(own.pop("memory"))
    left_out = ("cell", "d_model")
    return {
      "architecture": self.architecture,
      "depth": encoder.stack.depth,
      "vocab_size": self.vocab_size,
      "memory": {n: x for n, x in memory.items() if n not in left_out},
      **own,
      "positions": encoder.positions,
      "dtype": encoder.dtype,
      "unroll": encoder.stack.unroll,
      "tie_embeddings": self.tie_embeddings,
      **dataclasses.asdict(encoder.stack.options),
    }
