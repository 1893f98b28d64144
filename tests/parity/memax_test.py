"""The linear recurrent unit on memax's, with episodes that start anywhere."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore"),  # theirs
]
T, D, N = 67, 6, 6  # their annotations want states as wide as inputs


@pytest.mark.parametrize("form", ["step", "scan", "assoc", "chunk"])
def test_lru(form):
  pytest.importorskip("equinox")
  theirs = pytest.importorskip("memax.equinox.semigroups.lru")
  with jax.numpy_dtype_promotion("standard"):
    module = theirs.LRU(N, D, jax.random.key(0))
  cell = memzoo.make("lru", d_model=D, d_state=N)
  r = np.random.default_rng(10)
  x = r.normal(size=(T, D)).astype(np.float32)
  start = r.random(T) < 0.1
  before = r.normal(size=(2, N)).astype(np.float32)
  before = before[0] + 1j * before[1]
  with jax.numpy_dtype_promotion("standard"):
    carry = (jnp.ones(N, jnp.complex64), before), jnp.zeros((), bool)
    ((_, h), _), y = jax.jit(lambda *z: module(*z))(
      carry, (jnp.asarray(x), start)
    )
  params = {n: getattr(module, n) for n in ("nu_log", "theta_log", "gamma_log")}
  params |= {
    n.lower(): getattr(module, n).T for n in ("B_re", "B_im", "C_re", "C_im")
  }
  state = type(cell.initial_state(params))(jnp.asarray(before))
  run = lambda s, x: memzoo.scan(
    cell, params | {"d": module.D}, s, x, reset=start, implementation=form
  )
  after, ys = jax.jit(run)(state, x)
  error = checks.relative((ys, after.h), (y, h[-1]))
  print(f"lru {form}: relative error {error:.1e}")
  assert error < checks.FORWARD
