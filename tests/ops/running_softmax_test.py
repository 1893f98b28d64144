"""`running_softmax`: the softmax of all log-weights so far, in float64."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops.running_softmax import empty, running_softmax

T, K, C = 37, 3, 8
FORMS = ("scan", "assoc", "chunk")
CASES = ("fresh", "warm", "hundreds", "mixed", "left padded", "all masked")
FLOATS = ("z", "k", "fresh")


def make(case, length=T, seed=0):
  r = np.random.default_rng(seed)
  c = dict(
    z=r.normal(size=K), k=3 * r.normal(size=(length, K)),
    fresh=np.full(K, -np.inf), reset=np.zeros(length, bool),
    mask=np.ones(length, bool),
  )  # fmt: skip
  if case in ("fresh", "left padded"):
    c["z"][:] = -np.inf
  if case == "hundreds":
    c["k"] *= 100
  if case == "mixed":
    c["reset"], c["mask"] = r.random(length) < 0.15, r.random(length) < 0.8
    c["fresh"][0] = 0.5
  if case == "left padded":
    c["mask"][:11] = False
  if case == "all masked":
    c["mask"][:] = False
  return {
    k: jnp.asarray(x, bool if x.dtype == bool else jnp.float32)
    for k, x in c.items()
  }


def oracle(c):
  """Sums of exponentials kept as the list of their logs."""
  double = lambda x: np.asarray(x, np.float64)
  so_far = [double(c["z"])]
  decay, weight = np.zeros(c["k"].shape), np.zeros(c["k"].shape)
  total = lambda logs: np.logaddexp.reduce(np.stack(logs), axis=0)
  for t, k in enumerate(double(c["k"])):
    if not c["mask"][t]:
      continue
    if c["reset"][t]:
      so_far = [double(c["fresh"])]
    before = total(so_far)
    so_far.append(k)
    decay[t], weight[t] = before - total(so_far), np.exp(k - total(so_far))
  return total(so_far), (decay, weight)


def call(form, c):
  return running_softmax(
    c["z"], c["k"], reset=c["reset"], mask=c["mask"], fresh=c["fresh"],
    implementation=form, chunk_size=C,
  )  # fmt: skip


@functools.cache
def run(form):
  def one(c):
    def loss(floats):
      z, (decay, weight) = call(form, {**c, **floats})
      finite = lambda x: jnp.where(jnp.isneginf(x), 0.0, x)
      seen = finite(z), jnp.exp(decay), weight
      return checks.wave(*seen), (z, (decay, weight))

    return jax.value_and_grad(loss, has_aux=True)({k: c[k] for k in FLOATS})

  stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(make, CASES))
  (_, out), grads = jax.jit(jax.vmap(one))(stacked)
  return jax.device_get((out, grads))


def finite(tree):
  return jax.tree.map(lambda x: np.where(np.isneginf(x), -1e4, x), tree)


@pytest.mark.parametrize("form", FORMS)
def test_stress_grid(form):
  for n, case in enumerate(CASES):
    at = lambda tree, n=n: jax.tree.map(lambda x: x[n], tree)
    out, grads = at(run(form))
    (z, (decay, weight)), want = out, oracle(make(case))
    assert checks.relative(finite(z), finite(want[0])) <= checks.FORWARD
    # A decay of e-8 is a difference of two sums: absolute, not relative.
    np.testing.assert_allclose(np.exp(decay), np.exp(want[1][0]), atol=1e-5)
    np.testing.assert_allclose(weight, want[1][1], atol=2e-5)
    there = np.asarray(make(case)["mask"])
    np.testing.assert_allclose((np.exp(decay) + weight)[there], 1, atol=1e-5)
    assert not decay[~there].any() and not weight[~there].any()
    error = checks.relative(grads, at(run("scan")[1]))
    assert error <= checks.GRADIENT, (case, error)
    assert all(np.isfinite(g).all() for g in grads.values()), case


def test_nothing_came_before():
  k = jnp.asarray([[1.0, -200.0, 300.0]])
  z, (decay, weight) = running_softmax(empty(3), k)
  np.testing.assert_array_equal(z, k[0])
  assert np.isneginf(decay).all() and (weight == 1).all()


@pytest.mark.parametrize("length", (0, 1, C, C + 1))
def test_lengths(length):
  c = make("warm", length)
  for z, (decay, weight) in jax.jit(lambda c: [call(f, c) for f in FORMS])(c):
    want = oracle(c)
    assert checks.relative(z, want[0]) <= checks.FORWARD
    np.testing.assert_allclose(np.exp(decay), np.exp(want[1][0]), atol=1e-5)
    np.testing.assert_allclose(weight, want[1][1], atol=1e-5)


@pytest.mark.nans
@pytest.mark.parametrize("form", FORMS)
def test_infinity_in_a_dead_segment(form):
  c = make("warm")
  c["reset"] = c["reset"].at[jnp.array([7, 12])].set(True)
  c["k"] = c["k"].at[5].set(jnp.inf).at[10].set(jnp.nan)

  def loss(k):
    z, (decay, weight) = call(form, {**c, "k": k})
    return checks.wave(z, decay[13:], weight[12:]), (z, weight)

  grad, (z, weight) = jax.jit(jax.grad(loss, has_aux=True))(c["k"])
  assert np.isfinite(z).all() and np.isfinite(weight[12:]).all()
  assert np.isfinite(weight[7:10]).all() and np.isfinite(grad[12:]).all()
  assert not np.any(np.nan_to_num(grad[:12]))


def test_bad_arguments():
  c = make("warm")
  with pytest.raises(ValueError, match=r"k must be floating \[T, K\]"):
    call("scan", {**c, "k": jnp.zeros(T)})
  with pytest.raises(ValueError, match=r"z must be floating \[3\]"):
    call("scan", {**c, "z": jnp.zeros(4)})
  with pytest.raises(ValueError, match=r"fresh must be floating \[3\]"):
    call("scan", {**c, "fresh": jnp.zeros(4)})
