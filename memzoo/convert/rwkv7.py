"""RWKV-7: the first layer's time mixing of the authors' checkpoints and
`memzoo.cells.RWKV7`.

The weights are those below `blocks.0.att.` of a published file, in the layout
that RWKV-LM writes and the package `rwkv` reads. Later layers mix their values
with the first layer's (value residual, v0, v1, v2), which no cell sees: they
have no equal. Published files hold these of the first layer too, unused.
"""

from collections.abc import Mapping

import jax
import numpy as np

from memzoo.cells.matrix.rwkv7 import RWKV7
from memzoo.convert import weights as lib

WHO = "convert.rwkv7"
MODULE = "rwkv.model.RWKV_x070_TMix_seq"
_MIXED = "rwkvag"  # in the order of the cell's rows
_LOW = dict(decay="w", rate="a", gate="g")
_RANKS = dict(
  decay_rank="D_DECAY_LORA", rate_rank="D_AAA_LORA", gate_rank="D_GATE_LORA"
)
_UNUSED = ("v0", "v1", "v2")
_MAPS = ("receptance", "key", "value")


def make(config: Mapping, layer_index: int = 0) -> RWKV7:
  """The cell of {'n_embd', 'head_size'}, and of `D_DECAY_LORA`, `D_AAA_LORA`,
  `D_GATE_LORA` where they are not RWKV-LM's, as that calls them."""
  d, k = lib.read(WHO, config, "n_embd", "head_size")
  if layer_index:
    raise ValueError(
      f"{WHO}: layer_index={layer_index} has no equal: its values are mixed "
      "with the first layer's, and a cell knows one layer"
    )
  if d % k:
    raise ValueError(f"{WHO}: head_size={k} must divide n_embd={d}")
  ranks = {n: config[name] for n, name in _RANKS.items() if name in config}
  return RWKV7(d_model=d, num_heads=d // k, **ranks)


def _shapes(cell) -> dict:
  d, h, k = cell.d_model, cell.num_heads, cell.head_dim
  params = jax.eval_shape(cell.init, jax.random.key(0))
  ranks = {name: params[f"{name}_up"].shape[0] for name in _LOW}
  return {
    **{f"x_{n}": (1, 1, d) for n in _MIXED},
    "w0": (1, 1, d),
    "a0": (1, 1, d),
    **{f"{n}1": (d, ranks[name]) for name, n in _LOW.items()},
    **{f"{n}2": (ranks[name], d) for name, n in _LOW.items()},
    "k_k": (1, 1, d),
    "k_a": (1, 1, d),
    "r_k": (h, k),
    **{f"{name}.weight": (d, d) for name in (*_MAPS, "output")},
    "ln_x.weight": (d,),
    "ln_x.bias": (d,),
  }


def to_params(cell: RWKV7, weights: lib.Weights) -> dict:
  """The first layer's weights as params."""
  lib.check_cell(WHO, cell, RWKV7)
  w = lib.take(WHO, weights, _shapes(cell), optional=_UNUSED)
  by_head = lambda name: w[name].reshape(cell.num_heads, cell.head_dim)
  return lib.as_params(
    mix=np.concatenate([w[f"x_{n}"][0] for n in _MIXED]),
    rkv=np.stack([w[f"{name}.weight"].T for name in _MAPS]),
    **{f"{name}_down": w[f"{n}1"] for name, n in _LOW.items()},
    **{f"{name}_up": w[f"{n}2"] for name, n in _LOW.items()},
    decay_bias=w["w0"][0, 0],
    rate_bias=w["a0"][0, 0],
    removal=w["k_k"][0, 0],
    replacement=w["k_a"][0, 0],
    bonus=w["r_k"],
    norm_scale=by_head("ln_x.weight"),
    norm_bias=by_head("ln_x.bias"),
    out=w["output.weight"].T,
  )


def to_weights(cell: RWKV7, params: Mapping) -> dict:
  """Params as the first layer's weights, without the unused."""
  lib.check_cell(WHO, cell, RWKV7)
  p = lib.params_of(WHO, cell, params)
  vector = lambda name: p[name][None, None]
  return lib.as_weights(
    {
      **{f"x_{n}": x[None, None] for n, x in zip(_MIXED, p["mix"])},
      "w0": vector("decay_bias"),
      "a0": vector("rate_bias"),
      **{f"{n}1": p[f"{name}_down"] for name, n in _LOW.items()},
      **{f"{n}2": p[f"{name}_up"] for name, n in _LOW.items()},
      "k_k": vector("removal"),
      "k_a": vector("replacement"),
      "r_k": p["bonus"],
      **{f"{name}.weight": x.T for name, x in zip(_MAPS, p["rkv"])},
      "output.weight": p["out"].T,
      "ln_x.weight": p["norm_scale"].ravel(),
      "ln_x.bias": p["norm_bias"].ravel(),
    }
  )
