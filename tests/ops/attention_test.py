"""`attention`: the window and its sinks against a list of tokens in float64,
every form, resets, gaps, dead values, dtypes, memory."""

import functools

import checks
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops import attention as attention_op, batched
from memzoo.ops.attention import empty, positions, read, write

T, K, V, S, C = 37, 5, 3, 7, 16
WRITE = jax.jit(functools.partial(write, sinks=2))
SINKS = (0, 2)


def oracle(c, sinks, scale=None, capacity=S):
  """softmax(q·k scale) over {j <= t : t − j < W or j < sinks} (Vaswani et al.
  2017 eq. 1; Beltagy et al. 2020 section 3.1; Xiao et al. 2023 section 3.2),
  from a list of all the tokens of the segment. Returns that list too."""
  scale = 1 / np.sqrt(c["k"].shape[1]) if scale is None else scale
  window, past = capacity - sinks, []
  outputs = np.zeros(c["v"].shape, np.float64)
  for t in range(len(c["q"])):
    if not c["mask"][t]:
      continue
    if c["reset"][t]:
      past = []
    q, k, v = (np.asarray(c[n][t], np.float64) for n in "qkv")
    past.append((k, v))
    now = len(past) - 1
    seen = [j for j in range(now + 1) if now - j < window or j < sinks]
    scores = np.array([scale * q @ past[j][0] for j in seen])
    p = np.exp(scores - scores.max())
    outputs[t] = sum(w * past[j][1] for w, j in zip(p / p.sum(), seen))
  return past, outputs


def make(length=T, seed=0, reset=0.1, mask=0.8, scale=1.0):
  r = np.random.default_rng(seed)
  return dict(
    q=(scale * r.normal(size=(length, K))).astype(np.float32),
    k=r.normal(size=(length, K)).astype(np.float32),
    v=r.normal(size=(length, V)).astype(np.float32),
    reset=r.random(length) < reset,
    mask=r.random(length) < mask,
  )


@functools.cache
def compiled(form, sinks, size=C, gradients=True):
  """(tensors, state, fresh, flags) -> (state, outputs, gradients)."""

  def forward(tensors, state, fresh, flags):
    return attention_op(
      state, *tensors, sinks=sinks, fresh=fresh, implementation=form,
      chunk_size=size, **flags,
    )  # fmt: skip

  def loss(tensors, kv, state, fresh, flags):
    state = state._replace(k=kv[0], v=kv[1])
    new, out = forward(tensors, state, fresh, flags)
    safe = jnp.where(jnp.isfinite(out), out, 0.0)
    return checks.wave(safe, new.k, new.v), (new, out)

  def run(tensors, state, fresh, flags):
    if not gradients:
      return *forward(tensors, state, fresh, flags), None
    grads, aux = jax.grad(loss, (0, 1), has_aux=True)(
      tensors, (state.k, state.v), state, fresh, flags
    )
    return *aux, grads

  return jax.jit(run)


def run(form, c, state=None, *, sinks=0, size=C, fresh=None, gradients=True):
  state = empty(S, K, V) if state is None else state
  tensors = tuple(c[n] for n in "qkv")
  flags = dict(reset=c["reset"], mask=c["mask"])
  return compiled(form, sinks, size, gradients)(tensors, state, fresh, flags)


def held(past, sinks, count=None):
  """What the ring must hold of a segment: {position: (k, v)}."""
  n = len(past)
  return {j: past[j] for j in range(n) if j < sinks or n - 1 - j < S - sinks}


def assert_holds(state, past, sinks):
  want = held(past, sinks)
  got = {int(p): s for s, p in enumerate(state.position) if p >= 0}
  assert set(got) == set(want)
  assert int(state.count) == len(past)
  for p, s in got.items():
    assert s == (p if p < sinks else sinks + (p - sinks) % (S - sinks))
    np.testing.assert_allclose(state.k[s], want[p][0], rtol=1e-6)
    np.testing.assert_allclose(state.v[s], want[p][1], rtol=1e-6)


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_paper_equation(form, sinks):
  for seed, (reset, mask) in enumerate(
    [(0, 1), (0.1, 0.8), (0.02, 0.9), (0.5, 0.5)]
  ):
    c = make(seed=seed, reset=reset, mask=mask)
    past, want = oracle(c, sinks)
    state, out, _ = run(form, c, sinks=sinks)
    assert checks.relative(out, want) < checks.FORWARD
    assert_holds(state, past, sinks)


@pytest.mark.parametrize("sinks", SINKS)
def test_forms_agree(sinks):
  warm = run("scan", make(seed=5, reset=0), sinks=sinks)[0]
  cases = {
    "warm": make(seed=1),
    "plain": make(seed=2, reset=0, mask=1),
    "all masked": make(seed=3, mask=0),
    "identical keys": {**make(seed=4), "k": np.ones((T, K), np.float32)},
    "large scores": make(seed=6, scale=5.0),
    "left padded": {**make(seed=7, reset=0), "mask": np.arange(T) >= 20},
    "right padded": {**make(seed=8, reset=0), "mask": np.arange(T) < 20},
    "reset at a boundary": {**make(seed=9), "reset": np.arange(T) % 16 == 0},
    "short segments": make(seed=10, reset=0.7),
  }
  for name, c in cases.items():
    a, b = (run(form, c, warm, sinks=sinks) for form in ("scan", "chunk"))
    assert checks.relative(b[0], a[0]) == 0, name
    assert checks.relative(b[1], a[1]) < checks.FORWARD, name
    assert checks.relative(b[2], a[2]) < checks.GRADIENT, name
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(b)), name


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**16), reset=st.floats(0, 1), mask=st.floats(0, 1),
  cut=st.integers(0, T),
)  # fmt: skip
def test_any_pattern_and_any_cut(seed, reset, mask, cut):
  c = make(seed=seed, reset=reset, mask=mask)
  past, want = oracle(c, 2)
  state, out, _ = run("chunk", c, sinks=2, size=4, gradients=False)
  np.testing.assert_allclose(out, want, atol=2e-6)
  assert_holds(state, past, 2)
  # Two calls, one after the other: absent tokens stand for what is not there.
  first = {**c, "mask": c["mask"] & (np.arange(T) < cut)}
  second = {**c, "mask": c["mask"] & (np.arange(T) >= cut)}
  middle, out1, _ = run("chunk", first, sinks=2, size=4, gradients=False)
  end, out2, _ = run("chunk", second, middle, sinks=2, size=4, gradients=False)
  assert checks.relative(end, state) == 0
  np.testing.assert_allclose(out1 + out2, out, atol=2e-6)


@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_lengths(length):
  c = make(length, seed=length)
  past, want = oracle(c, 2)
  op = functools.partial(
    attention_op, sinks=2, implementation="chunk", chunk_size=C
  )
  state, out = jax.jit(op)(
    empty(S, K, V), c["q"], c["k"], c["v"], reset=c["reset"], mask=c["mask"]
  )
  np.testing.assert_allclose(out, want, atol=2e-6)
  assert_holds(state, past, 2)


def test_causal_attention_up_to_the_capacity():
  c = make(seed=3, reset=0, mask=1)
  q, k, v = (c[n] for n in "qkv")
  op = jax.jit(functools.partial(attention_op, scale=0.3, chunk_size=C))
  _, out = op(empty(T, K, V), q, k, v)
  want = oracle(c, 0, scale=0.3, capacity=T)[1]
  assert checks.relative(out, want) < checks.FORWARD
  weights = np.exp(0.3 * q @ k.T) * np.tri(T)
  plain = weights / weights.sum(axis=1, keepdims=True) @ v
  assert checks.relative(out, plain) < checks.FORWARD


@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_fresh_ring(form):
  """After a reset the segment goes on from `fresh`, its positions too."""
  prefix, ring = make(3, seed=20, reset=0, mask=1), empty(S, K, V)
  for t in range(3):
    ring = WRITE(ring, prefix["k"][t], prefix["v"][t])
  c = make(seed=21, reset=0, mask=0.9)
  c["reset"][[5, 20]] = True
  c["mask"][[5, 20]] = True
  state, out, _ = run(form, c, sinks=2, fresh=ring, gradients=False)
  for start, stop in ((0, 5), (5, 20), (20, T)):
    part = {n: x[start:stop] for n, x in c.items()}
    part["reset"] = np.zeros(stop - start, bool)
    if start:
      part = {
        n: np.concatenate([prefix[n], part[n]])
        for n in ("q", "k", "v", "reset", "mask")
      }
    past, want = oracle(part, 2)
    np.testing.assert_allclose(
      out[start:stop], want[-(stop - start) :], atol=2e-6
    )
  assert_holds(state, past, 2)


@pytest.mark.nans
def test_dead_values_stay_in_their_segment():
  c = make(seed=30, reset=0, mask=1)
  c["reset"][[9, 21]] = True
  clean = run("chunk", c, sinks=2)
  for name in "qkv":
    for value in (np.inf, np.nan):
      bad = {**c, name: c[name].copy()}
      bad[name][[3, 12], 1] = value
      bad["mask"] = np.arange(T) != 12  # nothing is there
      ref = run("chunk", {**c, "mask": bad["mask"]}, sinks=2)
      state, out, grads = run("chunk", bad, sinks=2)
      np.testing.assert_array_equal(out[9:], ref[1][9:])
      assert not np.isfinite(out[3]).all()
      for g, r in zip(grads[0], ref[2][0]):
        np.testing.assert_array_equal(g[9:], r[9:])
      assert checks.relative(state, ref[0]) == 0
  assert np.isfinite(clean[1]).all()


@pytest.mark.nans
def test_what_left_the_window_is_gone():
  """Infinity too: in the ring form it is overwritten, in the chunk masked."""
  for form in ("scan", "chunk"):
    c = make(seed=31, reset=0, mask=1)
    ref = run(form, c, sinks=2)[1]
    c["v"][8, 0] = np.inf
    out = run(form, c, sinks=2)[1]
    window = S - 2
    assert not np.isfinite(out[8 : 8 + window]).any(axis=0)[0]
    np.testing.assert_array_equal(out[8 + window :], ref[8 + window :])


def test_bfloat16():
  c = make(seed=40)
  half = {n: jnp.asarray(c[n], jnp.bfloat16) for n in "qkv"}
  rounded = {n: np.asarray(half[n].astype(jnp.float32)) for n in "qkv"}
  exact = oracle(c, 2)[1]
  floor = checks.relative(oracle({**c, **rounded}, 2)[1], exact)
  flags = dict(reset=c["reset"], mask=c["mask"])

  def both(tensors, dtype):
    def call(*tensors):
      return [
        attention_op(
          empty(S, K, V, dtype), *tensors, sinks=2, implementation=form,
          chunk_size=C, **flags,
        )
        for form in ("scan", "chunk")
      ]  # fmt: skip

    return jax.jit(call)(*tensors)

  for dtype in (jnp.float32, jnp.bfloat16):
    outs = []
    for state, out in both(half.values(), dtype):
      assert out.dtype == jnp.bfloat16 and state.k.dtype == dtype
      outs.append(np.asarray(out, np.float64))
      assert checks.relative(outs[-1], exact) < 4 * floor
    assert checks.relative(outs[1], outs[0]) < floor
  # A ring of less precision than the tokens is read as it is kept.
  (_, a), (_, b) = both([c[n] for n in "qkv"], jnp.bfloat16)
  assert checks.relative(b, a) < checks.FORWARD


def test_positions():
  c = make(seed=50, reset=0.2, mask=0.7)
  fn = jax.jit(positions, static_argnums=1)
  got = fn(4, T, reset=c["reset"], mask=c["mask"])
  count, want = 4, []
  for t in range(T):
    if c["mask"][t]:
      count = 1 if c["reset"][t] else count + 1
    want.append(count - 1)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(fn(2, 3), [2, 3, 4])


def test_write_and_read_are_the_step():
  c = make(9, seed=60, reset=0, mask=1)
  state = empty(S, K, V)
  look = jax.jit(read)
  np.testing.assert_array_equal(look(state, c["q"][0]), np.zeros(V))
  for t in range(9):
    state = WRITE(state, c["k"][t], c["v"][t])
  past, want = oracle(c, 2)
  assert_holds(state, past, 2)
  np.testing.assert_allclose(look(state, c["q"][8]), want[8], atol=1e-6)


def test_memory_and_loop_of_the_chunk_form():
  """The loop runs over chunks, and the backward of a window keeps memory in
  proportion to T."""

  def compile_(length):
    q, k, v = (
      jax.ShapeDtypeStruct((length, 64), jnp.float32) for _ in range(3)
    )
    state = empty(256, 64, 64)
    grad = jax.grad(
      lambda q, k, v: jnp.sum(
        attention_op(state, q, k, v, implementation="chunk", chunk_size=64)[1]
      ),
      argnums=(0, 1, 2),
    )
    return jax.jit(grad).lower(q, k, v).compile()

  short, long = compile_(1024), compile_(4096)
  assert set(checks.trip_counts(long)) == {4096 // 64}
  size = [c.memory_analysis().temp_size_in_bytes for c in (short, long)]
  assert size[1] < 4 * size[0]
  assert size[1] < 16 * 2**20


def test_vmap_over_heads_and_batch():
  q, k, v = (
    np.random.default_rng(0).normal(size=(3, 2, T, 3, K)).astype(np.float32)
  )
  states = jax.tree.map(
    lambda x: jnp.broadcast_to(x, (2, 3, *x.shape)), empty(S, K, K)
  )
  op = functools.partial(
    attention_op, sinks=1, implementation="chunk", chunk_size=C
  )
  new, out = jax.jit(batched(op))(states, q, k, v)
  for b in range(2):
    for h in range(3):
      c = dict(q=q[b, :, h], k=k[b, :, h], v=v[b, :, h])
      c.update(reset=np.zeros(T, bool), mask=np.ones(T, bool))
      past, want = oracle(c, 1)
      np.testing.assert_allclose(out[b, :, h], want, atol=2e-6)
      assert_holds(jax.tree.map(lambda x, b=b, h=h: x[b, h], new), past, 1)


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(sinks=7), "sinks must be in 0 … 6 for a ring of 7 slots, got 7"),
    (dict(sinks=-1), "sinks"),
    (dict(q=np.zeros((2, T, K), np.float32)), "of one head"),
    (dict(k=np.zeros((T, K + 1), np.float32)), "k must be"),
    (dict(v=np.zeros((T - 1, V), np.float32)), "v must be"),
    (dict(v=np.zeros((T, V + 1), np.float32)), "state.v must be"),
    (dict(k=np.zeros((T, K), np.int32)), "k must be"),
    (dict(mask=np.ones(T, np.int32)), "mask must be"),
    (dict(reset=np.ones(T - 1, bool)), "reset must be"),
    (dict(chunk_size=12), "power of two"),
    (dict(implementation="chnk"), "unknown implementation"),
  ],
)
def test_bad_input(change, words):
  c = {n: jnp.asarray(x) for n, x in make().items()}
  c.update(
    {
      n: jnp.asarray(x) if isinstance(x, np.ndarray) else x
      for n, x in change.items()
    }
  )
  q, k, v = (c.pop(n) for n in "qkv")
  with pytest.raises(ValueError, match=words):
    attention_op(empty(S, K, V), q, k, v, **c)
  with pytest.raises(NotImplementedError, match="has no 'assoc' form"):
    attention_op(
      empty(S, K, V),
      *(jnp.zeros((T, n)) for n in (K, K, V)),
      implementation="assoc",
    )
