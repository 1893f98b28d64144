"""Kernelised hashing against Liu et al. 2022 (arXiv:2209.09004), section 4."""

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.ops import kernel_hash


def units(seed, *shape):
  u = np.random.default_rng(seed).normal(size=shape)
  return (u / np.linalg.norm(u, axis=-1, keepdims=True)).astype(np.float32)


def test_encode():
  hashed = kernel_hash.draw(jax.random.key(0), 5, 7, 3)
  u = units(0, 20, 3)
  a, w, mean, sigma = (np.asarray(x, np.float64) for x in hashed)
  for code, x in zip(kernel_hash.encode(hashed, u), u):
    kernel = [np.exp(-np.sum((x - a[j]) ** 2) / (2 * sigma)) for j in range(7)]
    np.testing.assert_array_equal(code, np.sign(w @ (kernel - mean)))


def test_gradient_passes_near_zero_alone():
  """That of the sum below sign, where it is within ±1."""
  hashed = kernel_hash.draw(jax.random.key(0), 1, 7, 3)
  hashed = hashed._replace(weights=3 * hashed.weights)
  u = jnp.asarray(units(1, 50, 3))

  def below(u):
    square = jnp.sum(jnp.square(u - hashed.anchors), -1)
    return (hashed.weights @ (jnp.exp(-square / 4) - hashed.mean))[0]

  got = jax.vmap(jax.grad(lambda u: kernel_hash.encode(hashed, u)[0]))(u)
  want = jax.vmap(jax.grad(below))(u)
  inside = np.abs(jax.vmap(below)(u)) < 1
  assert 5 < inside.sum() < 45
  np.testing.assert_allclose(got[inside], want[inside], rtol=1e-3, atol=1e-5)
  assert not np.any(got[~inside])


def test_labels():
  s = jnp.asarray([[0.9, 0.1, -0.5, 0.3, 0.2]])
  np.testing.assert_array_equal(
    kernel_hash.labels(s, 2), [[1.0, -1.0, -1.0, 1.0, 0.0]]
  )
  np.testing.assert_array_equal(  # where both hold, the smallest win
    kernel_hash.labels(s, 3), [[1.0, -1.0, -1.0, 1.0, -1.0]]
  )


def greedy(u, hashed, anchors, top, steps, rate):
  """The authors' procedure in float64, for one row of tokens."""
  a0 = np.asarray(hashed.weights, np.float64)
  square = np.sum((u[:, None] - anchors) ** 2, axis=-1)
  sigma = square.mean()
  kernel = np.exp(-square / (2 * sigma))
  mean = kernel.mean(0)
  kernel = kernel - mean
  alike = u @ u.T
  rest = np.zeros_like(alike)
  for i, row in enumerate(alike):
    rest[i, np.argsort(row)[-top:]] = 1
    rest[i, np.argsort(row)[:top]] = -1
  bits, length = len(a0), len(u)
  rest = bits * rest
  cost = lambda h: -(h @ rest @ h) / (length * bits)
  weights = []
  for a in a0:
    new, momentum = a.copy(), 0
    for _ in range(steps):
      h = np.tanh(kernel @ new / 2)
      slope = -((rest + rest.T) @ h) * (1 - h**2) / 2 @ kernel / length / bits
      momentum = 0.9 * momentum + slope
      new = new - rate * (slope + 0.9 * momentum)
    sign = lambda a: np.where(kernel @ a > 0, 1.0, -1.0)
    a = new if cost(sign(new)) < cost(sign(a)) else a
    weights.append(a)
    rest = rest - np.outer(sign(a), sign(a))
  return sigma, mean, np.stack(weights)


def test_fit():
  """The authors' procedure, given the anchors that were drawn; and the codes
  of alike tokens come together."""
  hashed = kernel_hash.draw(jax.random.key(0), 6, 5, 4)
  u = units(2, 1, 24, 4)
  fit = jax.jit(
    lambda u: kernel_hash.fit(
      hashed, u, jax.random.key(1), top=4, steps=60, rate=0.05
    )
  )
  new = fit(u)
  drawn = np.asarray(new.anchors)
  assert all(np.any(np.all(u[0] == a, axis=1)) for a in drawn)
  assert len(np.unique(drawn, axis=0)) == 5
  row = u[0].astype(np.float64)
  sigma, mean, weights = greedy(row, hashed, drawn, 4, 60, 0.05)
  np.testing.assert_allclose(new.bandwidth, sigma, rtol=1e-5)
  np.testing.assert_allclose(new.mean, mean, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(new.weights, weights, rtol=1e-3, atol=1e-3)

  wanted = np.asarray(kernel_hash.labels(row @ row.T, 4))
  apart = []
  for which in (hashed, new):
    code = np.asarray(kernel_hash.encode(which, u[0]))
    product = code @ code.T / 6
    apart.append(product[wanted > 0].mean() - product[wanted < 0].mean())
  assert apart[1] > apart[0] + 0.1, apart
