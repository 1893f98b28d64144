"""MesaNet against von Oswald et al. 2025 (arXiv:2506.05233): what it reads is
the ridge regression over all tokens so far."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.ops.mesa import empty, mesa


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def unit(x):
  return x / np.sqrt(np.sum(x**2) + 1e-6)


def paper(cell, params, xs):
  """G_t (H_t + Λ)⁻¹ q_t by an exact solve, G [V, K]."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, k, v = cell.num_heads, cell.head_dim, cell.value_dim
  ridge = cell.ridge_bound + np.log1p(np.exp(p["ridge"]))
  recent = [np.zeros(2 * h * k)] * (cell.conv_size - 1)
  big_h, big_g = np.zeros((h, k, k)), np.zeros((h, v, k))
  ys = []
  for x in np.asarray(xs, np.float64):
    z = x @ p["qkv"]
    recent = [*recent, z[: 2 * h * k]]
    qk = silu(sum(w * r for w, r in zip(p["conv"], recent)))
    recent = recent[1:]
    gamma, beta = np.split(sigmoid(x @ p["ab"] + p["ab_bias"]), 2)
    out = []
    for n in range(h):
      q = unit(qk[n * k : (n + 1) * k])
      key = unit(qk[(h + n) * k : (h + n + 1) * k])
      value = z[2 * h * k + n * v : 2 * h * k + (n + 1) * v]
      big_g[n] = gamma[n] * big_g[n] + beta[n] * np.outer(value, key)
      big_h[n] = gamma[n] * big_h[n] + beta[n] * np.outer(key, key)
      o = big_g[n] @ np.linalg.solve(big_h[n] + np.diag(ridge[n]), q)
      out.append(o / np.sqrt(np.mean(o**2) + 1e-5) * p["norm"])
    y = np.concatenate(out)
    if cell.output_gate:
      y = y * silu(x @ p["gate"])
    ys.append(y @ p["out"])
  return (big_h, np.swapaxes(big_g, 1, 2)), np.stack(ys)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(cell, params, xs, form=None):
  return memzoo.scan(cell, params, None, xs, implementation=form)


@pytest.mark.parametrize("gate", (False, True))
def test_paper_equation(gate):
  cell = memzoo.tiny("mesa_net", output_gate=gate)
  params = cell.init(jax.random.key(0))
  noise = jax.random.normal(jax.random.key(2), (2, 4))
  params["ridge"] += 0.3 * noise
  params["ab_bias"] += noise[0]
  params["norm"] += 0.3 * jnp.arange(3.0)
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  want = paper(cell, params, xs)
  for form in ("step", "chunk"):
    state, ys = run(cell, params, xs, form)
    error = checks.relative((tuple(state.memory), ys), want)
    assert error <= checks.FORWARD, (form, error)


def test_signature_behaviour():
  """The read is the prediction of the ridge regression from all keys to all
  values, once the solver has run K steps: at every token, with the weights that
  decay and β give. Linear attention's sum is not. And it learns to recall."""
  r = np.random.default_rng(0)
  length, width, values = 12, 4, 3
  ks, vs = r.normal(size=(length, width)), r.normal(size=(length, values))
  qs, beta = r.normal(size=(length, width)), r.uniform(0.2, 1, length)
  log_decay, ridge = -r.uniform(0, 0.3, length), r.uniform(0.25, 1, width)
  single = lambda x: jnp.asarray(x, jnp.float32)
  read = jax.jit(mesa, static_argnames="solver_steps")
  _, out = read(
    empty(width, values), *map(single, (qs, ks, vs)), beta=single(beta),
    ridge=single(ridge), log_decay=single(log_decay), solver_steps=width,
  )  # fmt: skip
  for t in range(length):
    # Least squares on stacked rows: √ζ k -> √ζ v, and √λ e_j -> 0.
    zeta = [
      beta[i] * np.exp(log_decay[i + 1 : t + 1].sum()) for i in range(t + 1)
    ]
    root = np.sqrt(zeta)[:, None]
    rows = np.concatenate([root * ks[: t + 1], np.diag(np.sqrt(ridge))])
    right = np.concatenate([root * vs[: t + 1], np.zeros((width, values))])
    fit = np.linalg.lstsq(rows, right, rcond=None)[0]
    np.testing.assert_allclose(out[t], qs[t] @ fit, rtol=2e-4, atol=2e-5)

  # Keys that are alike: the regression tells them apart, the sum does not.
  keys = np.eye(3) + 1.0
  keys /= np.linalg.norm(keys, axis=1, keepdims=True)
  again = single(np.tile(keys, (40, 1)))
  values = single(np.tile(np.eye(3), (40, 1)))
  options = dict(beta=jnp.ones(120), ridge=jnp.full(3, 0.01), solver_steps=9)
  _, out = read(empty(3, 3), again, again, values, **options)
  np.testing.assert_allclose(out[-3:], np.eye(3), atol=0.02)
  summed = keys @ (keys.T @ np.eye(3))
  assert np.abs(summed / summed.max() - np.eye(3)).max() > 0.8

  cell = memzoo.make(
    "mesa_net", d_model=8, num_heads=2, head_dim=8, solver_steps=8
  )
  draw = lambda key: checks.pairs(key, count=3, keys=3)
  _, accuracy = checks.learn(cell, draw, 200)
  assert accuracy > 0.95, accuracy


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(solver_steps=0), "solver_steps must be a positive integer"),
    (dict(ridge_bound=0.0), "ridge_bound must be between 0 and 1.0, got 0.0"),
    (dict(expand_v=0.3), "must be a positive integer"),
  ),
)
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("mesa_net", d_model=8, **options)
