"""HiPPO matrices and discretisations against scipy, and against what the
matrices are made for."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.signal

from memzoo.ops import hippo


def test_legs_entries():
  """Gu et al. 2020 (arXiv:2008.07669), theorem 2, entry by entry."""
  a, b = hippo.legs(5)
  for n in range(5):
    assert b[n] == np.sqrt(2 * n + 1)
    for k in range(5):
      want = -np.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else 0
      want = -(n + 1) if n == k else want
      assert np.isclose(a[n, k], want)


def test_legs_projects_onto_legendre_polynomials():
  """x' = (A x + B u) / t keeps the coefficients of u's history on [0, t] in
  the orthonormal Legendre polynomials (theorem 2)."""
  size, steps = 8, 4000
  a, b = hippo.legs(size)
  u = lambda t: np.sin(5 * t) + t
  x = u(0) * np.eye(size)[0]
  for k in range(1, steps + 1):
    # In log t the system is time-invariant; one exact step each.
    if k > 1:
      step = np.log(k / (k - 1))
      whole = np.zeros((size + 1, size + 1))
      whole[:size, :size], whole[:size, size] = a, b
      whole = scipy.linalg.expm(step * whole)
      x = whole[:size, :size] @ x
      x += whole[:size, size] * u((k - 0.5) / steps)
  s, weights = np.polynomial.legendre.leggauss(64)
  for n in range(size):
    p = np.polynomial.Legendre.basis(n)(s) * np.sqrt(2 * n + 1)
    want = np.sum(weights / 2 * p * u((s + 1) / 2))
    assert abs(x[n] - want) < 2e-3, (n, x[n], want)


def test_delay_is_a_pure_delay_of_pade():
  """The Legendre delay's read-out at θ is the Padé approximant of e^{−s}
  (Voelker et al. 2019, eq. 1 to 3): exact to order 2N − 1 at s = 0."""
  for size in (3, 6):
    a, b = hippo.delay(size)
    c = np.ones(size)  # P̃_i(1)
    for s in (0.3, 0.5j, 1.0 + 1.0j):
      got = c @ np.linalg.solve(s * np.eye(size) - a, b)
      order = abs(s) ** (2 * size)
      assert abs(got - np.exp(-s)) < order, (size, s)


def test_legt_is_the_delay_in_an_orthonormal_basis():
  a, b = hippo.legt(6)
  q = np.sqrt(2 * np.arange(6) + 1)
  for n in range(6):
    for k in range(6):
      sign = (-1.0) ** (n - k) if n < k else 1.0
      assert np.isclose(a[n, k], -q[n] * q[k] * sign)
  np.testing.assert_allclose(b, q)


def test_legs_dplr_is_legs():
  """A = V (Λ − p p*) V* and B = V b, with both halves of the pairs."""
  for size in (2, 6, 64):
    w, p, b, v = hippo.legs_dplr(size)
    v, p = np.concatenate([v, v.conj()], 1), np.concatenate([p, p.conj()])
    w, b = np.concatenate([w, w.conj()]), np.concatenate([b, b.conj()])
    want_a, want_b = hippo.legs(size)
    np.testing.assert_allclose(v.conj().T @ v, np.eye(size), atol=1e-12)
    got = v @ (np.diag(w) - np.outer(p, p.conj())) @ v.conj().T
    np.testing.assert_allclose(got, want_a, atol=1e-10)
    np.testing.assert_allclose(v @ b, want_b, atol=1e-10)
    assert np.allclose(w.real, -0.5)
    assert np.abs(p.imag).max() < 1e-12 and (p.real > 0).all()


def test_zoh_is_the_exponential():
  for matrices in (hippo.legs, hippo.delay, hippo.legt):
    a, b = matrices(7)
    got = hippo.zoh(matrices, 7, 0.13)
    want = scipy.signal.cont2discrete(
      (a, b[:, None], np.eye(7), np.zeros((7, 1))), 0.13, "zoh"
    )
    np.testing.assert_allclose(got[0], scipy.linalg.expm(0.13 * a), atol=1e-12)
    np.testing.assert_allclose(got[0], want[0], atol=1e-12)
    np.testing.assert_allclose(got[1], want[1][:, 0], atol=1e-12)


def test_generalised_bilinear_is_scipys():
  a, b = hippo.legs(6)
  steps = np.array([0.01, 0.2])
  for alpha, method in ((0.0, "euler"), (0.5, "bilinear"), (0.7, "gbt")):
    many = lambda x: jnp.asarray(np.stack([x, x]), jnp.float32)
    got = hippo.generalised_bilinear(
      many(a), many(b), jnp.asarray(steps, jnp.float32), alpha
    )
    for n, step in enumerate(steps):
      want = scipy.signal.cont2discrete(
        (a, b[:, None], np.eye(6), np.zeros((6, 1))), step, method, alpha=alpha
      )
      np.testing.assert_allclose(got[0][n], want[0], atol=2e-5)
      np.testing.assert_allclose(got[1][n], want[1][:, 0], atol=2e-5)


def test_diagonal_forms_are_the_dense_ones():
  a = np.array([-0.5 + 3j, -1.0 + 0j, -1e-5 + 0j, 0j])
  for name, discretize in hippo.DIAGONAL.items():
    got = jax.jit(discretize)(jnp.asarray(a, jnp.complex64), jnp.float32(0.3))
    for n, value in enumerate(a):
      one = np.array([[value]])
      want = scipy.signal.cont2discrete(
        (one, np.ones((1, 1)), one, one), 0.3, name
      )
      np.testing.assert_allclose(got[0][n], want[0][0, 0], rtol=1e-6)
      np.testing.assert_allclose(got[1][n], want[1][0, 0], rtol=1e-6)
