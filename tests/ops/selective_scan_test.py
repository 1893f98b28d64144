"""`selective_scan`: Gu and Dao 2023 (arXiv:2312.00752) eq. 2 in float64, its
gradients, and that nothing of shape [T, D, N] is ever built."""

import functools

import checks
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import ops

T, D, N, C = 70, 3, 5, 8  # T crosses a block of the scan form
FORMS = ("scan", "chunk")
CASES = (
  "plain", "dt 0", "decay e-20", "mixed", "left padded", "all masked",
)  # fmt: skip
FLOATS = ("h", "x", "dt", "a", "b", "c", "fresh")


def make(case, length=T, seed=0):
  r = np.random.default_rng(seed)
  c = dict(
    h=r.normal(size=(D, N)), x=r.normal(size=(length, D)),
    dt=r.uniform(0, 1, (length, D)), a=-r.uniform(0.1, 2, (D, N)),
    b=r.normal(size=(length, N)), c=r.normal(size=(length, N)),
    fresh=r.normal(size=(D, N)), reset=np.zeros(length, bool),
    mask=np.ones(length, bool),
  )  # fmt: skip
  if case == "dt 0":
    c["dt"][::2] = 0
  if case == "decay e-20":
    c["a"][:] = -20.0
    c["dt"][:] = np.where(r.random(c["dt"].shape) < 0.3, 1e-3, 1.0)
  if case == "mixed":
    c["reset"] = r.random(length) < 0.2
    c["mask"] = r.random(length) < 0.7
  if case == "left padded":
    c["mask"][:11] = False
    c["reset"][5] = True
  if case == "all masked":
    c["mask"][:] = False
  return {
    k: jnp.asarray(x, bool if x.dtype == bool else jnp.float32)
    for k, x in c.items()
  }


def oracle(c):
  """(2a) and (2b), with Ā = exp(ΔA) of (4) and B̄ = ΔB."""
  c = {
    k: np.asarray(x, bool if x.dtype == bool else np.float64)
    for k, x in c.items()
  }
  h, ys = c["h"].copy(), np.zeros(c["x"].shape)
  for t in range(len(ys)):
    if not c["mask"][t]:
      continue
    h = c["fresh"].copy() if c["reset"][t] else h
    for d in range(h.shape[0]):
      delta = c["dt"][t, d]
      h[d] = np.exp(delta * c["a"][d]) * h[d] + delta * c["b"][t] * c["x"][t, d]
      ys[t, d] = c["c"][t] @ h[d]
  return h, ys


def naive(c):
  """The same loop for JAX to differentiate."""

  def body(h, i):
    x, dt, b, read, reset, mask = i
    new = jnp.where(reset, c["fresh"], h) * jnp.exp(dt[:, None] * c["a"])
    new = new + jnp.outer(dt * x, b)
    return jnp.where(mask, new, h), jnp.where(mask, new @ read, 0)

  return jax.lax.scan(
    body, c["h"], tuple(c[k] for k in ("x", "dt", "b", "c", "reset", "mask"))
  )


def call(form, c):
  return ops.selective_scan(
    c["h"], c["x"], c["dt"], c["a"], c["b"], c["c"], reset=c["reset"],
    mask=c["mask"], fresh=c["fresh"], implementation=form, chunk_size=C,
  )  # fmt: skip


@functools.cache
def compiled(form):
  def one(c):
    def loss(floats):
      out = {**c, **floats}
      out = naive(out) if form == "naive" else call(form, out)
      return checks.wave(*out), out

    floats = {k: c[k] for k in FLOATS}
    return jax.value_and_grad(loss, has_aux=True)(floats)

  return jax.jit(jax.vmap(one))


def run(form, cases):
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
  (_, out), grads = compiled(form)(stacked)
  return jax.device_get((out, grads))


def test_stress_grid():
  cases = [make(case) for case in CASES]
  _, want = run("naive", cases)
  for form in FORMS:
    got, grads = run(form, cases)
    for n, case in enumerate(CASES):
      at = lambda tree, n=n: jax.tree.map(lambda x: x[n], tree)
      error = checks.relative(at(got), oracle(cases[n]))
      assert error <= checks.FORWARD, (form, case, error)
      error = checks.relative(at(grads), at(want))
      assert error <= checks.GRADIENT, (form, case, error)
      assert not np.any(at(got)[1][~np.asarray(cases[n]["mask"])])


def test_one_state_a_channel():
  """N = 1, which the scan form leaves to the linear recurrence."""
  cases = [
    {k: x if k in ("x", "dt", "reset", "mask") else x[:, :1]
     for k, x in make(case).items()}
    for case in CASES
  ]  # fmt: skip
  _, want = run("naive", cases)
  got, grads = run("scan", cases)
  for n, case in enumerate(CASES):
    at = lambda tree, n=n: jax.tree.map(lambda x: x[n], tree)
    assert checks.relative(at(got), oracle(cases[n])) <= checks.FORWARD, case
    assert checks.relative(at(grads), at(want)) <= checks.GRADIENT, case
    assert not np.any(at(got)[1][~np.asarray(cases[n]["mask"])])


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(st.data())
@pytest.mark.parametrize("form", FORMS)
def test_drawn_resets_masks_and_steps(form, data):
  bits = st.lists(st.booleans(), min_size=T, max_size=T)
  c = make("plain", seed=data.draw(st.integers(0, 9)))
  values = st.sampled_from([0.0, 1e-4, 0.5, 20.0])
  dt = data.draw(st.lists(values, min_size=T, max_size=T))
  c.update(
    reset=jnp.asarray(data.draw(bits)), mask=jnp.asarray(data.draw(bits)),
    dt=jnp.asarray(dt, jnp.float32)[:, None] * jnp.ones((1, D)),
  )  # fmt: skip
  (state, out), _ = run(form, [c] + [make("plain")] * (len(CASES) - 1))
  assert checks.relative((state[0], out[0]), oracle(c)) <= checks.FORWARD


@pytest.mark.parametrize("length", (0, 1, C + 1, 64, 65))
def test_lengths(length):
  c = make("plain", length)

  def run(c):
    tensors = [c[k] for k in ("h", "x", "dt", "a", "b", "c")]
    op = functools.partial(ops.selective_scan, *tensors, chunk_size=C)
    return [op(implementation=form) for form in FORMS]

  for out in jax.jit(run)(c):
    assert checks.relative(out, oracle(c)) <= checks.FORWARD
    assert out[1].shape == (length, D)


@pytest.mark.nans
@pytest.mark.parametrize("form", FORMS)
def test_infinity_in_a_dead_segment(form):
  c = make("plain")
  c["reset"] = c["reset"].at[jnp.array([12, 66])].set(True)
  c["x"] = c["x"].at[9].set(jnp.inf)
  c["b"] = c["b"].at[60].set(jnp.nan)

  def loss(floats):
    state, out = call(form, {**c, **floats})
    return checks.wave(state, out[66:]), (state, out)

  floats = {k: c[k] for k in FLOATS}
  grads, (state, out) = jax.jit(jax.grad(loss, has_aux=True))(floats)
  assert np.isfinite(state).all() and np.isfinite(out[66:]).all()
  assert np.isfinite(out[12:60]).all() and np.isfinite(out[:9]).all()
  assert not np.isfinite(out[9:12]).any()
  assert not np.isfinite(out[60:66]).any()
  for key in ("x", "dt", "b", "c"):
    assert np.isfinite(grads[key][66:]).all(), key
    assert not np.any(np.nan_to_num(grads[key][:66])), key
  assert np.isfinite(grads["fresh"]).all()


def test_bfloat16():
  c = make("mixed")
  low = {k: c[k].astype(jnp.bfloat16) for k in ("x", "b", "c")}
  state, out = call("scan", {**c, **low})
  assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
  rounded = oracle({**c, **checks.single(low)})
  assert checks.relative(state, rounded[0]) < checks.FORWARD
  assert checks.relative(out, rounded[1]) < 2**-8


@pytest.mark.parametrize("form", FORMS)
def test_memory_and_loops(form):
  """[T, D, N] alone would take 33.5 MB here."""
  length, width, states = 4096, 128, 16
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  tokens = shape(length, width), shape(length, width)
  rest = shape(width, states), shape(length, states), shape(length, states)

  def loss(*tensors):
    h = jnp.zeros((width, states))
    out = ops.selective_scan(h, *tensors, implementation=form)
    return jnp.sum(out[1] ** 2)

  grad = jax.jit(jax.grad(loss, tuple(range(5))))
  grad = grad.lower(*tokens, *rest).compile()
  assert grad.memory_analysis().temp_size_in_bytes < 15e6
  blocks = {"scan": {64}, "chunk": {length // 16}}  # 64 blocks of 64 tokens
  assert set(checks.trip_counts(grad)) == blocks[form]


@pytest.mark.parametrize(
  "change, message",
  (
    (dict(h=jnp.zeros((D, N, 1))), r"h must be float32 \[D, N\]"),
    (dict(h=jnp.zeros((D + 1, N))), r"h must be float32 \[3, N\]"),
    (dict(x=jnp.zeros((2, T, D))), "x must be .*vmap"),
    (dict(dt=jnp.zeros(T)), r"dt must be floating \[70, 3\]"),
    (dict(a=jnp.zeros(N)), r"a must be floating \[3, 5\]"),
    (dict(b=jnp.zeros((T, D))), r"b must be floating \[70, 5\]"),
    (dict(c=jnp.zeros((T, N), jnp.int32)), "c must be floating"),
    (dict(mask=jnp.ones(T)), "mask must be bool"),
    (dict(fresh=jnp.zeros(N)), r"fresh must be floating \[3, 5\]"),
  ),
)
def test_bad_arguments(change, message):
  with pytest.raises(ValueError, match="selective_scan: " + message):
    call("scan", {**make("plain"), **change})
