"""The kernels' bodies: loops over time on blocks of R rows.

A program of the grid has one set of weights (a head) and R rows. On a GPU it
has the whole sequence, its state in registers. On a TPU the grid goes on over
blocks of U steps, and the state lies in the block of the final state, which
stays in VMEM until the last of them.
"""

import jax
import jax.numpy as jnp

from memzoo.kernels.cell_scan.rows import Rows


def forward(device, rows: Rows, keep, weights, state, inputs, flags, vectors):
  """Values, and the state before every step where `keep`.

  Args:
    device: the module of the device.
    rows: what a step is.
    keep: whether states are kept.
    weights: [H, N, M], a list.
    state: [H, B, N], a list; B a multiple of R.
    inputs: [H, T, B, N], a list; T a multiple of U.
    flags: [H, T, B, 1], a list of one or none.
    vectors: [H, B, N], a list.

  Returns:
    (state, outputs [H, T, B, N], kept [H, T, B, N] or []), lists.
  """
  grid = device.Grid.of(rows, weights, inputs)
  lists = weights, state, inputs, flags, vectors
  sizes = [*map(len, lists), len(state), len(rows.plan.outputs)]

  def kernel(*refs):
    w, start, xs, flag, held, final, out, kept = _split(refs, *sizes)
    held = _load(held)

    def body(t, now):
      for k, s in zip(kept, now):
        k[t] = s
      now, ys = rows.tick(_load(w), list(now), _at(xs, t), _at(flag, t), held)
      for o, y in zip(out, ys):
        o[t] = y
      return tuple(now)

    start = device.carried(start, final)
    now = jax.lax.fori_loop(0, grid.steps, body, tuple(_load(start)))
    _store(final, now)

  outs = [*map(_like, state)]
  outs += [_over(inputs[0], y) for y in rows.plan.outputs]
  if keep:
    outs += [_over(inputs[0], s) for s in rows.state]
  out = device.call(
    grid, kernel, "cell_scan_forward", [x for xs in lists for x in xs], outs,
    weights=len(weights), back=False, interpret=rows.interpret,
  )  # fmt: skip
  return _split(out, *sizes[5:])


def backward(
  device, rows: Rows, weights, kept, inputs, flags, vectors, d_state, d_outputs
):  # fmt: skip
  """Gradients, from the state before every step.

  Args:
    device, rows, weights, inputs, flags, vectors: as for `forward`.
    kept: [H, T, B, N], a list.
    d_state: [H, B, N], of the final state.
    d_outputs: [H, T, B, N].

  Returns:
    (d_state, d_inputs, d_vectors in float32, operands [H, T, B, N], d_products
    [H, T, B, M]), lists: what entered the products with weights, and their
    gradients.
  """
  grid = device.Grid.of(rows, weights, inputs)
  lists = weights, kept, inputs, flags, vectors, d_state, d_outputs
  plan = rows.plan
  sizes = [*map(len, lists), len(d_state), len(inputs), len(vectors)]
  sizes.append(len(plan.operands))

  def kernel(*refs):
    w, kept, xs, flag, held, d_end, d_out, *grads = _split(refs, *sizes)
    d_first, d_in, d_held, operands, d_products = grads
    held = _load(held)

    def body(i, carry):
      t = grid.steps - 1 - i
      d_now, total = carry
      d_now, d_xs, d_vectors, *products = rows.pull(
        _load(w), _at(kept, t), _at(xs, t), _at(flag, t), held, list(d_now),
        _at(d_out, t),
      )  # fmt: skip
      for refs, values in zip((d_in, operands, d_products), (d_xs, *products)):
        for o, x in zip(refs, values):
          o[t] = x.astype(o.dtype)
      total = [a + x.astype(a.dtype) for a, x in zip(total, d_vectors)]
      return tuple(d_now), tuple(total)

    d_end = device.carried(d_end, d_first)
    total = device.zeros(d_held)
    carry = tuple(_load(d_end)), tuple(total)
    d_now, total = jax.lax.fori_loop(0, grid.steps, body, carry)
    _store(d_first, d_now)
    _store(d_held, total)

  outs = [
    *map(_like, d_state),
    *map(_like, inputs),
    *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in vectors),
    *(_over(inputs[0], x) for x in plan.operands),
    *(
      jax.ShapeDtypeStruct(inputs[0].shape[:3] + (tap.width,), tap.dtype)
      for tap in plan.taps
    ),
  ]
  out = device.call(
    grid, kernel, "cell_scan_backward", [x for xs in lists for x in xs], outs,
    weights=len(weights), back=True, interpret=rows.interpret,
  )  # fmt: skip
  return _split(out, *sizes[7:])


def _split(items, *sizes):
  """Lists of these sizes, and one of what is left."""
  parts, at = [], 0
  for size in sizes:
    parts.append(list(items[at : at + size]))
    at += size
  return [*parts, list(items[at:])]


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
