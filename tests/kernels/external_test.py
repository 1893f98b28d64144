"""Forms that are other packages' kernels: our ops' numbers, or a reason."""

import importlib.util

import checks
import jax
import jax.numpy as jnp
import pytest

from memzoo import kernels, ops
from memzoo.ops.attention import empty

B, T, H, K, V = 2, 9, 2, 4, 3
HAS_JLA = importlib.util.find_spec("jla") is not None
HAS_TOKAMAX = importlib.util.find_spec("tokamax") is not None
TOKAMAX = [
  pytest.mark.parity,
  pytest.mark.skipif(not HAS_TOKAMAX, reason="tokamax is missing"),
]


def draw(decay="scalar", values=V):
  keys = iter(jax.random.split(jax.random.key(0), 9))
  normal = lambda *shape: jax.random.normal(next(keys), shape)
  shape = (B, T, H) + ((K,) if decay == "channel" else ())
  return dict(
    s=normal(B, H, K, values), q=normal(B, T, H, K), k=normal(B, T, H, K) / 2,
    v=normal(B, T, H, values), log_decay=-jnp.exp(normal(*shape)),
    beta=jax.nn.sigmoid(normal(B, T, H)),
    reset=jax.random.bernoulli(next(keys), 0.2, (B, T)),
  )  # fmt: skip


@pytest.mark.parity
@pytest.mark.skipif(not HAS_JLA, reason="jax-linear-attention is missing")
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_jax_linear_attention(op, decay):
  """Its reference form in our layout, mapped over heads and batch: values,
  final state and gradients, with resets."""
  c = draw(decay)
  beta, reset = c.pop("beta"), c.pop("reset")
  gates = dict(beta=beta) if op == "delta_rule" else {}
  call = ops.batched(getattr(ops, op))

  def run(form):
    def loss(c, gates):
      args = [c[name] for name in "sqkv"]
      out = call(
        *args, log_decay=c["log_decay"], **gates, reset=reset,
        implementation=form,
      )  # fmt: skip
      return checks.wave(*out), out

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(c, gates)

  with kernels.interpret():
    got = run("jla")
  assert checks.relative(got, run("scan")) <= checks.FORWARD


def test_jax_linear_attention_where_it_does_not_serve():
  c = draw()
  args = [c[n][0, 0] if n == "s" else c[n][0, :, 0] for n in "sqkv"]
  with pytest.raises(NotImplementedError, match="missing|Hopper"):
    ops.linear_attention(
      *args, log_decay=c["log_decay"][0, :, 0], implementation="jla"
    )


@pytest.mark.parametrize(
  "form, values",
  [
    ("cudnn", K),
    pytest.param("tokamax", K, marks=TOKAMAX),
    pytest.param("tokamax", V, marks=TOKAMAX),
  ],
)
def test_attention(form, values):
  """Theirs in the place of ours, with XLA's attention in it, mapped over heads:
  a ring that holds something, sinks, resets, gaps."""
  c = draw(values=values)
  q, k, v = (jnp.moveaxis(c[n][0], 1, 0) for n in "qkv")
  mask = jnp.arange(T) != 4
  reset = jnp.arange(T) == 6
  ring, _ = jax.vmap(
    lambda q, k, v: ops.attention(empty(5, K, values), q, k, v, sinks=1)
  )(q[:, :3], k[:, :3], v[:, :3])

  def run(form, **flags):
    def one(ring, q, k, v):
      return ops.attention(ring, q, k, v, sinks=1, implementation=form, **flags)

    def loss(q, k, v):
      out = jax.vmap(one)(ring, q, k, v)
      return checks.wave(out[0].k, out[1]), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

  for flags in ({}, dict(reset=reset, mask=mask)):
    want = run("scan", **flags)
    with kernels.interpret():
      got = run(form, **flags)
    assert checks.relative(got, want) <= checks.FORWARD


def test_cudnn_where_it_does_not_serve():
  c = draw()
  q, k, v = (c[n][0, :, 0] for n in "qkv")
  with pytest.raises(NotImplementedError, match="NVIDIA"):
    ops.attention(empty(5, K, V), q, k, v, implementation="cudnn")
  with kernels.interpret(), pytest.raises(NotImplementedError, match="K = V"):
    ops.attention(empty(5, K, V), q, k, v, implementation="cudnn")


def test_tokamax_where_it_does_not_serve():
  c = draw()
  q, k, v = (c[n][0, :, 0] for n in "qkv")
  with pytest.raises(NotImplementedError, match="missing|for GPUs"):
    ops.attention(empty(5, K, V), q, k, v, implementation="tokamax")
