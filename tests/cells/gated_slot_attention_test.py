"""Gated slot attention against Zhang et al. 2024 (arXiv:2409.07146), section
3."""

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
  """The recurrent form with slots as rows, K̃ [M, K] and Ṽ [M, V]."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, k, m = cell.num_heads, cell.head_dim, cell.num_slots
  v = cell.value_dim
  keys, values = np.zeros((h, m, k)), np.zeros((h, m, v))
  ys = []
  for x in np.asarray(xs, np.float64):
    z = x @ p["qkv"]
    z = z * sigmoid(z)
    alphas = sigmoid(x @ p["slots"]) ** (1 / cell.gate_divisor)
    out = []
    for n in range(h):
      q, key = z[n * k : (n + 1) * k], z[(h + n) * k : (h + n + 1) * k]
      value = z[2 * h * k + n * v : 2 * h * k + (n + 1) * v]
      alpha = alphas[n * m : (n + 1) * m]
      keys[n] = np.diag(alpha) @ keys[n] + np.outer(1 - alpha, key)
      values[n] = np.diag(alpha) @ values[n] + np.outer(1 - alpha, value)
      scores = np.exp(keys[n] @ q)
      out.append(values[n].T @ (scores / scores.sum()))
    o = np.concatenate(out)
    o = o * sigmoid(o)
    o = o / np.sqrt(np.mean(o**2) + 1e-5) * p["norm"]
    ys.append(o @ p["out"])
  return (np.swapaxes(keys, 1, 2), values), np.stack(ys)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(cell, params, xs, form=None):
  return memzoo.scan(cell, params, None, xs, implementation=form)


def test_paper_equation():
  cell = memzoo.tiny("gated_slot_attention")
  params = jax.tree.map(lambda x: 1.5 * x, cell.init(jax.random.key(0)))
  params["norm"] += 0.1 * jnp.arange(6.0)
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  want = paper(cell, params, xs)
  for form in ("step", "chunk"):
    state, ys = run(cell, params, xs, form)
    error = checks.relative((tuple(state), ys), want)
    assert error <= checks.FORWARD, (form, error)


def test_signature_behaviour():
  """A slot is a mixture of what was seen: its weights are not negative and sum
  to 1 less what is left of the empty start, so that it never leaves the hull
  of the values and zero; and it learns to recall."""
  cell = memzoo.tiny("gated_slot_attention", gate_divisor=1.0)
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (20, cell.d_model))
  state, _ = run(cell, params, xs)
  h, k, v, m = cell.num_heads, cell.head_dim, cell.value_dim, cell.num_slots
  alpha = sigmoid(np.asarray(xs @ params["slots"], np.float64))
  alpha = alpha.reshape(20, h, m)
  left = np.cumprod(alpha[::-1], axis=0)[::-1]  # from token i to the end
  weights = np.concatenate([left[1:], np.ones((1, h, m))]) * (1 - alpha)
  assert (weights > 0).all()
  np.testing.assert_allclose(weights.sum(0), 1 - left[0], rtol=1e-6)
  seen = np.asarray(jax.nn.silu(xs @ params["qkv"]), np.float64)
  seen = seen[:, 2 * h * k :].reshape(20, h, v)
  mixed = np.einsum("thm,thv->hmv", weights, seen)
  np.testing.assert_allclose(state.values, mixed, atol=1e-6)
  low, high = np.minimum(seen.min(0), 0), np.maximum(seen.max(0), 0)
  slots = np.asarray(state.values)
  assert (slots > low[:, None] - 1e-6).all()
  assert (slots < high[:, None] + 1e-6).all()

  cell = memzoo.make(
    "gated_slot_attention", d_model=8, num_heads=2, head_dim=8, num_slots=8
  )
  draw = lambda key: checks.pairs(key, count=3, keys=3)
  _, accuracy = checks.learn(cell, draw, 300)
  assert accuracy > 0.95, accuracy


def test_gate_that_is_open_keeps_its_slot():
  """α = 1 writes nothing, and α = 0 replaces the slot by the token."""
  cell = memzoo.tiny("gated_slot_attention")
  params = cell.init(jax.random.key(0))
  m = cell.num_slots
  logits = jnp.where(jnp.arange(2 * m) % 2 == 0, 1e3, -1e3)
  params["slots"] = jnp.zeros_like(params["slots"]).at[0].set(logits)
  xs = jax.random.normal(jax.random.key(1), (5, cell.d_model))
  xs = xs.at[:, 0].set(1.0)
  for form in ("step", "chunk"):
    state, _ = run(cell, params, xs, form)
    open_ = np.arange(2 * m).reshape(2, m) % 2 == 0
    values = np.asarray(state.values)
    assert not values[open_].any()
    last = jax.nn.silu(xs[-1] @ params["qkv"])[2 * 2 * cell.head_dim :]
    last = np.asarray(last).reshape(2, 1, -1).repeat(m, axis=1)
    np.testing.assert_allclose(values[~open_], last[~open_], rtol=1e-5)


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(num_slots=0), "num_slots must be a positive integer"),
    (dict(expand_v=0.3), "must be a positive integer"),
    (dict(gate_divisor=0.0), "gate_divisor must be above 0, got 0.0"),
  ),
)
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("gated_slot_attention", d_model=8, **options)
