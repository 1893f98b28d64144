"""`linear_recurrence`: the definition in float64, its gradients, its limits.

Values of every form are held to a float64 loop of h = a h + x, and gradients,
which the op writes out itself, to JAX's own derivative of such a loop.
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

T, N, C = 37, 3, 8
FORMS = ("scan", "assoc", "chunk")
KINDS = ("real", "complex", "constant")  # constant: complex, decay [N]
CASES = (
  "plain", "decay 0", "decay 1", "decay e-20", "mixed", "left padded",
  "all masked",
)  # fmt: skip
FLOATS = ("h", "x", "decay", "fresh")


def make(case, kind="real", length=T, seed=0):
  r = np.random.default_rng(seed)
  size = lambda *shape: r.uniform(0.5, 1, shape)

  def normal(*shape):
    x = r.normal(size=shape)
    return x if kind == "real" else x + 1j * r.normal(size=shape)

  shape = (N,) if kind == "constant" else (length, N)
  decay = size(*shape)
  if case.startswith("decay"):
    # Some steps, or some channels where all steps share theirs.
    value = dict(zip(CASES[1:4], (0.0, 1.0, np.exp(-20.0))))[case]
    decay = np.where(r.random(shape) < 0.5, value, decay)
  if kind != "real":
    decay = decay * np.exp(1j * r.uniform(-3, 3, shape))
  c = dict(
    h=normal(N), x=normal(length, N), decay=decay, fresh=normal(N),
    reset=np.zeros(length, bool), mask=np.ones(length, bool),
  )  # fmt: skip
  if case == "mixed":
    c["reset"] = r.random(length) < 0.2
    c["mask"] = r.random(length) < 0.7
  if case == "left padded":
    c["mask"][:11] = False
    c["reset"][5] = True  # where there is no input: not seen
  if case == "all masked":
    c["mask"][:] = False
  dtype = jnp.float32 if kind == "real" else jnp.complex64
  return {
    k: jnp.asarray(x, bool if x.dtype == bool else dtype) for k, x in c.items()
  }


def oracle(c):
  c = {
    k: np.asarray(x, bool if x.dtype == bool else np.complex128)
    for k, x in c.items()
  }
  h, hs = c["h"], np.zeros(c["x"].shape, np.complex128)
  for t in range(len(hs)):
    if not c["mask"][t]:
      continue
    h = c["fresh"] if c["reset"][t] else h
    h = (c["decay"] if c["decay"].ndim == 1 else c["decay"][t]) * h + c["x"][t]
    hs[t] = h
  return h, hs


def naive(c):
  """The same loop for JAX to differentiate."""

  def body(h, i):
    x, decay, reset, mask = i
    new = decay * jnp.where(reset, c["fresh"], h) + x
    return jnp.where(mask, new, h), jnp.where(mask, new, 0)

  decay = jnp.broadcast_to(c["decay"], c["x"].shape)
  return jax.lax.scan(body, c["h"], (c["x"], decay, c["reset"], c["mask"]))


def call(form, c, **kwargs):
  return ops.linear_recurrence(
    c["h"], c["x"], decay=c["decay"], reset=c["reset"], mask=c["mask"],
    fresh=c["fresh"], implementation=form, chunk_size=C, **kwargs,
  )  # fmt: skip


def parts(*arrays):
  return [p for x in arrays for p in (x.real, x.imag)]


@functools.cache
def compiled(form):
  def one(c):
    def loss(floats):
      out = {**c, **floats}
      out = naive(out) if form == "naive" else call(form, out)
      return checks.wave(*map(jnp.sin, parts(*out))), out

    floats = {k: c[k] for k in FLOATS}
    return jax.value_and_grad(loss, has_aux=True)(floats)

  return jax.jit(jax.vmap(one))


def run(form, cases):
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
  (_, out), grads = compiled(form)(stacked)
  return jax.device_get((out, grads))


@pytest.mark.parametrize("kind", KINDS)
def test_stress_grid(kind):
  cases = [make(case, kind) for case in CASES]
  _, want = run("naive", cases)
  for form in ("chunk",) if kind == "complex" else FORMS:
    got, grads = run(form, cases)
    for n, case in enumerate(CASES):
      at = lambda tree, n=n: jax.tree.map(lambda x: x[n], tree)
      error = checks.relative(at(got), oracle(cases[n]))
      assert error <= checks.FORWARD, (form, case, error)
      error = checks.relative(at(grads), at(want))
      assert error <= checks.GRADIENT, (form, case, error)
      assert not np.any(at(got)[1][~np.asarray(cases[n]["mask"])])


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(st.data())
@pytest.mark.parametrize("form", FORMS)
def test_drawn_resets_masks_and_decays(form, data):
  bits = st.lists(st.booleans(), min_size=T, max_size=T)
  c = make("plain", seed=data.draw(st.integers(0, 9)))
  values = st.sampled_from([0.0, 2e-9, 0.5, 0.9999, 1.0, -1.0])
  a = data.draw(st.lists(values, min_size=T, max_size=T))
  c.update(
    reset=jnp.asarray(data.draw(bits)), mask=jnp.asarray(data.draw(bits)),
    decay=jnp.asarray(a, jnp.float32)[:, None] * jnp.ones((1, N)),
  )  # fmt: skip
  (state, out), _ = run(form, [c] + [make("plain")] * (len(CASES) - 1))
  assert checks.relative((state[0], out[0]), oracle(c)) <= checks.FORWARD


@pytest.mark.parametrize("length", (0, 1, C - 1, C, C + 1))
def test_lengths(length):
  c = make("plain", "real", length)
  run = lambda c: [
    ops.linear_recurrence(
      c["h"], c["x"], decay=c["decay"], implementation=form, chunk_size=C
    )
    for form in FORMS
  ]
  for out in jax.jit(run)(c):
    assert checks.relative(out, oracle(c)) <= checks.FORWARD
    assert out[1].shape == (length, N)


@pytest.mark.nans
@pytest.mark.parametrize("form", FORMS)
def test_infinity_in_a_dead_segment(form):
  """Not over a reset, in values or gradients, in the same chunk or a later
  one; its own segment keeps it."""
  c = make("plain")
  c["reset"] = c["reset"].at[12].set(True)
  c["x"] = c["x"].at[9].set(jnp.inf)
  c["decay"] = c["decay"].at[3].set(jnp.nan)

  def loss(floats):
    state, out = call(form, {**c, **floats})
    return checks.wave(state, out[12:]), (state, out)

  floats = {k: c[k] for k in FLOATS}
  grads, (state, out) = jax.jit(jax.grad(loss, has_aux=True))(floats)
  assert np.isfinite(state).all() and np.isfinite(out[12:]).all()
  assert not np.isfinite(out[3:12]).any()
  assert np.isfinite(out[:3]).all()
  for key in ("x", "decay"):
    assert np.isfinite(grads[key][12:]).all(), key
    assert not np.any(np.nan_to_num(grads[key][:12])), key
  assert np.isfinite(grads["fresh"]).all()


def test_a_real_input_drives_a_complex_state():
  c = make("plain", "constant")
  x = c["x"].real.astype(jnp.bfloat16)
  state, out = ops.linear_recurrence(c["h"], x, decay=c["decay"])
  assert state.dtype == out.dtype == jnp.complex64
  c["x"] = x.astype(jnp.complex64)
  assert checks.relative((state, out), oracle(c)) <= checks.FORWARD


def test_gradients_of_gradients_and_no_forward_mode():
  c = make("mixed")

  def twice(run, decay):
    inner = lambda a: jnp.sum(run({**c, "decay": a})[1] ** 3)
    return jnp.sum(jax.grad(inner)(decay) ** 2)

  both = naive, functools.partial(call, "scan")
  want, got = jax.jit(
    lambda a: [jax.grad(functools.partial(twice, run))(a) for run in both]
  )(c["decay"])
  assert checks.relative(got, want) <= checks.GRADIENT
  f = lambda x: call("scan", {**c, "x": x})[1]
  with pytest.raises(TypeError, match="custom_vjp"):
    jax.jvp(f, (c["x"],), (c["x"],))


def test_loops_and_memory():
  """A chunk form walks T / C boundaries, `assoc` has no loop, and a gradient
  keeps no inner step of an associative scan."""
  length, width = 512, 16
  shape = jax.ShapeDtypeStruct((length, width), jnp.float32)

  def grad(form):
    def loss(x, decay):
      state, out = ops.linear_recurrence(
        jnp.zeros(width), x, decay=decay, implementation=form, chunk_size=32
      )
      return jnp.sum(out**2)

    return jax.jit(jax.grad(loss, (0, 1))).lower(shape, shape).compile()

  assert set(checks.trip_counts(grad("chunk"))) == {length // 32}
  assert not checks.trip_counts(grad("assoc"))
  scan = grad("scan")
  assert set(checks.trip_counts(scan)) == {length}
  array = length * width * 4
  assert scan.memory_analysis().temp_size_in_bytes < 5 * array


@pytest.mark.parametrize(
  "change, message",
  (
    (dict(h=jnp.zeros(4)), r"h must be .* \[3\], got float32 \(4,\)"),
    (dict(h=jnp.zeros(N, jnp.bfloat16)), "h must be float32 or complex64"),
    (dict(x=jnp.zeros((2, T, N))), "x must be .*vmap"),
    (dict(x=jnp.zeros((T, N), jnp.complex64)), "x must be floating"),
    (dict(decay=jnp.zeros((T, 2))), r"decay must be floating \[37, 3\]"),
    (dict(decay=jnp.zeros((N,), jnp.complex64)), "decay must be floating"),
    (dict(reset=jnp.zeros(T)), r"reset must be bool"),
    (dict(fresh=jnp.zeros((T, N))), r"fresh must be floating \[3\]"),
  ),
)
def test_bad_arguments(change, message):
  with pytest.raises(ValueError, match="linear_recurrence: " + message):
    call("scan", {**make("plain"), **change})


def test_bad_forms():
  c = make("plain")
  with pytest.raises(NotImplementedError, match="interpret"):
    call("pallas", c)
  with pytest.raises(ValueError, match="did you mean 'assoc'"):
    call("asoc", c)
  with pytest.raises(ValueError, match="chunk_size must be a power of two"):
    ops.linear_recurrence(c["h"], c["x"], decay=c["decay"], chunk_size=12)
