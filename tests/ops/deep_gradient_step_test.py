"""`deep_gradient_step`: the papers' inner loops, mini-batches cut anywhere.

The oracle goes token by token in float64: it keeps every weight of the memory,
and takes the gradient of all of them by back-propagation written out here.
"""

import functools

import checks
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import ops
from memzoo.ops.deep_gradient_step import (
  Layer,
  State,
  deep_gradient_step,
  read,
  start,
)
from memzoo.ops.gradient_step import (
  Learner,
  Model as LinearModel,
  State as LinearState,
  gradient_step,
)

T, K, HIDDEN, DEAD = 23, 4, 5, 9


class Case(dict):
  """n, depth, V and which parts the memory has."""

  __getattr__ = dict.__getitem__


def memory(n, depth, width=K, **parts):
  has = dict(
    norm=False, bias=False, residual=False, places=False, decay=False,
    momentum=False, layerwise=False, activation="gelu",
  )  # fmt: skip
  return Case(has | dict(n=n, depth=depth, width=width) | parts)


MEMORIES = {
  "ttt": memory(4, 2, norm=True, bias=True, residual=True, places=True),
  "titans": memory(
    4, 2, residual=True, decay=True, momentum=True, layerwise=True
  ),
  "shallow": memory(5, 1, 3, decay=True, momentum=True, bias=True),
  "deep": memory(
    3, 4, 3, places=True, momentum=True, bias=True, activation="silu"
  ),
  "online": memory(1, 2, 3, decay=True, momentum=True),
  "online places": memory(1, 3, 3, places=True, activation="relu"),
}
CHUNKED = ("ttt", "titans", "shallow", "deep")
DIFFERENTIATED = ("ttt", "titans")  # compilation is what the grid costs
CASES = (
  "plain", "inside a mini-batch", "masked", "all masked", "left padded",
  "reset where masked", "resets", "resets and masks", "reset at every token",
  "identical keys", "correlated keys", "rates 0", "gates shut", "gates open",
  "infinity",
)  # fmt: skip


def widths(m):
  return [K, *[HIDDEN] * (m.depth - 1), m.width]


def weights(m, c, prefix):
  """The layers of c whose names start so, as lists of (w, b)."""
  zero = [np.zeros(out) for out in widths(m)[1:]]
  return [
    (c[f"{prefix}_w{i}"], c[f"{prefix}_b{i}"] if m.bias else zero[i])
    for i in range(m.depth)
  ]


def act(name, z):
  """The activation and its derivative."""
  if name == "relu":
    return np.maximum(z, 0), (z > 0).astype(float)
  if name == "silu":
    s = 1 / (1 + np.exp(-z))
    return z * s, s + z * s * (1 - s)
  a, b = np.sqrt(2 / np.pi), 0.044715
  t = np.tanh(a * (z + b * z**3))
  slope = 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * a * (1 + 3 * b * z**2)
  return 0.5 * z * (1 + t), slope


def normed(m, c, z):
  """Layer norm and its Jacobian."""
  if not m.norm:
    return z, np.eye(len(z))
  centred = z - z.mean()
  s = np.sqrt((centred**2).mean() + 1e-6)
  centre = np.eye(len(z)) - 1 / len(z)
  jacobian = centre / s - np.outer(centred, centred) / (len(z) * s**3)
  return centred / s * c["scale"] + c["shift"], c["scale"][:, None] * jacobian


def forward(m, c, layers, x):
  """f(x), and what back-propagation needs."""
  kept, h = [], x
  for i, (w, b) in enumerate(layers):
    z = h @ w + b
    y, slope = act(m.activation, z) if i < m.depth - 1 else (z, 1.0)
    kept.append((h, slope))
    h = y
  out, jacobian = normed(m, c, h)
  return out + (x if m.residual else 0), kept, jacobian


def gradient(m, c, layers, k, v):
  """∇ ½ ‖f(k) − v‖² of every weight, and the loss."""
  out, kept, jacobian = forward(m, c, layers, k)
  g = jacobian.T @ (out - v)
  grads = [None] * m.depth
  for i in range(m.depth - 1, -1, -1):
    h, slope = kept[i]
    g = g * slope
    grads[i] = np.outer(h, g), g * m.bias
    g = layers[i][0] @ g
  return grads, 0.5 * np.sum((out - v) ** 2)


def combine(terms):
  """Σ factor · layers; a factor is a number or one a layer."""
  depth = len(terms[0][1])
  factor = lambda f, i: f[i] if np.ndim(f) else f
  return [
    tuple(sum(factor(f, i) * x[i][j] for f, x in terms) for j in (0, 1))
    for i in range(depth)
  ]


def oracle(m, c):
  """Eq. 13 and 14 of Titans with gradients at the mini-batch's start, and the
  place rates of TTT: (M, anchor, S, phase, o, loss, surprise)."""
  c = {k: np.asarray(x, np.float64) for k, x in c.items()}
  fresh, model = weights(m, c, "fresh"), weights(m, c, "model")
  anchor, past = weights(m, c, "anchor"), weights(m, c, "past")
  if m.n == 1:
    anchor = model
  phase, length = int(c["phase"]), len(c["q"])
  o, loss, surprise = np.zeros((length, m.width)), *np.zeros((2, length))
  for t in range(length):
    if not c["mask"][t]:
      continue
    if c["reset"][t]:
      model = anchor = fresh
      past, phase = combine([(0.0, fresh)]), 0
    grads, loss[t] = gradient(m, c, anchor, c["k"][t], c["v"][t])
    surprise[t] = np.sqrt(sum(np.sum(x**2) for g in grads for x in g))
    terms = [(-c["rate"][t], grads)]
    if m.momentum:
      terms.append((np.exp(c["log_momentum"][t]), past))
    past = combine(terms)
    keep = np.exp(c["log_decay"][t]) if m.decay else 1.0
    model = combine([(keep, model), (1.0, past)])
    lam = c["places"][phase] if m.places else 1.0
    learned = combine([(1 - lam, anchor), (lam, model)])
    o[t] = forward(m, c, learned, c["q"][t])[0]
    phase += 1
    if phase == m.n:
      model = anchor = learned
      phase = 0
  return model, anchor, past, phase, o, loss, surprise


def make(name, case, length=T, seed=0):
  m = MEMORIES[name]
  r = np.random.default_rng(seed)
  normal = lambda *shape: r.normal(size=shape)
  gates = (length, m.depth) if m.layerwise else (length,)
  c = dict(
    phase=0, scale=1 + 0.3 * normal(m.width), shift=0.3 * normal(m.width),
    places=1 / np.arange(1, m.n + 1) + 0.1 * r.random(m.n),
    q=normal(length, K), k=normal(length, K), v=normal(length, m.width),
    rate=0.1 * r.random(gates), log_decay=np.log(1 - 0.3 * r.random(gates)),
    log_momentum=np.log(0.8 * r.random(gates)),
    reset=np.zeros(length, bool), mask=np.ones(length, bool),
    asked=np.ones(length, bool),
  )  # fmt: skip
  ends = widths(m)
  for i, (wide, out) in enumerate(zip(ends, ends[1:])):
    for prefix in ("model", "fresh"):
      c[f"{prefix}_w{i}"] = normal(wide, out) / np.sqrt(wide)
      c[f"{prefix}_b{i}"] = 0.3 * normal(out)
    for part in ("w", "b"):
      c[f"anchor_{part}{i}"] = c[f"model_{part}{i}"]
      c[f"past_{part}{i}"] = np.zeros_like(c[f"model_{part}{i}"])
  if case in ("inside a mini-batch", "masked", "resets", "resets and masks"):
    c["phase"] = m.n - 1
    for i, (wide, out) in enumerate(zip(ends, ends[1:])):
      c[f"past_w{i}"], c[f"past_b{i}"] = 0.2 * normal(wide, out), normal(out)
      if m.n > 1:
        c[f"anchor_w{i}"] = c[f"model_w{i}"] + 0.2 * normal(wide, out)
  if case in ("masked", "resets and masks"):
    c["mask"] = r.random(length) < 0.7
  if case == "all masked":
    c["mask"][:] = False
    c["reset"][3] = True
  if case == "reset where masked":
    c["mask"][[5, 6]] = False
    c["reset"][5] = True
  if case == "left padded":
    c["mask"][:7] = False
    c["reset"][[2, 7]] = True
  if case in ("resets", "resets and masks"):
    c["reset"] = r.random(length) < 0.25
  if case == "reset at every token":
    c["reset"][:] = True
  if case == "identical keys":
    c["k"][:] = c["k"][0]
  if case == "correlated keys":
    c["k"] = c["k"][0] + 0.3 * c["k"]
  if case == "rates 0":
    c["rate"][:] = 0
  if case == "gates shut":  # some tokens clear the memory, or the momentum
    c["log_decay"][r.random(gates) < 0.4] = -np.inf
    c["log_momentum"][r.random(gates) < 0.4] = -np.inf
  if case == "gates open":
    c["log_decay"][:] = c["log_momentum"][:] = 0
    c["rate"] *= 0.3
  if case == "infinity":
    c["k"][2], c["q"][4], c["v"][5, 1] = np.inf, np.nan, -np.inf
    c["log_momentum"][6] = -np.inf
    c["reset"][DEAD] = True
    c["asked"][:DEAD] = False
  return {
    k: np.asarray(x, np.float32)
    if np.asarray(x).dtype == float
    else np.asarray(x)
    for k, x in c.items()
  }


def layers(m, c, prefix):
  return tuple(
    Layer(c[f"{prefix}_w{i}"], c[f"{prefix}_b{i}"] if m.bias else None)
    for i in range(m.depth)
  )


def call(c, form, name, reset=True, mask=True):
  m = MEMORIES[name]
  state = State(
    layers(m, c, "model"),
    layers(m, c, "anchor") if m.n > 1 else None,
    layers(m, c, "past") if m.momentum else None,
    c["phase"].astype(jnp.int32),
  )
  learner = Learner(
    c["places"] if m.places else None,
    *((c["scale"], c["shift"]) if m.norm else ()),
  )
  return deep_gradient_step(
    state, c["q"], c["k"], c["v"], rate=c["rate"], size=m.n,
    log_decay=c["log_decay"] if m.decay else None,
    log_momentum=c["log_momentum"] if m.momentum else None, learner=learner,
    residual=m.residual, activation=m.activation,
    reset=c["reset"] if reset else None, mask=c["mask"] if mask else None,
    fresh=layers(m, c, "fresh"), implementation=form,
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


def want(name, c):
  """The oracle's state, as leaves of ours, and its outputs."""
  m = MEMORIES[name]
  model, anchor, past, phase, *outputs = oracle(m, c)
  parts = [model] + [anchor] * (m.n > 1) + [past] * m.momentum
  count = 2 if m.bias else 1
  leaves = [x for part in parts for layer in part for x in layer[:count]]
  return [*leaves, phase], outputs


@pytest.mark.nans
@pytest.mark.parametrize(
  "name,form",
  [(name, "scan") for name in MEMORIES] + [(name, "chunk") for name in CHUNKED],
)
def test_paper_equation(name, form):
  state, out, _ = run(name, form)
  for i, case in enumerate(CASES):
    c = make(name, case)
    with np.errstate(all="ignore"):
      states, outputs = want(name, c)
    at = lambda tree, i=i: [x[i] for x in jax.tree.leaves(tree)]
    assert checks.relative(at(state), states) <= checks.FORWARD, case
    got, outputs = ([x[c["asked"]] for x in y] for y in (at(out), outputs))
    assert checks.relative(got, outputs) <= checks.FORWARD, case


def test_oracle_gradient_is_that_of_the_loss():
  """The back-propagation written out above, by finite differences."""
  for name in ("titans", "deep", "online places"):
    m = MEMORIES[name]
    c = {k: np.float64(x) for k, x in make(name, "plain", 3).items()}
    stack, (k, v) = weights(m, c, "model"), (c["k"][0], c["v"][0])
    grads, _ = gradient(m, c, stack, k, v)
    loss = lambda: gradient(m, c, stack, k, v)[1]
    for (w, _), (g, _) in zip(stack, grads):
      for index in ((0, 0), (1, 2), (3, 1)):
        old, values = w[index], []
        for sign in (1, -1):
          w[index] = old + sign * 1e-6
          values.append(loss())
        w[index] = old
        numeric = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(g[index], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.nans
@pytest.mark.parametrize(
  "name,reset,mask",
  [(name, True, True) for name in DIFFERENTIATED]
  + [("titans", False, True), ("ttt", False, False)],
)
def test_dual_form_equals_primal(name, reset, mask):
  """The chunk form in its three shapes: cut by resets, and mini-batches as
  chunks, with gaps closed or none."""
  got = run(name, "chunk", reset, mask)
  primal = run(name, "scan")
  served = 0
  for i, case in enumerate(CASES):
    c = make(name, case)
    if not reset and np.any(c["reset"] & c["mask"]):
      continue
    if case == "infinity" or (not mask and not c["mask"].all()):
      continue
    served += 1
    at = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
    assert checks.relative(at(got[:2]), at(primal[:2])) <= checks.FORWARD, case
    for part in got[2]:
      error = checks.relative(got[2][part][i], primal[2][part][i])
      assert error <= checks.GRADIENT, (case, part, error)
  assert served >= 6


@pytest.mark.nans
@pytest.mark.parametrize("name", DIFFERENTIATED)
@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_infinity_in_a_dead_segment(name, form):
  """Values are held to the oracle by `test_paper_equation`; here it stays in
  its segment, and later gradients are those of a clean one."""
  _, out, grads = run(name, form)
  i = CASES.index("infinity")
  assert not np.isfinite(out.o[i, 2:DEAD]).all(axis=1).any()
  assert np.isfinite(out.o[i, DEAD:]).all()
  for part in ("q", "k", "v", "rate", "log_decay", "log_momentum"):
    assert np.isfinite(grads[part][i, DEAD:]).all(), part
    assert not np.any(np.nan_to_num(grads[part][i, :DEAD])), part


@functools.cache
def both(name, length):
  one = lambda form: jax.jit(lambda c: call(c, form, name))
  return one("scan"), one("chunk")


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(data=st.data())
def test_any_resets_gaps_and_phase(data):
  length = data.draw(st.sampled_from([1, 9]))
  c = make("titans", "plain", length, seed=data.draw(st.integers(0, 99)))
  flags = st.lists(st.booleans(), min_size=length, max_size=length)
  c["reset"], c["mask"] = np.array(data.draw(flags)), np.array(data.draw(flags))
  c["phase"] = np.int64(data.draw(st.integers(0, 3)))
  if c["phase"]:
    c["model_w0"] += np.float32(0.2)
    c["past_w1"] += np.float32(0.1)
  for fn in both("titans", length):
    state, out = fn(c)
    states, outputs = want("titans", c)
    assert checks.relative(jax.tree.leaves(state), states) <= checks.FORWARD
    assert checks.relative(list(out), outputs) <= checks.FORWARD


@pytest.mark.parametrize("length", [1, 3, 4, 5])
def test_lengths_about_a_mini_batch(length):
  """T = 1, n − 1, n and n + 1, from the start and from inside."""
  fn = jax.jit(lambda c: call(c, "chunk", "titans", False, False))
  for case in ("plain", "inside a mini-batch"):
    c = make("titans", case, length)
    state, out = fn(c)
    states, outputs = want("titans", c)
    assert checks.relative(jax.tree.leaves(state), states) <= checks.FORWARD
    assert checks.relative(list(out), outputs) <= checks.FORWARD


@pytest.mark.parametrize(
  "form,reset", [("scan", True), ("chunk", True), ("chunk", False)]
)
def test_cut_anywhere(form, reset):
  """Two calls equal one, wherever the first stops, by either form."""
  c = make("titans", "resets and masks", 14)
  fn = jax.jit(lambda c: call(c, form, "titans", reset))
  state, out = fn(c)
  index = np.arange(14)
  for cut in (1, 5, 8):
    half, _ = fn({**c, "mask": c["mask"] & (index < cut)})
    rest = {**c, "mask": c["mask"] & (index >= cut), "phase": half.phase}
    for prefix, part in zip(("model", "anchor", "past"), half):
      for i, layer in enumerate(part):
        rest[f"{prefix}_w{i}"] = layer.w
    end, tail = fn(rest)
    assert checks.relative(end, state) <= checks.FORWARD
    assert checks.relative(tail.o[cut:], out.o[cut:]) <= checks.FORWARD


@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_one_layer_is_the_linear_op(form):
  """A memory of one layer with place rates is `gradient_step`'s."""
  c = make("ttt", "resets and masks")
  w, b = jnp.asarray(c["q"][:K]), jnp.asarray(c["q"][K])
  learner = Learner(*(jnp.asarray(c[k]) for k in ("places", "scale", "shift")))
  flags = dict(
    rate=c["rate"], learner=learner, residual=True, reset=c["reset"],
    mask=c["mask"], implementation=form,
  )  # fmt: skip

  @jax.jit
  def run_both(w, b):
    zeros = LinearModel(jnp.zeros_like(w), jnp.zeros_like(b))
    state = LinearState(LinearModel(w, b), zeros, jnp.int32(0))
    qkv = c["q"], c["k"], c["v"]
    linear = gradient_step(state, *qkv, fresh=LinearModel(w, b), **flags)
    model = (Layer(w, b),)
    deep = deep_gradient_step(
      start(model, size=4), *qkv, size=4, fresh=model, **flags
    )
    return linear, deep

  (linear, want_out), (deep, out) = run_both(w, b)
  assert checks.relative(out.o, want_out.o) <= checks.FORWARD
  assert checks.relative(out.loss, want_out.loss) <= checks.FORWARD
  assert checks.relative(deep.anchor[0], linear.model) <= checks.FORWARD
  assert deep.phase == linear.phase


def test_linear_memory_online_is_the_gated_delta_rule():
  """Appendix F: one layer, n = 1 and η = 0 forget and then correct as the
  delta rule does, whose correction reads the decayed state."""
  c = make("shallow", "plain")
  c["k"] /= np.linalg.norm(c["k"], axis=1, keepdims=True)

  @jax.jit
  def run_both(w, q, k, v, rate, log_decay):
    size = dict(size=1)
    state, out = deep_gradient_step(
      start((Layer(w),), **size), q, k, v, rate=rate, **size
    )
    decayed, _ = deep_gradient_step(
      start((Layer(w),), **size), q, k, v, rate=rate, log_decay=log_decay,
      **size,
    )  # fmt: skip
    matrix = ops.delta_rule(w, q, k, v, beta=rate, implementation="scan")

    # v is aimed at with the weights before decay: M_{t−1} k in place of the
    # decayed one, so v is moved by what decay takes away.
    def one(s, x):
      k, v, rate, g = x
      return jnp.exp(g) * s + rate * jnp.outer(k, v - k @ s), None

    by_hand, _ = jax.lax.scan(one, w, (k, v, rate, log_decay))
    return (state.model[0].w, out.o), matrix, decayed.model[0].w, by_hand

  got, matrix, decayed, by_hand = run_both(
    c["model_w0"], *(c[n] for n in ("q", "k", "v", "rate", "log_decay"))
  )
  assert checks.relative(got, matrix) <= checks.FORWARD
  assert checks.relative(decayed, by_hand) <= checks.FORWARD


@pytest.mark.parametrize("reset,most", [(True, 16), (False, 17)])
def test_chunks_are_mini_batches(reset, most):
  """The dual form's loop has T / n iterations, and one more where the first
  mini-batch was begun by another call."""
  c = make("titans", "plain", 64)
  fn = jax.jit(lambda c: call(c, "chunk", "titans", reset, False))
  assert checks.trip_counts(fn.lower(c).compile()) == [most]


def test_no_token_has_weights_of_its_own():
  """Forward and backward of the dual form fit in far less memory than the
  weights of every token take."""
  width, length, size = 16, 512, 16
  key = jax.random.key(0)
  model = tuple(
    Layer(jax.random.normal(key, shape) / 4)
    for shape in ((width, 4 * width), (4 * width, width))
  )

  def loss(model, q, k, v, rate):
    state = start(model, size=size, momentum=True)
    _, out = deep_gradient_step(
      state, q, k, v, rate=rate, log_decay=-rate, log_momentum=-rate,
      size=size, implementation="chunk",
    )  # fmt: skip
    return jnp.sum(out.o)

  row = jax.ShapeDtypeStruct((length, width), jnp.float32)
  rate = jax.ShapeDtypeStruct((length,), jnp.float32)
  fn = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
  compiled = fn.lower(model, row, row, row, rate).compile()
  weights = 4 * sum(layer.w.size for layer in model)
  every = weights * length  # 4 MB
  used = compiled.memory_analysis().temp_size_in_bytes
  # Boundary states (M, its anchor, S) of 33 chunks and a chunk's work.
  assert used < 0.35 * every, (used, every)


@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_half_precision(form):
  names = ("q", "k", "v")
  c = make("titans", "resets and masks")
  low = {**c, **{k: jnp.asarray(c[k], jnp.bfloat16) for k in names}}
  rounded = {**c, **{k: low[k].astype(jnp.float32) for k in names}}
  fn = jax.jit(lambda c: call(c, form, "titans"))
  (state, out), exact, near = fn(low), fn(c), fn(rounded)
  assert out.o.dtype == jnp.bfloat16 and out.loss.dtype == jnp.float32
  assert state.model[0].w.dtype == state.momentum[1].w.dtype == jnp.float32
  error = checks.relative(checks.single(out.o), exact[1].o)
  assert error <= 4 * max(checks.relative(near[1].o, exact[1].o), 2.0**-8), (
    error
  )


def test_heads_and_batches():
  cases = [make("ttt", "resets and masks", 9, seed=n) for n in range(6)]
  fresh = [f"fresh_{part}{i}" for i in (0, 1) for part in "wb"]
  for n, c in enumerate(cases):  # heads share flags, batches the fresh memory
    c.update({k: cases[n - n % 3][k] for k in ("reset", "mask")})
    c.update({k: cases[n % 3][k] for k in fresh})
    c.update({k: cases[0][k] for k in ("places", "scale", "shift")})
  both = {k: np.stack([c[k] for c in cases]) for k in cases[0]}
  both = {k: x.reshape(2, 3, *x.shape[1:]) for k, x in both.items()}

  @jax.jit
  def batched(c):
    m = MEMORIES["ttt"]
    late = lambda x: jnp.swapaxes(x, 1, 2)
    state = State(
      layers(m, c, "model"), layers(m, c, "anchor"), None,
      c["phase"].astype(jnp.int32),
    )  # fmt: skip
    return ops.batched(deep_gradient_step)(
      state, late(c["q"]), late(c["k"]), late(c["v"]), rate=late(c["rate"]),
      learner=Learner(*(c[k][0, 0] for k in ("places", "scale", "shift"))),
      size=4,
      residual=True, reset=c["reset"][:, 0], mask=c["mask"][:, 0],
      fresh=layers(m, {k: c[k][0] for k in fresh}, "fresh"),
    )  # fmt: skip

  state, out = batched(both)
  for n, c in enumerate(cases):
    states, outputs = want("ttt", c)
    at = [x[n // 3, n % 3] for x in jax.tree.leaves(state)]
    assert checks.relative(at, states) <= checks.FORWARD
    got = [y[n // 3, :, n % 3] for y in out]
    assert checks.relative(got, outputs) <= checks.FORWARD


def test_read_learns_nothing():
  m, c = MEMORIES["ttt"], make("ttt", "plain", 5)
  got = read(
    layers(m, c, "model"), jnp.asarray(c["q"]),
    learner=Learner(None, c["scale"], c["shift"]), residual=True,
  )  # fmt: skip
  double = {k: np.float64(x) for k, x in c.items()}
  expected = [forward(m, double, weights(m, double, "model"), q)[0]
              for q in double["q"]]  # fmt: skip
  assert checks.relative(got, np.stack(expected)) <= checks.FORWARD


MODEL = (Layer(jnp.zeros((4, 5))), Layer(jnp.zeros((5, 3))))


@pytest.mark.parametrize(
  "change,message",
  [
    (dict(residual=True), "residual needs K = V, got K=4 and V=3"),
    (dict(rate=jnp.zeros((2,))), r"rate must be floating \[6\], got"),
    (dict(rate=jnp.zeros((6, 3))), r"rate must be floating \[6, 2\], got"),
    (dict(activation="gleu"), "unknown activation 'gleu'; did you mean 'gelu'"),
    (dict(size=0), "size must be a positive integer, got 0"),
    (dict(size=1), "a state has an anchor where size > 1"),
    (dict(log_momentum=jnp.zeros(6)), "log_momentum and state.momentum go"),
    (dict(learner=Learner(jnp.ones(3))), r"learner.rates must be floating"),
    (
      dict(learner=Learner(None, jnp.ones(3))),
      "norm_scale and learner.norm_bias go together",
    ),
    (dict(fresh=MODEL[:1]), "fresh must have 2 layers"),
    (dict(fresh=MODEL[::-1]), r"fresh\[0\].w must be floating \[4, 5\]"),
    (
      dict(fresh=tuple(Layer(x.w, x.w[0]) for x in MODEL)),
      r"fresh\[0\].b and state.model's go together",
    ),
  ],
)
def test_bad_arguments(change, message):
  arguments = dict(rate=jnp.ones(6), size=2)
  with pytest.raises(ValueError, match=message):
    deep_gradient_step(
      start(MODEL, size=2), jnp.ones((6, 4)), jnp.ones((6, 4)),
      jnp.ones((6, 3)), **{**arguments, **change},
    )  # fmt: skip


def test_no_chunk_of_single_tokens():
  state = start(MODEL, size=1)
  arrays = jnp.ones((6, 4)), jnp.ones((6, 4)), jnp.ones((6, 3))
  with pytest.raises(NotImplementedError, match="mini-batches of one token"):
    deep_gradient_step(
      state, *arrays, rate=jnp.ones(6), size=1, implementation="chunk"
    )
  with pytest.raises(ValueError, match="a memory has 1 to 4 layers, got 5"):
    deep_gradient_step(
      start((Layer(jnp.ones((4, 4))),) * 5, size=1), *arrays[:2], arrays[0],
      rate=jnp.ones(6), size=1,
    )  # fmt: skip
