"""`product_key`: a table of values behind product keys."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memzoo


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def oracle(cell, params, xs):
  """Lample et al. 2019 eq. 1-3 over all n² keys; the query is a linear layer
  and a batch norm by given statistics (section 3.1)."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  n, h, width = cell.num_keys, cell.num_heads, cell.key_dim
  q = np.asarray(xs, np.float64) @ p["query"] + p["query_bias"]
  if cell.batch_norm:
    b = p["buffers"]
    q = (q - b["mean"]) / np.sqrt(b["variance"] + 1e-5)
    q = q * p["norm_scale"] + p["norm_bias"]
  q = q.reshape(len(q), h, width)
  ys = np.zeros((len(q), cell.d_model))
  for t in range(len(q)):
    for head in range(h):
      c1, c2 = p["keys"][head]
      scores = np.array(
        [
          q[t, head] @ np.concatenate([c1[i // n], c2[i % n]])
          for i in range(n * n)
        ]
      )
      best = np.argsort(-scores)[: cell.knn]
      w = np.exp(scores[best] - scores[best].max())
      ys[t] += (w / w.sum()) @ p["values"][best]
  return ys


def warm(cell):
  params = jax.jit(cell.init)(jax.random.key(0))
  if cell.batch_norm:
    refresh = jax.jit(cell.refresh)
    for seed in range(5):
      xs = 1 + draw(seed, 3, 9, 6)
      params = refresh(params, xs)
    params["norm_scale"] *= 1.3
    params["norm_bias"] += 0.2
  return params


def gradient(cell):
  def loss(params, xs):
    _, ys = memzoo.scan(cell, params, None, xs, implementation="chunk")
    return checks.wave(ys)

  return jax.jit(jax.grad(loss))


@pytest.mark.parametrize(
  "options",
  [
    dict(num_keys=5, knn=3, key_dim=4, num_heads=2),
    dict(num_keys=3, knn=7, key_dim=2, num_heads=1, batch_norm=False),
  ],
)
def test_paper_equation(options):
  cell = memzoo.make("product_key", d_model=6, **options)
  params = warm(cell)
  xs = draw(1, 7, 6)
  want = oracle(cell, params, xs)
  run = jax.jit(
    lambda p, x: [
      memzoo.scan(cell, p, None, x, implementation=form)
      for form in ("step", "chunk")
    ]
  )
  for state, ys in run(params, xs):
    assert state == ()
    assert checks.relative(ys, want) < checks.FORWARD


def test_refresh_is_the_running_statistics_of_batch_norm():
  """As torch's BatchNorm1d: a tenth of the batch's mean and unbiased
  variance, over batch and time."""
  cell = memzoo.tiny("product_key")
  params = jax.jit(cell.init)(jax.random.key(0))
  xs = 2 + 3 * draw(1, 4, 5, 6)
  q = np.asarray(xs, np.float64).reshape(20, 6) @ np.asarray(params["query"])
  q = q + np.asarray(params["query_bias"])
  new = jax.jit(cell.refresh)(params, xs)
  np.testing.assert_allclose(new["buffers"]["mean"], 0.1 * q.mean(0), rtol=1e-4)
  np.testing.assert_allclose(
    new["buffers"]["variance"], 0.9 + 0.1 * q.var(0, ddof=1), rtol=1e-4
  )
  for name in params:
    if name != "buffers":
      np.testing.assert_array_equal(new[name], params[name])
  grads = gradient(cell)(new, xs[0])
  assert not any(x.any() for x in jax.tree.leaves(grads["buffers"]))
  bare = memzoo.make("product_key", d_model=6, batch_norm=False)
  params = bare.init(jax.random.key(0))
  assert bare.refresh(params, xs) is params


def test_gradient_reaches_the_values_that_are_read_alone():
  cell = memzoo.make(
    "product_key", d_model=6, num_keys=8, knn=3, key_dim=4, num_heads=2
  )
  params = jax.jit(cell.init)(jax.random.key(0))
  xs = draw(1, 4, 6)
  _, indices = jax.jit(cell.look_up)(params, xs)
  grads = gradient(cell)(params, xs)
  touched = set(np.flatnonzero(np.abs(grads["values"]).sum(1)))
  assert touched == set(np.asarray(indices).ravel().tolist())
  assert len(touched) < 64


def test_initial_values():
  cell = memzoo.make("product_key", d_model=64, num_keys=40, key_dim=32)
  params = jax.jit(cell.init)(jax.random.key(0))
  assert abs(float(jnp.std(params["values"])) - 64**-0.5) < 0.002
  for name, limit in (("keys", 16**-0.5), ("query", 64**-0.5)):
    top = float(jnp.abs(params[name]).max())
    assert 0.98 * limit < top <= limit
  assert memzoo.state_size(cell) == 0


def test_signature_behaviour():
  """It learns a table: random values under random keys, more of them than a
  linear map of the input can hold."""
  d, items = 12, 96
  cell = memzoo.make(
    "product_key", d_model=d, num_keys=12, knn=4, key_dim=8, num_heads=2
  )
  xs = draw(0, items, d)
  targets = jax.random.rademacher(jax.random.key(1), (items, d), jnp.float32)
  optimizer = optax.adam(2e-2)

  def outputs(params):
    return memzoo.scan(cell, params, None, xs, implementation="chunk")[1]

  def update(carry, _):
    params, opt = carry
    grads = jax.grad(lambda p: jnp.mean(jnp.square(outputs(p) - targets)))(
      params
    )
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
      change, opt = optimizer.update(grads, opt)
    params = optax.apply_updates(params, change)
    return (cell.refresh(params, xs[None]), opt), None

  @jax.jit
  def train(params):
    carry = params, optimizer.init(params)
    params = jax.lax.scan(update, carry, length=600)[0][0]
    return outputs(params)

  ys = np.asarray(train(jax.jit(cell.init)(jax.random.key(2))))
  linear = np.linalg.lstsq(np.asarray(xs), np.asarray(targets), rcond=None)[0]
  signs = (np.sign(ys) == np.asarray(targets)).mean()
  floor = (np.sign(np.asarray(xs) @ linear) == np.asarray(targets)).mean()
  assert signs > 0.99
  assert floor < 0.75


@pytest.mark.parametrize(
  "options, words",
  [
    (dict(num_keys=0), "num_keys must be a positive integer, got 0"),
    (dict(key_dim=5), "key_dim must be even, two halves, got 5"),
    (dict(num_keys=2, knn=5), "knn must be at most num_keys² = 4, got 5"),
    (dict(num_keys=50000), "below 2³¹"),
  ],
)
def test_bad_options(options, words):
  with pytest.raises(ValueError, match=words):
    memzoo.make("product_key", d_model=6, **options)
