"""Mixture-of-Memories against Du et al. 2025 (arXiv:2502.13685), section 3."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def chosen(cell, params, xs):
  """The memories of each token, best first, and their shares: [T, k] each."""
  logits = np.asarray(xs, np.float64) @ np.asarray(params["router"], np.float64)
  scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  order = np.argsort(-scores, axis=1)[:, : cell.top_k]
  share = np.take_along_axis(scores, order, 1)
  return order, share / share.sum(1, keepdims=True)


def paper(cell, params, xs):
  """Each token is sent to its memories, and to the shared one, where it is
  convolved with the tokens that came there before it, writes, and reads; with
  M [K, V] as the paper has it. Returns (M of all memories, ys, balance)."""
  order, share = chosen(cell, params, xs)
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h, k, e = cell.num_heads, cell.head_dim, cell.num_memories
  v, total, taps = p["norm"].shape[0], len(p["kv"]), len(p["conv"])
  past = [[np.zeros(p["conv"].shape[1])] * (taps - 1) for _ in range(total)]
  memory = np.zeros((total, h, k, v))
  used, ys, balance = np.zeros(e), [], []
  for t, x in enumerate(np.asarray(xs, np.float64)):
    shares = dict(zip(order[t], share[t]))
    used[order[t]] += 1
    balance.append(e * sum(used[m] / (t + 1) * g for m, g in shares.items()))
    if cell.shared:
      shares[e] = 1.0
    o = np.zeros((h, v))
    for m, g in shares.items():
      past[m].append(np.concatenate([x @ p["q"], x @ p["kv"][m]]))
      qkv = silu(sum(c * r for c, r in zip(p["conv"], past[m][-taps:])))
      for n in range(h):
        q = qkv[n * k : (n + 1) * k]
        key = qkv[(h + n) * k : (h + n + 1) * k]
        value = qkv[2 * h * k + n * v : 2 * h * k + (n + 1) * v]
        if cell.rule == "linear":
          memory[m, n] += np.outer(key, value)
        else:
          q = q / np.sqrt(np.sum(q**2) + 1e-6)
          key = key / np.sqrt(np.sum(key**2) + 1e-6)
          ab = x @ p["ab"][m]
          soft = np.log1p(np.exp(ab[n] + p["dt"][n]))
          alpha, beta = (
            np.exp(-np.exp(p["a_log"][n]) * soft),
            sigmoid(ab[h + n]),
          )
          memory[m, n] = alpha * (
            memory[m, n] - beta * np.outer(key, key @ memory[m, n])
          ) + beta * np.outer(key, value)
        o[n] += g * (q @ memory[m, n]) / np.sqrt(k)
    o = o / np.sqrt(np.mean(o**2, axis=1, keepdims=True) + 1e-5) * p["norm"]
    ys.append((o.reshape(-1) * silu(x @ p["gate"])) @ p["out"])
  return memory, np.stack(ys), np.stack(balance)


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(cell, params, state, xs, form):
  return memzoo.scan(cell, params, state, xs, implementation=form, reports=True)


@pytest.mark.parametrize(
  "options",
  [dict(expand_v=2), dict(rule="linear", shared=False, num_memories=4)],
)
def test_paper_equation(options):
  cell = memzoo.tiny("mixture_of_memories", **options)
  params = cell.init(jax.random.key(0))
  params["norm"] += 0.3 * jnp.arange(params["norm"].size, dtype=jnp.float32)
  xs = jax.random.normal(jax.random.key(1), (11, cell.d_model))
  want = paper(cell, params, xs)
  for form in ("step", "chunk"):
    state, ys, reports = run(cell, params, None, xs, form)
    got = state.s, ys, reports["balance"]
    assert checks.relative(got, want) < checks.FORWARD, form


def test_signature_behaviour():
  """A memory that a token is not sent to stays as it was, to the bit; the
  others do not. And it learns where to send what: of twelve pairs it recalls
  more than one memory that is as large as all of its own."""
  cell = memzoo.tiny("mixture_of_memories")
  params = cell.init(jax.random.key(0))
  xs = jax.random.normal(jax.random.key(1), (12, cell.d_model))
  state, _, _ = run(cell, params, None, xs[:4], "step")
  order, _ = chosen(cell, params, xs)
  for t in range(4, 12):
    before = state
    form = ("step", "chunk")[t % 2]
    state, _, _ = run(cell, params, state, xs[t : t + 1], form)
    for m in range(cell.num_memories + 1):
      same = np.array_equal(state.s[m], before.s[m])
      assert same == (m not in {*order[t], cell.num_memories})
      assert same == np.array_equal(state.conv[m], before.conv[m])
