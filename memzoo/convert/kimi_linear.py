"""Kimi Delta Attention: `KimiLinearDeltaAttention` of transformers and
`memzoo.cells.KimiDeltaAttention`.

The module's output gate has no bias, and its values are as wide as its keys.
"""

from collections.abc import Mapping

import numpy as np

from memzoo.cells.matrix.kimi_delta_attention import KimiDeltaAttention
from memzoo.convert import weights as lib

WHO = "convert.kimi_linear"
MODULE = (
  "transformers.models.kimi_linear.modeling_kimi_linear."
  "KimiLinearDeltaAttention"
)
_FIXED = dict(expand_v=1.0)


def make(config: Mapping) -> KimiDeltaAttention:
  """The cell of a `KimiLinearConfig`, as `to_dict` gives it."""
  lib.check_config(WHO, config, hidden_act="silu", rms_norm_eps=1e-5)
  names = "hidden_size", "linear_num_heads", "linear_head_dim"
  d, heads, k = lib.read(WHO, config, *names)
  (taps,) = lib.read(WHO, config, "linear_conv_kernel_dim")
  return KimiDeltaAttention(
    d_model=d, num_heads=heads, head_dim=k, conv_size=taps
  )


def _shapes(cell) -> dict:
  d, h, k = cell.d_model, cell.num_heads, cell.head_dim
  return {
    "q_proj.weight": (h * k, d),
    "k_proj.weight": (h * k, d),
    "v_proj.weight": (h * k, d),
    "conv1d.weight": (3 * h * k, 1, cell.conv_size),
    "forget_gate.f_a_proj.weight": (k, d),
    "forget_gate.f_b_proj.weight": (h * k, k),
    "forget_gate.dt_bias": (h * k,),
    "forget_gate.A_log": (1, 1, h, 1),
    "b_proj.weight": (h, d),
    "g_a_proj.weight": (k, d),
    "g_b_proj.weight": (h * k, k),
    "o_norm.weight": (k,),
    "o_proj.weight": (d, h * k),
  }


def to_params(cell: KimiDeltaAttention, weights: lib.Weights) -> dict:
  """The layer's weights as params; gate_bias is zero."""
  lib.check_cell(WHO, cell, KimiDeltaAttention, **_FIXED)
  w = lib.take(WHO, weights, _shapes(cell))
  join = lambda *names: np.concatenate([w[f"{n}.weight"] for n in names]).T
  gate = w["g_b_proj.weight"].T
  return lib.as_params(
    qkv=join("q_proj", "k_proj", "v_proj"),
    conv=lib.to_taps(w["conv1d.weight"]),
    beta=w["b_proj.weight"].T,
    down=join("forget_gate.f_a_proj", "g_a_proj"),
    decay=w["forget_gate.f_b_proj.weight"].T,
    a_log=w["forget_gate.A_log"].reshape(-1),
    dt=w["forget_gate.dt_bias"].reshape(cell.num_heads, cell.head_dim),
    gate=gate,
    gate_bias=np.zeros(gate.shape[1], gate.dtype),
    norm=w["o_norm.weight"],
    out=w["o_proj.weight"].T,
  )


def to_weights(cell: KimiDeltaAttention, params: Mapping) -> dict:
  """Params as the layer's weights.

  Raises:
    ValueError: where the gate has a bias, which the layer has not.
  """
  lib.check_cell(WHO, cell, KimiDeltaAttention, **_FIXED)
  p = lib.params_of(WHO, cell, params)
  if np.any(p["gate_bias"]):
    raise ValueError(f"{WHO}: gate_bias must be zero; the layer has none")
  q, k, v = np.split(p["qkv"], 3, axis=1)
  decay, gate = np.split(p["down"], 2, axis=1)
  return lib.as_weights(
    {
      "q_proj.weight": q.T,
      "k_proj.weight": k.T,
      "v_proj.weight": v.T,
      "conv1d.weight": lib.from_taps(p["conv"]),
      "forget_gate.f_a_proj.weight": decay.T,
      "forget_gate.f_b_proj.weight": p["decay"].T,
      "forget_gate.dt_bias": p["dt"].reshape(-1),
      "forget_gate.A_log": p["a_log"].reshape(1, 1, -1, 1),
      "b_proj.weight": p["beta"].T,
      "g_a_proj.weight": gate.T,
      "g_b_proj.weight": p["gate"].T,
      "o_norm.weight": p["norm"],
      "o_proj.weight": p["out"].T,
    }
  )
