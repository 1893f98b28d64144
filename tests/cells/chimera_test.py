"""Chimera against the rule stated in the cell, after descriptions of
arXiv:2406.04320."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def softplus(z):
  return np.log1p(np.exp(z))


def module(p, us):
  """One module over us [T, V, E]: (h1, h2 [V, E, N] of the end, y)."""
  times, variates, e = us.shape
  a1, a4 = -np.exp(p["a_log"])
  a2, a3 = np.tanh(p["cross"]) * [a1, a4]
  n = a1.shape[1]
  zero = np.zeros((e, n))
  h1, h2 = ({} for _ in range(2))
  ys = np.zeros_like(us)
  for t in range(times):
    for v in range(variates):
      x = us[t, v]
      b1, b2, c1, c2, dt = np.split(
        x @ p["select"], [n, 2 * n, 3 * n, 4 * n]
      )
      dt1, dt2 = np.split(softplus(dt + p["dt_bias"])[:, None], 2)
      held = a2 * h2.get((v, t - 1), zero) + np.outer(x, b1)
      left = np.exp(dt1 * a1)
      h1[v, t] = left * h1.get((v, t - 1), zero) + (left - 1) / a1 * held
      held = a3 * h1.get((v - 1, t), zero) + np.outer(x, b2)
      left = np.exp(dt2 * a4)
      h2[v, t] = left * h2.get((v - 1, t), zero) + (left - 1) / a4 * held
      ys[t, v] = h1[v, t] @ c1 + h2[v, t] @ c2
  end = lambda h: np.stack([h[v, times - 1] for v in range(variates)])
  return end(h1), end(h2), ys


def paper(cell, params, xs):
  p = {k: np.asarray(x, np.float64) for k, x in params.items()}
  xs = np.asarray(xs, np.float64)
  us = xs.reshape(len(xs), cell.num_variates, -1)
  h1s, h2s, total = [], [], xs * p["d"]
  for g in range(len(p["select"])):
    back = cell.bidirectional and g % 2
    own = {k: p[k][g] for k in ("select", "dt_bias", "a_log", "cross")}
    h1, h2, y = module(own, us[:, ::-1] if back else us)
    h1s.append(h1)
    h2s.append(h2)
    total = total + (y[:, ::-1] if back else y).reshape(xs.shape)
  return np.stack(h1s), np.stack(h2s), total


@pytest.mark.parametrize(
  "options", [{}, dict(bidirectional=False, num_heads=3, num_variates=2)]
)
def test_paper_equation(options):
  cell = memzoo.tiny("chimera", **options)
  params, xs = checks.drawn(cell), checks.inputs(cell, 19)
  want = paper(cell, params, xs)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  forms = ("step", *cell.implementations)
  for form, (state, ys) in zip(forms, jax.jit(lambda: list(map(run, forms)))()):
    assert checks.relative((*state, ys), want) < checks.FORWARD, form


def test_discretization_is_a_held_input():
  """Against the continuous system between two times of one variate, in small
  steps: h² and x as they were, h¹ moving."""
  cell = memzoo.make("chimera", d_model=1, num_variates=1, d_state=3,
                     num_heads=1, bidirectional=False)  # fmt: skip
  params = checks.drawn(cell)
  xs = checks.inputs(cell, 2)
  first, _ = memzoo.scan(cell, params, None, xs[:1])
  last, _ = memzoo.scan(cell, params, first, xs[1:])
  p = {k: np.asarray(x, np.float64)[0] for k, x in params.items() if k != "d"}
  a1 = -np.exp(p["a_log"][0, 0])
  a2 = a1 * np.tanh(p["cross"][0, 0])
  chosen = float(xs[1, 0]) * p["select"][0]
  b1, dt = chosen[:3], softplus(chosen[12] + p["dt_bias"][0])
  h = np.asarray(first.h1, np.float64).ravel()
  h2 = np.asarray(first.h2, np.float64).ravel()
  pieces = 20000
  for _ in range(pieces):
    h = h + dt / pieces * (a1 * h + a2 * h2 + b1 * float(xs[1, 0]))
  np.testing.assert_allclose(np.ravel(last.h1), h, rtol=1e-3)


def told_by_another(key):
  """One of four words, said once by the last of three variates among noise;
  the first, which sees nothing but a constant, is to name it from then on."""
  k_word, k_when, k_noise = jax.random.split(key, 3)
  word, when = (jax.random.randint(k, (), 0, 4) for k in (k_word, k_when))
  xs = 0.3 * jax.random.normal(k_noise, (10, 12))
  xs = xs.at[when, 8:].set(2 * jax.nn.one_hot(word, 4)).at[:, :4].set(1.0)
  return xs, jnp.full((10,), word), (jnp.arange(10) >= when).astype(jnp.float32)


def test_signature_behaviour():
  """Both axes: what one variate saw long ago is known to another, which a
  module that reads the variates in one order cannot learn for those before."""
  make = lambda **o: memzoo.make(
    "chimera", d_model=12, num_variates=3, d_state=4, num_heads=1, **o
  )
  accuracy = checks.learn(make(), told_by_another, 300, rate=2e-2)[1]
  assert accuracy > 0.9, accuracy
  one_way = checks.learn(
    make(bidirectional=False), told_by_another, 100, rate=2e-2
  )[1]
  assert one_way < 0.4, one_way


def reach(params, cell, at):
  """Which outputs [T, V] an input of variate `at` at time 1 moves."""
  xs = np.ones((5, cell.d_model), np.float32)
  other = xs.copy().reshape(5, cell.num_variates, -1)
  other[1, at] += 0.5
  run = jax.jit(lambda xs: memzoo.scan(cell, params, None, xs)[1])
  moved = np.asarray(run(xs)) != np.asarray(run(other.reshape(xs.shape)))
  return moved.reshape(other.shape).any(-1)


def test_paths_across_the_plane():
  """Along time in its own variate, along variates at its own time, and, by the
  crossed terms alone, to later variates at later times."""
  cell = memzoo.tiny("chimera", bidirectional=False)
  params = checks.drawn(cell)
  late, after = np.arange(5)[:, None] >= 1, np.arange(3) >= 1
  np.testing.assert_array_equal(reach(params, cell, 1), late & after)
  params["cross"] = 0 * params["cross"]
  line = late & (np.arange(3) == 1) | (np.arange(5)[:, None] == 1) & after
  np.testing.assert_array_equal(reach(params, cell, 1), line)


def test_heads_start_with_steps_of_their_own():
  """Long progressions in the first, fast patterns in the second, each with a
  share of the range; with no input a state shrinks by exp(−n Δ_1)."""
  cell = memzoo.make("chimera", d_model=256, num_variates=1, d_state=2,
                     dt_min=1e-3, dt_max=1.0)  # fmt: skip
  params = cell.init(jax.random.key(0))
  dt = np.asarray(jax.nn.softplus(params["dt_bias"]))[:, :256]
  middle = 1e-3**0.5
  assert (dt[:2] >= 0.99e-3).all() and (dt[:2] <= 1.01 * middle).all()
  assert (dt[2:] >= 0.99 * middle).all() and (dt[2:] <= 1.01).all()
  ones = jax.tree.map(jnp.ones_like, cell.initial_state(params))
  params["cross"] = 0 * params["cross"]
  state, _ = memzoo.scan(cell, params, ones, jnp.zeros((3, 256)))
  want = np.exp(-3 * dt[..., None] * np.arange(1, 3))
  np.testing.assert_allclose(state.h1[:, 0], want, rtol=1e-4)


def test_nothing_grows():
  """A thousand times and sixty variates of bounded input, with crossed terms
  as large as they can be."""
  cell = memzoo.make("chimera", d_model=60, num_variates=60, num_heads=1)
  params = cell.init(jax.random.key(0))
  params["cross"] = jnp.full_like(params["cross"], 9.0)
  xs = jnp.ones((1000, 60))
  state, ys = memzoo.scan(cell, params, None, xs, implementation="chunk")
  assert np.isfinite(ys).all()
  s = np.abs(np.asarray(params["select"])).max()
  assert max(np.abs(h).max() for h in state) < 60 * s


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(d_state=0), "d_state must be a positive integer"),
    (dict(num_variates=3), "num_variates=3 must divide d_model=4"),
    (dict(dt_min=0.5, dt_max=0.1), "0 < dt_min < dt_max"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="Chimera: .*" + message):
    memzoo.make("chimera", **{"d_model": 4, **options})
