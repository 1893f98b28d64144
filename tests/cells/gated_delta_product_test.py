"""Gated DeltaProduct against Siems et al. 2025 (arXiv:2502.10297), section 3."""

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
  """H_i = A(x_i) H_{i−1} + B(x_i), where A is g_i times the product of the
  generalised Householder matrices, the last one on the left, and each value is
  carried through those after its own; one token at a time, in the layer of the
  authors' code."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, k, steps = cell.num_heads, cell.head_dim, cell.num_householder
  v = p["norm"].shape[0]
  window = np.zeros(p["conv"].shape)
  state = np.zeros((h, k, v))
  ys = []
  for x in np.asarray(xs, np.float64):
    window = np.concatenate([window[1:], [x @ p["qkv"]]])
    z = np.sum(window * p["conv"], axis=0)
    z = z * sigmoid(z)
    q = z[: h * k].reshape(h, k)
    keys = z[h * k : (1 + steps) * h * k].reshape(steps, h, k)
    values = z[(1 + steps) * h * k :].reshape(steps, h, v)
    beta = sigmoid(x @ p["beta"]).reshape(steps, h)
    beta = beta * (2 if cell.allow_neg_eigval else 1)
    g = np.ones(h)
    if cell.forget_gate:
      softplus = np.log1p(np.exp(x @ p["decay"] + p["dt"]))
      g = np.exp(-np.exp(p["a_log"]) * softplus)
    gate = (x @ p["gate"]).reshape(h, v)
    y = []
    for n in range(h):
      ks = [key / np.sqrt(np.sum(key**2) + 1e-6) for key in keys[:, n]]
      factors = [
        np.eye(k) - b * np.outer(key, key) for b, key in zip(beta[:, n], ks)
      ]
      a, b = g[n] * np.eye(k), np.zeros((k, v))
      for j in range(steps):
        a = factors[j] @ a
        write = beta[j, n] * np.outer(ks[j], values[j, n])
        for later in factors[j + 1 :]:
          write = later @ write
        b = b + write
      state[n] = a @ state[n] + b
      ask = q[n] / np.sqrt(np.sum(q[n] ** 2) + 1e-6) / np.sqrt(k)
      o = state[n].T @ ask
      o = o / np.sqrt(np.mean(o**2) + 1e-5) * p["norm"]
      y.append(o * gate[n] * sigmoid(gate[n]))
    ys.append(np.concatenate(y) @ p["out"])
  return state, np.stack(ys)


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(num_householder=3, forget_gate=False, allow_neg_eigval=False),
  ],
)
def test_paper_equation(options):
  cell = memzoo.tiny("gated_delta_product", **options)
  params = cell.init(jax.random.key(0))
  params["norm"] += 0.3 * jnp.arange(3.0)
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  s, want = paper(cell, params, xs)
  state, ys = memzoo.scan(cell, params, None, xs, implementation="step")
  assert checks.relative(ys, want) < checks.FORWARD
  assert checks.relative(state.s, s) < checks.FORWARD


def transition(keys):
  """What one token with the given keys, β 2 and values 0 does to a state."""
  n = len(keys)
  cell = memzoo.make(
    "gated_delta_product", d_model=2, head_dim=2, num_householder=n,
    conv_size=1, forget_gate=False,
  )  # fmt: skip
  params = cell.init(jax.random.key(0))
  # Positive after SiLU, as the unit vectors are; β = 2 σ(40).
  logits = jnp.concatenate([jnp.zeros(2), *keys, jnp.zeros(2 * n)])
  params["qkv"] = jnp.stack([logits, jnp.zeros_like(logits)])
  params["conv"] = jnp.ones_like(params["conv"])
  params["beta"] = jnp.full_like(params["beta"], 40.0)
  state = cell.initial_state(params)._replace(s=jnp.eye(2)[None])
  step = jax.jit(cell.step)
  return step(params, state, jnp.asarray([1.0, 0.0]))[0].s[0]


def test_two_reflections_are_a_rotation():
  """Of twice the angle between the keys, exactly; one reflection is none."""
  # SiLU(10) and SiLU(5) in the ratio that makes 30 degrees with the first axis.
  silu = jax.nn.silu
  first, second = jnp.asarray([8.0, 0.0]), jnp.asarray([8.0, 5.0])
  angle = np.arctan2(silu(5.0), silu(8.0))
  both = transition([first, second])
  turn = 2 * angle
  want = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
  np.testing.assert_allclose(both, want, atol=1e-6)
  assert abs(np.linalg.det(both) - 1) < 1e-6
  assert abs(np.linalg.det(transition([second])) + 1) < 1e-6


def sum_mod_3(key, length=6):
  """Digits 0 … 2, and after each their sum modulo 3: input [one-hot digit, 1,
  first, 0 …]."""
  digits = jax.random.randint(key, (length,), 0, 3)
  xs = jnp.zeros((length, 8)).at[:, :3].set(jax.nn.one_hot(digits, 3))
  xs = xs.at[:, 3].set(1.0).at[0, 4].set(1.0)
  return xs, jnp.cumsum(digits) % 3, jnp.ones(length)


def test_signature_behaviour():
  """A cycle of three is a rotation: with two Householder steps a token a layer
  learns to add modulo 3, with one, whose eigenvalues are real, it does not."""
  make = functools.partial(
    memzoo.make, "gated_delta_product", d_model=8, num_heads=4, head_dim=4,
    conv_size=1, forget_gate=False,
  )  # fmt: skip
  _, two = checks.learn(make(), sum_mod_3, 300, rate=2e-2)
  _, one = checks.learn(make(num_householder=1), sum_mod_3, 300, rate=2e-2)
  assert two > 0.98, two
  assert one < 0.85, one


def test_options_are_checked():
  for options, message in (
    (dict(num_householder=0), "num_householder must be a positive integer"),
    (dict(head_dim=4, expand_v=0.3), "expand_v=0.3 times head_dim=4"),
  ):
    with pytest.raises(ValueError, match=message):
      memzoo.make("gated_delta_product", d_model=6, **options)
