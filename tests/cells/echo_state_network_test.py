"""Echo state networks against Jaeger 2001 (GMD report 148)."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels
from memzoo.ops import reservoir

NAME = "echo_state_network"


def paper(cell, params, us):
  """Eq. 1 and 2 without feedback, with the leak of Jaeger et al. 2007."""
  f64 = lambda tree: {k: np.asarray(v, np.float64) for k, v in tree.items()}
  fixed = f64(params["buffers"])
  p = f64({k: v for k, v in params.items() if k != "buffers"})
  x, ys = np.zeros(cell.num_units), []
  for u in np.asarray(us, np.float64):
    net = fixed["w_in"].T @ u + fixed["w"].T @ x + fixed["b"]
    x = (1 - cell.leak) * x + cell.leak * np.tanh(net)
    ys.append(p["out"].T @ np.concatenate([u, x]) + p["out_b"])
  return x, np.stack(ys)


@pytest.mark.parametrize("options", [{}, dict(leak=1.0, bias_scale=0.5)])
def test_paper_equation(options):
  cell = memzoo.tiny(NAME, **options)
  params = cell.init(jax.random.key(0))
  params["out_b"] += 0.5
  us = checks.inputs(cell, 9)
  want = paper(cell, params, us)
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((state.x, ys), want) < checks.FORWARD, form


def test_reservoir_is_drawn_as_asked():
  cell = memzoo.make(
    NAME, d_model=3, num_units=200, spectral_radius=0.7, density=0.1,
    input_scale=0.3,
  )  # fmt: skip
  fixed = jax.jit(cell.init)(jax.random.key(0))["buffers"]
  w = np.asarray(fixed["w"], np.float64)
  np.testing.assert_allclose(np.abs(np.linalg.eigvals(w)).max(), 0.7, rtol=1e-3)
  assert abs(np.mean(w != 0) - 0.1) < 0.01
  assert 0.29 < np.abs(fixed["w_in"]).max() <= 0.3
  assert not np.any(fixed["b"])


def test_signature_behaviour():
  """The echo state property: two reservoirs that began apart come together
  under the same inputs, and do not where the spectral radius is large. And a
  read-out in closed form brings back an input of some steps before."""
  apart = {}
  for radius in (0.5, 0.9, 3.0):
    cell = memzoo.make(
      NAME, d_model=1, num_units=60, spectral_radius=radius, input_scale=0.1
    )
    params = cell.init(jax.random.key(0))
    us = checks.inputs(cell, 300)
    starts = jax.random.uniform(jax.random.key(1), (2, 60), minval=-1)
    ends = [
      memzoo.scan(cell, params, type(cell.initial_state(params))(x), us)[0].x
      for x in starts
    ]
    apart[radius] = np.linalg.norm(ends[0] - ends[1])
  assert apart[0.5] < 1e-6 and apart[0.9] < 1e-4 and apart[3.0] > 1, apart

  cell = memzoo.make(NAME, d_model=6, num_units=80, input_scale=0.2)
  r = np.random.default_rng(0)

  def draw(count):
    us = r.uniform(-1, 1, (count, 100, 6)).astype(np.float32)
    late = [np.roll(us[..., :1], n, axis=1) for n in range(1, 7)]
    return us, np.concatenate(late, axis=-1)

  start = cell.init(jax.random.key(0))
  params = cell.fit(start, *draw(30), washout=10)
  us, want = draw(10)
  run = jax.jit(jax.vmap(lambda u: memzoo.scan(cell, params, None, u)[1]))
  error = np.mean((run(us) - want)[:, 10:] ** 2, axis=(0, 1)) / np.mean(want**2)
  assert error[0] < 0.01 and error[2] < 0.1, error
  same = jax.tree.map(np.array_equal, start["buffers"], params["buffers"])
  assert all(jax.tree.leaves(same))


def capacity(cell, length=3000, delays=80):
  """Σ_k of the squared correlation of u(n − k) with its best linear estimate
  from the states, on inputs that were not fitted (Jaeger 2002)."""
  params = cell.init(jax.random.key(0))
  us = jax.random.uniform(jax.random.key(1), (2, length, 1), minval=-1)
  late = jnp.stack([jnp.roll(us[..., 0], k, 1) for k in range(1, delays)], -1)
  states = jax.jit(jax.vmap(lambda u: cell.states(params, u)))(us)
  states, late = states[:, delays:], late[:, delays:]
  w, b = reservoir.ridge(states[0], late[0], 1e-8)
  guess = np.asarray(states[1] @ w + b, np.float64)
  told = np.asarray(late[1], np.float64)
  return sum(
    np.corrcoef(guess[:, k], told[:, k])[0, 1] ** 2 for k in range(delays - 1)
  )


def test_memory_capacity():
  """It is below the number of units (Jaeger 2002, proposition 2), and rises
  with the spectral radius and the number of units."""
  make = lambda n, radius: memzoo.make(
    NAME, d_model=1, num_units=n, spectral_radius=radius, input_scale=0.1
  )
  small, large = capacity(make(20, 0.9)), capacity(make(40, 0.9))
  short = capacity(make(40, 0.2))
  assert 8 < small < 20 and 1.25 * small < large < 40, (small, large)
  assert short < 0.6 * large, (short, large)


def test_the_reservoir_gets_no_gradient():
  cell = memzoo.tiny(NAME)
  params, us = cell.init(jax.random.key(0)), checks.inputs(cell, 9)
  loss = lambda p: jnp.sum(memzoo.scan(cell, p, None, us)[1] ** 2)
  grads = jax.grad(loss)(params)
  assert np.abs(grads["out"]).min() > 0
  assert not any(np.any(g) for g in jax.tree.leaves(grads["buffers"]))


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(num_units=0), "num_units must be a positive integer"),
    (dict(leak=0.0), r"leak must be in \(0, 1\], got 0.0"),
    (dict(density=1.5), r"density must be in \(0, 1\], got 1.5"),
    (dict(spectral_radius=-1.0), "spectral_radius must be 0 or above"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="EchoStateNetwork: " + message):
    memzoo.make(NAME, d_model=4, **options)
