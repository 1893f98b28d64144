"""S4: structured state spaces."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core import cell, initializers
from memzoo.core.registry import register
from memzoo.ops import arguments, hippo
from memzoo.ops.state_space import power, state_space


class State(NamedTuple):
  h: jax.Array  # [D, N] float32: N / 2 real parts, then the imaginary ones


class Space(NamedTuple):
  """The continuous system, of one state of each conjugate pair."""

  a: jax.Array  # Λ [D, M] complex64, M = N / 2
  p: jax.Array  # P [D, M] complex64
  b: jax.Array  # B [D, M] complex64
  c: jax.Array  # C [D, M] complex64
  rate: jax.Array  # 2 / Δ [D, 1] complex64


@register(
  "s4",
  family="ssm",
  year=2021,
  paper="Gu et al. 2021, arXiv:2111.00396",
  write="continuous-time projection",
  evidence="silver",
  tiny=dict(d_model=5, d_state=6, dt_min=0.05, dt_max=0.5),
)
@dataclasses.dataclass(frozen=True)
class S4(cell.Cell):
  """S4: HiPPO's state space, normal plus low-rank: a recurrence and a kernel.

    x'(t) = A x(t) + B u(t) ,  y(t) = C x(t) + D u(t) ,  A = Λ − P P*
    x_k = Ā x_{k−1} + B̄ u_k ,  y_k = C x_k + D u_k
    Ā = A₁ A₀ ,  B̄ = 2 A₁ B
    A₀ = (2/Δ) I + Λ − P P*
    A₁ = R − R P (1 + P* R P)⁻¹ P* R ,  R = ((2/Δ) I − Λ)⁻¹
    K̂(z) = 2/(1 + z) (C̃ R(z) B − C̃ R(z) P (1 + P* R(z) P)⁻¹ P* R(z) B)
    R(z) = ((2/Δ) (1 − z)/(1 + z) − Λ)⁻¹ ,  C̃ = C (I − Ā^L) ,  z^L = 1
    y = K ∗ u + D u ,  K the inverse Fourier transform of K̂

  Ā and B̄ are the bilinear transform by Woodbury's identity, and K̂ the kernel's
  generating function. The N numbers of a channel are N / 2 conjugate pairs, of
  which one each is kept; sums over states are of both. At the start Λ, P, B are
  those of HiPPO-LegS in the basis where its normal part is diagonal.

  State: h [D, N] float32, from zero: real and imaginary parts of x.
  Params: log_dt [D], log_re, im, p_re, p_im, b_re, b_im, c_re, c_im [D, N/2],
    d [D]; Λ = −exp(log_re) + i im. Δ is log-uniform in [dt_min, dt_max], C and
    D normal with variance 1.
  Forms: step O(DN) a token, the paper's recurrence; scan O(D N²), with Ā once
    as [D, N, N], real, in checkpointed blocks; chunk by powers of that Ā, in
    T / 16 serial steps of matmuls; fft the paper's convolution, with K in
    O(D T N) by Cauchy products: no reset, and about 1e-7 of a later input
    reaches an output.
  Differs: C is the parameter, as in the paper's equations; the authors' code
    learns C̃ of one fixed L. The GELU and map over channels that follow are the
    model's. P is the same on both sides, the form of Goel et al. 2022
    (arXiv:2202.09729) that the authors' code took over.
  Paper: Gu, Goel, Ré 2021, "Efficiently Modeling Long Sequences with Structured
    State Spaces", arXiv:2111.00396, section 3, appendix C (C.2: recurrence,
    C.3: convolution).
  """

  d_model: int
  d_state: int = 64
  dt_min: float = 1e-3
  dt_max: float = 0.1

  op: ClassVar[str] = "state_space"
  implementations: ClassVar[tuple[str, ...]] = ("scan", "chunk", "fft")
  convolutions: ClassVar[tuple[str, ...]] = ("fft",)

  def __post_init__(self):
    arguments.check_positive(self, "d_model", "d_state")
    if self.d_state % 2:
      raise ValueError(f"S4: d_state must be even, got {self.d_state}")
    if not 0 < self.dt_min <= self.dt_max:
      raise ValueError(
        "S4: needs 0 < dt_min <= dt_max, got "
        f"dt_min={self.dt_min!r}, dt_max={self.dt_max!r}"
      )

  def init(self, key) -> dict[str, Any]:
    d, m = self.d_model, self.d_state // 2
    keys = jax.random.split(key, 4)
    a, p, b, _ = hippo.legs_dplr(self.d_state)
    real = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), (d, m))
    normal = lambda k: jax.random.normal(k, (d, m)) * math.sqrt(0.5)
    dt = initializers.log_uniform(keys[0], (d,), self.dt_min, self.dt_max)
    return {
      "log_dt": jnp.log(dt),
      "log_re": real(np.log(-a.real)),
      "im": real(a.imag),
      "p_re": real(p.real),
      "p_im": real(p.imag),
      "b_re": real(b.real),
      "b_im": real(b.imag),
      "c_re": normal(keys[1]),
      "c_im": normal(keys[2]),
      "d": jax.random.normal(keys[3], (d,)),
    }

  def initial_state(self, params, key=None) -> State:
    return State(jnp.zeros((self.d_model, self.d_state)))

  def step(self, params, state, x):
    s = _space(params)
    re, im = jnp.split(state.h, 2, axis=1)
    h = _step(s, jax.lax.complex(re, im), x.astype(jnp.float32))
    y = jnp.sum(2 * (s.c * h).real, axis=1).astype(x.dtype)
    return State(_parts(h)), y + params["d"].astype(x.dtype) * x

  def parallel(self, params, state, xs, reset, mask, implementation):
    s = _space(params)
    transition, write, read = _dense(s)
    kernel = None
    if implementation == "fft":
      kernel = _kernel(s, transition, xs.shape[0])
    h, y = state_space(
      state.h, xs, transition=transition, write=write, read=read, reset=reset,
      mask=mask, kernel=kernel, implementation=implementation,
    )  # fmt: skip
    return State(h), y + params["d"].astype(xs.dtype) * xs


def _space(params) -> Space:
  real = {k: x.astype(jnp.float32) for k, x in params.items()}
  pair = lambda name: jax.lax.complex(real[name + "_re"], real[name + "_im"])
  a = jax.lax.complex(-jnp.exp(real["log_re"]), real["im"])
  rate = 2 * jnp.exp(-real["log_dt"])[:, None].astype(a.dtype)
  return Space(a, pair("p"), pair("b"), pair("c"), rate)


def _parts(x):
  return jnp.concatenate([x.real, x.imag], axis=-1)


def _step(s: Space, h, u):
  """A₁ (A₀ x + 2 B u): h [..., D, M] complex64, u [..., D]."""
  both = lambda x: jnp.sum(x + x.conj(), axis=-1, keepdims=True)
  inverse = 1 / (s.rate - s.a)
  h = (
    (s.rate + s.a) * h
    - s.p * both(s.p.conj() * h)
    + 2 * s.b * u[..., None].astype(h.dtype)
  )
  share = both(s.p.conj() * inverse * h) / (
    1 + both(s.p.conj() * inverse * s.p)
  )
  return inverse * (h - s.p * share)


def _dense(s: Space):
  """Ā [D, N, N], B̄ [D, N], C [D, N] on real and imaginary parts."""
  width, size = s.a.shape
  eye = jnp.eye(2 * size)
  units = jax.lax.complex(eye[:, :size], eye[:, size:])[:, None]
  units = jnp.broadcast_to(units, (2 * size, width, size))
  columns = _parts(_step(s, units, jnp.zeros((width,))))
  write = _parts(_step(s, jnp.zeros_like(s.b), jnp.ones((width,))))
  read = 2 * jnp.concatenate([s.c.real, -s.c.imag], axis=1)
  return jnp.moveaxis(columns, 0, 2), write, read


def _kernel(s: Space, transition, length: int):
  """K [T, D], by its generating function on the roots of unity."""
  # C̃, real parts and imaginary ones: rows of I − Ā^L.
  read = 2 * jnp.concatenate([s.c.real, -s.c.imag], axis=1)
  rows = read - power(jnp.swapaxes(transition, 1, 2), length, read)
  re, im = jnp.split(rows / 2, 2, axis=1)
  c = jax.lax.complex(re, -im)
  # All over (1 + z), which is zero at z = −1.
  angle = -2 * np.pi * np.arange(length // 2 + 1) / length
  z = jnp.asarray(np.exp(1j * angle), jnp.complex64)[:, None, None]
  pole = s.rate * (1 - z)
  one, other = 1 / (pole - (1 + z) * s.a), 1 / (pole - (1 + z) * s.a.conj())

  def cauchy(left, right):
    product = left * right
    return jnp.sum(product * one + product.conj() * other, axis=-1)

  z, p = z[..., 0], s.p.conj()
  low = cauchy(c, s.p) * cauchy(p, s.b) / (1 + (1 + z) * cauchy(p, s.p))
  spectrum = 2 * (cauchy(c, s.b) - (1 + z) * low)
  return jnp.fft.irfft(spectrum, n=length, axis=0)
