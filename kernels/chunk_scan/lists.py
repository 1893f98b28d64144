"""What the kernels of both kinds of device do with lists of arrays."""

from typing import NamedTuple

import jax


class Options(NamedTuple):
  """How a kernel runs.

  Attributes:
    name: of the kernel, in traces.
    interpret: run by Pallas' interpreter.
    blocks: into how many parts the value axis is cut (GPU).
    values: which of (carry, stacked, fixed, outs) have it; none by default.
  """

  name: str
  interpret: bool = False
  blocks: int = 1
  values: tuple[tuple[bool, ...], ...] | None = None


def split(items, *sizes):
  """Consecutive lists of the sizes."""
  parts, at = [], 0
  for size in sizes:
    parts.append(list(items[at : at + size]))
    at += size
  return parts


def like(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def stack(x, count: int):
  return jax.ShapeDtypeStruct((count, *x.shape), x.dtype)
