"""memzoo.targets and experiments.compile: compiling for absent devices.

What needs no compiler of theirs runs everywhere, some of it with the CPU in a
target's place; the rest is skipped where a compiler is not installed.
"""

import json
import subprocess
import sys

from absl import flags
import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu, triton as plt
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from experiments import compile as compiler, train
import memzoo
from memzoo import ops, targets
from memzoo.core import dispatch
from memzoo.ops.gradient_step import Learner, Model, State

ROOT = train.epath.Path(__file__).parent.parent
FLAG_FILE = ROOT / "experiments" / "mqar_small" / "gated_delta.flags"
TINY = (
  "--batch=2",
  "--length=5",
  "--heads=1",
  "--key=4",
  "--value=4",
  "--slots=4",
)
EVERY = ("tpu:v5e", "tpu:v6e", "cuda:h200")
MB = 1 << 20


def needs(name):
  missing = targets.get(name).missing()
  reason = f"{name} needs {', '.join(missing)}: make aot-env"
  return pytest.param(
    name, marks=pytest.mark.skipif(bool(missing), reason=reason)
  )


def struct(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def parse(*arguments):
  values = flags.FlagValues()
  compiler.define(values)
  values(["experiments.compile", *arguments])
  return values


@pytest.fixture
def on_cpu(monkeypatch):
  """Every target is the CPU, whose own forms are not chosen."""
  monkeypatch.setattr(targets.Target, "missing", lambda self: [])
  monkeypatch.setattr(
    targets, "_topology", lambda kind, layout: tuple(jax.devices("cpu")[:1])
  )


# Names


def test_every_target_has_a_name_a_count_and_a_layout():
  assert targets.names() == ["cuda:h200", "tpu:v5e", "tpu:v5p", "tpu:v6e"]
  one = {name: targets.get(name).layout for name in targets.names()}
  assert one == {
    "cuda:h200": "1x1x1",
    "tpu:v5e": "1x1",
    "tpu:v5p": "1x1x1",
    "tpu:v6e": "1x1",
  }
  assert (
    targets.get("tpu:v5e-4").layout
    == targets.get("tpu:v5e:2x2").layout
    == "2x2"
  )
  assert targets.get("tpu:v5p-4").layout == "2x2x1"
  assert targets.get("cuda:h200:1x2x8").layout == "1x2x8"
  for kind in targets.KINDS.values():
    for count, layout in kind.layouts.items():
      assert np.prod([int(n) for n in layout.split("x")]) == count
  assert targets.get("tpu:v6e").platform == "tpu"
  assert targets.get("cuda:h200").platform == "gpu"
  assert (
    targets.get("tpu:v5e").memory_bytes
    < 16 * targets.GIB
    < targets.get("tpu:v6e").memory_bytes
  )


@pytest.mark.parametrize(
  "name, said",
  [
    ("tpu:v5", "unknown target 'tpu:v5': did you mean .*'tpu:v5e'"),
    ("h200", "did you mean 'cuda:h200'"),
    ("abacus", "known: cuda:h200, tpu:v5e"),
    ("tpu:v5e-3", "3 devices of 'tpu:v5e'; counts are 1, 2, 4"),
    ("tpu:v5e-0", "0 devices"),
    ("tpu:v5p:2x2", "layouts such as '2x2x1', got '2x2'"),
    ("tpu:v5e-4:2x2", "unknown target"),
    (None, "unknown target None"),
  ],
)
def test_an_unknown_name_says_what_there_is(name, said):
  with pytest.raises(ValueError, match=said):
    targets.get(name)


@pytest.mark.parametrize("name, packages", [
  ("tpu:v5e", "libtpu"), ("cuda:h200", "jax-cuda13-plugin and nvidia-cuda-nvcc"),
])  # fmt: skip
def test_a_missing_compiler_is_named_with_the_way_to_get_it(
  name, packages, monkeypatch
):
  monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
  target = targets.get(name)
  message = f"target '{name}' needs {packages}, not installed here: `make aot-env` makes"
  for use in (
    lambda: target.devices,
    lambda: target.compile(jnp.sin, struct(2)),
    lambda: compiler.run(parse(f"--target={name}", "--op=conv")),
  ):
    with pytest.raises(ImportError, match=message):
      use()


def test_a_report_adds_up():
  target = targets.get("tpu:v5e")
  assert targets.Report(False, 1.0, message="no").total_bytes is None
  report = targets.Report(True, 1.0, 1, 2, 3, None)
  assert report.total_bytes == 6

  class Memory:
    argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = (
      target.memory_bytes
    )
    temp_size_in_bytes = generated_code_size_in_bytes = 0

  whole = target._report(Memory, 0.5)
  assert whole.fits and whole.output_bytes == 0 and whole.code_bytes is None
  Memory.temp_size_in_bytes = 1
  assert not target._report(Memory, 0.5).fits


# The library, with the CPU in a target's place


def test_the_targets_own_forms_are_compiled(on_cpu):
  target = targets.get("cuda:h200")
  seen = []

  def fn(x, *, scale, tree):
    seen.append((dispatch.current_platform(), x.shape, scale, type(tree["n"])))
    return scale * x + tree["y"]

  x = np.ones((3, 2), np.float32)
  report = target.compile(fn, x, scale=2.0, tree={"n": 5, "y": struct(3, 2)})
  assert report.ok and report.fits and report.message == ""
  assert (report.argument_bytes, report.output_bytes) == (48, 24)
  assert report.seconds > 0
  assert seen == [("gpu", (3, 2), 2.0, int)]
  assert dispatch.current_platform() == "cpu"

  # A jitted function that the CPU has used is traced anew.
  inner = jax.jit(lambda x: seen.append(dispatch.current_platform()) or x + 1)
  inner(x)
  del seen[:]
  target.compile(lambda x: inner(x), x)
  assert seen == ["gpu"]
  cache = jax.config.jax_enable_compilation_cache
  with target.lowering() as mesh:
    assert not jax.config.jax_enable_compilation_cache
    assert mesh.axis_names == ("data", "fsdp") and mesh.size == 1
    assert dispatch.current_platform() == "gpu"
  assert jax.config.jax_enable_compilation_cache == cache


def test_a_donated_argument_is_not_counted_twice(on_cpu):
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  report = targets.get("tpu:v5e").compile(step, struct(256))
  assert (report.argument_bytes, report.output_bytes) == (1024, 0)


def test_an_error_of_the_function_is_raised_and_of_the_compiler_reported(
  on_cpu,
):
  target = targets.get("tpu:v5e")
  with pytest.raises(TypeError):
    target.compile(jnp.dot, struct(2), struct(3))
  with pytest.raises(ValueError, match="compile: sin got no array"):
    target.compile(jnp.sin, 1.0)
  # No CPU lowers a kernel.
  report = target.compile(matmul("tpu:v5e"), *matrices())
  assert not report.ok and report.fits is None and report.total_bytes is None
  assert "interpret" in report.message and "----" not in report.message


# The program, with the CPU in a target's place


def test_every_op_is_known():
  public = {n for n in vars(ops) if callable(getattr(ops, n))} - {"batched"}
  assert set(compiler.OPS) == public | {"conv"}


@pytest.mark.parametrize(
  "op",
  [
    pytest.param(
      op, marks=() if op in ("conv", "hopfield") else pytest.mark.slow
    )
    for op in sorted(compiler.OPS)
  ],
)
def test_every_op_compiles_forward_and_backward(op, on_cpu):
  form = {"hopfield": "dense", "product_key": ""}.get(op, "scan")
  more = () if op in compiler.TIMELESS else ("--reset", "--dtype=bfloat16")
  shown = []
  rows = compiler.run(
    parse(
      "--target=tpu:v5e",
      f"--op={op}",
      f"--implementation={form}",
      "--gradient",
      *TINY,
      *more,
    ),
    shown.append,
  )
  assert [r["ok"] for r in rows] == [True], shown
  # The gradients are outputs: more comes out than the op alone gives.
  forward = compiler.run(
    parse(
      "--target=tpu:v5e", f"--op={op}", f"--implementation={form}", *TINY, *more
    ),
    shown.append,
  )
  assert rows[0]["output_bytes"] > forward[0]["output_bytes"]
  assert len(shown) == 6 and {line.count("|") for line in shown} == {
    len(compiler.HEAD) + 1
  }


def test_the_table_has_a_row_for_each_target_and_form(on_cpu, tmp_path):
  path = tmp_path / "rows.json"
  shown = []
  rows = compiler.run(
    parse(
      "--target=tpu:v5e,cuda:h200-1", "--op=delta_rule", "--decay=scalar",
      "--implementation=scan,chunk,assoc", "--op_options=chunk_size=2", f"--json={path}", *TINY,
    ),
    shown.append,
  )  # fmt: skip
  assert json.loads(path.read_text()) == rows
  assert [(r["target"], r["implementation"], r["ok"]) for r in rows] == [
    (target, form, form != "assoc")
    for target in ("tpu:v5e", "cuda:h200-1")
    for form in ("scan", "chunk", "assoc")
  ]
  for row in rows:
    assert row["what"] == "delta_rule, scalar decay"
    assert row["inputs"] == "B=2 T=5 H=1 K=4 V=4 float32"
    if row["ok"]:
      assert row["forms"] == [f"delta_rule: {row['implementation']}"]
      assert row["fits"] and row["total_bytes"] > 0 and row["message"] == ""
    else:
      assert "delta_rule has no 'assoc' form" in row["message"]
      assert row["total_bytes"] is None
  cells = [line.strip("| ").split(" | ") for line in shown]
  assert tuple(cells[0]) == compiler.HEAD
  assert cells[2][4:6] == ["scan", "yes"] and cells[2][11:13] == [
    "yes",
    "15.75",
  ]
  assert "has no 'assoc' form" in shown[4]


def test_a_long_message_is_cut_in_the_table_alone(on_cpu):
  row = compiler.run(
    parse("--target=tpu:v5e", "--op=conv", *TINY), lambda _: None
  )[0]
  row |= dict(ok=False, message="a|b\n" + 400 * "x")
  cell = compiler.cells_of(row)[-1]
  assert cell.startswith("a\\|b x") and len(cell) < 300 and cell.endswith("…")


@pytest.mark.slow
def test_cells_take_turns(on_cpu):
  rows = compiler.run(
    parse(
      "--target=tpu:v6e", "--cell=gru,lru", "--d_model=4", "--batch=2", "--length=3",
      "--implementation=step", "--gradient", "--dtype=bfloat16", "--reset",
    ),
    lambda _: None,
  )  # fmt: skip
  assert [(r["what"], r["ok"]) for r in rows] == [("gru", True), ("lru", True)]
  assert rows[0]["forms"] == ["gru: step"]
  params = memzoo.param_count(memzoo.make("gru", d_model=4))
  # Parameters, inputs, resets, and cotangents of the states and outputs.
  sizes = 4 * params + 2 * (2 * 3 * 4) + 2 * 3 + 2 * 4 * 4 + 2 * (2 * 3 * 4)
  assert rows[0]["argument_bytes"] == sizes


@pytest.mark.slow
def test_a_flag_file_of_train_compiles_a_training_step(on_cpu):
  small = (
    "--d_model=8",
    "--depth=1",
    "--batch_size=2",
    "--task_options=length=32",
  )
  values = parse(
    "--target=tpu:v5e", f"--flagfile={FLAG_FILE}", "--cell_options=head_dim=4",
    "--implementation=chunk", *small,
  )  # fmt: skip
  row = compiler.run(values, lambda _: None)[0]
  assert row["ok"], row["message"]
  assert (
    row["direction"] == "training step" and "gated_delta: chunk" in row["forms"]
  )
  _, model = train.build(values)
  leaves = jax.tree.leaves(
    train.nnx.to_pure_dict(train.nnx.state(model, train.nnx.Param))
  )
  size = sum(x.nbytes for x in leaves)
  # Parameters and two moments go in, and come out in their place.
  assert 3 * size < row["argument_bytes"] < 3 * size + 4096
  assert row["output_bytes"] < size


# Flags


@pytest.mark.parametrize(
  "arguments, said",
  [
    (["--op=conv"], "target: give --target, of cuda:h200"),
    (["--target=tpu:v7"], "unknown target 'tpu:v7'"),
    (["--target=tpu:v5e"], "nothing to compile: give --op, --cell, or --task"),
    (["--target=tpu:v5e", "--depth=2"], "nothing to compile"),
    (["--target=tpu:v5e", "--op=conv", "--cell=gru"], "--cell: of no meaning for an op"),
    (["--target=tpu:v5e", "--cell=gru", "--heads=2"], "--heads: of no meaning for a cell"),
    (["--target=tpu:v5e", "--task=mqar_small", "--gradient"], "--gradient: .* a model"),
    (["--target=tpu:v5e", "--cell=grue"], "gru"),
    (["--target=tpu:v5e", "--op=hopfield", "--reset"], "hopfield reads a memory that has no time"),
    (["--target=tpu:v5e", "--op=conv", "--decay=scalar"], "decay: .*not of conv"),
    (["--target=tpu:v5e", "--op=conv", "--op_options=x"], "'x' is not name=value"),
    (["--target=tpu:v5e", "--op=conv", "--mesh=data:2"], "needs 2 devices, and 1 are here"),
  ],
)  # fmt: skip
def test_flags_that_make_no_sense(arguments, said, on_cpu):
  with pytest.raises(ValueError, match=said):
    compiler.run(parse(*arguments), lambda _: pytest.fail("a row was shown"))


def test_a_case_that_cannot_be_built_is_a_row(on_cpu):
  row = compiler.run(
    parse("--target=tpu:v5e", "--op=product_key", "--implementation=scan"),
    print,
  )[0]
  assert not row["ok"] and "product_key" in row["message"]
  with pytest.raises(
    ValueError, match="3 rows cannot be split evenly over 2 devices"
  ):
    compiler.Shapes(type("Mesh", (), {"size": 2}), 3)


def start(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.compile", *arguments],
    cwd=ROOT, capture_output=True, text=True, timeout=600,
  )  # fmt: skip


@pytest.mark.skipif(
  not targets.get("tpu:v5e").missing(), reason="libtpu is here"
)
def test_the_program_ends_with_one_line_where_the_compiler_is_missing():
  done = start("--target=tpu:v5e", "--op=conv")
  assert done.returncode == 1 and done.stdout == ""
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith(
    "error: target 'tpu:v5e' needs libtpu, not installed here: `make aot-env`"
  )


# The compilers themselves


def matrices(size=256):
  return struct(size, size, dtype=jnp.bfloat16), struct(
    size, size, dtype=jnp.bfloat16
  )


def matmul(name, block=128):
  """A kernel of blocks [block, K] · [K, block]."""

  def kernel(a, b, out):
    out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

  params = plt.CompilerParams(num_warps=4, num_stages=1)
  if name.startswith("tpu"):
    params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"))

  def call(a, b):
    rows, inner, columns = *a.shape, b.shape[1]
    return pl.pallas_call(
      kernel,
      grid=(rows // block, columns // block),
      in_specs=[
        pl.BlockSpec((block, inner), lambda i, j: (i, 0)),
        pl.BlockSpec((inner, block), lambda i, j: (0, j)),
      ],
      out_specs=pl.BlockSpec((block, block), lambda i, j: (i, j)),
      out_shape=jax.ShapeDtypeStruct((rows, columns), jnp.float32),
      compiler_params=params,
      interpret=False,
    )(a, b)

  return call


@pytest.mark.parametrize("name", [needs(n) for n in EVERY])
def test_a_jitted_function_is_traced_for_each_target(name):
  seen = []
  inner = jax.jit(lambda x: seen.append(dispatch.current_platform()) or x + 1)
  inner(jnp.ones(3))
  assert targets.get(name).compile(lambda x: inner(x), struct(3)).ok
  assert seen == ["cpu", targets.get(name).platform]


def too_much_scratch(x):
  """A kernel that asks for 512 MB beside its blocks."""

  def kernel(x, out, scratch):
    scratch[:8, :] = jnp.zeros((8, scratch.shape[1]), jnp.float32)
    out[...] = x[...]

  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    scratch_shapes=[pltpu.VMEM((1 << 20, 128), jnp.float32)],
  )(x)


@pytest.mark.parametrize("name", [needs(n) for n in EVERY])
def test_a_kernel_compiles(name):
  target = targets.get(name)
  report = target.compile(matmul(name), *matrices())
  assert report.ok and report.fits, report.message
  assert (report.argument_bytes, report.output_bytes) == (
    2 * 2 * 256**2,
    4 * 256**2,
  )
  # The kernel is in the program, and no other matrix product.
  with target.lowering() as mesh:
    where = NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=where)
    text = jax.jit(matmul(name)).lower(x, x).compile().as_text()
  call = "tpu_custom_call" if target.platform == "tpu" else "triton"
  assert call in text and " dot(" not in text


@pytest.mark.parametrize("name", [needs(n) for n in EVERY])
def test_a_kernel_that_is_too_large_fails_in_the_compilers_words(name):
  target = targets.get(name)
  if target.platform == "tpu":
    said = "vmem"
    report = target.compile(too_much_scratch, matrices()[0])
  else:
    said = "Shared memory size limit exceeded"
    report = target.compile(matmul(name, 256), *matrices())
  assert not report.ok and said in report.message
  assert report.fits is None, "it is not the device's memory that is too small"


@pytest.mark.parametrize("name", [needs(n) for n in EVERY])
def test_what_the_device_has_no_memory_for_does_not_fit(name):
  target = targets.get(name)
  rows = target.memory_bytes // (4 * MB) + 1
  report = target.compile(lambda x: jnp.sum(x * x), struct(rows, MB))
  assert report.fits is False
  assert report.ok == (target.platform == "gpu")  # whose compiler sets no bound
  if not report.ok:
    assert (
      "RESOURCE_EXHAUSTED" in report.message and "HBM" in report.message.upper()
    )


@pytest.mark.parametrize(
  "name",
  [needs(n) for n in ("tpu:v5e-4", "tpu:v6e:2x2", "tpu:v5p-4", "cuda:h200-4")],
)
def test_several_devices_share_the_batch(name):
  target = targets.get(name)
  assert len(target.devices) == 4
  shapes = compiler.Shapes(target.mesh(), 8)
  report = target.compile(
    lambda x, w: jnp.tanh(x @ w), shapes.rows(128, 128), shapes.whole(128, 128)
  )
  assert report.ok, report.message
  assert report.argument_bytes == 4 * 128**2 * (8 // 4 + 1)
  assert 0 <= report.output_bytes - 4 * 128**2 * (8 // 4) <= 1024  # and a table


@pytest.mark.parametrize("name", [needs("tpu:v5e")])
def test_a_layout_that_does_not_exist(name):
  with pytest.raises(ValueError, match="target 'tpu:v5e:3x1': .*3x1"):
    targets.get(name + ":3x1").mesh()


@pytest.mark.slow
@pytest.mark.parametrize("name", [needs(n) for n in EVERY])
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_ops_compile_in_chunks(name, op):
  rows = compiler.run(
    parse(
      f"--target={name}", f"--op={op}", "--implementation=chunk", "--gradient", "--decay=scalar",
      "--reset", "--dtype=bfloat16", "--batch=1", "--length=200", "--heads=2", "--key=64", "--value=64",
    )
  )  # fmt: skip
  assert rows[0]["ok"] and rows[0]["fits"], rows[0]["message"]


def with_resets(op, decay):
  """An op's kernel in bfloat16 with resets to a learned state, gaps and a
  ragged end: a scalar of its outputs, floating arguments, flags."""
  batch, length, heads, width = 2, 100, 2, 64
  step = lambda *shape, dtype="float32": struct(
    batch, length, heads, *shape, dtype=dtype
  )
  free = {n: step(width, dtype="bfloat16") for n in "qkv"}
  flags = {n: struct(batch, length, dtype=bool) for n in ("reset", "mask")}
  options = dict(implementation="pallas")
  if op == "gradient_step":
    model = lambda *lead: Model(
      struct(*lead, width, width), struct(*lead, width)
    )
    free |= dict(
      model=model(batch, heads), grads=model(batch, heads), fresh=model(heads),
      learner=Learner(struct(16), struct(width), struct(width)),
      rate=step(),
    )  # fmt: skip
    flags["phase"] = struct(batch, heads, dtype="int32")
    options["residual"] = True
  else:
    free |= dict(
      s=struct(batch, heads, width, width), fresh=struct(heads, width, width)
    )
    if decay != "none":
      free["log_decay"] = step(*((width,) if decay == "channel" else ()))
    if op == "delta_rule":
      free["beta"] = step()
    options["chunk_size"] = 16

  def call(free, flags):
    c = {**free, **flags, **options}
    if op == "gradient_step":
      s = State(c.pop("model"), c.pop("grads"), c.pop("phase"))
    else:
      s = c.pop("s")
    q, k, v = (c.pop(n) for n in "qkv")
    out = jax.tree.leaves(ops.batched(getattr(ops, op))(s, q, k, v, **c))
    return sum(jnp.sum(x.astype(jnp.float32)) for x in out)

  return call, free, flags


@pytest.mark.slow
@pytest.mark.parametrize("name", [needs(n) for n in ("tpu:v5e", "cuda:h200")])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
  "op, decay",
  [
    ("linear_attention", "none"),
    ("linear_attention", "scalar"),
    ("linear_attention", "channel"),
    ("delta_rule", "none"),
    ("delta_rule", "scalar"),
    ("delta_rule", "channel"),
    ("gradient_step", "none"),
  ],
)
def test_a_kernel_with_resets_compiles(op, decay, direction, name):
  call, free, flags = with_resets(op, decay)
  fn = call if direction == "forward" else jax.grad(call)
  report = targets.get(name).compile(fn, free, flags)
  assert report.ok and report.fits, report.message


@pytest.mark.slow
@pytest.mark.parametrize("name", [needs(n) for n in ("tpu:v5e-4", "cuda:h200")])
def test_the_program_compiles_a_model(name):
  done = start(
    f"--target={name}",
    f"--flagfile={FLAG_FILE}",
    "--batch_size=8",
    "--depth=1",
    "--implementation=chunk",
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "training step" in done.stdout.splitlines()[-1]
