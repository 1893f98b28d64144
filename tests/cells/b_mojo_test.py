"""B'MOJO-F against Zancato et al. 2024 (arXiv:2407.06324), section 4."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo

FORMS = ("step", "scan")


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shaken(cell):
  params = jax.jit(cell.init)(jax.random.key(0))
  return jax.tree.map(lambda x: x + 0.1 * draw(9, *x.shape), params)


def run(cell, params, xs):
  form = lambda f: memzoo.scan(cell, params, None, xs, implementation=f)
  return jax.jit(lambda: [form(f) for f in FORMS])()


def silu(z):
  return z / (1 + np.exp(-z))


def mamba(p, xs):
  """Gu and Dao 2023, algorithm 2, as z_t of every token."""
  taps, e = p["conv"].shape
  r, n = p["dt"].shape[0], p["a_log"].shape[1]
  u = np.concatenate([np.zeros((taps - 1, e)), xs @ p["in"][:, :e]])
  h, zs = np.zeros((e, n)), []
  for t, x in enumerate(xs):
    s = silu(np.sum(u[t : t + taps] * p["conv"], 0) + p["conv_bias"])
    chosen = s @ p["select"]
    delta = np.log1p(np.exp(chosen[:r] @ p["dt"] + p["dt_bias"]))[:, None]
    h = np.exp(-delta * np.exp(p["a_log"])) * h
    h = h + delta * np.outer(s, chosen[r : r + n])
    y = h @ chosen[r + n :] + p["d"] * s
    zs.append((y * silu(x @ p["in"][:, e:])) @ p["out"])
  return np.stack(zs)


def oracle(cell, params, xs):
  """Token by token: which tokens are read, and from which of the two."""
  p = jax.tree.map(np.float64, params)
  xs = np.float64(xs)
  zs, h, g, k = mamba(p["ssm"], xs), cell.num_heads, cell.groups, cell.width
  cut = lambda y: (y @ p["qkv"]).reshape(len(y), h + 2 * g, k)
  of_x, of_z = cut(xs), cut(zs)
  theta = cell.rotary_base ** (-2 * np.arange(k // 2) / k)

  def turn(y, t):
    pair = (y[: k // 2] + 1j * y[k // 2 :]) * np.exp(1j * t * theta)
    return np.concatenate([pair.real, pair.imag])

  ys = []
  for t in range(len(xs)):
    window = [(of_x, j) for j in range(t + 1) if t - j < cell.window]
    faded = [
      (of_z, j) for j in range(t + 1) if cell.window <= t - j < 2 * cell.window
    ]
    o = []
    for head in range(h):
      group = head // (h // g)
      q = turn(of_x[t, head], t) / np.sqrt(k)
      seen = window + faded
      w = np.exp([q @ turn(y[j, h + group], j) for y, j in seen])
      values = np.stack([y[j, h + g + group] for y, j in seen])
      o.append(w / w.sum() @ values)
    ys.append(np.concatenate(o) @ p["out"])
  return np.stack(ys)


@pytest.mark.parametrize("options", [dict(), dict(num_kv_heads=None, window=4)])
def test_paper_equation(options):
  """Past twice the window."""
  cell = memzoo.tiny("b_mojo", **options)
  params, xs = shaken(cell), draw(1, 11, 6)
  want = oracle(cell, params, xs)
  for form, (_, ys) in zip(FORMS, run(cell, params, xs)):
    assert checks.relative(ys, want) < checks.FORWARD, form


def test_signature_behaviour():
  """The window remembers exactly, the state space fades: with values of z cut
  off a token is gone after W steps; with them it is seen in all later tokens,
  long past 2 W."""
  cell = memzoo.tiny("b_mojo", window=3)
  params, xs = shaken(cell), draw(2, 14, 6)

  @jax.jit
  def changed(params):
    ys = lambda xs: memzoo.scan(cell, params, None, xs)[1]
    moved = jnp.asarray(xs).at[2].add(1.0)
    return jnp.any(ys(xs) != ys(moved), axis=1)

  np.testing.assert_array_equal(changed(params), np.arange(14) >= 2)
  # Without its write the SSM says nothing of other tokens: z depends on its
  # own token alone, and what is read goes back 2 W − 1 steps.
  ssm = params["ssm"]
  alone = ssm["conv"].at[:-1].set(0.0)
  own = {**ssm, "conv": alone, "a_log": jnp.full_like(ssm["a_log"], 30.0)}
  mute = {**params, "ssm": own}
  steps = np.arange(14)
  np.testing.assert_array_equal(changed(mute), (steps >= 2) & (steps < 2 + 6))


def test_it_learns_what_left_the_window():
  """The bit that was marked among the first four tokens, at all twelve, with a
  window of two."""
  cell = memzoo.make(
    "b_mojo", d_model=6, head_dim=4, window=2, d_state=4, conv_size=2
  )
  _, accuracy = checks.learn(cell, checks.marked_bit, 400)
  assert accuracy > 0.9, accuracy


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(window=0), "window must be a positive integer"),
    (dict(head_dim=3), "need an even width per head"),
    (dict(num_kv_heads=3), "num_kv_heads=3 must divide num_heads=2"),
    (dict(d_state=0), "d_state must be a positive integer"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.tiny("b_mojo", **options)
