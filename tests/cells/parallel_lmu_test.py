"""Parallel LMU against Chilkuri and Eliasmith 2021 (arXiv:2102.11417)."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal

import memzoo


def window(order, theta):
  """Ā, B̄ of the Legendre delay, held for one token."""
  i, j = np.indices((order, order))
  a = (2 * i + 1) * np.where(i < j, -1.0, (-1.0) ** (i - j + 1))
  b = (2 * i[:, :1] + 1) * (-1.0) ** i[:, :1]
  system = a / theta, b / theta, np.eye(order), np.zeros((order, 1))
  a, b = scipy.signal.cont2discrete(system, 1.0, "zoh")[:2]
  return a, b[:, 0]


def paper(cell, params, xs, f_1, f_2):
  """(18) to (20); the memory as the sum (23), H_k = Ā^k B̄."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  a, b = window(cell.order, cell.theta)
  xs = np.asarray(xs, np.float64)
  us = f_1(xs @ p["encode"] + p["encode_bias"])
  h = [np.linalg.matrix_power(a, k) @ b for k in range(len(xs))]
  memory = lambda t: sum(np.outer(us[t - k], h[k]) for k in range(t + 1))
  ms = [memory(t) for t in range(len(xs))]
  ys = np.stack([m.ravel() for m in ms]) @ p["memory"] + xs @ p["input"]
  return ms[-1], f_2(ys + p["bias"])


@pytest.mark.parametrize("activation", ("relu", "tanh"))
def test_paper_equation(activation):
  cell = memzoo.tiny(
    "parallel_lmu", activation=activation, encode_activation="relu"
  )
  params, xs = checks.drawn(cell), checks.inputs(cell, 21)
  relu = lambda x: np.maximum(x, 0)
  want = paper(
    cell, params, xs, relu, dict(relu=relu, tanh=np.tanh)[activation]
  )
  forms = ("step", *cell.implementations)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    error = checks.relative((state.m, ys), want)
    assert error < checks.FORWARD, (form, error)


def test_signature_behaviour():
  """A linear read-out of its window alone (no hidden state, f the identity)
  learns a copy of a smooth signal 12 tokens later, and a window that ends
  before that does not."""
  optimizer = optax.adam(1e-2)
  t = jnp.arange(64.0)

  def waves(key):
    k_size, k_phase = jax.random.split(key)
    cycles = 2 * jnp.pi * jnp.arange(1.0, 7.0) / 64
    size = jax.random.normal(k_size, (6,))
    phase = jax.random.uniform(k_phase, (6,), maxval=2 * jnp.pi)
    return jnp.sum(size * jnp.cos(t[:, None] * cycles + phase), 1)[:, None] / 2

  def final_error(theta):
    cell = memzoo.make(
      "parallel_lmu", d_model=1, order=8, theta=theta,
      encode_activation="identity", activation="identity",
    )  # fmt: skip

    def loss(params, key):
      us = jax.vmap(waves)(jax.random.split(key, 32))
      ys = jax.vmap(lambda us: memzoo.scan(cell, params, None, us)[1])(us)
      error = (ys[:, 24:] - us[:, 12:-12]) ** 2
      return jnp.mean(error) / jnp.mean(us**2)

    def step(carry, key):
      params, state = carry
      grads = jax.grad(loss)(params, key)
      with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(grads, state)
      return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
      keys = jax.random.split(jax.random.key(1), 400)
      carry = params, optimizer.init(params)
      params = jax.lax.scan(step, carry, keys)[0][0]
      return loss(params, jax.random.key(2))

    return float(train(cell.init(jax.random.key(0))))

  long, short = final_error(16.0), final_error(3.0)
  assert long < 0.02 and short > 10 * long, (long, short)


def test_chunks_are_matmuls():
  """The chunk form takes T / 16 serial steps, not T."""
  cell = memzoo.tiny("parallel_lmu")
  params = cell.init(jax.random.key(0))
  run = lambda xs: memzoo.scan(cell, params, None, xs, implementation="chunk")
  xs = jax.ShapeDtypeStruct((256, 5), jnp.float32)
  trips = checks.trip_counts(jax.jit(run).lower(xs).compile())
  assert trips and max(trips) == 16, trips


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(num_signals=0), "num_signals must be a positive integer"),
    (dict(theta=-1.0), "theta must be above 0"),
    (dict(activation="step"), "activation must be one of"),
    (dict(encode_activation="step"), "encode_activation must be one of"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="ParallelLMU: " + message):
    memzoo.make("parallel_lmu", d_model=4, **options)
