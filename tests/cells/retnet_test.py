"""RetNet against Sun et al. 2023 (arXiv:2307.08621), eq. 5, 6 and 8."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def angles(width):
  """The authors' θ: 10000^−i, i evenly spaced from 0 to 1."""
  return 10000.0 ** -np.linspace(0, 1, width // 2)


def paper(cell, params, xs):
  """Section 2.2, with retention by its parallel form (5), all pairs of
  positions; pairs of channels are complex numbers."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  xs = np.asarray(xs, np.float64)
  h, k, length = cell.num_heads, cell.head_dim, len(xs)
  n = np.arange(length)
  theta = np.exp(1j * n[:, None] * angles(k))
  gates = xs @ p["gate"]
  states, ys = [], []
  for i in range(h):
    q = (xs @ p["qk"])[:, i * k : (i + 1) * k]
    key = (xs @ p["qk"])[:, (h + i) * k : (h + i + 1) * k]
    v = np.split(xs @ p["v"], h, axis=1)[i]
    q = (q[:, : k // 2] + 1j * q[:, k // 2 :]) * theta
    key = (key[:, : k // 2] + 1j * key[:, k // 2 :]) * theta
    gamma = 1 - 2.0 ** (-5 - i)
    decay = np.tril(gamma ** (n[:, None] - n[None]))
    o = ((q @ key.conj().T).real * decay) @ v / np.sqrt(k)
    states.append((decay[-1][:, None] * key).T @ v / np.sqrt(k))
    mean, var = o.mean(1, keepdims=True), o.var(1, keepdims=True)
    o = (o - mean) / np.sqrt(var + 1e-5)
    gate = np.split(gates, h, axis=1)[i]
    ys.append(o * gate / (1 + np.exp(-gate)))
  s = np.stack(states)
  return np.concatenate([s.real, s.imag], 1), np.concatenate(ys, 1) @ p["out"]


def inputs(cell, length, scale=1.0):
  r = np.random.default_rng(1)
  return np.asarray(scale * r.normal(size=(length, cell.d_model)), np.float32)


def forms(cell, params, xs):
  """(form, state, ys) of every form but the kernel's, in one compilation."""
  names = ("step", "scan", "chunk")
  run = lambda f: memzoo.scan(cell, params, None, xs, implementation=f)
  out = jax.jit(lambda: [run(f) for f in names])()
  return [(f, *o) for f, o in zip(names, out)]


def test_paper_equation():
  cell = memzoo.tiny("retnet", num_heads=3, head_dim=6, expand_v=0.5)
  params = jax.jit(cell.init)(jax.random.key(0))
  xs = inputs(cell, 11, 3.0)
  s, want = paper(cell, params, xs)
  for form, state, ys in forms(cell, params, xs):
    assert checks.relative((state.s, ys), (s, want)) < checks.FORWARD, form
    assert state.count == 11


def test_signature_behaviour():
  """Every head forgets at its own rate, 1 − 2^(−5−h) a step; what is read
  depends on how far apart two tokens are, not on where; and a layer learns to
  recall pairs."""
  cell = memzoo.make("retnet", d_model=9, num_heads=3, head_dim=8)
  params = jax.jit(cell.init)(jax.random.key(0))
  run = jax.jit(lambda s, x: memzoo.scan(cell, params, s, x))
  xs, empty = inputs(cell, 7), cell.initial_state(params)
  state, ys = run(empty, xs)
  later, _ = run(state, jnp.zeros((10, 9)))
  for h, (before, after) in enumerate(zip(state.s, later.s)):
    rate = (1 - 2.0 ** (-5 - h)) ** 10
    np.testing.assert_allclose(after, rate * before, rtol=1e-5)
  _, ys_moved = run(empty._replace(count=jnp.int32(500)), xs)
  assert checks.relative(ys_moved, ys) < 1e-3  # angles of 500 in float32

  _, accuracy = checks.learn(cell, checks.pairs, 150, rate=2e-2)
  assert accuracy > 0.95, accuracy


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(head_dim=3), "head_dim must be even, got 3"),
    (dict(expand_v=0.3), "expand_v must be such that it times head_dim=32"),
    (dict(rotary_base=0.0), "rotary_base must be above 0, got 0.0"),
    (dict(num_heads=0), "num_heads must be a positive integer, got 0"),
  ],
)
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("retnet", d_model=8, **options)
