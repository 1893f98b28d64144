"""Mamba against Gu and Dao 2023 (arXiv:2312.00752), algorithm 2 and eq. 2."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import ops


def silu(x):
  return x / (1 + np.exp(-x))


def paper(cell, params, us):
  """Section 3.4's block around algorithm 2, one token and one channel at a
  time: Ā = exp(ΔA) (4), B̄ = ΔB, h = Ā h + B̄ x (2a), y = C h (2b)."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  width, channels = p["conv"].shape
  n, r = cell.d_state, p["dt"].shape[0]
  h = np.zeros((channels, n))
  seen = [np.zeros(channels)] * (width - 1)
  ys = []
  for u in np.asarray(us, np.float64):
    xz = u @ p["in"]
    seen = [*seen, xz[:channels]]
    x = p["conv_bias"] + sum(k * s for k, s in zip(p["conv"], seen[-width:]))
    x, z = silu(x), xz[channels:]
    low, b, c = np.split(x @ p["select"], [r, r + n])
    if (eps := cell.select_norm) is not None:  # Falcon Mamba
      low, b, c = (z / np.sqrt(np.mean(z * z) + eps) for z in (low, b, c))
    delta = np.log1p(np.exp(low @ p["dt"] + p["dt_bias"]))
    y = np.zeros(channels)
    for e in range(channels):
      a = -np.exp(p["a_log"][e])
      h[e] = np.exp(delta[e] * a) * h[e] + delta[e] * b * x[e]
      y[e] = c @ h[e] + p["d"][e] * x[e]
    ys.append((y * silu(z)) @ p["out"])
  return (h, np.stack(seen[1 - width :])), np.stack(ys)


@pytest.mark.parametrize(
  "options",
  (dict(), dict(conv_size=4, dt_rank=None), dict(select_norm=1e-3)),
)
def test_paper_equation(options):
  cell = memzoo.tiny("mamba", **options)
  params = cell.init(jax.random.key(0))
  params["d"] += 0.3 * jnp.arange(9.0)
  params["a_log"] += 0.2 * jax.random.normal(jax.random.key(2), (9, 5))
  us = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  want, ys_want = paper(cell, params, us)
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  forms = ("step", "scan", "chunk")
  for form, (state, ys) in zip(forms, jax.jit(lambda: list(map(run, forms)))()):
    got = (state.h, state.conv), ys
    assert checks.relative(got, (want, ys_want)) < checks.FORWARD, form


def test_more_than_one_block():
  """T = 131 is three blocks, of which the last is padded."""
  cell = memzoo.tiny("mamba")
  params = cell.init(jax.random.key(0))
  us = jax.random.normal(jax.random.key(1), (131, cell.d_model))
  reset = jnp.zeros(131, bool).at[jnp.array([44, 90])].set(True)

  def run(form, params):
    state, ys = memzoo.scan(
      cell, params, None, us, reset=reset, implementation=form
    )
    return checks.wave(state.h, state.conv, ys), (state, ys)

  grad = lambda form: jax.grad(functools.partial(run, form), has_aux=True)
  forms = ("step", "scan")
  (want_grads, want), (grads, got) = jax.jit(
    lambda p: [grad(form)(p) for form in forms]
  )(params)
  assert checks.relative(got, want) < checks.FORWARD
  assert checks.relative(grads, want_grads) < checks.GRADIENT


def test_initialization():
  """A = −(1 … N); softplus(dt_bias) log-uniform in [1e-3, 0.1]; R = ⌈D/16⌉."""
  cell = memzoo.make("mamba", d_model=1000, d_state=3)
  params = jax.jit(cell.init)(jax.random.key(0))
  a = -np.exp(params["a_log"])
  np.testing.assert_allclose(a, np.tile([-1.0, -2, -3], (2000, 1)), rtol=1e-6)
  dt = np.log10(np.asarray(jax.nn.softplus(params["dt_bias"]), np.float64))
  tenths = np.linspace(0.1, 0.9, 9)
  np.testing.assert_allclose(np.quantile(dt, tenths), 2 * tenths - 3, atol=0.1)
  assert params["dt"].shape == (63, 2000)
  assert np.abs(params["dt"]).max() <= 63**-0.5


def selective_copy(key, length=10):
  """Two symbols at random times among other inputs, then two places to repeat
  them: input [symbol 3, other 3, is one, first query, second query]."""
  k_when, k_symbol, k_noise = jax.random.split(key, 3)
  when = jnp.sort(jax.random.choice(k_when, length, (2,), replace=False))
  symbols = jax.random.randint(k_symbol, (2,), 0, 3)
  noise = jax.random.randint(k_noise, (length,), 0, 3)
  xs = jnp.zeros((length + 2, 9))
  xs = xs.at[jnp.arange(length), 3 + noise].set(1.0)
  xs = xs.at[when].set(0.0)
  xs = xs.at[when, symbols].set(1.0).at[when, 6].set(1.0)
  xs = xs.at[length, 7].set(1.0).at[length + 1, 8].set(1.0)
  targets = jnp.zeros(length + 2, jnp.int32).at[length:].set(symbols)
  return xs, targets, jnp.zeros(length + 2).at[length:].set(1.0)


def test_signature_behaviour():
  """Selectivity: a step Δ → 0 leaves the state as it is, a large one leaves
  nothing of it; and a layer learns to copy symbols from times that vary, past
  the inputs between them, which needs both."""
  r = np.random.default_rng(0)
  f = lambda *s: jnp.asarray(r.normal(size=s), jnp.float32)
  h, x, b, c, a = f(3, 5), f(4, 3), f(4, 5), f(4, 5), -jnp.ones((3, 5))
  for form in ("scan", "chunk"):
    run = jax.jit(functools.partial(ops.selective_scan, implementation=form))
    ignored, _ = run(h, x, jnp.zeros((4, 3)), a, b, c)
    np.testing.assert_array_equal(ignored, h)
    ends = [run(s, x, jnp.full((4, 3), 200.0), a, b, c)[0] for s in (h, 0 * h)]
    np.testing.assert_array_equal(*ends)
    np.testing.assert_allclose(
      ends[0], 200 * jnp.outer(x[-1], b[-1]), rtol=1e-5
    )

  cell = memzoo.make("mamba", d_model=9, d_state=4)
  _, accuracy = checks.learn(cell, selective_copy, 250, rate=2e-2)
  assert accuracy > 0.95, accuracy


@pytest.mark.parametrize("form", ("scan", "chunk"))
def test_memory_budget(form):
  """B=1, T=4096, width 64, forward and backward, under 25 MB: one [T, E, N]
  alone is 33.5 MB."""
  cell = memzoo.make("mamba", d_model=64)
  assert (cell.d_inner, cell.d_state) == (128, 16)
  params = jax.eval_shape(cell.init, jax.random.key(0))
  xs = jax.ShapeDtypeStruct((1, 4096, 64), jnp.float32)

  def loss(params, xs):
    run = lambda x: memzoo.scan(cell, params, None, x, implementation=form)[1]
    return jnp.sum(jax.vmap(run)(xs) ** 2)

  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, xs).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 25e6


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(d_state=0), "d_state must be a positive integer"),
    (dict(expand=0.3), "must be a positive whole number"),
    (dict(dt_rank=-1), "dt_rank must be a positive integer"),
    (dict(dt_min=0.2), "0 < dt_min <= dt_max"),
    (dict(select_norm=0.0), "select_norm is the eps of a norm, above 0"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="Mamba: .*" + message):
    memzoo.make("mamba", d_model=4, **options)
