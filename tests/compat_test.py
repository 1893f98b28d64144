"""flash-linear-attention's functions, on float64 loops over its definitions; on
its own naive functions in tests/parity/fla_test.py."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.compat import fla

B, T, H, K, V, M, N = 2, 5, 2, 4, 3, 5, 2
OWN = ("u", "gamma", "state")  # not of tokens


def draw():
  """Arrays by the names of the arguments."""
  keys = iter(jax.random.split(jax.random.key(0), 20))
  normal = lambda *shape: jax.random.normal(next(keys), shape)
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  gate = lambda *shape: jax.nn.log_sigmoid(normal(*shape))
  x = dict(
    q=normal(B, T, H, K), k=unit(normal(B, T, H, K)), v=normal(B, T, H, V),
    head=gate(B, T, H), channel=gate(B, T, H, K),
    beta=jax.nn.sigmoid(normal(B, T, H)), a=-unit(normal(B, T, H, K)),
    b=unit(normal(B, T, H, K)), erase=jax.nn.sigmoid(normal(B, T, H, K)),
    write=jax.nn.sigmoid(normal(B, T, H, V)), u=normal(H, K),
    slots=jax.nn.sigmoid(normal(B, T, H, M)), slot_gate=gate(B, T, H, M),
    k_n=unit(normal(B, N * T, H, K)), v_n=normal(B, N * T, H, V),
    beta_n=2 * jax.nn.sigmoid(normal(B, N * T, H)),
    state=normal(B, H, K, V),
  )  # fmt: skip
  return x | dict(gamma=jnp.asarray([-0.1, -0.7]))


def loop(x, decay=None, a=None, b=None, k=None, v=None, before=None):
  """S_t = Diag(d) S + b (aᵀ S) + k vᵀ from x's state, in float64; o = Sᵀ q, or
  with `before` of the state before it, and u's share of the present."""
  wide = lambda z: None if z is None else np.asarray(z, np.float64)
  q, k, v = wide(x["q"]) / K**0.5, wide(k), wide(v)
  decay, a, b, s = map(wide, (decay, a, b, x["state"]))
  out = np.zeros((B, T, H, V))
  for n, t, h in np.ndindex(B, T, H):
    old = s[n, h].copy()
    new = old if decay is None else np.exp(decay[n, t, h]).reshape(-1, 1) * old
    if a is not None:
      new = new + np.outer(b[n, t, h], a[n, t, h] @ old)
    added = np.outer(k[n, t, h], v[n, t, h])
    s[n, h] = new + added
    seen = s[n, h]
    if before is not None:
      seen = old + np.asarray(before, np.float64)[h][:, None] * added
    out[n, t, h] = q[n, t, h] @ seen
  return out, s


def delta(x, decay=None, erase=None, v=None):
  """The delta rule as a loop: the state is read where it has decayed."""
  kept = 1.0 if decay is None else np.exp(np.asarray(decay, np.float64))
  kept = kept if decay is None or decay.ndim == 4 else kept[..., None]
  beta = np.asarray(x["beta"], np.float64)[..., None]
  k = np.asarray(x["k"], np.float64)
  if erase is None:
    return loop(
      x, decay, a=-k * kept, b=beta * k, k=beta * k, v=x["v"]
    )  # fmt: skip
  return loop(x, decay, a=-k * erase * kept, b=k, k=k, v=v)


def simple(x, decay=None):
  return loop(x, decay, k=x["k"], v=x["v"])


def constant(rates):
  return np.broadcast_to(np.asarray(rates, np.float64), (B, T, H))


LAST = dict(output_final_state=True)
CASES = {
  "linear_attn": (
    lambda x: fla.chunk_linear_attn(
      x["q"], x["k"], x["v"], initial_state=x["state"], normalize=False, **LAST
    ),
    simple,
  ),
  "simple_gla": (
    lambda x: fla.chunk_simple_gla(
      x["q"], x["k"], x["v"], x["head"], x["gamma"],
      initial_state=x["state"], **LAST,
    ),
    lambda x: simple(x, x["head"] + x["gamma"]),
  ),
  "retention": (
    lambda x: fla.chunk_retention(
      x["q"], x["k"], x["v"], initial_state=x["state"], **LAST
    ),
    lambda x: simple(x, constant(np.log([1 - 1 / 32, 1 - 1 / 64]))),
  ),
  "lightning_attn": (
    lambda x: fla.chunk_lightning_attn(
      x["q"], x["k"], x["v"], 1, 4, initial_state=x["state"], **LAST
    ),
    lambda x: simple(x, constant([0.0, -3.0])),
  ),
  "gla": (
    lambda x: fla.chunk_gla(
      x["q"], x["k"], x["v"], x["channel"], initial_state=x["state"], **LAST
    ),
    lambda x: simple(x, x["channel"]),
  ),
  "rwkv6": (
    lambda x: fla.chunk_rwkv6(
      x["q"], x["k"], x["v"], x["channel"], x["u"],
      initial_state=x["state"], **LAST,
    ),
    lambda x: loop(x, x["channel"], k=x["k"], v=x["v"], before=x["u"]),
  ),
  "delta_rule": (
    lambda x: fla.chunk_delta_rule(
      x["q"], x["k"], x["v"], x["beta"], initial_state=x["state"], **LAST
    ),
    delta,
  ),
  "gated_delta_rule": (
    lambda x: fla.chunk_gated_delta_rule(
      x["q"], x["k"], x["v"], x["head"], x["beta"],
      initial_state=x["state"], **LAST,
    ),
    lambda x: delta(x, x["head"]),
  ),
  "kda": (
    lambda x: fla.chunk_kda(
      x["q"], x["k"], x["v"], x["channel"], x["beta"],
      initial_state=x["state"], **LAST,
    ),
    lambda x: delta(x, x["channel"]),
  ),
  "gdn2": (
    lambda x: fla.chunk_gdn2(
      x["q"], x["k"], x["v"], x["channel"], x["erase"], x["write"],
      initial_state=x["state"], **LAST,
    ),
    lambda x: delta(x, x["channel"], x["erase"], x["write"] * x["v"]),
  ),
  "dplr_delta_rule": (
    lambda x: fla.chunk_dplr_delta_rule(
      x["q"], x["k"], x["v"], x["a"], x["b"], x["channel"],
      initial_state=x["state"], **LAST,
    ),
    lambda x: loop(x, x["channel"], x["a"], x["b"], x["k"], x["v"]),
  ),
  "iplr_delta_rule": (
    lambda x: fla.chunk_iplr_delta_rule(
      x["q"], x["k"], x["v"], x["a"], x["b"], initial_state=x["state"], **LAST
    ),
    lambda x: loop(x, None, x["a"], x["b"], x["k"], x["v"]),
  ),
  "rwkv7": (
    lambda x: fla.chunk_rwkv7(
      x["q"] / K**0.5, x["channel"], x["k"], x["v"], x["a"], x["b"],
      initial_state=x["state"], **LAST,
    ),
    lambda x: loop(x, x["channel"], x["a"], x["b"], x["k"], x["v"]),
  ),
}  # fmt: skip


QUICK = ("simple_gla", "rwkv6", "gdn2")


@pytest.mark.parametrize(
  "name",
  [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
def test_equations(name):
  ours, theirs = CASES[name]
  x = draw()
  assert checks.relative(jax.jit(ours)(x), theirs(x)) < checks.FORWARD


def test_gated_delta_product():
  """A decay, then N corrections a token."""
  x = draw()
  got = fla.chunk_gated_delta_product(
    x["q"], x["k_n"], x["v_n"], x["head"], x["beta_n"], N,
    initial_state=x["state"], output_final_state=True,
  )  # fmt: skip
  y = {name: np.asarray(z, np.float64) for name, z in x.items()}
  s, out = y["state"].copy(), np.zeros((B, T, H, V))
  for n, t, h in np.ndindex(B, T, H):
    s[n, h] *= np.exp(y["head"][n, t, h])
    for i in range(N * t, N * t + N):
      k, beta = y["k_n"][n, i, h], y["beta_n"][n, i, h]
      s[n, h] += beta * np.outer(k, y["v_n"][n, i, h] - k @ s[n, h])
    out[n, t, h] = y["q"][n, t, h] @ s[n, h] / K**0.5
  assert checks.relative(got, (out, s)) < checks.FORWARD


def test_normalised_linear_attention_and_its_state():
  x = draw()
  x["q"], x["k"] = jnp.exp(x["q"]), jnp.exp(x["k"])
  run = lambda y, state: fla.chunk_linear_attn(
    y["q"], y["k"], y["v"], initial_state=state, output_final_state=True
  )
  o, (s, z) = run(x, None)
  q, k, v = (np.asarray(x[n], np.float64) for n in "qkv")
  weights = np.einsum("bthk,bshk->bhts", q, k) * np.tri(T)
  weights /= weights.sum(-1, keepdims=True)
  want = np.einsum("bhts,bshv->bthv", weights, v)
  assert checks.relative(o, want) < checks.FORWARD
  assert checks.relative(z, k.sum(1, keepdims=True)) < checks.FORWARD
  half = lambda part: {n: x[n][:, part] for n in "qkv"}
  first, state = run(half(slice(0, 2)), None)
  second, state = run(half(slice(2, None)), state)
  got = jnp.concatenate([first, second], 1), state
  assert checks.relative(got, (o, (s, z))) < checks.FORWARD


def test_gated_slots():
  x = draw()
  states = jnp.ones((B, H, K, M)), jnp.ones((B, H, M, V))
  got = fla.chunk_gsa(
    x["q"], x["k"], x["v"], x["slots"], x["slot_gate"], initial_state=states,
    output_final_state=True,
  )  # fmt: skip
  y = {name: np.asarray(z, np.float64) for name, z in x.items()}
  keys, values = (np.array(s, np.float64) for s in states)
  out = np.zeros((B, T, H, V))
  for n, t, h in np.ndindex(B, T, H):
    gate, share = np.exp(y["slot_gate"][n, t, h]), y["slots"][n, t, h]
    keys[n, h] = keys[n, h] * gate + np.outer(y["k"][n, t, h], share)
    score = y["q"][n, t, h] @ keys[n, h] / K**0.5
    score = np.exp(score - score.max())
    values[n, h] = gate[:, None] * values[n, h]
    values[n, h] += np.outer(share, y["v"][n, t, h])
    out[n, t, h] = score @ values[n, h] / score.sum()
  assert checks.relative(got, (out, (keys, values))) < checks.FORWARD


def test_mesa_net_solves_the_ridge_regression():
  x = draw()
  ridge = jnp.full((H, K), 0.5)
  o, kk, kv = fla.chunk_mesa_net(
    x["q"], x["k"], x["v"], x["head"], x["beta"], ridge,
    output_final_state=True,
  )  # fmt: skip
  y = {name: np.asarray(z, np.float64) for name, z in x.items()}
  h_kk, h_kv = np.zeros((B, H, K, K)), np.zeros((B, H, K, V))
  out = np.zeros((B, T, H, V))
  for n, t, h in np.ndindex(B, T, H):
    gate, k = np.exp(y["head"][n, t, h]), y["k"][n, t, h]
    beta = y["beta"][n, t, h]
    h_kk[n, h] = gate * h_kk[n, h] + beta * np.outer(k, k)
    h_kv[n, h] = gate * h_kv[n, h] + beta * np.outer(k, y["v"][n, t, h])
    solved = np.linalg.solve(h_kk[n, h] + 0.5 * np.eye(K), y["q"][n, t, h])
    out[n, t, h] = solved @ h_kv[n, h]
  assert checks.relative((kk, kv), (h_kk, h_kv)) < checks.FORWARD
  assert checks.relative(o, out) < 1e-4  # the solver stops


def test_based_and_hgrn():
  x = draw()
  q, k, v = (np.asarray(x[n], np.float64) for n in "qkv")
  s = np.einsum("bthk,bshk->bhts", q, k) / K**0.5
  weights = (1 + s + s**2 / 2) * np.tri(T)
  want = np.einsum("bhts,bshv->bthv", weights, v)
  got = fla.parallel_based(x["q"], x["k"], x["v"], use_norm=False)
  assert checks.relative(got, want) < checks.FORWARD
  want /= weights.sum(-1).swapaxes(1, 2)[..., None] + 1e-6
  got = fla.parallel_based(x["q"], x["k"], x["v"])
  assert checks.relative(got, want) < checks.FORWARD
  g, h, want = x["channel"][:, :, 0], jnp.ones((B, K)), []
  last = np.asarray(h, np.float64)
  for t in range(T):
    last = np.exp(np.asarray(g, np.float64)[:, t]) * last + q[:, t, 0]
    want.append(last)
  got = fla.fused_recurrent_hgrn(x["q"][:, :, 0], g, h, True)
  assert checks.relative(got, (np.stack(want, 1), last)) < checks.FORWARD


@pytest.mark.parametrize(
  "name",
  [
    "gated_delta_rule",
    pytest.param("rwkv6", marks=pytest.mark.slow),
    pytest.param("dplr_delta_rule", marks=pytest.mark.slow),
  ],
)
def test_packed_sequences(name):
  """Each of the packed ones is what it is alone, its states too; under jit and
  without states they are resets."""
  x = draw()
  call = {
    "gated_delta_rule": lambda x, **more: fla.chunk_gated_delta_rule(
      x["q"], x["k"], x["v"], x["head"], x["beta"], **more
    ),
    "rwkv6": lambda x, **more: fla.chunk_rwkv6(
      x["q"], x["k"], x["v"], x["channel"], x["u"], **more
    ),
    "dplr_delta_rule": lambda x, **more: fla.chunk_dplr_delta_rule(
      x["q"], x["k"], x["v"], x["a"], x["b"], x["channel"], **more
    ),
  }[name]
  part = lambda a, b: {
    n: z[:1, a:b] if n not in OWN else z for n, z in x.items()
  }
  ends = np.asarray([0, 2, 5])
  for state in (None, x["state"]):
    o, last = call(
      part(0, T), initial_state=state, output_final_state=True, cu_seqlens=ends
    )
    for n, (a, b) in enumerate(zip(ends, ends[1:])):
      own = None if state is None else state[n : n + 1]
      want = call(part(a, b), initial_state=own, output_final_state=True)
      got = o[:, a:b], last[n : n + 1]
      assert checks.relative(got, want) < checks.FORWARD
    if state is None:
      jitted = jax.jit(lambda x, ends: call(x, cu_seqlens=ends))
      got, none = jitted(part(0, T), jnp.asarray(ends))
      assert none is None and checks.relative(got, o) < checks.FORWARD
  with pytest.raises(NotImplementedError, match="cu_seqlens is traced"):
    jax.jit(
      lambda ends: call(part(0, T), output_final_state=True, cu_seqlens=ends)
    )(jnp.asarray(ends))
  with pytest.raises(ValueError, match="1 row of packed"):
    call(x, cu_seqlens=ends)
  with pytest.raises(ValueError, match="one entry for each of the 1"):
    call(part(0, T), initial_state=x["state"])


def test_options_of_the_kernels():
  """Grouped heads, raw gates, norms, state layout, and token by token."""
  x = draw()
  want = fla.chunk_gated_delta_rule(
    jnp.repeat(x["q"][:, :, :1], 2, 2), jnp.repeat(x["k"][:, :, :1], 2, 2),
    x["v"], x["head"], x["beta"], output_final_state=True,
  )  # fmt: skip
  got = fla.fused_recurrent_gated_delta_rule(
    x["q"][:, :, :1], x["k"][:, :, :1], x["v"], x["head"], x["beta"],
    output_final_state=True, state_v_first=True, chunk_indices=None,
  )  # fmt: skip
  got = got[0], jnp.swapaxes(got[1], 2, 3)
  assert checks.relative(got, want) < checks.FORWARD
  a_log, bias = jnp.asarray([0.1, 0.4]), jnp.arange(8.0) / 10
  raw = np.asarray(x["channel"], np.float64)
  soft = np.log1p(np.exp(raw + np.arange(H * K).reshape(H, K) / 10))
  g = -np.exp(np.asarray([0.1, 0.4]))[:, None] * soft
  unit = lambda z: z / np.sqrt((z**2).sum(-1, keepdims=True) + 1e-6)
  want = fla.chunk_kda(
    unit(x["q"]), unit(x["k"]), x["v"], jnp.asarray(g, jnp.float32),
    2 * jax.nn.sigmoid(x["beta"]),
  )  # fmt: skip
  got = fla.chunk_kda(
    x["q"], x["k"], x["v"], x["channel"], x["beta"], A_log=a_log, dt_bias=bias,
    use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
    use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True,
  )  # fmt: skip
  assert checks.relative(got[0], want[0]) < checks.FORWARD


def test_wrong_calls():
  x = draw()
  with pytest.raises(TypeError, match="unknown argument 'head_first'"):
    fla.chunk_gla(x["q"], x["k"], x["v"], x["channel"], head_first=True)
  with pytest.raises(ValueError, match=r"v must be \[B, T, ...\]"):
    fla.chunk_gla(x["q"], x["k"], x["v"][:, 1:], x["channel"])
  with pytest.raises(AttributeError, match="chunk_gla"):
    fla.chunk_glaa  # noqa: B018
