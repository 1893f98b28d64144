"""`diag_plus_rank_one`: the equation, the stress grid, the delta rule in it.

The oracle is a loop in float64 from the recurrence of the generalised delta
rule; every form is held to it, and its gradients to the step loop's.
"""

import functools
import importlib

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import kernels, ops
from memzoo.ops import chunk

T, K, V, C = 37, 5, 3, 16
DECAYS = ("none", "scalar", "channel")
CASES = (
  "plain", "aligned", "identical keys", "reflection", "decay -20",
  "decay -inf", "mixed", "left padded", "all masked",
)  # fmt: skip
FLOATS = ("s", "q", "k", "v", "a", "b", "log_decay", "fresh")


def oracle(c, decay, shared):
  """S_t = S_{t−1} (diag(w_t) + z_tᵀ b_t) + v_tᵀ k_t, with rows for vectors and
  S [V, K] (Peng et al. 2025, arXiv:2503.14456, section 3)."""
  c = {k: np.asarray(x, np.float64) for k, x in c.items()}
  s = c["s"].T.copy()
  outputs = np.zeros((len(c["q"]), s.shape[0]))
  for t in range(len(c["q"])):
    if not c["mask"][t]:
      continue
    if c["reset"][t]:
      s = c["fresh"].T.copy()
    q, k, v, z = (c[name][t][None] for name in "qkva")
    b = k if shared else c["b"][t][None]
    w = np.ones(s.shape[1])
    if decay != "none":
      g = c["log_decay"][t]
      w = np.exp(g if decay == "channel" else np.full(len(g), g[0]))
    s = s @ (np.diag(w) + z.T @ b) + v.T @ k
    outputs[t] = (s @ q.T)[:, 0]
  return s.T, outputs


def make(case, length=T, seed=0, width=(K, V)):
  r = np.random.default_rng(seed)
  keys = (length, width[0])
  c = dict(
    s=r.normal(size=width), q=r.normal(size=keys), k=r.normal(size=keys),
    v=r.normal(size=(length, width[1])), a=r.normal(size=keys),
    b=r.normal(size=keys), log_decay=-r.uniform(0, 1, keys),
    fresh=r.normal(size=width), reset=np.zeros(length, bool),
    mask=np.ones(length, bool),
  )  # fmt: skip
  if case == "decay -20":
    c["log_decay"][:] = -20
    c["log_decay"][::3] = -1e-3
  if case == "decay -inf":
    c["log_decay"][length // 8 :: 7] = -np.inf
  if case in ("mixed", "decay -inf"):
    c["reset"] = r.random(length) < 0.15
    c["mask"] = r.random(length) < 0.8
  if case == "left padded":
    c["mask"][:11] = False
  if case == "all masked":
    c["mask"][:] = False
  if case == "identical keys":
    c["k"][:] = c["k"][0]
  c["k"] /= np.linalg.norm(c["k"], axis=1, keepdims=True)
  # As the papers keep it from growing: a unit vector is read, its negative,
  # scaled by the channel, is written. Without a decay at most 1 in each norm.
  rate = np.full(keys, 2.0 if case == "reflection" else 0.9)
  if case == "plain":
    rate = r.uniform(0, 1, keys)
  c["a"] /= np.linalg.norm(c["a"], axis=1, keepdims=True)
  if case in ("identical keys", "aligned"):
    c["a"] = c["k"].copy()
  c["b"] = -rate * c["a"]
  return {
    k: jnp.asarray(x, bool if x.dtype == bool else jnp.float32)
    for k, x in c.items()
  }


def call(c, decay, form, shared=False, flags=True, size=C):
  kwargs = dict(a=-c["k"] if shared else c["a"])
  if not shared:
    kwargs["b"] = c["b"]
  if decay != "none":
    g = c["log_decay"]
    kwargs["log_decay"] = g if decay == "channel" else g[:, 0]
  if flags:
    kwargs.update(reset=c["reset"], mask=c["mask"], fresh=c["fresh"])
  return ops.diag_plus_rank_one(
    c["s"], c["q"], c["k"], c["v"], implementation=form, chunk_size=size,
    **kwargs,
  )  # fmt: skip


def truth(c, decay, shared=False):
  return oracle({**c, "a": -c["k"]} if shared else c, decay, shared)


@functools.cache
def compiled(decay, form, shared):
  def one(c):
    def loss(floats):
      state, out = call({**c, **floats}, decay, form, shared)
      return checks.wave(state, out), (state, out)

    return jax.value_and_grad(loss, has_aux=True)({k: c[k] for k in FLOATS})

  return jax.jit(jax.vmap(one))


def run(decay, form, shared, cases):
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
  (_, out), grads = compiled(decay, form, shared)(stacked)
  return jax.device_get((out, grads))


@pytest.mark.parametrize("shared", (False, True), ids=("b", "b is k"))
@pytest.mark.parametrize("decay", DECAYS)
def test_stress_grid(decay, shared):
  cases = [make(case) for case in CASES]
  want, want_grads = run(decay, "scan", shared, cases)
  got, got_grads = run(decay, "chunk", shared, cases)
  for n, case in enumerate(CASES):
    at = lambda tree: jax.tree.map(lambda x: x[n], tree)
    true = truth(cases[n], decay, shared)
    for form, out in (("scan", want), ("chunk", got)):
      error = checks.relative(at(out), true)
      assert error <= checks.FORWARD, (case, form, error)
    error = checks.relative(at(got_grads), at(want_grads))
    assert error <= checks.GRADIENT, (case, error)
    for key in FLOATS:
      assert np.isfinite(got_grads[key][n]).all(), (case, key)
    if case == "decay -inf" and decay != "none":
      cut = np.isinf(np.asarray(cases[n]["log_decay"]))
      if decay == "scalar":
        cut[:, 1:] = False
      assert cut.any() and not np.any(got_grads["log_decay"][n][cut])


@pytest.mark.parametrize("length", (1, 7, 64, 65))
def test_lengths(length):
  """Any length, with drawn resets, gaps and decays from 0 to −inf."""
  r = np.random.default_rng(length)
  g = r.choice([0.0, -1e-4, -0.5, -20.0, -np.inf], (length, K))
  c = make("mixed", length, seed=length)
  c["log_decay"] = jnp.asarray(g, jnp.float32)
  fn = jax.jit(lambda c: call(c, "channel", "chunk", size=32))
  assert checks.relative(fn(c), truth(c, "channel")) <= checks.FORWARD


def test_the_delta_rule_is_a_special_case():
  """a = −α k, b = β k and writes β k give `delta_rule`, in every form; so does
  the shared direction, with β in the reading and the value."""
  c = make("mixed")
  beta = jnp.linspace(0.0, 2.0, T)
  flags = dict(log_decay=c["log_decay"], reset=c["reset"], mask=c["mask"])

  @functools.partial(jax.jit, static_argnums=0)
  def both(form, c, beta):
    tensors = c["s"], c["q"], c["k"], c["v"]
    want = ops.delta_rule(*tensors, beta=beta, implementation=form, **flags)
    s, q, k, v = tensors
    a, beta = -jnp.exp(c["log_decay"]) * k, beta[:, None]
    op = functools.partial(ops.diag_plus_rank_one, implementation=form, **flags)
    apart = op(s, q, beta * k, v, a=a, b=beta * k)
    return want, apart, op(s, q, k, beta * v, a=beta * a)

  for form in ("scan", "chunk"):
    want, apart, shared = both(form, c, beta)
    assert checks.relative(apart, want) <= checks.FORWARD
    assert checks.relative(shared, want) <= checks.FORWARD


@pytest.mark.nans
@pytest.mark.parametrize("form", ("scan", "chunk"))
def test_infinity_in_a_dead_segment(form):
  """Not over a reset, in values or gradients; its own segment keeps it."""
  c = make("plain")
  c["reset"] = c["reset"].at[9].set(True)
  c["v"] = c["v"].at[4].set(jnp.inf)
  c["a"] = c["a"].at[5].set(jnp.nan)

  def loss(floats):
    state, out = call({**c, **floats}, "channel", form)
    return checks.wave(state, out[9:]), (state, out)

  floats = {k: c[k] for k in FLOATS}
  grads, (state, out) = jax.jit(jax.grad(loss, has_aux=True))(floats)
  assert np.isfinite(state).all() and np.isfinite(out[9:]).all()
  assert not np.isfinite(out[5:9]).all(axis=1).any()
  for key in ("q", "k", "v", "a", "b", "log_decay"):
    assert np.isfinite(grads[key][9:]).all(), key
    assert not np.any(np.nan_to_num(grads[key][:9])), key


def test_half_precision():
  """bfloat16 costs at most four times what rounding the inputs costs; the
  state stays float32."""
  c = make("plain")
  keys = ("q", "k", "v", "a", "b")
  fn = jax.jit(lambda c: call(c, "channel", "chunk", flags=False))
  exact = {k: c[k] for k in keys}
  rounded = checks.half(exact)
  true = fn(c)
  rounding = fn({**c, **checks.single(rounded)})
  s, o = fn({**c, **rounded})
  assert s.dtype == jnp.float32 and o.dtype == jnp.bfloat16
  for got, near, want in zip((s, o), rounding, true):
    error = checks.relative(checks.single(got), want)
    assert error <= 4 * max(checks.relative(near, want), 2.0**-9)


def test_effects_compose():
  """Two devices that exchange effects alone give what one device gives."""
  c = make("mixed", 2 * C)
  c["reset"] &= c["mask"]  # as the op does
  module = importlib.import_module("memzoo.ops.diag_plus_rank_one")
  inputs = module.Inputs(**{k: c[k] for k in module.Inputs._fields})
  inputs = chunk.as_columns(inputs)
  halves = [jax.tree.map(lambda x, i=i: x[i : i + C], inputs) for i in (0, C)]
  function = module.FUNCTION

  @jax.jit
  def both(s):
    effects = [function.effect(function.prepare(h, c["fresh"])) for h in halves]
    return function.apply(function.compose(*effects), s)

  want = truth(c, "channel")[0]
  assert checks.relative(both(c["s"]), want) <= checks.FORWARD


@pytest.mark.slow
@pytest.mark.parametrize("shared", (False, True))
def test_kernel(shared):
  """The chunk form as a kernel, forward and backward, interpreted."""
  cases = [make(case) for case in ("plain", "mixed", "decay -inf")]
  want = run("channel", "scan", shared, cases)
  with kernels.interpret(True):
    got = run("channel", "pallas", shared, cases)
  assert checks.relative(got[0], want[0]) <= checks.FORWARD
  assert checks.relative(got[1], want[1]) <= checks.GRADIENT


def test_budget():
  """At T = 4096, forward and backward: T / C steps, and nothing [T, K, V]."""
  length, width = 4096, 64
  row = jnp.zeros((length, width))
  arrays = dict(
    s=jnp.zeros((width, width)), q=row, k=row, v=row, a=row, b=row,
    log_decay=row,
  )  # fmt: skip

  def loss(c):
    state, out = call(c, "channel", "chunk", flags=False, size=32)
    return jnp.sum(out**2) + jnp.sum(state)

  done = jax.jit(jax.grad(loss)).lower(arrays).compile()
  assert done.memory_analysis().temp_size_in_bytes < 16 * 2**20
  counts = checks.trip_counts(done)
  assert counts and max(counts) <= length // 32, counts
  assert not any("4096,64,64" in line for line in done.as_text().splitlines())


def test_wrong_arguments():
  c = make("plain", 8)
  for change, message in (
    (dict(a=c["a"][:, :2]), "a must be floating"),
    (dict(b=c["b"][:4]), "b must be floating"),
    (dict(k=c["k"][:, :2]), "k must be floating"),
    (dict(s=c["s"].T), "s must be floating"),
    (dict(log_decay=c["log_decay"][:3]), "log_decay must be"),
    (dict(fresh=c["fresh"].T), "fresh must be"),
  ):
    with pytest.raises(ValueError, match=message) as e:
      call({**c, **change}, "channel", None)
    assert str(e.value).startswith("diag_plus_rank_one")
  with pytest.raises(NotImplementedError, match="has no 'assoc' form"):
    call(c, "none", "assoc")
