"""Ops over [T, H, …] and [B, T, H, …] arrays."""

from collections.abc import Callable
import functools

import jax


def heads(op: Callable) -> Callable:
  """Maps an op of one sequence and one head over heads.

  The mapped op takes states [H, ...], tensors and gates [T, H, ...], fresh
  [H, ...], and reset and mask, bool [T], which the heads share; it returns
  (states [H, ...], outputs [T, H, ...]).

  Args:
    op: an op of `memzoo.ops` that takes (state, *tensors, **gates).
  """

  @functools.wraps(op)
  def call(state, *tensors, reset=None, mask=None, fresh=None, **kwargs):
    gates = {k: v for k, v in kwargs.items() if hasattr(v, "ndim")}
    static = {k: v for k, v in kwargs.items() if k not in gates}

    def one(state, tensors, gates, fresh):
      return op(
        state, *tensors, **gates, reset=reset, mask=mask, fresh=fresh, **static
      )

    mapped = jax.vmap(one, in_axes=(0, 1, 1, 0), out_axes=(0, 1))
    return mapped(state, tensors, gates, fresh)

  return call


def batched(op: Callable) -> Callable:
  """Maps an op of one sequence and one head over batch and heads: the layout
  that other code bases hold.

  The mapped op takes

    states       [B, H, ...]
    tensors      [B, T, H, ...]    positional after the state, and gates
    reset, mask  bool [B, T]       shared by the heads
    fresh        [H, ...]          shared by the batch

  and returns (states [B, H, ...], outputs [B, T, H, ...]).

  >>> state, o = memzoo.ops.batched(memzoo.ops.delta_rule)(
  ...     state, q, k, v, beta=beta, log_decay=log_decay, reset=reset)

  Args:
    op: an op of `memzoo.ops` that takes (state, *tensors, **gates).
  """
  inner = heads(op)

  @functools.wraps(op)
  def call(state, *tensors, reset=None, mask=None, fresh=None, **kwargs):
    gates = {k: v for k, v in kwargs.items() if hasattr(v, "ndim")}
    static = {k: v for k, v in kwargs.items() if k not in gates}

    def one(state, tensors, gates, reset, mask):
      return inner(
        state, *tensors, **gates, reset=reset, mask=mask, fresh=fresh, **static
      )

    return jax.vmap(one)(state, tensors, gates, reset, mask)

  return call
