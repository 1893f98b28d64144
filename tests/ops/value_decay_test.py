"""`value_decay`: S_t = S_{t−1} Diag(a_t) + k_t v_tᵀ in float64."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops.value_decay import value_decay

T, K, V, C = 37, 5, 3, 16
CASES = (
  "plain", "decay 0", "decay -20", "decay -inf", "mixed", "left padded",
  "all masked",
)  # fmt: skip
FLOATS = ("s", "q", "k", "v", "log_decay", "fresh")


def make(case, length=T, values=V, seed=0):
  r = np.random.default_rng(seed)
  c = dict(
    s=r.normal(size=(K, values)), q=r.normal(size=(length, K)),
    k=r.normal(size=(length, K)), v=r.normal(size=(length, values)),
    log_decay=-r.uniform(0, 1, (length, values)),
    fresh=r.normal(size=(K, values)), reset=np.zeros(length, bool),
    mask=np.ones(length, bool),
  )  # fmt: skip
  if case == "decay 0":
    c["log_decay"][:] = 0
  if case == "decay -20":
    c["log_decay"][:] = -20
    c["log_decay"][::3] = -1e-3
  if case == "decay -inf":
    c["log_decay"][[3, 15, 16, 30], [0, 1, 1, 2]] = -np.inf
  if case in ("mixed", "decay -inf"):
    c["reset"], c["mask"] = r.random(length) < 0.15, r.random(length) < 0.8
  if case == "left padded":
    c["mask"][:11] = False
  if case == "all masked":
    c["mask"][:] = False
  return {
    k: jnp.asarray(x, bool if x.dtype == bool else jnp.float32)
    for k, x in c.items()
  }


def oracle(c):
  c = {k: np.asarray(x, np.float64) for k, x in c.items()}
  s, out = c["s"].copy(), np.zeros(c["v"].shape)
  for t in range(len(out)):
    if not c["mask"][t]:
      continue
    s = c["fresh"].copy() if c["reset"][t] else s
    s = s @ np.diag(np.exp(c["log_decay"][t])) + np.outer(c["k"][t], c["v"][t])
    out[t] = s.T @ c["q"][t]
  return s, out


def call(form, c, **kwargs):
  flags = {k: c[k] for k in ("reset", "mask", "fresh")}
  return value_decay(
    c["s"], c["q"], c["k"], c["v"], log_decay=c["log_decay"],
    implementation=form, chunk_size=C, **{**flags, **kwargs},
  )  # fmt: skip


@functools.cache
def run(form):
  def one(c):
    def loss(floats):
      out = call(form, {**c, **floats})
      return checks.wave(*out), out

    return jax.value_and_grad(loss, has_aux=True)({k: c[k] for k in FLOATS})

  stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(make, CASES))
  (_, out), grads = jax.jit(jax.vmap(one))(stacked)
  return jax.device_get((out, grads))


def test_stress_grid():
  (want, wants), (got, gots) = run("scan"), run("chunk")
  for n, case in enumerate(CASES):
    at = lambda tree, n=n: jax.tree.map(lambda x: x[n], tree)
    for out in (want, got):
      error = checks.relative(at(out), oracle(make(case)))
      assert error <= checks.FORWARD, (case, error)
    error = checks.relative(at(gots), at(wants))
    assert error <= checks.GRADIENT, (case, error)
    assert all(np.isfinite(g[n]).all() for g in gots.values()), case
  n = CASES.index("decay -inf")
  cut = np.isneginf(np.asarray(make("decay -inf")["log_decay"]))
  assert not gots["log_decay"][n][cut].any()


@pytest.mark.parametrize("length, values", ((0, V), (1, V), (C, V), (C + 1, 1)))
def test_lengths_and_no_flags(length, values):
  c = make("plain", length, values)
  none = dict(reset=None, mask=None, fresh=None)
  both = jax.jit(lambda c: [call(f, c, **none) for f in ("scan", "chunk")])(c)
  for out in both:
    assert checks.relative(out, oracle(c)) <= checks.FORWARD


@pytest.mark.nans
def test_infinity_in_a_dead_segment():
  c = make("plain")
  c["reset"] = c["reset"].at[jnp.array([12, 35])].set(True)
  c["v"] = c["v"].at[9].set(jnp.inf)
  c["k"] = c["k"].at[30].set(jnp.nan)

  def loss(floats):
    state, out = call("chunk", {**c, **floats})
    return checks.wave(state, out[35:]), (state, out)

  floats = {k: c[k] for k in FLOATS}
  grads, (state, out) = jax.jit(jax.grad(loss, has_aux=True))(floats)
  assert np.isfinite(state).all() and np.isfinite(out[35:]).all()
  assert np.isfinite(out[12:30]).all()
  assert not np.isfinite(out[9:12]).any() and not np.isfinite(out[30:35]).any()
  for key in ("q", "k", "v", "log_decay"):
    assert np.isfinite(grads[key][35:]).all(), key
    assert not np.any(np.nan_to_num(grads[key][:35])), key


def test_chunks_are_serial_steps():
  c = make("plain", 4 * C)
  fn = jax.jit(lambda c: call("chunk", c)).lower(c).compile()
  assert checks.trip_counts(fn) == [4]


def test_many_rows_inside_a_loop_over_layers():
  """The size at which a sum in place of a product met a fault of the CPU
  compiler of jaxlib 0.10.2 (jax-ml/jax#39257)."""
  r = np.random.default_rng(0)
  x = jnp.asarray(r.normal(size=(64, 24, 32)), jnp.float32)
  weights = jnp.asarray(0.1 * r.normal(size=(2, 32, 96)), jnp.float32)

  def layers(form):
    def row(x, w):
      q, k, v, g = jnp.split(x @ w, [32, 64, 80], axis=-1)
      y = value_decay(
        jnp.zeros((32, 16)), q, k, v, log_decay=jax.nn.log_sigmoid(g) / 8,
        implementation=form,
      )[1]  # fmt: skip
      return jnp.concatenate([y, y], axis=-1)

    layer = lambda x, w: (x + jax.vmap(row, (0, None))(x, w), None)
    return jax.jit(lambda: jax.lax.scan(layer, x, weights)[0])()

  assert checks.relative(layers("chunk"), layers("scan")) <= checks.FORWARD


def test_bad_arguments():
  c = make("plain")
  with pytest.raises(ValueError, match=r"log_decay must be floating \[37, 3\]"):
    call("scan", {**c, "log_decay": jnp.zeros((T, K))})
  with pytest.raises(ValueError, match="memzoo.ops.batched"):
    call("scan", {**c, "q": jnp.zeros((1, T, 2, K))})
