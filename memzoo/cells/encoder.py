"""Layers of a transformer encoder over a few tokens, as parts of cells.

They compute with what `plain` makes of parameters, which is also what a step in
`memzoo.kernels.cell_scan` takes.
"""

import math

import jax
import jax.numpy as jnp

from memzoo.core import initializers
from memzoo.ops import norm

# The names of parameters that enter products.
WEIGHTS = ("w1", "w2", "queries", "qkv", "out_w")


def init_norm(shape):
  """Of a layer norm: {norm_scale, norm_bias}, of `shape`."""
  return {"norm_scale": jnp.ones(shape), "norm_bias": jnp.zeros(shape)}


def init_mlp(key, width, hidden, out):
  """{w1 [width, hidden], b1 [hidden], w2 [hidden, out]}."""
  keys, weights = jax.random.split(key), initializers.glorot_uniform
  w1, w2 = weights(keys[0], (width, hidden)), weights(keys[1], (hidden, out))
  return {"w1": w1, "b1": jnp.zeros((hidden,)), "w2": w2}


def init_layer(key, width, hidden):
  """{qkv [D, 3D], out_w [D, D], w1, b1, w2}, and of the attention and the MLP
  {out_b, norm_scale, norm_bias} [2, D]."""
  key, *keys = jax.random.split(key, 5)
  maps = [initializers.glorot_uniform(k, (width, width)) for k in keys]
  return {
    "qkv": jnp.concatenate(maps[:3], axis=1),
    "out_w": maps[3],
    "out_b": jnp.zeros((2, width)),
    **(init_norm((2, width)) | init_mlp(key, width, hidden, width)),
  }


def plain(params):
  """Nested params in float32: those of `WEIGHTS` as they are, the others, which
  are added or multiplied, as [1, ..., N]."""

  def one(path, w):
    if path[-1].key not in WEIGHTS:
      w = w.reshape(1, -1, w.shape[-1])
    return w.astype(jnp.float32)

  return jax.tree_util.tree_map_with_path(one, params)


def layer(z, p, num_heads: int):
  """Attention, then an MLP, each after a norm: tokens [R, D] -> [R, D]."""
  first, second = (
    {k: p[k][:, n : n + 1] for k in ("norm_scale", "norm_bias", "out_b")}
    for n in range(2)
  )
  h = _attend(layer_norm(z, first), p, num_heads)
  z = z + affine(h, p["out_w"], first["out_b"])
  h = hidden(layer_norm(z, second), p)
  return z + affine(h, p["w2"], second["out_b"])


def _attend(h, p, num_heads):
  qkv = dot(h, p["qkv"]).reshape(h.shape[0], 3, num_heads, -1)
  q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
  scores = jnp.einsum("qhc,khc->hqk", q, k) / math.sqrt(q.shape[-1])
  out = jnp.einsum("hqk,khc->qhc", jax.nn.softmax(scores, axis=-1), v)
  return out.reshape(h.shape)


def layer_norm(x, p):
  return norm.layer_norm(x, p["norm_scale"][0], p["norm_bias"][0], eps=1e-6)


def hidden(x, p):
  """The hidden units of an MLP: [..., width] -> [..., hidden]."""
  return jax.nn.gelu(affine(x, p["w1"], p["b1"]))


def affine(x, w, b):
  return dot(x, w) + b[0].astype(x.dtype)


def dot(x, w):
  """x [..., N] @ w in x's dtype."""
  return x @ w.astype(x.dtype)
