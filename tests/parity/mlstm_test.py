"""The mLSTM's memory on the authors' own: mlstm_kernels, step by step and by
chunks, values and states. The layer around it is in tests/convert_test.py."""

import checks
import jax
import numpy as np
import pytest

from memzoo.ops.batched import batched
from memzoo.ops.exponential_attention import State, exponential_attention

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore"),  # theirs
]
B, T, H, K, V = 2, 128, 2, 5, 3


def draw(given):
  """Arrays [B, T, H, ...], gates of any size, and a state to go on from."""
  r = np.random.default_rng(0)
  x = [r.normal(size=(B, T, H, n)) for n in (K, K, V)]
  x += [3 * r.normal(size=(B, T, H)), 2 + 2 * r.normal(size=(B, T, H))]
  state = [r.normal(size=s) for s in ((B, H, K, V), (B, H, K), (B, H))]
  x, state = ([z.astype(np.float32) for z in part] for part in (x, state))
  return x, state if given else [np.zeros_like(s) for s in state]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kernel", ["recurrent", "chunkwise", "parallel"])
def test_memory(kernel, given):
  torch = pytest.importorskip("torch")
  theirs = pytest.importorskip("mlstm_kernels.torch")
  if kernel == "parallel" and given:
    pytest.skip("the parallel form starts from nothing")
  x, state = draw(given)
  tensor = lambda z: torch.tensor(np.ascontiguousarray(np.swapaxes(z, 1, 2)))
  s, n, m = map(torch.tensor, state)
  before = dict(c_initial=s, n_initial=n, m_initial=m[..., None])
  if kernel == "recurrent":
    run = theirs.get_mlstm_sequence_kernel("native_sequence__native")
    want = run(*map(tensor, x), **before, return_last_states=True)
  elif kernel == "chunkwise":
    run = theirs.get_mlstm_kernel("chunkwise--native_autograd")
    want = run(
      *map(tensor, x), **before, return_last_states=True, chunk_size=16
    )
  else:
    run = theirs.get_mlstm_kernel("parallel--native_autograd")
    want = run(*map(tensor, x)), ()
  want = [z.detach().numpy() for z in (want[0], *want[1])]
  want[0] = np.swapaxes(want[0], 1, 2)
  want[3:] = [m[..., 0] for m in want[3:]]
  for form in ("scan", "chunk"):
    run = jax.jit(
      lambda s, q, k, v, i, f, form=form: batched(exponential_attention)(
        s,
        q * K**-0.5,
        k,
        v,
        log_input=i,
        log_decay=jax.nn.log_sigmoid(f),
        implementation=form,
      )  # fmt: skip
    )
    after, o = run(State(*state), *x)
    error = checks.relative([o, *after][: len(want)], want)
    print(f"{kernel} {form} given={given}: relative error {error:.1e}")
    assert error < checks.FORWARD
