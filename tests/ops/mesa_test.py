"""`mesa`: von Oswald et al. 2025 (arXiv:2506.05233) with an exact solve in
float64, its gradient through that solve, and the solver alone."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops.mesa import State, mesa, solve

T, K, V, C, STEPS = 37, 5, 3, 16, 12
CASES = (
  "plain", "no decay", "identical keys", "beta 0", "clear", "mixed",
  "left padded", "all masked",
)  # fmt: skip
FLOATS = ("state", "q", "k", "v", "beta", "log_decay", "ridge", "fresh")


def make(case, length=T, seed=0):
  r = np.random.default_rng(seed)

  def state():
    root = r.normal(size=(K, K))
    kk, kv = root @ root.T / K, r.normal(size=(K, V))
    return State(jnp.asarray(kk, jnp.float32), jnp.asarray(kv, jnp.float32))

  c = dict(
    q=r.normal(size=(length, K)), k=r.normal(size=(length, K)),
    v=r.normal(size=(length, V)), beta=r.uniform(0, 1, length),
    log_decay=-r.uniform(0, 1, length), ridge=r.uniform(0.25, 2, K),
    reset=np.zeros(length, bool), mask=np.ones(length, bool),
  )  # fmt: skip
  c["k"] /= np.linalg.norm(c["k"], axis=1, keepdims=True)
  if case == "no decay":
    c["log_decay"][:] = 0
  if case == "identical keys":
    c["k"][:] = c["k"][:1]
    c["log_decay"][:] = -0.01
  if case == "beta 0":
    c["beta"][:] = 0
  if case == "clear":
    c["log_decay"][[3, 15, 16]] = -np.inf
    c["log_decay"][20:30] = -20
  if case == "mixed":
    c["reset"], c["mask"] = r.random(length) < 0.15, r.random(length) < 0.8
  if case == "left padded":
    c["mask"][:11] = False
  if case == "all masked":
    c["mask"][:] = False
  c = {
    k: jnp.asarray(x, bool if x.dtype == bool else jnp.float32)
    for k, x in c.items()
  }
  return dict(c, state=state(), fresh=state())


def oracle(c):
  double = lambda x: np.asarray(x, np.float64)
  (h, g), out = map(double, c["state"]), np.zeros(c["v"].shape)
  for t in range(len(out)):
    if not c["mask"][t]:
      continue
    if c["reset"][t]:
      h, g = map(double, c["fresh"])
    k, a, b = double(c["k"][t]), np.exp(double(c["log_decay"][t])), c["beta"][t]
    h = a * h + double(b) * np.outer(k, k)
    g = a * g + double(b) * np.outer(k, double(c["v"][t]))
    x = np.linalg.solve(h + np.diag(double(c["ridge"])), double(c["q"][t]))
    out[t] = g.T @ x
  return State(h, g), out


def naive(c):
  """The same loop for JAX to differentiate through the exact solve."""

  def body(state, i):
    q, k, v, beta, log_decay, reset, mask = i
    h, g = jax.tree.map(lambda f, s: jnp.where(reset, f, s), c["fresh"], state)
    h = jnp.exp(log_decay) * h + beta * jnp.outer(k, k)
    g = jnp.exp(log_decay) * g + beta * jnp.outer(k, v)
    x = jnp.linalg.solve(h + jnp.diag(c["ridge"]), q)
    new = jax.tree.map(lambda n, o: jnp.where(mask, n, o), State(h, g), state)
    return new, jnp.where(mask, x @ g, 0)

  keys = ("q", "k", "v", "beta", "log_decay", "reset", "mask")
  return jax.lax.scan(body, c["state"], tuple(c[k] for k in keys))


def call(form, c, **kwargs):
  if form == "naive":
    return naive(c)
  flags = {k: c[k] for k in ("reset", "mask", "fresh", "log_decay")}
  return mesa(
    c["state"], c["q"], c["k"], c["v"], beta=c["beta"], ridge=c["ridge"],
    implementation=form, chunk_size=C,
    **{"solver_steps": STEPS, **flags, **kwargs},
  )  # fmt: skip


@functools.cache
def run(form):
  def one(c):
    def loss(floats):
      out = call(form, {**c, **floats})
      return checks.wave(*jax.tree.leaves(out)), out

    return jax.value_and_grad(loss, has_aux=True)({k: c[k] for k in FLOATS})

  stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(make, CASES))
  (_, out), grads = jax.jit(jax.vmap(one))(stacked)
  return jax.device_get((out, grads))


@pytest.mark.parametrize("form", ("scan", "chunk"))
def test_stress_grid(form):
  (got, grads), wants = run(form), run("naive")[1]
  for n, case in enumerate(CASES):
    at = lambda tree, n=n: jax.tree.map(lambda x: x[n], tree)
    error = checks.relative(at(got), oracle(make(case)))
    assert error <= checks.FORWARD, (case, error)
    # The solve reads only the symmetric part of a symmetric H.
    both = lambda g: {
      **g, **{s: g[s]._replace(kk=g[s].kk + g[s].kk.T) for s in ("state", "fresh")}
    }  # fmt: skip
    error = checks.relative(both(at(grads)), both(at(wants)))
    assert error <= checks.GRADIENT, (case, error)


@pytest.mark.parametrize("length", (0, 1, C, C + 1))
def test_lengths_and_no_flags(length):
  c = make("no decay", length)
  none = dict(reset=None, mask=None, fresh=None, log_decay=None)
  both = jax.jit(lambda c: [call(f, c, **none) for f in ("scan", "chunk")])(c)
  for out in both:
    assert checks.relative(out, oracle(c)) <= checks.FORWARD


def test_few_steps_approach_the_solution():
  c = make("plain")
  want = oracle(c)[1]
  several = lambda c: [
    call("chunk", c, solver_steps=n)[1] for n in (1, 2, 3, K)
  ]
  errors = [checks.relative(out, want) for out in jax.jit(several)(c)]
  assert errors[0] > 0.05 and errors[-1] < 1e-5
  assert errors == sorted(errors, reverse=True)


def test_solver():
  """Exact after as many steps as there are different eigenvalues, and at rest
  for a right side of zero."""
  values = jnp.asarray([1.0, 1.0, 4.0, 4.0, 4.0])
  q = jnp.stack([jnp.arange(1.0, 6.0), jnp.zeros(5)])
  x = solve(lambda p: values * p, q, 2)
  np.testing.assert_allclose(x, q / values, rtol=1e-6)
  grad = jax.grad(lambda q: jnp.sum(solve(lambda p: values * p, q, 9)[0] ** 2))
  np.testing.assert_allclose(grad(q)[0], 2 * q[0] / values**2, rtol=1e-5)


@pytest.mark.nans
def test_infinity_in_a_dead_segment():
  c = make("plain")
  c["reset"] = c["reset"].at[jnp.array([12, 35])].set(True)
  c["v"] = c["v"].at[9].set(jnp.inf)
  c["k"] = c["k"].at[33].set(jnp.nan)

  def loss(floats):
    state, out = call("chunk", {**c, **floats})
    return checks.wave(*state, out[35:]), (state, out)

  floats = {k: c[k] for k in FLOATS}
  grads, (state, out) = jax.jit(jax.grad(loss, has_aux=True))(floats)
  assert all(np.isfinite(x).all() for x in state)
  assert np.isfinite(out[12:33]).all() and np.isfinite(out[35:]).all()
  assert not np.isfinite(out[9:12]).any() and not np.isfinite(out[33:35]).any()
  for key in ("q", "k", "v", "beta", "log_decay"):
    assert np.isfinite(grads[key][35:]).all(), key
    assert not np.any(np.nan_to_num(grads[key][:35])), key


def test_chunks_are_serial_steps():
  c = make("plain", 4 * C)
  fn = jax.jit(lambda c: call("chunk", c)).lower(c).compile()
  assert sorted(checks.trip_counts(fn)) == [4, STEPS]


@pytest.mark.parametrize(
  "change, message",
  (
    (dict(ridge=jnp.ones(V)), r"ridge must be floating \[5\]"),
    (dict(beta=jnp.ones((T, 1))), r"beta must be floating \[37\]"),
    (dict(log_decay=jnp.ones((T, K))), r"log_decay must be floating \[37\]"),
    (dict(state=State(jnp.ones((K, V)), jnp.ones((K, V)))), r"state\.kk must"),
    (dict(fresh=State(jnp.ones((K, V)), jnp.ones((K, V)))), r"fresh\.kk must"),
  ),
)
def test_bad_arguments(change, message):
  with pytest.raises(ValueError, match="mesa: " + message):
    call("scan", {**make("plain"), **change})
  with pytest.raises(ValueError, match="solver_steps must be above 0"):
    call("scan", make("plain"), solver_steps=0)
