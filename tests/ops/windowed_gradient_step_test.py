"""`windowed_gradient_step`: the Omega rule, with and without Newton-Schulz.

The oracle goes token by token in float64: it keeps every pair since the last
reset, and takes the gradient of the whole window by back-propagation written
out here. Newton-Schulz-k multiplies rounding by 3.4445^k where the momentum is
nearly rank-deficient: the grid has small k, and k = 5 is held to the same
tolerances where it is well-posed.
"""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops.deep_gradient_step import (
  deep_gradient_step,
  start as deep_start,
)
from memzoo.ops.windowed_gradient_step import (
  Layer,
  State,
  newton_schulz,
  start,
  windowed_gradient_step,
)

T, K, HIDDEN, V, DEAD = 15, 4, 5, 3, 6


class Case(dict):
  """n, c, depth, k and which parts the rule has."""

  __getattr__ = dict.__getitem__


def rule(n, c, depth, **parts):
  has = dict(momentum=False, decay=True, k=0, objective="l2", activation="gelu")
  return Case(has | dict(n=n, c=c, depth=depth) | parts)


RULES = {
  "omega": rule(4, 3, 2),
  "atlas": rule(4, 3, 2, momentum=True, k=2),
  "gated": rule(4, 3, 2, momentum=True, k=2, activation="geglu"),
  "swla": rule(4, 3, 2, objective="dot", activation="geglu"),
  "long window": rule(3, 7, 1, momentum=True, decay=False),
  "one token": rule(1, 4, 2, momentum=True, k=3),
}
CHUNKED = ("omega", "atlas", "gated", "swla", "long window")
DIFFERENTIATED = ("atlas",)  # compilation is what the grid costs
CASES = (
  "plain", "warm", "masked", "all masked", "resets", "resets and masks",
  "reset at every token", "identical keys", "gates shut", "infinity",
)  # fmt: skip


def widths(m):
  """(inputs, outputs) of each layer."""
  halves = 2 if m.activation == "geglu" else 1
  hidden = [(K, halves * HIDDEN), (HIDDEN, V)]
  return hidden if m.depth == 2 else [(K, V)]


def gelu(z):
  """The activation and its derivative."""
  a, b = np.sqrt(2 / np.pi), 0.044715
  t = np.tanh(a * (z + b * z**3))
  slope = 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * a * (1 + 3 * b * z**2)
  return 0.5 * z * (1 + t), slope


def activated(m, z):
  """What a hidden layer gives, and its gradient's way back."""
  if m.activation == "gelu":
    y, slope = gelu(z)
    return y, lambda g: g * slope
  a, b = np.split(z, 2)
  y, slope = gelu(a)
  return y * b, lambda g: np.concatenate([g * b * slope, g * y])


def forward(m, layers, x):
  """f(x), and what back-propagation needs."""
  kept = []
  for i, w in enumerate(layers):
    y, back = x @ w, lambda g: g
    if i + 1 < m.depth:
      y, back = activated(m, y)
    kept.append((x, back))
    x = y
  return x, kept


def gradient(m, layers, k, v):
  """∇ ℓ of every weight, and ℓ: ½ ‖f(k) − v‖², or −⟨f(k), v⟩."""
  out, kept = forward(m, layers, k)
  g = -v if m.objective == "dot" else out - v
  loss = -out @ v if m.objective == "dot" else 0.5 * g @ g
  grads = []
  for w, (x, back) in zip(layers[::-1], kept[::-1]):
    g = back(g)
    grads.insert(0, np.outer(x, g))
    g = w @ g
  return grads, loss


def orthogonalise(s, k):
  """Muon's steps, on the singular values of s."""
  u, sigma, vt = np.linalg.svd(s, full_matrices=False)
  sigma = sigma / np.sqrt(np.sum(sigma**2) + 1e-14)
  for _ in range(k):
    sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
  return u @ np.diag(sigma) @ vt


def steps(m, past):
  """What is taken from each layer: W_2 and W_3 of Atlas++ are two matrices."""
  out = []
  for i, s in enumerate(past):
    parts = np.split(s, 2, axis=1) if m.activation == "geglu" and not i else [s]
    moves = [orthogonalise(x, m.k) for x in parts] if m.k else parts
    out.append(np.concatenate(moves, axis=1))
  return out


def oracle(m, c):
  """(model, anchor, momentum, keys, values, count, phase), outputs."""
  c = {k: np.asarray(x, np.float64) for k, x in c.items()}
  layers = lambda prefix: [c[f"{prefix}_w{i}"] for i in range(m.depth)]
  model, anchor, past = layers("model"), layers("anchor"), layers("past")
  if m.n == 1:
    anchor = model
  phase, count, length = int(c["phase"]), int(c["count"]), len(c["q"])
  held = m.c - 1
  pairs = list(zip(c["keys"], c["values"]))[held - count :]
  o, loss, surprise = np.zeros((length, V)), *np.zeros((2, length))
  for t in range(length):
    if not c["mask"][t]:
      continue
    if c["reset"][t]:
      model = anchor = layers("fresh")
      past, pairs, phase = [0 * w for w in model], [], 0
    pairs = [*pairs, (c["k"][t], c["v"][t])][-m.c :]
    total = [0 * w for w in model]
    for gamma, (k, v) in zip(c["gate"][t], pairs[::-1]):
      grads, one = gradient(m, anchor, k, v)
      total = [a + gamma * b for a, b in zip(total, grads)]
      loss[t] += gamma * one
    surprise[t] = np.sqrt(sum(np.sum(g**2) for g in total))
    if m.momentum:
      theta = np.exp(c["log_momentum"][t])
      total = [theta * s + g for s, g in zip(past, total)]
    past = total
    alpha = np.exp(c["log_decay"][t]) if m.decay else 1.0
    moves = zip(model, steps(m, past))
    model = [alpha * w - c["rate"][t] * g for w, g in moves]
    o[t] = forward(m, model, c["q"][t])[0]
    phase += 1
    if phase == m.n:
      anchor, phase = model, 0
    if m.n == 1:
      anchor = model
  pairs = pairs[len(pairs) - min(held, len(pairs)) :]
  keys, values = np.zeros((held, K)), np.zeros((held, V))
  for i, (k, v) in enumerate(pairs):
    keys[held - len(pairs) + i], values[held - len(pairs) + i] = k, v
  state = [*model, *(anchor if m.n > 1 else []), *(past if m.momentum else [])]
  return [*state, keys, values, len(pairs), phase], [o, loss, surprise]


def make(name, case, length=T, seed=0):
  m = RULES[name]
  r = np.random.default_rng(seed)
  normal = lambda *shape: r.normal(size=shape)
  c = dict(
    phase=0, count=0, keys=np.zeros((m.c - 1, K)),
    values=np.zeros((m.c - 1, V)), q=normal(length, K), k=normal(length, K),
    v=normal(length, V), gate=r.random((length, m.c)),
    rate=0.1 * r.random(length), log_decay=np.log(1 - 0.3 * r.random(length)),
    log_momentum=np.log(0.8 * r.random(length)), reset=np.zeros(length, bool),
    mask=np.ones(length, bool), asked=np.ones(length, bool),
  )  # fmt: skip
  for i, (wide, out) in enumerate(widths(m)):
    for prefix in ("model", "fresh"):
      c[f"{prefix}_w{i}"] = normal(wide, out) / np.sqrt(wide)
    c[f"anchor_w{i}"] = c[f"model_w{i}"]
    c[f"past_w{i}"] = np.zeros((wide, out))
  if case in ("warm", "masked", "resets", "resets and masks"):
    c["phase"], c["count"] = m.n - 1, m.c - 2
    c["keys"][1:], c["values"][1:] = normal(m.c - 2, K), normal(m.c - 2, V)
    for i, (wide, out) in enumerate(widths(m)):
      c[f"past_w{i}"] = 0.2 * normal(wide, out)
      if m.n > 1:
        c[f"anchor_w{i}"] = c[f"model_w{i}"] + 0.2 * normal(wide, out)
  if case in ("masked", "resets and masks"):
    c["mask"] = r.random(length) < 0.7
  if case == "all masked":
    c["mask"][:] = False
    c["reset"][3] = True
  if case in ("resets", "resets and masks"):
    c["reset"] = r.random(length) < 0.25
  if case == "reset at every token":
    c["reset"][:] = True
  if case == "identical keys":
    c["k"][:] = c["k"][0]
  if case == "gates shut":
    c["log_decay"][[2, 3, 9]] = c["log_momentum"][[4, 9]] = -np.inf
    c["gate"][:, 1] = 0
  if case == "infinity":
    c["k"][2], c["q"][4], c["v"][5, 1] = np.inf, np.nan, -np.inf
    c["reset"][DEAD] = True
    c["asked"][:DEAD] = False
  kind = lambda x: np.float32 if np.asarray(x).dtype == float else None
  return {k: np.asarray(x, kind(x)) for k, x in c.items()}


def call(c, form, name, reset=True, mask=True):
  m = RULES[name]
  layers = lambda prefix: tuple(
    Layer(c[f"{prefix}_w{i}"]) for i in range(m.depth)
  )
  integer = lambda x: jnp.asarray(x).astype(jnp.int32)
  state = State(
    layers("model"), layers("anchor") if m.n > 1 else None,
    layers("past") if m.momentum else None, c["keys"], c["values"],
    integer(c["count"]), integer(c["phase"]),
  )  # fmt: skip
  return windowed_gradient_step(
    state, c["q"], c["k"], c["v"], gate=c["gate"], rate=c["rate"], size=m.n,
    log_decay=c["log_decay"] if m.decay else None,
    log_momentum=c["log_momentum"] if m.momentum else None,
    iterations=m.k, objective=m.objective, activation=m.activation,
    reset=c["reset"] if reset else None, mask=c["mask"] if mask else None,
    fresh=layers("fresh"), implementation=form,
  )  # fmt: skip


@functools.cache
def battery(name, form, reset, mask):
  """(state, outputs, gradients or None) of all cases at once."""

  def one(c):
    if name not in DIFFERENTIATED:
      return *call(c, form, name, reset, mask), None
    floats = {k: x for k, x in c.items() if checks.is_float(x)}
    rest = {k: x for k, x in c.items() if k not in floats}

    def loss(floats):
      state, out = call({**floats, **rest}, form, name, reset, mask)
      parts = [s for s in jax.tree.leaves(state) if checks.is_float(s)]
      flags = c["asked"]
      o = jnp.where(flags[:, None], out.o, 0.0)
      rest_of = [jnp.where(flags, y, 0.0) for y in out[1:]]
      return checks.wave(o, *rest_of, *parts), (state, out)

    grads, (state, out) = jax.grad(loss, has_aux=True)(floats)
    return state, out, grads

  return jax.jit(jax.vmap(one))


@functools.cache
def run(name, form, reset=True, mask=True):
  cases = [make(name, case) for case in CASES]
  stacked = {k: np.stack([c[k] for c in cases]) for k in cases[0]}
  return jax.device_get(battery(name, form, reset, mask)(stacked))


@pytest.mark.nans
@pytest.mark.parametrize(
  "name,form",
  [(name, "scan") for name in RULES] + [(name, "chunk") for name in CHUNKED],
)
def test_paper_equation(name, form):
  state, out, _ = run(name, form)
  for i, case in enumerate(CASES):
    c = make(name, case)
    if case == "infinity":  # the oracle's svd takes none
      c = {k: x[DEAD:] if len(np.shape(x)) and len(x) == T else x
           for k, x in c.items()}  # fmt: skip
    states, outputs = oracle(RULES[name], c)
    at = lambda tree, i=i: [x[i] for x in jax.tree.leaves(tree)]
    assert checks.relative(at(state), states) <= checks.FORWARD, case
    got = [x[-len(c["q"]) :] for x in at(out)]
    assert checks.relative(got, outputs) <= checks.FORWARD, case


@pytest.mark.parametrize("name", ["omega", "swla"])
def test_oracle_gradient_is_that_of_the_loss(name):
  """The back-propagation written out above, by finite differences."""
  m = RULES[name]
  c = {k: np.float64(x) for k, x in make(name, "plain", 3).items()}
  layers, k, v = [c["model_w0"], c["model_w1"]], c["k"][0], c["v"][0]
  grads, _ = gradient(m, layers, k, v)
  for w, g in zip(layers, grads):
    for index in ((0, 0), (1, 2), (3, -1)):
      old, values = w[index], []
      for sign in (1, -1):
        w[index] = old + sign * 1e-6
        values.append(gradient(m, layers, k, v)[1])
      w[index] = old
      numeric = (values[0] - values[1]) / 2e-6
      np.testing.assert_allclose(g[index], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.nans
@pytest.mark.parametrize(
  "name,reset,mask",
  [("atlas", True, True), ("omega", False, True)],
)
def test_chunk_equals_scan(name, reset, mask):
  """Cut by resets, and mini-batches as chunks with gaps closed."""
  got, want = run(name, "chunk", reset, mask), run(name, "scan")
  served = 0
  for i, case in enumerate(CASES):
    c = make(name, case)
    if not reset and np.any(c["reset"] & c["mask"]):
      continue
    served += 1
    at = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
    if case != "infinity":
      error = checks.relative(at(got[:2]), at(want[:2]))
      assert error <= checks.FORWARD, (case, error)
    for part in got[2] or ():
      a, b = got[2][part][i], want[2][part][i]
      if case == "infinity":
        assert np.isfinite(a[DEAD:]).all() or part in ("keys", "values")
        continue
      error = checks.relative(a, b)
      assert error <= checks.GRADIENT, (case, part, error)
  assert served >= 5


@pytest.mark.parametrize("length", [1, 4, 6])
def test_lengths_about_a_window_and_a_mini_batch(length):
  """From the start, c = 3 and n = 4."""
  c = make("omega", "plain", length)
  states, outputs = oracle(RULES["omega"], c)
  state, out = jax.jit(lambda c: call(c, "chunk", "omega", False, False))(c)
  assert checks.relative(jax.tree.leaves(state), states) <= checks.FORWARD
  assert checks.relative(list(out), outputs) <= checks.FORWARD


@pytest.mark.parametrize(
  "form,activation", [("scan", "gelu"), ("chunk", "gelu"), ("chunk", "geglu")]
)
def test_a_window_of_one_is_the_rule_of_one_token(form, activation):
  """With c = 1, γ = 1 and no momentum: `deep_gradient_step`, exactly."""
  c = make("gated" if activation == "geglu" else "omega", "plain")
  model = tuple(Layer(c[f"model_w{i}"]) for i in range(2))
  same = dict(
    rate=c["rate"], log_decay=c["log_decay"], size=4, activation=activation,
    implementation=form,
  )  # fmt: skip
  qkv, ones = (c["q"], c["k"], c["v"]), jnp.ones((T, 1))

  @jax.jit
  def both(model):
    mine, other = start(model, window=1, size=4), deep_start(model, size=4)
    return (
      windowed_gradient_step(mine, *qkv, gate=ones, **same),
      deep_gradient_step(other, *qkv, **same),
    )

  (state, out), (other, want) = both(model)
  assert checks.relative(tuple(out), tuple(want)) <= checks.FORWARD
  got = state.model, state.anchor, state.phase
  want = other.model, other.anchor, other.phase
  assert checks.relative(got, want) <= checks.FORWARD


def conditioned(shape, seed=0):
  """A matrix whose singular values are 1 to ¼ of the largest."""
  r = np.random.default_rng(seed)
  u, _, vt = np.linalg.svd(r.normal(size=shape), full_matrices=False)
  return (u * np.linspace(1.0, 0.25, min(shape))) @ vt


@pytest.mark.parametrize("shape", [(3, 9), (9, 3), (4, 4)])
def test_newton_schulz(shape):
  """Of a full-rank matrix, five iterations and their gradient to the digits of
  float32, whatever the scale."""
  wave = np.cos(np.arange(np.prod(shape))).reshape(shape)
  fn = jax.jit(jax.value_and_grad(
    lambda s: (lambda x: (jnp.sum(wave * x), x))(newton_schulz(s)),
    has_aux=True,
  ))  # fmt: skip
  for scale in (1e-3, 1.0, 1e3):
    s = np.float64(np.float32(scale * conditioned(shape)))
    (_, got), grad = fn(jnp.asarray(s, jnp.float32))
    assert checks.relative(got, orthogonalise(s, 5)) <= checks.FORWARD
    sigma = np.linalg.svd(got, compute_uv=False)
    assert np.all((sigma > 0.65) & (sigma < 1.25)), sigma
    want = np.zeros(shape)
    for index in np.ndindex(*shape):
      move = np.zeros(shape)
      move[index] = 1e-6 * scale
      ends = [orthogonalise(s + x, 5) for x in (move, -move)]
      want[index] = np.sum(wave * (ends[0] - ends[1])) / (2e-6 * scale)
    assert checks.relative(grad, want) <= checks.GRADIENT
  assert not np.any(newton_schulz(jnp.zeros(shape)))


def test_newton_schulz_leaves_what_is_not_there():
  u, _, vt = np.linalg.svd(conditioned((9, 4)), full_matrices=False)
  x = newton_schulz(jnp.asarray((u * [1, 0.3, 0.1, 0]) @ vt, jnp.float32))
  got = u.T @ np.asarray(x) @ vt.T
  assert np.all((np.diag(got)[:3] > 0.65) & (np.diag(got)[:3] < 1.25))
  assert np.abs(got - np.diag(np.diag(got) * [1, 1, 1, 0])).max() < 1e-3


@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_five_iterations_of_full_windows(form, monkeypatch):
  """Atlas with k = 5, from the first token on with a window of c = 6 pairs in
  an inner model of 4 × 3."""
  m = rule(4, 6, 1, momentum=True, k=5)
  monkeypatch.setitem(RULES, "full", m)
  c = make("full", "plain", 11, seed=2)
  r = np.random.default_rng(3)
  c["count"] = np.int64(5)
  c["keys"], c["values"] = (
    np.float32(r.normal(size=(5, width))) for width in (K, V)
  )
  c["gate"] = np.float32(0.5 + 0.5 * c["gate"])
  states, outputs = oracle(m, c)
  run = lambda c: call(c, form, "full", False, False)
  state, out = jax.jit(run)(c)
  assert checks.relative(jax.tree.leaves(state), states) <= checks.FORWARD
  assert checks.relative(list(out), outputs) <= checks.FORWARD


def test_a_chunk_holds_no_matrix_of_a_token_without_newton_schulz():
  """T / n sequential steps; temporary memory below one [n, K, V]."""
  length, size, width = 256, 32, 96
  model = (Layer(jnp.zeros((width, width))),)
  one = jax.ShapeDtypeStruct((length, width), jnp.float32)
  fn = jax.jit(lambda q, k, v, gate: windowed_gradient_step(
    start(model, window=4, size=size, momentum=True), q, k, v, gate=gate,
    rate=gate[:, 0], log_momentum=-gate[:, 1], size=size,
    implementation="chunk"))  # fmt: skip
  compiled = fn.lower(
    one, one, one, jax.ShapeDtypeStruct((length, 4), jnp.float32)
  ).compile()
  assert max(checks.trip_counts(compiled)) in (
    length // size,
    1 + length // size,
  )
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < size * width * width * 4, temporary


@pytest.mark.parametrize(
  "change,message",
  [
    (dict(activation="tanh"), "unknown activation 'tanh'"),
    (dict(size=0), "size must be a positive integer, got 0"),
    (dict(gate=np.ones((T, 4))), r"state.keys must be floating \[3, 4\]"),
    (dict(log_momentum=np.zeros(T, np.float32)), "log_momentum and state.mom"),
    (dict(size=1), "none where it is 1"),
    (dict(objective="l1"), "unknown objective 'l1'"),
    (dict(iterations=-1), "iterations must be an integer ≥ 0, got -1"),
    (
      dict(activation="geglu"),
      r"geglu takes an even number of units, got stat",
    ),
  ],
)
def test_arguments_are_checked(change, message):
  c = make("omega", "plain")
  model = tuple(Layer(c[f"model_w{i}"]) for i in range(2))
  options = dict(gate=c["gate"], rate=c["rate"], size=4) | change
  with pytest.raises(ValueError, match=message):
    windowed_gradient_step(
      start(model, window=3, size=4), c["q"], c["k"], c["v"], **options
    )


def test_one_token_mini_batches_have_no_chunk_form():
  with pytest.raises(NotImplementedError, match="mini-batches of one token"):
    call(make("one token", "plain"), "chunk", "one token")
