"""Ops over [B, T, H, …] arrays: the layout that other code bases hold."""

from collections.abc import Callable
import functools

import jax


def batched(op: Callable) -> Callable:
  """Maps an op of one sequence and one head over batch and heads.

  The batched op takes

    states     [B, H, ...]       (and None for a stateless op's)
    tensors    [B, T, H, ...]    positional after the state, and gates
    reset, mask  bool [B, T]     shared by the heads
    fresh      [H, ...]          shared by the batch

  and returns (states [B, H, ...], outputs [B, T, H, ...]).

  >>> state, o = memzoo.ops.batched(memzoo.ops.delta_rule)(
  ...     state, q, k, v, beta=beta, log_decay=log_decay, reset=reset)

  Args:
    op: an op of `memzoo.ops` that takes (state, *tensors, **gates).
  """

  @functools.wraps(op)
  def call(state, *tensors, reset=None, mask=None, fresh=None, **kwargs):
    gates = {k: v for k, v in kwargs.items() if hasattr(v, "ndim")}
    static = {k: v for k, v in kwargs.items() if k not in gates}

    def one(state, tensors, gates, reset, mask, fresh):
      return op(
        state, *tensors, **gates, reset=reset, mask=mask, fresh=fresh, **static
      )

    heads = jax.vmap(one, in_axes=(0, 1, 1, None, None, 0), out_axes=(0, 1))
    both = jax.vmap(heads, in_axes=(0, 0, 0, 0, 0, None))
    return both(state, tensors, gates, reset, mask, fresh)

  return call
