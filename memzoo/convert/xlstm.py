"""xLSTM 7B: `xLSTMLayer` of transformers and `memzoo.cells.MLSTM`.

The module holds its maps apart ('single') or side by side ('fused'); both are
read.
"""

from collections.abc import Mapping

import numpy as np

from memzoo.cells.matrix.mlstm import MLSTM
from memzoo.convert import weights as lib

WHO = "convert.xlstm"
MODULE = "transformers.models.xlstm.modeling_xlstm.xLSTMLayer"
_FIXED = dict(backbone="xlstm_7b", forget_gate="sigmoid")


def make(config: Mapping) -> MLSTM:
  """The cell of an `xLSTMConfig`, as `to_dict` gives it."""
  lib.check_config(WHO, config, use_bias=False, norm_eps=1e-6, eps=1e-6)
  names = "hidden_size", "num_heads", "gate_soft_cap"
  d, heads, cap = lib.read(WHO, config, *names)
  k, v = lib.read(WHO, config, "qk_dim_factor", "v_dim_factor")
  k, v = int(d * k), int(d * v)
  return MLSTM(
    d_model=d, num_heads=heads, expand=v / d, qk_ratio=k / v, soft_cap=cap,
    **_FIXED,
  )  # fmt: skip


def _shapes(cell, fused: bool) -> dict:
  d, (h, k, v) = cell.d_model, cell.sizes
  if fused:
    maps = {
      "qkv_opreact.weight": (2 * h * (k + v), d),
      "ifgate_preact.weight": (2 * h, d),
      "ifgate_preact.bias": (2 * h,),
    }
  else:
    maps = {
      "q.weight": (h * k, d),
      "k.weight": (h * k, d),
      "v.weight": (h * v, d),
      "ogate_preact.weight": (h * v, d),
      "igate_preact.weight": (h, d),
      "igate_preact.bias": (h,),
      "fgate_preact.weight": (h, d),
      "fgate_preact.bias": (h,),
    }
  return maps | {
    "multihead_norm.weight": (h * v,), "out_proj.weight": (d, h * v)
  }  # fmt: skip


def to_params(cell: MLSTM, weights: lib.Weights) -> dict:
  """The layer's weights as params."""
  lib.check_cell(WHO, cell, MLSTM, **_FIXED)
  fused = "qkv_opreact.weight" in weights
  w = lib.take(WHO, weights, _shapes(cell, fused))
  join = lambda *names: np.concatenate([w[n] for n in names])
  if fused:
    maps, gates = w["qkv_opreact.weight"], w["ifgate_preact.weight"]
    bias = w["ifgate_preact.bias"]
  else:
    maps = join("q.weight", "k.weight", "v.weight", "ogate_preact.weight")
    gates = join("igate_preact.weight", "fgate_preact.weight")
    bias = join("igate_preact.bias", "fgate_preact.bias")
  h, _, v = cell.sizes
  qkv, z = np.split(maps.T, [-h * v], axis=1)
  return lib.as_params(
    qkv=qkv,
    z=z,
    gates=gates.T,
    gates_bias=bias,
    norm=w["multihead_norm.weight"],
    out=w["out_proj.weight"].T,
  )


def to_weights(cell: MLSTM, params: Mapping, fused: bool = False) -> dict:
  """Params as the layer's weights, of weight_mode 'fused' or 'single'."""
  lib.check_cell(WHO, cell, MLSTM, **_FIXED)
  p = lib.params_of(WHO, cell, params)
  (h, k, _), maps = cell.sizes, {}
  if fused:
    maps["qkv_opreact.weight"] = np.concatenate([p["qkv"], p["z"]], 1).T
    maps["ifgate_preact.weight"] = p["gates"].T
    maps["ifgate_preact.bias"] = p["gates_bias"]
  else:
    parts = np.split(p["qkv"], [h * k, 2 * h * k], axis=1)
    for name, x in zip(("q", "k", "v", "ogate_preact"), (*parts, p["z"])):
      maps[f"{name}.weight"] = x.T
    gates, bias = np.split(p["gates"], 2, 1), np.split(p["gates_bias"], 2)
    for n, name in enumerate(("igate_preact", "fgate_preact")):
      maps[f"{name}.weight"], maps[f"{name}.bias"] = gates[n].T, bias[n]
  maps["multihead_norm.weight"] = p["norm"]
  maps["out_proj.weight"] = p["out"].T
  return lib.as_weights(maps)
