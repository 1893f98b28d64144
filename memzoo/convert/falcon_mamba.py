"""Falcon Mamba: `FalconMambaMixer` of transformers and `memzoo.cells.Mamba`.

Mamba's mixer and weights, with norms, without scales, of what a token selects.
"""

from collections.abc import Mapping

from memzoo.cells.ssm.mamba import Mamba
from memzoo.convert import mamba, weights as lib

WHO = "convert.falcon_mamba"
_PATH = "transformers.models.falcon_mamba.modeling_falcon_mamba"
MODULE = f"{_PATH}.FalconMambaMixer"


def make(config: Mapping) -> Mamba:
  """The cell of a `FalconMambaConfig`, as `to_dict` gives it."""
  (eps,) = lib.read(WHO, config, "mixer_rms_eps")
  return mamba.make_mixer(WHO, config, select_norm=eps)


def to_config(cell: Mamba) -> dict:
  """What `make` reads."""
  _check(cell)
  return mamba.mixer_config(cell) | {"mixer_rms_eps": cell.select_norm}


def to_params(cell: Mamba, weights: lib.Weights) -> dict:
  """The mixer's weights as params; without conv1d.bias it is zero."""
  _check(cell)
  return mamba.mixer_params(WHO, cell, weights)


def to_weights(cell: Mamba, params: Mapping) -> dict:
  """Params as the mixer's weights."""
  _check(cell)
  return mamba.mixer_weights(WHO, cell, params)


def _check(cell):
  lib.check_cell(WHO, cell, Mamba)
  if cell.select_norm is None:
    raise ValueError(f"{WHO}: the cell needs a select_norm, the module's eps")
