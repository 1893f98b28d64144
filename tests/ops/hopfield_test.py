"""`hopfield` and its separations: retrieval, energy, the store."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.core.store import write_all
from memzoo.ops import hopfield, separation as separations
from memzoo.ops.hopfield import HopfieldStore, energy

NAMES = ("softmax", "softmax1", "sparsemax", "entmax15")


# One compilation serves all separations.
SEPARATE = jax.jit(
  lambda z, mask=None: {n: separations.separate(n, z, mask) for n in NAMES}
)
ENERGY = jax.jit(
  lambda x, xi, beta, mask=None: {
    n: energy(x, xi, beta, separation=n, mask=mask) for n in NAMES
  }
)


DERIVATIVES = jax.jit(
  lambda z: {
    n: (jax.jacobian(separations.get(n))(z), jax.jacfwd(separations.get(n))(z))
    for n in NAMES
  }
)
CONJUGATE = jax.jit(
  lambda z: {
    n: jax.vmap(
      jax.value_and_grad(functools.partial(separations.conjugate, n))
    )(z)
    for n in NAMES
  }
)
MASKED_GRADIENT = jax.jit(
  lambda z, mask: {
    n: jax.grad(lambda z, n=n: checks.wave(separations.separate(n, z, mask)))(z)
    for n in NAMES
  }
)


@functools.partial(jax.jit, static_argnames="steps")
def retrieve(x, q, values=None, mask=None, *, beta, steps=1):
  return {
    n: hopfield(
      x, q, values=values, mask=mask, beta=beta, steps=steps, separation=n
    )
    for n in NAMES
  }


def oracle_separation(name, z):
  """softmax; softmax over [z, 0] without the last (Hu et al. 2024); and
  [(α − 1) z − τ]₊^(1/(α−1)), α = 2 and 1.5, with τ by bisection until the sum
  is one (Peters et al. 2019, eq. 7)."""
  z = np.asarray(z, np.float64)
  if name in ("softmax", "softmax1"):
    full = np.append(z, 0.0) if name == "softmax1" else z
    e = np.exp(full - full.max())
    return (e / e.sum())[: len(z)]
  alpha = 2.0 if name == "sparsemax" else 1.5
  x = (alpha - 1) * z
  low, high = x.max() - 1, x.max()
  for _ in range(200):
    tau = (low + high) / 2
    p = np.maximum(x - tau, 0) ** (1 / (alpha - 1))
    low, high = (tau, high) if p.sum() > 1 else (low, tau)
  return p


def oracle_conjugate(name, z):
  """max over p of p·z + H(p): log-sum-exp, or with the Tsallis entropy
  (Σ p − p^α) / (α (α − 1)) (Peters et al. 2019, eq. 5)."""
  z = np.asarray(z, np.float64)
  if name in ("softmax", "softmax1"):
    full = np.append(z, 0.0) if name == "softmax1" else z
    return full.max() + np.log(np.exp(full - full.max()).sum())
  alpha = 2.0 if name == "sparsemax" else 1.5
  p = oracle_separation(name, z)
  return p @ z + (p - p**alpha).sum() / (alpha * (alpha - 1))


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def signs(seed, *shape):
  return np.where(draw(seed, *shape) > 0, 1, -1).astype(np.float32)


def scores(kind, rows=20, size=9):
  r = np.random.default_rng(3)
  z = r.normal(size=(rows, size)).astype(np.float32)
  if kind == "equal":
    z[:] = 0.7
  if kind == "far":
    z *= 50
  if kind == "shifted":
    z += 300
  if kind == "ties":
    z = np.round(z * 2) / 4
  return z


@pytest.mark.parametrize("name", NAMES)
def test_separation_equals_the_oracle(name):
  for kind in ("plain", "equal", "far", "shifted", "ties"):
    z = scores(kind)
    want = np.stack([oracle_separation(name, row) for row in z])
    got = SEPARATE(z)[name]
    np.testing.assert_allclose(got, want, atol=1e-6, err_msg=kind)
    if name != "softmax1":
      np.testing.assert_allclose(np.sum(got, axis=1), 1, atol=2e-6)
  wide = np.random.default_rng(0).normal(size=(1, 20000)).astype(np.float32)
  assert (
    checks.relative(SEPARATE(wide)[name][0], oracle_separation(name, wide[0]))
    < 1e-5
  )


@pytest.mark.parametrize("name", NAMES)
def test_separation_derivatives(name):
  """Against finite differences of the oracle, and both modes."""
  z = scores("plain")[0].astype(np.float64)
  step = 1e-6
  want = np.stack(
    [
      (oracle_separation(name, z + d) - oracle_separation(name, z - d))
      / (2 * step)
      for d in step * np.eye(len(z))
    ],
    axis=1,
  )
  for jacobian in DERIVATIVES(z.astype(np.float32))[name]:
    np.testing.assert_allclose(jacobian, want, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_separation_is_the_gradient_of_its_conjugate(name):
  z = scores("plain")
  value, grad = CONJUGATE(z)[name]
  np.testing.assert_allclose(
    value, [oracle_conjugate(name, row) for row in z], rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(grad, SEPARATE(z)[name], atol=2e-6)
  top = z.max(axis=1) if name != "softmax1" else np.maximum(z.max(axis=1), 0)
  over = np.asarray(value) - top
  assert (over >= -1e-6).all()
  assert (over <= separations.largest_entropy(name, z.shape[1]) + 1e-6).all()
  equal = CONJUGATE(np.zeros_like(z))[name][0]
  np.testing.assert_allclose(
    equal[0], separations.largest_entropy(name, z.shape[1]), rtol=1e-5
  )


@pytest.mark.parametrize("name", NAMES)
def test_separation_mask(name):
  z = np.float32(0.3) * scores("plain")
  mask = np.ones(z.shape, bool)
  mask[0, 2:5] = mask[1] = False
  p = SEPARATE(z, mask)[name]
  kept = mask[0]
  np.testing.assert_allclose(
    p[0][kept], oracle_separation(name, z[0][kept]), atol=1e-6
  )
  assert not p[0][~kept].any() and not p[1].any()
  grads = MASKED_GRADIENT(z, mask)[name]
  assert np.isfinite(grads).all() and not grads[1].any()
  assert not grads[0][~kept].any() and grads[0][kept].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 3])
def test_paper_equation(name, steps):
  """Ramsauer et al. 2020 eq. 3, iterated; the last step reads the values."""
  r = np.random.default_rng(1)
  x, q, v = (r.normal(size=s) for s in ((5, 4), (3, 4), (5, 2)))
  beta = 1.7
  for values in (None, v):
    want = []
    for xi in q:
      for _ in range(steps - 1):
        xi = x.T @ oracle_separation(name, beta * x @ xi)
      last = x if values is None else values
      want.append(last.T @ oracle_separation(name, beta * x @ xi))
    half = [None if a is None else a.astype(np.float32) for a in (x, q, values)]
    got = retrieve(*half, beta=beta, steps=steps)[name]
    assert checks.relative(got, np.stack(want)) < checks.FORWARD


@pytest.mark.parametrize("name", NAMES)
def test_energy(name):
  """Ramsauer et al. 2020 eq. 2: −lse + ½ ξᵀξ + β⁻¹ ln N + ½ M²."""
  r = np.random.default_rng(2)
  x, xi, beta = r.normal(size=(6, 4)), r.normal(size=4), 0.8
  count = len(x)
  constant = {
    "softmax": np.log(count),
    "softmax1": np.log(count + 1),
    "sparsemax": (1 - 1 / count) / 2,
    "entmax15": 4 / 3 * (1 - 1 / np.sqrt(count)),
  }[name]
  want = (
    -oracle_conjugate(name, beta * x @ xi) / beta + xi @ xi / 2
    + constant / beta + (x**2).sum(1).max() / 2
  )  # fmt: skip
  x, xi = x.astype(np.float32), xi.astype(np.float32)
  np.testing.assert_allclose(ENERGY(x, xi, beta)[name], want, rtol=1e-5)
  # What is masked is as if it were not there.
  padded = np.concatenate([x, np.full((2, 4), 9, np.float32)])
  mask = np.arange(8) < 6
  np.testing.assert_allclose(
    ENERGY(padded, xi, beta, mask)[name], want, rtol=1e-5
  )
  np.testing.assert_allclose(
    retrieve(padded, xi, mask=mask, beta=beta)[name],
    retrieve(x, xi, beta=beta)[name], atol=1e-6,
  )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_signature_behaviour(name):
  """A half-hidden pattern is completed, and the energy never rises."""
  items = signs(0, 12, 64)
  cues = np.where(np.arange(64) < 32, items, np.float32(0))
  beta = 0.25
  path = [cues]
  for _ in range(4):
    path.append(retrieve(items, path[-1], beta=beta)[name])
  energies = np.stack([ENERGY(items, xi, beta)[name] for xi in path])
  assert (np.diff(energies, axis=0) <= 1e-4).all()
  assert (energies[1] < energies[0] - 1).all()
  assert (energies >= -1e-4).all()
  np.testing.assert_array_equal(np.sign(path[-1]), items)
  np.testing.assert_allclose(path[-1], items, atol=0.05)
  # Starting anywhere, with patterns that overlap, it still never rises.
  close = draw(1, 8, 5)
  xi = 2 * draw(2, 20, 5)
  for _ in range(6):
    new = retrieve(close, xi, beta=1.3)[name]
    drop = ENERGY(close, xi, 1.3)[name] - ENERGY(close, new, 1.3)[name]
    assert (drop >= -5e-5).all()  # of energies about 10
    xi = new


def test_sparse_retrieval_is_exact():
  items = signs(3, 12, 64)
  cues = np.where(np.arange(64) < 32, items, np.float32(0))
  for name in ("sparsemax", "entmax15"):
    got = retrieve(items, cues, beta=1.0)[name]
    np.testing.assert_allclose(got, items, atol=1e-6)


def test_gradients():
  """Of three steps, against finite differences of the iterated oracle."""
  r = np.random.default_rng(4)
  x, q, step = r.normal(size=(5, 4)), r.normal(size=(3, 4)), 1e-6
  weights = np.cos(0.7 * np.arange(12)).reshape(3, 4)

  def loss(name, flat):
    x, q = flat[:20].reshape(5, 4), flat[20:].reshape(3, 4)
    for _ in range(3):
      q = np.stack([x.T @ oracle_separation(name, x @ xi) for xi in q])
    return (q * weights).sum()

  def op_loss(name, x, q):
    return checks.wave(hopfield(x, q, beta=1.0, steps=3, separation=name))

  grads = jax.jit(
    lambda x, q: {n: jax.grad(op_loss, (1, 2))(n, x, q) for n in NAMES}
  )(x.astype(np.float32), q.astype(np.float32))
  flat = np.concatenate([x.ravel(), q.ravel()])
  for name in NAMES:
    want = np.array(
      [
        (loss(name, flat + d) - loss(name, flat - d)) / (2 * step)
        for d in step * np.eye(len(flat))
      ]
    )
    got = np.concatenate([np.ravel(g) for g in grads[name]])
    assert checks.relative(got, want) < checks.GRADIENT, name


def test_tolerance():
  r = np.random.default_rng(5)
  x, q = (r.normal(size=s).astype(np.float32) for s in ((5, 4), (3, 4)))
  fn = jax.jit(hopfield, static_argnames="steps")
  far = fn(x, q, beta=9.0, steps=40)
  held = fn(x, q, beta=9.0, steps=40, tolerance=1e-4)
  assert checks.relative(held, far) < 1e-3
  stopped = fn(x, q, beta=9.0, steps=40, tolerance=1e3)
  assert checks.relative(stopped, fn(x, q, beta=9.0)) < 1e-6


def test_bfloat16():
  x, q = (np.random.default_rng(n).normal(size=(6, 8)) for n in (6, 7))
  half = [jnp.asarray(a, jnp.bfloat16) for a in (x, q)]
  got = jax.jit(hopfield)(*half, beta=0.5)
  assert got.dtype == jnp.bfloat16

  def exact(x, q):
    return np.stack(
      [
        np.asarray(x).T @ oracle_separation("softmax", 0.5 * np.asarray(x) @ xi)
        for xi in q
      ]
    )

  rounded = [np.asarray(a.astype(jnp.float32), np.float64) for a in half]
  floor = checks.relative(exact(*rounded), exact(x, q))
  assert checks.relative(got.astype(jnp.float32), exact(x, q)) < 4 * floor


def test_store():
  """Key and value apart, empty slots unseen, the oldest item replaced."""
  store = HopfieldStore(key_width=16, value_width=3, capacity=4, beta=4.0)
  put, look = jax.jit(lambda *a: write_all(store, *a)), jax.jit(store.read)
  height = jax.jit(store.energy)
  keys = signs(0, 6, 16)
  values = draw(1, 6, 3)
  state = store.empty()
  np.testing.assert_array_equal(look(state, keys[0]), np.zeros(3))
  np.testing.assert_allclose(height(state, keys[0]), 8.0)
  state = put(state, keys[:3], values[:3])
  np.testing.assert_allclose(look(state, keys[1]), values[1], atol=1e-4)
  np.testing.assert_allclose(
    height(state, keys[1]), ENERGY(keys[:3], keys[1], 4.0)["softmax"], rtol=1e-5
  )
  state = put(state, keys[3:], values[3:])
  for n in range(2, 6):
    np.testing.assert_allclose(look(state, keys[n]), values[n], atol=1e-4)
  assert np.abs(look(state, keys[0]) - values[0]).max() > 0.1
  stored = {tuple(map(float, row)) for row in state.keys}
  assert stored == {tuple(map(float, row)) for row in keys[2:]}


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(query=np.zeros((3, 5), np.float32)), "query must be"),
    (dict(patterns=np.zeros((3,), np.float32)), "patterns must be"),
    (dict(values=np.zeros((4, 2), np.float32)), "values must be"),
    (dict(mask=np.ones(4, bool)), "mask must be"),
    (dict(steps=0), "steps must be at least 1, got 0"),
    (dict(separation="sparsmax"), "did you mean 'sparsemax'"),
  ],
)
def test_bad_input(change, words):
  good = dict(
    patterns=np.zeros((3, 4), np.float32), query=np.zeros(4, np.float32)
  )
  call = {**good, **change}
  with pytest.raises(ValueError, match=words):
    hopfield(call.pop("patterns"), call.pop("query"), **call)
  with pytest.raises(ValueError, match="capacity must be a positive integer"):
    HopfieldStore(key_width=3, value_width=3, capacity=0)
