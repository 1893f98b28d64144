"""Mamba-2 against Dao and Gu 2024 (arXiv:2405.21060), eq. 2 and figure 6."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def silu(x):
  return x / (1 + np.exp(-x))


def paper(cell, params, us):
  """Figure 6's parallel block around eq. 2, one token and head at a time, with
  h [P, N] as the paper has it."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  taps, groups, n = len(p["conv"]), cell.num_groups, cell.d_state
  width, e = p["conv"].shape[1], len(p["norm"])
  heads = len(p["d"])
  size = e // heads
  h = np.zeros((heads, size, n))
  seen = [np.zeros(width)] * (taps - 1)
  ys = []
  for u in np.asarray(us, np.float64):
    z, xbc, dt = np.split(u @ p["in"], [e, e + width])
    seen = [*seen, xbc]
    xbc = p["conv_bias"] + sum(k * s for k, s in zip(p["conv"], seen[-taps:]))
    x, b, c = np.split(silu(xbc), [e, e + groups * n])
    dt = np.log1p(np.exp(dt + p["dt_bias"]))
    y = np.zeros((heads, size))
    for i in range(heads):
      g = i * groups // heads
      part = slice(g * n, (g + 1) * n)
      x_i = x[i * size : (i + 1) * size]
      a = np.exp(-dt[i] * np.exp(p["a_log"][i]))
      h[i] = a * h[i] + np.outer(x_i, dt[i] * b[part])
      y[i] = h[i] @ c[part] + p["d"][i] * x_i
    y = np.split(y.ravel() * silu(z), groups)
    y = np.concatenate([v / np.sqrt(np.mean(v**2) + 1e-5) for v in y])
    ys.append((y * p["norm"]) @ p["out"])
  state = np.swapaxes(h, 1, 2), np.stack(seen[1 - taps :])
  return state, np.stack(ys)


@pytest.mark.parametrize("options", (dict(), dict(num_groups=1, conv_size=4)))
def test_paper_equation(options):
  cell = memzoo.tiny("mamba2", **options)
  params, us = checks.drawn(cell, 0.2), checks.inputs(cell, 9)
  params["dt_bias"] += 3.0
  want, ys_want = paper(cell, params, us)
  for form, state, ys in checks.forms(cell, params, us):
    got = (state.h, state.conv), ys
    assert checks.relative(got, (want, ys_want)) < checks.FORWARD, form


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_parity_with_transformers():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  mixer = transformers.models.mamba2.modeling_mamba2.Mamba2Mixer
  cell = memzoo.tiny("mamba2", num_groups=1, conv_size=4)
  params, us = checks.drawn(cell), checks.inputs(cell, 19)
  config = transformers.Mamba2Config(
    hidden_size=6, num_heads=4, head_dim=3, state_size=5, n_groups=1,
    conv_kernel=4, expand=2, chunk_size=8, num_hidden_layers=1,
  )  # fmt: skip
  theirs = mixer(config, 0)
  tensors = {
    "in_proj.weight": params["in"].T, "dt_bias": params["dt_bias"],
    "conv1d.weight": params["conv"].T[:, None], "A_log": params["a_log"],
    "conv1d.bias": params["conv_bias"], "D": params["d"],
    "norm.weight": params["norm"], "out_proj.weight": params["out"].T,
  }  # fmt: skip
  theirs.load_state_dict(
    {k: torch.tensor(np.array(v)) for k, v in tensors.items()}
  )
  with torch.no_grad():
    want = theirs(torch.tensor(us)[None])[0].numpy()
  for form, _, ys in checks.forms(cell, params, us):
    assert checks.relative(ys, want) < checks.FORWARD, form


def test_initialization():
  """A uniform in −[1, 16], softplus(dt_bias) log-uniform in [1e-3, 0.1]."""
  cell = memzoo.make("mamba2", d_model=1000, d_state=3, head_dim=1)
  params = jax.jit(cell.init)(jax.random.key(0))
  tenths = np.linspace(0.1, 0.9, 9)
  a = np.exp(params["a_log"])
  np.testing.assert_allclose(np.quantile(a, tenths), 1 + 15 * tenths, atol=0.8)
  dt = np.log10(np.asarray(jax.nn.softplus(params["dt_bias"]), np.float64))
  np.testing.assert_allclose(np.quantile(dt, tenths), 2 * tenths - 3, atol=0.1)
  assert (params["d"] == 1).all() and (params["norm"] == 1).all()
  assert params["in"].shape == (1000, 2 * 2000 + 2 * 3 + 2000)


def selective_copy(key, length=10):
  """Two symbols at random times among other inputs, then two places to repeat
  them: input [symbol 3, other 3, is one, first query, second query]."""
  k_when, k_symbol, k_noise = jax.random.split(key, 3)
  when = jnp.sort(jax.random.choice(k_when, length, (2,), replace=False))
  symbols = jax.random.randint(k_symbol, (2,), 0, 3)
  noise = jax.random.randint(k_noise, (length,), 0, 3)
  xs = jnp.zeros((length + 2, 9))
  xs = xs.at[jnp.arange(length), 3 + noise].set(1.0)
  xs = xs.at[when].set(0.0)
  xs = xs.at[when, symbols].set(1.0).at[when, 6].set(1.0)
  xs = xs.at[length, 7].set(1.0).at[length + 1, 8].set(1.0)
  targets = jnp.zeros(length + 2, jnp.int32).at[length:].set(symbols)
  return xs, targets, jnp.zeros(length + 2).at[length:].set(1.0)


def test_signature_behaviour():
  """Selectivity: a head whose step Δ → 0 keeps its state as it is, one whose
  step is large keeps nothing of it; and a layer learns to copy symbols from
  times that vary, past the inputs between them, which needs both."""
  cell = memzoo.tiny("mamba2")
  params, us = checks.drawn(cell), checks.inputs(cell, 8)
  empty = cell.initial_state(params)
  warm = empty._replace(h=jnp.ones_like(empty.h))
  bias = jnp.asarray([-200.0, 200.0, -200.0, 200.0])
  for form in ("step", "scan", "chunk"):
    pinned = {**params, "dt_bias": bias}
    run = lambda s: memzoo.scan(cell, pinned, s, us, implementation=form)[0]
    after, fresh = jax.jit(lambda: (run(warm), run(empty)))()
    np.testing.assert_array_equal(after.h[::2], warm.h[::2])
    np.testing.assert_array_equal(after.h[1::2], fresh.h[1::2])
    assert fresh.h[1::2].all() and not fresh.h[::2].any()

  cell = memzoo.make("mamba2", d_model=9, d_state=4, head_dim=6)
  _, accuracy = checks.learn(cell, selective_copy, 250, rate=2e-2)
  assert accuracy > 0.95, accuracy


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(head_dim=5), "head_dim=5 must divide d_inner=16"),
    (dict(head_dim=4, num_groups=3), "num_groups=3 must divide num_heads=4"),
    (dict(expand=0.7), "expand · d_model must be a positive whole number"),
    (dict(head_dim=4, dt_min=0.2), "needs 0 < dt_min <= dt_max"),
  ],
)
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("mamba2", d_model=8, **options)
