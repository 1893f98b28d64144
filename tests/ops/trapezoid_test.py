"""`trapezoid`: both terms of every write, one after the other, in float64."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops import trapezoid as trapezoid_lib
from memzoo.ops.batched import heads

T, R, K, V = 37, 2, 5, 3
FORMS = ("scan", "chunk")
CASES = ("plain", "strong decay", "mixed", "left padded", "all masked")


def make(case, length=T, ranks=R):
  r = np.random.default_rng(0)
  draw = lambda *shape: r.normal(size=shape)
  c = dict(
    state=(draw(K, V), draw(ranks, K), draw(ranks, V)),
    q=draw(length, ranks, K), k=draw(length, ranks, K),
    v=draw(length, ranks, V), log_decay=-r.uniform(0, 1, length),
    gamma=r.uniform(0, 1, length), beta=r.uniform(0, 1, length),
    reset=np.zeros(length, bool), mask=np.ones(length, bool),
  )  # fmt: skip
  if case == "strong decay":
    c["log_decay"] *= 20
    c["log_decay"][[3, 20]] = -np.inf
  if case == "mixed":
    c["reset"], c["mask"] = r.random(length) < 0.15, r.random(length) < 0.8
  if case == "left padded":
    c["mask"][:11] = False
  if case == "all masked":
    c["mask"][:] = False
  cast = lambda x: jnp.asarray(x, bool if x.dtype == bool else jnp.float32)
  c = jax.tree.map(cast, c)
  return {**c, "state": trapezoid_lib.State(*c["state"])}


def oracle(c):
  """Lahoti et al. 2026, eq. 5, with the decay put before both writes."""
  double = lambda x: np.asarray(x, np.float64)
  s, last_k, last_v = map(double, c["state"])
  ys = np.zeros(c["v"].shape)
  for t in range(len(ys)):
    if not c["mask"][t]:
      continue
    if c["reset"][t]:
      s, last_k, last_v = 0 * s, 0 * last_k, 0 * last_v
    q, k, v = (double(c[name][t]) for name in "qkv")
    alpha = np.exp(double(c["log_decay"][t]))
    s = alpha * s + double(c["beta"][t]) * alpha * last_k.T @ last_v
    s = s + double(c["gamma"][t]) * k.T @ v
    last_k, last_v = k, v
    ys[t] = q @ s
  return (s, last_k, last_v), ys


def call(form, c, flags=True):
  c = dict(c) if flags else {**c, "reset": None, "mask": None}
  args = [c.pop(name) for name in ("state", "q", "k", "v")]
  return trapezoid_lib.trapezoid(*args, **c, implementation=form)


@functools.cache
def run(form, flags=True):
  def loss(floats, flags_):
    state, out = call(form, {**floats, **flags_}, flags)
    return checks.wave(*state, out), (state, out)

  return jax.jit(jax.grad(loss, has_aux=True))


def split(c):
  flags = {k: c[k] for k in ("reset", "mask")}
  return {k: x for k, x in c.items() if k not in flags}, flags


@pytest.mark.parametrize("case", CASES)
def test_stress_grid(case):
  c = make(case)
  out = {form: run(form)(*split(c)) for form in FORMS}
  for form, (grads, values) in out.items():
    assert checks.relative(values, oracle(c)) <= checks.FORWARD, form
    assert checks.relative(grads, out["scan"][0]) <= checks.GRADIENT, form


@pytest.mark.parametrize("length, ranks", ((1, 1), (1, 3), (33, 1), (22, 3)))
def test_lengths_and_ranks(length, ranks):
  c = make("plain", length, ranks)
  values = run("chunk", flags=False)(*split(c))[1]
  assert checks.relative(values, oracle(c)) <= checks.FORWARD


def test_step_is_a_sequence_of_one():
  c = make("plain", 1)
  one = lambda name: c[name][0]
  gates = {k: one(k) for k in ("log_decay", "gamma", "beta")}
  state, y = trapezoid_lib.step(c["state"], *map(one, "qkv"), **gates)
  want, ys = oracle(c)
  assert checks.relative((state, y), (want, ys[0])) <= checks.FORWARD


def test_causal():
  """Though a token's write waits for the next one's weight."""
  c = make("plain")
  later = lambda name: c[name].at[20:].multiply(3.0)
  moved = {**c, **{k: later(k) for k in ("q", "k", "v", "gamma", "beta")}}
  before, after = (run("chunk")(*split(x))[1][1] for x in (c, moved))
  np.testing.assert_array_equal(before[:20], after[:20])


def test_heads():
  c = make("mixed")
  c = {
    k: jax.tree.map(lambda x: x[:9], x) if k != "state" else x
    for k, x in c.items()
  }
  want = call("chunk", c)
  flags = {k: c.pop(k) for k in ("reset", "mask")}
  state = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), c.pop("state"))
  wide = {k: jnp.stack([x, x], axis=1) for k, x in c.items()}
  args = [wide.pop(k) for k in "qkv"]
  state, y = heads(trapezoid_lib.trapezoid)(
    state, *args, **wide, **flags, implementation="chunk"
  )
  got = jax.tree.map(lambda x: x[0], state), y[:, 0]
  assert checks.relative(got, want) <= checks.FORWARD


@pytest.mark.parametrize(
  "name, change, words",
  (
    ("q", lambda x: x[:, 0], r"q must be floating \[\?, \?, \?\]"),
    ("k", lambda x: x[..., :-1], "k must be floating"),
    ("v", lambda x: x[:-1], "v must be floating"),
    ("gamma", lambda x: x[:, None], "gamma must be floating"),
    ("mask", lambda x: x.astype(jnp.float32), "mask must be bool"),
    ("state", lambda s: s._replace(v=s.v[0]), "the state's v must be"),
  ),
)
def test_bad_arguments(name, change, words):
  c = make("plain", 4)
  with pytest.raises(ValueError, match="trapezoid: " + words):
    call("chunk", {**c, name: change(c[name])})


def test_no_fresh_state():
  c = make("plain", 4)
  with pytest.raises(NotImplementedError, match="fresh state"):
    call("chunk", {**c, "fresh": c["state"]})
