"""`window`: causal sliding-window attention with sinks."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo

FORMS = ("step", "scan", "chunk")


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def perturbed(cell):
  params = jax.jit(cell.init)(jax.random.key(0))
  return jax.tree.map(lambda x: x + 0.1 * draw(9, *x.shape), params)


def run(cell, forms=FORMS):
  """One jitted call: (params, xs) -> {form: (state, ys)} from a fresh state."""
  return jax.jit(
    lambda p, xs, reset=None: {
      form: memzoo.scan(cell, p, None, xs, reset=reset, implementation=form)
      for form in forms
    }
  )


def oracle(cell, params, xs):
  """Vaswani et al. 2017 section 3.2.2 with the neighbourhood of Beltagy et
  al. 2020 section 3.1 (causal) and the sinks of Xiao et al. 2023 section 3.2;
  q and k rotated by Su et al. 2021 eq. 15; heads share keys in groups."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, g, width = cell.num_heads, cell.groups, cell.width
  u = np.asarray(xs, np.float64) @ p["qkv"]
  if cell.conv_size:
    kernel, rows = p["conv"], len(u)
    u = np.stack([
      sum(
        kernel[-1 - lag] * u[t - lag] for lag in range(cell.conv_size) if t >= lag
      )
      for t in range(rows)
    ])  # fmt: skip
  u = u.reshape(len(u), h + 2 * g, width)

  def turn(x, t):
    if not cell.rotary:
      return x
    y = x.copy()
    for i in range(width // 2):
      a = t * cell.rotary_base ** (-2 * i / width)
      pair = x[i] + 1j * x[i + width // 2]
      pair = pair * np.exp(1j * a)
      y[i], y[i + width // 2] = pair.real, pair.imag
    return y

  window, ys = cell.capacity - cell.sinks, []
  for t in range(len(u)):
    seen = [j for j in range(t + 1) if t - j < window or j < cell.sinks]
    o = []
    for head in range(h):
      group = head // (h // g)
      q = turn(u[t, head], t)
      scores = np.array(
        [q @ turn(u[j, h + group], j) / np.sqrt(width) for j in seen]
      )
      w = np.exp(scores - scores.max())
      w /= w.sum()
      o.append(sum(a * u[j, h + g + group] for a, j in zip(w, seen)))
    ys.append(np.concatenate(o) @ p["out"])
  return np.stack(ys)


@pytest.mark.parametrize(
  "options",
  [
    dict(d_model=6, capacity=5),
    dict(d_model=8, num_heads=4, num_kv_heads=2, capacity=6, sinks=2),
    dict(d_model=6, num_heads=2, head_dim=3, rotary=False, capacity=4, sinks=3),
    dict(d_model=6, num_heads=3, capacity=5, sinks=1, conv_size=4),
    dict(d_model=6, capacity=17, sliding=False),
  ],
)
def test_paper_equation(options):
  cell = memzoo.make("window", **options)
  params = perturbed(cell)
  xs = draw(1, 17, cell.d_model)
  want = oracle(cell, params, xs)
  for _, ys in run(cell)(params, xs).values():
    assert checks.relative(ys, want) < checks.FORWARD


def test_signature_behaviour():
  """It forgets at exactly W, and the sinks stay."""
  cell = memzoo.make("window", d_model=6, num_heads=1, capacity=7, sinks=2)
  window, length, params = 5, 16, perturbed(cell)
  xs = draw(2, length, 6)
  batch = np.stack([xs] * (length + 1))
  batch[np.arange(length) + 1, np.arange(length)] += 1.0
  for _, ys in jax.jit(jax.vmap(run(cell), (None, 0)))(params, batch).values():
    plain, *others = np.asarray(ys)
    for t, other in enumerate(others):
      changed = np.abs(other - plain).max(axis=1) > 0
      last = length if t < 2 else min(t + window, length)
      want = np.zeros(length, bool)
      want[t:last] = True  # W − 1 steps later it is still seen, W later not
      np.testing.assert_array_equal(changed, want)


def test_segments_start_at_position_zero_and_keep_their_own_sinks():
  cell = memzoo.make("window", d_model=6, capacity=5, sinks=1, conv_size=3)
  params = perturbed(cell)
  xs = draw(3, 14, 6)
  reset = np.zeros(14, bool)
  reset[6] = True
  for _, ys in run(cell)(params, xs, reset=reset).values():
    assert checks.relative(ys[:6], oracle(cell, params, xs[:6])) < 1e-5
    assert checks.relative(ys[6:], oracle(cell, params, xs[6:])) < 1e-5


def test_relative_by_nature():
  """Without sinks the output depends on the window alone, wherever it is."""
  cell = memzoo.make("window", d_model=6, capacity=4)
  params = perturbed(cell)
  xs = draw(4, 9, 6)
  ahead = draw(5, 50, 6)
  call = run(cell, ("chunk",))
  _, ys = call(params, xs)["chunk"]
  _, late = call(params, np.concatenate([ahead, xs]))["chunk"]
  assert checks.relative(late[-6:], ys[-6:]) < 1e-4
  assert checks.relative(late[-9:], ys[-9:]) > 1e-2


def test_unbounded_attention_has_a_length():
  cell = memzoo.make("window", d_model=6, capacity=5, sliding=False)
  params = perturbed(cell)
  assert cell.max_length == 5
  assert memzoo.make("window", d_model=6, capacity=5).max_length is None
  _, ys = run(cell, ("chunk",))(params, np.ones((5, 6), np.float32))["chunk"]
  assert np.isfinite(ys).all()
  with pytest.raises(ValueError, match="got 6 inputs, holds at most 5"):
    memzoo.scan(cell, params, None, jnp.ones((6, 6)))


def test_ring_in_half_precision():
  cell = memzoo.make("window", d_model=6, capacity=5, sinks=1, dtype="bfloat16")
  exact = memzoo.make("window", d_model=6, capacity=5, sinks=1)
  params = perturbed(cell)
  xs = draw(6, 12, 6)
  got = run(cell)(params, xs)
  state, want = got["step"]
  assert state.ring.k.dtype == state.ring.v.dtype == jnp.bfloat16
  assert memzoo.state_bytes(cell) < memzoo.state_bytes(exact)
  for form in ("scan", "chunk"):
    state, ys = got[form]
    assert state.ring.k.dtype == jnp.bfloat16 and ys.dtype == jnp.float32
    assert checks.relative(ys, want) < 1e-5
  full = run(exact, ("step",))(params, xs)["step"][1]
  assert 1e-5 < checks.relative(want, full) < 0.02


def test_state_size():
  cell = memzoo.make(
    "window", d_model=12, num_heads=6, num_kv_heads=2, capacity=10, conv_size=4
  )
  # Keys and values of two heads of width 2, and three rows of the convolution.
  assert memzoo.state_size(cell) == 2 * 2 * 10 * 2 + 3 * (6 + 4) * 2


@pytest.mark.parametrize(
  "options, words",
  [
    (dict(capacity=0), "capacity must be a positive integer, got 0"),
    (dict(num_heads=4), "num_heads=4 must divide d_model=6"),
    (dict(num_heads=2), "even width per head, got 3"),
    (
      dict(num_heads=3, num_kv_heads=2),
      "num_kv_heads=2 must divide num_heads=3",
    ),
    (dict(capacity=4, sinks=4), "sinks must be 0 … capacity − 1, got 4"),
    (dict(sinks=-1), "sinks"),
    (dict(conv_size=-1), "conv_size must be 0 or more, got -1"),
    (dict(rotary_base=0.0), "rotary_base must be above 0"),
    (dict(dtype="int8"), "dtype must be one of"),
    (dict(head_dim=0), "head_dim must be a positive integer"),
  ],
)
def test_bad_options(options, words):
  with pytest.raises(ValueError, match=words):
    memzoo.make("window", d_model=6, **options)
