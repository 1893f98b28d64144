"""`linear_attention` and `delta_rule`: the papers' equations, the stress grid.

The oracles are loops in float64 from the equations that they name; every form
is held to them, and its gradients to the step loop's.
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

T, K, V, C = 37, 5, 3, 16
DECAYS = ("none", "scalar", "channel")
OPS = ("linear_attention", "delta_rule")
CASES = (
  "plain", "identical keys", "correlated keys", "beta 0", "beta 1", "beta 2",
  "decay 0", "decay -20", "decay -inf", "mixed", "left padded", "all masked",
)  # fmt: skip


def oracle(name, decay, c):
  """Katharopoulos et al. 2020 eq. 18 and 20 without the normaliser; Yang et
  al. 2023 eq. 3 (decay); Yang et al. 2024a eq. 5 (delta); 2024b eq. 10."""
  c = {k: np.asarray(x, np.float64) for k, x in c.items()}
  s = c["s"].copy()
  outputs = np.zeros((len(c["q"]), s.shape[1]))
  for t in range(len(c["q"])):
    if not c["mask"][t]:
      continue
    if c["reset"][t]:
      s = c["fresh"].copy()
    q, k, v = c["q"][t], c["k"][t], c["v"][t]
    alpha = np.ones(len(k))
    if decay != "none":
      g = c["log_decay"][t]
      alpha = np.exp(g if decay == "channel" else np.full(len(k), g[0]))
    if name == "linear_attention":
      s = alpha[:, None] * s + np.outer(k, v)
    else:  # S (the paper's transposed) = (I − β k kᵀ) Diag(α) S + β k vᵀ
      b = c["beta"][t]
      s = (np.eye(len(k)) - b * np.outer(k, k)) @ (alpha[:, None] * s)
      s = s + b * np.outer(k, v)
    outputs[t] = s.T @ q
  return s, outputs


def make(case, length=T, seed=0, width=(K, V)):
  r = np.random.default_rng(seed)
  keys = (length, width[0])
  c = dict(
    s=r.normal(size=width), q=r.normal(size=keys), k=r.normal(size=keys),
    v=r.normal(size=(length, width[1])),
    beta=r.uniform(0, 2, length), log_decay=-r.uniform(0, 1, keys),
    fresh=r.normal(size=width), reset=np.zeros(length, bool),
    mask=np.ones(length, bool),
  )  # fmt: skip
  if case == "identical keys":
    c["k"][:] = c["k"][0]
  if case == "correlated keys":
    base = c["k"][0] / np.linalg.norm(c["k"][0])
    off = c["k"] - (c["k"] @ base)[:, None] * base
    off /= np.linalg.norm(off, axis=1, keepdims=True)
    c["k"] = np.sqrt(0.9) * base + np.sqrt(0.1) * off  # cosine 0.9 in pairs
  if case.startswith("beta"):
    c["beta"][:] = float(case[5:])
  if case == "decay 0":
    c["log_decay"][:] = 0
  if case == "decay -20":
    c["log_decay"][:] = -20
    c["log_decay"][::3] = -1e-3
  if case == "decay -inf":
    c["log_decay"][[3, 15, 16, 30]] = -np.inf
  if case in ("mixed", "decay -inf"):
    c["reset"] = r.random(length) < 0.15
    c["mask"] = r.random(length) < 0.8
  if case == "left padded":
    c["mask"][:11] = False
  if case == "all masked":
    c["mask"][:] = False
  norm = np.linalg.norm(c["k"], axis=1, keepdims=True)
  c["k"] = c["k"] / norm
  return {
    k: jnp.asarray(x, bool if x.dtype == bool else jnp.float32)
    for k, x in c.items()
  }


def call(name, decay, form, c, flags=True, size=C, **kwargs):
  op = getattr(ops, name)
  if name == "delta_rule":
    kwargs["beta"] = c["beta"]
  if decay != "none":
    g = c["log_decay"]
    kwargs["log_decay"] = g if decay == "channel" else g[:, 0]
  if flags:
    kwargs.update(reset=c["reset"], mask=c["mask"], fresh=c["fresh"])
  return op(
    c["s"], c["q"], c["k"], c["v"], implementation=form, chunk_size=size,
    **kwargs,
  )  # fmt: skip


FLOATS = ("s", "q", "k", "v", "beta", "log_decay", "fresh")


@functools.cache
def compiled(name, decay, form):
  def one(c):
    def loss(floats):
      state, out = call(name, decay, form, {**c, **floats})
      return checks.wave(state, out), (state, out)

    floats = {k: c[k] for k in FLOATS}
    return jax.value_and_grad(loss, has_aux=True)(floats)

  return jax.jit(jax.vmap(one))


def run(name, decay, form, cases):
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
  (_, out), grads = compiled(name, decay, form)(stacked)
  return jax.device_get((out, grads))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", OPS)
def test_stress_grid(name, decay):
  cases = [make(case) for case in CASES]
  (want, want_grads) = run(name, decay, "scan", cases)
  (got, got_grads) = run(name, decay, "chunk", cases)
  for n, case in enumerate(CASES):
    at = lambda tree: jax.tree.map(lambda x: x[n], tree)
    truth = oracle(name, decay, cases[n])
    for form, out in (("scan", want), ("chunk", got)):
      error = checks.relative(at(out), truth)
      assert error <= checks.FORWARD, (case, form, error)
    error = checks.relative(at(got_grads), at(want_grads))
    assert error <= checks.GRADIENT, (case, error)
    for key in FLOATS:
      assert np.isfinite(got_grads[key][n]).all(), (case, key)
    if case == "decay -inf" and decay != "none":
      cut = np.isinf(np.asarray(cases[n]["log_decay"]))
      if decay == "scalar":
        cut[:, 1:] = False
      assert not np.any(got_grads["log_decay"][n][cut])


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(st.data())
@pytest.mark.parametrize("name", OPS)
def test_drawn_resets_masks_and_gates(name, data):
  bits = st.lists(st.booleans(), min_size=T, max_size=T)
  c = make("plain", seed=data.draw(st.integers(0, 9)))
  gates = st.sampled_from([0.0, -1e-4, -0.5, -20.0, -np.inf])
  g = data.draw(st.lists(gates, min_size=T, max_size=T))
  c.update(
    reset=jnp.asarray(data.draw(bits)), mask=jnp.asarray(data.draw(bits)),
    log_decay=jnp.asarray(g, jnp.float32)[:, None] * jnp.ones((1, K)),
  )  # fmt: skip
  cases = [c] + [make("plain")] * (len(CASES) - 1)
  (state, out), _ = run(name, "scalar", "chunk", cases)
  truth = oracle(name, "scalar", c)
  assert checks.relative((state[0], out[0]), truth) <= checks.FORWARD


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(st.data())
@pytest.mark.parametrize("name", OPS)
def test_drawn_shapes(name, data):
  """Any T, K, V, chunk size and kind of decay, with drawn flags and gates."""
  few = st.integers(1, 7)
  length = data.draw(st.integers(1, 40), "T")
  width = data.draw(few, "K"), data.draw(few, "V")
  size = data.draw(st.sampled_from((1, 2, 4, 8, 32)), "C")
  decay = data.draw(st.sampled_from(DECAYS))
  c = make("plain", length, data.draw(st.integers(0, 9)), width)
  bits = lambda: data.draw(st.lists(st.booleans(), min_size=length,
                                    max_size=length))  # fmt: skip
  gates = st.sampled_from([0.0, -1e-4, -0.5, -20.0, -np.inf])
  size_g = length * width[0]
  g = data.draw(st.lists(gates, min_size=size_g, max_size=size_g))
  c.update(
    reset=jnp.asarray(bits()), mask=jnp.asarray(bits()),
    log_decay=jnp.asarray(g, jnp.float32).reshape(length, width[0]),
  )  # fmt: skip
  got = jax.jit(lambda c: call(name, decay, "chunk", c, size=size))(c)
  assert checks.relative(got, oracle(name, decay, c)) <= checks.FORWARD


@pytest.mark.parametrize("length", (1, C - 1, C, C + 1))
@pytest.mark.parametrize("name", OPS)
def test_lengths(name, length):
  c = make("plain", length)
  out = jax.jit(lambda c: call(name, "scalar", "chunk", c, flags=False))(c)
  assert checks.relative(out, oracle(name, "scalar", c)) <= checks.FORWARD


@pytest.mark.nans
@pytest.mark.parametrize("form", ("scan", "chunk"))
@pytest.mark.parametrize("start", (9, C + 4))
@pytest.mark.parametrize("name", OPS)
def test_infinity_in_a_dead_segment(name, start, form):
  """Not over a reset, in values or gradients, in the same chunk or a later
  one; its own segment keeps it."""
  c = make("plain")
  c["reset"] = c["reset"].at[start].set(True)
  c["v"] = c["v"].at[4].set(jnp.inf)
  c["k"] = c["k"].at[5].set(jnp.nan)

  def loss(c):
    state, out = call(name, "scalar", form, c)
    return checks.wave(state, out[start:]), (state, out)

  floats = {k: c[k] for k in FLOATS}
  grad = jax.jit(jax.grad(lambda f: loss({**c, **f}), has_aux=True))
  grads, (state, out) = grad(floats)
  assert np.isfinite(state).all() and np.isfinite(out[start:]).all()
  assert not np.isfinite(out[5:start]).all(axis=1).any()
  for key in ("q", "k", "v", "beta", "log_decay"):
    assert np.isfinite(grads[key][start:]).all(), key
    assert not np.any(np.nan_to_num(grads[key][:start])), key


@pytest.mark.parametrize("name", OPS)
def test_half_precision(name):
  """bfloat16 costs at most four times what rounding the inputs costs, in
  values and in gradients; the state stays float32."""
  c = make("plain")
  keys = ("q", "k", "v")

  def grads(tensors, exact):
    def loss(t):
      full = {**c, **(checks.single(t) if exact else t)}
      state, out = call(name, "scalar", "chunk", full, flags=False)
      return checks.wave(state, out), (state, out)

    return jax.grad(loss, has_aux=True)(tensors)

  grads = jax.jit(grads, static_argnums=1)
  exact = {k: c[k] for k in keys}
  rounded = checks.half(exact)
  g_true, (s_true, o_true) = grads(exact, True)
  g_round, (s_round, o_round) = grads(checks.single(rounded), True)
  g_half, (s_half, o_half) = grads(rounded, False)
  assert s_half.dtype == jnp.float32 and o_half.dtype == jnp.bfloat16
  unit = 2.0**-9  # of rounding the result itself
  for a, r, t in (
    (s_half, s_round, s_true), (o_half, o_round, o_true),
    *((g_half[k], g_round[k], g_true[k]) for k in keys),
  ):  # fmt: skip
    error = checks.relative(checks.single(a), t)
    assert error <= 4 * max(checks.relative(r, t), unit)


@pytest.mark.parametrize("name", OPS)
def test_effects_compose(name):
  """Two devices that exchange effects alone give what one device gives."""
  import importlib

  from memzoo.ops import chunk

  module = importlib.import_module(f"memzoo.ops.{name}")
  function = module.FUNCTION
  c = make("mixed", 2 * C)
  c["reset"] &= c["mask"]  # as the op does
  fields = module.Inputs._fields
  inputs = module.Inputs(
    **{k: c["log_decay"][:, 0] if k == "log_decay" else c[k] for k in fields}
  )
  inputs = chunk.as_columns(inputs)
  halves = [jax.tree.map(lambda x, i=i: x[i : i + C], inputs) for i in (0, C)]
  run = functools.partial(chunk.run, function, chunk_size=C, columns=True)

  @jax.jit
  def both(s):
    effects = [function.effect(function.prepare(h, c["fresh"])) for h in halves]
    return function.apply(function.compose(*effects), s)

  whole = jax.jit(lambda s: run(s, inputs, c["fresh"])[0])(c["s"])
  assert checks.relative(both(c["s"]), whole) <= checks.FORWARD
  split = jax.jit(lambda s: run(s, inputs, c["fresh"], split=True))
  truth = oracle(
    name, "scalar", {**c, "log_decay": c["log_decay"][:, :1] * jnp.ones((1, K))}
  )
  assert checks.relative(split(c["s"]), truth) <= checks.FORWARD


@pytest.mark.parametrize(
  "name", [pytest.param(OPS[0], marks=pytest.mark.slow), OPS[1]]
)
def test_batched_heads(name):
  cases = [[make("mixed", C, seed=3 * b + h) for h in range(3)] for b in (0, 1)]
  for row in cases:
    for c in row:
      c.update({k: row[0][k] for k in ("reset", "mask")})
  tree = jax.tree.map(
    lambda *x: jnp.stack(x),
    *[jax.tree.map(lambda *x: jnp.stack(x), *row) for row in cases],
  )
  time_first = lambda x: jnp.swapaxes(x, 1, 2)
  kwargs = dict(log_decay=time_first(tree["log_decay"]))
  if name == "delta_rule":
    kwargs["beta"] = time_first(tree["beta"])
  state, out = ops.batched(getattr(ops, name))(
    tree["s"], *(time_first(tree[k]) for k in "qkv"), **kwargs,
    reset=tree["reset"][:, 0], mask=tree["mask"][:, 0], chunk_size=C,
  )  # fmt: skip
  for b in (0, 1):
    for h in range(3):
      c = dict(cases[b][h], fresh=jnp.zeros((K, V)))
      want = oracle(name, "channel", c)
      assert checks.relative((state[b, h], out[b, :, h]), want) < checks.FORWARD


def test_budgets():
  """The chunked gated delta rule at T = 4096, forward and backward, in 8 MB;
  a chunk form walks T / C chunks."""
  length, width = 4096, 64
  arrays = dict(
    s=jnp.zeros((width, width)), q=jnp.zeros((length, width)),
    k=jnp.zeros((length, width)), v=jnp.zeros((length, width)),
    beta=jnp.zeros(length), log_decay=jnp.zeros(length),
  )  # fmt: skip

  def loss(name, size):
    def f(a):
      gates = dict(log_decay=a["log_decay"])
      if name == "delta_rule":
        gates["beta"] = a["beta"]
      state, out = getattr(ops, name)(
        a["s"], a["q"], a["k"], a["v"], implementation="chunk",
        chunk_size=size, **gates,
      )  # fmt: skip
      return jnp.sum(out**2) + jnp.sum(state)

    return f

  for name, size in (
    ("delta_rule", None),
    ("delta_rule", 64),
    ("linear_attention", 64),
  ):
    done = jax.jit(jax.grad(loss(name, size))).lower(arrays).compile()
    assert done.memory_analysis().temp_size_in_bytes < 8 * 2**20
    counts = checks.trip_counts(done)
    assert counts and max(counts) <= length // (size or 32), counts
    assert not any("4096,64,64" in line for line in done.as_text().splitlines())


def test_triangular_solve_with_identical_keys():
  """The unit lower triangular solve keeps its digits where powers of the
  matrix lose all of them (beta 1, keys alike: entries of 1)."""
  from memzoo.ops import chunk

  for cosine in (0.9, 1.0):
    a = np.tril(np.full((64, 64), cosine), -1)
    right = np.random.default_rng(1).normal(size=(64, 3))
    want = np.linalg.solve(np.eye(64) + a, right)
    single = [jnp.asarray(x, jnp.float32) for x in (a, right)]
    assert (
      checks.relative(chunk.unit_lower_solve(single[0], single[1:])[0], want)
      < 1e-6
    )
  r = np.random.default_rng(0)
  single = [
    jnp.asarray(x, jnp.float32)
    for x in (np.tril(r.normal(size=(8, 8)), -1), r.normal(size=(8, 3)))
  ]
  grads = [
    jax.grad(lambda a, b: checks.wave(solve(a, b)), (0, 1))(*single)
    for solve in (
      lambda a, b: chunk.unit_lower_solve(a, (b,))[0],
      lambda a, b: jnp.linalg.inv(jnp.eye(8) + a) @ b,
    )
  ]  # fmt: skip
  (got, got_right), (want, want_right) = grads
  assert checks.relative(got, jnp.tril(want, -1)) < 1e-4
  assert checks.relative(got_right, want_right) < 1e-5


@pytest.mark.parametrize("name", OPS)
def test_wrong_arguments(name):
  c = make("plain", 8)
  for change, message in (
    (dict(k=c["k"][:, :2]), "k must be floating"),
    (dict(v=c["v"][:4]), "v must be floating"),
    (dict(s=c["s"].T), "s must be floating"),
    (dict(s=c["s"].astype(jnp.bfloat16)), "s must be float32"),
    (dict(q=c["q"].astype(jnp.bfloat16)), "one dtype"),
    (dict(q=c["q"][None, :, None]), "memzoo.ops.batched"),
    (dict(log_decay=c["log_decay"][:3]), "log_decay must be"),
    (dict(reset=c["beta"]), "reset must be bool"),
    (dict(mask=c["mask"][:2]), "mask must be bool"),
    (dict(fresh=c["fresh"].T), "fresh must be"),
  ):
    with pytest.raises(ValueError, match=message) as e:
      call(name, "channel", None, {**c, **change})
    assert str(e.value).startswith(name)
  with pytest.raises(NotImplementedError, match="has no 'assoc' form"):
    call(name, "none", "assoc", c)
  with pytest.raises(ValueError, match="did you mean 'chunk'"):
    call(name, "none", "chunc", c)
