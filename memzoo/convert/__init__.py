"""Weights of public modules as params of cells, and back.

Pure functions on flat dicts of numpy arrays, as a module's `state_dict` holds
them: no network, no other framework, and no file is touched. Folders of whole
models are `memzoo.convert.checkpoint`'s.

>>> cell = convert.make('mamba2', config.to_dict())
>>> params = convert.to_params('mamba2', cell, weights)
>>> weights = convert.to_weights('mamba2', cell, params)
"""

from collections.abc import Mapping
from types import ModuleType

from memzoo.convert import falcon_mamba, kimi_linear, mamba, mamba2, minimax
from memzoo.convert import qwen3_next, recurrent_gemma, rwkv6, rwkv7, xlstm
from memzoo.core import dispatch

# Each has MODULE, the public class or function, and the three functions below;
# those of whole models have `to_config`, the inverse of `make`, too.
SOURCES: dict[str, ModuleType] = {
  "falcon_mamba": falcon_mamba,
  "kimi_linear": kimi_linear,
  "mamba": mamba,
  "mamba2": mamba2,
  "minimax": minimax,
  "qwen3_next": qwen3_next,
  "recurrent_gemma": recurrent_gemma,
  "rwkv6": rwkv6,
  "rwkv7": rwkv7,
  "xlstm": xlstm,
}


def source(name: str) -> ModuleType:
  """The converters of one public module.

  Raises:
    ValueError: on an unknown name, with the nearest ones.
  """
  if name not in SOURCES:
    raise ValueError(
      f"convert: unknown source {name!r}; " + dispatch.nearest(name, SOURCES)
    )
  return SOURCES[name]


def make(name: str, config: Mapping, **options):
  """The cell that computes what the module does with this configuration.

  Args:
    name: of the source.
    config: the model's configuration as a dict.
    **options: of the source: minimax and rwkv7 take `layer_index`.

  Raises:
    ValueError: on an entry that is missing, or that no option of the cell can
      match.
  """
  return source(name).make(config, **options)


def to_params(name: str, cell, weights: Mapping) -> dict:
  """A module's weights as the cell's params.

  Args:
    name: of the source.
    cell: as `make` makes it.
    weights: {name in the module: numpy array}.

  Raises:
    ValueError: on weights that are missing, unknown or of another shape, and
      on a cell that the module does not have.
  """
  return source(name).to_params(cell, weights)


def to_weights(name: str, cell, params: Mapping, **options) -> dict:
  """The cell's params as the module's weights: the inverse of `to_params`.

  Args:
    name: of the source.
    cell: of the params.
    params: as the cell's `init` makes them.
    **options: of the source: qwen3_next takes `num_key_heads`, xlstm `fused`.

  Raises:
    ValueError: on params of another cell, or that the module cannot hold.
  """
  return source(name).to_weights(cell, params, **options)
