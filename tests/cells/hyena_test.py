"""Hyena against Poli et al. 2023 (arXiv:2302.10866), section 3."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def filters(cell, p):
  """h^n_t = Window(t) FFN(PositionalEncoding(t)) for t = 0 … L − 1, [O, L, D]."""
  length, width = cell.length, cell.order * cell.d_model
  out = np.zeros((length, width))
  for t in range(length):
    share = t / (length - 1)
    bands = np.linspace(1e-4, cell.bands - 1, cell.bands)
    turns = np.exp(-1j * bands * 2 * np.pi * t / length)
    x = np.concatenate([[share], turns.real, turns.imag])
    x = np.sin(p["frequency"] * (x @ p["ffn_in"] + p["ffn_in_bias"]))
    for w, b in zip(p["ffn"], p["ffn_bias"]):
      x = np.sin(p["frequency"] * (x @ w + b))
    # Down to 0.01 after 1.5 lengths in the first channel, 0.3 in the last.
    rates = np.linspace(np.log(100) / 1.5, np.log(100) / 0.3, width)
    out[t] = np.exp(-share * rates) * (x @ p["ffn_out"])
  return np.moveaxis(out.reshape(length, cell.order, -1), 1, 0)


def paper(cell, params, us):
  """z^{n+1}_t = x^n_t (h^n ∗ z^n)_t, the convolutions as sums over the past."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  us = np.asarray(us, np.float64)
  h, taps, length = filters(cell, p), cell.short_size, len(us)
  x = us @ p["in"] + p["in_bias"]
  u = np.zeros_like(x)
  for t in range(length):
    for lag in range(min(taps, t + 1)):
      u[t] += p["short"][taps - 1 - lag] * x[t - lag]
  *gates, z = np.split(u + p["short_bias"], cell.order + 1, axis=1)
  for n, gate in enumerate(gates):
    long = np.zeros_like(z)
    for t in range(length):
      for lag in range(min(cell.length, t + 1)):
        long[t] += h[n, lag] * z[t - lag]
    z = gate * (long + p["skip"][n] * z)
  return z @ p["out"] + p["out_bias"]


def test_paper_equation():
  cell = memzoo.tiny("hyena")
  params, us = checks.drawn(cell), checks.inputs(cell, 21)
  want = paper(cell, params, us)
  forms = ("step", *cell.implementations)
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (_, ys) in zip(forms, outs):
    error = checks.relative(ys, want)
    assert error < checks.FORWARD, (form, error)


def test_signature_behaviour():
  """A filter as long as is asked for from as many parameters; an input is felt
  for O (L − 1) + W − 1 steps and then not at all; and a copy from far beyond
  the short convolution is learnt."""
  count = lambda length: sum(
    x.size
    for x in jax.tree.leaves(
      memzoo.make("hyena", d_model=4, length=length).init(jax.random.key(0))
    )
  )
  assert count(16) == count(1024)

  cell = memzoo.tiny("hyena")
  params, us = checks.drawn(cell), checks.inputs(cell, 30)
  run = jax.jit(lambda us: memzoo.scan(cell, params, None, us)[1])
  change = np.abs(
    run(us) - run(us.copy() + 3.0 * (np.arange(30) == 2)[:, None])
  )
  last = 2 + cell.order * (cell.length - 1) + cell.short_size - 1
  assert change[:2].max() == 0 and change[last + 1 :].max() == 0
  assert change[last - 4 : last + 1].max() > 0

  def bits(key):
    bits = jax.random.bernoulli(key, 0.5, (24,))
    xs = jnp.zeros((24, 6)).at[:, 0].set(jnp.where(bits, 1.0, -1.0))
    xs = xs.at[:, 1].set(1.0)
    targets = jnp.roll(bits, 9).astype(jnp.int32)
    return xs, targets, (jnp.arange(24) >= 9).astype(jnp.float32)

  cell = memzoo.make("hyena", d_model=6, length=16)
  _, accuracy = checks.learn(cell, bits, 300)
  assert accuracy > 0.9, accuracy


@pytest.mark.parametrize("option", ("length", "order", "bands", "short_size"))
def test_bad_options(option):
  message = f"Hyena: {option} must be a positive integer"
  with pytest.raises(ValueError, match=message):
    memzoo.make("hyena", d_model=4, **{option: 0})
