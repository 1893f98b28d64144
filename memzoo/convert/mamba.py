"""Mamba: `MambaMixer` of transformers and `memzoo.cells.Mamba`."""

from collections.abc import Mapping

import numpy as np

from memzoo.cells.ssm.mamba import Mamba
from memzoo.convert import weights as lib

WHO = "convert.mamba"
MODULE = "transformers.models.mamba.modeling_mamba.MambaMixer"


def make(config: Mapping) -> Mamba:
  """The cell of a `MambaConfig`, as `to_dict` gives it."""
  return make_mixer(WHO, config)


def to_config(cell: Mamba) -> dict:
  """What `make` reads."""
  lib.check_cell(WHO, cell, Mamba, select_norm=None)
  return mixer_config(cell)


def to_params(cell: Mamba, weights: lib.Weights) -> dict:
  """The mixer's weights as params; without conv1d.bias it is zero."""
  lib.check_cell(WHO, cell, Mamba, select_norm=None)
  return mixer_params(WHO, cell, weights)


def to_weights(cell: Mamba, params: Mapping) -> dict:
  """Params as the mixer's weights."""
  lib.check_cell(WHO, cell, Mamba, select_norm=None)
  return mixer_weights(WHO, cell, params)


# What Falcon Mamba's mixer has too. `who` is of messages.


def make_mixer(who: str, config: Mapping, **options) -> Mamba:
  lib.check_config(who, config, use_bias=False, hidden_act="silu")
  names = "hidden_size", "state_size", "conv_kernel", "time_step_rank"
  d, n, taps, rank = lib.read(who, config, *names)
  # Some files have an `expand` that their weights do not follow.
  e = config.get("intermediate_size") or d * lib.read(who, config, "expand")[0]
  return Mamba(
    d_model=d, d_state=n, expand=e / d, conv_size=taps,
    dt_rank=None if rank == "auto" else rank, **options,
  )  # fmt: skip


def mixer_config(cell: Mamba) -> dict:
  return {
    "hidden_size": cell.d_model,
    "state_size": cell.d_state,
    "intermediate_size": cell.d_inner,
    "expand": lib.whole(cell.expand),
    "conv_kernel": cell.conv_size,
    "time_step_rank": cell.rank,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
  }


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


def mixer_params(who: str, cell: Mamba, weights: lib.Weights) -> dict:
  shapes = _shapes(cell)
  if "conv1d.bias" not in weights:
    weights = {**weights, "conv1d.bias": np.zeros(shapes["conv1d.bias"], "f")}
  w = lib.take(who, weights, shapes)
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


def mixer_weights(who: str, cell: Mamba, params: Mapping) -> dict:
  p = lib.params_of(who, cell, params)
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
