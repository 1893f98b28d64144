"""Titans' memory against Behrouz et al. 2024 (arXiv:2501.00663), eq. 8 to 18."""

import functools

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


def gelu(z):
  """The activation and its derivative."""
  inner = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
  t = np.tanh(inner)
  slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
  return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * slope


def recall(memory, x, scale, shift):
  """M(x), and ∂M/∂weights as a function of the gradient of M(x)."""
  inputs, slopes, h = [], [], x
  for i, w in enumerate(memory):
    inputs.append(h)
    z = h @ w
    h, slope = gelu(z) if i + 1 < len(memory) else (z, 1.0)
    slopes.append(slope)
  if scale is not None:
    centred = h - h.mean()
    deviation = np.sqrt(np.mean(centred**2) + 1e-6)
    unit = centred / deviation
    h = x + scale * unit + shift

  def pull(g):
    if scale is not None:
      g = g * scale
      g = (g - g.mean() - unit * np.mean(g * unit)) / deviation
    grads = []
    for w, h, slope in zip(memory[::-1], inputs[::-1], slopes[::-1]):
      g = g * slope
      grads.append(np.outer(h, g))
      g = w @ g
    return grads[::-1]

  return h, pull


def paper(cell, params, xs):
  """Eq. 11 to 15 token by token, with eq. 18's gradients at the mini-batch's
  start: (M, S, y, surprise, loss) with M, S [H] lists of matrices."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  d, h, depth = cell.d_model, cell.num_heads, cell.memory_depth
  k = d // h
  memories = [[p[f"memory_{n}"][j] for n in range(depth)] for j in range(h)]
  anchors = list(memories)
  pasts = [[np.zeros_like(w) for w in m] for m in memories]
  width = p["conv"].shape[0]
  projected, out = [np.zeros(3 * d)] * (width - 1), []
  surprise, losses = np.zeros((len(xs), h)), np.zeros((len(xs), h))
  for t, x in enumerate(np.asarray(xs, np.float64)):
    projected = [*projected, x @ p["qkv"]]
    qkv = silu(sum(c * r for c, r in zip(p["conv"], projected[-width:])))
    gates = (x @ p["gates"]).reshape(-1, h, depth) + p["gate_bias"]
    gates = list(sigmoid(gates))
    theta, none = gates.pop() / k, np.zeros((h, depth))
    eta = gates.pop() if cell.momentum else none
    alpha = gates.pop() if cell.forgetting else none
    y = []
    for j in range(h):
      q, key, v = (qkv[i * d + j * k : i * d + (j + 1) * k] for i in range(3))
      q = q / np.sqrt(np.sum(q**2) + 1e-6)
      key = key / np.sqrt(np.sum(key**2) + 1e-6)
      norm = (None, None)
      if cell.memory_norm:
        norm = p["memory_scale"][j], p["memory_bias"][j]
      value, pull = recall(anchors[j], key, *norm)
      losses[t, j] = np.sum((value - v) ** 2)
      grads = pull(2 * (value - v))
      surprise[t, j] = np.sqrt(sum(np.sum(g**2) for g in grads))
      pasts[j] = [
        eta[j, n] * pasts[j][n] - theta[j, n] * grads[n] for n in range(depth)
      ]
      memories[j] = [
        (1 - alpha[j, n]) * memories[j][n] + pasts[j][n] for n in range(depth)
      ]
      o = recall(memories[j], q, *norm)[0]
      o = o / np.sqrt(np.mean(o**2) + 1e-5) * p["norm"]
      y.append(o * silu((x @ p["gate"])[j * k : (j + 1) * k]))
    out.append(np.concatenate(y) @ p["out"])
    if (t + 1) % cell.mini_batch_size == 0:
      anchors = list(memories)
  return memories, pasts, np.stack(out), surprise.mean(1), losses.mean(1)


def drawn(cell, seed=1):
  """Parameters away from their starting values."""
  params, r = cell.init(jax.random.key(0)), np.random.default_rng(seed)
  noise = lambda x: jnp.asarray(x + 0.1 * r.normal(size=x.shape), jnp.float32)
  return jax.tree.map(noise, params)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(cell, params, xs, form=None):
  return memzoo.scan(cell, params, None, xs, implementation=form, reports=True)


def inputs(cell, length, seed=3):
  xs = np.random.default_rng(seed).normal(size=(length, cell.d_model))
  return jnp.asarray(xs, jnp.float32)


@pytest.mark.parametrize(
  "options,forms",
  [
    (dict(), ("step", "chunk")),
    (dict(memory_depth=1, mini_batch_size=1), ("step", "scan")),
    (
      dict(memory_depth=4, mini_batch_size=3, memory_norm=False, expansion=2),
      ("chunk",),
    ),
    (dict(forgetting=False), ("step", "chunk")),
    (dict(momentum=False), ("step", "chunk")),
    (dict(forgetting=False, momentum=False, memory_depth=1), ("chunk",)),
  ],
)
def test_paper_equation(options, forms):
  """The last mini-batch is cut."""
  cell = memzoo.tiny("titans", **options)
  params, xs = drawn(cell), inputs(cell, 11)
  memories, pasts, y, surprise, loss = paper(cell, params, xs)
  for form in forms:
    state, ys, reports = run(cell, params, xs, form)
    assert checks.relative(ys, y) <= checks.FORWARD, form
    got = reports["surprise"], reports["inner_loss"]
    assert checks.relative(got, (surprise, loss)) <= checks.FORWARD, form
    kept = (memories, pasts)[: 1 + cell.momentum]
    for n in range(cell.memory_depth):
      got = [m[n].w for m in (state.inner.model, state.inner.momentum) if m]
      want = [np.stack([m[n] for m in ms]) for ms in kept]
      assert checks.relative(got, want) <= checks.FORWARD, form


def gated(cell, alpha, eta, theta):
  """Starting parameters with gates that do not depend on the input."""
  params = jax.jit(cell.init)(jax.random.key(0))
  gates = jnp.array([alpha, eta, theta])
  logits = jnp.log(gates) - jnp.log1p(-gates)
  bias = jnp.broadcast_to(logits[:, None, None], params["gate_bias"].shape)
  return {**params, "gates": jnp.zeros_like(params["gates"]), "gate_bias": bias}


@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_signature_behaviour(form):
  """It writes what surprises it: the same pair again and again surprises, and
  moves the memory, less every time; another pair surprises it anew."""
  size = 4 if form == "chunk" else 1
  cell = memzoo.make("titans", d_model=16, mini_batch_size=size, conv_size=1)
  params = gated(cell, 0.0, 0.0, 0.1)
  x, other = inputs(cell, 2)
  xs = jnp.concatenate([jnp.tile(x, (32, 1)), other[None]])
  # Of every mini-batch, which learns at the weights before it.
  report = np.asarray(run(cell, params, xs, form)[2]["surprise"])
  surprise = report[:32:size]
  np.testing.assert_allclose(report[:32], np.repeat(surprise, size), rtol=1e-4)
  assert np.all(np.diff(surprise) < 0), surprise
  assert surprise[-1] < 0.05 * surprise[0]
  assert report[32] > 10 * surprise[-1]

  @jax.jit
  def weights(params, xs):
    steps = lambda s, x: (cell.step(params, s, x)[0], s.inner.model)
    return jax.lax.scan(steps, cell.initial_state(params), xs)[1]

  if form == "scan":
    moved = sum(
      np.sum(np.diff(layer.w[:32], axis=0) ** 2, axis=(1, 2, 3))
      for layer in weights(params, xs)
    )
    want = 0.1 / 16 * surprise[:31]  # θ ‖∇ℓ‖
    np.testing.assert_allclose(np.sqrt(moved), want, rtol=1e-3)


def test_forgets_at_the_rate_of_its_gate():
  """With nothing written, M shrinks by 1 − α_t; α = 1 clears it."""
  cell = memzoo.tiny("titans")
  params = drawn(cell)
  bias = params["gate_bias"].at[2].set(-jnp.inf)  # θ = 0
  params = {**params, "gate_bias": bias}
  xs = inputs(cell, 9)
  gates = np.asarray(xs @ params["gates"]).reshape(9, 3, 2, 2)
  keep = np.prod(1 - sigmoid(gates[:, 0] + np.asarray(bias[0])), axis=0)
  for form in ("step", "chunk"):
    state, _, _ = run(cell, params, xs, form)
    for n, layer in enumerate(state.inner.model):
      want = params[f"memory_{n}"] * keep[:, n, None, None]
      assert checks.relative(layer.w, want) <= checks.FORWARD
    cleared, _, _ = run(
      cell, {**params, "gate_bias": bias.at[0].set(jnp.inf)}, xs, form
    )
    assert not np.any(cleared.inner.model[1].w)


@pytest.mark.parametrize("form", ["step", "chunk"])
def test_momentum_carries_a_surprise_to_later_tokens(form):
  """A step S is followed by η S, η² S …, though nothing more is learned."""
  eta, later = 0.7, 5
  cell = memzoo.tiny("titans", conv_size=1)
  params = gated(cell, 0.0, eta, 0.5)
  # θ = ½ at the first token, 0 at all others, by a channel of their own.
  weights = params["gates"].reshape(cell.d_model, 3, -1)
  weights = weights.at[0, 2].set(-1e5).reshape(params["gates"].shape)
  params = {**params, "gates": weights}
  xs = inputs(cell, 1 + later).at[:, 0].set(jnp.minimum(jnp.arange(6.0), 1))
  first, _, reports = run(cell, params, xs[:1], "step")
  last, _, _ = run(cell, params, xs, form)
  assert reports["surprise"][0] > 0
  total = sum(eta**i for i in range(later + 1))
  for n in range(cell.memory_depth):
    start, s = params[f"memory_{n}"], first.inner.momentum[n].w
    got = last.inner.model[n].w - start
    assert checks.relative(got, total * s) <= 1e-4
    got = last.inner.momentum[n].w
    assert checks.relative(got, eta**later * s) <= checks.FORWARD


def test_learns_to_recall_what_was_written():
  """Trained for a short while, one memory of weights and no convolution; with
  a fresh memory at every token it cannot."""
  draw = functools.partial(checks.pairs, count=3, keys=3)
  cell = memzoo.make(
    "titans", d_model=8, mini_batch_size=1, expansion=2, conv_size=1
  )
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


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(num_heads=5), "num_heads=5 must divide d_model=16"),
    (dict(memory_depth=5), "memory_depth must be 1 to 4, got 5"),
    (dict(expansion=0), "expansion must be a positive integer, got 0"),
    (dict(mini_batch_size=0), "mini_batch_size must be a positive integer"),
  ],
)
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("titans", d_model=16, **options)


def test_one_token_mini_batches_have_no_chunk_form():
  cell = memzoo.tiny("titans", mini_batch_size=1)
  params, xs = cell.init(jax.random.key(0)), inputs(cell, 3)
  with pytest.raises(NotImplementedError, match="mini-batches of one token"):
    memzoo.scan(cell, params, None, xs, implementation="chunk")
  lines = [str(d) for d in memzoo.explain(memzoo.scan, cell, params, None, xs)]
  assert any(line.startswith("titans: 'scan'") for line in lines), lines
