"""`hopfield_lookup`: look-up in learned patterns."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memzoo


def layer_norm(x, p):
  y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  return y * p["scale"] + p["bias"]


def softmax(z):
  e = np.exp(z - z.max())
  return e / e.sum()


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def oracle(cell, params, xs):
  """Ramsauer et al. 2020 eq. 3 and 10, with layer norms and biases."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  xs = np.asarray(xs, np.float64)
  y = p["patterns"]
  z = p["targets"] if cell.separate_targets else y
  r = layer_norm(xs, p["norm_state"]) if cell.norm_state else xs
  y = layer_norm(y, p["norm_stored"]) if cell.norm_stored else y
  z = layer_norm(z, p["norm_target"]) if cell.norm_target else z
  q = r @ p["q"]["w"] + p["q"]["b"]
  k = y @ p["k"]["w"] + p["k"]["b"]
  if cell.connected:
    z = z @ p["k"]["w"] + p["k"]["b"]
  v = z @ p["v"]["w"] + p["v"]["b"]
  n = cell.width
  beta = cell.beta or 1 / np.sqrt(n)
  out = np.zeros((len(xs), cell.num_heads * n))
  for t in range(len(xs)):
    for h in range(cell.num_heads):
      part = slice(h * n, (h + 1) * n)
      xi = q[t, part]
      for _ in range(cell.steps - 1):
        xi = k[:, part].T @ softmax(beta * k[:, part] @ xi)
      out[t, part] = v[:, part].T @ softmax(beta * k[:, part] @ xi)
  return out @ p["out"]["w"] + p["out"]["b"]


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(num_heads=2, head_dim=4, steps=3, beta=2.0, separate_targets=True),
    dict(num_heads=2, connected=True, norm_state=False, norm_target=False),
    dict(norm_stored=False, steps=2),
  ],
)
def test_paper_equation(options):
  cell = memzoo.make("hopfield_lookup", d_model=6, num_patterns=5, **options)
  params = jax.tree.map(
    lambda x: x + 0.5 * draw(x.size, *x.shape),
    jax.jit(cell.init)(jax.random.key(0)),
  )
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


def test_initial_values():
  """Those of the authors' layer: deviation 0.02, no bias, unit norms."""
  cell = memzoo.make("hopfield_lookup", d_model=64, num_patterns=50)
  params = jax.jit(cell.init)(jax.random.key(0))
  for name in ("patterns", "q", "k", "v", "out"):
    w = params[name] if name == "patterns" else params[name]["w"]
    assert 0.018 < float(jnp.std(w)) < 0.022
  assert (
    not params["q"]["b"].any() and (params["norm_state"]["scale"] == 1).all()
  )
  assert memzoo.state_size(cell) == 0


def test_converged_queries_are_held():
  """With a tolerance, steps past the fixed point change nothing."""
  base = dict(d_model=6, num_patterns=5, beta=8.0)
  few, many = (
    memzoo.make("hopfield_lookup", steps=n, tolerance=1e-3, **base)
    for n in (12, 20)
  )
  params = jax.tree.map(lambda x: 20 * x, jax.jit(few.init)(jax.random.key(2)))
  xs = draw(3, 7, 6)
  run = lambda c: jax.jit(lambda p, x: memzoo.scan(c, p, None, x)[1])(
    params, xs
  )
  a, b = run(few), run(many)
  np.testing.assert_array_equal(a, b)


def test_signature_behaviour():
  """It learns to store: trained to complete half-hidden patterns, it answers
  with the pattern, for cues it was not trained on too."""
  count, width = 8, 32
  cell = memzoo.make(
    "hopfield_lookup", d_model=width, num_patterns=32, beta=1.0,
    separate_targets=True,
  )  # fmt: skip
  items = jax.random.rademacher(jax.random.key(0), (count, width), jnp.float32)
  items = jnp.tile(items, (4, 1))
  optimizer = optax.adam(3e-3)

  def cues(key):
    """Every pattern four times, with other halves of its entries at zero."""
    order = jnp.argsort(jax.random.uniform(key, items.shape), axis=1)
    return jnp.where(order < width // 2, items, 0.0)

  def loss(params, key):
    _, ys = memzoo.scan(cell, params, None, cues(key), implementation="chunk")
    return jnp.mean(jnp.square(ys - items))

  def update(carry, key):
    params, opt = carry
    grads = jax.grad(loss)(params, key)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
      change, opt = optimizer.update(grads, opt)
    return (optax.apply_updates(params, change), opt), None

  @jax.jit
  def train(params):
    keys = jax.random.split(jax.random.key(1), 600)
    return jax.lax.scan(update, (params, optimizer.init(params)), keys)[0][0]

  @jax.jit
  def exact(params):
    """The part of 3,200 new cues that are completed without a wrong sign."""

    def one(key):
      _, ys = memzoo.scan(cell, params, None, cues(key), implementation="chunk")
      return jnp.mean((jnp.sign(ys) == items).all(axis=1))

    return jnp.mean(jax.lax.map(one, jax.random.split(jax.random.key(2), 100)))

  params = jax.jit(cell.init)(jax.random.key(3))
  before, after = exact(params), exact(train(params))
  assert before < 0.05
  assert after > 0.97


@pytest.mark.parametrize(
  "options, words",
  [
    (dict(num_patterns=0), "num_patterns must be a positive integer, got 0"),
    (dict(num_heads=4), "num_heads=4 must divide d_model=6"),
    (dict(steps=0), "steps must be a positive integer, got 0"),
    (dict(beta=0.0), "beta must be above 0, got 0.0"),
    (dict(separation="softmx"), "did you mean 'softmax'"),
    (dict(tolerance=-1.0), "tolerance must be 0 or more"),
  ],
)
def test_bad_options(options, words):
  with pytest.raises(ValueError, match=words):
    memzoo.make("hopfield_lookup", d_model=6, **options)
