"""Lightning attention: `MiniMaxLightningAttention` of transformers and
`memzoo.cells.LightningAttention`."""

from collections.abc import Mapping

import numpy as np

from memzoo.cells.matrix.lightning_attention import LightningAttention
from memzoo.convert import weights as lib

WHO = "convert.minimax"
MODULE = (
  "transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention"
)
_FIXED = dict(variant="minimax", lrpe=False)
# The module's buffers: functions of its configuration.
BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


def make(config: Mapping, layer_index: int) -> LightningAttention:
  """The cell of layer `layer_index` of a `MiniMaxConfig`."""
  lib.check_config(WHO, config, hidden_act="silu")
  names = "hidden_size", "num_attention_heads", "num_hidden_layers"
  d, heads, layers = lib.read(WHO, config, *names)
  return LightningAttention(
    d_model=d,
    num_heads=heads,
    head_dim=config.get("head_dim") or d // heads,
    layer_index=layer_index,
    num_layers=layers,
    **_FIXED,
  )


def _shapes(cell) -> dict:
  d, width = cell.d_model, cell.num_heads * cell.head_dim
  return {
    "qkv_proj.weight": (3 * width, d),
    "output_gate.weight": (width, d),
    "norm.weight": (width,),
    "out_proj.weight": (d, width),
  }


def to_params(cell: LightningAttention, weights: lib.Weights) -> dict:
  """The layer's weights as params.

  Raises:
    ValueError: also where the buffer slope_rate, if it is there, is not that
      of the cell's layer.
  """
  lib.check_cell(WHO, cell, LightningAttention, **_FIXED)
  w = lib.take(WHO, weights, _shapes(cell), BUFFERS)
  if "slope_rate" in weights:
    slopes = np.reshape(np.asarray(weights["slope_rate"]), (-1,))
    head = np.arange(1, cell.num_heads + 1)
    layer = 1 - cell.layer_index / (cell.num_layers - 1 + 1e-5) + 1e-5
    want = layer * 2.0 ** (-8 * head / cell.num_heads)
    if slopes.shape != want.shape or not np.allclose(slopes, want, 1e-3, 1e-7):
      raise ValueError(
        f"{WHO}: slope_rate is not that of layer_index={cell.layer_index} of "
        f"num_layers={cell.num_layers}: {slopes} and {want}"
      )
  d = cell.d_model
  qkv = w["qkv_proj.weight"].T.reshape(d, cell.num_heads, 3, -1)
  qkv = np.swapaxes(qkv, 1, 2).reshape(d, -1)
  return lib.as_params(
    qkvu=np.concatenate([qkv, w["output_gate.weight"].T], axis=1),
    norm=w["norm.weight"],
    out=w["out_proj.weight"].T,
  )


def to_weights(cell: LightningAttention, params: Mapping) -> dict:
  """Params as the layer's weights, without its buffers."""
  lib.check_cell(WHO, cell, LightningAttention, **_FIXED)
  p = lib.params_of(WHO, cell, params)
  d, width = cell.d_model, cell.num_heads * cell.head_dim
  qkv, gate = np.split(p["qkvu"], [3 * width], axis=1)
  qkv = qkv.reshape(d, 3, cell.num_heads, cell.head_dim)
  return lib.as_weights(
    {
      "qkv_proj.weight": np.swapaxes(qkv, 1, 2).reshape(d, -1).T,
      "output_gate.weight": gate.T,
      "norm.weight": p["norm"],
      "out_proj.weight": p["out"].T,
    }
  )
