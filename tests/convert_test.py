"""Weights of public modules to cells and back.

Parity runs where transformers is:
  python -m pytest -n 0 tests/convert_test.py
That of rwkv6 and rwkv7 is in tests/parity/rwkv_test.py.
"""

import importlib

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import convert

# Configurations of the smallest odd-sized layers, as plain data: what the
# source's own configuration class takes, and what else `make` does.
CASES = {
  "falcon_mamba": (
    dict(
      hidden_size=10,
      expand=3,
      state_size=5,
      conv_kernel=3,
      time_step_rank=2,
      use_bias=False,
      hidden_act="silu",
      mixer_rms_eps=1e-3,
      num_hidden_layers=1,
    ),
    {},
  ),
  "kimi_linear": (
    dict(
      hidden_size=10,
      linear_num_heads=2,
      linear_head_dim=6,
      linear_conv_kernel_dim=3,
      rms_norm_eps=1e-5,
      hidden_act="silu",
      num_hidden_layers=1,
      layer_types=["linear_attention"],
    ),
    {},
  ),
  "mamba": (
    dict(
      hidden_size=10,
      intermediate_size=30,
      expand=3,
      state_size=5,
      conv_kernel=3,
      time_step_rank=2,
      use_bias=False,
      hidden_act="silu",
      num_hidden_layers=1,
    ),
    {},
  ),
  "mamba2": (
    dict(
      hidden_size=10,
      expand=3,
      state_size=5,
      num_heads=6,
      head_dim=5,
      n_groups=2,
      conv_kernel=3,
      use_bias=False,
      hidden_act="silu",
      layer_norm_epsilon=1e-5,
      num_hidden_layers=1,
      chunk_size=16,
    ),
    {},
  ),
  "minimax": (
    dict(
      hidden_size=12,
      num_attention_heads=3,
      num_key_value_heads=3,
      head_dim=6,
      num_hidden_layers=3,
      block_size=16,
      hidden_act="silu",
      layer_types=["linear_attention"] * 3,
    ),
    dict(layer_index=1),
  ),
  "qwen3_next": (
    dict(
      hidden_size=10,
      linear_num_key_heads=2,
      linear_num_value_heads=2,
      linear_key_head_dim=4,
      linear_value_head_dim=6,
      linear_conv_kernel_dim=3,
      rms_norm_eps=1e-5,
      hidden_act="silu",
      num_hidden_layers=1,
      layer_types=["linear_attention"],
    ),
    {},
  ),
  "recurrent_gemma": (
    dict(
      hidden_size=10,
      lru_width=12,
      num_attention_heads=2,
      conv1d_width=3,
      hidden_activation="gelu_pytorch_tanh",
      num_hidden_layers=1,
    ),
    {},
  ),
  "rwkv6": (
    dict(
      n_embd=12, head_size=4, TIME_MIX_EXTRA_DIM=3, TIME_DECAY_EXTRA_DIM=2
    ),
    {},
  ),
  "rwkv7": (
    dict(
      n_embd=12, head_size=4, D_DECAY_LORA=3, D_AAA_LORA=2, D_GATE_LORA=5
    ),
    {},
  ),
  "xlstm": (
    dict(
      hidden_size=12,
      num_heads=3,
      qk_dim_factor=0.5,
      v_dim_factor=1.0,
      gate_soft_cap=15.0,
      use_bias=False,
      norm_eps=1e-6,
      eps=1e-6,
      num_hidden_layers=1,
      chunk_size=16,
      autocast_kernel_dtype="float32",
    ),
    {},
  ),
}  # fmt: skip
# What else the sources can hold: (source, what differs, options of to_weights).
VARIANTS = [
  *((name, {}, {}) for name in CASES),
  ("qwen3_next", dict(linear_num_value_heads=6), dict(num_key_heads=2)),
  ("xlstm", dict(weight_mode="fused"), dict(fused=True)),
]


def cell_of(name, **changes):
  config, options = CASES[name]
  return convert.make(name, config | changes, **options)


def drawn(cell, seed=0):
  """Params of the cell's shapes, no two numbers alike."""
  r = np.random.default_rng(seed)
  shapes = jax.eval_shape(cell.init, jax.random.key(0))
  return {
    name: r.normal(size=x.shape).astype(np.float32)
    for name, x in shapes.items()
  }


def sharing(cell, params, groups):
  """Params in which heads of queries and keys come `groups` different."""
  h, k = cell.num_heads, cell.head_dim
  for name in ("qkv", "conv"):
    x = params[name]
    qk = x[:, : 2 * h * k].reshape(len(x), 2, groups, h // groups, k)
    qk[...] = qk[:, :, :, :1]
    params[name] = np.concatenate(
      [qk.reshape(len(x), -1), x[:, 2 * h * k :]], axis=1
    )
  return params


@pytest.mark.parametrize("name,changes,options", VARIANTS)
def test_round_trip(name, changes, options):
  """Ours to theirs to ours: the same numbers, and all of them."""
  cell = cell_of(name, **changes)
  params = drawn(cell)
  if name == "kimi_linear":
    params["gate_bias"][:] = 0
  if "num_key_heads" in options:
    params = sharing(cell, params, options["num_key_heads"])
  weights = convert.to_weights(name, cell, params, **options)
  again = convert.to_params(name, cell, weights)
  assert again.keys() == params.keys()
  for key, x in params.items():
    assert again[key].dtype == jnp.float32
    np.testing.assert_array_equal(again[key], x, err_msg=key)
  for x in weights.values():
    assert type(x) is np.ndarray and x.flags.c_contiguous


def test_layout_of_grouped_heads():
  """Rows of the two sources that hold theirs head by head, one by one."""
  cell = cell_of("qwen3_next", linear_num_value_heads=6)
  d, h, g, k, v = 10, 6, 2, 4, 6
  shapes = convert.qwen3_next._shapes(cell, g)
  weights = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
  rows = 2 * g * k + 2 * h * v
  weights["in_proj_qkvz.weight"][:, 0] = np.arange(rows)
  weights["in_proj_ba.weight"][:, 0] = np.arange(2 * h)
  weights["conv1d.weight"][:, 0, 0] = np.arange(2 * g * k + h * v)
  p = convert.to_params("qwen3_next", cell, weights)
  r, group = h // g, rows // g
  for n, c in np.ndindex(h, k):
    start = (n // r) * group
    assert p["qkv"][0, n * k + c] == start + c
    assert p["qkv"][0, (h + n) * k + c] == start + k + c
    assert p["conv"][0, n * k + c] == (n // r) * k + c
    assert p["conv"][0, (h + n) * k + c] == (g + n // r) * k + c
  for n, c in np.ndindex(h, v):
    start = (n // r) * group + 2 * k + (n % r) * v + c
    assert p["qkv"][0, 2 * h * k + n * v + c] == start
    assert p["gate"][0, n * v + c] == start + r * v
    assert p["conv"][0, 2 * h * k + n * v + c] == 2 * g * k + n * v + c
  for n in range(h):
    start = (n // r) * 2 * r + n % r
    assert p["ab"][0, n] == start + r and p["ab"][0, h + n] == start
  cell = cell_of("minimax")
  d, h, k = 12, 3, 6
  weights = convert.to_weights("minimax", cell, drawn(cell))
  weights["qkv_proj.weight"] = np.repeat(
    np.arange(3 * h * k, dtype=np.float32)[:, None], d, axis=1
  )
  p = convert.to_params("minimax", cell, weights)
  for i, n, c in np.ndindex(3, h, k):
    assert p["qkvu"][0, (i * h + n) * k + c] == (n * 3 + i) * k + c


@pytest.mark.parametrize("name", CASES)
def test_wrong_weights(name):
  """One message for all that is wrong with the weights, with the shapes."""
  cell = cell_of(name)
  params = drawn(cell)
  if name == "kimi_linear":
    params["gate_bias"][:] = 0
  weights = convert.to_weights(name, cell, params)
  known = "norm", "A_log", "ln_x", "recurrent_param"
  one = next(n for n in sorted(weights) if any(k in n for k in known))
  bad = {n: x for n, x in weights.items() if n != one}
  with pytest.raises(ValueError, match=f"convert.{name}: .*{one} is missing"):
    convert.to_params(name, cell, bad | {"lora.weight": one})
  with pytest.raises(ValueError, match="lora.weight is unknown"):
    convert.to_params(name, cell, bad | {"lora.weight": np.zeros(3)})
  wrong = weights | {one: weights[one][..., None]}
  with pytest.raises(ValueError, match=f"{one} must be .*, got .*1\\]"):
    convert.to_params(name, cell, wrong)
  whole = weights | {one: weights[one].astype(np.int32)}
  with pytest.raises(ValueError, match=f"{one} must be floating, got int32"):
    convert.to_params(name, cell, whole)
  with pytest.raises(ValueError, match="must be .*, got GRU"):
    convert.to_params(name, memzoo.tiny("gru"), weights)
  params.pop("out")
  with pytest.raises(ValueError, match="params: out is missing"):
    convert.to_weights(name, cell, params)


def test_what_no_cell_can_match():
  cases = [
    ("mamba", dict(use_bias=True), "use_bias=True has no equal"),
    ("mamba2", dict(time_step_limit=(0.0, 0.1)), "does not clip steps"),
    ("qwen3_next", dict(rms_norm_eps=1e-6), "rms_norm_eps=1e-06"),
    ("xlstm", dict(use_bias=True), "use_bias=True has no equal"),
    ("kimi_linear", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ("recurrent_gemma", dict(hidden_activation="gelu"), "_activation='gelu'"),
    ("rwkv6", dict(head_size=5), "head_size=5 must divide n_embd=12"),
    ("rwkv7", dict(head_size=5), "head_size=5 must divide n_embd=12"),
  ]
  for name, changes, message in cases:
    with pytest.raises(ValueError, match=message):
      cell_of(name, **changes)
  with pytest.raises(ValueError, match="no hidden_size, conv_kernel"):
    config = dict(CASES["mamba"][0])
    del config["hidden_size"], config["conv_kernel"]
    convert.make("mamba", config)
  with pytest.raises(ValueError, match="unknown source 'mamba3'.*'mamba2'"):
    convert.make("mamba3", {})
  with pytest.raises(ValueError, match="layer_index=1 has no equal"):
    convert.make("rwkv7", CASES["rwkv7"][0], layer_index=1)
  with pytest.raises(ValueError, match="convert.mamba: .* select_norm=0.001"):
    cell = cell_of("falcon_mamba")
    convert.to_weights("mamba", cell, drawn(cell))
  with pytest.raises(ValueError, match="falcon_mamba: .*needs a select_norm"):
    cell = cell_of("mamba")
    convert.to_weights("falcon_mamba", cell, drawn(cell))
  cell = cell_of("kimi_linear")
  with pytest.raises(ValueError, match="gate_bias must be zero"):
    convert.to_weights("kimi_linear", cell, drawn(cell))
  cell = cell_of("qwen3_next", linear_num_value_heads=6)
  with pytest.raises(ValueError, match="cannot share 2"):
    convert.to_weights("qwen3_next", cell, drawn(cell), num_key_heads=2)
  negative = memzoo.tiny("gated_delta", allow_neg_eigval=True)
  with pytest.raises(ValueError, match="needs allow_neg_eigval=False"):
    convert.to_weights("qwen3_next", negative, drawn(negative))
  weights = convert.to_weights("qwen3_next", cell, drawn(cell))
  weights["in_proj_qkvz.weight"] = weights["in_proj_qkvz.weight"][:-8]
  with pytest.raises(ValueError, match="112 rows, which is no number of key"):
    convert.to_params("qwen3_next", cell, weights)
  cell = cell_of("minimax")
  weights = convert.to_weights("minimax", cell, drawn(cell))
  weights["slope_rate"] = np.ones((3, 1, 1), np.float32)
  with pytest.raises(ValueError, match="not that of layer_index=1"):
    convert.to_params("minimax", cell, weights)


CONFIGS = {
  "falcon_mamba": "FalconMambaConfig",
  "kimi_linear": "KimiLinearConfig",
  "mamba": "MambaConfig",
  "mamba2": "Mamba2Config",
  "minimax": "MiniMaxConfig",
  "qwen3_next": "Qwen3NextConfig",
  "recurrent_gemma": "RecurrentGemmaConfig",
  "xlstm": "xLSTMConfig",
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(
  "name,changes,options", [v for v in VARIANTS if v[0] in CONFIGS]
)
def test_parity(name, changes, options):
  """The public module with random weights, and the cell that they become, on
  one batch of inputs; and the weights back."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  plain, more = CASES[name]
  config = getattr(transformers, CONFIGS[name])(**plain | changes)
  path, _, cls = convert.source(name).MODULE.rpartition(".")
  layer = more.get("layer_index", 0)
  arguments = (config,) if name == "xlstm" else (config, layer)
  if name == "falcon_mamba":  # alone it cannot draw its starting values
    arguments += (False,)
  module = getattr(importlib.import_module(path), cls)(*arguments).eval()
  r = np.random.default_rng(3)
  with torch.no_grad():
    for p in module.parameters():
      p.copy_(torch.tensor(0.4 * r.normal(size=p.shape) + (p.ndim == 1) * 0.5))
  weights = {n: x.numpy() for n, x in module.state_dict().items()}
  cell = convert.make(name, config.to_dict(), **more)
  params = convert.to_params(name, cell, weights)

  x = r.normal(size=(2, 67, config.hidden_size)).astype(np.float32)
  extra = {
    "minimax": (None, None),
    "recurrent_gemma": (torch.arange(67)[None], None, False),
  }.get(name, ())
  with torch.no_grad():
    want = module(torch.tensor(x), *extra)
  want = want[0] if isinstance(want, tuple) else want
  run = jax.jit(jax.vmap(lambda x: memzoo.scan(cell, params, None, x)[1]))
  error = checks.relative(run(jnp.asarray(x)), want.numpy())
  print(f"{name} {changes}: relative error {error:.1e}")
  assert error < 1e-5
  back = convert.to_weights(name, cell, params, **options)
  buffers = getattr(convert.source(name), "BUFFERS", ())
  assert back.keys() == weights.keys() - set(buffers)
  for n, y in back.items():
    np.testing.assert_array_equal(y, weights[n], err_msg=n)
