"""The kernels' bodies: loops over time on blocks of R rows.

A program of the grid has one set of weights (a head) and R rows. On a GPU it
has the whole sequence, its state in registers. On a TPU the grid goes on over
blocks of U steps, and the state lies in the block of the final state, which
stays in VMEM until the last of them.

What a row holds has one axis or more: a vector [N], slots [M, N]. Lists of
arrays are of two kinds: those that are held, [H, B, ...], and those over time,
[H, T, B, ...].
"""

import jax
import jax.numpy as jnp

from memzoo.kernels.cell_scan.rows import Rows


def forward(device, rows: Rows, keep, weights, held, over):
  """Values, and the state before every step where `keep`.

  Args:
    device: the module of the device.
    rows: what a step is.
    keep: whether states are kept.
    weights: [H, N, M], a list.
    held: lists of [H, B, ...]: the state and the vectors; B a multiple of R.
    over: lists of [H, T, B, ...]: the inputs and the flags ([H, T, B, 1, ...],
      one for each of `rows.plan.ranks`, or none); T a multiple of U.

  Returns:
    held: [state]; over: [outputs, kept], where `kept` may be empty.
  """
  state, inputs = held[0], over[0]
  grid = device.Grid.of(rows, weights, inputs)
  sizes = [*map(len, (weights, *held, *over)), len(state)]
  sizes.append(len(rows.plan.outputs))

  def kernel(*refs):
    w, start, vectors, xs, flags, final, out, kept = _split(refs, *sizes)
    vectors = _load(vectors)

    def body(t, now):
      for k, s in zip(kept, now):
        k[t] = s
      now, ys = rows.tick(
        _load(w), list(now), _at(xs, t), _at(flags, t), vectors
      )
      for o, y in zip(out, ys):
        o[t] = y
      return tuple(now)

    start = device.carried(start, final)
    now = jax.lax.fori_loop(0, grid.steps, body, tuple(_load(start)))
    _store(final, now)

  outs = [_over(inputs[0], y) for y in rows.plan.outputs]
  if keep:
    outs += [_over(inputs[0], s) for s in rows.state]
  out = device.call(
    grid, kernel, "cell_scan_forward", weights, _flat(held), _flat(over),
    [*map(_like, state)], outs, back=False, interpret=rows.interpret,
  )  # fmt: skip
  state, *parts = _split(out, *sizes[5:])
  return [state], parts


def backward(device, rows: Rows, weights, held, over):
  """Gradients, from the state before every step.

  Args:
    device, rows, weights: as for `forward`.
    held: lists of [H, B, ...]: the vectors, and d_state of the final state.
    over: lists of [H, T, B, ...]: the kept states, the inputs, the flags and
      d_outputs.

  Returns:
    held: [d_state, d_vectors in float32]; over: [d_inputs, operands,
    d_products]: what entered the products with weights, and their gradients.
  """
  (vectors, d_state), (_, inputs, *_), plan = held, over, rows.plan
  grid = device.Grid.of(rows, weights, inputs)
  sizes = [*map(len, (weights, *held, *over)), len(d_state), len(vectors)]
  sizes += [len(inputs), len(plan.operands)]

  def kernel(*refs):
    w, vectors, d_end, kept, xs, flags, d_out, *grads = _split(refs, *sizes)
    d_first, d_vectors, d_in, operands, d_products = grads
    vectors = _load(vectors)

    def body(i, carry):
      t = grid.steps - 1 - i
      d_now, total = carry
      d_now, d_xs, d_held, *products = rows.pull(
        _load(w), _at(kept, t), _at(xs, t), _at(flags, t), vectors,
        list(d_now), _at(d_out, t),
      )  # fmt: skip
      for refs, values in zip((d_in, operands, d_products), (d_xs, *products)):
        for o, x in zip(refs, values):
          o[t] = x.astype(o.dtype)
      total = [a + x.astype(a.dtype) for a, x in zip(total, d_held)]
      return tuple(d_now), tuple(total)

    d_end = device.carried(d_end, d_first)
    total = device.zeros(d_vectors)
    carry = tuple(_load(d_end)), tuple(total)
    d_now, total = jax.lax.fori_loop(0, grid.steps, body, carry)
    _store(d_first, d_now)
    _store(d_vectors, total)

  outs_held = [*map(_like, d_state)]
  outs_held += [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in vectors]
  outs_over = [
    *map(_like, inputs),
    *(_over(inputs[0], x) for x in plan.operands),
    *(_over(inputs[0], tap) for tap in plan.taps),
  ]
  out = device.call(
    grid, kernel, "cell_scan_backward", weights, _flat(held), _flat(over),
    outs_held, outs_over, back=True, interpret=rows.interpret,
  )  # fmt: skip
  parts = _split(out, *sizes[7:])
  return parts[:2], parts[2:]


def _split(items, *sizes):
  """Lists of these sizes, and one of what is left."""
  parts, at = [], 0
  for size in sizes:
    parts.append(list(items[at : at + size]))
    at += size
  return [*parts, list(items[at:])]


def _flat(lists):
  return [x for xs in lists for x in xs]


def _load(refs):
  return [ref[...] for ref in refs]


def _at(refs, t):
  return [ref[t] for ref in refs]


def _store(refs, values):
  for ref, x in zip(refs, values):
    ref[...] = x


def _like(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _over(x, spec):
  """The shape of a leaf of `spec` at every step of x [H, T, B, ...]."""
  return jax.ShapeDtypeStruct(x.shape[:3] + spec.shape, spec.dtype)
