"""Atlas against Behrouz et al. 2025 (arXiv:2505.23735), eq. 5, 9, 10, 15, 16,
19, 20, 26, 32, 33, 42 and 43."""

import functools
import itertools
import math

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.ops import features


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


def polynomial(x, roots):
  """Every monomial of each degree, weighed so that φ(x)·φ(y) = Σ a_i (x·y)^i."""
  out = []
  for degree, root in enumerate(roots):
    for picked in itertools.combinations_with_replacement(
      range(len(x)), degree
    ):
      times = math.factorial(degree)
      for n in set(picked):
        times /= math.factorial(picked.count(n))
      out.append(root * np.sqrt(times) * np.prod([x[n] for n in picked]))
  return np.array(out)


def recall(memory, x):
  """(42) or (43) less its residual, or W x; and ∂/∂matrices as a function of
  the gradient of what it gives. A memory is (W_1, W_2), (W_1, W_2, W_3) or
  (W,), which act on rows."""
  if len(memory) == 1:
    return x @ memory[0], lambda g: [np.outer(x, g)]
  w1, w2 = memory[:2]
  y, slope = gelu(x @ w2)
  gate = x @ memory[2] if len(memory) == 3 else 1.0
  back = lambda g: [np.outer(y * gate, g), np.outer(x, w1 @ g * gate * slope)]
  if len(memory) == 2:
    return y @ w1, back
  return (y * gate) @ w1, lambda g: [*back(g), np.outer(x, w1 @ g * y)]


def newton_schulz(s, k):
  """Muon's quintic, k times, as matrices."""
  x = s / np.sqrt(np.sum(s**2) + 1e-14)
  for _ in range(k):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x


def matrices(cell, params, head):
  """The paper's W_1, W_2 (and W_3) from our layers, and back."""
  layers = [np.float64(params[f"memory_{n}"][head])
            for n in range(cell.memory_depth)]  # fmt: skip
  if cell.memory_depth == 1:
    return layers
  parts = 2 if cell.activation == "geglu" else 1
  return [layers[1], *np.split(layers[0], parts, axis=1)]


def paper(cell, params, xs):
  """Token by token: (M, S [H] lists of matrices, y, surprise, loss)."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  d, h, c = cell.d_model, cell.num_heads, cell.window
  k, deep, muon = d // h, cell.memory_depth > 1, cell.optimizer == "muon"
  memories = [matrices(cell, params, j) for j in range(h)]
  anchors = list(memories)
  pasts = [[0 * w for w in m] for m in memories]
  pairs = [[] for _ in range(h)]
  width = p["conv"].shape[0]
  projected, out = [np.zeros(3 * d)] * (width - 1), []
  surprise, losses = np.zeros((len(xs), h)), np.zeros((len(xs), h))
  unit = lambda z: z / np.sqrt(np.sum(z**2) + 1e-6)
  for t, x in enumerate(np.asarray(xs, np.float64)):
    projected = [*projected, x @ p["qkv"]]
    qkv = silu(sum(w * r for w, r in zip(p["conv"], projected[-width:])))
    gates = sigmoid((x @ p["gates"]).reshape(-1, h) + p["gate_bias"])
    gamma = sigmoid((x @ p["gamma"]).reshape(h, c) + p["gamma_bias"])
    y = []
    for j in range(h):
      q, key, v = (qkv[i * d + j * k : i * d + (j + 1) * k] for i in range(3))
      q, key = unit(q), unit(key)
      pairs[j] = [*pairs[j], (key, v)][-c:]
      total = [0 * w for w in memories[j]]
      for weight, (key, v) in zip(gamma[j], pairs[j][::-1]):
        value, pull = recall(anchors[j], polynomial(key, p["taylor"][j]))
        if cell.objective == "l2":
          error = value + deep * key - v
          loss, g = error @ error, 2 * error
        else:
          loss, g = -value @ v, -v
        losses[t, j] += weight * loss
        total = [a + weight * b for a, b in zip(total, pull(g))]
      surprise[t, j] = np.sqrt(sum(np.sum(g**2) for g in total))
      alpha, eta = gates[0, j], gates[1, j]
      moves = total
      if muon:
        pasts[j] = [gates[2, j] * s + g for s, g in zip(pasts[j], total)]
        moves = [newton_schulz(s, cell.iterations) for s in pasts[j]]
      memories[j] = [alpha * w - eta * n for w, n in zip(memories[j], moves)]
      o = recall(memories[j], polynomial(q, p["taylor"][j]))[0] + deep * q
      o = o / np.sqrt(np.mean(o**2) + 1e-5) * p["norm"]
      y.append(o * silu((x @ p["gate"])[j * k : (j + 1) * k]))
    out.append(np.concatenate(y) @ p["out"])
    if (t + 1) % cell.mini_batch_size == 0:
      anchors = list(memories)
  return memories, pasts, np.stack(out), surprise.mean(1), losses.mean(1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(cell, params, xs, form=None):
  return memzoo.scan(cell, params, None, xs, implementation=form, reports=True)


@pytest.mark.parametrize(
  "options,form",
  [
    (dict(), "step"),
    (dict(), "chunk"),
    (dict(iterations=5), "scan"),
    (dict(optimizer="gradient", degree=3), "chunk"),
    (dict(activation="geglu", mini_batch_size=1), "scan"),
    (dict(activation="geglu", objective="dot"), "chunk"),
    (
      dict(
        optimizer="gradient", memory_depth=1, mini_batch_size=1, window=1
      ),
      "scan",
    ),
  ],
)  # fmt: skip
def test_paper_equation(options, form):
  """The last mini-batch is cut."""
  cell = memzoo.tiny("atlas", **options)
  params, xs = checks.drawn(cell, 0.1), checks.inputs(cell, 11)
  memories, pasts, y, surprise, loss = paper(cell, params, xs)
  state, ys, reports = run(cell, params, xs, form)
  assert checks.relative(ys, y) <= checks.FORWARD
  got = reports["surprise"], reports["inner_loss"]
  assert checks.relative(got, (surprise, loss)) <= checks.FORWARD
  for model, want in (
    (state.inner.model, memories), (state.inner.momentum, pasts)
  ):  # fmt: skip
    if model is not None:
      layers = {f"memory_{n}": layer.w for n, layer in enumerate(model)}
      for j in range(cell.num_heads):
        got = matrices(cell, layers, j)
        assert checks.relative(got, want[j]) <= checks.FORWARD


def test_features_are_those_of_a_polynomial_kernel():
  """Eq. 5, a_i = 1 / i! at the start: the Taylor polynomial of exp(x·y)."""
  r = np.random.default_rng(0)
  x, y = jnp.asarray(r.normal(size=(2, 5, 3, 4)) / 2, jnp.float32)
  for degree in (1, 2, 4):
    cell = memzoo.make("atlas", d_model=12, num_heads=3, degree=degree)
    roots = cell.init(jax.random.key(0))["taylor"]
    phi = [features.polynomial(z, roots) for z in (x, y)]
    dots = np.sum(x * y, -1)
    want = sum(dots**i / math.factorial(i) for i in range(degree + 1))
    np.testing.assert_allclose(np.sum(phi[0] * phi[1], -1), want, rtol=1e-4)


def gated(cell, **gates):
  """Starting parameters, with gates that do not depend on the input."""
  params = jax.jit(cell.init)(jax.random.key(0))
  logit = lambda p: math.log(p) - math.log1p(-p)
  bias, gamma = params["gate_bias"], params["gamma_bias"]
  for n, name in enumerate(("alpha", "eta", "theta")):
    if name in gates:
      bias = bias.at[n].set(logit(gates[name]))
  gamma = jnp.full_like(gamma, logit(gates.get("gamma", 0.5)))
  zero = {k: jnp.zeros_like(params[k]) for k in ("gates", "gamma")}
  return {**params, **zero, "gate_bias": bias, "gamma_bias": gamma}


TOLD, AFTER = 5, 16


def misremembered(form, window, etas):
  """Pairs are told once each, then nothing more: ‖M(k_i) − v_i‖² of each of
  them at the end, [rates, pairs], and ‖v_i‖²."""
  cell = memzoo.make(
    "atlas", d_model=16, window=window, degree=1, optimizer="gradient",
    memory_depth=1, conv_size=1, mini_batch_size=1 if form == "scan" else 2,
  )  # fmt: skip
  params = gated(cell, alpha=1 - 1e-7)
  params["memory_0"] = jnp.zeros_like(params["memory_0"])
  params["taylor"] = jnp.array([[0.0, 1.0]])  # φ(x) = x: no input, no key
  told = checks.inputs(cell, TOLD)
  xs = np.concatenate([told, np.zeros((AFTER, 16), np.float32)])

  @jax.jit
  @jax.vmap
  def learned(eta):
    bias = params["gate_bias"].at[1].set(jnp.log(eta) - jnp.log1p(-eta))
    p = {**params, "gate_bias": bias}
    return memzoo.scan(cell, p, None, xs, implementation=form)[0].inner.model

  w = np.asarray(learned(jnp.asarray(etas))[0].w)[:, 0, 1:]
  u = silu(told @ np.asarray(params["qkv"]) * np.asarray(params["conv"]))
  k, v = np.float64(u[:, 16:32]), u[:, 32:]
  k = k / np.sqrt(np.sum(k**2, 1, keepdims=True) + 1e-6)
  return np.sum((k @ w - v) ** 2, axis=-1), np.sum(v**2, axis=-1)


@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_signature_behaviour(form):
  """It fits a window where a rule of one token cannot: pairs told once, with
  keys that are not orthogonal, disturb each other at any rate; with the window
  on them the memory goes on until it has them all."""
  token, norms = misremembered(form, 1, np.linspace(0.1, 0.9, 9))
  window, _ = misremembered(form, TOLD + AFTER, [0.3])
  assert window.sum() < 0.1 * norms.sum(), (window, norms)
  assert np.all(window.sum(1) < 0.3 * token.sum(1)), (window, token)


@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_gates_prune_the_window(form):
  """γ_i^(t) → 0 leaves pair i out: what is pruned is not learned."""
  cell = memzoo.tiny("atlas", optimizer="gradient", window=4, conv_size=1)
  params, xs = checks.drawn(cell, 0.1), checks.inputs(cell, 6)
  shut = np.array(params["gamma_bias"])
  shut[:, 2:] = -1e5
  near = memzoo.tiny("atlas", optimizer="gradient", window=2, conv_size=1)
  first = params["gamma"].reshape(-1, cell.num_heads, 4)[..., :2]
  short = {**params, "gamma": first.reshape(cell.d_model, -1),
           "gamma_bias": shut[:, :2]}  # fmt: skip
  pruned, ys, _ = run(cell, {**params, "gamma_bias": shut}, xs, form)
  want, other, _ = run(near, short, xs, form)
  assert checks.relative(ys, other) <= checks.FORWARD
  assert checks.relative(pruned.inner.model, want.inner.model) <= checks.FORWARD
  assert checks.relative(ys, run(cell, params, xs, form)[1]) > 1e-3


@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_a_muon_step_has_singular_values_near_one(form):
  """A window of more pairs than the memory has outputs moves every direction by
  about the rate, however small the loss was there."""
  eta = 0.01
  cell = memzoo.make(
    "atlas", d_model=4, window=8, memory_depth=1, conv_size=1,
    mini_batch_size=1 if form == "scan" else 8,
  )  # fmt: skip
  params = gated(cell, alpha=1 - 1e-7, eta=eta)
  # All but the last token have a rate of zero, by a channel of their own.
  xs = checks.inputs(cell, 8)
  xs[:, 0] = np.arange(8) < 7
  params["gates"] = params["gates"].at[0, 1].set(-1e5)
  state = run(cell, params, xs, form)[0]
  moved = np.asarray(state.inner.model[0].w[0] - params["memory_0"][0])
  sigma = np.linalg.svd(moved / eta, compute_uv=False)
  assert np.all((sigma > 0.6) & (sigma < 1.3)), sigma
  past = np.linalg.svd(state.inner.momentum[0].w[0], compute_uv=False)
  assert past[0] > 3 * past[-1], past  # the momentum itself is not so


@pytest.mark.parametrize("form", ["scan", "chunk"])
@pytest.mark.parametrize("window", [1, 3])
def test_linear_attention_of_a_matrix_is_attention(window, form):
  """Eq. 26: with the inner product, one matrix, α = 1 and c = 1 (DLA) the memory
  gives Σ_i v_i exp(q·k_i), without its normaliser, up to the degree of φ. With
  a longer window (SWLA, eq. 20) a pair is written as long as it is there."""
  cell = memzoo.make(
    "atlas", d_model=4, window=window, degree=6, objective="dot", conv_size=1,
    optimizer="gradient", memory_depth=1, mini_batch_size=4,
  )  # fmt: skip
  params = gated(cell, alpha=1 - 1e-7, eta=1 - 1e-6, gamma=1 - 1e-6)
  params["memory_0"] = jnp.zeros_like(params["memory_0"])
  xs = checks.inputs(cell, 9)
  model = run(cell, params, xs, form)[0].inner.model
  u = silu(xs @ np.asarray(params["qkv"]) * np.asarray(params["conv"]))
  unit = lambda z: z / np.sqrt(np.sum(z**2, -1, keepdims=True) + 1e-6)
  q, k, v = unit(u[:, :4]), unit(u[:, 4:8]), u[:, 8:]
  phi = np.stack([polynomial(x, params["taylor"][0]) for x in q])
  times = np.minimum(window, np.arange(len(xs), 0, -1))
  want = np.exp(q @ k.T) @ (times[:, None] * v)
  assert checks.relative(phi @ model[0].w[0], want) < 1e-3


@pytest.mark.parametrize("window", [1, 8])
def test_first_rates_are_stable_for_whole_mini_batches(window):
  """Sixteen gradients of c pairs each, all the same and all at one model, do
  not overshoot: the loss falls from mini-batch to mini-batch. And it can be
  differentiated, at c = 1 too."""
  cell = memzoo.make(
    "atlas", d_model=16, window=window, optimizer="gradient",
    memory_depth=1, conv_size=1,
  )  # fmt: skip
  params = jax.jit(cell.init)(jax.random.key(0))
  xs = jnp.tile(checks.inputs(cell, 1), (96, 1))
  loss = np.asarray(run(cell, params, xs, "chunk")[2]["inner_loss"])[15::16]
  assert np.all(np.diff(loss) < 0), loss
  total = lambda params: run(cell, params, xs, "chunk")[1].sum()
  for g in jax.tree.leaves(jax.jit(jax.grad(total))(params)):
    assert np.all(np.isfinite(g))


def test_learns_to_recall_what_was_written():
  """Trained for a short while, one memory of weights and no convolution; with
  a fresh memory at every token it cannot."""
  draw = functools.partial(checks.pairs, count=3, keys=3)
  cell = memzoo.make(
    "atlas", d_model=8, window=2, mini_batch_size=4, memory_depth=1, conv_size=1
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
    (dict(memory_depth=5), r"memory_depth must be in \(1, 2, 3, 4\), got 5"),
    (dict(optimizer="adam"), "optimizer must be in .*'gradient'.*got 'adam'"),
    (dict(objective="l1"), "objective must be in .*'dot'.*got 'l1'"),
    (dict(activation="relu"), "activation must be in .*'geglu'.*got 'relu'"),
    (dict(window=0), "window must be a positive integer, got 0"),
    (dict(iterations=0), "iterations must be a positive integer, got 0"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("atlas", d_model=16, **options)


def test_one_token_mini_batches_have_no_chunk_form():
  cell = memzoo.tiny("atlas", mini_batch_size=1)
  params, xs = cell.init(jax.random.key(0)), checks.inputs(cell, 3)
  with pytest.raises(NotImplementedError, match="mini-batches of one token"):
    memzoo.scan(cell, params, None, xs, implementation="chunk")
