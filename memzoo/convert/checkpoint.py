"""Folders as Hugging Face publishes them, as language models of ours, and back.

>>> model = checkpoint.load('mamba-130m-hf')
>>> checkpoint.save(model, 'mine')  # for AutoModelForCausalLM too

For the models whose blocks are a norm and a mixer, and nothing else: Mamba,
Mamba-2 and Falcon Mamba. No network is touched.
"""

from collections.abc import Mapping
import json
from typing import Any

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from memzoo import convert
from memzoo.convert import safetensors, weights as lib
from memzoo.core import dispatch
from memzoo.models.layers import name_of
from memzoo.models.lm import LanguageModel

WHO = "convert.checkpoint"
# By `model_type`, which is also the converter's name.
ARCHITECTURES = {
  "falcon_mamba": "FalconMambaForCausalLM",
  "mamba": "MambaForCausalLM",
  "mamba2": "Mamba2ForCausalLM",
}
_EPS = 1e-5  # of the norms of a block and of the last
# What a block of these models is, in our options.
_OPTIONS = dict(mlp_width=0, norm="rms", conv_size=0)
_HEAD, _LAYER = "lm_head.weight", "backbone.layers.{}."
_OUTSIDE = {
  "backbone.embeddings.weight": "embedding",
  "backbone.norm_f.weight": "norm",
}


def load(folder, *, dtype: str = "float32") -> LanguageModel:
  """The language model of a folder, its parameters in float32.

  Args:
    folder: with config.json and model.safetensors, or the files of its index.
    dtype: of activations.

  Raises:
    ValueError: on another kind of model, on an entry of its configuration that
      nothing of ours can match, and on weights that are missing, unknown or of
      another shape.
  """
  folder = epath.Path(folder)
  text = (folder / "config.json").read_text()
  config = json.loads(text, object_hook=_number)
  name = config.get("model_type")
  if name not in ARCHITECTURES:
    raise ValueError(
      f"{WHO}: unknown model_type {name!r}; "
      + dispatch.nearest(str(name), ARCHITECTURES)
    )
  lib.check_config(WHO, config, layer_norm_epsilon=_EPS)
  cell = convert.make(name, config)
  vocabulary, depth = lib.read(WHO, config, "vocab_size", "num_hidden_layers")
  tied = bool(config.get("tie_word_embeddings", name != "mamba2"))
  model = LanguageModel(
    cell, depth, vocabulary, tie_embeddings=tied, dtype=dtype,
    rngs=nnx.Rngs(0), **_OPTIONS,
  )  # fmt: skip
  found = safetensors.read_folder(folder)
  found = {n: np.asarray(x, np.float32) for n, x in found.items()}
  _put(model, name, found, tied)
  return model


def save(
  model: LanguageModel, folder, *, extra: Mapping[str, Any] | None = None
) -> None:
  """Writes config.json and model.safetensors, for `load` and transformers.

  Args:
    model: as `load` makes it, with parameters of any values.
    folder: made where it is missing.
    extra: more entries of config.json, such as eos_token_id.

  Raises:
    ValueError: on a model that is none of `ARCHITECTURES`.
  """
  name, cell = _kind(model)
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  config = {
    "architectures": [ARCHITECTURES[name]],
    "model_type": name,
    "vocab_size": model.vocab_size,
    "num_hidden_layers": model.encoder.stack.depth,
    "layer_norm_epsilon": _EPS,
    "tie_word_embeddings": model.head is None,
    "torch_dtype": "float32",
    **convert.source(name).to_config(cell),
    **(extra or {}),
  }
  array = lambda x: np.asarray(x[...], np.float32)
  parts = _outside(model)
  arrays = {n: array(parts[part]) for n, part in _OUTSIDE.items()}
  if model.head is not None:
    arrays[_HEAD] = array(model.head.kernel).T
  block = model.encoder.stack.blocks[0]
  params = block.memory.values
  for i in range(model.encoder.stack.depth):
    prefix = _LAYER.format(i)
    arrays[prefix + "norm.weight"] = array(block.memory_norm.scale)[i]
    one = jax.tree.map(lambda x, i=i: np.asarray(x[i], np.float32), params)
    mixer = convert.to_weights(name, cell, one)
    arrays |= {f"{prefix}mixer.{n}": x for n, x in mixer.items()}
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  safetensors.write(folder / safetensors.SINGLE, arrays)


def _number(entry: dict):
  """JSON has no infinity: transformers writes {'__float__': 'Infinity'}."""
  special = entry.keys() == {"__float__"}
  return float(entry["__float__"]) if special else entry


def _outside(model) -> dict[str, nnx.Param]:
  encoder = model.encoder
  return {"embedding": encoder.embedding, "norm": encoder.norm.scale}


def _put(model, name, found, tied):
  """Sets every parameter of the model."""
  stack = model.encoder.stack
  layers = [_LAYER.format(i) for i in range(stack.depth)]
  inside = {n: x for n, x in found.items() if n.startswith(tuple(layers))}
  outside = {n: x for n, x in found.items() if n not in inside}
  parts = _outside(model)
  shapes = {n: parts[part].shape for n, part in _OUTSIDE.items()}
  if not tied:
    shapes[_HEAD] = model.head.kernel.shape[::-1]
  shapes |= {f"{p}norm.weight": (model.encoder.d_model,) for p in layers}
  norms = {n: x for n, x in inside.items() if ".mixer." not in n}
  took = lib.take(WHO, outside | norms, shapes, optional=[_HEAD] * tied)
  for n, part in _OUTSIDE.items():
    parts[part][...] = jnp.asarray(took[n])
  if not tied:
    model.head.kernel[...] = jnp.asarray(took[_HEAD].T)
  block = stack.blocks[0]
  scales = [took[f"{p}norm.weight"] for p in layers]
  block.memory_norm.scale[...] = jnp.stack(scales)
  params = []
  for prefix in layers:
    start = prefix + "mixer."
    mixer = {
      n.removeprefix(start): x
      for n, x in inside.items()
      if n.startswith(start)
    }  # fmt: skip
    try:
      params.append(convert.to_params(name, block.memory.cell, mixer))
    except ValueError as error:
      raise ValueError(f"{WHO}: {start}*: {error}") from None
  for n, variable in block.memory.params.items():
    variable[...] = jnp.stack([p[n] for p in params])


def _kind(model):
  """(the model's type, its cell)."""
  if type(model) is not LanguageModel:
    raise ValueError(
      f"{WHO}: the model must be a LanguageModel, got {type(model).__name__}"
    )
  encoder = model.encoder
  cells, options = encoder.stack.cells, encoder.stack.options
  wrong = [
    f"{n}={getattr(options, n)!r}"
    for n, want in _OPTIONS.items()
    if getattr(options, n) != want
  ]
  wrong += [f"positions={encoder.positions}"] if encoder.positions else []
  if wrong:
    raise ValueError(
      f"{WHO}: a published block is a norm and a mixer ("
      + ", ".join(f"{n}={want!r}" for n, want in _OPTIONS.items())
      + f", no positions); the model has {', '.join(wrong)}"
    )
  name = name_of(cells[0])
  if name == "mamba" and cells[0].select_norm is not None:
    name = "falcon_mamba"
  if len(cells) > 1 or name not in ARCHITECTURES:
    raise ValueError(
      f"{WHO}: the stack must be of one cell, Mamba or Mamba2, got "
      + ", ".join(map(name_of, cells))
    )
  return name, cells[0]
