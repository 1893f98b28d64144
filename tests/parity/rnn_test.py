"""LSTM and GRU on torch's: values, final states and gradients of the weights."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo

pytestmark = pytest.mark.parity
B, T, D = 2, 67, 6


def lstm(w, u, b, c):
  """Torch's weights [4 D, D] in the order i, f, g, o, as ours; its two biases
  are one."""
  return dict(w=w.T, u=u.T, b=b + c)


def gru(w, u, b, c):
  """Torch's in the order r, z, n, of which n keeps both biases."""
  both = b + np.concatenate([c[: 2 * D], np.zeros(D, c.dtype)])
  return dict(w=w.T, u=u.T, b=both, c=c[2 * D :])


MAPS = {"lstm": (lstm, {}), "gru": (gru, dict(reset_after=True))}


@pytest.mark.parametrize("form", ["step", "scan"])
@pytest.mark.parametrize("name", MAPS)
def test_layer(name, form):
  torch = pytest.importorskip("torch")
  convert, options = MAPS[name]
  module = getattr(torch.nn, name.upper())(D, D, batch_first=True)
  r = np.random.default_rng(5)
  names = "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"
  with torch.no_grad():
    for n in names:
      p = getattr(module, n)
      p.copy_(torch.tensor(0.4 * r.normal(size=p.shape)))
  weights = [getattr(module, n).detach().numpy() for n in names]
  x = r.normal(size=(B, T, D)).astype(np.float32)
  start = r.normal(size=(1 + (name == "lstm"), B, D)).astype(np.float32)
  before = tuple(torch.tensor(s)[None] for s in start)
  y, after = module(torch.tensor(x), before if name == "lstm" else before[0])
  after = after if name == "lstm" else (after,)
  weight = np.cos(0.3 * np.arange(y.numel(), dtype=np.float32))
  weight = weight.reshape(y.shape)
  (y * torch.tensor(weight)).sum().backward()
  grads = [getattr(module, n).grad.numpy() for n in names]

  cell = memzoo.make(name, d_model=D, **options)
  first = cell.initial_state(jax.jit(cell.init)(jax.random.key(0)))

  def run(params):
    one = lambda s, x: memzoo.scan(
      cell, params, type(first)(*s), x, implementation=form
    )
    state, ys = jax.vmap(one)(tuple(start), jnp.asarray(x))
    return jnp.sum(ys * weight), (ys, *state)

  value = jax.jit(jax.value_and_grad(run, has_aux=True))
  (_, got), found = value(convert(*weights))
  want = [z.detach().numpy() for z in (y, *(s[0] for s in after))]
  error = checks.relative(list(got), want)
  # A gradient goes to each of the two biases that make one.
  w, u, b, c = grads
  want = dict(w=w.T, u=u.T, b=b) | (dict(c=c[2 * D :]) if "c" in found else {})
  slope = checks.relative(found, want)
  print(f"{name} {form}: relative error {error:.1e}, of gradients {slope:.1e}")
  assert error < checks.FORWARD and slope < checks.FORWARD
