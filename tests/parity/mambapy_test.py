"""Mamba's selective scan and layer on mambapy (mamba.py)."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import convert
from memzoo.ops.selective_scan import selective_scan

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore"),  # theirs
]
B, T, D, N = 2, 67, 6, 5


def block():
  """Their block with random weights, and those as of a Mamba mixer."""
  torch = pytest.importorskip("torch")
  mambapy = pytest.importorskip("mambapy.mamba")
  config = mambapy.MambaConfig(
    d_model=D, n_layers=1, d_state=N, dt_rank=2, d_conv=3, expand_factor=2
  )
  module = mambapy.MambaBlock(config).eval()
  r = np.random.default_rng(6)
  with torch.no_grad():
    for p in module.parameters():
      p.copy_(torch.tensor(0.4 * r.normal(size=p.shape) + (p.ndim == 1) * 0.5))
  return module, {n: w.numpy() for n, w in module.state_dict().items()}


@pytest.mark.parametrize("form", ["scan", "chunk"])
@pytest.mark.parametrize("theirs", ["selective_scan", "selective_scan_seq"])
def test_selective_scan(theirs, form):
  module, _ = block()
  import torch

  r = np.random.default_rng(7)
  x, b, c = (r.normal(size=(B, T, n)) for n in (2 * D, N, N))
  dt, a = np.exp(r.normal(size=(B, T, 2 * D)) - 1), -np.exp(
    r.normal(size=(2 * D, N))
  )  # fmt: skip
  x, dt, a, b, c = (z.astype(np.float32) for z in (x, dt, a, b, c))
  tensors = map(torch.tensor, (x, dt, a, b, c))
  with torch.no_grad():  # they add D ⊙ x, which is no part of the scan
    want = getattr(module, theirs)(*tensors, torch.zeros(2 * D)).numpy()
  h = jnp.zeros((2 * D, N))
  one = lambda x, dt, b, c: selective_scan(
    h, x, dt, a, b, c, implementation=form
  )[1]
  error = checks.relative(jax.jit(jax.vmap(one))(x, dt, b, c), want)
  print(f"{theirs} {form}: relative error {error:.1e}")
  assert error < checks.FORWARD


@pytest.mark.parametrize("form", ["step", "scan", "chunk"])
def test_block(form):
  module, weights = block()
  import torch

  cell = memzoo.make(
    "mamba", d_model=D, d_state=N, dt_rank=2, conv_size=3, expand=2.0
  )
  params = convert.to_params("mamba", cell, weights)
  x = np.random.default_rng(8).normal(size=(B, T, D)).astype(np.float32)
  with torch.no_grad():
    want = module(torch.tensor(x)).numpy()
  one = lambda x: memzoo.scan(cell, params, None, x, implementation=form)[1]
  error = checks.relative(jax.jit(jax.vmap(one))(jnp.asarray(x)), want)
  print(f"block {form}: relative error {error:.1e}")
  assert error < checks.FORWARD
