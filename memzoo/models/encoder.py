"""From tokens or floats to features: what the sequence models share."""

import dataclasses
import functools
import numbers
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from memzoo.core import initializers, registry
from memzoo.core.linear import dot
from memzoo.models import layers
from memzoo.models.block import Norm
from memzoo.models.stack import Cells, Implementation, Stack, make_options


class State(NamedTuple):
  """What a model holds between two inputs."""

  position: Any  # int32 [B], inputs since the last reset; () without positions
  layers: Any  # one BlockState per cell of the pattern, leaves [R, B, ...]


class Encoder(nnx.Module):
  """Embedding, a stack of blocks, norm.

  Args:
    cells: one cell, or a list (a hybrid), bottom first; or what takes the
      place of `Stack` and its first two arguments.
    depth: number of blocks; None for the length of the list.
    vocab_size: of inputs int [B, T]; or
    d_input: width of inputs float [B, T, d_input].
    positions: rows of a learned table of absolute positions, added to the
      embedding; 0 for none. Position counts real inputs since the last reset.
    dtype: of activations, 'float32', 'bfloat16' or 'float16'; parameters and
      logits are float32.
    unroll: repeats of the stack that are compiled together.
    rngs: its `params` stream draws the parameters.
    **options: of `BlockOptions`.

  Raises:
    ValueError: on a size, dtype or option out of range, or unless one of
      vocab_size and d_input is given.
    TypeError: on an unknown option.
  """

  def __init__(
    self,
    cells: Cells,
    depth: int | None = None,
    *,
    vocab_size: int | None = None,
    d_input: int | None = None,
    positions: int = 0,
    dtype: str = "float32",
    unroll: int = 1,
    rngs: nnx.Rngs,
    **options,
  ):
    if (vocab_size is None) == (d_input is None):
      raise ValueError(
        "model: give vocab_size for tokens or d_input for floats, one of the "
        f"two; got vocab_size={vocab_size!r}, d_input={d_input!r}"
      )
    if d_input is None:
      vocab_size = check_size("vocab_size", vocab_size)
    else:
      d_input = check_size("d_input", d_input)
    self.vocab_size, self.d_input = vocab_size, d_input
    self.positions = check_size("positions", positions, 0)
    self.dtype = _dtype(dtype)
    if not callable(cells):
      cells = functools.partial(Stack, cells, depth)
    self.stack = cells(make_options(**options), unroll=unroll, rngs=rngs)
    width = self.d_model
    table = lambda rows: nnx.Param(
      0.02 * jax.random.normal(rngs.params(), (rows, width))
    )
    if d_input is None:
      self.embedding, self.bias = table(vocab_size), None
    else:
      kernel = initializers.lecun_normal(rngs.params(), (d_input, width))
      self.embedding = nnx.Param(kernel)
      self.bias = nnx.Param(jnp.zeros((width,)))
    self.position = table(positions) if positions else None
    self.norm = Norm(width, self.stack.options.norm)

  @property
  def d_model(self) -> int:
    return self.stack.cells[0].d_model

  @property
  def max_length(self) -> int | None:
    """The most inputs that a fresh state can take; None for no limit."""
    limits = [self.stack.max_length, self.positions or None]
    return min((n for n in limits if n is not None), default=None)

  def initial_state(self, batch: int, key: jax.Array | None = None) -> State:
    """The memory of `batch` rows before their first input."""
    check_size("batch", batch, 1)
    position = jnp.zeros((batch,), jnp.int32) if self.positions else ()
    return State(position, self.stack.initial_state(batch, key))

  def __call__(
    self, state, inputs, *, reset=None, mask=None, key=None,
    implementation: Implementation = None, reports=False,
  ):  # fmt: skip
    """Features [B, T, D] of the inputs, zero where there is none.

    Arguments, errors and the third item are those of `SequenceModel`.
    """
    state, x, reset = self._enter(state, inputs, reset, mask)
    memory, x, *rest = self.stack(
      state.layers, x, reset=reset, mask=mask, key=key,
      implementation=implementation, reports=reports,
    )  # fmt: skip
    x = self.norm(x)
    if mask is not None:
      x = jnp.where(mask[..., None], x, 0)
    return State(state.position, memory), x, *rest

  def refresh(self, state, inputs, *, reset=None, mask=None) -> None:
    """Sets the buffers of every cell from a deterministic pass."""
    state, x, reset = self._enter(state, inputs, reset, mask)
    self.stack.refresh(state.layers, x, reset=reset, mask=mask)

  def config(self) -> dict[str, Any]:
    """The constructor's arguments as plain data, without `rngs`."""
    sizes = {"vocab_size": self.vocab_size, "d_input": self.d_input}
    return {
      "cells": [registry.to_config(cell) for cell in self.stack.cells],
      "depth": self.stack.depth,
      **{name: size for name, size in sizes.items() if size is not None},
      "positions": self.positions,
      "dtype": self.dtype,
      "unroll": self.stack.unroll,
      **dataclasses.asdict(self.stack.options),
    }

  def _enter(self, state, inputs, reset, mask):
    """Checks the arguments and embeds: (state, x [B, T, D], reset)."""
    self._check(inputs, reset, mask)
    inputs = jnp.asarray(inputs)
    if state is None or (isinstance(state, tuple) and not state):
      state = self.initial_state(inputs.shape[0])
    self._check_state(state, inputs.shape[0])
    if mask is not None:
      # Padding may hold anything, NaN and tokens out of range too.
      there = mask if self.d_input is None else mask[..., None]
      inputs = jnp.where(there, inputs, 0)
      reset = None if reset is None else reset & mask
    dtype = jnp.dtype(self.dtype)
    if self.d_input is None:
      x = jnp.take(self.embedding[...], inputs, axis=0).astype(dtype)
    else:
      x = dot(inputs.astype(dtype), self.embedding[...])
      x = x + self.bias[...].astype(dtype)
    if self.position is not None:
      count, index = _positions(state.position, reset, mask, inputs.shape[:2])
      state = state._replace(position=count)
      x = x + jnp.take(self.position[...], index, axis=0).astype(dtype)
    return state, x, reset

  def _check(self, inputs, reset, mask):
    shape, kind = jnp.shape(inputs), jnp.result_type(inputs)
    if self.d_input is None:
      want = "integer tokens [B, T]"
      fits = len(shape) == 2 and jnp.issubdtype(kind, jnp.integer)
    else:
      want = f"floats [B, T, {self.d_input}]"
      fits = len(shape) == 3 and jnp.issubdtype(kind, jnp.floating)
      fits = fits and shape[2] == self.d_input
    if not fits or not shape[1]:
      raise ValueError(f"model: inputs must be {want}, got {kind} {shape}")
    layers.check_flags("model", shape[:2], reset, mask)
    limit = self.max_length
    if limit is not None and shape[1] > limit:
      raise ValueError(
        f"model: got {shape[1]} inputs, holds at most {limit}; make its cells "
        "(or `positions`) larger, or let the memory slide"
      )

  def _check_state(self, state, batch):
    want = jax.eval_shape(lambda: self.initial_state(batch))
    if jax.tree.structure(want) != jax.tree.structure(state):
      raise ValueError(
        "model: this is not a state of this model; start from "
        f"initial_state({batch})"
      )
    for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(want)):
      if jnp.shape(leaf) != spec.shape:
        raise ValueError(
          f"model: state has a leaf of shape {jnp.shape(leaf)}, expected "
          f"{spec.shape} for {batch} rows"
        )


def check_size(name: str, value, least: int = 1) -> int:
  """value as an int of at least `least`, or one clear ValueError."""
  number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if not number or value < least:
    raise ValueError(
      f"model: {name} must be an integer, {least} or more, got {value!r}"
    )
  return int(value)


def _dtype(dtype) -> str:
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = str(dtype)
  if name not in ("float32", "bfloat16", "float16"):
    raise ValueError(
      f"model: dtype must be 'float32', 'bfloat16' or 'float16', got {dtype!r}"
    )
  return name


def _positions(count, reset, mask, shape):
  """The inputs since the last reset: (after the call [B], before each input
  [B, T])."""
  there = jnp.ones(shape, bool) if mask is None else mask
  seen = jnp.cumsum(there.astype(jnp.int32), axis=1)  # this one included
  start = jnp.broadcast_to(-count[:, None], shape)
  if reset is not None:
    start = jnp.where(reset, seen - 1, start)
    start = jax.lax.cummax(start, axis=1)
  return seen[:, -1] - start[:, -1], jnp.where(there, seen - 1 - start, 0)
