"""Titans' rule and cell on titans-pytorch's NeuralMemory.

The two are one equation where theirs has chunk_size=1 (momentum and forgetting
go on token by token, and a token reads after its own step), batch_size=n (the
gradients of n tokens are taken at the weights before them) and
mem_model_norm_add_residual=False (they learn the scale of the norm online). Its
loss is a mean over channels: a rate of ½ ‖·‖² is theirs times 2 / K. Its gelu
is exact, ours the tanh form: memories with a hidden layer are given with that.
"""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.ops.deep_gradient_step import Layer, deep_gradient_step, start

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore"),  # theirs
]
B, T, K = 2, 19, 6


def memory(depth, inner, size, **options):
  """A NeuralMemory with random weights: (module, its memory's weights)."""
  torch = pytest.importorskip("torch")
  titans = pytest.importorskip("titans_pytorch")
  f = {
    "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
  }[inner]

  class MLP(titans.MemoryMLP):
    def forward(self, x):
      for n, w in enumerate(self.weights):
        x = (f(x) if n else x) @ w
      return x

  module = titans.NeuralMemory(
    K, chunk_size=1, batch_size=size, pre_rmsnorm=False,
    mem_model_norm_add_residual=False, default_step_transform_max_lr=1.0,
    model=MLP(K, depth, expansion_factor=2.0), **options,
  )  # fmt: skip
  r = np.random.default_rng(depth)
  with torch.no_grad():
    for name, p in module.named_parameters():
      scale = 0.4 if "memory" in name else 0.4 * K**-0.5  # no learning diverges
      p.copy_(torch.tensor(scale * r.normal(size=p.shape)))
  return module, [w[0].detach().numpy() for w in module.memory_model_parameters]


def run(module, x):
  """-> (outputs [B, T, K], weights and momenta after T, lists of [B, ·, ·])."""
  import torch

  with torch.enable_grad():
    out, state = module(torch.tensor(x))
  weights, momenta = state.states
  arrays = lambda tree: [z.detach().numpy() for z in tree.values()]
  return out.detach().numpy(), arrays(weights), [m[0] for m in arrays(momenta)]


@pytest.mark.parametrize(
  "depth,activation,size,form",
  [
    (1, "gelu", 1, "scan"), (1, "gelu", 4, "chunk"), (2, "gelu", 4, "scan"),
    (2, "gelu", 4, "chunk"), (3, "silu", 5, "chunk"), (2, "relu", 1, "scan"),
  ],
)  # fmt: skip
def test_rule(depth, activation, size, form):
  module, weights = memory(depth, activation, size)
  x = np.random.default_rng(0).normal(size=(B, T, K)).astype(np.float32)
  want = run(module, x)

  def maps(linear):
    bias = 0.0 if linear.bias is None else linear.bias.detach().numpy()
    return x @ linear.weight.detach().numpy().T + bias

  q, k, v = map(maps, (module.to_queries, module.to_keys, module.to_values))
  gates = module.to_adaptive_step, module.to_decay_factor, module.to_momentum
  rate, forget, keep = (maps(g[0])[..., 0] for g in gates)
  model = tuple(map(Layer, weights))

  def one(q, k, v, rate, forget, keep):
    state, out = deep_gradient_step(
      start(model, size=size, momentum=True), q, k, v,
      rate=jax.nn.sigmoid(rate) * (2 / K), size=size,
      log_decay=-jax.nn.softplus(forget), log_momentum=-jax.nn.softplus(-keep),
      activation=activation, implementation=form,
    )  # fmt: skip
    return out.o, [m.w for m in state.model], [s.w for s in state.momentum]

  got = jax.jit(jax.vmap(one))(q, k, v, rate, forget, keep)
  error = checks.relative(got, want)
  print(f"depth {depth} {activation} n={size} {form}: {error:.1e}")
  assert error < checks.FORWARD


@pytest.mark.parametrize("form", ["step", "scan", "chunk"])
def test_cell(form):
  """What the cell has learned after T tokens: its convolution the identity, its
  gates of both layers alike, and theirs with silu and keys of unit norm."""
  torch = pytest.importorskip("torch")
  module, weights = memory(
    2, "gelu", 4, activation=torch.nn.SiLU(), qk_rmsnorm=True
  )
  with torch.no_grad():
    module.k_norm.gamma.fill_(K**-0.5 - 1)
  cell = memzoo.make(
    "titans", d_model=K, expansion=2, mini_batch_size=4, conv_size=2,
    memory_norm=False,
  )  # fmt: skip
  maps = module.to_queries[0], module.to_keys[0], module.to_values[0]
  gates = module.to_decay_factor, module.to_momentum, module.to_adaptive_step
  array = lambda z: z.detach().numpy()
  params = jax.jit(cell.init)(jax.random.key(0)) | {
    "qkv": np.concatenate([array(m.weight) for m in maps]).T,
    "conv": np.stack([np.zeros(3 * K), np.ones(3 * K)]).astype(np.float32),
    "gates": np.repeat([array(g[0].weight)[0] for g in gates], 2, 0).T,
    "gate_bias": np.repeat([array(g[0].bias) for g in gates], 2, 1)[:, None],
    "memory_0": weights[0][None], "memory_1": weights[1][None],
  }  # fmt: skip
  x = 3 * np.random.default_rng(1).normal(size=(B, T, K)).astype(np.float32)
  _, *want = run(module, x)

  def one(x):
    state, _ = memzoo.scan(cell, params, None, x, implementation=form)
    first = lambda layers: [layer.w[0] for layer in layers]
    return first(state.inner.model), first(state.inner.momentum)

  error = checks.relative(jax.jit(jax.vmap(one))(jnp.asarray(x)), tuple(want))
  print(f"cell {form}: {error:.1e}")
  assert error < checks.FORWARD
