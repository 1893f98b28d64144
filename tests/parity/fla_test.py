"""Our ops, and the names of `memzoo.compat.fla`, on the naive functions of
flash-linear-attention: values and final states, from given states.

Runs where fla-core is; it wants no transformers beside it:
  python -m pytest -n 0 tests/parity/fla_test.py
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib
import importlib.util
from typing import Any

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import ops
from memzoo.compat import fla
from memzoo.ops import features
from memzoo.ops.batched import batched
from memzoo.ops.deep_gradient_step import (
  Layer,
  deep_gradient_step,
  start as start_deep,
)
from memzoo.ops.gradient_step import Learner, Model, gradient_step, start
from memzoo.ops.mesa import State as MesaState, mesa
from memzoo.ops.running_softmax import empty, running_softmax
from memzoo.ops.value_decay import value_decay

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore"),  # theirs: no accelerator here
]

# Two heads of keys for four of values where theirs can share; a length that
# fills a chunk of 64 and begins another; n corrections a token; TTT's batches.
B, T, H, K, V, M, N, BATCH = 2, 67, 2, 5, 3, 4, 3, 16
RATES = 1.0 / np.arange(1, BATCH + 1)


def draw():
  """Arrays by the names that the cases use."""
  r = np.random.default_rng(0)
  normal = lambda *shape: r.normal(size=shape)
  unit = lambda *shape: (lambda x: x / np.linalg.norm(x, axis=-1)[..., None])(
    normal(*shape)
  )
  sigmoid = lambda *shape: 1 / (1 + np.exp(-normal(*shape)))
  gate = lambda *shape: np.log(sigmoid(*shape))
  x = dict(
    q=normal(B, T, H, K), k=unit(B, T, H, K), v=normal(B, T, H, V),
    head=gate(B, T, H), channel=gate(B, T, H, K), beta=sigmoid(B, T, H),
    a=-unit(B, T, H, K), b=unit(B, T, H, K), u=normal(H, K),
    erase=sigmoid(B, T, H, K), write=sigmoid(B, T, H, V),
    slots=sigmoid(B, T, H, M), slot_gate=gate(B, T, H, M),
    wide_v=normal(B, T, 2 * H, V), wide_gate=gate(B, T, 2 * H, K),
    wide_beta=sigmoid(B, T, 2 * H), wide_state=normal(B, 2 * H, K, V),
    k_n=unit(B, N * T, H, K), v_n=normal(B, N * T, H, V),
    beta_n=2 * sigmoid(B, N * T, H), square_v=normal(B, T, H, K),
    ridge=0.3 + sigmoid(H, K), positive_q=sigmoid(B, T, H, K),
    positive_k=sigmoid(B, T, H, K), x=normal(B, T, K), g=gate(B, T, K),
    state=normal(B, H, K, V), square=0.2 * normal(B, H, K, K),
    bias=0.2 * normal(B, H, 1, K), norm=1 + 0.3 * normal(H, K),
    shift=0.3 * normal(H, K), vector=normal(B, K), sum=sigmoid(B, 1, H, K),
    slot_keys=normal(B, H, K, M), slot_values=normal(B, H, M, V),
  )  # fmt: skip
  half = normal(B, H, K, K)
  x["moments"] = half @ np.swapaxes(half, -1, -2) / K
  x["momentum"], x["rate"] = 0.2 * normal(B, H, K, K), 0.5 * sigmoid(B, T, H)
  x["ones"] = np.ones((B, T, H))
  x["keep"] = gate(B, T, H)
  return {n: np.asarray(z, np.float32) for n, z in x.items()}


@dataclasses.dataclass(frozen=True)
class Case:
  """One of their functions and ours.

  Attributes:
    theirs: its module below fla.ops, and its name.
    given: {its argument: name of an array, or a value}.
    op: (arrays, form) -> what it returns, by an op of ours.
    compat: the function of `memzoo.compat.fla`, or ''.
    renamed: {its argument: what that of `compat` is called}.
    heads_first: whether theirs takes [B, H, T, ...].
  """

  theirs: str
  given: dict[str, Any]
  op: Callable
  compat: str = ""
  renamed: dict[str, str] = dataclasses.field(default_factory=dict)
  heads_first: bool = False


LAST = dict(output_final_state=True)
QKV = dict(q="q", k="k", v="v")
FROM = QKV | dict(initial_state="state") | LAST
SCALE = K**-0.5


def matrix(op, k="k", v="v", state="state", q="q", scale=SCALE, **gates):
  """(arrays, form) -> (o, state) of an op on matrices, at scaled queries."""

  def run(x, form):
    more = {n: x[z] for n, z in gates.items()}
    s, o = batched(op)(
      x[state], x[q] * jnp.float32(scale), x[k], x[v], **more,
      implementation=form,
    )  # fmt: skip
    return o, s

  return run


def from_nothing(run, width=V):
  zeros = jnp.zeros((B, H, K, width))
  return lambda x, form: run(x | dict(state=zeros), form)[:1]


def normalized(x, form):
  """Linear attention over q·Σ k, by one more column of values."""
  ones = jnp.ones((B, T, H, 1))
  s = jnp.concatenate([x["state"], x["sum"][:, 0, ..., None]], -1)
  v = jnp.concatenate([x["v"], ones], -1)
  run = matrix(ops.linear_attention, q="positive_q", k="positive_k")
  o, s = run(x | dict(state=s, v=v), form)
  return o[..., :-1] / o[..., -1:], (s[..., :-1], s[:, None, ..., -1])


def retention(x, form):
  rates = np.log1p(-(2.0 ** (-5.0 - np.arange(H)))).astype(np.float32)
  gates = jnp.broadcast_to(rates, (B, T, H))
  return from_nothing(matrix(ops.linear_attention, log_decay="gates"))(
    x | dict(gates=gates), form
  )


def rwkv6(x, form):
  """What r reads has not decayed yet: steps shifted by one."""
  late = lambda z: jnp.pad(z, ((0, 0), (1, 0)) + ((0, 0),) * (z.ndim - 2))
  q = jnp.pad(x["q"], ((0, 0), (0, 1), (0, 0), (0, 0)))
  shifted = dict(
    q=q, k=late(x["k"]), v=late(x["v"]), channel=late(x["channel"])
  )
  run = matrix(ops.linear_attention, log_decay="channel")
  o, s = run(x | shifted, form)
  bonus = jnp.sum(x["q"] * x["k"] * x["u"], -1, keepdims=True) * SCALE
  return o[:, :-1] + bonus * x["v"], s


def wide_delta(x, form):
  more = lambda z: jnp.repeat(z, 2, axis=2)
  x = x | dict(q=more(x["q"]), k=more(x["k"]))
  return matrix(
    ops.delta_rule, v="wide_v", state="wide_state", beta="wide_beta",
    log_decay="wide_gate",
  )(x, form)  # fmt: skip


def product(x, form):
  """n corrections a token, of which the first decays and the last reads."""

  def spread(z, place):
    return jnp.zeros((B, T, N, *z.shape[2:])).at[:, :, place].set(z).reshape(
      B, N * T, *z.shape[2:]
    )  # fmt: skip

  x = x | dict(q=spread(x["q"], N - 1), gates=spread(x["head"], 0))
  o, s = matrix(
    ops.delta_rule, k="k_n", v="v_n", beta="beta_n", log_decay="gates"
  )(x, form)
  return o[:, N - 1 :: N], s


def gdn2(x, form):
  """Erases under b ∘ k, after the decay; writes w ∘ v."""
  a = -jnp.exp(x["channel"]) * x["erase"] * x["k"]
  x = x | dict(a=a, v=x["write"] * x["v"])
  run = matrix(ops.diag_plus_rank_one, a="a", log_decay="channel")
  return run(x, form)


def slots(x, form):
  keys = matrix(
    value_decay, v="slots", state="slot_keys", log_decay="slot_gate"
  )
  scores, keys = keys(x, form)
  share = jax.nn.softmax(scores, -1)
  values = matrix(
    ops.linear_attention, q="share", k="slots", state="slot_values", scale=1.0,
    log_decay="slot_gate",
  )  # fmt: skip
  o, values = values(x | dict(share=share), form)
  return o, (keys, values)


def taylor(x, form, normalize=True):
  """1 + s + s² / 2 by `features.taylor`, which divides by sqrt(K) itself."""
  ones = jnp.ones((B, T, H, 1))
  x = x | dict(
    q=features.taylor(x["q"]), k=features.taylor(x["k"]),
    v=jnp.concatenate([x["v"], ones], -1),
    state=jnp.zeros((B, H, 1 + K + K * K, V + 1)),
  )  # fmt: skip
  o, _ = matrix(ops.linear_attention, scale=1.0)(x, form)
  return o[..., :-1] / o[..., -1:] if normalize else o[..., :-1]


def ridge(x, form):
  one = lambda s, ridge, q, k, v, beta, g: mesa(
    s, q, k, v, beta=beta, ridge=ridge, log_decay=g, implementation=form
  )
  heads = jax.vmap(one, (0, 0, 1, 1, 1, 1, 1), (0, 1))
  rows = jax.vmap(heads, (0, None, 0, 0, 0, 0, 0))
  s, o = rows(
    MesaState(x["moments"], x["square"]), x["ridge"], x["q"], x["k"],
    x["square_v"], x["beta"], x["head"],
  )  # fmt: skip
  return o, s.kk, s.kv


def diagonal(x, form):
  one = functools.partial(ops.linear_recurrence, implementation=form)
  h, o = jax.vmap(lambda h, x, a: one(h, x, decay=a))(
    x["vector"], x["x"], jnp.exp(x["g"])
  )
  return o, h


def momentum(x, form):
  """The delta rule with momentum: Titans' exact rule of one linear map."""

  def one(w, s, q, k, v, rate, decay, keep):
    state = start_deep((Layer(w),), size=1, momentum=True)
    state = state._replace(momentum=(Layer(-s),))  # they add errors p S − v
    state, out = deep_gradient_step(
      state, q, k, v, rate=rate, size=1, log_decay=decay, log_momentum=keep,
      implementation=form,
    )  # fmt: skip
    return out.o, state.model[0].w, state.momentum[0].w

  heads = jax.vmap(one, (0, 0, 1, 1, 1, 1, 1, 1), (1, 0, 0))
  o, w, s = jax.vmap(heads)(
    x["square"], x["momentum"], x["q"] * jnp.float32(SCALE), x["k"],
    x["square_v"], x["rate"], x["head"], x["keep"],
  )  # fmt: skip
  return o, jnp.stack([w, -s])


LINEAR, DELTA, RANK_ONE = (
  ops.linear_attention, ops.delta_rule, ops.diag_plus_rank_one,
)  # fmt: skip
CASES = {
  "linear_attn": Case(
    "linear_attn.naive:naive_recurrent_linear_attn",
    FROM | dict(normalize=False), matrix(LINEAR), "chunk_linear_attn",
  ),
  "linear_attn normalized": Case(
    "linear_attn.naive:naive_recurrent_linear_attn",
    FROM | dict(
      q="positive_q", k="positive_k", initial_state=("state", "sum"),
      normalize=True,
    ),
    normalized, "chunk_linear_attn",
  ),
  "simple_gla": Case(
    "simple_gla.naive:naive_recurrent_simple_gla", FROM | dict(g="head"),
    matrix(LINEAR, log_decay="head"), "chunk_simple_gla",
  ),
  "gla": Case(
    "gla.naive:naive_recurrent_gla", FROM | dict(gk="channel"),
    matrix(LINEAR, log_decay="channel"), "chunk_gla", dict(gk="g"),
  ),
  "retention": Case(
    "retention.naive:naive_retention", QKV, retention, "chunk_retention",
    heads_first=True,
  ),
  "rwkv6": Case(
    "rwkv6.recurrent_naive:naive_recurrent_rwkv6",
    FROM | dict(w="channel", u="u"), rwkv6, "chunk_rwkv6", dict(q="r"),
    heads_first=True,
  ),
  "delta_rule": Case(
    "delta_rule.naive:delta_rule_recurrence", FROM | dict(beta="beta"),
    matrix(DELTA, beta="beta"), "chunk_delta_rule", heads_first=True,
  ),
  "gated_delta_rule": Case(
    "gated_delta_rule.naive:naive_recurrent_gated_delta_rule",
    FROM | dict(g="head", beta="beta"),
    matrix(DELTA, beta="beta", log_decay="head"), "chunk_gated_delta_rule",
  ),
  "gated_delta_product": Case(
    "gated_delta_product.naive:naive_recurrent_gated_delta_product",
    FROM | dict(
      k="k_n", v="v_n", beta="beta_n", g="head", scale=SCALE,
      num_householder=N,
    ),
    product, "chunk_gated_delta_product",
  ),
  "kda": Case(
    "kda.naive:naive_recurrent_kda", FROM | dict(g="channel", beta="beta"),
    matrix(DELTA, beta="beta", log_decay="channel"), "chunk_kda",
  ),
  "kda shared keys": Case(
    "kda.naive:naive_recurrent_kda",
    FROM | dict(
      v="wide_v", g="wide_gate", beta="wide_beta", initial_state="wide_state"
    ),
    wide_delta, "chunk_kda",
  ),
  "gdn2": Case(
    "gdn2.naive:naive_recurrent_gdn2",
    FROM | dict(g="channel", b="erase", w="write"), gdn2, "chunk_gdn2",
  ),
  "dplr": Case(
    "generalized_delta_rule.dplr.naive:dplr_recurrence",
    FROM | dict(alpha="a", beta="b", gk="channel"),
    matrix(RANK_ONE, a="a", b="b", log_decay="channel"),
    "chunk_dplr_delta_rule", dict(alpha="a", beta="b"), heads_first=True,
  ),
  "iplr": Case(
    "generalized_delta_rule.iplr.naive:iplr_recurrence",
    FROM | dict(alpha="a", beta="b"), matrix(RANK_ONE, a="a", b="b"),
    "chunk_iplr_delta_rule", dict(alpha="a", beta="b"), heads_first=True,
  ),
  "gsa": Case(
    "gsa.naive:naive_recurrent_gsa",
    FROM | dict(
      s="slots", g="slot_gate", initial_state=("slot_keys", "slot_values")
    ),
    slots, "chunk_gsa",
  ),
  "based": Case(
    "based.naive:naive_parallel_based", QKV, lambda x, form: (taylor(x, form),),
    "parallel_based", heads_first=True,
  ),
  "based without norm": Case(
    "based.naive:naive_parallel_based", QKV | dict(use_norm=False),
    lambda x, form: (taylor(x, form, False),), "parallel_based",
    heads_first=True,
  ),
  "mesa_net": Case(
    "mesa_net.naive:naive_mesa_net_exact",
    dict(
      q="q", k="k", v="square_v", g="head", beta="beta", lamb="ridge",
      h_kk_init="moments", h_kv_init="square",
    ),
    ridge, "chunk_mesa_net",
  ),
  "hgrn": Case(
    "hgrn.naive:naive_recurrent_hgrn",
    dict(x="x", g="g", initial_state="vector") | LAST, diagonal,
    "fused_recurrent_hgrn",
  ),
  "momentum_delta_rule": Case(
    "momentum_delta_rule.naive:recurrent_momentum_delta_rule_ref",
    dict(
      q="q", k="k", p="k", v="square_v", log_alpha="head", log_mu="keep",
      beta="ones", eta="rate", initial_S="square", initial_M="momentum",
    ) | LAST,
    momentum,
  ),
}  # fmt: skip
# The forms that differ: all but these have both.
FORMS = {"momentum_delta_rule": ("scan",), "hgrn": ("scan", "chunk", "assoc")}


def load(where):
  """A function of theirs by 'module:name'."""
  pytest.importorskip("torch", reason="needs torch")
  if importlib.util.find_spec("fla") is None:
    pytest.skip("needs fla-core, in an environment without transformers")
  module, _, name = where.partition(":")
  return getattr(importlib.import_module(f"fla.ops.{module}"), name)


def tensor(x, heads_first):
  import torch

  if isinstance(x, tuple):
    return tuple(tensor(y, False) for y in x)
  x = np.swapaxes(x, 1, 2) if heads_first and x.shape[1] == T else x
  return torch.tensor(np.ascontiguousarray(x))


def look_up(arrays, given):
  """Values of arguments: arrays by their names."""
  find = lambda z: arrays[z] if isinstance(z, str) else z
  return {
    n: tuple(map(find, z)) if isinstance(z, tuple) else find(z)
    for n, z in given.items()
  }


@pytest.mark.parametrize("name", CASES)
def test_naive(name):
  case, arrays = CASES[name], draw()
  theirs = load(case.theirs)
  given = look_up(arrays, case.given)
  convert = lambda z: (
    tensor(z, case.heads_first) if isinstance(z, (np.ndarray, tuple)) else z
  )
  want = theirs(**{n: convert(z) for n, z in given.items()})
  want = [z.numpy() for z in jax.tree.leaves(want)]
  if case.heads_first:
    want[0] = np.swapaxes(want[0], 1, 2)

  def compat(arrays, form):
    given = look_up(arrays, case.given)
    if name == "mesa_net":
      given |= LAST
    given = {case.renamed.get(n, n): z for n, z in given.items()}
    return getattr(fla, case.compat)(**given)

  forms = dict.fromkeys(FORMS.get(name, ("scan", "chunk")), case.op)
  forms |= {case.compat: compat} if case.compat else {}
  for form, run in forms.items():
    run = jax.jit(functools.partial(run, form=form))
    got = jax.tree.leaves(run(arrays))
    assert len(want) in (len(got), 1), form
    error = checks.relative(got[: len(want)], want)
    print(f"{name} {form}: relative error {error:.1e}")
    assert error < checks.FORWARD, form


@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_lightnet(form):
  """Keys and gates as their layer makes them, by torch's logcumsumexp, before
  the op that the layer uses."""
  theirs, x = load("gla.naive:naive_recurrent_gla"), draw()
  import torch

  q, k, v = (tensor(x[n], False) for n in ("positive_q", "q", "v"))
  z = k.logcumsumexp(1)
  gates = torch.cat((z[:, :1], z[:, :-1]), 1) - z
  want = theirs(q, torch.exp(k - z), v, gates, output_final_state=True)

  @jax.jit
  def run(x):
    start = jnp.zeros((B, H, K)) + empty(K)
    z, (log_decay, share) = batched(running_softmax)(start, x["q"])
    s, o = batched(ops.linear_attention)(
      jnp.zeros((B, H, K, V)), x["positive_q"] * jnp.float32(SCALE), share,
      x["v"], log_decay=log_decay, implementation=form,
    )  # fmt: skip
    return (o, s), z

  got, last = run(x)
  error = checks.relative(
    (got, last), (tuple(map(np.asarray, want)), z[:, -1].numpy())
  )
  print(f"lightnet {form}: relative error {error:.1e}")
  assert error < checks.FORWARD, form


@pytest.mark.parametrize("form", ["scan", "chunk"])
def test_ttt_linear(form):
  """Their rates are those of places, where the token that reads stands; what it
  reads, z, they add to its own norm, o = z + LN(z), where the paper adds q."""
  theirs, arrays = load("ttt.naive:chunk_ttt_linear_ref"), draw()
  length = T // BATCH * BATCH  # theirs learns from its padding
  x = {n: z[:, :length] for n, z in arrays.items() if z.shape[:2] == (B, T)}
  q, k, v = x["q"], x["k"], x["square_v"]
  rates = np.broadcast_to(RATES.astype(np.float32), (length // BATCH, BATCH))
  eta = np.broadcast_to(rates.reshape(1, -1, 1, 1), (B, length, H, 1))
  mine = lambda z: tensor(z, False)
  want, *state = theirs(
    mine(q), mine(k), mine(v), mine(arrays["norm"]), mine(arrays["shift"]),
    mine(eta), mini_batch_size=BATCH, initial_state=mine(arrays["square"]),
    initial_state_bias=mine(arrays["bias"]), output_final_state=True,
  )  # fmt: skip
  q = q * np.float32(SCALE)

  def one(w, b, q, k, v, scale, shift):
    learner = Learner(jnp.asarray(RATES, jnp.float32), scale, shift)
    s, out = gradient_step(
      start(Model(w, b)), q, k, v, rate=jnp.ones(length), learner=learner,
      residual=True, implementation=form,
    )  # fmt: skip
    return out.o, s.model.w, s.model.b[None]

  heads = jax.vmap(one, (0, 0, 1, 1, 1, 0, 0), (1, 0, 0))
  rows = jax.jit(jax.vmap(heads, (0, 0, 0, 0, 0, None, None)))
  o, *got = rows(
    arrays["square"], arrays["bias"][:, :, 0], q, k, v, arrays["norm"],
    arrays["shift"],
  )  # fmt: skip
  normed = np.asarray(o, np.float64) - q
  z = want.numpy() - normed
  centred = z - z.mean(-1, keepdims=True)
  deviation = np.sqrt(z.var(-1, keepdims=True) + 1e-6)
  again = centred / deviation * arrays["norm"] + arrays["shift"]
  error = checks.relative((normed, *got), (again, *(s.numpy() for s in state)))
  print(f"ttt {form}: relative error {error:.1e}")
  assert error < checks.FORWARD
