"""HGRN against Qin et al. 2023 (arXiv:2311.04823), section 3.2."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def paper(cell, params, xs):
  """Token by token in complex128; γ is [Cumsum(softmax Γ)] before row k."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  n, bound = cell.width, 0.0
  if cell.layer_index:
    share = np.exp(p["bounds"])
    share /= share.sum(0)
    bound = share[: cell.layer_index].sum(0)
  h, ys = np.zeros(n, np.complex128), []
  for x in np.asarray(xs, np.float64):
    cr, ci, mu, *g = np.split(x @ p["w"] + p["b"], 5)
    c = silu(cr) + 1j * silu(ci)
    lam = bound + (1 - bound) * sigmoid(mu)
    h = lam * np.exp(1j * p["theta"]) * h + (1 - lam) * c
    y = silu(np.concatenate(g)) * np.concatenate([h.real, h.imag])
    y = (y - y.mean()) / np.sqrt(y.var() + 1e-5) * p["norm"] + p["norm_bias"]
    ys.append(y @ p["out"] + p["out_bias"])
  return h, np.stack(ys)


@pytest.mark.parametrize("layer", [0, 2])
def test_paper_equation(layer):
  cell = memzoo.tiny("hgrn", layer_index=layer)
  params, xs = checks.drawn(cell), checks.inputs(cell, 19)
  assert ("bounds" in params) == (layer > 0)
  want = paper(cell, params, xs)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((state.h, ys), want) < checks.FORWARD, form


def closed(cell, params, gate):
  """Parameters that write nothing, whose μ is σ(gate), the same always."""
  n = cell.width
  return params | {
    "w": params["w"].at[:, : 3 * n].set(0.0),
    "b": params["b"].at[: 2 * n].set(0.0).at[2 * n : 3 * n].set(gate),
  }


def test_lower_bounds_rise_with_the_layer():
  """At the start layer k of L forgets to k / L and no further."""
  xs = jnp.ones((1, 5))
  for layer in range(4):
    cell = memzoo.tiny("hgrn", layer_index=layer, num_layers=4)
    params = cell.init(jax.random.key(0))
    state = type(cell.initial_state(params))(jnp.ones((7,), jnp.complex64))
    after = memzoo.scan(cell, closed(cell, params, -1e3), state, xs)[0]
    np.testing.assert_allclose(jnp.abs(after.h), layer / 4, atol=1e-6)


def test_signature_behaviour():
  """What is held turns by θ a step, and shrinks by λ, which the input chooses
  above γ: an open gate keeps it for good, at its angle. What is freed is what
  is written: the state stays among the inputs. And it learns to hold a bit."""
  cell = memzoo.tiny("hgrn")
  params = jax.tree.map(jnp.asarray, checks.drawn(cell, 0.1))
  xs = jnp.asarray(checks.inputs(cell, 40))
  start = type(cell.initial_state(params))(jnp.ones((7,), jnp.complex64))
  for gate, size in ((1e3, 1.0), (0.0, None)):
    h = memzoo.scan(cell, closed(cell, params, gate), start, xs)[0].h
    if size is None:
      share = np.asarray(jax.nn.softmax(params["bounds"], axis=0)[0])
      size = (share + (1 - share) / 2) ** 40
    want = size * np.exp(40j * np.asarray(params["theta"], np.float64))
    np.testing.assert_allclose(h, want, rtol=1e-3, atol=1e-5)

  still = params | {"theta": jnp.zeros((7,))}
  step = lambda s, x: (cell.step(still, s, x)[0],) * 2
  _, states = jax.lax.scan(step, cell.initial_state(still), xs)
  c = jax.nn.silu(xs @ still["w"][:, :14] + still["b"][:14])
  assert (states.h.real.max(0) <= jnp.maximum(c[:, :7].max(0), 0)).all()
  assert (states.h.imag.min(0) >= jnp.minimum(c[:, 7:].min(0), 0)).all()

  cell = memzoo.make("hgrn", d_model=6)
  _, accuracy = checks.learn(cell, checks.marked_bit, 400, rate=1e-2)
  assert accuracy > 0.95, accuracy


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(d_state=0), "d_state must be a positive integer"),
    (dict(layer_index=2, num_layers=2), "layer_index must be 0 … .*1, got 2"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="HGRN: .*" + message):
    memzoo.make("hgrn", d_model=4, **options)
