"""Measures and data that the suites share."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import memzoo

FORWARD, GRADIENT = 1e-5, 1e-4  # float32 on CPU, relative norms


def relative(a, b):
  """The largest ‖a − b‖ / ‖b‖ over the leaves; integers must be equal."""
  worst = 0.0
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
      np.testing.assert_array_equal(x, y)
      continue
    x, y = np.asarray(x, np.complex128), np.asarray(y, np.complex128)
    assert x.shape == y.shape, (x.shape, y.shape)
    difference = np.linalg.norm((x - y).ravel())
    scale = np.linalg.norm(y.ravel())
    worst = max(worst, difference / scale if scale > 1e-30 else difference)
  return worst


def is_float(x):
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def wave(*arrays):
  """A scalar in which every entry of the arrays has its own weight."""
  total = 0.0
  for n, x in enumerate(arrays):
    weights = jnp.cos(0.7 * jnp.arange(x.size, dtype=jnp.float32) + n)
    total += jnp.sum(x.astype(jnp.float32) * weights.reshape(x.shape))
  return total


def half(tree):
  """Floats rounded to bfloat16."""
  return jax.tree.map(
    lambda x: x.astype(jnp.bfloat16) if is_float(x) else x, tree
  )


def single(tree):
  """Floats as float32."""
  return jax.tree.map(
    lambda x: x.astype(jnp.float32) if is_float(x) else x, tree
  )


def trip_counts(compiled) -> list[int]:
  """The iteration counts of the loops of a compiled function."""
  return [
    int(n)
    for n in re.findall(r'known_trip_count":\{"n":"(\d+)"', compiled.as_text())
  ]


def drawn(cell, scale=0.3):
  """Parameters, none at its starting value."""
  params = jax.jit(cell.init)(jax.random.key(0))
  r = np.random.default_rng(2)
  noise = lambda x: np.asarray(scale * r.normal(size=x.shape), np.float32)
  return {k: x + noise(x) for k, x in params.items()}


def inputs(cell, length, scale=1.0):
  """[length, D], of normal numbers."""
  r = np.random.default_rng(1)
  return np.asarray(scale * r.normal(size=(length, cell.d_model)), np.float32)


def forms(cell, params, xs):
  """(form, state, ys) of every form but the kernel's, in one compilation."""
  names = ("step", "scan", "chunk")
  run = lambda f: memzoo.scan(cell, params, None, xs, implementation=f)
  out = jax.jit(lambda: [run(f) for f in names])()
  return [(f, *o) for f, o in zip(names, out)]


def learn(cell, draw, steps, rate=1e-2, seed=0):
  """Trains a cell alone, with Adam, to predict a class from its outputs.

  Args:
    cell: its outputs' first entries are the logits.
    draw: key -> (xs [T, D], targets int [T], weights [T]) of one sequence.
    steps: of batches of 64.
    rate: Adam's learning rate.
    seed: of parameters and data.

  Returns:
    (params, accuracy on 512 new sequences where weights > 0).
  """
  optimizer = optax.adam(rate)
  batch = lambda key, n: jax.vmap(draw)(jax.random.split(key, n))

  def logits(params, xs):
    run = lambda x: memzoo.scan(cell, params, None, x)[1]
    return jax.vmap(run)(xs)

  def loss(params, key):
    xs, targets, weights = batch(key, 64)
    cost = optax.softmax_cross_entropy_with_integer_labels(
      logits(params, xs), targets
    )
    return jnp.sum(cost * weights) / jnp.sum(weights)

  def step(carry, key):
    params, state = carry
    grads = jax.grad(loss)(params, key)
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
      updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def train(key):
    params = cell.init(key)
    carry = params, optimizer.init(params)
    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    params = jax.lax.scan(step, carry, keys)[0][0]
    xs, targets, weights = batch(jax.random.fold_in(key, 2), 512)
    right = jnp.argmax(logits(params, xs), -1) == targets
    right = jnp.sum(jnp.where(right, weights, 0.0))
    return params, right / jnp.sum(weights)

  params, accuracy = train(jax.random.key(seed))
  return params, float(accuracy)


def delay_error(cell, params, steps=400, delay=8, length=32):
  """Trains a cell of one channel to repeat noise `delay` steps later; the mean
  squared error relative to the noise, on noise not seen."""
  optimizer = optax.adam(1e-2)

  def loss(params, key):
    us = jax.random.normal(key, (16, length, 1))
    run = lambda us: memzoo.scan(cell, params, None, us)[1]
    ys = jax.vmap(run)(us)
    return jnp.mean((ys[:, delay:] - us[:, :-delay]) ** 2)

  def step(carry, key):
    params, state = carry
    grads = jax.grad(loss)(params, key)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def train(params):
    keys = jax.random.split(jax.random.key(1), steps)
    carry = params, optimizer.init(params)
    params = jax.lax.scan(step, carry, keys)[0][0]
    return loss(params, jax.random.key(2))

  return float(train(params))


@dataclasses.dataclass(frozen=True)
class ReadOut(memzoo.Cell):
  """A cell and a linear layer on its outputs."""

  cell: memzoo.Cell

  @property
  def d_model(self):
    return self.cell.d_model

  def init(self, key):
    key, key_out = jax.random.split(key)
    shape = (self.d_model, self.d_model)
    out = jax.random.normal(key_out, shape) * self.d_model**-0.5
    return {
      "cell": self.cell.init(key),
      "out": out,
      "bias": jnp.zeros(shape[1]),
    }

  def initial_state(self, params, key=None):
    return self.cell.initial_state(params["cell"], key)

  def step(self, params, state, x):
    state, y = self.cell.step(params["cell"], state, x)
    return state, y @ params["out"] + params["bias"]


def pairs(key, count=6, keys=4, values=4, rewrite=False):
  """Key-value pairs and one query per key asked: (xs, targets, weights).

  An input is [one-hot key, one-hot value, 1 if it asks]. With `rewrite` keys
  repeat and the latest value counts; otherwise every key comes once.
  """
  k_keys, k_values, k_ask = jax.random.split(key, 3)
  if rewrite:
    ks = jax.random.randint(k_keys, (count,), 0, keys)
  else:
    ks = jax.random.permutation(k_keys, keys)[:count]
  vs = jax.random.randint(k_values, ks.shape, 0, values)
  ask = ks[jax.random.randint(k_ask, (), 0, ks.shape[0])]
  last = jnp.max(jnp.where(ks == ask, jnp.arange(ks.shape[0]), -1))
  one_hot = jax.nn.one_hot
  told = jnp.concatenate(
    [one_hot(ks, keys), one_hot(vs, values), jnp.zeros((ks.shape[0], 1))], 1
  )
  asked = jnp.concatenate([one_hot(ask, keys), jnp.zeros(values), jnp.ones(1)])
  xs = jnp.concatenate([told, asked[None]])
  targets = jnp.zeros(xs.shape[0], jnp.int32).at[-1].set(vs[last])
  weights = jnp.zeros(xs.shape[0]).at[-1].set(1.0)
  return xs, targets, weights


def marked_bit(key, length=12):
  """Bits, of which one among the first four is marked: input [bit, marked,
  0 …]; from then on every output is to name that one."""
  k_bits, k_when = jax.random.split(key)
  bits = jax.random.bernoulli(k_bits, 0.5, (length,))
  when = jax.random.randint(k_when, (), 0, 4)
  xs = jnp.zeros((length, 6)).at[:, 0].set(jnp.where(bits, 1.0, -1.0))
  xs = xs.at[when, 1].set(1.0)
  targets = jnp.where(bits[when], 1, 0) * jnp.ones(length, jnp.int32)
  return xs, targets, (jnp.arange(length) >= when).astype(jnp.float32)


def early_bit(key, length=60):
  """A bit among the first four inputs, noise beside it and after it: input
  [bit, noise …]; the last output is to name it."""
  k_bit, k_when, k_noise = jax.random.split(key, 3)
  bit = jax.random.bernoulli(k_bit)
  xs = 0.3 * jax.random.normal(k_noise, (length, 6)).at[:, 0].set(0.0)
  when = jax.random.randint(k_when, (), 0, 4)
  xs = xs.at[when, 0].set(jnp.where(bit, 1.0, -1.0))
  targets = jnp.where(bit, 1, 0) * jnp.ones(length, jnp.int32)
  return xs, targets, jax.nn.one_hot(length - 1, length)
