"""What reservoirs share: the size of a random recurrence, and the closed form
of a linear read-out.

Sources: Gelfand's formula, ρ(W) = lim ‖W^n‖^{1/n}; Hoerl and Kennard 1970,
"Ridge Regression: Biased Estimation for Nonorthogonal Problems", Technometrics
12(1).
"""

import jax
import jax.numpy as jnp

from memzoo.ops import arguments


def spectral_radius(w: jax.Array, squarings: int = 24) -> jax.Array:
  """The largest |eigenvalue| of w [N, N], as a scalar.

  By n = 2^squarings in Gelfand's formula: products alone, for any platform and
  under any transformation, where an eigenvalue solver is for the host.
  """
  arguments.check_array("spectral_radius", "w", w, (None, w.shape[0]))
  total = jnp.zeros((), w.dtype)
  for n in range(squarings + 1):
    size = jnp.linalg.norm(w)
    total += jnp.log(size) * 0.5**n
    w = w / jnp.where(size > 0, size, 1)
    w = jnp.matmul(w, w, precision=jax.lax.Precision.HIGHEST)
  return jnp.exp(total)


def ridge(features, targets, penalty: float):
  """The linear map that minimises Σ_t ‖W x_t + b − y_t‖² + penalty ‖W‖².

  Args:
    features: x, [T, F].
    targets: y, [T, D].
    penalty: zero or above; zero gives the smallest of the best W.

  Returns:
    (W [F, D], b [D]), b free of the penalty.
  """
  who = "ridge"
  arguments.check_array(who, "features", features, (None, None))
  arguments.check_array(who, "targets", targets, (features.shape[0], None))
  if not penalty >= 0:
    raise ValueError(f"{who}: penalty must be 0 or above, got {penalty!r}")
  x, y = (z.astype(jnp.float32) for z in (features, targets))
  mean_x, mean_y = jnp.mean(x, axis=0), jnp.mean(y, axis=0)
  # By the singular values of x, and not by xᵀx, which has half their digits.
  u, s, vt = jnp.linalg.svd(x - mean_x, full_matrices=False)
  seen = s > jnp.finfo(s.dtype).eps * max(x.shape) * s[0]
  inverse = jnp.where(seen, s / jnp.where(seen, s**2 + penalty, 1), 0)
  w = vt.T @ (inverse[:, None] * (u.T @ (y - mean_y)))
  return w, mean_y - mean_x @ w


def fit(features, targets, penalty: float, washout: int):
  """`ridge` over the steps of all sequences, but for the first of each.

  Args:
    features: [B, T, F].
    targets: [B, T, D].
    penalty: zero or above.
    washout: how many first steps do not count: those in which a reservoir
      still knows how it began.

  Returns:
    (W [F, D], b [D]).
  """
  if not 0 <= washout < features.shape[1]:
    raise ValueError(
      f"fit: washout must be 0 or above and below the {features.shape[1]} "
      f"steps of a sequence, got {washout!r}"
    )
  rows = lambda z: z[:, washout:].reshape(-1, z.shape[-1])
  return ridge(rows(features), rows(targets), penalty)
