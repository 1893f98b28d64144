"""LongVQ against the rule stated in the cell: Mega's gates (arXiv:2209.10655)
around attention to quantised keys (arXiv:2309.16354)."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def silu(z):
  return z * sigmoid(z)


def norm(x):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5)


def paper(cell, params, xs):
  """Every token attends to every one before it: (h, codes of the keys, y)."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items() if k != "buffers"}
  buffers = params["buffers"]
  codes = np.float64(buffers["codes"]) / np.float64(buffers["uses"])[:, None]
  d, w = cell.d_model, cell.window
  a, h = sigmoid(p["alpha"]), 0
  zs, vs, ys = [], [], []
  for t, x in enumerate(np.asarray(xs, np.float64)):
    h = a * p["beta"] * x[:, None] + (1 - a * sigmoid(p["delta"])) * h
    s = silu(np.sum(p["eta"] * h, axis=1) + p["omega"] * x)
    c = silu(s @ p["query"] + p["query_bias"])
    q, k = norm(p["kappa"] * c + p["mu"])
    zs.append(np.argmin(np.sum((codes - k) ** 2, axis=1)))
    vs.append(silu(x @ p["value"] + p["value_bias"]))
    bias = np.array([p["bias"][t - i] if t - i < w else 0 for i in range(t + 1)])
    e = np.exp(codes[zs] @ q / np.sqrt(len(q)) + bias)
    o = e @ np.stack(vs) / e.sum()
    gates = s @ p["gates"] + p["gates_bias"]
    reset, update, new = np.split(gates, [2 * d, 3 * d])
    new = silu(new + (silu(reset) * o) @ p["out"])
    ys.append(sigmoid(update) * new + (1 - sigmoid(update)) * x)
  return h, np.array(zs), np.stack(ys)


def make(**options):
  cell = memzoo.tiny("long_vq", **options)
  params = cell.init(jax.random.key(0))
  buffers = params.pop("buffers")
  r = np.random.default_rng(2)
  noise = lambda x: np.asarray(0.3 * r.normal(size=x.shape), np.float32)
  params = {k: x + noise(x) for k, x in params.items()}
  uses = jnp.linspace(0.5, 2.0, cell.num_codes)
  buffers = {"codes": buffers["codes"] * uses[:, None], "uses": uses}
  return cell, params | {"buffers": buffers}, checks.inputs(cell, 19)


@pytest.mark.parametrize("options", [{}, dict(window=1), dict(window=40)])
def test_paper_equation(options):
  """In linear time, what attention to all tokens gives."""
  cell, params, xs = make(**options)
  h, codes, want = paper(cell, params, xs)
  assert len(set(codes)) > 2
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  forms = ("step", *cell.implementations)
  for form, (state, ys) in zip(forms, jax.jit(lambda: list(map(run, forms)))()):
    assert checks.relative((state.h, ys), (h, want)) < checks.FORWARD, form
    far = np.bincount(codes[: max(19 - cell.window, 0)], minlength=5)
    np.testing.assert_array_equal(state.attended.number, far)


def told_once(key):
  """One of four words, said at one of the first four steps among noise; from
  then on every output is to name it."""
  k_word, k_when, k_noise = jax.random.split(key, 3)
  word, when = (jax.random.randint(k, (), 0, 4) for k in (k_word, k_when))
  xs = jnp.zeros((12, 6)).at[:, 4:].set(jax.random.normal(k_noise, (12, 2)))
  xs = xs.at[when, :4].set(jax.nn.one_hot(word, 4))
  return xs, jnp.full((12,), word), (jnp.arange(12) >= when).astype(jnp.float32)


def test_signature_behaviour():
  """A state of fixed size holds all values of a thousand tokens, however long
  ago they came, by the codes of their keys; and it is learned to use them,
  with averages that hold one token alone."""
  cell, params, _ = make()
  xs = checks.inputs(cell, 1000)
  state, _ = memzoo.scan(cell, params, None, xs, implementation="chunk")
  held = state.attended
  assert float(held.number.sum()) == 1000 - cell.window
  values = silu(np.float64(xs) @ params["value"] + params["value_bias"])
  got = held.total.sum(0) + held.v.sum(0)
  np.testing.assert_allclose(got, values.sum(0), rtol=1e-4)
  assert memzoo.state_size(cell) == sum(
    x.size for x in jax.tree.leaves((state.h, held[:4]))
  )

  class Short(type(cell)):
    def init(self, key):
      return super().init(key) | {
        k: jnp.full((6, 2), 30.0) for k in ("alpha", "delta")
      }

  short = Short(d_model=6, num_codes=8, window=1, key_dim=8, num_averages=2)
  trained, accuracy = checks.learn(short, told_once, 400, rate=2e-2)
  assert accuracy > 0.9, accuracy
  left = 1 - jax.nn.sigmoid(trained["alpha"]) * jax.nn.sigmoid(trained["delta"])
  assert float(left.max()) < 1e-3


def test_codebook_follows_the_keys():
  """A refresh without momentum is a step of k-means; with it the book moves so
  much of the way. Steps lower the error that the report has."""
  cell, params, _ = make(num_codes=3, momentum=0.0)
  xs = jnp.stack([checks.inputs(cell, 40), checks.inputs(cell, 40)[::-1]])

  def error(params):
    run = lambda xs: memzoo.scan(cell, params, None, xs, reports=True)[2]
    return float(jax.vmap(run)(xs)["commitment"].mean())

  new = cell.refresh(params, xs)
  codes = [paper(cell, params, x)[1] for x in xs]
  uses = np.bincount(np.concatenate(codes), minlength=3)
  np.testing.assert_array_equal(new["buffers"]["uses"], uses)
  before, after = error(params), error(new)
  assert after < before
  slow = memzoo.tiny("long_vq", num_codes=3, momentum=0.75).refresh(params, xs)
  want = 0.75 * params["buffers"]["codes"] + 0.25 * new["buffers"]["codes"]
  np.testing.assert_allclose(slow["buffers"]["codes"], want, rtol=1e-4)
  for _ in range(5):
    new = cell.refresh(new, xs)
  assert error(new) <= after
  assert set(new) == set(params)


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(num_codes=0), "num_codes must be a positive integer"),
    (dict(window=0), "window must be a positive integer"),
    (dict(momentum=1.0), r"momentum must be in \[0, 1\)"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="LongVQ: .*" + message):
    memzoo.make("long_vq", d_model=4, **options)
