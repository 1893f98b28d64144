"""LongMamba in Mamba against Ye et al. 2025 (arXiv:2504.16053): global channels
and token filtering, in Mamba (arXiv:2312.00752, algorithm 2 and eq. 2)."""

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
  """Mamba a token and a channel at a time, where Ā' is 1 and B̄' is 0 for all
  states of a channel in tokens below its threshold. Also every Δ [T, E]."""
  p = doubled(params)
  width, channels = p["conv"].shape
  n, r = cell.d_state, p["dt"].shape[0]
  h, seen = np.zeros((channels, n)), [np.zeros(channels)] * (width - 1)
  ys, deltas = [], []
  for u in np.asarray(us, np.float64):
    x, z = np.split(u @ p["in"], 2)
    seen = [*seen, x][-width:]
    x = silu(p["conv_bias"] + sum(k * s for k, s in zip(p["conv"], seen)))
    low, b, c = np.split(x @ p["select"], [r, r + n])
    delta = np.log1p(np.exp(low @ p["dt"] + p["dt_bias"]))
    y = np.zeros(channels)
    for e in range(channels):
      decay, write = np.ones(n), np.zeros(n)
      if delta[e] >= p["buffers"]["threshold"][e]:
        decay = np.exp(-delta[e] * np.exp(p["a_log"][e]))
        write = delta[e] * b
      h[e] = decay * h[e] + write * x[e]
      y[e] = c @ h[e] + p["d"][e] * x[e]
    ys.append((y * silu(z)) @ p["out"])
    deltas.append(delta)
    seen = seen[1:]
  return (h, np.stack(seen)), np.stack(ys), np.stack(deltas)


def drawn(cell, threshold):
  """Parameters of a Mamba of the same sizes, and thresholds."""
  params = checks.drawn(memzoo.tiny("mamba"), 0.2)
  params["dt_bias"] += 3.0
  threshold = jnp.full((cell.d_inner,), threshold, jnp.float32)
  return params | {"buffers": {"threshold": threshold}}


def test_paper_equation():
  cell, us = memzoo.tiny("long_mamba1"), checks.inputs(memzoo.tiny("mamba"), 21)
  params = drawn(cell, 0.3)
  want, ys_want, deltas = paper(cell, params, us)
  assert 0.2 < np.mean(deltas < 0.3) < 0.8
  for form, state, ys in checks.forms(cell, params, us):
    got = (state.h, state.conv), ys
    assert checks.relative(got, (want, ys_want)) < checks.FORWARD, form


def test_calibration():
  """A channel whose decay, the mean of its states', leaves more than θ of the
  first input is global; its threshold leaves of a longer sequence the decay of
  the trained length. Others have none, and none has any in what was trained
  on."""
  cell = memzoo.tiny("long_mamba1", global_decay=1e-6, clamp_top=0.1)
  params = drawn(cell, 0.0)
  slow = np.arange(9) % 3 == 0
  params["a_log"] = jnp.where(slow[:, None], -3.0, 2.0) + params["a_log"]
  us = np.random.default_rng(4).normal(size=(2, 40, 6)).astype(np.float32)
  new = cell.calibrate(params, us, 400)
  threshold = np.asarray(new["buffers"]["threshold"])
  # By hand: sorted, the largest tenth cut to the last of them, stretched.
  a, place = -np.exp(doubled(params)["a_log"]), np.arange(400)
  place = np.clip((place + 0.5) / 10 - 0.5, 0, 39)
  reach, level, total, top = np.zeros((4, 9))
  for row in us:
    one = np.sort(paper(cell, params, row)[2], axis=0)[::-1]
    one = np.minimum(one, one[3])
    for e in range(9):
      reach[e] += np.prod(np.exp(one[:, e, None] * a[e]).mean(axis=1)) / 2
      longer = np.interp(place, np.arange(40), one[:, e])
      kept = np.flatnonzero(np.cumsum(longer) > one[:, e].sum())[0] + 1
      level[e] += longer[kept] / 2
      total[e] += one[:, e].sum() / 2
    top += one[0] / 2
  np.testing.assert_array_equal(reach > 1e-6, slow)
  np.testing.assert_allclose(threshold, np.where(slow, level, 0), rtol=1e-5)
  # Of a longer sequence about as much is kept as a short one has.
  us = np.random.default_rng(5).normal(size=(400, 6)).astype(np.float32)
  steps = np.minimum(paper(cell, params, us)[2], top)
  kept = np.where(steps >= threshold * (1 - 1e-6), steps, 0).sum(axis=0)
  assert (kept / total)[slow].max() < 2.5 and (kept >= total).all()
  assert (steps.sum(axis=0) > 8 * total).all()
  same = cell.calibrate(params, us[None, :40], 40)
  assert not np.any(same["buffers"]["threshold"])


def test_signature_behaviour():
  """A layer that learnt to hold a bit over 16 inputs loses it over 256; with
  thresholds, and no more training, it holds it."""
  cell = memzoo.make("long_mamba1", d_model=6, d_state=4)
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
  assert before < 0.7 and after > 0.9, (before, after)


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(global_decay=1.5), r"global_decay must be in \[0, 1\], got 1.5"),
    (dict(clamp_top=-0.1), r"clamp_top must be in \[0, 1\]"),
  ),
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match="LongMamba1: .*" + message):
    memzoo.make("long_mamba1", d_model=8, **options)


def test_bad_sequences():
  cell = memzoo.tiny("long_mamba1")
  params = drawn(cell, 0.0)
  with pytest.raises(ValueError, match=r"xs must be \[B, L, 6\]"):
    cell.calibrate(params, jnp.zeros((9, 6)), 20)
