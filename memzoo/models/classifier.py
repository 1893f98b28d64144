"""Classifiers of sequences."""

from typing import Any, ClassVar

from flax import nnx

from memzoo.core import dispatch
from memzoo.models.encoder import Encoder, check_size
from memzoo.models.model import Head, SequenceModel
from memzoo.models.pooling import POOLS, pool
from memzoo.models.stack import Cells


class SequenceClassifier(SequenceModel):
  """A sequence of floats or tokens to one class.

  Calls are `SequenceModel`'s. One call reads a whole sequence: the logits
  speak of the inputs of that call (those since the row's last reset) that are
  there. The memory that comes back goes on, the mean does not; `pool='last'`
  is the read-out that can be streamed.

  >>> model = SequenceClassifier(memzoo.make('gru', d_model=64), 2, 10,
  ...                            d_input=1, dropout=.2, rngs=nnx.Rngs(0))
  >>> _, logits = model(None, xs)  # float [B, T, 1] -> float32 [B, 10]

  Args:
    cells: one cell, or a list (a hybrid), bottom first.
    depth: number of blocks; None for the length of the list.
    num_classes: C.
    d_input: width of float inputs; or
    vocab_size: of token inputs.
    pool: 'mean' over the inputs, or the 'last' of them.
    rngs: its `params` stream draws the parameters.
    **options: of `Encoder` and `BlockOptions`: positions, dtype, unroll, mlp,
      mlp_width, dropout, norm, conv_size, remat, bidirectional.

  Raises:
    ValueError: on a size or option out of range.
    TypeError: on an unknown option.
  """

  kind: ClassVar[str] = "classifier"

  def __init__(
    self,
    cells: Cells,
    depth: int | None,
    num_classes: int,
    *,
    d_input: int | None = None,
    vocab_size: int | None = None,
    pool: str = "mean",
    rngs: nnx.Rngs,
    **options,
  ):
    if pool not in POOLS:
      raise ValueError(
        f"SequenceClassifier: unknown pool {pool!r}; "
        + dispatch.nearest(pool, POOLS)
      )
    self.num_classes = check_size("num_classes", num_classes)
    self.pool = pool
    self.encoder = Encoder(
      cells, depth, vocab_size=vocab_size, d_input=d_input, rngs=rngs, **options
    )
    self.head = Head(self.encoder.d_model, self.num_classes, rngs=rngs)

  def __call__(self, state, inputs, *, reset=None, mask=None, **kwargs):
    """(state, logits float32 [B, C]), and the reports where asked for."""
    state, x, *rest = self.encoder(
      state, inputs, reset=reset, mask=mask, **kwargs
    )
    return state, self.head(pool(self.pool, x, reset, mask)), *rest

  def config(self) -> dict[str, Any]:
    """The constructor's arguments as plain data, without `rngs`."""
    return {
      **super().config(),
      "num_classes": self.num_classes,
      "pool": self.pool,
    }
