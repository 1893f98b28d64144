"""`integrate_and_fire`: the rule, and the gradient of a spike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops.integrate_and_fire import integrate_and_fire, spike


def lif(xs, tau=2.0, threshold=1.0):
  """Neuron by neuron, step by step: xs [T, N]."""
  v, out = np.zeros(xs.shape[1]), []
  for x in xs:
    v = v + (x - v) / tau
    s = (v >= threshold).astype(float)
    v = np.where(s, 0.0, v)
    out.append(s)
  return np.stack(out)


def test_neurons():
  """The rule, its rest after a reset, and the sigmoid's gradient, which does
  not go through a neuron's return to zero."""
  xs = np.random.default_rng(0).normal(1.0, 1.5, (40, 3)).astype(np.float32)
  reset, mask = np.arange(40) == 17, np.arange(40) % 5 != 2
  mask[17] = True
  _, got = integrate_and_fire(
    jnp.zeros(3), jnp.asarray(xs), reset=reset, mask=mask
  )
  want = np.zeros((40, 3))
  want[:17][mask[:17]] = lif(xs[:17][mask[:17]])
  want[17:][mask[17:]] = lif(xs[17:][mask[17:]])
  np.testing.assert_array_equal(got, want)
  assert 0.1 < want.mean() < 0.9
  s = lambda x: 1 / (1 + np.exp(-4 * x))
  z = jnp.array([-0.3, 0.0, 0.2])
  np.testing.assert_array_equal(spike(z), [0, 1, 1])
  slope = jax.vmap(jax.grad(spike))(z)
  np.testing.assert_allclose(slope, 4 * s(z) * (1 - s(z)), rtol=1e-6)
  # Two steps, a spike at the first: v = 0 there whatever it was.
  run = lambda x: integrate_and_fire(jnp.zeros(1), x[:, None])[1]
  g = jax.jacobian(lambda x: run(x)[:, 0])(jnp.array([3.0, 1.0]))
  want = 2 * s(0.5) * (1 - s(0.5)), 2 * s(-0.5) * (1 - s(-0.5))
  np.testing.assert_allclose(g, [[want[0], 0], [0, want[1]]], rtol=1e-5)
  with pytest.raises(ValueError, match=r"v must be floating \[3\]"):
    integrate_and_fire(jnp.zeros(2), jnp.zeros((4, 3)))
