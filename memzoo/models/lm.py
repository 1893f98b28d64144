"""Language models: a distribution over the next token, at every token."""

from typing import Any, ClassVar

from flax import nnx
import jax.numpy as jnp

from memzoo.models.encoder import Encoder, check_size
from memzoo.models.model import Head, SequenceModel
from memzoo.models.pooling import last
from memzoo.models.stack import Cells


class LanguageModel(SequenceModel):
  """Tokens to logits over the next token. Calls are `SequenceModel`'s.

  >>> model = LanguageModel(memzoo.make('gru', d_model=64), 2, 256,
  ...                       rngs=nnx.Rngs(0))
  >>> state, logits = model(None, tokens)  # int [B, T] -> float32 [B, T, V]

  Args:
    cells: one cell, or a list (a hybrid), bottom first.
    depth: number of blocks; None for the length of the list.
    vocab_size: V.
    tie_embeddings: whether the embedding is also the output matrix.
    rngs: its `params` stream draws the parameters.
    **options: of `Encoder` and `BlockOptions`: positions, dtype, unroll, mlp,
      mlp_width, dropout, norm, conv_size, remat.

  Raises:
    ValueError: on a size or option out of range, and on bidirectional blocks.
    TypeError: on an unknown option.
  """

  kind: ClassVar[str] = "language_model"

  def __init__(
    self,
    cells: Cells,
    depth: int | None,
    vocab_size: int,
    *,
    tie_embeddings: bool = True,
    rngs: nnx.Rngs,
    **options,
  ):
    vocab_size = check_size("vocab_size", vocab_size)
    if options.get("bidirectional"):
      raise ValueError(
        "LanguageModel: bidirectional blocks see the tokens that it predicts; "
        "they are for classifiers and regressors"
      )
    self.encoder = Encoder(
      cells, depth, vocab_size=vocab_size, rngs=rngs, **options
    )
    self.tie_embeddings = bool(tie_embeddings)
    head = lambda: Head(self.encoder.d_model, vocab_size, bias=False, rngs=rngs)
    self.head = None if tie_embeddings else head()

  @property
  def vocab_size(self) -> int:
    return self.encoder.vocab_size

  def __call__(self, state, inputs, **kwargs):
    """(state, logits float32 [B, T, V]), zero where there is no input, and
    the reports where they are asked for."""
    state, x, *rest = self.encoder(state, inputs, **kwargs)
    return state, self._logits(x), *rest

  def next_logits(self, state, inputs, *, mask=None, **kwargs):
    """(state, logits float32 [B, V]) after each row's last input that is
    there; no others are computed."""
    state, x, *rest = self.encoder(state, inputs, mask=mask, **kwargs)
    return state, self._logits(last(x, mask)), *rest

  def config(self) -> dict[str, Any]:
    """The constructor's arguments as plain data, without `rngs`."""
    return {**super().config(), "tie_embeddings": self.tie_embeddings}

  def _logits(self, x):
    if self.head is not None:
      return self.head(x)
    table = self.encoder.embedding[...].astype(x.dtype)
    return jnp.matmul(x, table.T, preferred_element_type=jnp.float32)
