"""Gated DeltaNet: `Qwen3NextGatedDeltaNet` of transformers and
`memzoo.cells.GatedDelta`.

There fewer heads of queries and keys than of values may stand, each shared by
r heads of values. The cell has a head of keys for each of values, so the maps
and kernels of q and k are repeated r times, which computes the same; the way
back takes them out again, and needs the repeats to be equal.
"""

from collections.abc import Mapping

import numpy as np

from memzoo.cells.matrix.gated_delta import GatedDelta
from memzoo.convert import weights as lib

WHO = "convert.qwen3_next"
MODULE = (
  "transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet"
)
_FIXED = dict(allow_neg_eigval=False)


def make(config: Mapping) -> GatedDelta:
  """The cell of a `Qwen3NextConfig`, as `to_dict` gives it.

  Raises:
    ValueError: where the norm's epsilon is not the cell's, and as elsewhere.
  """
  lib.check_config(WHO, config, hidden_act="silu", rms_norm_eps=1e-5)
  names = "hidden_size", "linear_conv_kernel_dim", "linear_num_value_heads"
  d, taps, heads = lib.read(WHO, config, *names)
  k, v = lib.read(WHO, config, "linear_key_head_dim", "linear_value_head_dim")
  return GatedDelta(
    d_model=d, num_heads=heads, head_dim=k, expand_v=v / k, conv_size=taps
  )


def _shapes(cell, key_heads: int) -> dict:
  d, h, v = cell.d_model, cell.num_heads, cell.value_dim
  k = key_heads * cell.head_dim
  return {
    "in_proj_qkvz.weight": (2 * k + 2 * h * v, d),
    "in_proj_ba.weight": (2 * h, d),
    "conv1d.weight": (2 * k + h * v, 1, cell.conv_size),
    "dt_bias": (h,),
    "A_log": (h,),
    "norm.weight": (v,),
    "out_proj.weight": (d, h * v),
  }


def to_params(cell: GatedDelta, weights: lib.Weights) -> dict:
  """The layer's weights as params. How many heads of keys there are is read
  from the rows of in_proj_qkvz."""
  lib.check_cell(WHO, cell, GatedDelta, **_FIXED)
  h, k, v = cell.num_heads, cell.head_dim, cell.value_dim
  g, name = h, "in_proj_qkvz.weight"
  if name in weights and np.ndim(weights[name]) == 2:
    g, rest = divmod(np.shape(weights[name])[0] - 2 * h * v, 2 * k)
    if rest or g < 1 or h % g:
      raise ValueError(
        f"{WHO}: {name} has {np.shape(weights[name])[0]} rows, which is no "
        f"number of key heads of width {k} that divides {h} heads of width {v}"
      )
  w = lib.take(WHO, weights, _shapes(cell, g))
  r = h // g
  rows = w[name].T.reshape(-1, g, 2 * k + 2 * r * v)
  q, key, value, gate = np.split(rows, [k, 2 * k, 2 * k + r * v], axis=-1)
  q, key = _repeat(q, r), _repeat(key, r)
  b, a = np.split(w["in_proj_ba.weight"].T.reshape(-1, g, 2 * r), 2, axis=-1)
  flat = lambda x: x.reshape(len(x), -1)
  taps = lib.to_taps(w["conv1d.weight"])
  of_q, of_k, of_v = np.split(taps, [g * k, 2 * g * k], axis=1)
  of_q, of_k = (_repeat(x.reshape(-1, g, k), r) for x in (of_q, of_k))
  return lib.as_params(
    **{
      "qkv": np.concatenate([flat(x) for x in (q, key, value)], axis=1),
      "conv": np.concatenate([flat(of_q), flat(of_k), of_v], axis=1),
      "ab": np.concatenate([flat(a), flat(b)], axis=1),
      "a_log": w["A_log"],
      "dt": w["dt_bias"],
      "gate": flat(gate),
      "norm": w["norm.weight"],
      "out": w["out_proj.weight"].T,
    }
  )


def to_weights(
  cell: GatedDelta, params: Mapping, num_key_heads: int | None = None
) -> dict:
  """Params as the layer's weights.

  Args:
    cell: of the params.
    params: as `init` makes them.
    num_key_heads: of the layer; None for as many as of values.

  Raises:
    ValueError: where heads that are to share their keys do not have the same.
  """
  lib.check_cell(WHO, cell, GatedDelta, **_FIXED)
  p = lib.params_of(WHO, cell, params)
  h, k = cell.num_heads, cell.head_dim
  g = num_key_heads or h
  if h % g:
    raise ValueError(f"{WHO}: num_key_heads={g} must divide num_heads={h}")
  per_head = lambda x: np.split(x, [h * k, 2 * h * k], axis=1)
  (q, key, value), (of_q, of_k, of_v) = per_head(p["qkv"]), per_head(p["conv"])
  q, key, of_q, of_k = (_share(x, h, g) for x in (q, key, of_q, of_k))
  of = lambda x: x.reshape(len(x), g, -1)
  a, b = np.split(p["ab"], 2, axis=1)
  rows = np.concatenate([q, key, of(value), of(p["gate"])], axis=-1)
  flat = lambda x: x.reshape(len(x), -1)
  taps = np.concatenate([flat(of_q), flat(of_k), of_v], axis=1)
  return lib.as_weights(
    {
      "in_proj_qkvz.weight": flat(rows).T,
      "in_proj_ba.weight": flat(np.concatenate([of(b), of(a)], axis=-1)).T,
      "conv1d.weight": lib.from_taps(taps),
      "dt_bias": p["dt"],
      "A_log": p["a_log"],
      "norm.weight": p["norm"],
      "out_proj.weight": p["out"].T,
    }
  )


def _repeat(x, times):
  """[N, G, K] -> [N, G times, K], each head beside its copies."""
  return np.repeat(x, times, axis=1)


def _share(x, heads, groups):
  """[N, H K] -> [N, G, K]: the one of each group, which are to be equal."""
  x = x.reshape(len(x), groups, heads // groups, -1)
  if not np.array_equal(x, np.broadcast_to(x[:, :, :1], x.shape)):
    raise ValueError(
      f"{WHO}: {heads} heads have keys of their own and cannot share "
      f"{groups}; convert with num_key_heads={heads}"
    )
  return x[:, :, 0]
