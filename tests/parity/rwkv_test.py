"""RWKV-6 and RWKV-7 on the authors' package `rwkv`: whole layers with random
weights in the layout of published files, values and states."""

import importlib

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import convert

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore"),  # theirs
]
B, T, D, K = 2, 67, 12, 4
CONFIGS = {
  "rwkv6": dict(TIME_MIX_EXTRA_DIM=3, TIME_DECAY_EXTRA_DIM=2),
  "rwkv7": dict(D_DECAY_LORA=3, D_AAA_LORA=2, D_GATE_LORA=5),
}


@pytest.fixture
def model(monkeypatch):
  """Their module, as a function of the version that it is to hold."""
  pytest.importorskip("torch")
  pytest.importorskip("rwkv")
  monkeypatch.setenv("RWKV_JIT_ON", "0")
  monkeypatch.setenv("RWKV_CUDA_ON", "0")

  def load(name):
    monkeypatch.setenv("RWKV_V7_ON", str(int(name == "rwkv7")))
    return importlib.reload(importlib.import_module("rwkv.model"))

  return load


def layer6(module, w, x, shift, state):
  """Their layer begins with a norm and ends with the residual sum."""
  norm = [module.torch.ones(D), module.torch.zeros(D)]
  mix = [w[f"time_maa_{n}"][0, 0] for n in "xwkvrg"]
  maps = [w[f"{n}.weight"].T for n in ("key", "value", "receptance", "gate")]
  y, shift, state = module.RWKV.att_seq_v6_0(
    None, x, shift, state, *norm, w["ln_x.weight"], w["ln_x.bias"], *mix,
    w["time_maa_w1"], w["time_maa_w2"], w["time_decay_w1"], w["time_decay_w2"],
    w["time_decay"].reshape(-1, K, 1), w["time_faaaa"][..., None], *maps,
    w["output.weight"].T, *[None] * 20,
  )  # fmt: skip
  return y - x, shift, state


def layer7(module, w, x, shift, state):
  """Their state holds values by keys, ours keys by values."""
  vector = lambda *names: [w[n].flatten() for n in names]
  low = lambda n: [*vector(f"{n}0"), w[f"{n}1"], w[f"{n}2"]]
  maps = [
    w[f"{n}.weight"].T for n in ("receptance", "key", "value", "output")
  ]  # fmt: skip
  y, shift, state, _ = module.RWKV_x070_TMix_seq(
    0, D // K, K, x, shift, None, state.mT,
    *vector(*(f"x_{n}" for n in "rwkvag")), *low("w"), *low("a"),
    None, None, None, w["g1"], w["g2"], *vector("k_k", "k_a", "r_k"), *maps,
    w["ln_x.weight"], w["ln_x.bias"],
  )  # fmt: skip
  return y, shift, state.mT


def normed(x):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_layer(model, name):
  module = model(name)
  torch = module.torch
  cell = convert.make(name, dict(n_embd=D, head_size=K) | CONFIGS[name])
  shapes = convert.source(name)._shapes(cell)
  r = np.random.default_rng(4)
  # Mixing rates around a half, maps that keep the scale, norms around one.
  size = lambda n, s: 0.4 + (D**-0.5 if n.endswith("weight") else 0.0)
  weights = {
    n: (size(n, s) * r.normal(size=s) + 0.5 * (len(s) != 2)).astype(np.float32)
    for n, s in shapes.items()
  }
  params = convert.to_params(name, cell, weights)
  back = convert.to_weights(name, cell, params)
  assert back.keys() == weights.keys()
  for n, w in weights.items():
    np.testing.assert_array_equal(back[n], w, err_msg=n)

  x, shift, state = (
    r.normal(size=s).astype(np.float32)
    for s in ((B, T, D), (B, D), (B, D // K, K, K))
  )
  run = {"rwkv6": layer6, "rwkv7": layer7}[name]
  w = {n: torch.tensor(z) for n, z in weights.items()}
  with torch.no_grad():
    want = [
      run(module, w, *map(torch.tensor, (x[b], shift[b], state[b])))
      for b in range(B)
    ]  # fmt: skip
  want = [np.stack([z.numpy() for z in part]) for part in zip(*want)]

  given = x  # with the state [H, K, K] and the input before, of either cell
  start = jax.vmap(lambda _: cell.initial_state(params))(jnp.arange(B))
  start = type(start)(state, shift.reshape(start[1].shape))
  if name == "rwkv6":
    given = normed(x.astype(np.float64)).astype(np.float32)
  for form in ("step", "scan", "chunk"):
    scan = lambda s, x, form=form: memzoo.scan(
      cell, params, s, x, implementation=form
    )
    after, y = jax.jit(jax.vmap(scan))(start, jnp.asarray(given))
    got = y, jnp.reshape(after[1], shift.shape), after[0]
    error = checks.relative(got, want)
    print(f"{name} {form}: relative error {error:.1e}")
    assert error < checks.FORWARD
