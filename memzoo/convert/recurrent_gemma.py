"""RG-LRU: `RecurrentGemmaRecurrentBlock` of transformers and
`memzoo.cells.RGLRU`. What is Λ here has the opposite sign there."""

from collections.abc import Mapping

import numpy as np

from memzoo.cells.ssm.rg_lru import RGLRU
from memzoo.convert import weights as lib

WHO = "convert.recurrent_gemma"
MODULE = (
  "transformers.models.recurrent_gemma.modeling_recurrent_gemma"
  ".RecurrentGemmaRecurrentBlock"
)
_FIXED = dict(whole_first=True, c=8.0)


def make(config: Mapping) -> RGLRU:
  """The cell of a `RecurrentGemmaConfig`, as `to_dict` gives it."""
  lib.check_config(WHO, config, hidden_activation="gelu_pytorch_tanh")
  names = "hidden_size", "lru_width", "num_attention_heads", "conv1d_width"
  d, r, heads, taps = lib.read(WHO, config, *names)
  return RGLRU(d_model=d, d_rnn=r, num_heads=heads, conv_size=taps, **_FIXED)


def _shapes(cell) -> dict:
  d, r, h = cell.d_model, cell.width, cell.num_heads
  n = r // h
  return {
    "linear_x.weight": (r, d),
    "linear_x.bias": (r,),
    "linear_y.weight": (r, d),
    "linear_y.bias": (r,),
    "linear_out.weight": (d, r),
    "linear_out.bias": (d,),
    "conv_1d.weight": (r, 1, cell.conv_size),
    "conv_1d.bias": (r,),
    "rg_lru.recurrent_param": (r,),
    "rg_lru.recurrent_gate_weight": (h, n, n),
    "rg_lru.recurrent_gate_bias": (h, n),
    "rg_lru.input_gate_weight": (h, n, n),
    "rg_lru.input_gate_bias": (h, n),
  }


def to_params(cell: RGLRU, weights: lib.Weights) -> dict:
  """The block's weights as params."""
  lib.check_cell(WHO, cell, RGLRU, **_FIXED)
  w = lib.take(WHO, weights, _shapes(cell))
  both = lambda kind, *names: [w[f"{n}{kind}"] for n in names]
  gates = "rg_lru.recurrent_gate", "rg_lru.input_gate"
  blocks = [x.reshape(cell.width, -1) for x in both("_weight", *gates)]
  return lib.as_params(
    **{
      "in": np.concatenate(both(".weight", "linear_x", "linear_y")).T,
      "in_bias": np.concatenate(both(".bias", "linear_x", "linear_y")),
      "conv": lib.to_taps(w["conv_1d.weight"]),
      "conv_bias": w["conv_1d.bias"],
      "gates": np.concatenate(blocks, axis=1),
      "gates_bias": np.concatenate(both("_bias", *gates)).ravel(),
      "lam": -w["rg_lru.recurrent_param"],
      "out": w["linear_out.weight"].T,
      "out_bias": w["linear_out.bias"],
    }
  )


def to_weights(cell: RGLRU, params: Mapping) -> dict:
  """Params as the block's weights."""
  lib.check_cell(WHO, cell, RGLRU, **_FIXED)
  p = lib.params_of(WHO, cell, params)
  h, n = cell.num_heads, cell.width // cell.num_heads
  (first, second), biases = np.split(p["in"], 2, 1), np.split(p["in_bias"], 2)
  gates = [x.reshape(h, n, n) for x in np.split(p["gates"], 2, axis=1)]
  shifts = p["gates_bias"].reshape(2, h, n)
  return lib.as_weights(
    {
      "linear_x.weight": first.T,
      "linear_x.bias": biases[0],
      "linear_y.weight": second.T,
      "linear_y.bias": biases[1],
      "linear_out.weight": p["out"].T,
      "linear_out.bias": p["out_bias"],
      "conv_1d.weight": lib.from_taps(p["conv"]),
      "conv_1d.bias": p["conv_bias"],
      "rg_lru.recurrent_param": -p["lam"],
      "rg_lru.recurrent_gate_weight": gates[0],
      "rg_lru.recurrent_gate_bias": shifts[0],
      "rg_lru.input_gate_weight": gates[1],
      "rg_lru.input_gate_bias": shifts[1],
    }
  )
