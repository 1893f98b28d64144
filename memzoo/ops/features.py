"""Feature maps of linear attention: [..., K] -> [..., F], not negative where
the paper needs a positive normaliser."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core import dispatch
from memzoo.ops import chunk


def identity(x):
  """x."""
  return x


def elu(x):
  """elu(x) + 1. Katharopoulos et al. 2020, arXiv:2006.16236, eq. 7."""
  return jax.nn.elu(x) + 1


def relu(x):
  """max(x, 0)."""
  return jax.nn.relu(x)


def silu(x):
  """x · sigmoid(x)."""
  return jax.nn.silu(x)


def taylor(x):
  """[1, x / K^¼, vec(x xᵀ) / sqrt(2 K)]: φ(q)·φ(k) = 1 + s + s²/2 with
  s = q·k / sqrt(K). Arora et al. 2024, arXiv:2402.18668, section 4.1."""
  width = x.shape[-1]
  square = x[..., :, None] * x[..., None, :]
  square = square.reshape(x.shape[:-1] + (width * width,))
  return jnp.concatenate(
    [
      jnp.ones_like(x[..., :1]),
      x / width**0.25,
      square / (math.sqrt(2) * math.sqrt(width)),
    ],
    axis=-1,
  )


def polynomial(x, roots):
  """Every monomial of degree p or less, weighed by roots r [..., p + 1] so that
  φ(x)·φ(y) = Σ_i r_i² (x·y)^i; r_i² = 1 / i! is the Taylor polynomial of
  exp(x·y). F = (K + p)! / (K! p!). Behrouz et al. 2025, arXiv:2505.23735,
  section 3.1 and eq. 5."""
  single, roots, parts = x.astype(jnp.float32), roots.astype(jnp.float32), []
  for degree in range(roots.shape[-1]):
    index, weight = _monomials(x.shape[-1], degree)
    part = roots[..., degree : degree + 1] * weight
    part = jnp.broadcast_to(part, x.shape[:-1] + weight.shape)
    for factor in index.T:
      part = part * single[..., factor]
    parts.append(part)
  return jnp.concatenate(parts, axis=-1).astype(x.dtype)


@functools.cache
def _monomials(width: int, degree: int):
  """Factors int32 [F, degree], and the roots of how often (Σ x)^degree has
  each product."""
  index = list(itertools.combinations_with_replacement(range(width), degree))
  repeats = lambda m: math.prod(math.factorial(m.count(n)) for n in set(m))
  times = [math.factorial(degree) // repeats(m) for m in index]
  index = np.array(index, np.int32).reshape(len(times), degree)
  return index, np.sqrt(times).astype(np.float32)


def dpfp(x, nu: int = 1):
  """Products of neighbours of r = [relu(x), relu(−x)]: r_i r_{i+j},
  j = 1 … ν. Schlag et al. 2021, arXiv:2102.11174, eq. 37."""
  r = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
  return jnp.concatenate(
    [r * jnp.roll(r, j, axis=-1) for j in range(1, nu + 1)], axis=-1
  )


def favor(x, projection):
  """exp(ω_i·x − ‖x‖² / 2) / sqrt(M), i = 1 … M: positive random features, with
  E[φ(x)·φ(y)] = exp(x·y) for rows ω ~ N(0, I) of `projection` [M, K].
  Choromanski et al. 2020, arXiv:2009.14794, section 2.3 (Lemma 1)."""
  return jnp.exp(favor_exponents(x, projection)) / math.sqrt(len(projection))


def favor_exponents(x, projection):
  """ω_i·x − ‖x‖² / 2 of `favor`: [..., K] -> float32 [..., M]."""
  half = 0.5 * jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
  return chunk.matmul(x, projection.T) - half


def orthogonal_rows(key, count: int, width: int):
  """Rows [count, width], each distributed as N(0, I), those of every block of
  `width` orthogonal. Choromanski et al. 2020, arXiv:2009.14794, section 2.4."""
  key_rows, key_norms = jax.random.split(key)
  blocks = -(-count // width)
  rows = jax.random.orthogonal(key_rows, width, (blocks,)).reshape(-1, width)
  norms = jnp.linalg.norm(
    jax.random.normal(key_norms, (count, width)), axis=-1, keepdims=True
  )
  return rows[:count] * norms


MAPS = {
  "identity": identity,
  "elu": elu,
  "relu": relu,
  "silu": silu,
  "taylor": taylor,
  "dpfp": dpfp,
}


def get(name: str):
  """The feature map `name`; `ValueError` with the nearest on another one."""
  if name not in MAPS:
    raise ValueError(
      f"unknown feature map {name!r}: " + dispatch.nearest(name, MAPS)
    )
  return MAPS[name]


def width(name: str, key_width: int) -> int:
  """F for K = key_width."""
  spec = jax.ShapeDtypeStruct((key_width,), jnp.float32)
  return jax.eval_shape(get(name), spec).shape[-1]
