"""RWKV-6 against Peng et al. 2024 (arXiv:2404.05892), eq. 14 to 22."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def paper(cell, params, xs):
  """Eq. 14 to 18 and 20 one token at a time; wkv_t by the sum of eq. 19, over
  all earlier tokens."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, k, rank = cell.num_heads, cell.head_dim, cell.mix_rank
  before = np.zeros(cell.d_model)
  past, ys = [], []
  for x in np.asarray(xs, np.float64):
    towards = x + (before - x) * p["mix_x"]

    def ddlerp(n):
      low = np.tanh(towards @ p["mix_in"][:, n * rank : (n + 1) * rank])
      return x + (before - x) * (p["mix"][n] + low @ p["mix_out"][n])

    d = np.tanh(ddlerp(0) @ p["decay_in"]) @ p["decay_out"] + p["decay"]
    w = np.exp(-np.exp(d))
    key, v, r, g = (
      ddlerp(n) @ p[c] for n, c in ((1, "k"), (2, "v"), (3, "r"), (4, "g"))
    )
    out = []
    for i in range(h):
      part = slice(i * k, (i + 1) * k)
      wkv = np.diag(p["bonus"][i]) @ np.outer(key[part], v[part])
      for a, (key_a, v_a, _) in enumerate(past):
        between = np.ones(k)
        for _, _, w_j in past[a + 1 :]:
          between = between * w_j[part]
        wkv += np.diag(between) @ np.outer(key_a[part], v_a[part])
      o = r[part] @ wkv
      o = (o - o.mean()) / np.sqrt(o.var() + 64e-5)
      o = o * p["norm_scale"][i] + p["norm_bias"][i]
      out.append(g[part] * sigmoid(g[part]) * o)
    ys.append(np.concatenate(out) @ p["out"])
    past.append((key, v, w))
    before = x
  return before, np.stack(ys)


def test_paper_equation():
  cell = memzoo.tiny("rwkv6")
  params = checks.drawn(cell)
  params["decay"] += 3.0
  xs = checks.inputs(cell, 9)
  last, want = paper(cell, params, xs)
  for form, state, ys in checks.forms(cell, params, xs):
    assert checks.relative((state.x, ys), (last, want)) < checks.FORWARD, form


def test_initialization():
  """The authors' starting values, which depend on the layer."""
  cell = memzoo.make(
    "rwkv6", d_model=4, num_heads=2, head_dim=2, layer_index=1, num_layers=3
  )
  params = jax.jit(cell.init)(jax.random.key(0))
  np.testing.assert_allclose(
    params["mix_x"], 1 - (np.arange(4) / 4) ** (2 / 3), rtol=1e-6
  )
  np.testing.assert_allclose(
    params["mix"][2], 1 - (np.arange(4) / 4) ** (2 / 3) - 0.15, rtol=1e-5
  )
  np.testing.assert_allclose(
    params["mix"][3], 1 - (np.arange(4) / 4) ** (1 / 3), rtol=1e-5
  )
  np.testing.assert_allclose(
    params["decay"], -6 + 5 * (np.arange(4) / 3) ** 1.35, rtol=1e-5
  )
  np.testing.assert_allclose(
    params["bonus"].ravel(),
    0.5 * (1 - np.arange(4) / 3) + [0, 0.1, -0.1, 0],
    atol=1e-6,
  )


def test_no_decay_is_none_and_a_great_one_is_all():
  """log w at both ends: w = 1 to rounding, and w = 0 exactly, with finite
  gradients, in every form."""
  cell = memzoo.tiny("rwkv6")
  params = checks.drawn(cell)
  xs = checks.inputs(cell, 5)
  warm = cell.initial_state(params)
  warm = warm._replace(s=jnp.ones_like(warm.s))
  for form in ("step", "scan", "chunk"):

    def after(decay, form=form):
      p = {**params, "decay": jnp.full_like(params["decay"], decay)}
      zero = {**p, "k": 0 * p["k"]}
      state, ys = memzoo.scan(cell, zero, warm, xs, implementation=form)
      return jnp.sum(ys), state.s

    run = jax.jit(jax.grad(after, has_aux=True))
    np.testing.assert_array_equal(run(-80.0)[1], warm.s)
    grad, s = run(300.0)
    assert not s.any() and np.isfinite(grad)


def follows(key, length=10):
  """Which symbol came just before the marked one? Input [symbol 4, marked]."""
  k_symbols, k_when = jax.random.split(key)
  symbols = jax.random.randint(k_symbols, (length,), 0, 4)
  when = jax.random.randint(k_when, (), 1, length - 1)
  xs = jnp.zeros((length, 8)).at[jnp.arange(length), symbols].set(1.0)
  xs = xs.at[when, 4].set(1.0)
  targets = jnp.zeros(length, jnp.int32).at[-1].set(symbols[when - 1])
  return xs, targets, jnp.zeros(length).at[-1].set(1.0)


def test_signature_behaviour():
  """The current token is read by the bonus alone, u (r·k) v, whatever its
  decay, which its own write does not feel before the next token; token shift
  makes it learn what came just before a mark."""
  cell = memzoo.tiny("rwkv6")
  params = checks.drawn(cell)
  x, empty = checks.inputs(cell, 1), cell.initial_state(params)
  run = jax.jit(lambda p, s: memzoo.scan(cell, p, s, x))
  out = lambda p: run(p, empty)
  state, y = out(params)
  forgot, y_forgot = out({**params, "decay": params["decay"] + 9.0})
  np.testing.assert_array_equal(y, y_forgot)
  np.testing.assert_array_equal(state.s, forgot.s)
  assert state.s.any()
  # Without the bonus a fresh state reads nothing: the norm's bias alone.
  _, silent = out({**params, "bonus": 0 * params["bonus"]})
  _, bias = out({**params, "v": 0 * params["v"]})
  np.testing.assert_array_equal(silent, bias)
  assert checks.relative(y, silent) > 0.1
  # The next token decays it, and without a write of its own leaves w k v.
  no_write = {**params, "k": 0 * params["k"]}
  after, _ = run(no_write, state)
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  x0 = np.asarray(x[0], np.float64)  # twice the same input: no shift
  d = np.tanh(x0 @ p["decay_in"]) @ p["decay_out"] + p["decay"]
  w = np.exp(-np.exp(d)).reshape(2, 3, 1)
  np.testing.assert_allclose(after.s, w * state.s, rtol=1e-5)

  cell = memzoo.make(
    "rwkv6", d_model=8, num_heads=2, head_dim=4, mix_rank=4, decay_rank=4
  )
  _, accuracy = checks.learn(cell, follows, 300, rate=2e-2)
  assert accuracy > 0.95, accuracy


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(layer_index=1), "layer_index must be 0 … num_layers − 1 = 0, got 1"),
    (dict(mix_rank=0), "mix_rank must be a positive integer, got 0"),
  ],
)
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("rwkv6", d_model=8, **options)
