"""Compilation for devices that the machine does not have.

The compilers of TPUs and GPUs run on any CPU. `get('tpu:v5e')` is such a
device; its `compile` says whether a function compiles for it, how long that
takes, how much memory the result needs and whether the device has it:

>>> x = jax.ShapeDtypeStruct((8, 128), "float32")
>>> targets.get("tpu:v5e").compile(fn, x)
Report(ok=True, seconds=0.9, ..., fits=True, message='')

Numbers are not computed. The compilers are packages of their own, which slow
every start of JAX down: `make aot-env` makes an environment that has them. Set
JAX_PLATFORMS=cpu there, so that JAX looks for no device.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import time
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from memzoo import parallel
from memzoo.core import dispatch

GIB = 2**30
_FLAT = {
  1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8",
  128: "8x16", 256: "16x16",
}  # fmt: skip
_CUBE = {
  1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4",
}  # fmt: skip
# Partitions × hosts × devices of a host.
_NODE = {n: f"1x1x{n}" for n in (1, 2, 4, 8)}


class Kind(NamedTuple):
  """A kind of device.

  Attributes:
    memory_bytes: what a program may use of the device's memory: on a TPU the
      limit that its compiler names, on a GPU what its driver leaves.
    layouts: count -> how the devices are wired by default.
    accelerator: what libtpu is told to expect; '' for a GPU.
  """

  memory_bytes: int
  layouts: dict[int, str]
  accelerator: str = ""


KINDS = {
  "tpu:v5e": Kind(int(15.75 * GIB), _FLAT, "v5litepod-4"),
  "tpu:v6e": Kind(int(31.24 * GIB), _FLAT, "v6e-4"),
  "tpu:v5p": Kind(int(95.73 * GIB), _CUBE, "v5p-8"),
  "cuda:h200": Kind(139 * GIB, _NODE),
}

# XLA's description of a GPU (GpuTargetConfigProto), from NVIDIA's figures of
# the Hopper architecture.
_H200 = f"""
gpu_device_info {{
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: {KINDS["cuda:h200"].memory_bytes}
  cuda_compute_capability {{
    major: 9
    minor: 0
    feature_extension: ACCELERATED_FEATURES
  }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA H200"
"""


class Report(NamedTuple):
  """What a compiler said; bytes are those of one device.

  Attributes:
    ok: whether the function compiled.
    seconds: of tracing, lowering and compiling; no compilation cache is used.
    argument_bytes: of the arguments.
    output_bytes: of the outputs, less those that take a donated argument's
      place.
    temp_bytes: of temporary arrays.
    code_bytes: of the program; None where the compiler does not say (CUDA).
    fits: whether the sum of these is within the device's memory; None where
      it failed for another reason.
    message: the compiler's own where it failed, else ''.

  All bytes are None where it failed.
  """

  ok: bool
  seconds: float
  argument_bytes: int | None = None
  output_bytes: int | None = None
  temp_bytes: int | None = None
  code_bytes: int | None = None
  fits: bool | None = None
  message: str = ""

  @property
  def total_bytes(self) -> int | None:
    """All that the device holds while the function runs."""
    return sum(x or 0 for x in self[2:6]) if self.ok else None


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices to compile for; `get` makes it.

  Attributes:
    name: as it was asked for.
    kind: of the device, a key of `KINDS`.
    layout: how many devices, and how they are wired: '2x2'.
  """

  name: str
  kind: str
  layout: str

  @property
  def platform(self) -> str:
    """'tpu' or 'gpu': whose forms are chosen."""
    return "gpu" if self.kind.startswith("cuda:") else "tpu"

  @property
  def memory_bytes(self) -> int:
    """What a program may use of one device's memory."""
    return KINDS[self.kind].memory_bytes

  @property
  def devices(self) -> list[jax.Device]:
    """Devices that programs can be compiled for, and nothing else.

    Raises:
      ImportError: where the compiler is not installed.
      ValueError: on a layout that the device does not come in.
    """
    missing = self.missing()
    if missing:
      raise ImportError(
        f"target {self.name!r} needs {' and '.join(missing)}, not installed "
        "here: `make aot-env` makes an environment that has what it needs"
      )
    try:
      return list(_topology(self.kind, self.layout))
    except jax.errors.JaxRuntimeError as error:
      raise ValueError(f"target {self.name!r}: {_message(error)}") from error

  def missing(self) -> list[str]:
    """The packages that the target needs and that are not installed."""
    if self.platform == "tpu":
      needed = {"libtpu": "libtpu"}
    else:
      needed = {
        "jax_plugins.xla_cuda13": "jax-cuda13-plugin",
        "nvidia.cu13": "nvidia-cuda-nvcc",
      }
    return [package for name, package in needed.items() if not _has(name)]

  def mesh(self, axes: str = "") -> jax.sharding.Mesh:
    """A mesh of the devices: `parallel.make_mesh`."""
    return parallel.make_mesh(axes, self.devices)

  @contextlib.contextmanager
  def lowering(
    self, mesh: jax.sharding.Mesh | None = None
  ) -> Iterator[jax.sharding.Mesh]:
    """What is traced and lowered in here is so for the target.

    Yields its mesh, which arguments have to be placed on:

    >>> with targets.get("cuda:h200").lowering() as mesh:
    ...   where = NamedSharding(mesh, PartitionSpec())
    ...   x = jax.ShapeDtypeStruct((8, 8), "float32", sharding=where)
    ...   text = jax.jit(fn).lower(x).compile().as_text()

    Args:
      mesh: of the target's devices; all of them on `data` by default.
    """
    mesh = self.mesh() if mesh is None else mesh
    with (
      dispatch.platform(self.platform),
      jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
      jax.debug_nans(False),  # nothing is computed; it would undo donations
      _no_cache(),
    ):
      yield mesh

  def compile(self, fn: Callable, *args, **kwargs) -> Report:
    """Compiles `fn(*args, **kwargs)` for the target, with the target's forms.

    Args:
      fn: a function of arrays. One that `jax.jit` made keeps its options
        (donation, placement).
      *args: pytrees. Leaves that are arrays or `jax.ShapeDtypeStruct` are
        arguments of what is compiled, and at least one is needed; all others
        are constants of it. Structs that have a sharding keep it, and are all
        on one mesh; other arrays lie whole on every device, of which a target
        has one by default.
      **kwargs: the same, by name.

    Returns:
      A `Report`, where lowering or compiling fails too.

    Raises:
      ImportError: where the compiler is not installed.
      Exception: what `fn` raises when it is called; `NotImplementedError` on
        a form that does not serve the call.
    """
    with self.lowering(_mesh_of((args, kwargs))) as mesh:
      began = time.perf_counter()
      traced = _trace(fn, args, kwargs, NamedSharding(mesh, PartitionSpec()))
      try:
        compiled = traced.lower().compile()
      except Exception as error:  # Of any kind that a compiler knows.
        message = _message(error)
        fits = False if _OUT_OF_MEMORY.search(message) else None
        took = time.perf_counter() - began
        return Report(False, took, fits=fits, message=message)
      took = time.perf_counter() - began
    return self._report(compiled.memory_analysis(), took)

  def _report(self, memory, took: float) -> Report:
    report = Report(
      True,
      took,
      argument_bytes=memory.argument_size_in_bytes,
      output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      temp_bytes=memory.temp_size_in_bytes,
      code_bytes=memory.generated_code_size_in_bytes or None,
    )
    return report._replace(fits=report.total_bytes <= self.memory_bytes)


_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED.*\bHBM\b", re.S | re.I)
_NAME = re.compile(r"(\w+:\w+)(?:-(\d+)|:(\d+(?:x\d+)+))?")


def get(name: str) -> Target:
  """The target of a name.

  Args:
    name: 'tpu:v5e', 'tpu:v6e', 'tpu:v5p' or 'cuda:h200': one device. With a
      count, 'tpu:v5e-4', or how they are wired, 'tpu:v5e:2x2', several. What
      counts is a chip (the names that the cloud gives v5p count its cores).
      A GPU's is partitions × hosts × devices: 'cuda:h200:1x2x8'.

  Raises:
    ValueError: on an unknown name or count.
  """
  found = _NAME.fullmatch(str(name))
  if not found or found[1] not in KINDS:
    raise ValueError(
      f"unknown target {name!r}: {dispatch.nearest(name, KINDS)} (one device; "
      "'tpu:v5e-4' and 'tpu:v5e:2x2' are four)"
    )
  kind, count, layout = found.groups()
  layouts = KINDS[kind].layouts
  if layout is None:
    if int(count or 1) not in layouts:
      raise ValueError(
        f"target {name!r}: {count} devices of {kind!r}; counts are "
        f"{', '.join(map(str, layouts))}, others as in '{kind}:{layouts[4]}'"
      )
    layout = layouts[int(count or 1)]
  elif layout.count("x") != layouts[1].count("x"):
    raise ValueError(
      f"target {name!r}: {kind!r} has layouts such as {layouts[4]!r}, got "
      f"{layout!r}"
    )
  return Target(str(name), kind, layout)


def names() -> list[str]:
  """The kinds of devices that there are targets of."""
  return sorted(KINDS)


def _has(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


@contextlib.contextmanager
def _no_cache():
  """Without the compilation cache, which cannot read these programs again."""
  option = "jax_enable_compilation_cache"
  before = getattr(jax.config, option)
  if not before:
    yield
    return
  jax.config.update(option, False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update(option, before)
    compilation_cache.reset_cache()


@functools.cache
def _topology(kind: str, layout: str) -> tuple[jax.Device, ...]:
  if kind == "cuda:h200":
    return tuple(
      topologies.get_topology_desc(
        topology_name=layout,
        platform="cuda",
        topology=layout,
        target_config=_H200,
      ).devices
    )
  # libtpu looks for a TPU's host where it is not told what to expect, and is
  # for one process at a time, since a TPU is.
  expected = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": KINDS[kind].accelerator,
  }
  added = {k: v for k, v in expected.items() if k not in os.environ}
  os.environ.update(added)
  try:
    name = f"{kind.removeprefix('tpu:')}:{layout}"
    return tuple(topologies.get_topology_desc(name, platform="tpu").devices)
  finally:
    for key in added:
      del os.environ[key]


def _mesh_of(tree) -> jax.sharding.Mesh | None:
  """The mesh that the structs of `tree` lie on, if any does."""
  for x in jax.tree.leaves(tree):
    if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None:
      return x.sharding.mesh
  return None


def _trace(fn, args, kwargs, sharding):
  """`fn` traced, its arrays placed by `sharding` where they have no place."""

  def spec(x):
    where = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=where or sharding,
      weak_type=getattr(x, "weak_type", False),
    )  # fmt: skip

  is_array = lambda x: hasattr(x, "dtype") and hasattr(x, "shape")
  leaves, tree = jax.tree.flatten((args, kwargs))
  dynamic = [i for i, x in enumerate(leaves) if is_array(x)]
  if not dynamic:
    raise ValueError(
      f"compile: {getattr(fn, '__name__', fn)} got no array; the arguments say "
      "which device it is for"
    )
  for i in dynamic:
    leaves[i] = spec(leaves[i])
  if hasattr(fn, "trace"):  # jitted
    args, kwargs = jax.tree.unflatten(tree, leaves)
    return fn.trace(*args, **kwargs)

  def call(arrays):  # new each time: no cache holds another platform's forms
    full = list(leaves)
    for i, array in zip(dynamic, arrays):
      full[i] = array
    args, kwargs = jax.tree.unflatten(tree, full)
    return fn(*args, **kwargs)

  return jax.jit(call).trace([leaves[i] for i in dynamic])


def _message(error: Exception) -> str:
  """What an error says, less the note on tracebacks that JAX appends."""
  return str(error).split("\n" + "-" * 20)[0].strip()
