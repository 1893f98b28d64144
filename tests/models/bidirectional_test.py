"""S5 in both directions, against Smith et al. 2022 (arXiv:2208.04933) and the
authors' code (lindermanlab/S5, s5/ssm.py)."""

import checks
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memzoo
from memzoo import models
from memzoo.models import bidirectional

FORMS = ("scan", "assoc", "chunk")


def drawn(cell):
  params = bidirectional.init_both_ways(cell, jax.random.key(0))
  r = np.random.default_rng(2)
  return {
    k: x + 0.2 * r.normal(size=x.shape).astype(np.float32)
    for k, x in params.items()
  }


def paper(params, us, kind="zoh"):
  """x→ and x← a step at a time, all N states; y = [C̃_1, C̃_2] [x→; x←] + D u."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  pair = lambda z: np.concatenate([z, z.conj()])
  a, dt = pair(p["re"] + 1j * p["im"]), np.tile(np.exp(p["log_dt"]), 2)
  b = pair((p["b_re"] + 1j * p["b_im"]).T)
  if kind == "zoh":
    a_bar = np.exp(dt * a)
    b_bar = ((a_bar - 1) / a)[:, None] * b
  else:
    a_bar = (1 + dt * a / 2) / (1 - dt * a / 2)
    b_bar = (dt / (1 - dt * a / 2))[:, None] * b
  first, second = (
    pair(c).T for c in np.split(p["c_re"] + 1j * p["c_im"], 2)
  )
  us = np.asarray(us, np.float64)
  steps = len(us)
  forward, backward = np.zeros((2, steps, len(a)), np.complex128)
  for k in range(steps):
    forward[k] = a_bar * (forward[k - 1] if k else 0) + b_bar @ us[k]
  for k in reversed(range(steps)):
    later = backward[k + 1] if k + 1 < steps else 0
    backward[k] = a_bar * later + b_bar @ us[k]
  joined = np.concatenate([first, second], axis=1)
  y = np.concatenate([forward, backward], axis=1) @ joined.T
  assert np.abs(y.imag).max() < 1e-12
  return y.real + p["d"] * us


@pytest.mark.parametrize("kind", ("zoh", "bilinear"))
def test_paper_equation(kind):
  cell = memzoo.tiny("s5", discretization=kind)
  params, us = drawn(cell), checks.inputs(cell, 21)
  run = lambda form: bidirectional.both_ways(
    cell, params, us, implementation=form
  )
  outs = jax.jit(lambda: [run(form) for form in FORMS])()
  for form, ys in zip(FORMS, outs):
    assert checks.relative(ys, paper(params, us, kind)) < checks.FORWARD, form


@pytest.mark.nans
def test_resets_and_masks():
  """Every sequence is read as if it were alone, and what is absent is not
  read, whatever it holds."""
  cell = memzoo.tiny("s5")
  params, us = drawn(cell), checks.inputs(cell, 17)
  reset = np.isin(np.arange(17), (0, 4, 5, 11))
  mask = ~np.isin(np.arange(17), (0, 5, 8, 9, 16))  # 5 takes its reset along
  want = np.zeros((17, 5))
  for start, end in ((0, 4), (4, 11), (11, 17)):
    places = [t for t in range(start, end) if mask[t]]
    want[places] = paper(params, us[places])
  dirty = np.where(mask[:, None], us, np.float32(np.nan))
  run = lambda form: bidirectional.both_ways(
    cell, params, dirty, reset=jnp.asarray(reset), mask=jnp.asarray(mask),
    implementation=form,
  )  # fmt: skip
  for form, ys in zip(FORMS, jax.jit(lambda: [run(f) for f in FORMS])()):
    assert checks.relative(ys, want) < checks.FORWARD, form
    np.testing.assert_array_equal(ys[~mask], 0)
  gradient = jax.jit(
    jax.jacobian(
      lambda us: bidirectional.both_ways(
        cell, params, us, reset=jnp.asarray(reset), mask=jnp.asarray(mask)
      )
    )
  )(jnp.asarray(us))
  # [17, D, 17, D] -> which output feels which input.
  felt = np.abs(gradient).max(axis=(1, 3)) > 0
  document = np.cumsum(reset & mask)
  alike = document[:, None] == document
  np.testing.assert_array_equal(felt, alike & mask[:, None] & mask)


def test_start():
  """C̃_1 and C̃_2 differ, each of the cell's own variance; the rest is one."""
  cell = memzoo.make("s5", d_model=64, d_state=64)
  params = bidirectional.init_both_ways(cell, jax.random.key(0))
  assert params["c_re"].shape == (64, 64) and params["b_re"].shape == (64, 32)
  for part in np.split(params["c_re"] ** 2 + params["c_im"] ** 2, 2):
    assert abs(part.mean() * 64 / 2 - 1) < 0.1
  first, second = np.split(params["c_re"], 2)
  assert np.abs(first - second).mean() > 0.05


def test_signature_behaviour():
  """Noise comes back 4 steps before it comes: both ways can, one way knows
  nothing of it."""
  cell = memzoo.make("s5", d_model=1, d_state=16, dt_min=0.05, dt_max=0.5)
  optimizer = optax.adam(1e-2)

  def error(layer):
    def loss(params, key):
      us = jax.random.normal(key, (16, 32, 1))
      ys = jax.vmap(lambda us: layer(params, us))(us)
      return jnp.mean((ys[:, :-4] - us[:, 4:]) ** 2)

    def step(carry, key):
      params, state = carry
      grads = jax.grad(loss)(params, key)
      with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(grads, state)
      return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
      keys = jax.random.split(jax.random.key(1), 400)
      carry = params, optimizer.init(params)
      params = jax.lax.scan(step, carry, keys)[0][0]
      return loss(params, jax.random.key(2))

    return train

  key = jax.random.key(0)
  both = error(lambda params, us: bidirectional.both_ways(cell, params, us))
  both = both(bidirectional.init_both_ways(cell, key))
  one = error(lambda params, us: memzoo.scan(cell, params, None, us)[1])
  one = one(cell.init(key))
  assert both < 0.2 and one > 0.9, (both, one)


def classifier(**options):
  cell = memzoo.tiny("s5")
  return models.SequenceClassifier(
    cell, 2, 3, d_input=2, rngs=nnx.Rngs(0), bidirectional=True, mlp_width=7,
    **options,
  )  # fmt: skip


def test_in_a_model():
  """Padding at either end and between changes nothing, and a sequence that was
  packed behind another is read as if alone."""
  model = classifier(conv_size=2)
  xs = np.random.default_rng(0).normal(size=(1, 6, 2)).astype(np.float32)
  call = jax.jit(lambda xs, reset, mask: model(None, xs, reset=reset, mask=mask))
  state, want = call(xs, None, None)
  assert state.layers[0].memory == ()
  places = np.asarray([1, 2, 4, 5, 6, 8])
  padded = np.full((1, 10, 2), np.nan, np.float32)
  padded[:, places] = xs
  mask = np.isin(np.arange(10), places)[None]
  got = call(padded, None, jnp.asarray(mask))[1]
  assert checks.relative(got, want) < checks.FORWARD
  packed = np.concatenate([xs[:, ::-1] + 1, xs], axis=1)
  reset = np.arange(12)[None] == 6
  got = call(packed, jnp.asarray(reset), None)[1]
  assert checks.relative(got, want) < checks.FORWARD
  again = models.from_config(models.to_config(model), nnx.Rngs(1))
  assert again.config() == model.config() and again.config()["bidirectional"]


def test_every_place_feels_every_other():
  model = models.SequenceRegressor(
    memzoo.tiny("s5"), 1, 1, d_input=1, rngs=nnx.Rngs(0), bidirectional=True
  )
  jacobian = jax.jit(
    jax.jacobian(lambda xs: model(None, xs[None])[1][0, :, 0])
  )(jnp.ones((5, 1)) * jnp.arange(5.0)[:, None])
  assert (np.abs(jacobian[..., 0]) > 0).all()


def test_bad_arguments():
  with pytest.raises(ValueError, match="the cell must be 's5', got 'gru'"):
    models.SequenceClassifier(
      memzoo.tiny("gru"), 1, 3, d_input=2, rngs=nnx.Rngs(0), bidirectional=True
    )
  with pytest.raises(ValueError, match="LanguageModel: bidirectional blocks"):
    models.LanguageModel(
      memzoo.tiny("s5"), 1, 9, rngs=nnx.Rngs(0), bidirectional=True
    )
  model = classifier()
  with pytest.raises(ValueError, match=r"mask must be bool \[2, 4\]"):
    model(None, jnp.zeros((2, 4, 2)), mask=jnp.ones((2, 3), bool))
  with pytest.raises(NotImplementedError, match="no 'fft' form"):
    model(None, jnp.zeros((2, 4, 2)), implementation="fft")
