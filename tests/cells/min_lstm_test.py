"""minLSTM against Feng et al. 2024 (arXiv:2410.01201), algorithms 3, 7, 8."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def g(x):
  return np.where(x >= 0, x + 0.5, sigmoid(x))


def maps(params, xs):
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  both = np.asarray(xs, np.float64) @ p["w"] + p["b"]
  return p, *np.split(both, 3, axis=1)


def paper(params, xs, log_space):
  """Algorithm 7, or with h̃ as it is algorithm 3."""
  p, linear_f, linear_i, linear_h = maps(params, xs)
  h, hs = np.zeros(linear_f.shape[1]), []
  for f, i, new in zip(sigmoid(linear_f), sigmoid(linear_i), linear_h):
    new = g(new) if log_space else new
    h = f / (f + i) * h + i / (f + i) * new
    hs.append(h)
  ys = np.stack(hs)
  return h, ys @ p["out"] if "out" in p else ys


def logarithmic(params, xs, h_0):
  """Algorithm 8: sums of logarithms of what is divided by the product of the
  decays; the states of every step."""
  _, linear_f, linear_i, linear_h = maps(params, xs)
  softplus = lambda x: np.logaddexp(0, x)
  difference = softplus(-linear_f) - softplus(-linear_i)
  log_coefficients = np.cumsum(-softplus(difference), axis=0)
  log_values = -softplus(-difference) + np.log(g(linear_h)) - log_coefficients
  log_values = np.concatenate([np.log(h_0)[None], log_values])
  sums = np.logaddexp.accumulate(log_values, axis=0)
  return np.exp(log_coefficients + sums[1:])


@pytest.mark.parametrize("log_space, d_state", [(True, 7), (False, None)])
def test_paper_equation(log_space, d_state):
  cell = memzoo.tiny("min_lstm", log_space=log_space, d_state=d_state)
  params = checks.drawn(cell)
  assert ("out" in params) == (d_state is not None)
  xs = checks.inputs(cell, 19)
  want = paper(params, xs, log_space)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((state.h, ys), want) < checks.FORWARD, form


def test_log_space_is_the_same():
  """What the paper computes from logarithms is what the steps give, also
  where f' is 1e-5 and where it is 1 to the last digit."""
  cell = memzoo.make("min_lstm", d_model=6)
  params = checks.drawn(cell)
  params["b"] = params["b"].at[:6].set(jnp.linspace(12.0, -20.0, 6))
  xs = checks.inputs(cell, 50)
  h_0 = np.linspace(0.2, 3, 6)
  want = logarithmic(params, xs, h_0)
  state = cell.initial_state(params)._replace(h=jnp.asarray(h_0, jnp.float32))
  run = lambda form: memzoo.scan(cell, params, state, xs, implementation=form)
  forms = ("step", "scan", "assoc", "chunk")
  for form, (_, ys) in zip(forms, jax.jit(lambda: list(map(run, forms)))()):
    assert checks.relative(ys, want) < checks.FORWARD, form
    assert (np.asarray(ys) > 0).all()


def test_signature_behaviour():
  """The two gates count against each other: with i = 0 entries are kept to the
  bit, however far f is shut, short of i; with f = 0 they are replaced. And it
  learns to write one bit and to hold it."""
  cell = memzoo.make("min_lstm", d_model=6, log_space=False)
  params = jax.tree.map(jnp.asarray, checks.drawn(cell))
  params["w"] = params["w"].at[:, :12].set(0.0)
  xs = jnp.asarray(checks.inputs(cell, 50))
  start = cell.initial_state(params)._replace(h=jnp.linspace(-1.0, 1.0, 6))

  def ends(f, i, state):
    p = params | {"b": params["b"].at[:6].set(f).at[6:12].set(i)}
    run = lambda form: memzoo.scan(cell, p, state, xs, implementation=form)[0].h
    return [run(form) for form in ("scan", "assoc", "chunk")]

  kept, gone, fresh = jax.jit(
    lambda: (
      ends(5.0, -200.0, start) + ends(-50.0, -250.0, start),
      ends(-200.0, 5.0, start) + ends(-250.0, -50.0, start),
      ends(-200.0, 5.0, None) + ends(-250.0, -50.0, None),
    )
  )()
  for one, two, three in zip(kept, gone, fresh):
    np.testing.assert_array_equal(one, start.h)
    np.testing.assert_array_equal(two, three)

  for log_space in (True, False):
    options = dict(d_model=6, d_state=12, log_space=log_space)
    cell = memzoo.make("min_lstm", **options)
    _, accuracy = checks.learn(cell, checks.marked_bit, 300, rate=1e-2)
    assert accuracy > 0.95, (log_space, accuracy)


@pytest.mark.parametrize("options", (dict(d_model=0), dict(d_state=-1)))
def test_bad_options(options):
  with pytest.raises(
    ValueError, match="MinLSTM: .* must be a positive integer"
  ):
    memzoo.make("min_lstm", **dict(d_model=4) | options)
