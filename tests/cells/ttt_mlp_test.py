"""TTT-MLP: the layer of the paper's code, and what its MLP learns in context."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import ops
from memzoo.ops.deep_gradient_step import (
  deep_gradient_step,
  start as deep_start,
)
from memzoo.ops.gradient_step import Learner, Model, start


def normalized(z):
  centred = z - z.mean(-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def gelu(z):
  return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def gelu_slope(z):
  """By the difference of two complex values: exact to rounding."""
  return gelu(z + 1e-30j).imag / 1e-30


def convolve(x, kernel, bias):
  padded = np.concatenate([np.zeros((len(kernel) - 1, x.shape[1])), x])
  return bias + sum(
    row * padded[w : w + len(x)] for w, row in enumerate(kernel)
  )


def rotate(x, place):
  """Channel i turns with channel i + K / 2, by place · 10000^(−2 i / K)."""
  half = len(x) // 2
  angle = place * 10000.0 ** (-np.arange(half) / half)
  turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag])


def layer(cell, p, xs):
  """Eq. 4 to 6 token by token, each G_s of all four arrays at the start of its
  mini-batch; what is around it as in the authors' TTTMLP. Returns
  (y, inner loss, the weights at the last mini-batch's start)."""
  d, h, n = cell.d_model, cell.num_heads, cell.mini_batch_size
  width, length = d // h, len(xs)
  z = xs @ p["in"]
  if cell.backbone == "mamba":
    v = z[:, d:]
    q, k = (convolve(z[:, :d], p["conv"][i], p["conv_bias"][i]) for i in (0, 1))
  else:
    q, k, v = z[:, :d], z[:, d : 2 * d], z[:, 2 * d :]
  eta = cell.base_lr * sigmoid(xs @ p["rate_w"] + p["rate_b"]) / width
  lam = np.maximum(1 / np.arange(1, n + 1) + p["place"], 0)
  out, loss, ends = np.zeros((length, d)), np.zeros((length, h)), []
  for j in range(h):
    part = slice(j * width, (j + 1) * width)
    gamma, beta = p["norm_scale"][j], p["norm_bias"][j]
    w = [p[name][j] for name in ("w1", "b1", "w2", "b2")]
    steps = [np.zeros_like(x) for x in w]
    for t in range(length):
      i = t % n
      key, query = rotate(k[t, part], i), rotate(q[t, part], i)
      z1 = key @ w[0] + w[1]
      z2 = gelu(z1) @ w[2] + w[3]
      hat, s = normalized(z2), np.sqrt(np.var(z2) + 1e-6)
      error = gamma * hat + beta - (v[t, part] - key)
      loss[t, j] = 0.5 * error @ error
      g2 = gamma * error
      g2 = (g2 - g2.mean() - hat * (g2 * hat).mean()) / s
      g1 = w[2] @ g2 * gelu_slope(z1)
      grads = [np.outer(key, g1), g1, np.outer(gelu(z1), g2), g2]
      steps = [a + eta[t, j] * g for a, g in zip(steps, grads)]
      now = [a - lam[i] * b for a, b in zip(w, steps)]
      z2 = gelu(query @ now[0] + now[1]) @ now[2] + now[3]
      out[t, part] = query + gamma * normalized(z2) + beta
      if i + 1 == n:
        w, steps = now, [np.zeros_like(x) for x in w]
    ends.append(w)
  y = normalized(out) * p["post_scale"] + p["post_bias"]
  if cell.backbone == "mamba":
    y = gelu(xs @ p["gate"]) * y
  return y @ p["out"], loss.mean(1), [np.stack(x) for x in zip(*ends)]


def drawn(cell):
  """Parameters of the right shapes, none at its starting value."""
  r = np.random.default_rng(1)
  draw = lambda path, x: jnp.asarray(
    0.4 * r.normal(size=x.shape) + ("scale" in jax.tree_util.keystr(path)),
    jnp.float32,
  )
  shapes = jax.eval_shape(cell.init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(cell, params, xs, form=None):
  return memzoo.scan(cell, params, None, xs, implementation=form, reports=True)


@pytest.mark.parametrize("backbone", ["transformer", "mamba"])
def test_paper_equation(backbone):
  """The last mini-batch is cut."""
  cell = memzoo.tiny(
    "ttt_mlp", backbone=backbone, mini_batch_size=3, base_lr=1.0
  )
  params = drawn(cell)
  xs = np.random.default_rng(3).normal(size=(11, cell.d_model))
  xs = jnp.asarray(xs, jnp.float32)
  double = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
  y, loss, weights = layer(cell, double(params), double(xs))
  for form in ("step", "chunk"):
    state, ys, reports = run(cell, params, xs, form)
    anchor = [x for part in state.inner.anchor for x in part]
    got = ys, reports["inner_loss"], *anchor
    assert checks.relative(got, (y, loss, *weights)) <= checks.FORWARD, form
    assert state.inner.phase == 2


def xor(repeats):
  """Keys ±1 ±1 and values k + k_1 k_2 u, again and again: no affine map, and
  none with a layer norm behind it, sends the two pairs of opposite keys to
  the two ends of a line."""
  signs = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
  keys = jnp.concatenate([signs, jnp.zeros((4, 2))], 1)
  u = jnp.array([1.0, -1.0, 1.0, -1.0])
  values = keys + signs.prod(1, keepdims=True) * u
  return jnp.tile(keys, (repeats, 1)), jnp.tile(values, (repeats, 1))


def test_signature_behaviour():
  """The inner loss of its MLP falls on a repeated map that is not linear, to
  where TTT-Linear's cannot get; each starts from its own cell's draw."""
  keys, values = xor(400)
  rate = jnp.full(len(keys), 0.5)
  learner = Learner(1 / jnp.arange(1.0, 5), jnp.ones(4), jnp.zeros(4))
  make = functools.partial(memzoo.make, d_model=4, mini_batch_size=4)

  @jax.jit
  def losses(key):
    mlp, linear = make("ttt_mlp"), make("ttt_linear")
    w = linear.initial_state(linear.init(key)).inner.model
    head = lambda tree: jax.tree.map(lambda x: x[0], tree)
    state = start(Model(*head(tuple(w))))
    options = dict(rate=rate, learner=learner, residual=True)
    one = ops.gradient_step(state, keys, keys, values, **options)[1].loss
    model = head(mlp.initial_state(mlp.init(key)).inner.model)
    state = deep_start(model, size=4)
    two = deep_gradient_step(
      state, keys, keys, values, size=4, **options
    )[1].loss  # fmt: skip
    return one.reshape(-1, 4).mean(1), two.reshape(-1, 4).mean(1)

  linear, mlp = losses(jax.random.key(0))
  # ½ ‖2 u‖² = 8 where the sign is wrong: an affine map has one in four so.
  assert linear.min() > 1.9, linear
  assert mlp[0] > 2 and mlp[-1] < 0.1, mlp[::20]


def test_learns_to_recall():
  """Trained for a short while, with no convolution; with fresh weights at
  every token it cannot."""
  draw = functools.partial(checks.pairs, count=3, keys=3)
  cell = memzoo.make("ttt_mlp", d_model=8, mini_batch_size=1, base_lr=1.0)
  params, accuracy = checks.learn(cell, draw, 150, rate=2e-2)
  assert accuracy > 0.95, accuracy

  @jax.jit
  @jax.vmap
  def forgetful(key):
    xs, targets, _ = draw(key)
    reset = jnp.ones(len(xs), bool)
    logits = memzoo.scan(cell, params, None, xs, reset=reset)[1]
    return jnp.argmax(logits[-1]) == targets[-1]

  right = forgetful(jax.random.split(jax.random.key(5), 256))
  assert right.mean() < 0.5


def test_starts_as_the_authors_code_does():
  cell = memzoo.make("ttt_mlp", d_model=64, num_heads=2)
  params = jax.jit(cell.init)(jax.random.key(0))
  assert cell.base_lr == 0.1
  assert params["w1"].shape == (2, 32, 128)
  assert params["w2"].shape == (2, 128, 32)
  np.testing.assert_allclose(params["w1"].std(), 0.02, rtol=0.05)
  np.testing.assert_allclose(params["w2"].std(), 0.02 / 2**0.5, rtol=0.05)
  for name in ("b1", "b2", "place", "rate_b"):
    assert not np.any(params[name])


def test_options_are_checked():
  with pytest.raises(ValueError, match="mini_batch_size must be a positive"):
    memzoo.make("ttt_mlp", d_model=12, mini_batch_size=0)
  with pytest.raises(ValueError, match="base_lr must be 0 or more, got -1.0"):
    memzoo.make("ttt_mlp", d_model=12, base_lr=-1.0)
