"""JRT-RNN against Arora et al. 2024 (arXiv:2407.05483), section 4."""

import dataclasses

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def paper(cell, params, prefix, xs):
  """All pairs: every token sees the decoder's keys up to it and the encoder's
  of the whole prefix, weighed by 1 + s + s² / 2 under one sum."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, k, v = cell.num_heads, cell.feature_dim, cell.value_dim
  xs, prefix = (np.asarray(x, np.float64) for x in (xs, prefix))
  q, key, value = np.split(xs @ p["qkv"], [h * k, 2 * h * k], axis=1)
  if cell.shared_encoder:
    encoded = prefix @ p["qkv"][:, h * k :]
  else:
    encoded = prefix @ p["context"]
  y = np.zeros((len(xs), h, v))
  for n in range(h):
    some, wide = slice(n * k, (n + 1) * k), slice(n * v, (n + 1) * v)
    for i in range(len(xs)):
      keys = [*key[: i + 1, some], *encoded[:, some]]
      values = [*value[: i + 1, wide], *encoded[:, h * k :][:, wide]]
      s = np.asarray(keys) @ q[i, some] / np.sqrt(k)
      weight = 1 + s + s**2 / 2
      y[i, n] = weight @ np.asarray(values) / weight.sum()
  return y.reshape(len(xs), -1) @ p["out"]


def make(shared):
  cell = memzoo.tiny("prefix_linear_attention", shared_encoder=shared)
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (11, cell.d_model))
  return cell, params, xs


@pytest.mark.parametrize("shared", [False, True])
def test_paper_equation(shared):
  cell, params, xs = make(shared)

  @jax.jit
  def run(params, xs):
    empty = cell.initial_state(params)
    state = cell.write_context(params, empty, xs[:7])
    return [
      memzoo.scan(cell, params, state, xs, implementation=form)[1]
      for form in ("step", "chunk")
    ]

  want = paper(cell, params, xs[:7], xs)
  for ys in run(params, xs):
    assert checks.relative(ys, want) < checks.FORWARD


def test_context():
  """The state does not know the order of the prefix; what is masked is not in
  it; two contexts add up; a reset forgets; and gradients reach the encoder."""
  cell, params, xs = make(False)
  empty = cell.initial_state(params)
  write = jax.jit(cell.write_context)
  state = write(params, empty, xs)
  for order in (
    slice(None, None, -1),
    np.random.default_rng(0).permutation(11),
  ):
    assert checks.relative(write(params, empty, xs[order]), state) < 1e-5
  mask = jnp.arange(11) < 7
  junk = jnp.where(mask[:, None], xs, jnp.inf)
  masked = write(params, empty, junk, mask)
  assert checks.relative(masked, write(params, empty, xs[:7])) < 1e-5
  both = write(params, masked, xs[7:])
  assert checks.relative(both, state) < 1e-5
  half = write(params, empty, xs.astype(jnp.bfloat16))
  assert jax.tree.all(jax.tree.map(lambda x: x.dtype == jnp.float32, half))

  reset = jnp.arange(11) == 4
  _, ys = memzoo.scan(cell, params, state, xs, reset=reset)
  _, fresh = memzoo.scan(cell, params, None, xs[4:])
  assert checks.relative(ys[4:], fresh) < checks.FORWARD

  def loss(params):
    state = cell.write_context(params, empty, xs)
    return checks.wave(memzoo.scan(cell, params, state, xs)[1])

  slope = jax.jit(jax.grad(loss))(params)
  assert all(np.abs(g).max() > 0 for g in slope.values())


@dataclasses.dataclass(frozen=True)
class Twice(type(memzoo.tiny("prefix_linear_attention"))):
  """The cell that takes its whole input as the context first."""

  def parallel(self, params, state, xs, reset, mask, implementation):
    state = self.write_context(params, state, xs)
    return super().parallel(params, state, xs, reset, mask, implementation)


def asked_first(key):
  """The question, then the pairs, and the answer is to stand at the question:
  it is only known to who has read on."""
  xs, targets, weights = checks.pairs(key)
  return tuple(jnp.roll(x, 1, axis=0) for x in (xs, targets, weights))


def test_signature_behaviour():
  """It answers a question that is asked before the facts are told, since it
  has read all of it once; the causal layer of the same state cannot."""
  options = dict(d_model=9, num_heads=1, feature_dim=8)
  _, accuracy = checks.learn(Twice(**options), asked_first, 200, rate=2e-2)
  assert accuracy > 0.95, accuracy
  once = memzoo.make("prefix_linear_attention", **options, shared_encoder=True)
  _, blind = checks.learn(once, asked_first, 200, rate=2e-2)
  assert blind < 0.4, blind  # four values: 1/4 by chance


def test_write_context_checks():
  cell, params, xs = make(True)
  state = cell.initial_state(params)
  with pytest.raises(ValueError, match=r"context must be floating \[\?, 6\]"):
    cell.write_context(params, state, xs[:, :5])
  with pytest.raises(ValueError, match=r"mask must be bool \[11\]"):
    cell.write_context(params, state, xs, jnp.ones(3, bool))
