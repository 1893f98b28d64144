"""LAVO against the rule stated in the cell, after the abstract and the public
reviews of arXiv:2312.11135."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def paper(cell, params, xs):
  """H [R, K] updated token by token; the window read from a list."""
  p = {k: np.asarray(params[k], np.float64) for k in ("qc", "bias", "out")}
  bases = np.asarray(params["buffers"]["bases"], np.float64)
  h, k, w = cell.num_heads, cell.width, cell.window
  memory = np.zeros((h, cell.num_bases, k))
  ys, past = [], []
  for t, x in enumerate(np.asarray(xs, np.float64), start=1):
    q, c = (x @ p["qc"]).reshape(2, h, k)
    if (t - 1) % w == 0:
      past = []
    past.append(c)
    y = []
    for n in range(h):
      b = bases[n]
      memory[n] = ((t - 1) * memory[n] + np.diag(b @ c[n]) @ b) / t
      g = softmax(memory[n] @ q[n] / np.sqrt(k)) @ memory[n]
      local = np.stack([past[j][n] for j in range(len(past))])
      distance = np.arange(len(past))[::-1]
      scores = local @ q[n] / np.sqrt(k) + p["bias"][n, distance]
      y.append((g + softmax(scores) @ local) / 2)
    ys.append(np.concatenate(y) @ p["out"])
  return memory, np.stack(ys)


def make(**options):
  cell = memzoo.tiny("orthogonal_memory", **options)
  params = cell.init(jax.random.key(0))
  noise = jax.random.normal(jax.random.key(2), params["bias"].shape)
  params["bias"] += noise
  xs = 2 * jax.random.normal(jax.random.key(1), (13, cell.d_model))
  return cell, params, xs


@pytest.mark.parametrize("options", [{}, dict(num_bases=3, window=1)])
def test_paper_equation(options):
  cell, params, xs = make(**options)
  run = jax.jit(
    lambda: [
      memzoo.scan(cell, params, None, xs, implementation=form)
      for form in ("step", "chunk")
    ]
  )
  memory, want = paper(cell, params, xs)
  bases = np.asarray(params["buffers"]["bases"])
  for state, ys in run():
    assert checks.relative(ys, want) < checks.FORWARD
    held = np.asarray(state.mean)[..., None] * bases
    assert checks.relative(held, memory) < checks.FORWARD


def told_once(key):
  """One of four words, said at one of the first four steps among noise; from
  then on every output is to name it."""
  k_word, k_when, k_noise = jax.random.split(key, 3)
  word, when = (jax.random.randint(k, (), 0, 4) for k in (k_word, k_when))
  xs = jnp.zeros((12, 6)).at[:, 4:].set(jax.random.normal(k_noise, (12, 2)))
  xs = xs.at[when, :4].set(jax.nn.one_hot(word, 4))
  there = jnp.arange(12) >= when
  return xs, jnp.full((12,), word), there.astype(jnp.float32)


def test_signature_behaviour():
  """Nothing decays: every token of a thousand moves the memory by the same
  1 / t, and their order does not matter; rows stay orthogonal; and what was
  told long before the window is recalled."""
  cell, params, _ = make()
  xs = jax.random.normal(jax.random.key(3), (1000, 6))
  run = jax.jit(lambda xs: memzoo.scan(cell, params, None, xs)[0].mean)
  mean = run(xs)
  order = np.random.default_rng(0).permutation(1000)
  assert checks.relative(run(xs[order]), mean) < 1e-4
  bases = np.asarray(params["buffers"]["bases"], np.float64)
  c = (np.asarray(xs, np.float64) @ params["qc"])[:, 6:].reshape(1000, 2, 3)
  want = np.einsum("thk,hrk->hr", c, bases) / 1000
  np.testing.assert_allclose(mean, want, atol=1e-5)
  slope = jax.jit(jax.grad(lambda xs: checks.wave(run(xs))))(xs)
  np.testing.assert_allclose(slope, slope[:1] + 0 * slope, rtol=1e-3, atol=1e-9)
  held = np.asarray(mean)[..., None] * bases
  gram = held @ np.swapaxes(held, 1, 2)
  eye = np.eye(cell.num_bases)
  np.testing.assert_allclose(gram, gram * eye, atol=1e-6)

  cell = memzoo.make(
    "orthogonal_memory", d_model=6, num_heads=1, num_bases=6, window=1
  )
  _, accuracy = checks.learn(cell, told_once, 400, rate=2e-2)
  assert accuracy > 0.95, accuracy


def test_window_ends_with_its_block():
  """The local context of the first token of a window is that token alone."""
  cell, params, xs = make()
  params["buffers"]["bases"] *= 0  # the local context alone
  _, ys = memzoo.scan(cell, params, None, xs)
  c = np.asarray(xs @ params["qc"])[:, 6:]
  first = np.arange(0, 13, cell.window)
  want = c[first] / 2 @ np.asarray(params["out"])
  np.testing.assert_allclose(ys[first], want, rtol=1e-4, atol=1e-5)
  changed = xs.at[cell.window - 1].set(7.0)
  _, other = memzoo.scan(cell, params, None, changed)
  same = np.all(np.isclose(ys, other, atol=1e-6), axis=1)
  np.testing.assert_array_equal(~same, np.arange(13) == cell.window - 1)


def test_state_is_small():
  """R numbers a head for all that went by, and the window."""
  cell = memzoo.make("orthogonal_memory", d_model=12, num_heads=3, num_bases=4)
  assert memzoo.state_size(cell) == 3 * 4 + 32 * 12


def test_options_are_checked():
  make = functools.partial(memzoo.make, "orthogonal_memory", d_model=8)
  with pytest.raises(
    ValueError, match="at most d_model / num_heads = 4, got 5"
  ):
    make(num_heads=2, num_bases=5)
  with pytest.raises(ValueError, match="window must be a positive integer"):
    make(num_bases=2, window=0)
  assert jnp.all(make(num_bases=2).initial_state(None).position == -1)
