"""From a cell's step and arrays of one sequence to the kernels, and back."""

from functools import partial
import math

import jax
from jax.custom_batching import custom_vmap
import jax.numpy as jnp

from memzoo.core import dispatch
from memzoo.kernels.cell_scan import loop, pallas_gpu, pallas_tpu
from memzoo.kernels.cell_scan.rows import Rows, Spec
from memzoo.kernels.interpret import interpreting

_DEVICES = dict(tpu=pallas_tpu, gpu=pallas_gpu)


def cell_scan(
  step,
  state,
  inputs,
  constants=(),
  *,
  reset=None,
  mask=None,
  fresh=None,
  inert: bool = False,
  segments: int | None = None,
):
  """Runs a cell's step over one sequence, in one kernel.

  `jax.vmap` sets sequences side by side: they are rows of one matrix product
  with each weight. A mapped weight (heads) makes one more axis of the grid.
  First derivatives in reverse mode alone.

  The step sees a constant of two axes as a `Weight`: it enters products with a
  vector or with slots [M, N], `x @ w` or `product(x, w)`, and may be cast and
  transposed before. They are taken in the dtype of their operands and summed in
  float32; float32 keeps its digits. Everything else in the step is elementwise,
  or a sum or softmax along one axis with `keepdims=True`; on a GPU nothing is
  cut, joined or accumulated along an axis.

  Slots meet vectors that are written as [1, N] (what all slots get) and [M, 1]
  (a number for each), since a TPU does not move the axis of rows.

  Args:
    step: (state, x, constants) -> (state, output), pytrees of arrays of one
      axis or more, for one sequence and one step. It closes over no array, and
      the same function serves every call, so that kernels are compiled once.
    state: a pytree of floats [...], each: vectors [N], slots [M, N].
    inputs: a pytree of floats [T, ...], each.
    constants: a pytree of floats: weights [N, M]; with one axis, or three and
      more, what enters elementwise.
    reset: bool [T]; True: the state is `fresh` before step t.
    mask: bool [T]; False: no step t; the outputs there are zero.
    fresh: a pytree like the state, zeros by default.
    inert: zeros may stand behind the last entry of every vector and weight,
      and of every last axis: the step gives zeros there, and what stands
      before does not change. A GPU's kernel takes powers of two, and pads with
      it; other axes, as of slots, are never padded.
    segments: of how many the backward keeps the first state alone, and
      computes the other states again; None for 1 where the states of all
      steps need no more memory than the inputs, else about √T.

  Returns:
    (state, outputs [T, ...]).

  Raises:
    ValueError: on a step whose new state is not like the old, and on leaves
      with other axes.
    NotImplementedError: where no kernel serves the call: on a platform
      without one, on weights that do not fit on the chip, and on what the
      kernel's device does not take.
  """
  name = platform()
  _check("state", state, 1)
  _check("inputs", inputs, 2)
  _check("constants", constants, 1)
  _check("fresh", fresh, 1)
  leaves = jax.tree.leaves
  trees = [*map(jax.tree.structure, (state, inputs, constants))]
  parts = [leaves(state), leaves(inputs), leaves(constants), leaves(fresh)]
  if not parts[0] or not parts[1] or not parts[1][0].shape[0]:
    raise NotImplementedError("the kernel takes a state and one step or more")
  length = parts[1][0].shape[0]
  if segments is None:
    states = sum(length * x.nbytes for x in parts[0])
    small = states <= sum(x.nbytes for x in parts[1])
    segments = 1 if small else max(1, math.isqrt(length))
  segments = min(segments, length)
  spec = lambda xs, axis: tuple(Spec(x.shape[axis:], x.dtype) for x in xs)
  make = lambda: Rows(
    step,
    tuple(trees),
    spec(parts[0], 0),
    spec(parts[1], 1),
    spec(parts[2], 0),
    fresh=fresh is not None and reset is not None,
    platform=name,
    interpret=interpreting(),
  )
  rows = make()
  shapes = [y.shape for y in rows.plan.outputs]
  if name == "gpu":
    parts = [
      [_padded(x, n == 1, n == 2 and x.ndim == 2, inert) for x in xs]
      for n, xs in enumerate(parts)
    ]
    rows = make()

  # Whole segments, on a TPU of whole blocks of steps.
  block = 1
  if name == "tpu":
    block = min(pallas_tpu.STEPS, 1 << (length - 1).bit_length())
  segments = min(segments, -(-length // block))
  pad = -length % (segments * block)
  if pad and mask is None:
    mask = jnp.ones((length,), bool)
  flags = []
  if reset is not None or mask is not None:
    code = jnp.ones((length,), jnp.float32)
    code += 0.0 if reset is None else reset.astype(jnp.float32)
    code *= 1.0 if mask is None else mask.astype(jnp.float32)
    flags = [code.reshape(-1, *(1 for _ in range(n))) for n in rows.plan.ranks]
  if reset is None:
    parts[3] = []

  def over(x):
    return jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))[None, :, None]

  weights = [x[None] for x in parts[2] if x.ndim == 2]
  vectors = [x for x in parts[2] if x.ndim != 2] + parts[3]
  _DEVICES[name].fit(weights)
  new, out = _scan(
    rows,
    segments,
    weights,
    [x[None, None] for x in parts[0]],
    [over(x) for x in parts[1]],
    [over(x) for x in flags],
    [x[None, None] for x in vectors],
  )
  cut = lambda shape: tuple(slice(n) for n in shape)
  new = [x[0, 0, *cut(y.shape)] for x, y in zip(new, leaves(state))]
  out = [x[0, :length, 0, *cut(shape)] for x, shape in zip(out, shapes)]
  return trees[0].unflatten(new), rows.plan.tree.unflatten(out)


def platform() -> str:
  """'tpu' or 'gpu': whose kernels serve; `NotImplementedError` elsewhere."""
  name = dispatch.current_platform()
  if name in _DEVICES:
    return name
  if interpreting():
    return "tpu"
  raise NotImplementedError(
    f"no kernel for the platform {name!r}; kernels run on "
    + " and ".join(sorted(_DEVICES))
    + ", and anywhere inside memzoo.kernels.interpret()"
  )


def _check(what, tree, least):
  for x in jax.tree.leaves(tree):
    if x.ndim < least:
      axes = "one axis" if least == 1 else "two axes"
      raise ValueError(
        f"cell_scan: {what} must be arrays of {axes} or more, got {x.dtype} "
        f"{x.shape}"
      )
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise NotImplementedError(
        f"{what} must be floats in a kernel, got {x.dtype} {x.shape}"
      )


def _padded(x, timed: bool, weight: bool, inert: bool):
  """x with its axes, but for that of time, as a GPU's kernel takes them."""
  pads = [(0, 0)] * timed
  for axis in range(timed, x.ndim):
    n, least = x.shape[axis], 16 if weight else 1
    wide = max(least, 1 << max(n - 1, 0).bit_length())
    padded = inert and (weight or (axis == x.ndim - 1 and n > 1))
    if padded:
      wide = max(wide, 16)
    if n != wide and not padded:
      raise NotImplementedError(
        "a GPU's kernel takes axes that are a power of two wide, those of "
        f"weights 16 or more, got {x.shape[timed:]}; it pads weights and last "
        "axes where the step is `inert`"
      )
    pads.append((0, wide - n))
  return jnp.pad(x, pads)


def _folding(call):
  """`call` on (weights, held, over), natively batched under `jax.vmap`.

  Weights are [H, N, M], what is held [H, B, ...] and what goes over time
  [H, T, B, ...]; the results are (held, over) too. A mapped axis of weights
  goes into H, one of rows alone into B.
  """
  mapped = custom_vmap(call)

  @mapped.def_vmap
  def rule(size, batched, weights, held, over):
    heads = any(jax.tree.leaves(batched[0]))

    def merge(at, x, is_batched):
      if not is_batched:
        x = jnp.broadcast_to(x, (size,) + x.shape)
      x = jnp.moveaxis(x, 0, at)
      return x.reshape(x.shape[:at] + (-1,) + x.shape[at + 2 :])

    def part(at, x):
      x = x.reshape(x.shape[:at] + (size, -1) + x.shape[at + 1 :])
      return jnp.moveaxis(x, at, 0)

    first, second = (0, 0) if heads else (1, 2)
    if heads:
      weights = jax.tree.map(partial(merge, 0), weights, batched[0])
    held, over = mapped(
      weights,
      jax.tree.map(partial(merge, first), held, batched[1]),
      jax.tree.map(partial(merge, second), over, batched[2]),
    )
    out = (
      jax.tree.map(partial(part, first), held),
      jax.tree.map(partial(part, second), over),
    )
    return out, jax.tree.map(lambda _: True, out)

  return mapped


def _whole(device, rows, call, zeros, weights, held, over):
  """`call` on whole blocks of rows.

  The rows that are added repeat the last one, so that what is finite stays so;
  with `zeros` they are zero in the last lists, which are of gradients.
  """
  count = over[0][0].shape[2]
  pad = -count % device.block_rows(rows, count)
  if not pad:
    return call(weights, held, over)

  def more(x, at, mode):
    pads = [(0, pad if n == at else 0) for n in range(x.ndim)]
    return jnp.pad(x, pads, mode=mode)

  def full(lists, at):
    modes = ["edge"] * len(lists)
    if zeros:
      modes[-1] = "constant"
    return [[more(x, at, mode) for x in xs] for xs, mode in zip(lists, modes)]

  held, over = call(weights, full(held, 1), full(over, 2))
  return (
    jax.tree.map(lambda x: x[:, :count], held),
    jax.tree.map(lambda x: x[:, :, :count], over),
  )


def _forward(rows: Rows, keep: bool, weights, state, inputs, flags, vectors):
  """`loop.forward`, for any number of rows, under any `jax.vmap`: (state,
  outputs, kept)."""
  device = _DEVICES[rows.platform]
  call = partial(loop.forward, device, rows, keep)
  (new,), (outputs, kept) = _folding(
    partial(_whole, device, rows, call, False)
  )(weights, [state, vectors], [inputs, flags])
  return new, outputs, kept


def _backward(
  rows: Rows, weights, kept, inputs, flags, vectors, d_state, d_outputs
):  # fmt: skip
  """`loop.backward`, for any number of rows, under any `jax.vmap`: the
  gradients of weights (in float32), state, inputs and vectors."""
  device = _DEVICES[rows.platform]
  call = partial(loop.backward, device, rows)
  held, over = _folding(partial(_whole, device, rows, call, True))(
    weights, [vectors, d_state], [kept, inputs, flags, d_outputs]
  )
  (d_state, d_vectors), (d_inputs, operands, products) = held, over
  totals = [jnp.zeros(w.shape, jnp.float32) for w in weights]
  flat = lambda x: x.reshape(x.shape[0], -1, x.shape[-1])
  for tap, g in zip(rows.plan.taps, products):
    total = jnp.einsum(
      "hbn,hbm->hmn" if tap.flipped else "hbn,hbm->hnm",
      flat(operands[tap.operand]),
      flat(g),
      precision=jax.lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
    )
    totals[tap.weight] += total
  return totals, d_state, d_inputs, d_vectors


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(rows, segments, weights, state, inputs, flags, vectors):
  new, outputs, _ = _forward(
    rows, False, weights, state, inputs, flags, vectors
  )
  return new, outputs


def _scan_fwd(rows, segments, weights, state, inputs, flags, vectors):
  saved = weights, inputs, flags, vectors
  if segments == 1:
    new, outputs, kept = _forward(
      rows, True, weights, state, inputs, flags, vectors
    )
    return (new, outputs), (kept, *saved)

  def body(state, part):
    new, outputs, _ = _forward(rows, False, weights, state, *part, vectors)
    return new, (outputs, state)

  parts = _segments(segments, inputs), _segments(segments, flags)
  new, (outputs, starts) = jax.lax.scan(body, state, parts)
  return (new, _joined(outputs)), (starts, *saved)


def _scan_bwd(rows, segments, saved, grads):
  kept, weights, inputs, flags, vectors = saved
  d_state, d_outputs = grads
  if segments == 1:
    d_weights, d_state, d_inputs, d_vectors = _backward(
      rows, weights, kept, inputs, flags, vectors, d_state, d_outputs
    )
  else:

    def body(carry, part):
      d_state, *totals = carry
      start, xs, flag, d_outputs = part
      kept = _forward(rows, True, weights, start, xs, flag, vectors)[2]
      d_weights, d_state, d_xs, d_vectors = _backward(
        rows, weights, kept, xs, flag, vectors, d_state, d_outputs
      )
      totals = jax.tree.map(jnp.add, totals, [d_weights, d_vectors])
      return (d_state, *totals), d_xs

    zeros = [
      [jnp.zeros(x.shape, jnp.float32) for x in xs] for xs in (weights, vectors)
    ]
    parts = [_segments(segments, xs) for xs in (inputs, flags, d_outputs)]
    (d_state, d_weights, d_vectors), d_inputs = jax.lax.scan(
      body, (d_state, *zeros), (kept, *parts), reverse=True
    )
    d_inputs = _joined(d_inputs)
  cast = lambda xs, like: [x.astype(y.dtype) for x, y in zip(xs, like)]
  return (
    cast(d_weights, weights), d_state, d_inputs, None, cast(d_vectors, vectors)
  )  # fmt: skip


_scan.defvjp(_scan_fwd, _scan_bwd)


def _segments(count, xs):
  """[H, T, B, N] as [count, H, T / count, B, N], for each."""
  cut = lambda x: x.reshape(x.shape[:1] + (count, -1) + x.shape[2:])
  return [jnp.moveaxis(cut(x), 1, 0) for x in xs]


def _joined(xs):
  """What `_segments` cut."""
  xs = [jnp.moveaxis(x, 0, 1) for x in xs]
  return [x.reshape(x.shape[:1] + (-1,) + x.shape[3:]) for x in xs]
