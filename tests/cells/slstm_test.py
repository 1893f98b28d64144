"""sLSTM against Beck et al. 2024 (arXiv:2405.04517), eq. 8-17."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def matrix(blocks):
  """[D, D] of blocks [N, N] that stand one under the other in [D, N]."""
  n = blocks.shape[1]
  full = np.zeros((blocks.shape[0], blocks.shape[0]))
  for at in range(0, blocks.shape[0], n):
    full[at : at + n, at : at + n] = blocks[at : at + n]
  return full


def paper(cell, params, xs):
  """Eq. 8 to 14, without the stabiliser: (h, c / n, log n), outputs."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  w, u = ([matrix(b) for b in np.split(p[k], 4, axis=1)] for k in "wu")
  b = np.split(p["b"], 4)
  h, c, n = np.zeros((3, cell.d_model))
  past, ys = np.zeros((cell.conv_size, cell.d_model)), []
  for x in np.asarray(xs, np.float64):
    seen = x
    if cell.conv_size:
      past = np.concatenate([past[1:], x[None]])
      seen = (past * p["conv"]).sum(0) + p["conv_bias"]
      seen = seen * sigmoid(seen)
    i, f, z, o = (
      a @ w[k] + h @ u[k] + b[k] for k, a in enumerate((seen, seen, x, x))
    )
    z, i, o = np.tanh(z), np.exp(i), sigmoid(o)  # (11, 12, 14)
    f = np.exp(f) if cell.forget_gate == "exp" else sigmoid(f)  # (13)
    c, n = f * c + i * z, f * n + i  # (8, 9)
    h = o * c / n  # (10)
    heads = h.reshape(cell.num_heads, -1)
    heads = heads - heads.mean(1, keepdims=True)
    heads = heads / np.sqrt((heads**2).mean(1, keepdims=True) + 1e-5)
    ys.append(heads.ravel() * p["norm"])
  return (h, c / n, np.log(n)), np.stack(ys)


def seen(state):
  """What does not depend on the stabiliser: h, c / n and log n."""
  h, c, n, m = state.memory
  return h, c / n, jnp.log(n) + m


@pytest.mark.parametrize(
  "options",
  (
    dict(),
    dict(forget_gate="exp", num_heads=3),
    dict(conv_size=0, num_heads=1),
  ),
)
def test_paper_equation(options):
  cell = memzoo.tiny("slstm", **options)
  params, xs = checks.drawn(cell), checks.inputs(cell, 9)
  want = paper(cell, params, xs)
  run = lambda form: memzoo.scan(cell, params, None, xs, implementation=form)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, ("step", "scan", "pallas"))))()
  for state, ys in outs:
    assert checks.relative((seen(state), ys), want) < checks.FORWARD


@pytest.mark.parametrize("shift", (-250.0, 0.0, 250.0))
def test_the_stabiliser_changes_nothing(shift):
  """Where ĩ runs from −300 to 300, which float32 cannot exponentiate and
  float64 can, the stabilised steps are the equations without it. ĩ and f̃ are
  multiples of 1/16, which float32 adds without error."""
  cell = memzoo.tiny("slstm", conv_size=0, forget_gate="exp")
  params, xs = checks.drawn(cell), checks.inputs(cell, 30)
  xs = np.round(4 * xs) / 4
  coarse = lambda x: jnp.round(4 * x) / 4
  w, b = params["w"].at[:, :3].multiply(20.0), params["b"]
  params |= {
    "w": w.at[:, :6].set(coarse(w[:, :6])),
    "u": params["u"].at[:, :6].set(0.0),
    "b": b.at[:12].set(coarse(b[:12])).at[:6].add(shift),
  }
  state, ys = memzoo.scan(cell, params, None, xs, implementation="scan")
  want = paper(cell, params, xs)
  assert checks.relative((seen(state), ys), want) < checks.FORWARD
  assert (state.memory.n >= 1).all()


def test_signature_behaviour():
  """It can revise what it stored: one input whose gate is far above all that
  came replaces a memory of any age, which a sigmoid can only add to; and one
  far below leaves it. And it learns to write one bit and to hold it."""
  cell = memzoo.make("slstm", d_model=6, num_heads=2, conv_size=0)
  params = checks.drawn(cell)
  params["u"] *= 0
  params["b"] = params["b"].at[6:12].set(100.0)  # f = 1: nothing is forgotten
  xs = jnp.asarray(checks.inputs(cell, 200))
  long, _ = memzoo.scan(cell, params, None, xs, implementation="scan")
  assert (jnp.log(long.memory.n) + long.memory.m > 3).all()
  ratio = lambda state: state.memory.c / state.memory.n
  x = xs[0]

  def after(write):
    p = params | {"b": params["b"].at[:6].set(write)}
    return ratio(cell.step(p, long, x)[0])

  fresh = ratio(cell.step(params, cell.initial_state(params), x)[0])
  np.testing.assert_allclose(after(60.0), fresh, rtol=1e-5)
  np.testing.assert_array_equal(after(-60.0), ratio(long))
  assert checks.relative(fresh, ratio(long)) > 0.1

  cell = memzoo.make("slstm", d_model=6, num_heads=1, conv_size=0)
  _, accuracy = checks.learn(cell, checks.marked_bit, 400, rate=3e-2)
  assert accuracy > 0.95, accuracy


def test_start():
  """R = 0; the forget gates of a head reach from σ(5) to σ(−7)."""
  cell = memzoo.make("slstm", d_model=8)
  params = cell.init(jax.random.key(0))
  assert not params["u"].any()
  np.testing.assert_allclose(params["b"][8:16:2], 5.0)
  np.testing.assert_allclose(params["b"][9:17:2], -7.0)
  assert memzoo.tiny("slstm", num_heads=6).init(jax.random.key(0))["b"][6] == 5


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(num_heads=4), "num_heads=4 must divide d_model=6"),
    (dict(forget_gate="tanh"), "forget_gate must be one of .*'sigmoid'"),
    (dict(conv_size=-1), "conv_size must be a positive integer"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="SLSTM: .*" + message):
    memzoo.tiny("slstm", **options)
