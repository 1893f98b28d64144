"""The simple recurrent network against Elman 1990."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def paper(params, xs, activation):
  """The hidden units' activation from the input and the context units, which
  then copy it; they start at 0.5 (section "Exclusive-OR")."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  f = np.tanh if activation == "tanh" else lambda a: 1 / (1 + np.exp(-a))
  context, ys = np.full(p["b"].shape, f(0.0)), []
  for x in np.asarray(xs, np.float64):
    hidden = f(p["w"].T @ x + p["u"].T @ context + p["b"])
    ys.append(hidden)
    context = hidden
  return context, np.stack(ys)


@pytest.mark.parametrize("activation", ["logistic", "tanh"])
def test_paper_equation(activation):
  cell = memzoo.tiny("elman", activation=activation)
  params, xs = checks.drawn(cell), checks.inputs(cell, 9)
  want = paper(params, xs, activation)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((state.h, ys), want) < checks.FORWARD, form


def exclusive_or(key, count=8):
  """The paper's first task: bits, of which every third is the exclusive or of
  the two before, to be predicted; the other two cannot be."""
  pairs = jax.random.bernoulli(key, 0.5, (count, 2))
  thirds = jnp.logical_xor(pairs[:, :1], pairs[:, 1:])
  bits = jnp.concatenate([pairs, thirds], axis=1).ravel()
  xs = jnp.zeros((bits.size - 1, 6)).at[:, 0].set(jnp.where(bits[:-1], 1.0, 0))
  known = jnp.arange(bits.size - 1) % 3 == 1
  return xs, bits[1:].astype(jnp.int32), known.astype(jnp.float32)


def test_signature_behaviour():
  """It predicts every third bit, for which it must remember a bit and count
  to three; of the others it predicts nothing, and without context units, a
  coin's part of the thirds."""
  cell = checks.ReadOut(memzoo.tiny("elman"))
  params, accuracy = checks.learn(cell, exclusive_or, 500, rate=3e-2)
  assert accuracy > 0.97, accuracy
  keys = jax.random.split(jax.random.key(9), 200)
  xs, targets, known = jax.vmap(exclusive_or)(keys)
  answer = lambda p: jax.jit(
    jax.vmap(lambda x: jnp.argmax(memzoo.scan(cell, p, None, x)[1], -1))
  )(xs)
  right = np.asarray(answer(params) == targets)
  rest = np.asarray(known) == 0
  assert abs(right[rest].mean() - 0.5) < 0.05, right[rest].mean()
  blind = {**params["cell"], "u": jnp.zeros((6, 6))}
  blind = answer({**params, "cell": blind})
  guessed = np.asarray(blind == targets)[~rest].mean()
  assert abs(guessed - 0.5) < 0.07, guessed


def test_bad_options():
  with pytest.raises(ValueError, match="activation must be .*got 'relu'"):
    memzoo.make("elman", d_model=4, activation="relu")
  with pytest.raises(ValueError, match="d_model must be a positive integer"):
    memzoo.make("elman", d_model=0)
