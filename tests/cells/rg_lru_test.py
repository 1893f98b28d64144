"""RG-LRU against De et al. 2024 (arXiv:2402.19427), eq. 1-4 and figure 2c."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import kernels


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def matrix(blocks):
  """[R, R] of blocks [N, N] that stand one under the other in [R, N]."""
  n = blocks.shape[1]
  full = np.zeros((blocks.shape[0], blocks.shape[0]))
  for at in range(0, blocks.shape[0], n):
    full[at : at + n, at : at + n] = blocks[at : at + n]
  return full


def paper(params, us, whole_first):
  """The recurrent block, token by token."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  taps, width = p["conv"].shape
  w_a, w_x = map(matrix, np.split(p["gates"], 2, axis=1))
  b_a, b_x = np.split(p["gates_bias"], 2)
  a = sigmoid(p["lam"])
  h, past, ys = np.zeros(width), np.zeros((taps, width)), []
  for t, u in enumerate(np.asarray(us, np.float64)):
    first, second = np.split(u @ p["in"] + p["in_bias"], 2)
    past = np.concatenate([past[1:], first[None]])
    x = (past * p["conv"]).sum(0) + p["conv_bias"]
    r = sigmoid(x @ w_a + b_a)  # (1)
    i = sigmoid(x @ w_x + b_x)  # (2)
    a_t = a ** (8 * r)  # (3)
    scale = np.sqrt(1 - a_t**2)
    if whole_first and t == 0:
      scale = 1.0
    h = a_t * h + scale * (i * x)  # (4)
    ys.append((h * gelu(second)) @ p["out"] + p["out_bias"])
  return h, np.stack(ys)


@pytest.mark.parametrize("num_heads, whole_first", [(1, False), (2, True)])
def test_paper_equation(num_heads, whole_first):
  cell = memzoo.tiny("rg_lru", num_heads=num_heads, whole_first=whole_first)
  params = checks.drawn(cell)
  assert params["gates"].shape == (6, 2 * 6 // num_heads)
  us = checks.inputs(cell, 19)
  want = paper(params, us, whole_first)
  run = lambda form: memzoo.scan(cell, params, None, us, implementation=form)
  forms = ("step", *cell.implementations)
  with kernels.interpret():
    outs = jax.jit(lambda: list(map(run, forms)))()
  for form, (state, ys) in zip(forms, outs):
    assert checks.relative((state.h, ys), want) < checks.FORWARD, form
    assert state.seen == 1


def test_initialization():
  """a^c uniform in [0.9, 0.999]; LeCun's variance in every map."""
  cell = memzoo.make("rg_lru", d_model=16, d_rnn=4096, num_heads=512)
  p = cell.init(jax.random.key(0))
  decay = sigmoid(np.asarray(p["lam"], np.float64)) ** 8
  tenths = np.linspace(0.1, 0.9, 9)
  found = np.quantile((decay - 0.9) / 0.099, tenths)
  np.testing.assert_allclose(found, tenths, atol=0.03)
  for name, fan_in in (("in", 16), ("gates", 8), ("out", 4096)):
    assert abs(p[name].var() * fan_in - 1) < 0.05, name
  assert memzoo.make("rg_lru", d_model=8).width == 8


def shut(params, bias):
  """Parameters whose recurrence gate sees its bias alone."""
  r = params["lam"].shape[0]
  n = params["gates"].shape[1] // 2
  return params | {
    "gates": params["gates"].at[:, :n].set(0.0),
    "gates_bias": params["gates_bias"].at[:r].set(bias),
  }


def test_signature_behaviour():
  """With the recurrence gate shut the state is kept to the bit, whatever
  comes and however long; open, an input meets the decay a^c. And it learns
  to shut the gate on what does not matter: it holds one marked bit."""
  cell = memzoo.tiny("rg_lru")
  params = jax.tree.map(jnp.asarray, checks.drawn(cell))
  xs = jnp.asarray(checks.inputs(cell, 1000))
  state = cell.initial_state(params)._replace(
    h=jnp.linspace(-1.0, 1.0, 6), seen=jnp.int32(1)
  )
  for form in ("scan", "assoc", "chunk"):
    run = lambda p: memzoo.scan(cell, p, state, xs, implementation=form)[0].h
    np.testing.assert_array_equal(run(shut(params, -200.0)), state.h)
  # Open, and fed with nothing, it decays as a^(8 t).
  quiet = shut(params, 200.0) | {
    "conv": jnp.zeros_like(params["conv"]),
    "conv_bias": jnp.zeros_like(params["conv_bias"]),
  }
  h = memzoo.scan(cell, quiet, state, xs[:5])[0].h
  want = state.h * jax.nn.sigmoid(params["lam"]) ** 40
  np.testing.assert_allclose(h, want, rtol=1e-4, atol=1e-12)

  cell = memzoo.make("rg_lru", d_model=6, conv_size=1)
  _, accuracy = checks.learn(cell, checks.marked_bit, 300, rate=1e-2)
  assert accuracy > 0.95, accuracy


def test_gradients_where_the_decay_is_one():
  """The root's slope is infinite at 0; the gradients are not."""
  cell = memzoo.tiny("rg_lru")
  params = jax.tree.map(jnp.asarray, checks.drawn(cell))
  xs = jnp.asarray(checks.inputs(cell, 9))
  for bias in (-200.0, -80.0, -20.0):

    def loss(p):
      state, ys = memzoo.scan(cell, p, None, xs, implementation="scan")
      return checks.wave(state.h, ys)

    grads = jax.grad(loss)(shut(params, bias))
    assert all(np.isfinite(g).all() for g in grads.values()), bias


def test_whole_first_sees_every_start():
  """The first input that is there, from the start and after each reset."""
  cell = memzoo.tiny("rg_lru", conv_size=1)
  params = jax.tree.map(jnp.asarray, checks.drawn(cell))
  xs = jnp.asarray(checks.inputs(cell, 12))
  mask = jnp.ones((12,), bool).at[jnp.array([0, 1, 6])].set(False)
  reset = jnp.zeros((12,), bool).at[jnp.array([3, 6, 7])].set(True)
  run = lambda xs, **more: memzoo.scan(cell, params, None, xs, **more)[1]
  for form in ("step", "scan"):
    ys = run(xs, mask=mask, reset=reset, implementation=form)
    for start, stop in ((2, 3), (3, 6), (7, 12)):
      alone = run(xs[start:stop], implementation=form)
      np.testing.assert_allclose(ys[start:stop], alone, rtol=1e-5, atol=1e-6)
  off = dict(whole_first=False, conv_size=1)
  plain = memzoo.scan(memzoo.tiny("rg_lru", **off), params, None, xs)[1]
  assert checks.relative(plain[:1], run(xs)[:1]) > 1e-2


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(d_rnn=0), "d_rnn must be a positive integer"),
    (dict(num_heads=3), "num_heads=3 must divide d_rnn=4"),
    (dict(conv_size=0), "conv_size must be a positive integer"),
    (dict(c=0.0), "c must be above 0"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="RGLRU: .*" + message):
    memzoo.make("rg_lru", d_model=4, **options)
