"""One token of a diagonal recurrence, with nothing of memzoo in it.

What `experiments.bench` holds decoding against: the same equations on the same
parameters and states, each as one would write it for a single input by hand.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

sigmoid, silu = jax.nn.sigmoid, jax.nn.silu
complex_ = jax.lax.complex


def fast_and_forgetful(p, s, x):
  new, gate = jnp.split(x @ p["pre"] + p["pre_b"], 2)
  fade = jnp.exp(-jnp.abs(p["alpha"]))[:, None]
  decay = complex_(fade * jnp.cos(p["omega"]), fade * jnp.sin(p["omega"]))
  h = decay * s.s + (new * sigmoid(gate))[:, None].astype(s.s.dtype)
  z = jnp.concatenate([h.real, h.imag], axis=1).ravel()
  z = _layer_norm(z @ p["mix"] + p["mix_b"])
  gate, skip = jnp.split(x @ p["post"] + p["post_b"], 2)
  gate = sigmoid(gate)
  return s._replace(s=h), z * gate + skip * (1 - gate)


def hgrn(p, s, x):
  n = s.h.size
  z = x @ p["w"] + p["b"]
  re, im, mu, g = jnp.split(z, [n, 2 * n, 3 * n])
  keep = sigmoid(mu)
  decay = complex_(keep * jnp.cos(p["theta"]), keep * jnp.sin(p["theta"]))
  write = complex_((1 - keep) * silu(re), (1 - keep) * silu(im))
  h = decay * s.h + write
  y = _layer_norm(silu(g) * jnp.concatenate([h.real, h.imag]))
  y = y * p["norm"] + p["norm_bias"]
  return s._replace(h=h), y @ p["out"] + p["out_bias"]


def lru(p, s, x):
  decay = jnp.exp(complex_(-jnp.exp(p["nu_log"]), jnp.exp(p["theta_log"])))
  gamma = jnp.exp(p["gamma_log"])
  h = decay * s.h + complex_(gamma * (x @ p["b_re"]), gamma * (x @ p["b_im"]))
  y = h.real @ p["c_re"] - h.imag @ p["c_im"] + p["d"] * x
  return s._replace(h=h), y


def mamba(p, s, x):
  e, n = s.h.shape
  u, z = jnp.split(x @ p["in"], 2)
  taps = jnp.concatenate([s.conv, u[None]])
  u = silu(jnp.sum(taps * p["conv"], axis=0) + p["conv_bias"])
  rank = p["dt"].shape[0]
  low, b, c = jnp.split(u @ p["select"], [rank, rank + n])
  dt = jax.nn.softplus(low @ p["dt"] + p["dt_bias"])
  decay = jnp.exp(-dt[:, None] * jnp.exp(p["a_log"]))
  h = decay * s.h + (dt * u)[:, None] * b
  y = (h @ c + p["d"] * u) * silu(z)
  return s._replace(h=h, conv=taps[1:]), y @ p["out"]


def min_gru(p, s, x):
  z, new = jnp.split(x @ p["w"] + p["b"], 2)
  z = sigmoid(z)
  h = (1 - z) * s.h + z * _positive(new)
  return s._replace(h=h), h @ p["out"]


def min_lstm(p, s, x):
  f, i, new = jnp.split(x @ p["w"] + p["b"], 3)
  f, i = sigmoid(f), sigmoid(i)
  h = (f * s.h + i * _positive(new)) / (f + i)
  return s._replace(h=h), h @ p["out"]


def qrnn(p, s, x):
  w = p["w"]
  z, f, o = jnp.split(s.conv[0] @ w[0] + x @ w[1] + p["b"], 3)
  f = sigmoid(f)
  c = f * s.c + (1 - f) * jnp.tanh(z)
  return s._replace(c=c, conv=x[None]), sigmoid(o) * c


def rg_lru(p, s, x):
  u, gate = jnp.split(x @ p["in"] + p["in_bias"], 2)
  taps = jnp.concatenate([s.conv, u[None]])
  u = jnp.sum(taps * p["conv"], axis=0) + p["conv_bias"]
  r, i = jnp.split(sigmoid(u @ p["gates"] + p["gates_bias"]), 2)
  decay = jnp.exp(-8 * r * jax.nn.softplus(-p["lam"]))
  h = decay * s.h + jnp.sqrt(1 - decay**2) * i * u
  s = s._replace(h=h, conv=taps[1:], seen=jnp.ones_like(s.seen))
  return s, (h * jax.nn.gelu(gate)) @ p["out"] + p["out_bias"]


def s4d(p, s, x):
  a = complex_(-jnp.exp(p["log_re"]), p["im"])
  decay = jnp.exp(a * jnp.exp(p["log_dt"])[:, None].astype(a.dtype))
  write = (decay - 1) / a * complex_(p["b_re"], p["b_im"])
  h = decay * s.h + write * x[:, None].astype(a.dtype)
  y = 2 * jnp.sum(h.real * p["c_re"] - h.imag * p["c_im"], axis=1)
  return s._replace(h=h), y + p["d"] * x


def s5(p, s, x):
  a = complex_(p["re"], p["im"])
  decay = jnp.exp(a * jnp.exp(p["log_dt"]).astype(a.dtype))
  write = complex_(x @ p["b_re"], x @ p["b_im"])
  h = decay * s.h + (decay - 1) / a * write
  y = 2 * (h.real @ p["c_re"] - h.imag @ p["c_im"]) + p["d"] * x
  return s._replace(h=h), y


def _positive(x):
  return jnp.where(x >= 0, x + 0.5, sigmoid(x))


def _layer_norm(x):
  x = x - jnp.mean(x)
  return x * jax.lax.rsqrt(jnp.mean(x * x) + 1e-5)


#: Registry name -> (params, state, x [D]) -> (state, y [D]), at the options of
#: `bench_cases.diagonal_cells`.
STEPS: dict[str, Callable[..., tuple[Any, jax.Array]]] = {
  step.__name__: step
  for step in (
    fast_and_forgetful, hgrn, lru, mamba, min_gru, min_lstm, qrnn, rg_lru, s4d,
    s5,
  )
}  # fmt: skip
