"""The step loop: its forms agree, and the weights alone are cast."""

import checks
import jax
import jax.numpy as jnp
import numpy as np

from memzoo import kernels
from memzoo.kernels.cell_scan import product
from memzoo.ops.step_loop import cast, step_loop


def step(h, x, constants):
  w, decay = constants
  h = decay * h + jnp.tanh(x + product(h, w))
  return h, 2 * h


def test_forms_agree_with_the_loop_in_python():
  r = np.random.default_rng(0)
  draw = lambda *shape: r.normal(size=shape).astype(np.float32)
  w, decay, h, xs = draw(5, 5), r.random(5).astype("f4"), draw(5), draw(9, 5)
  reset, mask = np.arange(9) == 4, np.arange(9) != 6
  want, new = np.zeros((9, 5)), h.astype(np.float64)
  for t, x in enumerate(xs):
    if mask[t]:
      new = np.zeros(5) if reset[t] else new
      new = decay * new + np.tanh(x + new @ w)
      want[t] = 2 * new
  for form in ("scan", "pallas"):
    with kernels.interpret():
      got = step_loop(
        step, h, xs, (w, decay), dtype=jnp.float32, reset=reset, mask=mask,
        implementation=form,
      )  # fmt: skip
    assert checks.relative(got, (new, want)) < checks.FORWARD, form


def test_cast_leaves_vectors_in_single_precision():
  w, decay = cast((jnp.ones((2, 2)), jnp.ones(2)), jnp.bfloat16)
  assert (w.dtype, decay.dtype) == (jnp.bfloat16, jnp.float32)
  w, decay = cast(jax.tree.map(lambda x: x.astype(jnp.bfloat16), (w, decay)))
  assert (w.dtype, decay.dtype) == (jnp.float32, jnp.float32)
