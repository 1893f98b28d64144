"""TTT-Linear: the layer of the paper's code, and that it learns in context."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memzoo


def layer_norm(z, scale, bias):
  centred = z - z.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
  return centred / deviation * scale + bias


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def gelu(z):
  return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def convolve(x, kernel, bias):
  padded = np.concatenate([np.zeros((len(kernel) - 1, x.shape[1])), x])
  return bias + sum(
    row * padded[w : w + len(x)] for w, row in enumerate(kernel)
  )


def rotate(x, places):
  """Channel i turns with channel i + K / 2, by place · 10000^(−2 i / K)."""
  half = x.shape[-1] // 2
  angle = places[:, None] * 10000.0 ** (-np.arange(half) / half)
  turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], 1)


def layer(cell, p, xs):
  """Section 2.5, the dual form, one mini-batch after the other; what is around
  it as in the authors' TTTLinear. Returns (y, inner loss, W, b)."""
  d, h, n = cell.d_model, cell.num_heads, cell.mini_batch_size
  width, length = d // h, len(xs)
  z = xs @ p["in"]
  if cell.backbone == "mamba":
    v = z[:, d:]
    q, k = (convolve(z[:, :d], p["conv"][i], p["conv_bias"][i]) for i in (0, 1))
  else:
    q, k, v = z[:, :d], z[:, d : 2 * d], z[:, 2 * d :]
  gates = sigmoid(xs @ p["rate_w"] + p["rate_b"])
  place_rate = np.maximum(1 / np.arange(1, n + 1) + p["place"], 0)
  out, loss = np.zeros((length, d)), np.zeros((length, h))
  models = []
  for j in range(h):
    part = slice(j * width, (j + 1) * width)
    gamma, beta = p["norm_scale"][j], p["norm_bias"][j]
    w, b = p["w0"][j], p["b0"][j]
    for first in range(0, length, n):
      t = np.arange(first, min(first + n, length))
      xq, xk = rotate(q[t, part], t % n), rotate(k[t, part], t % n)
      target = v[t, part] - xk
      pre = xk @ w + b
      mean = pre.mean(1, keepdims=True)
      std = np.sqrt(((pre - mean) ** 2).mean(1, keepdims=True) + 1e-6)
      hat = (pre - mean) / std
      error = gamma * hat + beta - target
      loss[t, j] = 0.5 * (error**2).sum(1)
      g = gamma * error
      g = (
        width * g
        - g.sum(1, keepdims=True)
        - hat * (g * hat).sum(1, keepdims=True)
      ) / (width * std)
      # eta[t, s]: the row is the token that reads, the column the one learned.
      eta = cell.base_lr / width * np.outer(place_rate[: len(t)], gates[t, j])
      attention = np.tril(xq @ xk.T)
      b_bar = b - np.tril(eta) @ g
      z_bar = xq @ w - (eta * attention) @ g + b_bar
      out[t, part] = xq + layer_norm(z_bar, gamma, beta)
      if len(t) == n:
        w = w - (eta[-1][:, None] * xk).T @ g
        b = b - eta[-1] @ g
    models.append((w, b))
  y = layer_norm(out, p["post_scale"], p["post_bias"])
  if cell.backbone == "mamba":
    y = gelu(xs @ p["gate"]) * y
  w, b = (np.stack(x) for x in zip(*models))
  return y @ p["out"], loss.mean(1), w, b


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
  """The dual form of whole mini-batches (section 2.5) is what the chunk form
  and the token-by-token primal compute; the last mini-batch is cut."""
  cell = memzoo.tiny("ttt_linear", backbone=backbone, mini_batch_size=3)
  params = drawn(cell)
  xs = np.random.default_rng(3).normal(size=(11, cell.d_model))
  xs = jnp.asarray(xs, jnp.float32)
  to_double = lambda tree: jax.tree.map(
    lambda x: np.asarray(x, np.float64), tree
  )
  y, loss, w, b = layer(cell, to_double(params), to_double(xs))
  for form in ("step", "chunk"):
    state, ys, reports = run(cell, params, xs, form)
    model = state.inner.model
    got = (ys, reports["inner_loss"], model.w, model.b)
    assert checks.relative(got, (y, loss, w, b)) <= checks.FORWARD, form
    assert state.inner.phase == 2


def test_inner_loss_falls_as_a_mapping_repeats():
  cell = memzoo.make("ttt_linear", d_model=8, num_heads=2, mini_batch_size=4)
  params = jax.jit(cell.init)(jax.random.key(0))
  xs = jnp.tile(jax.random.normal(jax.random.key(1), (4, 8)), (12, 1))
  report = run(cell, params, xs)[2]["inner_loss"]
  each = report.reshape(12, 4).mean(1)  # of every time it comes round
  assert np.all(np.diff(each) < 0), each
  assert each[1] < 0.5 * each[0], each


def regression(key):
  """Eight pairs x, y = x A of a new rotation A, then four x to be answered."""
  key_a, key_x = jax.random.split(key)
  a = jnp.linalg.qr(jax.random.normal(key_a, (3, 3)))[0]
  x = jax.random.normal(key_x, (12, 3))
  x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
  ask = (jnp.arange(12) >= 8).astype(jnp.float32)[:, None]
  told = (x @ a) * (1 - ask)
  return jnp.concatenate([x, told, ask, jnp.ones_like(ask)], 1), x @ a


def test_signature_behaviour():
  """Trained for a short while, it regresses in context; the same layer with
  inner learning rates that are 0, and stay there, cannot."""
  cell = memzoo.make("ttt_linear", d_model=8, mini_batch_size=4)
  optimizer = optax.adam(1e-2)

  def loss(params, key):
    xs, ys = jax.vmap(regression)(jax.random.split(key, 64))
    out = jax.vmap(lambda x: memzoo.scan(cell, params, None, x)[1])(xs)
    return jnp.mean(jnp.sum((out[:, 8:, :3] - ys[:, 8:]) ** 2, -1))

  def step(carry, key):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params, key)
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
      updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), value

  @jax.jit
  def train(params, key):
    carry, keys = (params, optimizer.init(params)), jax.random.split(key, 300)
    (params, _), losses = jax.lax.scan(step, carry, keys)
    return params, losses[-20:].mean()

  params = jax.jit(cell.init)(jax.random.key(0))
  _, learned = train(params, jax.random.key(1))
  # λ_i = max(1 / i + θ_i, 0) has no gradient where it is cut off.
  still = {**params, "place": params["place"] - 2}
  after, fixed = train(still, jax.random.key(1))
  np.testing.assert_array_equal(after["place"], still["place"])
  assert learned < 0.4 * fixed, (learned, fixed)


@pytest.mark.parametrize(
  "options,message",
  [
    (
      dict(num_heads=4),
      "num_heads must be such that d_model / it is even, got 4",
    ),
    (dict(num_heads=5), "num_heads=5 must divide d_model=12"),
    (
      dict(backbone="rnn"),
      r"backbone must be one of \('transformer', 'mamba'\)",
    ),
    (dict(base_lr=-1.0), "base_lr must be 0 or more, got -1.0"),
    (
      dict(mini_batch_size=0),
      "mini_batch_size must be a positive integer, got 0",
    ),
  ],
)
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("ttt_linear", d_model=12, **options)
