"""HiPPO matrices, and discretisations of x' = A x + B u.

Closed forms, in float64 numpy arrays: cells take them at the start of training
or as constants.

  LegS   A_nk = −√(2n+1) √(2k+1) (n > k), −(n + 1) (n = k), 0 (n < k),
         B_n = √(2n+1)                         Gu et al. 2020, arXiv:2008.07669,
                                               theorem 2 (time-invariant)
  Legendre delay, of the LMU, for a window of one unit
         A_ij = (2i+1) (−1 (i < j), (−1)^{i−j+1} (i >= j)),
         B_i = (2i+1) (−1)^i                   Voelker et al. 2019, eq. 2
  LegT   the same in an orthonormal basis      Gu et al. 2020, theorem 1
  DPLR   A = V (Λ − p p*) V*, of LegS          Gu et al. 2022,
                                               arXiv:2111.00396, appendix C.3

Discretisations with a step Δ, of diagonal (`…_diagonal`) or dense matrices:

  zero-order hold        Ā = exp(ΔA), B̄ = A⁻¹ (Ā − I) B
  generalised bilinear   Ā = (I − αΔA)⁻¹ (I + (1−α)ΔA), B̄ = (I − αΔA)⁻¹ ΔB;
                         α = ½ is the bilinear, 0 Euler's, 1 the backward one
"""

import functools

import jax.numpy as jnp
import numpy as np
import scipy.linalg


def legs(size: int) -> tuple[np.ndarray, np.ndarray]:
  """LegS: A [N, N], B [N]."""
  n = np.arange(size, dtype=np.float64)
  b = np.sqrt(2 * n + 1)
  return -np.tril(np.outer(b, b), -1) - np.diag(n + 1), b


def delay(size: int) -> tuple[np.ndarray, np.ndarray]:
  """The Legendre delay of one time unit: A [N, N], B [N]."""
  i, j = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
  r = 2.0 * np.arange(size) + 1
  a = np.where(i < j, -1.0, (-1.0) ** (i - j + 1))
  return r[:, None] * a, r * (-1.0) ** np.arange(size)


def legt(size: int) -> tuple[np.ndarray, np.ndarray]:
  """LegT on a window of one unit: the state is that of `delay`, scaled by
  1 / √(2n+1) and with every second sign turned."""
  a, b = delay(size)
  scale = (-1.0) ** np.arange(size) / np.sqrt(2 * np.arange(size) + 1)
  return scale[:, None] * a / scale, scale * b


@functools.cache
def legs_dplr(size: int) -> tuple[np.ndarray, ...]:
  """LegS as V (Λ − p p*) V*, B = V b, in conjugate pairs.

  A + P Pᵀ, with P = √(n + ½), is −½ I and a skew-symmetric matrix, whose
  eigenvectors are unitary. Their phases are free: here p is real and positive,
  and so is b = √2 p.

  Args:
    size: N, even.

  Returns:
    (Λ, p, b complex128 [N / 2], V complex128 [N, N / 2]): those of negative
    imaginary part, the largest first; the others are their conjugates.
  """
  a, b = legs(size)
  p = b / np.sqrt(2)
  skew = a + np.outer(p, p) + 0.5 * np.eye(size)
  imaginary, v = np.linalg.eigh(-1j * skew)
  imaginary, v = imaginary[: size // 2], v[:, : size // 2]
  phase = v.conj().T @ p
  v = v * (phase / np.abs(phase))
  project = lambda x: v.conj().T @ x
  return -0.5 + 1j * imaginary, project(p), project(b), v


@functools.cache
def zoh(matrices, size: int, step: float) -> tuple[np.ndarray, np.ndarray]:
  """Zero-order hold of `legs`, `delay` or `legt`: Ā [N, N], B̄ [N].

  By one matrix exponential, exp(Δ [[A, B], [0, 0]]) = [[Ā, B̄], [0, 1]], which
  asks for no inverse of A.
  """
  a, b = matrices(size)
  whole = np.zeros((size + 1, size + 1))
  whole[:size, :size], whole[:size, size] = a, b
  whole = scipy.linalg.expm(step * whole)
  return whole[:size, :size], whole[:size, size]


def generalised_bilinear(a, b, step, alpha: float = 0.5):
  """Generalised bilinear transform of A [..., N, N], B [..., N] with a step
  Δ [...], all of the same leading axes: (Ā [..., N, N], B̄ [..., N])."""
  step = jnp.asarray(step)[..., None, None]
  eye = jnp.eye(a.shape[-1], dtype=a.dtype)
  right = [eye + (1 - alpha) * step * a, step * b[..., None]]
  out = jnp.linalg.solve(
    eye - alpha * step * a, jnp.concatenate(right, axis=-1)
  )
  return out[..., :-1], out[..., -1]


def zoh_diagonal(a, step):
  """Zero-order hold of diagonal A [...] with a step Δ [...].

  Returns:
    (Ā, the factor of B in B̄), [...] each. The factor goes to Δ where A does
    to 0.
  """
  step = jnp.asarray(step, a.dtype)
  z = step * a
  small = jnp.abs(z) < 1e-3
  safe = jnp.where(small, jnp.ones_like(z), z)
  phi = jnp.where(small, 1 + z / 2 + z * z / 6, jnp.expm1(safe) / safe)
  return jnp.exp(z), step * phi


def bilinear_diagonal(a, step):
  """Bilinear transform of diagonal A [...] with a step Δ [...]: (Ā, the
  factor of B in B̄), [...] each."""
  step = jnp.asarray(step, a.dtype)
  inverse = 1 / (1 - step * a / 2)
  return inverse * (1 + step * a / 2), inverse * step


DIAGONAL = {"zoh": zoh_diagonal, "bilinear": bilinear_diagonal}
