"""Lightning attention against Qin et al. 2023 (arXiv:2307.14995), equations 9
to 14 of arXiv:2405.17381, and MiniMax 2025 (arXiv:2501.08313)."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def decay(cell, h):
  """λ of head h = 1 … H: exp(−2^(−8h/H)), faster in lower layers."""
  layer = 1 - cell.layer_index / (cell.num_layers - 1 + 1e-5) + 1e-5
  return np.exp(-(2.0 ** (-8 * h / cell.num_heads)) * layer)


def paper(cell, params, xs):
  """All scores a_ts = Re q_t k_s λ^(t−s) exp(iθ(t−s)) (9), summed."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  xs = np.asarray(xs, np.float64)
  h, k, length = cell.num_heads, cell.head_dim, len(xs)
  q, key, v, u = np.split(xs @ p["qkvu"], 4, axis=1)
  q, key = silu(q), silu(key)
  if cell.variant == "minimax":
    v, u = silu(v), sigmoid(u)
  o = np.zeros((length, h, k))
  for i in range(h):
    part = slice(i * k, (i + 1) * k)
    theta = p["theta"][i] if cell.lrpe else np.zeros(k)
    for t in range(length):
      for s in range(t + 1):
        turn = np.cos(theta * (t - s))
        score = np.sum(q[t, part] * key[s, part] * turn)
        o[t, i] += score * decay(cell, i + 1) ** (t - s) * v[s, part]
  o = o.reshape(length, h * k)
  o = o / np.sqrt((o**2).mean(1, keepdims=True) + 1e-6)
  return (o * p.get("norm", 1.0) * u) @ p["out"]


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(lrpe=False, layer_index=0, num_layers=1, num_heads=3),
    dict(lrpe=False, variant="minimax"),
  ],
)
def test_paper_equation(options):
  cell = memzoo.tiny("lightning_attention", **options)
  params, xs = checks.drawn(cell, 0.1), checks.inputs(cell, 11, 2.0)
  want = paper(cell, params, xs)
  for form, _, ys in checks.forms(cell, params, xs):
    assert checks.relative(ys, want) < checks.FORWARD, form


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_parity_with_transformers():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = transformers.models.minimax.modeling_minimax
  cell = memzoo.tiny("lightning_attention", variant="minimax", lrpe=False)
  params, xs = checks.drawn(cell), checks.inputs(cell, 19)
  config = transformers.MiniMaxConfig(
    hidden_size=6, num_attention_heads=2, num_key_value_heads=2, head_dim=3,
    num_hidden_layers=3, block_size=8,
  )  # fmt: skip
  theirs = model.MiniMaxLightningAttention(config, 1)
  qkvu = np.asarray(params["qkvu"]).T.reshape(4, 2, 3, 6)
  tensors = {
    "qkv_proj.weight": np.swapaxes(qkvu[:3], 0, 1).reshape(18, 6),
    "output_gate.weight": qkvu[3].reshape(6, 6),
    "norm.weight": params["norm"],
    "out_proj.weight": params["out"].T,
  }
  theirs.load_state_dict(
    {k: torch.tensor(np.array(v)) for k, v in tensors.items()}, strict=False
  )
  with torch.no_grad():
    want = theirs(torch.tensor(xs)[None], None, None)[0][0].numpy()
  for form, _, ys in checks.forms(cell, params, xs):
    assert checks.relative(ys, want) < checks.FORWARD, form


def test_signature_behaviour():
  """A head forgets at exp(−slope) a step, the slopes halve from head to head
  and fall with the layer, to nearly none in the last; and a layer learns to
  recall pairs."""
  kept = []
  for layer in (0, 1, 2):
    cell = memzoo.make(
      "lightning_attention",
      d_model=9,
      num_heads=8,
      head_dim=2,
      layer_index=layer,
      num_layers=3,
    )
    params = jax.jit(cell.init)(jax.random.key(0))
    run = jax.jit(lambda s, x, p=params, c=cell: memzoo.scan(c, p, s, x)[0])
    state = run(cell.initial_state(params), checks.inputs(cell, 5))
    later = run(state, jnp.zeros((3, 9)))
    ratio = np.asarray(later.s / state.s, np.float64)
    np.testing.assert_allclose(ratio, ratio[:, :1, :1] + 0 * ratio, rtol=1e-4)
    kept.append(ratio[:, 0, 0])
  halves = 0.5 ** np.arange(1, 9)
  for rate, want in zip(kept, (halves, halves / 2, 0 * halves)):
    np.testing.assert_allclose(-np.log(rate) / 3, want, atol=2e-5)

  cell = memzoo.make("lightning_attention", d_model=9, num_heads=2, head_dim=8)
  _, accuracy = checks.learn(cell, checks.pairs, 150, rate=2e-2)
  assert accuracy > 0.95, accuracy


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(variant="gla"), r"variant must be one of \('transnormer', 'minimax'"),
    (dict(layer_index=1), "layer_index must be 0 … num_layers − 1 = 0, got 1"),
    (dict(num_layers=0), "num_layers must be a positive integer, got 0"),
  ],
)
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    memzoo.make("lightning_attention", d_model=8, **options)
