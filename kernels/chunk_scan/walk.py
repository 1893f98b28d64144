"""What the drivers of both kinds of device share: the tiles of one walk.

A walk takes a chunk function over the chunks of one sequence. Everything in it
is a tile, an array of two axes: what a step has is a column [C, N], state and
constants are [M, N] (`memzoo.ops.chunk.as_columns`, `as_tiles`).
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Walk:
  """A chunk function and how it is taken over a sequence.

  A value: two walks that are equal share their compiled kernels.

  Attributes:
    function: (state, inputs [C, N], constants) -> (state, outputs [C, N]), on
      pytrees of tiles.
    size: C.
    state, inputs, constants: the trees of each; what is traced is their
      leaves.
    flows: which leaves of (state, inputs, constants) have gradients.
    value_blocks: into how many parts the value axis is cut, each a program of
      its own (GPU).
    values: which leaves of (state, inputs, constants, outputs) have the value
      axis as their last.
    interpret: run by Pallas' interpreter.
  """

  function: Callable[[Any, Any, Any], Any]
  size: int
  state: Any
  inputs: Any
  constants: Any
  flows: tuple[tuple[bool, ...], ...]
  values: tuple[tuple[bool, ...], ...]
  value_blocks: int = 1
  interpret: bool = False

  def step(self, state, inputs, constants):
    """One chunk on leaves: lists in, (list, list) out.

    Traced through its own linearisation, so that a function with a gradient
    of its own (`jax.custom_vjp`) is met by its rule, in plain operations.
    """
    return jax.vjp(self._call, state, inputs, constants)[0]

  def _call(self, state, inputs, constants):
    state, outputs = self.function(
      self.state.unflatten(state),
      self.inputs.unflatten(inputs),
      self.constants.unflatten(constants),
    )
    return jax.tree.leaves(state), jax.tree.leaves(outputs)

  def pull(self, state, inputs, constants, d_state, d_outputs):
    """The gradients of one chunk: three lists, zeros where nothing flows."""
    parts = (state, inputs, constants)
    free = [
      [x for x, flows in zip(xs, flags) if flows]
      for xs, flags in zip(parts, self.flows)
    ]

    def call(*free):
      full = []
      for xs, flags, some in zip(parts, self.flows, free):
        some = iter(some)
        full.append([next(some) if f else x for x, f in zip(xs, flags)])
      return self._call(*full)

    got = jax.vjp(call, *free)[1]((list(d_state), list(d_outputs)))
    full = []
    for xs, flags, some in zip(parts, self.flows, got):
      some = iter(some)
      full.append(
        [next(some) if f else jnp.zeros_like(x) for x, f in zip(xs, flags)]
      )
    return full

  def outputs(self, state, inputs, constants):
    """The shapes and dtypes of a chunk's outputs: a list."""
    inputs = [
      jax.ShapeDtypeStruct((self.size,) + x.shape[1:], x.dtype) for x in inputs
    ]
    return jax.eval_shape(self._call, list(state), inputs, list(constants))[1]

  def chunks(self, inputs) -> int:
    """How many chunks the inputs hold."""
    return inputs[0].shape[0] // self.size
