"""Regression on sequences."""

from typing import Any, ClassVar

from flax import nnx
import jax.numpy as jnp

from memzoo.core import dispatch
from memzoo.models.encoder import Encoder, check_size
from memzoo.models.model import Head, SequenceModel
from memzoo.models.pooling import POOLS, pool
from memzoo.models.stack import Cells


class SequenceRegressor(SequenceModel):
  """A sequence of floats or tokens to real numbers, at every input or once.

  Calls are `SequenceModel`'s. With a `pool`, one call reads a whole sequence,
  as `SequenceClassifier` does.

  Args:
    cells: one cell, or a list (a hybrid), bottom first.
    depth: number of blocks; None for the length of the list.
    num_outputs: N.
    d_input: width of float inputs; or
    vocab_size: of token inputs.
    pool: None for N numbers at every input; 'mean' or 'last' for N in all.
    rngs: its `params` stream draws the parameters.
    **options: of `Encoder` and `BlockOptions`: positions, dtype, unroll, mlp,
      mlp_width, dropout, norm, conv_size, remat, bidirectional.

  Raises:
    ValueError: on a size or option out of range.
    TypeError: on an unknown option.
  """

  kind: ClassVar[str] = "regressor"

  def __init__(
    self,
    cells: Cells,
    depth: int | None,
    num_outputs: int,
    *,
    d_input: int | None = None,
    vocab_size: int | None = None,
    pool: str | None = None,
    rngs: nnx.Rngs,
    **options,
  ):
    if pool is not None and pool not in POOLS:
      raise ValueError(
        f"SequenceRegressor: unknown pool {pool!r}; "
        + dispatch.nearest(pool, POOLS)
      )
    self.num_outputs = check_size("num_outputs", num_outputs)
    self.pool = pool
    self.encoder = Encoder(
      cells, depth, vocab_size=vocab_size, d_input=d_input, rngs=rngs, **options
    )
    self.head = Head(self.encoder.d_model, self.num_outputs, rngs=rngs)

  def __call__(self, state, inputs, *, reset=None, mask=None, **kwargs):
    """(state, float32 [B, T, N], zero where there is no input), or [B, N]
    with a pool; and the reports where asked for."""
    state, x, *rest = self.encoder(
      state, inputs, reset=reset, mask=mask, **kwargs
    )
    if self.pool is not None:
      return state, self.head(pool(self.pool, x, reset, mask)), *rest
    y = self.head(x)
    if mask is not None:
      y = jnp.where(mask[..., None], y, 0)
    return state, y, *rest

  def config(self) -> dict[str, Any]:
    """The constructor's arguments as plain data, without `rngs`."""
    return {
      **super().config(),
      "num_outputs": self.num_outputs,
      "pool": self.pool,
    }
