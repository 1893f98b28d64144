"""minGRU and minLSTM on minGRU-pytorch, which computes from logarithms."""

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


@pytest.mark.parametrize("expansion", [1.0, 1.5])
@pytest.mark.parametrize("name", ["min_gru", "min_lstm"])
def test_layer(name, expansion):
  """From nothing, and on from a state above zero, which their minLSTM passes
  through g first."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("minGRU_pytorch")
  if name == "min_gru":
    from minGRU_pytorch.minGRU import minGRU as Theirs
  else:
    from minGRU_pytorch.minLSTM import minLSTM as Theirs
  d, n = 6, int(6 * expansion)
  layer = Theirs(d, expansion_factor=expansion)
  r = np.random.default_rng(0)
  with torch.no_grad():
    for p in layer.parameters():
      p.copy_(torch.tensor(0.7 * r.normal(size=tuple(p.shape))))
  weights = {k: x.detach().numpy() for k, x in layer.named_parameters()}
  (w,) = (x for k, x in weights.items() if k.startswith("to_hidden"))
  hidden, *gates = np.split(w.T, len(w) // n, axis=1)
  params = {
    "w": jnp.asarray(np.concatenate([*gates, hidden], axis=1)),
    "b": jnp.zeros(len(w)),
  }
  if "to_out.weight" in weights:
    params["out"] = jnp.asarray(weights["to_out.weight"].T)
  cell = memzoo.make(name, d_model=d, d_state=n)
  xs = r.normal(size=(2, 33, d)).astype(np.float32)
  before = r.uniform(0.1, 2, size=(2, 1, n)).astype(np.float32)
  for h in (None, before):
    with torch.no_grad():
      given = None if h is None else torch.tensor(h)
      want = layer(torch.tensor(xs), given, return_next_prev_hidden=True)
    start = jnp.zeros((2, n))
    if h is not None:
      start = jnp.asarray(h[:, 0]) + (0.5 if name == "min_lstm" else 0.0)
    state = type(cell.initial_state(params))(start)
    for form in ("step", "scan", "chunk"):
      run = lambda s, x, form=form: memzoo.scan(
        cell, params, s, x, implementation=form
      )
      after, ys = jax.vmap(run)(state, jnp.asarray(xs))
      got, want_ = (ys, after.h), (want[0].numpy(), want[1][:, 0].numpy())
      error = checks.relative(got, want_)
      print(f"{name} {expansion} {form}: relative error {error:.1e}")
      assert error < checks.FORWARD
