"""GLA against Yang et al. 2023 (arXiv:2312.06635), eq. 3 and section 4.4."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def paper(cell, params, xs):
  """Section 4.4, one token and one head at a time."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, k, width = cell.num_heads, cell.head_dim, p["norm"].shape[0]
  s = np.zeros((h, k, width))
  ys = []
  for x in np.asarray(xs, np.float64):
    qkv = x @ p["qkv"]
    gate = sigmoid(x @ p["decay_in"] @ p["decay_out"] + p["decay_bias"])
    alpha = gate ** (1 / cell.tau)
    r = x @ p["gate"] + p["gate_bias"]
    r = r * sigmoid(r)
    out = []
    for n in range(h):
      q = qkv[n * k : (n + 1) * k]
      key = qkv[(h + n) * k : (h + n + 1) * k]
      v = qkv[2 * h * k :][n * width : (n + 1) * width]
      a = alpha[n * k : (n + 1) * k]
      s[n] = np.outer(a, np.ones(width)) * s[n] + np.outer(key, v)
      o = q @ s[n] / np.sqrt(k)
      out.append(o / np.sqrt(np.mean(o**2) + 1e-5) * p["norm"])
    ys.append((r * np.concatenate(out)) @ p["out"])
  return s, np.stack(ys)


@pytest.mark.parametrize("tau", [16.0, 1.0])
def test_paper_equation(tau):
  cell = memzoo.tiny("gla", tau=tau)
  params, xs = checks.drawn(cell), checks.inputs(cell, 9, 2.0)
  s, want = paper(cell, params, xs)
  for form, state, ys in checks.forms(cell, params, xs):
    assert checks.relative((state.s, ys), (s, want)) < checks.FORWARD, form


def test_signature_behaviour():
  """A token clears one key channel and leaves the others; with biases alone a
  channel keeps σ(b)^(1/τ) a step; and a layer learns to clear what a key
  held, and so to recall the latest value, where retention's fixed decay
  cannot."""
  cell = memzoo.make("gla", d_model=9, num_heads=1, head_dim=5)
  params = jax.jit(cell.init)(jax.random.key(0))
  run = jax.jit(lambda p, s, x: memzoo.scan(cell, p, s, x)[0])
  empty = cell.initial_state(params)
  state = run(params, empty, checks.inputs(cell, 7))
  bias = jnp.asarray([-2.0, 0.0, 1.0, 30.0, 3.0])
  later = run({**params, "decay_bias": bias}, state, jnp.zeros((8, 9)))
  np.testing.assert_allclose(
    later.s[0], np.sqrt(sigmoid(np.asarray(bias)))[:, None] * state.s[0],
    rtol=1e-5,
  )  # fmt: skip
  # Only the first input's first feature opens the gate, of channel 2 alone.
  clear = {
    **params,
    "decay_in": jnp.zeros((9, 16)).at[0, 0].set(1.0),
    "decay_out": jnp.zeros((16, 5)).at[0, 2].set(-1e5),
    "decay_bias": jnp.full((5,), 1e3),
  }
  one = jax.nn.one_hot(jnp.zeros(1, jnp.int32), 9)
  after, wrote = run(clear, state, one), run(clear, empty, one)
  want = np.asarray(state.s[0]).copy()
  want[2] = 0
  np.testing.assert_allclose(after.s[0], want + wrote.s[0], rtol=1e-5)

  draw = functools.partial(checks.pairs, count=12, keys=3, rewrite=True)
  accuracy = {}
  for name in ("gla", "retnet"):
    cell = memzoo.make(name, d_model=8, num_heads=2, head_dim=8)
    _, accuracy[name] = checks.learn(cell, draw, 200, rate=2e-2)
  assert accuracy["gla"] > 0.95, accuracy
  assert accuracy["gla"] > accuracy["retnet"] + 0.15, accuracy


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(expand_v=0.3), "expand_v=0.3 times head_dim=32 must be a positive"),
    (dict(tau=0.0), "tau must be above 0, got 0.0"),
    (dict(gate_rank=0), "gate_rank must be a positive integer, got 0"),
  ],
)
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("gla", d_model=8, **options)
