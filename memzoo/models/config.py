"""Whole models as plain data, saved beside checkpoints."""

from typing import Any

from flax import nnx

from memzoo.core import dispatch, registry
from memzoo.models.classifier import SequenceClassifier
from memzoo.models.lightnet import GridClassifier
from memzoo.models.lm import LanguageModel
from memzoo.models.model import SequenceModel
from memzoo.models.regressor import SequenceRegressor

KINDS = {
  cls.kind: cls
  for cls in (
    LanguageModel,
    SequenceClassifier,
    SequenceRegressor,
    GridClassifier,
  )
}


def to_config(model: SequenceModel) -> dict[str, Any]:
  """A model as plain data: {'model': kind, 'cells': [config, …], …}.

  Raises:
    TypeError: on a model of another class than `KINDS` has, or with a cell
      that is not registered.
  """
  if type(model) not in KINDS.values():
    raise TypeError(
      f"{type(model).__name__} has no config; models with one: "
      + ", ".join(cls.__name__ for cls in KINDS.values())
    )
  return {"model": model.kind, **model.config()}


def from_config(config: dict[str, Any], rngs: nnx.Rngs) -> SequenceModel:
  """The model that `to_config` described, with parameters drawn anew.

  Args:
    config: as `to_config` makes it.
    rngs: its `params` stream draws the parameters.

  Raises:
    ValueError: where 'model' or 'cells' is missing or unknown, or an option is
      out of range.
    TypeError: on an unknown or missing option.
  """
  if not isinstance(config, dict) or not {"model", "cells"} <= config.keys():
    raise ValueError(
      f"no model config (a dict with the keys 'model' and 'cells'): {config!r}"
    )
  options = dict(config)
  kind, cells = options.pop("model"), options.pop("cells")
  if kind not in KINDS:
    raise ValueError(
      f"unknown model {kind!r}; " + dispatch.nearest(kind, KINDS)
    )
  cells = [registry.from_config(cell) for cell in cells]
  return KINDS[kind](cells, rngs=rngs, **options)
