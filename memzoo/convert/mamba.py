"""Mamba: `MambaMixer` of transformers and `memzoo.cells.Mamba`."""

from collections.abc import Mapping

import numpy as np

from memzoo.cells.ssm.mamba import Mamba
from memzoo.convert import weights as lib

WHO = "convert.mamba"
MODULE = "transformers.models.mamba.modeling_mamba.MambaMixer"


def make(config: Mapping) -> Mamba:
  """The cell of a `MambaConfig`, as `to_dict` gives it."""
  lib.check_config(WHO, config, use_bias=False, hidden_act="silu")
  names = "hidden_size", "state_size", "intermediate_size", "conv_kernel"
  d, n, e, taps = lib.read(WHO, config, *names)
  (rank,) = lib.read(WHO, config, "time_step_rank")
  return Mamba(d_model=d, d_state=n, expand=e / d, conv_size=taps, dt_rank=rank)


def _shapes(cell) -> dict:
  d, e, n, r = cell.d_model, cell.d_inner, cell.d_state, cell.rank
  return {
    "in_proj.weight": (2 * e, d),
    "conv1d.weight": (e, 1, cell.conv_size),
    "conv1d.bias": (e,),
    "x_proj.weight": (r + 2 * n, e),
    "dt_proj.weight": (e, r),
    "dt_proj.bias": (e,),
    "A_log": (e, n),
    "D": (e,),
    "out_proj.weight": (d, e),
  }


def to_params(cell: Mamba, weights: lib.Weights) -> dict:
  """The mixer's weights as params; without conv1d.bias it is zero."""
  lib.check_cell(WHO, cell, Mamba)
  shapes = _shapes(cell)
  if "conv1d.bias" not in weights:
    weights = {**weights, "conv1d.bias": np.zeros(shapes["conv1d.bias"], "f")}
  w = lib.take(WHO, weights, shapes)
  return lib.as_params(
    **{
      "in": w["in_proj.weight"].T,
      "conv": lib.to_taps(w["conv1d.weight"]),
      "conv_bias": w["conv1d.bias"],
      "select": w["x_proj.weight"].T,
      "dt": w["dt_proj.weight"].T,
      "dt_bias": w["dt_proj.bias"],
      "a_log": w["A_log"],
      "d": w["D"],
      "out": w["out_proj.weight"].T,
    }
  )


def to_weights(cell: Mamba, params: Mapping) -> dict:
  """Params as the mixer's weights."""
  lib.check_cell(WHO, cell, Mamba)
  p = lib.params_of(WHO, cell, params)
  return lib.as_weights(
    {
      "in_proj.weight": p["in"].T,
      "conv1d.weight": lib.from_taps(p["conv"]),
      "conv1d.bias": p["conv_bias"],
      "x_proj.weight": p["select"].T,
      "dt_proj.weight": p["dt"].T,
      "dt_proj.bias": p["dt_bias"],
      "A_log": p["a_log"],
      "D": p["d"],
      "out_proj.weight": p["out"].T,
    }
  )
