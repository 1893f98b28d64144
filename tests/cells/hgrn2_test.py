"""HGRN2 against Qin et al. 2024 (arXiv:2404.07904), section 3."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def lower_bound(cell, params):
  """Row l of cumsum(softmax(Γ)) − softmax(Γ)_0, over the layers."""
  if cell.layer_index == 0:
    return 0.0
  share = np.exp(np.asarray(params["bounds"], np.float64))
  share = share / share.sum(0)
  return (np.cumsum(share, 0) - share[0])[cell.layer_index]


def paper(cell, params, xs):
  """h = Diag(f) h + (1 − f) ⊗ i, y = hᵀ o, one token and head at a time."""
  bound = lower_bound(cell, params)
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  heads, k = cell.num_heads, cell.head_dim
  state = np.zeros((heads, k, k))
  ys = []
  for x in np.asarray(xs, np.float64):
    o, f, i = np.split(x @ p["ofi"], 3)
    o, f = o * sigmoid(o), bound + (1 - bound) * sigmoid(f)
    y = []
    for n in range(heads):
      part = slice(n * k, (n + 1) * k)
      state[n] = np.diag(f[part]) @ state[n] + np.outer(1 - f[part], i[part])
      y.append(state[n].T @ o[part])
    y = np.concatenate(y)
    y = y / np.sqrt(np.mean(y**2) + 1e-5) * p["norm"]
    ys.append(y @ p["out"])
  return state, np.stack(ys)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_paper_equation(layer):
  cell = memzoo.tiny("hgrn2", layer_index=layer)
  params, xs = checks.drawn(cell), checks.inputs(cell, 9, 3.0)
  assert ("bounds" in params) == (layer > 0)
  h, want = paper(cell, params, xs)
  for form, state, ys in checks.forms(cell, params, xs):
    assert checks.relative((state.h, ys), (h, want)) < checks.FORWARD, form


def test_lower_bounds_rise_with_the_layer():
  """At the start layer l of L forgets to l / L and no further."""
  xs = jnp.full((1, 9), -1.0)
  for layer in range(4):
    cell = memzoo.make(
      "hgrn2", d_model=9, head_dim=5, layer_index=layer, num_layers=4
    )
    params = jax.jit(cell.init)(jax.random.key(0))
    state = jax.tree.map(jnp.ones_like, cell.initial_state(params))
    width = 5
    shut = np.array(params["ofi"])
    shut[:, width : 2 * width] = 1e3
    shut[:, 2 * width :] = 0
    run = jax.jit(lambda p, s, cell=cell: memzoo.scan(cell, p, s, xs)[0])
    after = run({**params, "ofi": shut}, state)
    np.testing.assert_allclose(after.h, layer / 4 * state.h, rtol=1e-6)


def test_signature_behaviour():
  """The write is tied to the forget gate: a channel that keeps all it holds
  takes nothing, one that forgets all takes the input itself, and the state
  is a mean of inputs, never beyond them; and a layer learns to recall a
  key's latest value among twelve (a fixed decay's share is in gla_test)."""
  cell = memzoo.make("hgrn2", d_model=9, head_dim=5)
  params = jax.jit(cell.init)(jax.random.key(0))
  xs = np.abs(checks.inputs(cell, 30))
  run = jax.jit(lambda p, s, x: memzoo.scan(cell, p, s, x)[0])
  state = run(params, cell.initial_state(params), xs)
  h, taken = np.asarray(state.h[0]), xs @ np.asarray(params["ofi"])[:, 10:]
  low, high = np.minimum(taken.min(0), 0), np.maximum(taken.max(0), 0)
  assert np.all((h >= low - 1e-6) & (h <= high + 1e-6))
  gates, pinned = [1e4, -1e4, 1e4, -1e4, -1e4], np.array(params["ofi"])
  pinned[:, 5:10] = gates
  after = run({**params, "ofi": pinned}, state, xs[:1])
  for n, gate in enumerate(gates):
    want = h[n] if gate > 0 else taken[0]
    np.testing.assert_allclose(after.h[0, n], want, rtol=1e-5)

  draw = functools.partial(checks.pairs, count=12, keys=3, rewrite=True)
  cell = memzoo.make("hgrn2", d_model=8, num_heads=2, head_dim=8)
  _, accuracy = checks.learn(cell, draw, 200, rate=2e-2)
  assert accuracy > 0.95, accuracy


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(layer_index=2, num_layers=2), "num_layers − 1 = 1, got 2"),
    (dict(head_dim=0), "head_dim must be a positive integer, got 0"),
  ],
)
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("hgrn2", d_model=8, **options)
