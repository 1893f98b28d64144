"""S5 on the authors' (lindermanlab/S5, s5/ssm.py), where a checkout of theirs
is on the path."""

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
T, D, N = 67, 6, 12


@pytest.fixture(name="theirs")
def fixture_theirs(monkeypatch):
  """Their module, which names arrays as an old JAX did."""
  monkeypatch.setattr(jnp, "DeviceArray", jax.Array, raising=False)
  pytest.importorskip("flax")
  return pytest.importorskip("s5.ssm"), pytest.importorskip("s5.ssm_init")


@pytest.mark.parametrize("form", ["step", "scan", "assoc", "chunk"])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_s5(theirs, discretization, form):
  """From their first parameters, and the gradients of all of them."""
  ssm, ssm_init = theirs
  half = N // 2
  with jax.numpy_dtype_promotion("standard"):
    a, _, _, v, _ = ssm_init.make_DPLR_HiPPO(N)
    a, v = a[:half], v[:, :half]
    module = ssm.init_S5SSM(
      H=D, P=half, Lambda_re_init=a.real, Lambda_im_init=a.imag, V=v,
      Vinv=v.conj().T, C_init="lecun_normal", discretization=discretization,
      dt_min=0.02, dt_max=0.5, conj_sym=True, clip_eigs=False,
      bidirectional=False,
    )()  # fmt: skip
    r = np.random.default_rng(12)
    x = jnp.asarray(r.normal(size=(T, D)), jnp.float32)
    weight = r.normal(size=(T, D)).astype(np.float32)
    variables = module.init(jax.random.key(0), x)["params"]

    def apply(variables):
      y = module.apply({"params": variables}, x)
      return jnp.sum(y * weight), y

    (_, want), wanted = jax.jit(jax.value_and_grad(apply, has_aux=True))(
      variables
    )
  cell = memzoo.make("s5", d_model=D, d_state=N, discretization=discretization)
  first = jax.jit(cell.init)(jax.random.key(0))
  params = ours(variables)
  for name in ("re", "im"):  # HiPPO-N, up to the order of the pairs
    np.testing.assert_allclose(
      np.sort(np.abs(first[name])), np.sort(np.abs(params[name])), rtol=1e-5
    )

  def run(params):
    y = memzoo.scan(cell, params, None, x, implementation=form)[1]
    return jnp.sum(y * weight), y

  (_, got), slopes = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
  error = checks.relative(got, want)
  slope = checks.relative(slopes, ours(wanted))
  print(
    f"s5 {discretization} {form}: relative error {error:.1e}, "
    f"of gradients {slope:.1e}"
  )
  assert error < checks.FORWARD and slope < checks.GRADIENT


def ours(theirs):
  """Their B [N / 2, D, 2] and C [D, N / 2, 2] are real and imaginary parts."""
  b, c = (np.moveaxis(np.asarray(theirs[k]), -1, 0) for k in "BC")
  return {
    "log_dt": theirs["log_step"][:, 0],
    "re": theirs["Lambda_re"], "im": theirs["Lambda_im"],
    "b_re": b[0].T, "b_im": b[1].T, "c_re": c[0].T, "c_im": c[1].T,
    "d": theirs["D"],
  }  # fmt: skip
