"""`gradient_step`: the paper's inner loop, mini-batches cut anywhere.

The oracle is the primal loop of Sun et al. 2024 in float64, with a list of the
mini-batch's gradients and each W_t by its own sum.
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
from memzoo.ops.gradient_step import (
  Learner,
  Model,
  State,
  gradient_step,
  positions,
  start,
)

T, K, DEAD = 23, 4, 9
# (n, layer norm, bias, residual, V)
LEARNERS = {
  "ttt": (4, True, True, True, 4),
  "plain": (5, False, False, False, 3),
  "online": (1, True, False, False, 3),
}
DIFFERENTIATED = ("ttt", "plain")  # compilation is what the grid costs
CASES = (
  "plain", "inside a mini-batch", "masked", "all masked", "left padded",
  "reset where masked", "resets", "resets and masks", "reset at every token",
  "identical keys", "correlated keys", "rates 0", "large rates", "infinity",
)  # fmt: skip


def layer_norm(z, scale, bias):
  centred = z - z.mean()
  return centred / np.sqrt((centred**2).mean() + 1e-6) * scale + bias


def oracle(learner, c):
  """Eq. 4 and 6: W_t = W_0 − Σ η G_s with every G_s at W_0, the start of the
  mini-batch; ∂ℓ/∂z through the layer norm by its Jacobian."""
  n, has_norm, has_bias, residual, width = LEARNERS[learner]
  c = {k: np.asarray(x, np.float64) for k, x in c.items()}
  zero = np.zeros((K, width)), np.zeros(width)
  start = c["w"], c["b"] * has_bias
  before = c["gw"], c["gb"] * has_bias  # of the tokens before this call
  phase, grads = int(c["phase"]), []
  o, losses = np.zeros((len(c["q"]), width)), np.zeros(len(c["q"]))

  def normed(z):
    return layer_norm(z, c["scale"], c["bias"]) if has_norm else z

  def jacobian(z):
    if not has_norm:
      return np.eye(width)
    m = z - z.mean()
    s = np.sqrt((m**2).mean() + 1e-6)
    centre = np.eye(width) - 1 / width
    return c["scale"][:, None] * (centre / s - np.outer(m, m) / (width * s**3))

  def weights(i):
    w = start[0] - c["rates"][i] * (before[0] + sum(g[0] for g in grads))
    b = start[1] - c["rates"][i] * (before[1] + sum(g[1] for g in grads))
    return w, b

  for t in range(len(c["q"])):
    if not c["mask"][t]:
      continue
    if c["reset"][t]:
      start = c["fresh_w"], c["fresh_b"] * has_bias
      before, grads, phase = zero, [], 0
    q, k, v = c["q"][t], c["k"][t], c["v"][t]
    target = v - k if residual else v
    z = k @ start[0] + start[1]
    error = normed(z) - target
    losses[t] = 0.5 * error @ error
    g = jacobian(z).T @ error
    grads.append((c["rate"][t] * np.outer(k, g), c["rate"][t] * g * has_bias))
    w, b = weights(phase)
    o[t] = normed(q @ w + b) + (q if residual else 0)
    phase += 1
    if phase == n:
      start, before, grads, phase = (w, b), zero, [], 0
  sums = [before[i] + sum((g[i] for g in grads), zero[i]) for i in (0, 1)]
  return start, sums, phase, o, losses


def make(learner, case, length=T, seed=0):
  n, _, _, _, width = LEARNERS[learner]
  r = np.random.default_rng(seed)
  normal = lambda *shape: r.normal(size=shape)
  c = dict(
    w=normal(K, width), b=normal(width), gw=np.zeros((K, width)),
    gb=np.zeros(width), phase=0, fresh_w=normal(K, width),
    fresh_b=normal(width), scale=1 + 0.3 * normal(width),
    bias=0.3 * normal(width), rates=1 / np.arange(1, n + 1) + 0.1 * r.random(n),
    q=normal(length, K), k=normal(length, K), v=normal(length, width),
    rate=0.3 * r.random(length), reset=np.zeros(length, bool),
    mask=np.ones(length, bool), asked=np.ones(length, bool),
  )  # fmt: skip
  if case in ("inside a mini-batch", "masked", "resets", "resets and masks"):
    c["phase"] = n - 1
    if n > 1:
      c["gw"], c["gb"] = normal(K, width), normal(width)
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
  if case == "large rates":
    c["rate"][:] = 1.5 / np.sum(c["k"] ** 2, axis=1)
  if case == "infinity":
    c["k"][2], c["q"][4], c["v"][5, 1] = np.inf, np.nan, -np.inf
    c["reset"][DEAD] = True
    c["asked"][:DEAD] = False
  return {
    k: np.asarray(x, np.float32)
    if np.asarray(x).dtype == float
    else np.asarray(x)
    for k, x in c.items()
  }


def call(c, form, learner, reset=True, mask=True):
  n, has_norm, has_bias, residual, _ = LEARNERS[learner]
  model = lambda w, b: Model(w, b if has_bias else None)
  state = State(
    model(c["w"], c["b"]), model(c["gw"], c["gb"]), c["phase"].astype(jnp.int32)
  )
  inner = Learner(c["rates"], *((c["scale"], c["bias"]) if has_norm else ()))
  return gradient_step(
    state, c["q"], c["k"], c["v"], rate=c["rate"], learner=inner,
    residual=residual, reset=c["reset"] if reset else None,
    mask=c["mask"] if mask else None, fresh=model(c["fresh_w"], c["fresh_b"]),
    implementation=form,
  )  # fmt: skip


@functools.cache
def battery(learner, form, reset, mask):
  """(state, outputs, gradients or None) of all cases at once."""

  def one(c):
    if learner not in DIFFERENTIATED:
      return *call(c, form, learner, reset, mask), None
    floats = {k: x for k, x in c.items() if checks.is_float(x)}
    rest = {k: x for k, x in c.items() if k not in floats}

    def loss(floats):
      state, out = call({**floats, **rest}, form, learner, reset, mask)
      parts = [s for s in jax.tree.leaves(state) if checks.is_float(s)]
      o = jnp.where(c["asked"][:, None], out.o, 0.0)
      losses = jnp.where(c["asked"], out.loss, 0.0)
      return checks.wave(o, losses, *parts), (state, out)

    grads, (state, out) = jax.grad(loss, has_aux=True)(floats)
    return state, out, grads

  return jax.jit(jax.vmap(one))


@functools.cache
def run(learner, form, reset=True, mask=True):
  cases = [make(learner, case) for case in CASES]
  stacked = {k: np.stack([c[k] for c in cases]) for k in cases[0]}
  return jax.device_get(battery(learner, form, reset, mask)(stacked))


def want(learner, c):
  start, sums, phase, o, losses = oracle(learner, c)
  count = 2 if LEARNERS[learner][2] else 1
  return [*start[:count], *sums[:count], phase], [o, losses]


@pytest.mark.nans
@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_paper_equation(learner, form):
  state, out, _ = run(learner, form)
  for i, case in enumerate(CASES):
    c = make(learner, case)
    with np.errstate(invalid="ignore"):
      states, outputs = want(learner, c)
    at = lambda tree, i=i: [x[i] for x in jax.tree.leaves(tree)]
    assert checks.relative(at(state), states) <= checks.FORWARD, case
    got, outputs = ([x[c["asked"]] for x in y] for y in (at(out), outputs))
    assert checks.relative(got, outputs) <= checks.FORWARD, case


@pytest.mark.nans
@pytest.mark.parametrize(
  "learner,reset,mask",
  [(name, True, True) for name in DIFFERENTIATED]
  + [("ttt", False, True), ("plain", False, False)],
)
def test_dual_form_equals_primal(learner, reset, mask):
  """The chunk form in its three shapes: cut by resets, and mini-batches as
  chunks, with gaps closed or none."""
  got = run(learner, "chunk", reset, mask)
  primal = run(learner, "scan")
  served = 0
  for i, case in enumerate(CASES):
    c = make(learner, case)
    if not reset and np.any(c["reset"] & c["mask"]):
      continue
    if case == "infinity" or (not mask and not c["mask"].all()):
      continue
    served += 1
    at = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
    assert checks.relative(at(got[:2]), at(primal[:2])) <= checks.FORWARD, case
    for name in got[2]:
      error = checks.relative(got[2][name][i], primal[2][name][i])
      assert error <= checks.GRADIENT, (case, name, error)
  assert served >= 6


@pytest.mark.nans
@pytest.mark.parametrize("learner", DIFFERENTIATED)
@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_infinity_in_a_dead_segment(learner, form):
  """Values are held to the oracle by `test_paper_equation`; here it stays in
  its segment, and later gradients are those of a clean one."""
  _, out, grads = run(learner, form)
  i = CASES.index("infinity")
  assert not np.isfinite(out.o[i, 2:DEAD]).all(axis=1).any()
  assert np.isfinite(out.o[i, DEAD:]).all()
  for name in ("q", "k", "v", "rate"):
    assert np.isfinite(grads[name][i, DEAD:]).all(), name
    assert not np.any(np.nan_to_num(grads[name][i, :DEAD])), name


@functools.cache
def both(learner, length):
  one = lambda form: jax.jit(lambda c: call(c, form, learner))
  return one("scan"), one("chunk")


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(data=st.data())
def test_any_resets_gaps_and_phase(data):
  length = data.draw(st.sampled_from([1, 9]))
  c = make("ttt", "plain", length, seed=data.draw(st.integers(0, 99)))
  flags = st.lists(st.booleans(), min_size=length, max_size=length)
  c["reset"], c["mask"] = np.array(data.draw(flags)), np.array(data.draw(flags))
  c["phase"] = np.int64(data.draw(st.integers(0, 3)))
  if c["phase"]:
    c["gw"] += 1
  for fn in both("ttt", length):
    state, out = fn(c)
    states, outputs = want("ttt", c)
    assert checks.relative(jax.tree.leaves(state), states) <= checks.FORWARD
    assert checks.relative(list(out), outputs) <= checks.FORWARD


@pytest.mark.parametrize(
  "form,reset", [("scan", True), ("chunk", True), ("chunk", False)]
)
def test_cut_anywhere(form, reset):
  """Two calls equal one, wherever the first stops, by either form."""
  c = make("ttt", "resets and masks", 14)
  fn = jax.jit(lambda c: call(c, form, "ttt", reset))
  state, out = fn(c)
  index = np.arange(14)
  for cut in (1, 5, 8):
    half, _ = fn({**c, "mask": c["mask"] & (index < cut)})
    end, tail = fn({
      **c, "mask": c["mask"] & (index >= cut), "w": half.model.w,
      "b": half.model.b, "gw": half.grads.w, "gb": half.grads.b,
      "phase": half.phase,
    })  # fmt: skip
    assert checks.relative(end, state) <= checks.FORWARD
    assert checks.relative(tail.o[cut:], out.o[cut:]) <= checks.FORWARD


def test_online_learning_without_norm_is_the_delta_rule():
  c = make("plain", "plain")
  c["k"] /= np.linalg.norm(c["k"], axis=1, keepdims=True)

  @jax.jit
  def both(s, q, k, v, beta):
    state, out = gradient_step(
      start(Model(s)), q, k, v, rate=beta, learner=Learner(jnp.ones(1)),
      implementation="chunk",
    )  # fmt: skip
    matrix = ops.delta_rule(s, q, k, v, beta=beta, implementation="scan")
    return (state.model.w, out.o), matrix

  got, expected = both(*(c[name] for name in ("w", "q", "k", "v", "rate")))
  assert checks.relative(got, expected) <= checks.FORWARD


@pytest.mark.parametrize("reset,most", [(True, 16), (False, 17)])
def test_chunks_are_mini_batches(reset, most):
  """The dual form's loop has T / n iterations, and one more where the first
  mini-batch was begun by another call."""
  c = make("ttt", "plain", 64)
  fn = jax.jit(lambda c: call(c, "chunk", "ttt", reset, False))
  assert checks.trip_counts(fn.lower(c).compile()) == [most]


@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_half_precision(form):
  names = ("q", "k", "v")
  c = make("ttt", "resets and masks")
  low = {**c, **{k: jnp.asarray(c[k], jnp.bfloat16) for k in names}}
  rounded = {**c, **{k: low[k].astype(jnp.float32) for k in names}}
  fn = jax.jit(lambda c: call(c, form, "ttt"))
  (state, out), exact, near = fn(low), fn(c), fn(rounded)
  assert out.o.dtype == jnp.bfloat16 and out.loss.dtype == jnp.float32
  assert state.model.w.dtype == state.grads.b.dtype == jnp.float32
  error = checks.relative(checks.single(out.o), exact[1].o)
  assert error <= 4 * max(checks.relative(near[1].o, exact[1].o), 2.0**-8), (
    error
  )


def test_heads_and_batches():
  cases = [make("ttt", "resets and masks", 9, seed=n) for n in range(6)]
  for n, c in enumerate(cases):  # heads share flags, batches the fresh model
    c.update({k: cases[n - n % 3][k] for k in ("reset", "mask")})
    c.update({k: cases[n % 3][k] for k in ("fresh_w", "fresh_b")})
    c.update({k: cases[0][k] for k in ("rates", "scale", "bias")})
  both = {k: np.stack([c[k] for c in cases]) for k in cases[0]}
  both = {k: x.reshape(2, 3, *x.shape[1:]) for k, x in both.items()}

  @jax.jit
  def batched(c):
    late = lambda x: jnp.swapaxes(x, 1, 2)
    return ops.batched(gradient_step)(
      State(
        Model(c["w"], c["b"]), Model(c["gw"], c["gb"]),
        c["phase"].astype(jnp.int32),
      ),
      late(c["q"]), late(c["k"]), late(c["v"]), rate=late(c["rate"]),
      learner=Learner(c["rates"][0, 0], c["scale"][0, 0], c["bias"][0, 0]),
      residual=True, reset=c["reset"][:, 0], mask=c["mask"][:, 0],
      fresh=Model(c["fresh_w"][0], c["fresh_b"][0]),
    )  # fmt: skip

  state, out = batched(both)
  for n, c in enumerate(cases):
    states, (o, loss) = want("ttt", c)
    at = [x[n // 3, n % 3] for x in jax.tree.leaves(state)]
    assert checks.relative(at, states) <= checks.FORWARD
    got = [out.o[n // 3, :, n % 3], out.loss[n // 3, :, n % 3]]
    assert checks.relative(got, [o, loss]) <= checks.FORWARD


def test_positions_count_tokens_that_are_there():
  reset = jnp.array([0, 0, 0, 1, 0, 0, 0, 0, 1, 1], bool)
  mask = jnp.array([1, 0, 1, 1, 1, 0, 1, 1, 0, 1], bool)
  got = positions(jnp.int32(2), 10, 3, reset=reset, mask=mask)
  np.testing.assert_array_equal(
    np.asarray(got)[np.asarray(mask)], [2, 0, 0, 1, 2, 0, 0]
  )
  np.testing.assert_array_equal(positions(jnp.int32(1), 5, 3), [1, 2, 0, 1, 2])


@pytest.mark.parametrize(
  "change,message",
  [
    (dict(residual=True), "residual needs K = V, got K=4 and V=3"),
    (dict(rate=jnp.zeros((2,))), r"rate must be floating \[6\], got"),
    (dict(learner=Learner(jnp.ones(0))), "learner.rates must be"),
    (
      dict(learner=Learner(jnp.ones(2), jnp.ones(3))),
      "norm_scale and learner.norm_bias go together",
    ),
    (
      dict(learner=Learner(jnp.ones(2), jnp.ones(4), jnp.ones(4))),
      r"learner.norm_scale must be floating \[3\]",
    ),
    (dict(fresh=Model(jnp.ones((4, 3)), jnp.ones(3))), "fresh.b and"),
  ],
)
def test_bad_arguments(change, message):
  arguments = dict(rate=jnp.ones(6), learner=Learner(jnp.ones(2)))
  with pytest.raises(ValueError, match=message):
    gradient_step(
      start(Model(jnp.zeros((4, 3)))), jnp.ones((6, 4)), jnp.ones((6, 4)),
      jnp.ones((6, 3)), **{**arguments, **change},
    )  # fmt: skip
