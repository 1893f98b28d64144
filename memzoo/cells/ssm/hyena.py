"""Hyena: long convolutions with implicit filters, and gates."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core import cell, initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, chunk
from memzoo.ops.conv import conv, step as conv_step
from memzoo.ops.selective_scan import even_blocks

# The window of the authors' code: channels decay to a hundredth after these
# shares of the filter's length.
_SLOW, _FAST, _TARGET = 1.5, 0.3, 1e-2


class State(NamedTuple):
  z: jax.Array  # [O, L − 1, D] float32: the last inputs of each long filter
  conv: jax.Array  # [W − 1, (O + 1) D] float32: those of the short one


class Inputs(NamedTuple):
  u: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


@register(
  "hyena",
  family="ssm",
  year=2023,
  paper="Poli et al. 2023, arXiv:2302.10866",
  write="inputs, for a long filter",
  evidence="silver",
  tiny=dict(d_model=5, length=9, filter_width=7, bands=2),
)
@dataclasses.dataclass(frozen=True)
class Hyena(cell.Cell):
  """Hyena: O times a long convolution, then a gate by another projection.

    x¹ … x^O, v = conv_W(W_in u)
    z¹_t = v_t ,  z^{n+1}_t = x^n_t ⊙ ((h^n ∗ z^n)_t + s^n ⊙ z^n_t)
    y_t = W_out z^{O+1}_t
    h_t = Window(t) ⊙ FFN(PositionalEncoding(t)) ,  t = 0 … L − 1

  The filters are not stored: a small network with sines gives tap t of all of
  them from t / L and its Fourier features. Window(t) = exp(−α t / L), with a
  rate α of its own for every channel. A filter has L taps, so that an input
  is felt for O (L − 1) + W − 1 steps more, and then not at all.

  State: z [O, L − 1, D], conv [W − 1, (O + 1) D] float32, from zero: a bounded
    store of inputs, as a recurrence of fixed size does not exist.
  Params: in [D, (O + 1) D], in_bias, short [W, (O + 1) D], short_bias, ffn_in
    [E, F], ffn_in_bias [F], ffn [2, F, F], ffn_bias [2, F], ffn_out [F, O D],
    frequency [F], skip [O, D], out [D, D], out_bias [D]; E = 1 + 2 bands.
  Forms: step O(L (F² + O D)) a token, of which L F² makes the filters; scan
    makes them once and takes O(O L D) a token, in checkpointed blocks; fft
    O(O D T log T), the paper's: no reset, and about 1e-7 of a later input
    reaches an output.
  Differs: O long filters, as the definition has it; the authors' code, whose
    order 2 is one long filter between two gates, leaves out the first. Windows
    and FFN as in their code; positional features are not trained. Inputs more
    than L back are gone, where the code refuses longer sequences.
  Paper: Poli, Massaroli, Nguyen, Fu, Dao, Baccus, Bengio, Ermon, Ré 2023,
    "Hyena Hierarchy: Towards Larger Convolutional Language Models",
    arXiv:2302.10866, section 3: definition of the order-N operator, filters.
  """

  d_model: int
  length: int = 64
  order: int = 2
  short_size: int = 3
  filter_width: int = 16
  bands: int = 8

  implementations: ClassVar[tuple[str, ...]] = ("scan", "fft")
  convolutions: ClassVar[tuple[str, ...]] = ("fft",)

  def __post_init__(self):
    arguments.check_positive(
      self, "d_model", "length", "order", "short_size", "filter_width", "bands"
    )

  def init(self, key) -> dict[str, Any]:
    d, o, f, w = self.d_model, self.order, self.filter_width, self.short_size
    inner, features = (o + 1) * d, 1 + 2 * self.bands
    keys = jax.random.split(key, 9)
    draw = initializers.lecun_normal
    uniform = lambda k, shape, fan: initializers.uniform(k, shape, fan**-0.5)
    return {
      "in": draw(keys[0], (d, inner)),
      "in_bias": jnp.zeros((inner,)),
      "short": uniform(keys[1], (w, inner), w),
      "short_bias": jnp.zeros((inner,)),
      "ffn_in": uniform(keys[2], (features, f), features),
      "ffn_in_bias": uniform(keys[3], (f,), features),
      "ffn": uniform(keys[4], (2, f, f), f),
      "ffn_bias": uniform(keys[5], (2, f), f),
      "ffn_out": uniform(keys[6], (f, o * d), f),
      "frequency": jnp.ones((f,)),
      "skip": jax.random.normal(keys[7], (o, d)),
      "out": draw(keys[8], (d, d)),
      "out_bias": jnp.zeros((d,)),
    }

  def initial_state(self, params, key=None) -> State:
    d, o = self.d_model, self.order
    return State(
      jnp.zeros((o, self.length - 1, d)),
      jnp.zeros((self.short_size - 1, (o + 1) * d)),
    )

  def step(self, params, state, x):
    taps = self._filters(params)
    u = self._project(params, x)
    buffer, u = conv_step(state.conv, u, params["short"], params["short_bias"])
    *gates, v = jnp.split(u, self.order + 1)
    kept = []
    for n, gate in enumerate(gates):
      z, v = conv_step(state.z[n], v, taps[n])
      kept.append(z)
      v = gate * v
    return State(jnp.stack(kept), buffer), self._read_out(params, v, x)

  def parallel(self, params, state, xs, reset, mask, implementation):
    taps = self._filters(params)
    inputs = Inputs(self._project(params, xs), reset, mask)

    def run(state, i, taps, form):
      flags = dict(reset=i.reset, mask=i.mask)
      buffer, u = conv(
        state.conv, i.u, params["short"], params["short_bias"], **flags
      )
      *gates, v = jnp.split(u, self.order + 1, axis=1)
      kept = []
      for n, gate in enumerate(gates):
        z, v = conv(state.z[n], v, taps[n], implementation=form, **flags)
        kept.append(z)
        v = gate * v
      return State(jnp.stack(kept), buffer), v

    if implementation == "fft":
      state, v = run(state, inputs, taps, "fft")
    else:
      state, v = chunk.run(
        lambda s, i, taps: run(s, i, taps, "scan"),
        state,
        inputs,
        taps,
        chunk_size=even_blocks(xs.shape[0]),
      )
    return state, self._read_out(params, v, xs)

  def _project(self, params, x):
    u = dot(x, params["in"]).astype(jnp.float32)
    return u + params["in_bias"].astype(jnp.float32)

  def _read_out(self, params, z, x):
    y = dot(z.astype(x.dtype), params["out"])
    return y + params["out_bias"].astype(x.dtype)

  def _filters(self, params):
    """h + s at lag 0, float32 [O, L, D], the newest tap last."""
    p = {k: x.astype(jnp.float32) for k, x in params.items()}
    length, width = self.length, self.order * self.d_model
    lag = np.arange(length)
    t = lag / max(length - 1, 1)
    band = np.linspace(1e-4, max(self.bands - 1, 1e-4), self.bands)
    angle = 2 * math.pi * lag[:, None] / length * band
    features = [t[:, None], np.cos(angle), -np.sin(angle)]
    h = jnp.asarray(np.concatenate(features, 1), jnp.float32)
    h = jnp.sin(p["frequency"] * (h @ p["ffn_in"] + p["ffn_in_bias"]))
    for w, b in zip(p["ffn"], p["ffn_bias"]):
      h = jnp.sin(p["frequency"] * (h @ w + b))
    rate = np.linspace(1 / _SLOW, 1 / _FAST, width) * -math.log(_TARGET)
    window = jnp.asarray(np.exp(-t[:, None] * rate), jnp.float32)
    h = (window * (h @ p["ffn_out"])).reshape(length, self.order, -1)
    return jnp.swapaxes(h.at[0].add(p["skip"]), 0, 1)[:, ::-1]
