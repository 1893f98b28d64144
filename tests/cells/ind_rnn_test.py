"""IndRNN against Li et al. 2018 (arXiv:1803.04831), eq. 2 and section 3.2."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def paper(cell, params, xs):
  """Eq. 2, one neuron at a time, each with its one recurrent weight, which
  section 3.2 bounds by γ^{1/T}."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  f = np.tanh if cell.activation == "tanh" else lambda a: max(a, 0.0)
  limit = cell.gamma ** (1 / cell.span)
  ys = np.zeros((len(xs), cell.d_model))
  for n in range(cell.d_model):
    u, h = min(max(p["u"][n], -limit), limit), 0.0
    for t, x in enumerate(np.asarray(xs, np.float64)):
      h = ys[t, n] = f(p["w"][:, n] @ x + u * h + p["b"][n])
  return ys[-1], ys


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_paper_equation(activation):
  cell = memzoo.tiny("ind_rnn", activation=activation)
  params, xs = checks.drawn(cell), checks.inputs(cell, 9)
  params["u"] = np.asarray([-2.0, -0.5, 0.3, 0.9, 1.05, 1.7], np.float32)
  want = paper(cell, params, xs)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((state.h, ys), want) < checks.FORWARD, form


def test_signature_behaviour():
  """What a neuron held is between ε and γ of it after the span, and so is the
  gradient back to it; and a layer learns to hold a bit over 60 steps."""
  cell = memzoo.make("ind_rnn", d_model=200, span=300, epsilon=0.1, gamma=2.0)
  params = cell.init(jax.random.key(0))
  none = jnp.zeros((300, 200))

  def kept(h):
    state = cell.initial_state(params)._replace(h=h)
    return memzoo.scan(cell, params, state, none)[0].h

  h = jnp.linspace(0.5, 2.0, 200)
  after, pull = jax.vjp(kept, h)
  for part in (after / h, pull(jnp.ones(200))[0]):
    assert part.min() >= 0.1 * (1 - 1e-4) and part.max() <= 2 * (1 + 1e-4)
    assert part.min() < 0.2 and part.max() > 1.8
  # However large a weight is drawn, it is bounded.
  params["u"] = 3 * params["u"]
  np.testing.assert_allclose(kept(h) / h, 2.0, rtol=1e-4)

  cell = memzoo.make("ind_rnn", d_model=6, span=60, epsilon=0.5)
  _, accuracy = checks.learn(cell, checks.early_bit, 200, rate=1e-2)
  assert accuracy > 0.95, accuracy


def test_neurons_are_independent():
  cell = memzoo.tiny("ind_rnn")
  params = checks.drawn(cell)
  params["b"] += 99.0  # all are above zero
  xs = checks.inputs(cell, 1)[0]
  state = cell.initial_state(params)._replace(h=jnp.ones(6))
  jacobian = jax.jacobian(lambda s: cell.step(params, s, xs)[0].h)(state).h
  np.testing.assert_array_equal(jacobian, jnp.diag(jnp.diag(jacobian)))
  assert np.abs(jnp.diag(jacobian)).min() > 0


def test_a_weight_comes_back_from_outside_its_bound():
  cell = memzoo.make("ind_rnn", d_model=1, span=1, gamma=1.0)
  params = {"w": jnp.zeros((1, 1)), "u": jnp.full(1, 1.5), "b": jnp.zeros(1)}
  state = cell.initial_state(params)._replace(h=jnp.full(1, 2.0))

  def loss(params):
    return jnp.sum(cell.step(params, state, jnp.zeros(1))[1])

  value, grads = jax.value_and_grad(loss)(params)
  assert value == 2.0 and grads["u"] == 2.0


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(span=0), "span must be a positive integer"),
    (dict(gamma=0.0), "gamma above 0"),
    (dict(epsilon=3.0), "0 <= epsilon <= gamma"),
    (dict(activation="logistic"), "activation must be one of"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="IndRNN: .*" + message):
    memzoo.make("ind_rnn", d_model=4, **options)
