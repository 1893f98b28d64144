"""Mamba-2: `Mamba2Mixer` of transformers and `memzoo.cells.Mamba2`."""

from collections.abc import Mapping

import numpy as np

from memzoo.cells.ssm.mamba2 import Mamba2
from memzoo.convert import weights as lib

WHO = "convert.mamba2"
MODULE = "transformers.models.mamba2.modeling_mamba2.Mamba2Mixer"


def make(config: Mapping) -> Mamba2:
  """The cell of a `Mamba2Config`, as `to_dict` gives it."""
  lib.check_config(
    WHO, config, use_bias=False, hidden_act="silu", layer_norm_epsilon=1e-5
  )
  limit = tuple(config.get("time_step_limit", (0.0, float("inf"))))
  if limit != (0.0, float("inf")):
    raise ValueError(f"{WHO}: the cell does not clip steps, got {limit}")
  names = "hidden_size", "state_size", "expand", "head_dim", "n_groups"
  d, n, expand, p, groups = lib.read(WHO, config, *names)
  (taps,) = lib.read(WHO, config, "conv_kernel")
  return Mamba2(
    d_model=d, d_state=n, expand=expand, head_dim=p, num_groups=groups,
    conv_size=taps,
  )  # fmt: skip


def to_config(cell: Mamba2) -> dict:
  """What `make` reads, and the module beside it."""
  lib.check_cell(WHO, cell, Mamba2)
  return {
    "hidden_size": cell.d_model,
    "state_size": cell.d_state,
    "expand": lib.whole(cell.expand),
    "num_heads": cell.num_heads,
    "head_dim": cell.head_width,
    "n_groups": cell.num_groups,
    "conv_kernel": cell.conv_size,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
  }


def _shapes(cell) -> dict:
  d, e, h = cell.d_model, cell.d_inner, cell.num_heads
  width = e + 2 * cell.num_groups * cell.d_state
  return {
    "in_proj.weight": (e + width + h, d),
    "conv1d.weight": (width, 1, cell.conv_size),
    "conv1d.bias": (width,),
    "dt_bias": (h,),
    "A_log": (h,),
    "D": (h,),
    "norm.weight": (e,),
    "out_proj.weight": (d, e),
  }


def to_params(cell: Mamba2, weights: lib.Weights) -> dict:
  """The mixer's weights as params; without conv1d.bias it is zero."""
  lib.check_cell(WHO, cell, Mamba2)
  shapes = _shapes(cell)
  if "conv1d.bias" not in weights:
    weights = {**weights, "conv1d.bias": np.zeros(shapes["conv1d.bias"], "f")}
  w = lib.take(WHO, weights, shapes)
  return lib.as_params(
    **{
      "in": w["in_proj.weight"].T,
      "conv": lib.to_taps(w["conv1d.weight"]),
      "conv_bias": w["conv1d.bias"],
      "dt_bias": w["dt_bias"],
      "a_log": w["A_log"],
      "d": w["D"],
      "norm": w["norm.weight"],
      "out": w["out_proj.weight"].T,
    }
  )


def to_weights(cell: Mamba2, params: Mapping) -> dict:
  """Params as the mixer's weights."""
  lib.check_cell(WHO, cell, Mamba2)
  p = lib.params_of(WHO, cell, params)
  return lib.as_weights(
    {
      "in_proj.weight": p["in"].T,
      "conv1d.weight": lib.from_taps(p["conv"]),
      "conv1d.bias": p["conv_bias"],
      "dt_bias": p["dt_bias"],
      "A_log": p["a_log"],
      "D": p["d"],
      "norm.weight": p["norm"],
      "out_proj.weight": p["out"].T,
    }
  )
