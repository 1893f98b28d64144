"""Ops over [T, H, …] and [B, T, H, …] arrays."""

from collections.abc import Callable
import functools

import jax
from jax.sharding import Mesh, PartitionSpec as P


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


def batched(
  op: Callable,
  *,
  mesh: Mesh | None = None,
  batch: str | tuple[str, ...] | None = None,
  heads: str | tuple[str, ...] | None = None,
) -> Callable:
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

  With a mesh, each device computes its own rows and heads (`jax.shard_map`).
  XLA does so by itself, except with kernels, which it cannot cut.

  Args:
    op: an op of `memzoo.ops` that takes (state, *tensors, **gates).
    mesh: of devices, with automatic axes (`jax.sharding.Mesh`), or None.
    batch: the axis or axes of the mesh that B is cut over.
    heads: those that H is cut over.
  """
  inner = _heads(op)

  @functools.wraps(op)
  def call(state, *tensors, reset=None, mask=None, fresh=None, **kwargs):
    gates = {k: v for k, v in kwargs.items() if hasattr(v, "ndim")}
    static = {k: v for k, v in kwargs.items() if k not in gates}

    def one(state, tensors, gates, reset, mask, fresh):
      return inner(
        state, *tensors, **gates, reset=reset, mask=mask, fresh=fresh, **static
      )

    whole = lambda s, x, g, r, m, f: jax.vmap(lambda *a: one(*a, f))(
      s, x, g, r, m
    )
    args = state, tensors, gates, reset, mask, fresh
    if mesh is None:
      return whole(*args)
    wide = P(batch, None, heads)
    specs = P(batch, heads), wide, wide, P(batch), P(batch), P(heads)
    return jax.shard_map(
      whole,
      mesh=mesh,
      in_specs=specs,
      out_specs=(P(batch, heads), wide),
      check_vma=False,
    )(*args)

  return call


_heads = heads  # `batched` has an argument of that name
