"""FFM against Morad et al. 2023 (arXiv:2310.04128), section 4."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels

NAME = "fast_and_forgetful"


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def paper(cell, params, xs):
  """The aggregator by its sum over the past, S_t = Σ_k γ^(t−k) ⊙ x̃_k 1ᵀ, in
  complex128, and the cell around it."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  m, d = cell.num_traces, cell.d_model
  xs = np.asarray(xs, np.float64)
  pre = xs @ p["pre"] + p["pre_b"]
  x_tilde = pre[:, :m] * sigmoid(pre[:, m:])
  exponent = -np.abs(p["alpha"])[:, None] + 1j * p["omega"][None]
  ys = []
  for t, x in enumerate(xs):
    s = sum(
      np.exp(exponent * (t - k)) * x_tilde[k][:, None] for k in range(t + 1)
    )
    flat = np.stack([np.concatenate([r.real, r.imag]) for r in s]).ravel()
    z = flat @ p["mix"] + p["mix_b"]
    gate, skip = np.split(x @ p["post"] + p["post_b"], [d])
    gate = sigmoid(gate)
    normed = (z - z.mean()) / np.sqrt(z.var() + 1e-5)
    ys.append(normed * gate + skip * (1 - gate))
  return s, np.stack(ys)


def test_paper_equation():
  cell = memzoo.tiny(NAME)
  params, xs = checks.drawn(cell), checks.inputs(cell, 19)
  want = paper(cell, params, xs)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((state.s, ys), want) < checks.FORWARD, form


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_parity_with_memax():
  """The states after every input, a reset among them, of memax, a library by
  the paper's author (its read-out departs from the paper: it normalises after
  the gate, and skips the map of what is skipped)."""
  eqx = pytest.importorskip("equinox")
  theirs = pytest.importorskip("memax.equinox.semigroups.ffm")
  cell = memzoo.tiny(NAME)
  params, xs = checks.drawn(cell), checks.inputs(cell, 19)
  reset = np.arange(19) == 8
  with jax.numpy_dtype_promotion("standard"):
    model = theirs.FFM(6, 5, 3, jax.random.key(0))
    (new, gate), (new_b, gate_b) = (
      np.split(np.asarray(params[k]).T, 2) for k in ("pre", "pre_b")
    )
    model = eqx.tree_at(
      lambda m: (
        m.pre.weight, m.pre.bias, m.gate_in.linear.weight,
        m.gate_in.linear.bias, m.algebra.algebra.params,
      ),
      model,
      (new, new_b, gate, gate_b, (params["alpha"], params["omega"])),
    )  # fmt: skip
    start = model.initialize_carry()
    ((want, _), _), _ = model(start, (jnp.asarray(xs), jnp.asarray(reset)))
  run = lambda n: memzoo.scan(
    cell, params, None, xs, reset=reset, mask=jnp.arange(19) <= n,
    implementation="assoc",
  )[0].s  # fmt: skip
  got = jax.jit(jax.vmap(run))(jnp.arange(19))
  assert checks.relative(got, want) < checks.FORWARD


def test_signature_behaviour():
  """It forgets: an input's trace halves every ln 2 / |α_j| steps, at the start
  from one step to a hundredth left at max_period, and turns at its clock's
  period; and from that it learns what came four steps before."""
  cell = memzoo.make(NAME, d_model=6)
  params = cell.init(jax.random.key(0))
  params |= {"pre_b": jnp.zeros(64)}
  xs = jnp.zeros((1025, 6)).at[0].set(1.0)
  run = jax.jit(
    lambda n: (
      memzoo.scan(
        cell,
        params,
        None,
        xs,
        mask=jnp.arange(1025) <= n,
        implementation="scan",
      )[0].s
    )
  )
  first = np.asarray(run(0))
  alpha = np.abs(np.asarray(params["alpha"], np.float64))
  for n in (1, 4, 37, 1024):
    left = np.asarray(run(n)) / first
    want = np.exp(-alpha * n)
    seen = want > 1e-30
    np.testing.assert_allclose(
      np.abs(left)[seen], np.tile(want[seen][:, None], 4), rtol=1e-3
    )
    turned = np.exp(2j * np.pi * n / np.linspace(1, 1024, 4))
    np.testing.assert_allclose(
      (left / np.abs(left).clip(1e-30))[seen] / turned, 1, atol=3e-3
    )
  half_lives = np.log(2) / alpha
  assert 1.0 < half_lives[0] < 1.1 and half_lives[-1] > 150
  np.testing.assert_allclose(want[-1], 0.01, rtol=1e-3)

  cell = memzoo.make(NAME, d_model=6, num_traces=8, max_period=16.0)
  _, accuracy = checks.learn(cell, four_before, 300, rate=2e-2)
  assert accuracy > 0.95, accuracy


def four_before(key, length=16):
  """Bits; every output is to name the one four steps before."""
  bits = jax.random.bernoulli(key, 0.5, (length,))
  xs = jnp.zeros((length, 6)).at[:, 0].set(jnp.where(bits, 1.0, -1.0))
  known = jnp.arange(length) >= 4
  targets = jnp.where(known, jnp.roll(bits, 4), False)
  return xs, targets.astype(jnp.int32), known.astype(jnp.float32)


def test_episodes_do_not_mix():
  """Two episodes in one sequence are two sequences."""
  cell = memzoo.tiny(NAME)
  params, xs = checks.drawn(cell), checks.inputs(cell, 20)
  reset = memzoo.reset_from_done(jnp.arange(20) == 6)
  state, ys = memzoo.scan(cell, params, None, xs, reset=reset)
  ends = [memzoo.scan(cell, params, None, x) for x in (xs[:7], xs[7:])]
  whole = np.concatenate([ys for _, ys in ends])
  assert checks.relative(ys, whole) < checks.FORWARD
  assert checks.relative(state, ends[1][0]) < checks.FORWARD


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(num_traces=0), "num_traces must be a positive integer"),
    (dict(min_period=0.0), "0 < min_period <= max_period"),
    (dict(max_period=0.5), "0 < min_period <= max_period"),
    (dict(forgotten_at=1.0), r"forgotten_at must be in \(0, 1\)"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="FastAndForgetful: .*" + message):
    memzoo.make(NAME, d_model=4, **options)
