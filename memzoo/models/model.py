"""What every sequence model offers."""

from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.core import initializers
from memzoo.models.encoder import Encoder, State
from memzoo.models.layers import Buffer


class SequenceModel(nnx.Module):
  """What every sequence model offers: the shape of a cell, with a batch.

    state = model.initial_state(batch)
    state, outputs = model(state, inputs, reset=…, mask=…, key=…)

  The same call trains (T long) and decodes (T = 1). Its arguments:

    state: as `initial_state` makes it, or None for that.
    inputs: int [B, T] tokens, or float [B, T, d_input].
    reset: bool [B, T] or None. True: the row is fresh before this input.
    mask: bool [B, T] or None. False: there is no input here; the memory
      passes untouched, and what the inputs hold is not read.
    key: for dropout; None is deterministic.
    implementation: a form for all cells, or {cell name: form}, or None for
      the first that serves.
    reports: also return what the cells report: {'layers/i/name': []}, means
      over the inputs that are there, and {'name': []}, their mean over the
      layers that report it.

  A token out of the vocabulary, or a position beyond the table, gives NaN.

  Raises, on a call: ValueError on inputs, flags or a state of wrong shape or
  dtype, on more inputs than `max_length`, and on an unknown implementation;
  NotImplementedError on a form that a cell does not have.

  Attributes:
    encoder: an `Encoder`.
    kind: name of the class in configs.
  """

  kind: ClassVar[str] = ""
  encoder: Encoder

  def initial_state(self, batch: int, key: jax.Array | None = None) -> State:
    """The memory of `batch` rows before their first input.

    Args:
      batch: B.
      key: for stochastic memories alone.
    """
    return self.encoder.initial_state(batch, key)

  @property
  def max_length(self) -> int | None:
    """The most inputs that a fresh state can take; None for no limit."""
    return self.encoder.max_length

  @property
  def has_buffers(self) -> bool:
    """Whether any cell holds untrained variables, `Buffer`."""
    return bool(jax.tree.leaves(nnx.state(self, Buffer)))

  def refresh(self, state, inputs, *, reset=None, mask=None) -> None:
    """Sets the buffers of every cell, in place, from a deterministic pass.

    Each cell sees what the layers below give with the buffers of before.

    Args:
      state: the memory before the inputs; None or () for a fresh one.
      inputs: as in a call.
      reset: as in a call.
      mask: as in a call; the cells get zeros where it is False.
    """
    self.encoder.refresh(state, inputs, reset=reset, mask=mask)

  def config(self) -> dict[str, Any]:
    """The constructor's arguments as plain data, without `rngs`."""
    return self.encoder.config()


class Head(nnx.Module):
  """Features [..., D] to float32 [..., N]."""

  def __init__(
    self, width: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs
  ):
    self.kernel = nnx.Param(
      initializers.lecun_normal(rngs.params(), (width, outputs))
    )
    self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

  def __call__(self, x):
    y = jnp.matmul(
      x,
      self.kernel[...].astype(x.dtype),
      preferred_element_type=jnp.float32,
    )
    return y if self.bias is None else y + self.bias[...]
