"""LOCOST: a state space reads a long document both ways, a decoder tells of it.

A layer of the encoder runs two diagonal state spaces over the document, from
the left and from the right, as one convolution by FFT, and gates what they
give; there is no attention in it, so that S tokens cost O(S log S):

  k = W_K u + b_K ,  q = W_Q u + b_Q                u = norm(x), [S, D]
  κ^→_j, κ^←_j = 2 Re Σ_n C_n B_n (exp(Δ A_n) − 1) / A_n exp(Δ A_n j)
  y_t = Σ_{s <= t} κ^→_{t−s} k_s + Σ_{s >= t} κ^←_{s−t} k_s + d k_t
  x ← x + W_O (q ⊙ y) + b_O ,  x ← x + GEGLU(norm(x))

per channel, with N / 2 complex pairs A, B that both ways share and their own
C. The decoder is T5's: causal attention with relative positions in buckets,
attention to the encoder's output, GEGLU; RMS norms in front and no scaling of
the scores.

What the decoder reads of the document is held as keys and values per layer:
`read` makes the state from a document, which is the unit of the encoder. The
decoder's unit is the token; its own keys and values have room for `capacity`
of them. Another document takes another `read`: there is no reset.

Differs: as in the authors' code, the gate q has no nonlinearity. Their heads of
the state space (one in their runs) are left out. Dropout is left out, and so is
the pretraining by gap sentences. Maps start with variance 1 / fan-in and not as
in T5, and scores of the decoder start accordingly.

Paper: Le Bronnec, Duong, Ravaut, Allauzen, Chen, Guigue, Lumbreras, Soulier,
  Gallinari 2024, "LOCOST: State-Space Models for Long Document Abstractive
  Summarization", arXiv:2401.17919, section 3; code
  github.com/flbbb/locost-summarization (s4d_models.py, models.py). Raffel et
  al. 2020, arXiv:1910.10683, section 2.1 (decoder, buckets of positions).
"""

import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.core import initializers
from memzoo.core.linear import dot
from memzoo.models import layers
from memzoo.models.block import MLP, Norm
from memzoo.models.encoder import check_size
from memzoo.models.model import Head
from memzoo.models.pooling import last
from memzoo.ops import arguments
from memzoo.ops.attention import positions


def two_way_convolution(x, forward, backward):
  """y_t = Σ_{s <= t} forward_{t−s} x_s + Σ_{s >= t} backward_{s−t} x_s.

  By FFT, in float32: all of y depends on all of x, with rounding errors
  relative to the largest of it.

  Args:
    x: [S, D].
    forward: [S, D], lags 0 … S − 1 to the left.
    backward: [S, D], lags 0 … S − 1 to the right.

  Returns:
    y [S, D] in x's dtype.

  Raises:
    ValueError: on wrong shapes or dtypes.
  """
  who = "two_way_convolution"
  if jnp.ndim(x) != 2:
    arguments.fail(who, "x", "floating [S, D]; jax.vmap batches", x)
  for name, kernel in (("forward", forward), ("backward", backward)):
    arguments.check_array(who, name, kernel, jnp.shape(x))
  length = x.shape[0]
  # One circular kernel of 2 S places: lag −j stands at 2 S − j.
  both = jnp.concatenate([forward, jnp.zeros_like(backward)])
  both = both + jnp.roll(
    jnp.concatenate([jnp.zeros_like(forward), backward[::-1]]), 1, axis=0
  )
  spectrum = lambda y: jnp.fft.rfft(y.astype(jnp.float32), 2 * length, axis=0)
  y = jnp.fft.irfft(spectrum(x) * spectrum(both), 2 * length, axis=0)
  return y[:length].astype(x.dtype)


class BiSSM(nnx.Module):
  """The mixer of the encoder.

  Args:
    width: D.
    d_state: N, even: real numbers of state a channel and way.
    dt_min: least Δ at the start.
    dt_max: largest.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(
    self, width: int, d_state: int, *, dt_min: float = 1e-3,
    dt_max: float = 0.1, rngs: nnx.Rngs,
  ):  # fmt: skip
    if check_size("d_state", d_state) % 2 or not 0 < dt_min <= dt_max:
      raise ValueError(
        "BiSSM: needs an even d_state and 0 < dt_min <= dt_max, got "
        f"{d_state}, {dt_min}, {dt_max}"
      )
    pairs = d_state // 2
    linear = lambda: nnx.Param(
      initializers.lecun_normal(rngs.params(), (width, width))
    )
    self.k, self.q, self.out = linear(), linear(), linear()
    zero = lambda: nnx.Param(jnp.zeros((width,)))
    self.k_bias, self.q_bias, self.out_bias = zero(), zero(), zero()
    dt = initializers.log_uniform(rngs.params(), (width,), dt_min, dt_max)
    self.dt_log = nnx.Param(jnp.log(dt))
    grid = jnp.zeros((width, pairs)) + jnp.arange(pairs, dtype=jnp.float32)
    self.a_log = nnx.Param(jnp.full((width, pairs), math.log(0.5)))
    self.a_im = nnx.Param(math.pi * grid)  # S4D-Lin
    self.b_re = nnx.Param(jnp.ones((width, pairs)))
    self.b_im = nnx.Param(jnp.zeros((width, pairs)))
    normal = lambda *shape: nnx.Param(jax.random.normal(rngs.params(), shape))
    self.c_re, self.c_im = normal(2, width, pairs), normal(2, width, pairs)
    self.d = normal(width)

  def kernels(self, length: int):
    """κ^→ and κ^←, float32 [2, S, D]. Pair by pair, forward and backward, so
    that nothing of shape [S, D, N] is built."""
    a = jax.lax.complex(-jnp.exp(self.a_log[...]), self.a_im[...])
    b = jax.lax.complex(self.b_re[...], self.b_im[...])
    c = jax.lax.complex(self.c_re[...], self.c_im[...])
    step = a * jnp.exp(self.dt_log[...])[:, None].astype(a.dtype)
    weight = 2 * c * b * jnp.expm1(step) / a  # [2, D, N / 2]
    lag = jnp.arange(length, dtype=jnp.float32)[:, None].astype(a.dtype)

    @jax.checkpoint
    def add(total, pair):
      weight, step = pair
      return total + (weight[:, None] * jnp.exp(lag * step)).real, None

    start = jnp.zeros((2, length, a.shape[0]), jnp.float32)
    return jax.lax.scan(add, start, (jnp.moveaxis(weight, 2, 0), step.T))[0]

  def __call__(self, u, mask):
    """u [B, S, D], tokens at the left where mask bool [B, S]: [B, S, D]."""
    bias = lambda y, b: y + b[...].astype(y.dtype)
    k = jnp.where(mask[..., None], bias(dot(u, self.k[...]), self.k_bias), 0)
    q = bias(dot(u, self.q[...]), self.q_bias)
    forward, backward = self.kernels(u.shape[1])
    y = jax.vmap(lambda row: two_way_convolution(row, forward, backward))(k)
    y = y + self.d[...].astype(k.dtype) * k
    return bias(dot(q * y, self.out[...]), self.out_bias)


def bucket(distance, buckets: int, furthest: int):
  """T5's bucket of a distance to the left, int32 of any shape: the first half
  exact, the rest logarithmic up to `furthest`."""
  exact = buckets // 2
  distance = jnp.maximum(distance, 0)
  ratio = jnp.maximum(distance, 1).astype(jnp.float32) / exact
  far = jnp.log(ratio) / math.log(furthest / exact) * (buckets - exact)
  far = jnp.minimum(exact + far.astype(jnp.int32), buckets - 1)
  return jnp.where(distance < exact, distance, far)


class Attention(nnx.Module):
  """T5's, with H heads of K channels: no biases, no scaling.

  Args:
    width: D.
    heads: H.
    head_dim: K.
    rngs: its `params` stream draws the parameters.
  """

  def __init__(self, width: int, heads: int, head_dim: int, *, rngs: nnx.Rngs):
    self.heads, inner = heads, heads * head_dim
    draw = lambda rows, columns, fan_in: nnx.Param(
      initializers.lecun_normal(rngs.params(), (rows, columns), fan_in)
    )
    # The scores start as if they were scaled by K^−½.
    self.q = draw(width, inner, width * head_dim)
    self.k, self.v = draw(width, inner, width), draw(width, inner, width)
    self.out = draw(inner, width, inner)

  def keys_values(self, x):
    """k and v [B, S, H, K] of x [B, S, D]."""
    cut = lambda y: y.reshape(*x.shape[:2], self.heads, -1)
    return cut(dot(x, self.k[...])), cut(dot(x, self.v[...]))

  def __call__(self, x, k, v, visible, bias=None):
    """x [B, T, D] to k, v [B, S, H, K] where visible bool [B, T, S]; bias
    [B, H, T, S] is added to the scores. Zero where nothing is visible."""
    q = dot(x, self.q[...]).reshape(*x.shape[:2], self.heads, -1)
    scores = jnp.einsum(
      "bthk,bshk->bhts", q, k.astype(q.dtype),
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    scores = scores if bias is None else scores + bias
    seen = visible[:, None]
    top = jnp.max(scores, -1, keepdims=True, initial=-jnp.inf, where=seen)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    weights = jnp.exp(jnp.where(seen, scores - top, -jnp.inf))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    o = jnp.einsum(
      "bhts,bshk->bthk", weights.astype(q.dtype), v.astype(q.dtype)
    )
    return dot(o.reshape(*x.shape[:2], -1), self.out[...])


class Sublayer(nnx.Module):
  """A norm and what stands behind it."""

  def __init__(self, inner, width: int):
    self.norm, self.inner = Norm(width, "rms"), inner


class State(NamedTuple):
  """What the decoder holds, of every row."""

  count: jax.Array  # int32 [B], tokens read
  own: Any  # per layer (k, v) [B, capacity, H, K], of the decoder's tokens
  document: Any  # per layer (k, v) [B, S, H, K], of the document
  there: jax.Array  # bool [B, S]


class Locost(nnx.Module):
  """Documents to texts about them.

  >>> model = Locost(256, d_model=64, depth=2, rngs=nnx.Rngs(0))
  >>> state = model.read(document)         # int [B, S]
  >>> state, logits = model(state, text)   # int [B, T] -> float32 [B, T, V]

  Args:
    vocab_size: V, of both.
    d_model: D.
    depth: layers of the encoder.
    decoder_depth: of the decoder; None for as many.
    d_state: N of the state spaces, even.
    num_heads: of the decoder's attention.
    head_dim: K; None for D / num_heads.
    mlp_width: hidden width of the GEGLU; None for 4 D.
    capacity: tokens that the decoder can take.
    buckets: of relative positions, even.
    furthest: distance from which all share a bucket.
    rngs: its `params` stream draws the parameters.

  Raises:
    ValueError: on an option out of range.
  """

  def __init__(
    self, vocab_size: int, *, d_model: int, depth: int = 6,
    decoder_depth: int | None = None, d_state: int = 64, num_heads: int = 8,
    head_dim: int | None = None, mlp_width: int | None = None,
    capacity: int = 512, buckets: int = 32, furthest: int = 128,
    rngs: nnx.Rngs,
  ):  # fmt: skip
    sizes = dict(
      vocab_size=vocab_size, d_model=d_model, depth=depth, num_heads=num_heads,
      capacity=capacity,
    )  # fmt: skip
    for name, value in sizes.items():
      check_size(name, value)
    if head_dim is None and d_model % num_heads:
      raise ValueError(
        f"Locost: num_heads={num_heads} must divide d_model={d_model}, or give "
        "head_dim"
      )
    if buckets < 2 or buckets % 2 or furthest <= buckets // 2:
      raise ValueError(
        "Locost: buckets must be even, and furthest more than half of them, "
        f"got {buckets} and {furthest}"
      )
    self.vocab_size, self.max_length = vocab_size, capacity
    self.buckets, self.furthest, self.num_heads = buckets, furthest, num_heads
    self.head_dim = head_dim or d_model // num_heads
    hidden = mlp_width or 4 * d_model
    sub = lambda inner: Sublayer(inner, d_model)
    mlp = lambda: sub(MLP(d_model, hidden, "geglu", rngs=rngs))
    attend = lambda: sub(
      Attention(d_model, num_heads, self.head_dim, rngs=rngs)
    )
    self.embedding = nnx.Param(
      jax.random.normal(rngs.params(), (vocab_size, d_model))
    )
    self.encoder = nnx.List(
      nnx.List([sub(BiSSM(d_model, d_state, rngs=rngs)), mlp()])
      for _ in range(depth)
    )
    self.encoder_norm = Norm(d_model, "rms")
    self.decoder = nnx.List(
      nnx.List([attend(), attend(), mlp()])
      for _ in range(depth if decoder_depth is None else decoder_depth)
    )
    self.decoder_norm = Norm(d_model, "rms")
    self.bias = nnx.Param(
      0.02 * jax.random.normal(rngs.params(), (buckets, num_heads))
    )
    self.head = Head(d_model, vocab_size, bias=False, rngs=rngs)

  def encode(self, document, mask=None):
    """(features [B, S, D], there bool [B, S]) of a document int [B, S]: those
    of its tokens, moved together to the left where mask leaves gaps."""
    self._check("document", document, mask)
    there = jnp.ones(document.shape, bool) if mask is None else mask
    order = jnp.argsort(~there, axis=1, stable=True)
    there = jnp.take_along_axis(there, order, axis=1)
    document = jnp.take_along_axis(document, order, axis=1)
    x = jnp.take(self.embedding[...], jnp.where(there, document, 0), axis=0)
    for ssm, mlp in self.encoder:
      x = x + ssm.inner(ssm.norm(x), there)
      x = x + mlp.inner(mlp.norm(x))
    return jnp.where(there[..., None], self.encoder_norm(x), 0), there

  def read(self, document, mask=None) -> State:
    """The state of the decoder that tells of a document.

    Args:
      document: int [B, S].
      mask: bool [B, S] or None; False: no token there.
    """
    x, there = self.encode(document, mask)
    shape = x.shape[0], self.max_length, self.num_heads, self.head_dim
    zero = jnp.zeros(shape, x.dtype)
    return State(
      jnp.zeros((x.shape[0],), jnp.int32),
      tuple((zero, zero) for _ in self.decoder),
      tuple(look.inner.keys_values(x) for _, look, _ in self.decoder),
      there,
    )

  def initial_state(self, batch: int) -> State:
    """The state in which no document was read."""
    nothing = jnp.zeros((check_size("batch", batch), 1), jnp.int32)
    return self.read(nothing, jnp.zeros((batch, 1), bool))

  def __call__(self, state, inputs, *, mask=None):
    """(state, logits float32 [B, T, V]) of the text's next tokens; zero where
    there is no input.

    Args:
      state: as `read` makes it.
      inputs: int [B, T].
      mask: bool [B, T] or None; False: no token there.

    Raises:
      ValueError: on arguments of wrong shape or dtype, or more inputs than
        `capacity`.
    """
    state, x = self._decode(state, inputs, mask)
    logits = self.head(x)
    if mask is not None:
      logits = jnp.where(mask[..., None], logits, 0)
    return state, logits

  def next_logits(self, state, inputs, *, mask=None, implementation=None):
    """(state, logits float32 [B, V]) after each row's last token."""
    del implementation  # it has one form
    state, x = self._decode(state, inputs, mask)
    return state, self.head(last(x, mask))

  def _decode(self, state, inputs, mask):
    self._check("inputs", inputs, mask)
    if inputs.shape[1] > self.max_length:
      raise ValueError(
        f"Locost: got {inputs.shape[1]} inputs, holds at most "
        f"{self.max_length}; make it with a larger capacity"
      )
    there = jnp.ones(inputs.shape, bool) if mask is None else mask
    place = jax.vmap(
      lambda count, there: positions(count, len(there), mask=there)
    )(state.count, there)
    x = jnp.take(self.embedding[...], jnp.where(there, inputs, 0), axis=0)
    slot = jnp.arange(self.max_length)
    past = slot <= place[..., None]  # [B, T, C]
    distance = place[..., None] - slot
    bias = jnp.take(
      self.bias[...], bucket(distance, self.buckets, self.furthest), axis=0
    )
    bias = jnp.moveaxis(bias, 3, 1)
    document = jnp.broadcast_to(
      state.there[:, None], (*inputs.shape, state.there.shape[1])
    )
    at = jnp.where(there, place, self.max_length)
    put = jax.vmap(lambda held, at, x: held.at[at].set(x, mode="drop"))
    own = []
    for (listen, look, mlp), held, seen in zip(
      self.decoder, state.own, state.document
    ):
      u = listen.norm(x)
      k, v = (
        put(old, at, new) for old, new in zip(held, listen.inner.keys_values(u))
      )
      own.append((k, v))
      x = x + listen.inner(u, k, v, past, bias)
      x = x + look.inner(look.norm(x), *seen, document)
      x = x + mlp.inner(mlp.norm(x))
    state = state._replace(count=place[:, -1] + 1, own=tuple(own))
    return state, self.decoder_norm(x)

  def _check(self, what, tokens, mask):
    shape, kind = jnp.shape(tokens), jnp.result_type(tokens)
    if len(shape) != 2 or not shape[1] or not jnp.issubdtype(kind, jnp.integer):
      raise ValueError(
        f"Locost: {what} must be integer tokens [B, T], got {kind} {shape}"
      )
    layers.check_flags("Locost", shape, None, mask)
