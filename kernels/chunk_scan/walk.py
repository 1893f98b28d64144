"""A chunk function on lists of tiles, and its gradients.

Everything in a kernel is a tile, an array of two axes: what a step has is a
column [C, N], state and constants are [M, N] (`memzoo.ops.chunk.as_columns`,
`as_tiles`). What there is of every chunk is stacked, [T / C, M, N].
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
      pytrees of tiles; a `memzoo.ops.chunk.ChunkFunction` for the split form.
    state, inputs, constants: the trees of each; what is traced is their
      leaves.
    flows: which leaves of (state, inputs, constants) have gradients.
    values: which leaves of (state, inputs, constants, outputs) have the value
      axis as their last.
    value_blocks: into how many parts the value axis is cut, each a program of
      its own (GPU).
    interpret: run by Pallas' interpreter.
  """

  function: Callable[[Any, Any, Any], Any]
  state: Any
  inputs: Any
  constants: Any
  flows: tuple[tuple[bool, ...], ...]
  values: tuple[tuple[bool, ...], ...]
  value_blocks: int = 1
  interpret: bool = False

  # Functions are traced through their own linearisation, so that those with a
  # gradient of their own (`jax.custom_vjp`) are met by its rule, in plain
  # operations: kernels have no others.

  def step(self, state, inputs, constants):
    """One chunk: (state, outputs)."""
    return jax.vjp(self._call, state, inputs, constants)[0]

  def prepare(self, inputs, constants):
    """What a chunk knows without the state."""
    return jax.vjp(self._prepare, inputs, constants)[0]

  def advance(self, tree, state, local):
    """The state after a chunk of which `prepare` gave `local`, of a tree."""
    call = lambda state, local: self._advance(tree, state, local)
    return jax.vjp(call, state, local)[0]

  def advance_back(self, tree, state, local, d_state):
    """The gradient of `advance` for its state."""
    call = lambda state, local: self._advance(tree, state, local)
    return self._back(call, state, d_state, local)

  def outputs_back(self, state, inputs, constants, d_outputs):
    """The gradient of a chunk's outputs for its state."""
    call = lambda *parts: self._call(*parts)[1]
    return self._back(call, state, d_outputs, inputs, constants)

  def pull(self, state, inputs, constants, d_state, d_outputs):
    """The gradients of one chunk: three lists, zeros where nothing flows."""
    parts = (state, inputs, constants)
    free = [self._free(i, xs) for i, xs in enumerate(parts)]
    call = lambda *free: self._call(
      *(self._full(i, some, parts[i]) for i, some in enumerate(free))
    )
    got = jax.vjp(call, *free)[1]((list(d_state), list(d_outputs)))
    zeros = [[jnp.zeros_like(x) for x in xs] for xs in parts]
    return [self._full(i, some, zeros[i]) for i, some in enumerate(got)]

  def _back(self, call, state, cotangents, *others):
    free = lambda some, *others: call(self._full(0, some, state), *others)
    back = jax.vjp(free, self._free(0, state), *others)[1]
    got = back(list(cotangents))[0]
    return self._full(0, got, [jnp.zeros_like(x) for x in state])

  def _free(self, part, xs):
    return [x for x, flows in zip(xs, self.flows[part]) if flows]

  def _full(self, part, some, xs):
    some = iter(some)
    return [next(some) if f else x for x, f in zip(xs, self.flows[part])]

  def _call(self, state, inputs, constants):
    return _leaves(
      self.function(
        self.state.unflatten(state),
        self.inputs.unflatten(inputs),
        self.constants.unflatten(constants),
      )
    )

  def _prepare(self, inputs, constants):
    return jax.tree.leaves(
      self.function.prepare(
        self.inputs.unflatten(inputs), self.constants.unflatten(constants)
      )
    )

  def _advance(self, tree, state, local):
    state = self.function.advance(
      self.state.unflatten(state), tree.unflatten(local)
    )
    return jax.tree.leaves(state)

  def shapes(self, call, *lists):
    """Shapes and dtypes of what `call` gives for one chunk of stacked lists."""
    one = lambda xs: [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs]
    return jax.eval_shape(call, *map(one, lists))

  def local_tree(self, inputs, constants):
    """The tree of what `prepare` gives."""
    out = jax.eval_shape(
      lambda i, c: self.function.prepare(
        self.inputs.unflatten(i), self.constants.unflatten(c)
      ),
      inputs,
      constants,
    )
    return jax.tree.structure(out)


def _leaves(pair):
  return jax.tree.leaves(pair[0]), jax.tree.leaves(pair[1])
