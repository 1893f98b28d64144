"""Meshes, sharding by path names, and the few things several hosts agree on.

A mesh is written as text, `data:4,fsdp:2`. The batch is split over both axes;
parameters and the optimiser's moments are split over `fsdp` by rules on their
path names. XLA places the collectives, so that a step on eight devices is the
step on one, up to the order of its sums.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import re
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

AXES = ("data", "fsdp")

Spec = P | Callable[[tuple[int, ...], Mesh], P]
Rules = Sequence[tuple[str, Spec]]


def largest(axis: str, first: int = 0) -> Callable[..., P]:
  """A rule that splits a leaf's largest dimension over the mesh axis `axis`.

  Of the dimensions from `first` on that the axis divides, that is; the first
  of equals. A leaf of fewer than two such dimensions, or with none that
  divides, is replicated.
  """

  def spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    size = mesh.shape.get(axis, 1)
    fits = [i for i, n in enumerate(shape) if i >= first and n and not n % size]
    if size == 1 or len(shape) - first < 2 or not fits:
      return P()
    at = max(fits, key=lambda i: (shape[i], -i))
    return P(*(axis if i == at else None for i in range(at + 1)))

  return spec


#: Path names of leaves that hold all layers of a stack, on their first axis.
STACKED = re.compile(r"(^|/)blocks/\d+/")

#: The first rule whose pattern is found in a leaf's path name decides.
RULES: Rules = (
  (r"(^|/)(bias|scale|norm)(/|$)", P()),
  (STACKED.pattern, largest("fsdp", first=1)),
  (r"", largest("fsdp")),
)


def parse_mesh(text: str) -> dict[str, int]:
  """Reads `data:4,fsdp:2` into `{'data': 4, 'fsdp': 2}`; '' into `{}`.

  Raises:
    ValueError: on an unknown or repeated axis, or a size that is no positive
      whole number.
  """
  axes: dict[str, int] = {}
  for part in filter(None, (p.strip() for p in text.split(","))):
    name, _, size = (p.strip() for p in part.partition(":"))
    if name not in AXES:
      raise ValueError(
        f"mesh {text!r}: unknown axis {name!r}; known: {', '.join(AXES)}"
      )
    if name in axes:
      raise ValueError(f"mesh {text!r}: axis {name!r} is given twice")
    if not (size.isascii() and size.isdigit() and int(size) > 0):
      raise ValueError(
        f"mesh {text!r}: axis {name!r} needs a positive whole number, as in "
        f"'data:4,fsdp:2', got {size!r}"
      )
    axes[name] = int(size)
  return axes


def make_mesh(
  axes: str | Mapping[str, int] = "",
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """The mesh of `axes` over `devices`.

  Args:
    axes: text for `parse_mesh`, or axis sizes. Empty: every device on `data`.
    devices: all devices of all processes by default. One process may use
      fewer than there are: the first ones.

  Raises:
    ValueError: where there are fewer devices than the mesh needs, or where
      several processes would leave some out.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = parse_mesh(axes) if isinstance(axes, str) else dict(axes)
  sizes = sizes or {"data": len(devices)}
  shape = tuple(sizes.get(a, 1) for a in AXES)
  want = math.prod(shape)
  text = ",".join(f"{n}:{s}" for n, s in sizes.items())
  if want > len(devices):
    raise ValueError(
      f"mesh {text!r} needs {want} devices, and {len(devices)} are here"
    )
  if want < len(devices) and jax.process_count() > 1:
    raise ValueError(
      f"mesh {text!r} takes {want} of the {len(devices)} devices of "
      f"{jax.process_count()} processes; it must take them all"
    )
  return jax.make_mesh(
    shape,
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
    devices=devices[:want],
  )


def path_name(path) -> str:
  """A key path of `jax.tree_util` as 'layers/0/kernel'."""
  names = []
  for key in path:
    for attribute in ("key", "name", "idx"):
      if hasattr(key, attribute):
        names.append(str(getattr(key, attribute)))
        break
    else:
      names.append(str(key))
  return "/".join(names)


def named_leaves(tree) -> dict[str, Any]:
  """The leaves of `tree` by path name, in the order of `jax.tree.leaves`.

  Raises:
    ValueError: where two leaves would have one name.
  """
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = path_name(path)
    if name in leaves:
      raise ValueError(f"two leaves of the tree have the path name {name!r}")
    leaves[name] = leaf
  return leaves


def map_named(fn: Callable[[str, Any], Any], tree):
  """`jax.tree.map` whose function gets each leaf's path name too."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: fn(path_name(path), leaf), tree
  )


def shardings(tree, mesh: Mesh, rules: Rules = RULES):
  """Where each leaf of `tree` lives: a tree of `NamedSharding`.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s.
    mesh: the devices.
    rules: (pattern, spec) pairs; the first pattern that `re.search` finds in a
      leaf's path name decides, and a leaf that none matches is replicated. A
      spec is a `PartitionSpec`, or a function of (shape, mesh) that makes one.

  Raises:
    ValueError: where a spec does not fit a leaf, with the leaf's name.
  """

  def place(name, leaf):
    for pattern, spec in rules:
      if re.search(pattern, name):
        spec = spec if isinstance(spec, P) else spec(leaf.shape, mesh)
        break
    else:
      spec = P()
    shape = tuple(leaf.shape)
    try:
      sharding = NamedSharding(mesh, spec)
      fits = len(spec) <= len(shape) and sharding.shard_shape(shape)
    except ValueError:  # an unknown axis, or one that does not divide
      fits = None
    if fits in (None, False):
      raise ValueError(
        f"{name!r} of shape {shape} cannot be split as {spec} over the mesh "
        f"{dict(mesh.shape)}"
      )
    return sharding

  return map_named(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device of `mesh` holds the whole array."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int | None = 0) -> NamedSharding:
  """Rows split over all devices of `mesh`; `axis` is where an array has them.

  None, for an array without rows, replicates it.
  """
  if axis is None:
    return replicated(mesh)
  return NamedSharding(mesh, P(*(None,) * axis, AXES))


def put(tree, placement, *, copy: bool = False):
  """Places `tree`, of which every process holds the same value, on the mesh.

  Args:
    tree: host or device arrays, whole in every process.
    placement: one sharding, or a tree of them.
    copy: never alias the arrays of `tree`, so that the result can be donated.

  Returns:
    The tree of global arrays.
  """
  if isinstance(placement, NamedSharding):
    placement = jax.tree.map(lambda _: placement, tree)

  def place(leaf, sharding):
    if jax.process_count() == 1:
      return jax.device_put(leaf, sharding, may_alias=False if copy else None)
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      data = place(jax.random.key_data(leaf), sharding)
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.array(leaf)
    return jax.make_array_from_callback(
      host.shape, sharding, lambda index: host[index]
    )

  return jax.tree.map(place, tree, placement)


def initialize(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> None:
  """Joins this process to the others, before any device is touched.

  Args:
    coordinator: 'host:port' of process 0. None on clusters that JAX knows
      (Cloud TPU, Slurm, Open MPI, Kubernetes), which tell it themselves.
    processes: how many there are.
    process: which one this is, from 0.

  Raises:
    ValueError: where some of the three are given and some are not, or they
      contradict each other.
    RuntimeError: where the others could not be reached.
  """
  given = {
    "coordinator": coordinator, "processes": processes, "process": process,
  }  # fmt: skip
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < len(given):
    raise ValueError(
      f"distributed: {', '.join(missing)} missing; give coordinator, processes"
      " and process together, or none of them on a cluster that JAX knows"
    )
  if not missing and not 0 <= process < processes:
    raise ValueError(
      f"distributed: process {process} is not among the {processes} processes,"
      f" 0 to {processes - 1}"
    )
  try:
    jax.distributed.initialize(coordinator, processes, process)
  except (RuntimeError, ValueError) as error:
    raise RuntimeError(
      f"distributed: could not join {coordinator or 'the cluster'} as process "
      f"{process} of {processes}: {str(error).splitlines()[0]}"
    ) from error


def agree(value: int, stop: bool) -> tuple[int, bool]:
  """One answer for all processes: process 0's `value`, and whether any stops.

  A collective where there are several processes: each must call it.
  """
  if jax.process_count() == 1:
    return value, stop
  rows = multihost_utils.process_allgather(np.array([value, stop], np.int32))
  return int(rows[0, 0]), bool(rows[:, 1].any())
