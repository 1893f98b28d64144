"""The step of a recurrence that has no faster form, over a sequence.

A cell writes its step once: elementwise but for products with weights, so that
the same function is a plain loop's and a kernel's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.kernels.cell_scan import cell_scan
from memzoo.ops import arguments


class Inputs(NamedTuple):
  xs: Any
  reset: jax.Array | None
  mask: jax.Array | None


def step_loop(
  step, state, xs, constants, *, dtype, reset, mask, implementation
):  # fmt: skip
  """Runs `step` over one sequence.

  Args:
    step: (state, x, constants) -> (state, y), a value (a function of a module,
      or a NamedTuple that is called), as `memzoo.kernels.cell_scan` takes it,
      which gives zeros where zeros stand.
    state: a pytree of float32 [...]; zero after a reset.
    xs: a pytree of float32 [T, ...], each.
    constants: a pytree of weights [N, M], which meet vectors in
      `memzoo.kernels.cell_scan.product`, and of vectors.
    dtype: of the weights in the kernel.
    reset: bool [T] or None.
    mask: bool [T] or None.
    implementation: 'scan' or 'pallas'.

  Returns:
    (state, ys [T, ...]).
  """
  if implementation == "pallas":
    constants = cast(constants, dtype)
    return cell_scan(
      step, state, xs, constants, reset=reset, mask=mask, inert=True
    )
  constants = cast(constants)
  return arguments.scan_steps(
    lambda state, i: step(state, i.xs, constants),
    state,
    Inputs(xs, reset, mask),
    None,
  )


def cast(constants, dtype=jnp.float32):
  """Weights in `dtype`, vectors in float32."""
  return jax.tree.map(
    lambda x: x.astype(dtype if x.ndim == 2 else jnp.float32), constants
  )
