"""Feature maps against the identities of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops import features


def test_taylor_is_the_second_order_exponential():
  q, k = jax.random.normal(jax.random.key(0), (2, 4))
  s = float(q @ k) / 2.0  # sqrt(4)
  got = features.taylor(q) @ features.taylor(k)
  np.testing.assert_allclose(got, 1 + s + s**2 / 2, rtol=1e-5)


def test_dpfp():
  """Schlag et al. 2021 eq. 37 written out for K = 2, ν = 1."""
  x = jnp.asarray([1.5, -2.0])
  r = [1.5, 0.0, 0.0, 2.0]  # relu of (x, −x)
  want = [r[i] * r[i - 1] for i in range(4)]
  np.testing.assert_allclose(features.dpfp(x), want)
  assert features.width("dpfp", 2) == 4
  assert features.width("taylor", 3) == 13


def test_unknown_map():
  with pytest.raises(ValueError, match="unknown feature map 'eluu'.*'elu'"):
    features.get("eluu")
