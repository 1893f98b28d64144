"""Routing: shares, the flags of every memory, and balance, by brute force."""

import checks
import jax
import jax.numpy as jnp
import numpy as np

from memzoo.ops import routing

T, E, K = 23, 4, 2
LOGITS = np.random.default_rng(0).normal(size=(T, E)).astype(np.float32)


def test_top_k_is_the_softmax_renormalised_over_the_chosen():
  route = routing.top_k(jnp.asarray(LOGITS), K, 1)
  p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
  for t in range(T):
    best = set(np.argsort(-p[t])[:K])
    assert best == set(np.flatnonzero(route.chosen[t, :E]))
    want = [p[t, e] * (e in best) for e in range(E)]
    assert checks.relative(route.weight[t, :E], want / np.sum(want)) < 1e-6
  assert route.chosen[:, E].all() and (route.weight[:, E] == 1).all()


def test_flags_of_every_memory():
  """What passes a memory is what a loop would send it, resets before it."""
  rng = np.random.default_rng(1)
  chosen = np.asarray(routing.top_k(jnp.asarray(LOGITS), K).chosen)
  run = jax.jit(routing.sent)
  empties = 0
  for _ in range(20):
    mask = rng.random(T) < 0.7
    reset = (rng.random(T) < 0.15) & mask
    before = rng.integers(0, 5, E).astype(np.int32)
    sent = run(before, chosen, reset, mask)
    for e in range(E):
      count, fresh = before[e], False
      for t in range(T):
        if reset[t]:
          count, fresh = 0, True
        here = bool(mask[t] and chosen[t, e])
        assert sent.mask[e, t] == here
        assert sent.reset[e, t] == (here and fresh)
        count, fresh = count + here, fresh and not here
        assert sent.counts[t, e] == count
      assert sent.empty[e] == fresh
      empties += fresh
  assert empties


def test_balance():
  """k in equal use, E where k memories take all, as the batch's formula."""
  even = jnp.eye(E)[np.arange(12) % E] + jnp.eye(E)[(np.arange(12) + 1) % E]
  for logits, want in ((even, K), (jnp.asarray([[1.0, 1, 0, 0]] * 12), E)):
    route = routing.top_k(100 * logits, K, 1)
    counts = routing.sent(jnp.zeros(E + 1, jnp.int32), route.chosen).counts
    report = routing.balance(route, counts, K, 1)
    np.testing.assert_allclose(report[-1], want, rtol=1e-6)
  route = routing.top_k(jnp.asarray(LOGITS), K)
  counts = routing.sent(jnp.zeros(E, jnp.int32), route.chosen).counts
  f = np.cumsum(route.chosen, axis=0) / np.arange(1, T + 1)[:, None]
  want = E * np.sum(f * np.asarray(route.weight), axis=1)
  assert checks.relative(routing.balance(route, counts, K), want) < 1e-6
