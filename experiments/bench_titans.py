"""Times deep test-time memories beside titans-pytorch's NeuralMemory.

  PYTHON -m experiments.bench_titans --out=benchmarks

PYTHON is an interpreter with memzoo, torch and titans-pytorch. Forward and
backward of a batch on the CPU, in turn in one process; the memory is an MLP of
two layers (hidden width 4 K) in both. titans-pytorch is run in two ways:

  exact    chunk_size=1, batch_size=n: the rule of our cell, a step of momentum
           and forgetting a token and gradients of n tokens at a time
  default  chunk_size=n and no batch_size: one step of momentum and forgetting
           a chunk, every gradient taken at the weights of the start

Prints a Markdown table; with --out, writes titans.md there too.
"""

from importlib import metadata
import os
import pathlib
import statistics

from absl import app, flags
import jax
import numpy as np

from experiments import bench, timing, train
from experiments.bench_cases import run_cell
import memzoo

FLAGS = flags.FLAGS
OURS = ("titans", "ttt_mlp", "atlas")
HEAD = ("memory", "ms", "min", "max", "1,000 tokens/s", "× exact", "× default")


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not on import, so that others can use `measure`."""
  to = dict(flag_values=values)
  flags.DEFINE_integer("batch", 2, "B.", 1, **to)
  flags.DEFINE_integer("length", 2048, "T.", 1, **to)
  flags.DEFINE_integer("d_model", 64, "D.", 1, **to)
  flags.DEFINE_integer("heads", 4, "H; K = D / H.", 1, **to)
  flags.DEFINE_integer("mini_batch_size", 16, "n.", 1, **to)
  flags.DEFINE_float("seconds", 20.0, "Of rounds.", 0.0, **to)
  flags.DEFINE_string("out", None, "Folder of titans.md.", **to)


def ours(values):
  """Form -> a function that starts a forward and backward of a cell of ours."""
  xs = _inputs(values)
  runs = {}
  for name in OURS:
    if name in memzoo.names():
      cell = memzoo.make(
        name, d_model=values.d_model, num_heads=values.heads,
        mini_batch_size=values.mini_batch_size,
      )  # fmt: skip
      params = jax.jit(cell.init)(jax.random.key(0))
      call = lambda params, xs, cell=cell: run_cell(
        cell, params, xs, implementation="chunk"
      )
      runs[name], _ = timing.compile_call(
        call, (params, jax.numpy.asarray(xs)), "forward+backward"
      )
  return runs


def theirs(values):
  """The same of titans-pytorch: 'exact' and 'default'.

  Raises:
    ImportError: without torch or titans-pytorch.
  """
  import titans_pytorch
  import torch

  torch.set_num_threads(os.cpu_count())
  n, width = values.mini_batch_size, values.d_model // values.heads

  def form(**options):
    torch.manual_seed(0)
    module = titans_pytorch.NeuralMemory(
      values.d_model, heads=values.heads, dim_head=width, momentum=True,
      model=titans_pytorch.MemoryMLP(width, 2, expansion_factor=4.0),
      qk_rmsnorm=True, **options,
    )  # fmt: skip
    xs = torch.tensor(_inputs(values), requires_grad=True)
    wave = torch.cos(torch.arange(xs.numel()).reshape(xs.shape))

    def run():
      module.zero_grad()
      out, _ = module(xs)
      (out * wave).sum().backward()
      return ()

    return run

  return {
    "titans-pytorch, exact": form(chunk_size=1, batch_size=n),
    "titans-pytorch, default": form(chunk_size=n),
  }


def _inputs(values):
  shape = values.batch, values.length, values.d_model
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def measure(values) -> list[tuple]:
  """Rows of the table: ours, then theirs."""
  runs = ours(values) | theirs(values)
  for run in runs.values():  # warm
    jax.block_until_ready(run())
  times = timing.rounds(runs, values.seconds)
  tokens, rows = values.batch * values.length, []
  for form, seconds in times.items():
    middle = statistics.median(seconds)
    ratios = (
      timing.ratio(seconds, times[f"titans-pytorch, {way}"])
      for way in ("exact", "default")
    )
    show = lambda s: f"{1e3 * s:.0f}"
    rows.append(
      (form, *map(show, (middle, min(seconds), max(seconds))))
      + (f"{tokens / middle / 1e3:.1f}", *(f"{r:.2f}" for r in ratios))
    )
  return rows


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  with train.one_line_errors():
    bench.check_platform("cpu")
    about = bench.machine()
    try:
      rows = measure(FLAGS)
    except ImportError as error:
      raise ValueError(
        f"bench_titans: {error}; it needs torch and titans-pytorch"
      ) from error
    versions = ", ".join(
      f"{n} {metadata.version(n)}" for n in ("jax", "torch", "titans-pytorch")
    )
    text = (
      "# Deep test-time memories beside titans-pytorch\n\n"
      f"Forward and backward in float32, B={FLAGS.batch} T={FLAGS.length} "
      f"D={FLAGS.d_model} H={FLAGS.heads}, gradients of n="
      f"{FLAGS.mini_batch_size} tokens at a time, median of rounds; "
      f"{about['device']}, {about['cores']} cores, {about['date']}, load "
      f"average at the start {about['load_before']}, commit "
      f"{about['commit']}; {versions}.\n\n"
    )
    text += "\n".join(bench.table(HEAD, rows)) + "\n"
    print(text)
    if FLAGS.out:
      pathlib.Path(FLAGS.out, "titans.md").write_text(text)


if __name__ == "__main__":
  define()
  app.run(main)
