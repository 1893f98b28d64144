"""SMR (Qi et al. 2024, arXiv:2405.17534): inputs times a convolution of them,
then a state space."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def paper(params, us, gate):
  """The gate, then x_k = Λ̄ x_{k−1} + B̄ u'_k, y_k = C̃ x_k + D u'_k with the
  zero-order hold, of all states and their conjugates."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  s, width = p["ssm"], len(p["memory"])
  pair = lambda z: np.concatenate([z, z.conj()])
  a = pair(s["re"] + 1j * s["im"])
  b = pair((s["b_re"] + 1j * s["b_im"]).T)
  c = pair(s["c_re"] + 1j * s["c_im"]).T
  dt = np.tile(np.exp(s["log_dt"]), 2)
  decay = np.exp(dt * a)
  x, ys = np.zeros(a.shape, np.complex128), []
  for t, u in enumerate(us):
    g = p["bias"].copy()
    for i in range(min(width, t + 1)):
      g += p["memory"][width - 1 - i] * us[t - i]
    u = u * (1 / (1 + np.exp(-g)) if gate == "sigmoid" else g)
    x = decay * x + ((decay - 1) / a) * (b @ u)
    ys.append((c @ x).real + s["d"] * u)
  return x[: len(a) // 2], np.stack(ys)


def drawn(cell):
  """Parameters, none of the gate's at its starting value."""
  params = cell.init(jax.random.key(0))
  r = np.random.default_rng(2)
  bias = jnp.asarray(0.5 * r.normal(size=cell.d_model), jnp.float32)
  return {**params, "bias": bias}


@pytest.mark.parametrize("gate", ["sigmoid", "none"])
def test_paper_equation(gate):
  cell = memzoo.tiny("state_memory_replay", gate=gate)
  params, us = drawn(cell), checks.inputs(cell, 13)
  want = paper(params, np.asarray(us, np.float64), gate)
  forms = ("step", *cell.implementations)
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((state.ssm.h, ys), want) < checks.FORWARD, form
    np.testing.assert_array_equal(state.inputs, us[-2:])


def neighbours(key, length=9):
  """Signs; the last output is to tell whether more neighbours agree than not:
  no sum of functions of single inputs knows it."""
  bits = jax.random.bernoulli(key, 0.5, (length,))
  signs = jnp.where(bits, 1.0, -1.0)
  xs = jnp.zeros((length, 4)).at[:, 0].set(signs).at[:, 1].set(1.0)
  score = jnp.sum(signs[1:] * signs[:-1])
  agree, tie = score > 0, score == 0
  weights = jnp.where(tie, 0.0, jax.nn.one_hot(length - 1, length))
  return xs, jnp.where(agree, 1, 0) * jnp.ones(length, jnp.int32), weights


def test_signature_behaviour():
  """With the replay a linear state space tells how neighbours went together;
  without, it cannot."""
  ssm = memzoo.make("s5", d_model=4, d_state=8, dt_min=0.02, dt_max=0.2)
  cell = memzoo.make("state_memory_replay", d_model=4, memory_size=2, ssm=ssm)
  _, accuracy = checks.learn(cell, neighbours, 250, rate=2e-2)
  _, without = checks.learn(ssm, neighbours, 250, rate=2e-2)
  assert accuracy > 0.9, accuracy
  assert without < 0.7, without


def test_any_state_space():
  """Forms are those of what is inside; the others say so, and configs nest."""
  ssm = memzoo.make("ind_rnn", d_model=3)
  cell = memzoo.make("state_memory_replay", d_model=3, ssm=ssm)
  params, us = cell.init(jax.random.key(0)), checks.inputs(cell, 7)
  step = memzoo.scan(cell, params, None, us, implementation="step")
  other = memzoo.scan(cell, params, None, us)
  assert checks.relative(other, step) < checks.FORWARD
  with pytest.raises(NotImplementedError, match="IndRNN has no form 'assoc'"):
    memzoo.scan(cell, params, None, us, implementation="assoc")
  assert memzoo.from_config(memzoo.to_config(cell)) == cell


def test_bad_options():
  for match, options in (
    ("memory_size must be a positive integer, got 0", dict(memory_size=0)),
    ("gate must be one of .*'sigmoid', 'none'.* got 'relu'", dict(gate="relu")),
    (
      "ssm has d_model=3, the cell has 5",
      dict(ssm=memzoo.make("s5", d_model=3)),
    ),
  ):
    with pytest.raises(ValueError, match=match):
      memzoo.tiny("state_memory_replay", **options)
