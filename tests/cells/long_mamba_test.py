"""LongMamba against Ye et al. 2025 (arXiv:2504.16053): global channels and
token filtering, in Mamba-2 (arXiv:2405.21060, eq. 2)."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def silu(x):
  return x / (1 + np.exp(-x))


def doubled(params):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def paper(cell, params, us):
  """Mamba-2 a token and a head at a time, where Ā' is 1 and B̄' is 0 in tokens
  below the head's threshold."""
  p = doubled(params)
  e, heads, n = len(p["norm"]), len(p["d"]), cell.d_state
  g, size, width = cell.num_groups, e // heads, p["conv"].shape[1]
  h, seen = np.zeros((heads, n, size)), [np.zeros(width)] * 2
  ys, passed = [], 0
  for u in np.asarray(us, np.float64):
    z, xbc, dt = np.split(u @ p["in"], [e, e + width])
    seen = [*seen, xbc][-3:]
    xbc = silu(p["conv_bias"] + sum(k * s for k, s in zip(p["conv"], seen)))
    x, b, c = np.split(xbc, [e, e + g * n])
    dt = np.log1p(np.exp(dt + p["dt_bias"]))
    y = np.zeros((heads, size))
    for i in range(heads):
      group = slice(i * g // heads * n, (i * g // heads + 1) * n)
      x_i = x[i * size : (i + 1) * size]
      if dt[i] < p["buffers"]["threshold"][i]:
        decay, write = 1.0, 0.0
        passed += 1
      else:
        decay = np.exp(-dt[i] * np.exp(p["a_log"][i]))
        write = dt[i] * np.outer(b[group], x_i)
      h[i] = decay * h[i] + write
      y[i] = c[group] @ h[i] + p["d"][i] * x_i
    y = np.split(y.ravel() * silu(z), g)
    y = np.concatenate([v / np.sqrt(np.mean(v**2) + 1e-5) for v in y])
    ys.append((y * p["norm"]) @ p["out"])
    seen = seen[-2:]
  return (h, np.stack(seen)), np.stack(ys), passed


def drawn(cell, threshold):
  """Parameters of a Mamba-2 of the same sizes, and thresholds."""
  params = checks.drawn(memzoo.tiny("mamba2"), 0.2)
  params["dt_bias"] += 3.0
  threshold = jnp.full((cell.num_heads,), threshold, jnp.float32)
  return params | {"buffers": {"threshold": threshold}}


def test_paper_equation():
  cell, us = memzoo.tiny("long_mamba"), checks.inputs(memzoo.tiny("mamba2"), 21)
  params = drawn(cell, 0.4)
  want, ys_want, passed = paper(cell, params, us)
  assert 0.2 < passed / (21 * cell.num_heads) < 0.8
  for form, state, ys in checks.forms(cell, params, us):
    got = (state.h, state.conv), ys
    assert checks.relative(got, (want, ys_want)) < checks.FORWARD, form


def test_calibration():
  """A head that has decayed by less than θ is global, and its threshold leaves
  of a longer sequence the decay of the trained length; a head that forgets has
  none, and nothing is filtered in what was trained on."""
  cell = memzoo.tiny("long_mamba", global_decay=0.05, clamp_top=0.1)
  params = drawn(cell, 0.0)
  params["a_log"] = jnp.log(jnp.asarray([0.02, 4.0, 0.01, 3.0]))
  us = np.random.default_rng(4).normal(size=(400, 6)).astype(np.float32)
  short = us[None, :40]
  new = cell.calibrate(params, short, 400)
  threshold = np.asarray(new["buffers"]["threshold"])
  np.testing.assert_array_equal(threshold == 0, [False, True, False, True])
  p = doubled(params)
  dt = lambda us: np.log1p(np.exp((us @ p["in"])[:, -4:] + p["dt_bias"]))
  # By hand: sorted, the largest tenth cut to the last of them, stretched.
  one = np.sort(dt(us[:40].astype(np.float64)), axis=0)[::-1]
  one = np.minimum(one, one[3])
  place = np.clip((np.arange(400) + 0.5) / 10 - 0.5, 0, 39)
  for i in (0, 2):
    longer = np.interp(place, np.arange(40), one[:, i])
    kept = np.flatnonzero(np.cumsum(longer) > one[:, i].sum())[0] + 1
    np.testing.assert_allclose(threshold[i], longer[kept], rtol=1e-5)
    # Of the longer sequence about as much is kept as the short one has.
    steps = np.minimum(dt(us.astype(np.float64))[:, i], one[0, i])
    kept = steps[steps >= threshold[i] * (1 - 1e-6)].sum()
    assert 0.5 < kept / one[:, i].sum() < 2 < 8 < steps.sum() / one[:, i].sum()
  same = cell.calibrate(params, short, 40)
  assert not np.any(same["buffers"]["threshold"])


def test_signature_behaviour():
  """A layer that learnt to hold a bit over 16 inputs loses it over 256; with
  thresholds, and no more training, it holds it."""
  cell = memzoo.make("long_mamba", d_model=6, d_state=4, head_dim=2)
  draw = lambda key, length: checks.marked_bit(key, length)
  params, accuracy = checks.learn(cell, lambda k: draw(k, 16), 300, rate=2e-2)
  assert accuracy > 0.98, accuracy
  keys = jax.random.split(jax.random.key(5), 128)
  xs, targets, _ = jax.vmap(lambda key: draw(key, 256))(keys)

  @jax.jit
  def right(params):
    run = lambda x: memzoo.scan(cell, params, None, x, implementation="chunk")
    ys = jax.vmap(run)(xs)[1]
    return jnp.mean(jnp.argmax(ys[:, -8:], axis=-1) == targets[:, -8:])

  known = jax.vmap(lambda key: draw(key, 16)[0])(keys[:16])
  before, after = right(params), right(cell.calibrate(params, known, 256))
  assert before < 0.6 and after > 0.95, (before, after)


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(global_decay=1.5), r"global_decay must be in \[0, 1\], got 1.5"),
    (dict(clamp_top=-0.1), r"clamp_top must be in \[0, 1\]"),
    (dict(expand=0.7), "expand · d_model must be a positive whole number"),
    (dict(dt_min=0.2), "needs 0 < dt_min <= dt_max"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="LongMamba: .*" + message):
    memzoo.make("long_mamba", d_model=8, **options)


def test_bad_sequences():
  cell = memzoo.tiny("long_mamba")
  params = drawn(cell, 0.0)
  with pytest.raises(ValueError, match=r"xs must be \[B, L, 6\]"):
    cell.calibrate(params, jnp.zeros((9, 6)), 20)
