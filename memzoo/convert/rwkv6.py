"""RWKV-6: the time mixing of the authors' checkpoints and `memzoo.cells.RWKV6`.

The weights are those below `blocks.N.att.` of a published file, in the layout
that RWKV-LM writes and the package `rwkv` reads.
"""

from collections.abc import Mapping

import numpy as np

from memzoo.cells.matrix.rwkv6 import RWKV6
from memzoo.convert import weights as lib

WHO = "convert.rwkv6"
MODULE = "rwkv.model.RWKV.att_seq_v6_0"
_MIXED = "wkvrg"  # in the order of the cell's rows
_MAPS = dict(r="receptance", k="key", v="value", g="gate")


def make(config: Mapping) -> RWKV6:
  """The cell of {'n_embd', 'head_size'}, and of `TIME_MIX_EXTRA_DIM` and
  `TIME_DECAY_EXTRA_DIM` where they are not 32 and 64, as RWKV-LM calls them."""
  d, k = lib.read(WHO, config, "n_embd", "head_size")
  if d % k:
    raise ValueError(f"{WHO}: head_size={k} must divide n_embd={d}")
  return RWKV6(
    d_model=d, num_heads=d // k, head_dim=k,
    mix_rank=config.get("TIME_MIX_EXTRA_DIM", 32),
    decay_rank=config.get("TIME_DECAY_EXTRA_DIM", 64),
  )  # fmt: skip


def _shapes(cell) -> dict:
  d, h, k = cell.d_model, cell.num_heads, cell.head_dim
  mix, low = cell.mix_rank, cell.decay_rank
  return {
    **{f"time_maa_{n}": (1, 1, d) for n in "x" + _MIXED},
    "time_maa_w1": (d, 5 * mix),
    "time_maa_w2": (5, mix, d),
    "time_decay": (1, 1, h * k),
    "time_decay_w1": (d, low),
    "time_decay_w2": (low, h * k),
    "time_faaaa": (h, k),
    **{f"{name}.weight": (h * k, d) for name in _MAPS.values()},
    "output.weight": (d, h * k),
    "ln_x.weight": (h * k,),
    "ln_x.bias": (h * k,),
  }


def to_params(cell: RWKV6, weights: lib.Weights) -> dict:
  """One layer's weights as params."""
  lib.check_cell(WHO, cell, RWKV6)
  w = lib.take(WHO, weights, _shapes(cell))
  by_head = lambda name: w[name].reshape(cell.num_heads, cell.head_dim)
  return lib.as_params(
    mix_x=w["time_maa_x"][0, 0],
    mix=np.concatenate([w[f"time_maa_{n}"][0] for n in _MIXED]),
    mix_in=w["time_maa_w1"],
    mix_out=w["time_maa_w2"],
    decay=w["time_decay"][0, 0],
    decay_in=w["time_decay_w1"],
    decay_out=w["time_decay_w2"],
    **{n: w[f"{name}.weight"].T for n, name in _MAPS.items()},
    bonus=w["time_faaaa"],
    norm_scale=by_head("ln_x.weight"),
    norm_bias=by_head("ln_x.bias"),
    out=w["output.weight"].T,
  )


def to_weights(cell: RWKV6, params: Mapping) -> dict:
  """Params as one layer's weights."""
  lib.check_cell(WHO, cell, RWKV6)
  p = lib.params_of(WHO, cell, params)
  return lib.as_weights(
    {
      "time_maa_x": p["mix_x"][None, None],
      **{f"time_maa_{n}": x[None, None] for n, x in zip(_MIXED, p["mix"])},
      "time_maa_w1": p["mix_in"],
      "time_maa_w2": p["mix_out"],
      "time_decay": p["decay"][None, None],
      "time_decay_w1": p["decay_in"],
      "time_decay_w2": p["decay_out"],
      "time_faaaa": p["bonus"],
      **{f"{name}.weight": p[n].T for n, name in _MAPS.items()},
      "output.weight": p["out"].T,
      "ln_x.weight": p["norm_scale"].ravel(),
      "ln_x.bias": p["norm_bias"].ravel(),
    }
  )
