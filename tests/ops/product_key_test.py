"""`product_key`: the search equals brute force, the read is sparse."""

import functools

import checks
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops import product_key
from memzoo.ops.product_key import read, top_k


def draw(seed, n, width, rows=4):
  r = np.random.default_rng(seed)
  query = r.normal(size=(rows, width)).astype(np.float32)
  keys = r.normal(size=(2, n, width // 2)).astype(np.float32)
  return query, keys


def brute_force(query, keys, k):
  """Lample et al. 2019 eq. 1 over the whole product set of section 3.2: every
  concatenation of two half keys, all scores, the k largest."""
  n = keys.shape[1]
  full = np.stack(
    [
      np.concatenate([keys[0, i], keys[1, j]])
      for i in range(n)
      for j in range(n)
    ]
  ).astype(np.float64)
  scores = np.asarray(query, np.float64) @ full.T
  indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return np.take_along_axis(scores, indices, axis=1), indices, scores


@functools.cache
def compiled(k):
  return jax.jit(functools.partial(top_k, k=k))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**16), n=st.sampled_from([3, 5]),
  k=st.sampled_from([1, 4, 9]),
)  # fmt: skip
def test_search_equals_brute_force(seed, n, k):
  query, keys = draw(seed, n, 6)
  scores, indices = compiled(k)(query, keys)
  want, want_indices, every = brute_force(query, keys, k)
  np.testing.assert_allclose(scores, want, atol=1e-5)
  assert indices.dtype == jnp.int32
  for row in range(len(query)):
    assert len(set(indices[row].tolist())) == k
    np.testing.assert_allclose(
      np.take_along_axis(every[row], np.asarray(indices[row]), axis=0),
      scores[row],
      atol=1e-5,
    )
    gaps = np.abs(np.diff(np.sort(-every[row])))
    if gaps.min() > 1e-5:
      np.testing.assert_array_equal(indices[row], want_indices[row])


def test_ties():
  """Equal keys: the scores are those of brute force, no index comes twice."""
  query, keys = draw(0, 4, 6)
  keys[:, 1:] = keys[:, :1]
  keys[1, 3] = 0
  scores, indices = compiled(7)(query, keys)
  want, _, every = brute_force(query, keys, 7)
  np.testing.assert_allclose(scores, want, atol=1e-5)
  assert all(len(set(row.tolist())) == 7 for row in indices)


def test_paper_equation():
  """Lample et al. 2019 eq. 1-3: m(x) = Σ_{i ∈ I} w_i v_i."""
  query, keys = draw(1, 5, 6)
  values = np.random.default_rng(2).normal(size=(25, 3)).astype(np.float32)
  scores, indices, _ = brute_force(query, keys, 4)
  w = np.exp(scores - scores.max(1, keepdims=True))
  w /= w.sum(1, keepdims=True)
  want = np.einsum("rk,rkv->rv", w, values[indices].astype(np.float64))
  fn = jax.jit(functools.partial(product_key, k=4))
  got = fn(query, keys, values)
  assert checks.relative(got, want) < checks.FORWARD
  one = fn(query[2], keys, values)
  np.testing.assert_allclose(one, got[2], rtol=1e-5)
  half = fn(jnp.asarray(query, jnp.bfloat16), keys, values)
  assert half.dtype == jnp.bfloat16


def test_gradient_touches_only_what_is_read():
  query, keys = draw(3, 6, 8, rows=3)
  values = jax.random.normal(jax.random.key(0), (36, 3))
  fn = lambda q, c, v: checks.wave(product_key(q, c, v, k=2))
  dq, dkeys, dvalues = jax.jit(jax.grad(fn, (0, 1, 2)))(query, keys, values)
  _, indices, _ = brute_force(query, keys, 2)
  touched = set(np.flatnonzero(np.abs(dvalues).sum(1)))
  assert touched == set(indices.ravel().tolist())
  first = set(np.flatnonzero(np.abs(dkeys[0]).sum(1)))
  assert first <= {i // 6 for i in indices.ravel().tolist()}
  assert np.abs(dq).sum(1).all()
  # The gradient is that of the same sum over the chosen keys, all else fixed.
  full = lambda q, c: jnp.concatenate(
    [c[0][indices // 6], c[1][indices % 6]], axis=-1
  )

  def chosen(q, c, v):
    s = jnp.einsum("rk,rjk->rj", q, full(q, c), precision="highest")
    return checks.wave(
      jnp.einsum(
        "rj,rjv->rv", jax.nn.softmax(s), v[indices], precision="highest"
      )
    )

  want = jax.jit(jax.grad(chosen, (0, 1, 2)))(query, keys, values)
  assert checks.relative((dq, dkeys, dvalues), want) < checks.GRADIENT


def test_read():
  values = jnp.arange(12.0).reshape(6, 2)
  got = read(values, jnp.array([[0.5, 2.0]]), jnp.array([[1, 5]]))
  np.testing.assert_allclose(got, [[21.0, 23.5]])


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(query=np.zeros((4, 5), np.float32)), "even K"),
    (dict(query=np.zeros((4, 6), np.int32)), "query must be"),
    (dict(keys=np.zeros((2, 3, 4), np.float32)), "keys must be"),
    (dict(values=np.zeros((8, 2), np.float32)), "values must be"),
    (dict(k=0), "k must be in 1 … 9 for 3 half keys, got 0"),
    (dict(k=10), "k must be in 1 … 9 for 3 half keys, got 10"),
  ],
)
def test_bad_input(change, words):
  good = dict(
    query=np.zeros((4, 6), np.float32), keys=np.zeros((2, 3, 3), np.float32),
    values=np.zeros((9, 2), np.float32), k=2,
  )  # fmt: skip
  call = {**good, **change}
  with pytest.raises(ValueError, match=words):
    product_key(call["query"], call["keys"], call["values"], k=call["k"])
