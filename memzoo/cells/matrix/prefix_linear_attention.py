"""Prefix linear attention: JRT-RNN."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memzoo.cells.matrix.based import Based, State, join, part, with_one
from memzoo.core import initializers
from memzoo.core.linear import dot
from memzoo.core.registry import register
from memzoo.ops import arguments, chunk, features


@register(
  "prefix_linear_attention",
  family="matrix",
  year=2024,
  paper="Arora et al. 2024, arXiv:2407.05483",
  write="add; a prefix at once",
  evidence="silver",
  tiny=dict(
    d_model=6, num_heads=2, feature_dim=3, head_dim=5, shared_encoder=True
  ),
)
@dataclasses.dataclass(frozen=True)
class PrefixLinearAttention(Based):
  """JRT-RNN: a prefix is read twice, the first time without an order.

    S_M = Σ_{j <= M} φ(k_j^e) v_j^eᵀ ,  z_M = Σ_{j <= M} φ(k_j^e)
    S_t = S_{t−1} + φ(k_t) v_tᵀ ,  z_t = z_{t−1} + φ(k_t) ,  S_0, z_0 = S_M, z_M
    y_t = W_o (φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t)
    k^e, v^e = W_k^e x, W_v^e x   encoder ;  q, k, v = W x   decoder

  `write_context` encodes a prefix of M tokens: all of it, in any order, is in
  the state before the first token. The same prefix and what follows it then
  go through the decoder, which is Based's layer with its features φ:

  >>> state = cell.write_context(params, cell.initial_state(params), prefix)
  >>> state, ys = memzoo.scan(cell, params, state, prefix_and_rest)

  With `shared_encoder` the encoder's maps are the decoder's. A reset forgets
  the context too.

  State: s [H, F, V] and z [H, F] float32, from zero; F = 1 + K + K².
  Params: qkv [D, H (2K + V)], out [HV, D], and without `shared_encoder`
    context [D, H (K + V)] (k^e, v^e).
  Forms: step and scan O(H F V) a token, in order; chunk O(H (C (F + V) + F V))
    a token, in T / C sequential steps of matmuls; pallas the same in one
    kernel. A context costs O(M H F V), in one matmul.
  Differs: nothing. The masked-language loss on the prefix, which the paper
    adds in training, is the trainer's. Shared maps are those of the authors'
    synthetic experiments.
  Paper: Arora, Timalsina, Singhal, Spector, Eyuboglu, Zhao, Rao, Rudra, Ré
    2024, "Just read twice: closing the recall gap for recurrent language
    models", arXiv:2407.05483, section 4 (prefix linear attention); layer as in
    the authors' code (github.com/HazyResearch/prefix-linear-attention).
  """

  shared_encoder: bool = False

  def init(self, key) -> dict[str, Any]:
    params = super().init(key)
    if not self.shared_encoder:
      width = self.num_heads * (self.feature_dim + self.value_dim)
      params["context"] = initializers.lecun_normal(
        jax.random.fold_in(key, 1), (self.d_model, width)
      )
    return params

  def write_context(self, params, state: State, context, mask=None) -> State:
    """The state with a prefix added to it.

    Args:
      params: as `init` made them.
      state: what the prefix is added to.
      context: [M, D].
      mask: bool [M]; False: no such token.

    Raises:
      ValueError: on wrong shapes or dtypes.
    """
    who = "PrefixLinearAttention.write_context"
    arguments.check_array(who, "context", context, (None, self.d_model))
    arguments.check_flags(who, len(context), None, mask)
    if mask is not None:
      context = jnp.where(mask[:, None], context, jnp.zeros_like(context))
    width = self.num_heads * self.feature_dim
    if self.shared_encoder:
      weights = params["qkv"][:, width:]
    else:
      weights = params["context"]
    k, v = jnp.split(dot(context, weights), [width], axis=-1)
    k, v = features.taylor(self.by_head(k)), with_one(self.by_head(v))
    if mask is not None:
      k = jnp.where(mask[:, None, None], k, jnp.zeros_like(k))
    write = jax.vmap(
      lambda k, v: chunk.matmul(k.T, v, context.dtype), in_axes=1
    )
    return part(join(state) + write(k, v))
