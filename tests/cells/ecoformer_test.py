"""EcoFormer against Liu et al. 2022 (arXiv:2209.09004), section 4."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def paper_codes(cell, params, xs):
  """u and H(u) of every token and head, [T, H, K] and [T, H, b]."""
  p = {k: np.asarray(v, np.float64) for k, v in params["buffers"].items()}
  h = cell.num_heads
  u = np.asarray(xs, np.float64) @ np.asarray(params["qk"], np.float64)
  u = u.reshape(len(xs), h, -1)
  u = u / np.linalg.norm(u, axis=-1, keepdims=True)
  codes = np.zeros((len(xs), h, cell.num_bits))
  for t in range(len(xs)):
    for n in range(h):
      square = np.sum((u[t, n] - p["anchors"][n]) ** 2, axis=1)
      kernel = np.exp(-square / (2 * p["bandwidth"][n]))
      codes[t, n] = np.sign(p["weights"][n] @ (kernel - p["mean"][n]))
  return u, codes


def paper(cell, params, xs):
  """All pairs, weighed by H(u)·H(u') + B."""
  v, out = (np.asarray(params[k], np.float64) for k in ("v", "out"))
  _, codes = paper_codes(cell, params, xs)
  value = (np.asarray(xs, np.float64) @ v).reshape(len(xs), cell.num_heads, -1)
  y = np.zeros_like(value)
  for i in range(len(xs)):
    for n in range(cell.num_heads):
      weight = codes[: i + 1, n] @ codes[i, n] + cell.num_bits + 1
      y[i, n] = weight @ value[: i + 1, n] / weight.sum()
  return y.reshape(len(xs), -1) @ out


def make(**options):
  cell = memzoo.tiny("ecoformer", **options)
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (9, cell.d_model))
  return cell, params, xs


def test_paper_equation():
  cell, params, xs = make()
  run = jax.jit(
    lambda params: [
      memzoo.scan(cell, params, None, xs, implementation=form)[1]
      for form in ("step", "chunk")
    ]
  )
  fitted = jax.jit(cell.refresh)(params, xs[None])
  for p in (params, fitted):
    want = paper(cell, p, xs)
    for ys in run(p):
      assert checks.relative(ys, want) < checks.FORWARD


def test_signature_behaviour():
  """A pair's weight is an affine function of the Hamming distance of its
  codes, exactly; the state is a sum of signs; after a fit codes agree with the
  attention map; and a layer learns to recall pairs."""
  cell, params, xs = make()
  _, codes = paper_codes(cell, params, xs)
  got = np.asarray(cell.codes(params, xs))
  np.testing.assert_array_equal(got, codes)
  q, k, _ = (np.asarray(x) for x in cell._project(params, xs))
  weight = np.einsum("ihf,jhf->hij", q, k)
  hamming = (codes[:, None] != codes[None]).sum(-1).transpose(2, 0, 1)
  b = cell.num_bits
  np.testing.assert_array_equal(weight, b + (b + 1) - 2 * hamming)
  assert weight.min() >= 1 and len(np.unique(hamming)) > 2
  state, _ = memzoo.scan(cell, params, None, xs)
  np.testing.assert_array_equal(state.z[:, :-1], codes.sum(0))
  np.testing.assert_array_equal(state.z[:, -1], [9, 9])

  cell = memzoo.make(
    "ecoformer", d_model=9, num_heads=1, head_dim=8, num_bits=24
  )
  _, accuracy = checks.learn(cell, checks.pairs, 300, rate=2e-2)
  assert accuracy > 0.6, accuracy  # four values: 1/4 by chance


def test_refresh_fits_when_due():
  """The first call fits and so does every `refit_every`-th after it; the fit
  brings the codes nearer to the attention map."""
  cell, params, _ = make(num_bits=12, top=6, refit_every=3, fit_steps=20)
  xs = jax.random.normal(jax.random.key(2), (2, 30, 6))
  refresh = jax.jit(cell.refresh)
  moved, before = [], params
  for _ in range(5):
    new = refresh(before, xs)
    anchors = (before["buffers"]["anchors"], new["buffers"]["anchors"])
    moved.append(bool(np.any(anchors[0] != anchors[1])))
    assert new["qk"] is not None and np.all(new["qk"] == params["qk"])
    before = new
  assert moved == [True, False, False, True, False]

  def agreement(params):
    u, codes = paper_codes(cell, params, xs[0])
    total = 0
    for n in range(cell.num_heads):
      alike, product = u[:, n] @ u[:, n].T, codes[:, n] @ codes[:, n].T
      total += np.corrcoef(alike.ravel(), product.ravel())[0, 1]
    return total / cell.num_heads

  assert agreement(refresh(params, xs)) > agreement(params)


def test_hash_takes_no_gradient():
  cell, params, xs = make()

  def loss(params):
    return checks.wave(memzoo.scan(cell, params, None, xs)[1])

  slope = jax.jit(jax.grad(loss))(params)
  assert all(not np.any(g) for g in slope["buffers"].values())
  assert np.any(slope["qk"])


def test_options_are_checked():
  with pytest.raises(ValueError, match="num_bits must be a positive integer"):
    memzoo.make("ecoformer", d_model=8, num_bits=0)
  with pytest.raises(ValueError, match="refit_every must be an integer, 0 or"):
    memzoo.make("ecoformer", d_model=8, refit_every=-1)
  assert jnp.all(make()[1]["buffers"]["bandwidth"] == 2)
