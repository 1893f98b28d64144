"""QRNN against Bradbury et al. 2017 (arXiv:1611.01576), section 2."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def paper(cell, params, xs):
  """The masked convolutions over the whole sequence, then the pooling."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  xs, k, d = np.asarray(xs, np.float64), cell.kernel_size, cell.d_model
  padded = np.concatenate([np.zeros((k - 1, d)), xs])
  y = sum(padded[j : j + len(xs)] @ p["w"][j] for j in range(k)) + p["b"]
  z, f, *rest = np.split(y, y.shape[1] // d, axis=1)
  z, f = np.tanh(z), sigmoid(f)
  o = sigmoid(rest[0]) if rest else np.ones_like(f)
  i = sigmoid(rest[1]) if len(rest) > 1 else 1 - f
  c, hs = np.zeros(d), []
  for t in range(len(xs)):
    c = f[t] * c + i[t] * z[t]
    hs.append(o[t] * c)
  return c, np.stack(hs)


@pytest.mark.parametrize(
  "pooling, kernel_size", (("f", 1), ("fo", 2), ("ifo", 3))
)
def test_paper_equation(pooling, kernel_size):
  cell = memzoo.tiny("qrnn", pooling=pooling, kernel_size=kernel_size)
  params, xs = checks.drawn(cell), checks.inputs(cell, 19)
  want = paper(cell, params, xs)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((state.c, ys), want) < checks.FORWARD, form
    last = np.asarray(xs)[len(xs) - kernel_size + 1 :]
    np.testing.assert_array_equal(state.conv, last)


def test_a_reset_clears_the_convolution():
  """After it the taps are zeros, as at the start, and inputs that are not
  there are none of the last k."""
  cell = memzoo.tiny("qrnn")
  params, xs = checks.drawn(cell), jnp.asarray(checks.inputs(cell, 9))
  mask = jnp.ones((9,), bool).at[5].set(False)
  reset = jnp.zeros((9,), bool).at[4].set(True)
  there = jnp.array([4, 6, 7, 8])
  _, alone = memzoo.scan(cell, params, None, xs[there])
  for form in ("step", "scan"):
    _, ys = memzoo.scan(
      cell, params, None, xs, reset=reset, mask=mask, implementation=form
    )
    np.testing.assert_allclose(ys[there], alone, rtol=1e-5, atol=1e-6)


def bit_after_the_mark(key):
  """As `marked_bit`, but the bit comes one input after its mark."""
  xs, targets, weights = checks.marked_bit(key)
  xs = xs.at[:, 0].set(jnp.roll(xs[:, 0], 1))
  return xs, targets, jnp.concatenate([jnp.zeros(1), weights[:-1]])


def test_signature_behaviour():
  """Gates see the last k inputs and no more: with k = 2 it learns to hold the
  bit that follows a mark, with k = 1 it cannot. With f = 1 what is held is
  held to the bit."""
  cell = memzoo.tiny("qrnn", kernel_size=3, pooling="f")
  params, xs = checks.drawn(cell), jnp.asarray(checks.inputs(cell, 8))
  wide = lambda f: params | {"b": params["b"].at[5:].set(f)}
  last = lambda xs: memzoo.scan(cell, wide(-200.0), None, xs)[1][-1]
  seen = jnp.abs(jax.jacobian(last)(xs)).sum((0, 2)) > 0
  np.testing.assert_array_equal(seen, jnp.arange(8) >= 5)
  start = cell.initial_state(params)._replace(c=jnp.linspace(-1.0, 1.0, 5))
  kept, _ = memzoo.scan(cell, wide(200.0), start, xs)
  np.testing.assert_array_equal(kept.c, start.c)

  accuracy = {}
  for k in (1, 2):
    cell = memzoo.make("qrnn", d_model=6, kernel_size=k)
    accuracy[k] = checks.learn(cell, bit_after_the_mark, 400, rate=3e-2)[1]
  assert accuracy[2] > 0.95 and accuracy[1] < 0.8, accuracy


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(kernel_size=0), "kernel_size must be a positive integer"),
    (dict(pooling="if"), "pooling must be one of .*, got 'if'"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="QRNN: .*" + message):
    memzoo.make("qrnn", d_model=4, **options)
