"""The reservoirs' algebra against numpy's solvers."""

import jax
import numpy as np
import pytest

from memzoo.ops import reservoir


@pytest.mark.parametrize("size", [1, 5, 60])
def test_spectral_radius(size):
  r = np.random.default_rng(size)
  radius = jax.jit(reservoir.spectral_radius)
  for draw in range(3):
    w = r.normal(size=(size, size)).astype(np.float32)
    if draw:  # a real eigenvalue or a pair leads; far from normal, too
      w = np.triu(3 * w, 1) + np.tril(w)
    want = np.abs(np.linalg.eigvals(w.astype(np.float64))).max()
    np.testing.assert_allclose(radius(w), want, rtol=1e-4)
  np.testing.assert_array_equal(radius(np.zeros((size, size), "f4")), 0.0)


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_ridge(penalty):
  r = np.random.default_rng(0)
  x = r.normal(size=(40, 7)).astype(np.float32) + 2
  y = r.normal(size=(40, 3)).astype(np.float32) - 1
  w, b = reservoir.ridge(x, y, penalty)
  x, y = x.astype(np.float64), y.astype(np.float64)
  # The normal equations, with a one that is not penalised.
  ones = np.concatenate([x, np.ones((40, 1))], axis=1)
  square = ones.T @ ones + penalty * np.diag([1.0] * 7 + [0.0])
  want = np.linalg.solve(square, ones.T @ y)
  np.testing.assert_allclose(w, want[:-1], rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(b, want[-1], rtol=1e-3, atol=1e-5)
  with pytest.raises(ValueError, match="penalty must be 0 or above, got -1"):
    reservoir.ridge(x, y, -1)


def test_ridge_of_features_that_depend_on_each_other():
  x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
  x = np.concatenate([x, x, 0 * x], axis=1)
  y = x[:, :2] - 3 * x[:, 2:4] + 5
  w, b = reservoir.ridge(x, y, 0.0)
  np.testing.assert_allclose(x @ w + b, y, atol=1e-4)
  np.testing.assert_allclose(w[:4], w[4:8], atol=1e-5)


def test_fit_leaves_out_the_washout():
  r = np.random.default_rng(0)
  x, y = r.normal(size=(2, 2, 9, 3)).astype(np.float32)
  got = reservoir.fit(x, y, 0.1, 4)
  want = reservoir.ridge(
    np.concatenate([x[0, 4:], x[1, 4:]]), np.concatenate([y[0, 4:], y[1, 4:]]),
    0.1,
  )  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, got, want)
  with pytest.raises(ValueError, match="below the 9 steps .*, got 9"):
    reservoir.fit(x, y, 0.1, 9)
