"""From a chunk function and arrays to the kernels' tiles, and back."""

from functools import partial
import math
from typing import Any, NamedTuple

import jax
from jax.custom_batching import custom_vmap
import jax.numpy as jnp

from memzoo.core import dispatch
from memzoo.kernels.chunk_scan import lists, pallas_gpu, pallas_tpu
from memzoo.kernels.chunk_scan.walk import Walk
from memzoo.kernels.interpret import interpreting
from memzoo.ops import chunk

_DRIVERS = dict(tpu=pallas_tpu, gpu=pallas_gpu)


class Axes(NamedTuple):
  """The letters of every leaf's axes, as tiles: 'KV', 'CK', 'C1', …

  K and V may be padded with zeros to what a device takes: the function gives
  zeros there for zeros. V may be cut into blocks: what one block computes does
  not depend on another. 1 is one; any other letter is taken as it is.

  Attributes:
    state, inputs, constants, outputs: pytrees of strings; a leaf may be given
      that a call leaves out (None there).
  """

  state: Any
  inputs: Any
  constants: Any
  outputs: Any


def chunk_scan(
  function,
  state,
  inputs,
  constants=(),
  *,
  axes: Axes,
  chunk_size: int,
  value_block: int | None = None,
  segments: int | None = None,
  split: bool = False,
):
  """Runs a chunk function over one sequence, in one kernel.

  `jax.vmap` makes the kernel run its rows side by side; what is not mapped is
  shared and not copied. First derivatives in reverse mode alone.

  Args:
    function: (state, inputs, constants) -> (state, outputs) on tiles, as for
      `memzoo.ops.chunk.run` with `columns=True`, of what kernels have: matmul,
      elementwise, masks, sums. No slices.
    state: a pytree of float32 or integers, each of two axes or fewer.
    inputs: a NamedTuple with a field `mask`, leaves [T] or [T, N].
    constants: a pytree of two axes or fewer.
    axes: of all these.
    chunk_size: C, a power of two.
    value_block: the width of a block of V; None for all of V on a TPU, and at
      most 64 on a GPU.
    segments: of how many the backward keeps the first state alone, and
      computes the other states again; None for 1 where the states of all
      chunks need no more memory than the inputs, else about √(T / C).
    split: three kernels, of which the middle one alone walks, over states and
      what `prepare` gives: for so few sequences and heads that one program
      for each leaves the device idle. It keeps every state.

  Returns:
    (state, outputs [T, ...]).

  Raises:
    NotImplementedError: where no kernel serves the call: on a platform
      without one, or shapes that it does not take.
  """
  platform = _platform()
  length = jax.tree.leaves(inputs)[0].shape[0]
  if not length:
    raise NotImplementedError("the kernel takes one step or more")
  size = max(chunk.fit(chunk_size, length), 16)
  count = -(-length // size)
  if split:
    if not isinstance(function, chunk.ChunkFunction):
      raise NotImplementedError("the chunk function is not in parts to split")
    segments, value_block = 1, None
  segments = min(segments or _segments(state, inputs, size, count), count)
  count += -count % segments
  pad = count * size - length
  if pad and inputs.mask is None:
    inputs = inputs._replace(mask=jnp.ones((length,), bool))

  trees = state, inputs, constants
  names = [_named(tree, axis) for tree, axis in zip(trees, axes)]
  flows = [
    [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves(t)] for t in trees
  ]
  tiles = (
    chunk.as_tiles(state), chunk.as_columns(inputs), chunk.as_tiles(constants)
  )  # fmt: skip
  outputs = jax.eval_shape(partial(_first, function, size), *tiles)
  names.append(leaves(axes.outputs))
  values = [[name[-1] == "V" for name in some] for some in names]
  flat = [leaves(tile) for tile in tiles]
  flat[1] = [jnp.pad(x, [(0, pad), (0, 0)]) for x in flat[1]]
  if platform == "gpu":
    flat = [list(map(_padded, xs, some)) for xs, some in zip(flat, names)]
  blocks = 1 if split else _blocks(platform, value_block, flat, values)
  flat[1] = [x.reshape(count, size, -1) for x in flat[1]]
  walk = Walk(
    function,
    *map(jax.tree.structure, tiles),
    flows=_frozen(flows),
    values=_frozen(values),
    value_blocks=blocks,
    interpret=interpreting(),
  )
  new, out = _scan(_SPLIT if split else _WHOLE, platform, segments, walk, *flat)
  new = [x[: y.shape[0], : y.shape[1]] for x, y in zip(new, leaves(tiles[0]))]
  new = chunk.from_tiles(jax.tree.unflatten(walk.state, new), state)
  out = [
    x.reshape(count * size, -1)[:length, : y.shape[1]]
    for x, y in zip(out, leaves(outputs))
  ]
  return new, jax.tree.unflatten(jax.tree.structure(outputs), out)


def leaves(tree) -> list:
  return jax.tree.leaves(tree)


def _frozen(lists):
  return tuple(map(tuple, lists))


def _first(function, size, state, inputs, constants):
  """The outputs of a chunk, for their shapes."""
  inputs = jax.tree.map(
    lambda x: jnp.broadcast_to(x[:1], (size,) + x.shape[1:]), inputs
  )
  return function(state, inputs, constants)[1]


def _platform() -> str:
  platform = dispatch.current_platform()
  if platform in _DRIVERS:
    return platform
  if interpreting():
    return "tpu"
  raise NotImplementedError(
    f"no kernel for the platform {platform!r}; kernels run on "
    + " and ".join(sorted(_DRIVERS))
    + ", and anywhere inside memzoo.kernels.interpret()"
  )


def _named(tree, axes) -> list[str]:
  """The letters of the leaves that a tree has."""
  missing = lambda x: x is None
  return leaves(
    jax.tree.map(
      lambda x, name: None if x is None else name, tree, axes, is_leaf=missing
    )
  )


def _segments(state, inputs, size, count):
  bytes_of = lambda tree: sum(
    math.prod(x.shape) * x.dtype.itemsize for x in leaves(tree)
  )
  if bytes_of(state) * count <= bytes_of(inputs):
    return 1
  return max(1, math.isqrt(count))


def _padded(x, letters):
  """x with its K and V axes a power of two, 16 or more."""
  widths = []
  for n, letter in zip(x.shape, letters):
    more = max(16, 1 << max(n - 1, 0).bit_length()) - n
    if n == 1 or letter in "C1":
      more = 0
    elif more and letter not in "KV":
      raise NotImplementedError(
        f"a GPU kernel takes powers of two from 16 on its axis {letter!r}, "
        f"got {n}"
      )
    widths.append((0, more))
  return jnp.pad(x, widths)


def _blocks(platform, value_block, flat, values) -> int:
  """Into how many parts V is cut: what is not cut has one."""
  whole = platform == "tpu" or not all([*values[0], *values[3]])
  widths = {
    x.shape[-1]
    for xs, flags in zip(flat, values)
    for x, has in zip(xs, flags)
    if has
  }
  if value_block is None and (whole or not widths):
    return 1
  width = max(widths, default=0)
  block = min(value_block or 64, width)
  if whole or len(widths) != 1 or width % block:
    raise NotImplementedError(
      f"V, {sorted(widths)} wide, is not cut into blocks of {block} on a "
      f"{platform}"
    )
  return width // block


def _batched(call):
  """`call` on lists of arrays, whose mapped axes are always the first ones."""
  mapped = custom_vmap(call)

  @mapped.def_vmap
  def rule(size, in_batched, *args):
    axes = jax.tree.map(lambda b: 0 if b else None, in_batched)
    out = _batched(jax.vmap(call, in_axes=tuple(axes), axis_size=size))(*args)
    return out, jax.tree.map(lambda _: True, out)

  return mapped


class _Form(NamedTuple):
  """How chunks are taken, on arrays of one sequence.

  Attributes:
    forward: (platform, walk, every) -> ((state, inputs, constants) -> (state,
      outputs, states kept before every `every`-th chunk)).
    backward: (platform, walk) -> ((states before every chunk, inputs,
      constants, d_state, d_outputs) -> their gradients).
  """

  forward: Any
  backward: Any


def _forward(platform, walk, every, state, inputs, constants):
  outs = walk.shapes(walk.step, state, [x[0] for x in inputs], constants)[1]
  return _DRIVERS[platform].serial(
    walk.step, state, inputs, constants, outs, every=every,
    name="chunk_scan", values=walk.values, **_options(walk),
  )  # fmt: skip


def _backward(platform, walk, starts, inputs, constants, d_state, d_outputs):
  a, b, c = len(starts), len(inputs), len(constants)

  def step(carry, one, constants):
    d_state, total = lists.split(carry, a, c)
    state, inputs, d_outputs = lists.split(one, a, b, len(d_outputs_all))
    d_state, d_inputs, d_constants = walk.pull(
      state, inputs, constants, d_state, d_outputs
    )
    total = [t + d.astype(t.dtype) for t, d in zip(total, d_constants)]
    return [*d_state, *total], d_inputs

  d_outputs_all = d_outputs
  s, i, k, o = walk.values
  zeros = [jnp.zeros(x.shape, jnp.float32) for x in constants]
  outs = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in inputs]
  carry, d_inputs, _ = _DRIVERS[platform].serial(
    step, [*d_state, *zeros], [*starts, *inputs, *d_outputs], constants, outs,
    reverse=True, name="chunk_scan_backward",
    values=((*s, *k), (*s, *i, *o), k, i), **_options(walk),
  )  # fmt: skip
  d_state, total = lists.split(carry, a, c)
  return (
    d_state, d_inputs, [t.astype(x.dtype) for t, x in zip(total, constants)]
  )  # fmt: skip


def _forward_split(platform, walk, every, state, inputs, constants):
  del every  # Every state is kept: outputs are computed from them.
  driver, options = _DRIVERS[platform], _options(walk)
  one = [x[0] for x in inputs]
  local, tree = _prepare(driver, walk, inputs, constants)
  new, _, starts = driver.serial(
    lambda s, x, _: (walk.advance(tree, s, x), []), state, local, [], [],
    every=1, name="chunk_scan_advance", **options,
  )  # fmt: skip

  def emit(one, constants):
    state, inputs = lists.split(one, len(starts), len(inputs_all))
    return walk.step(state, inputs, constants)[1]

  inputs_all = inputs
  outs = walk.shapes(walk.step, state, one, constants)[1]
  outputs = driver.parallel(
    emit, [*starts, *inputs], constants, outs, name="chunk_scan_emit", **options
  )
  return new, outputs, starts


def _backward_split(
  platform, walk, starts, inputs, constants, d_state, d_outputs
):
  driver, options = _DRIVERS[platform], _options(walk)
  a, b, n = len(starts), len(inputs), len(d_outputs)
  like = lambda xs: [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
  local, tree = _prepare(driver, walk, inputs, constants)

  def back(one, constants):
    state, inputs, d_outputs = lists.split(one, a, b, n)
    return walk.outputs_back(state, inputs, constants, d_outputs)

  read = driver.parallel(
    back, [*starts, *inputs, *d_outputs], constants, like(starts),
    name="chunk_scan_emit_backward", **options,
  )  # fmt: skip

  def retreat(d_state, one, _):
    state, local, read = lists.split(one, a, len(one) - 2 * a, a)
    before = walk.advance_back(tree, state, local, d_state)
    return [x + y for x, y in zip(before, read)], d_state

  d_first, d_ends, _ = driver.serial(
    retreat, d_state, [*starts, *local, *read], [], like(starts), reverse=True,
    name="chunk_scan_advance_backward", **options,
  )  # fmt: skip

  def pull(one, constants):
    state, inputs, d_state, d_outputs = lists.split(one, a, b, a, n)
    _, d_inputs, d_constants = walk.pull(
      state, inputs, constants, d_state, d_outputs
    )
    return [*d_inputs, *d_constants]

  single = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in constants]
  out = driver.parallel(
    pull, [*starts, *inputs, *d_ends, *d_outputs], constants,
    [*like(inputs), *single], name="chunk_scan_backward", **options,
  )  # fmt: skip
  d_inputs, d_constants = lists.split(out, b, len(constants))
  d_constants = [
    jnp.sum(d, axis=0).astype(x.dtype) for d, x in zip(d_constants, constants)
  ]
  return d_first, d_inputs, d_constants


def _prepare(driver, walk, inputs, constants):
  """What chunks know without the state, stacked, and the tree of one."""
  one = [x[0] for x in inputs]
  local = driver.parallel(
    walk.prepare, inputs, constants,
    walk.shapes(walk.prepare, one, constants), name="chunk_scan_prepare",
    **_options(walk),
  )  # fmt: skip
  return local, walk.local_tree(one, constants)


def _options(walk):
  return dict(interpret=walk.interpret, blocks=walk.value_blocks)


_WHOLE = _Form(_forward, _backward)
_SPLIT = _Form(_forward_split, _backward_split)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _scan(form, platform, segments, walk, state, inputs, constants):
  call = _batched(partial(form.forward, platform, walk, 0))
  new, outputs, _ = call(state, inputs, constants)
  return new, outputs


def _scan_fwd(form, platform, segments, walk, state, inputs, constants):
  every = inputs[0].shape[0] // segments if segments > 1 else 1
  call = _batched(partial(form.forward, platform, walk, every))
  new, outputs, kept = call(state, inputs, constants)
  return (new, outputs), (kept, inputs, constants)


def _scan_bwd(form, platform, segments, walk, saved, grads):
  kept, inputs, constants = saved
  d_state, d_outputs = grads
  backward = _batched(partial(form.backward, platform, walk))
  if segments == 1:
    return backward(kept, inputs, constants, d_state, d_outputs)
  cut = lambda xs: [x.reshape((segments, -1) + x.shape[1:]) for x in xs]
  forward = _batched(partial(form.forward, platform, walk, 1))

  def body(carry, part):
    d_state, total = carry
    start, inputs, d_outputs = part
    starts = forward(start, inputs, constants)[2]
    d_state, d_inputs, d_constants = backward(
      starts, inputs, constants, d_state, d_outputs
    )
    total = [t + d.astype(t.dtype) for t, d in zip(total, d_constants)]
    return (d_state, total), d_inputs

  zeros = [jnp.zeros(x.shape, jnp.float32) for x in constants]
  (d_state, total), d_inputs = jax.lax.scan(
    body,
    (d_state, zeros),
    (kept, cut(inputs), cut(d_outputs)),
    reverse=True,
  )
  d_inputs = [d.reshape(x.shape) for d, x in zip(d_inputs, inputs)]
  d_constants = [t.astype(x.dtype) for t, x in zip(total, constants)]
  return d_state, d_inputs, d_constants


_scan.defvjp(_scan_fwd, _scan_bwd)
