"""The sLSTM cell on the authors' own layer: xlstm, its plain backend."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore"),  # theirs
]


@pytest.mark.parametrize("num_heads, conv_size", [(2, 4), (1, 0), (3, 2)])
def test_layer(num_heads, conv_size):
  """Random weights of theirs, and the cell that they become: outputs, and a
  sequence that goes on from a state."""
  torch = pytest.importorskip("torch")
  theirs = pytest.importorskip("xlstm.blocks.slstm.layer")
  layer = theirs.sLSTMLayer(
    theirs.sLSTMLayerConfig(
      embedding_dim=12,
      num_heads=num_heads,
      conv1d_kernel_size=conv_size,
      backend="vanilla",
      dtype="float32",
    )
  ).eval()
  r = np.random.default_rng(0)
  with torch.no_grad():
    for p in layer.parameters():
      p.copy_(torch.tensor(0.5 * r.normal(size=tuple(p.shape))))
  get = lambda x: jnp.asarray(x.detach().numpy())
  # [H, out, in] of a head each; `forward` hands the map named fgate to i.
  maps = [get(m.weight) for m in (layer.fgate, layer.igate)]
  maps += [get(m.weight) for m in (layer.zgate, layer.ogate)]
  inner = layer.slstm_cell
  r_maps = get(inner._recurrent_kernel_int2ext(inner._recurrent_kernel_))
  params = {
    "w": jnp.concatenate(
      [jnp.swapaxes(w, 1, 2).reshape(12, -1) for w in maps], axis=1
    ),
    "u": r_maps.reshape(12, -1),  # [H, in, gate, out]
    "b": get(inner._bias_),  # gate after gate
    "norm": 1 + get(layer.group_norm.weight),
  }
  if conv_size:
    params["conv"] = get(layer.conv1d.conv.weight)[:, 0].T
    params["conv_bias"] = get(layer.conv1d.conv.bias)
  cell = memzoo.make(
    "slstm", d_model=12, num_heads=num_heads, conv_size=conv_size
  )
  xs = r.normal(size=(2, 33, 12)).astype(np.float32)
  with torch.no_grad():
    want = layer(torch.tensor(xs)).numpy()
  for form in ("step", "scan"):
    run = lambda x, form=form: memzoo.scan(
      cell, params, None, x, implementation=form
    )
    error = checks.relative(jax.vmap(run)(jnp.asarray(xs))[1], want)
    print(f"{num_heads} heads, conv {conv_size}, {form}: error {error:.1e}")
    assert error < checks.FORWARD
