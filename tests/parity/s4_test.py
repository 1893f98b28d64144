"""S4D on the authors' (state-spaces/s4, models/s4/s4d.py), where a checkout of
theirs is on the path."""

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
B, T, D, N = 2, 67, 6, 8


@pytest.mark.parametrize("form", ["step", "scan", "chunk", "fft"])
def test_s4d(form):
  """S4D-Lin from their first parameters, and the gradients of all of them;
  what follows their state space, GELU and a gated map, is left out."""
  torch = pytest.importorskip("torch")
  theirs = pytest.importorskip("models.s4.s4d")
  torch.manual_seed(0)
  module = theirs.S4D(D, N, transposed=False, dt_min=0.02, dt_max=0.5)
  module.activation = module.output_linear = torch.nn.Identity()
  r = np.random.default_rng(11)
  x = r.normal(size=(B, T, D)).astype(np.float32)
  weight = r.normal(size=(B, T, D)).astype(np.float32)
  y, _ = module(torch.tensor(x))
  (y * torch.tensor(weight)).sum().backward()
  parts = {
    "log_dt": module.kernel.log_dt,
    "log_re": module.kernel.log_A_real,
    "im": module.kernel.A_imag,
    "c": module.kernel.C,
    "d": module.D,
  }

  def ours(part):
    """Their C is [D, N / 2, 2], real and imaginary parts."""
    found = {k: part(p).numpy() for k, p in parts.items()}
    c = found.pop("c")
    return found | {"c_re": c[..., 0], "c_im": c[..., 1]}

  cell = memzoo.make("s4d", d_model=D, d_state=N, init_a="lin")
  params = ours(lambda p: p.detach().clone())
  first = jax.jit(cell.init)(jax.random.key(0))
  for name in ("log_re", "im"):  # both start as the paper says
    np.testing.assert_allclose(first[name], params[name], rtol=1e-6)
  fixed = {name: first[name] for name in ("b_re", "b_im")}  # theirs has no B

  def run(params):
    one = lambda x: memzoo.scan(
      cell, params | fixed, None, x, implementation=form
    )[1]
    ys = jax.vmap(one)(jnp.asarray(x))
    return jnp.sum(ys * weight), ys

  (_, got), slopes = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
  error = checks.relative(got, y.detach().numpy())
  slope = checks.relative(slopes, ours(lambda p: p.grad))
  print(f"s4d {form}: relative error {error:.1e}, of gradients {slope:.1e}")
  assert error < checks.FORWARD and slope < checks.GRADIENT
