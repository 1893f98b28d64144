"""`dynamic_mask_attention`: the S largest of all weights so far, looked up
anew for every query."""

import functools

from checks import FORWARD, GRADIENT, relative, wave
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops import dynamic_mask_attention as module

T, K, V, S = 21, 4, 3, 5
MASK = np.arange(T) % 7 != 3
RESET = np.isin(np.arange(T), (9, 10, 18))


def make(seed=0, ties=False):
  r = np.random.default_rng(seed)
  weight = r.normal(size=T)
  if ties:
    weight = np.round(weight)
  rows = r.normal(size=(T, K)), r.normal(size=(T, K)), r.normal(size=(T, V))
  return tuple(jnp.asarray(x, jnp.float32) for x in (*rows, weight))


def oracle(q, k, v, weight, mask, reset):
  q, k, v, weight = (np.asarray(x, np.float64) for x in (q, k, v, weight))
  out, past, tops = np.zeros((T, V)), [], []
  for t in range(T):
    if not mask[t]:
      continue
    past = [t] if reset[t] else [*past, t]
    # Python's sort keeps the order of equal ones.
    top = sorted(past, key=lambda j: -weight[j])[:S]
    score = np.array([k[j] @ q[t] / np.sqrt(K) + weight[j] for j in top])
    p = np.exp(score - score.max())
    out[t] = (p / p.sum()) @ v[top]
    tops.append(top)
  return out, sorted(tops[-1])


@functools.partial(
  jax.jit, static_argnames=("implementation", "chunk_size", "mask", "reset")
)
def run(state, q, k, v, weight, implementation, mask, reset, chunk_size=8):
  return module.dynamic_mask_attention(
    state, q, k, v, weight=weight, implementation=implementation,
    chunk_size=chunk_size, mask=jnp.asarray(MASK) if mask else None,
    reset=jnp.asarray(RESET) if reset else None,
  )  # fmt: skip


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("flags", [False, True])
def test_equation(flags, ties):
  given = make(ties=ties)
  mask = MASK if flags else MASK | True
  want, top = oracle(*given, mask, RESET if flags else RESET & False)
  for form in ("scan", "chunk"):
    state, o = run(module.empty(S, K, V), *given, form, flags, flags)
    assert relative(o, want) < FORWARD, form
    kept = len(top)
    assert relative(state.k[S - kept :], given[1][np.array(top)]) == 0
    assert np.all(state.weight[: S - kept] == -np.inf)


def test_forms_agree_from_any_state():
  """The state of one goes on in the other, and the gradients are the same."""
  given, later = make(1), make(2)
  start = run(module.empty(S, K, V), *later, "scan", False, False)[0]

  @functools.partial(jax.jit, static_argnums=2)
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def loss(start, given, form):
    state, o = run(start, *given, form, True, False)
    return wave(o, state.k, state.v, state.weight), (state, o)

  (_, out), grads = loss(start, given, "scan")
  (_, other), g = loss(start, given, "chunk")
  assert relative(other, out) < FORWARD
  assert relative(g, grads) < GRADIENT
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_what_has_fallen_out_is_gone():
  """One of small weight is seen until S larger ones have come, exactly; one
  of large weight always."""
  q, k, v, _ = make()
  weight = jnp.ones(T).at[2].set(0.5).at[0].set(9.0)
  loss = lambda v, t: jnp.sum(
    module.dynamic_mask_attention(
      module.empty(S, K, V), q, k, v, weight=weight, implementation="chunk"
    )[1][t]
  )
  seen = lambda t: np.any(np.asarray(jax.grad(loss)(v, t)), axis=1)
  assert seen(S - 1)[2] and not seen(S)[2]
  assert seen(T - 1)[0] and np.sum(seen(T - 1)) == S


def test_wrong_arguments():
  q, k, v, weight = make()
  state = module.empty(S, K, V)
  call = module.dynamic_mask_attention
  with pytest.raises(ValueError, match=r"weight must be floating \[21\]"):
    call(state, q, k, v, weight=weight[1:])
  with pytest.raises(ValueError, match=r"state.v must be floating \[5, 3\]"):
    call(module.empty(S, K, V + 1), q, k, v, weight=weight)
  with pytest.raises(ValueError, match="power of two, got 3"):
    call(state, q, k, v, weight=weight, chunk_size=3)
