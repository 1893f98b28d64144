"""What `experiments.bench` times: every op and every registered cell."""

from collections.abc import Iterator
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench_decode, timing
import memzoo
from memzoo import ops
from memzoo.core import dispatch
from memzoo.ops.attention import empty as ring_empty
from memzoo.ops.conv import conv, empty as conv_empty
from memzoo.ops.delta_rule import CHUNK_SIZES as DELTA_CHUNKS
from memzoo.ops.gradient_step import Learner, Model, start
from memzoo.ops.linear_attention import CHUNK_SIZES as LINEAR_CHUNKS
from memzoo.ops.product_key import read as product_key_read


def chosen_chunk(op: str, decay: str) -> int:
  """C that a matrix op takes by itself; `decay` as for `matrix_group`."""
  sizes = LINEAR_CHUNKS if op == "linear_attention" else DELTA_CHUNKS
  return dispatch.by_platform(
    **(sizes.channel if decay == "per-channel" else sizes.scalar)
  )


class Sizes(NamedTuple):
  """Of the inputs; the same on every platform, so that tables compare."""

  batch: int = 2  # ops: [B, T, H, K]
  length: int = 2048
  heads: int = 4
  width: int = 64  # K = V
  slots: int = 1024  # stored patterns
  half_keys: int = 64  # n of a product codebook of n² keys
  cell_batch: int = 4  # cells: [B, T, D]
  cell_length: int = 1024
  d_model: int = 64
  long: int = 4096  # where a group of a cell is to be long
  state: int = 256  # N, of the cells whose state is a diagonal recurrence


FULL = Sizes()
BY_HAND = "by hand"
TINY = Sizes(
  batch=1, length=12, heads=2, width=8, slots=16, half_keys=4, cell_batch=2,
  cell_length=6, d_model=8, long=10, state=16,
)  # fmt: skip


def groups(sizes: Sizes) -> Iterator[timing.Group]:
  """Every group of this package: ops, then cells, then the long runs."""
  yield from op_groups(sizes)
  yield from cell_groups(sizes)
  yield from chunked_cell_groups(sizes)
  yield from diagonal_cell_groups(sizes)
  yield from decode_groups(sizes)
  wide = sizes.heads * sizes.width
  both = timing.DIRECTIONS[1:]
  yield cell_group(
    "lru", sizes.batch, sizes.length, both, d_model=wide, d_state=wide
  )
  yield cell_group("mamba", 1, sizes.long, both, d_model=sizes.d_model)


def op_groups(sizes: Sizes) -> Iterator[timing.Group]:
  """Every op, with all its forms."""
  for op in ("linear_attention", "delta_rule"):
    for decay in ("no", "scalar", "per-channel"):
      yield matrix_group(op, decay, sizes)
      if decay != "no":
        yield chunk_size_group(op, decay, sizes)
  yield matrix_group("diag_plus_rank_one", "per-channel", sizes)
  yield chunk_size_group("diag_plus_rank_one", "per-channel", sizes)
  yield recurrence_group("real", sizes)
  yield recurrence_group("complex", sizes)
  yield selective_scan_group(sizes)
  yield window_group(sizes)
  yield causal_group(sizes)
  yield gradient_step_group(sizes)
  yield conv_group(sizes)
  yield hopfield_group(sizes)
  yield product_key_group(sizes)


def matrix_group(name: str, decay: str, sizes: Sizes) -> timing.Group:
  """An op with a state [K, V]; `decay` is 'no', 'scalar' or 'per-channel'."""

  def build():
    op = ops.batched(getattr(ops, name))

    def call(form, s, q, k, v, gates):
      return op(s, q, k, v, **gates, implementation=form)

    inputs = _matrix_inputs(name, decay, sizes)
    return _forms(call, ("scan", "chunk"), inputs)

  return _op_group(f"{name}, {decay} decay", _heads(sizes), sizes, build)


def chunk_size_group(name: str, decay: str, sizes: Sizes) -> timing.Group:
  """The chunk form of a matrix op, by size of its chunks; what the op's
  `CHUNK_SIZES` is chosen from."""
  chosen = chosen_chunk(name, decay)
  forms = {f"chunk, C={c}": c for c in sorted({16, 32, 64, 128, chosen})}

  def build():
    op = ops.batched(getattr(ops, name))

    def call(size, s, q, k, v, gates):
      return op(s, q, k, v, **gates, implementation="chunk", chunk_size=size)

    calls = {f: functools.partial(call, c) for f, c in forms.items()}
    inputs = _matrix_inputs(name, decay, sizes)
    return timing.Forms(calls, inputs, f"chunk, C={chosen}")

  return _op_group(
    f"{name}, {decay} decay, chunk sizes", _heads(sizes), sizes, build,
    reference=f"chunk, C={chosen}", directions=("forward+backward",),
  )  # fmt: skip


def _matrix_inputs(name, decay, sizes):
  draw, lead = Draw(0), (sizes.batch, sizes.length, sizes.heads)
  k = sizes.width
  gates = {}
  if name == "delta_rule":
    gates["beta"] = draw.uniform(0.1, 0.9, *lead)
  if decay != "no":
    channels = (k,) if decay == "per-channel" else ()
    gates["log_decay"] = -draw.uniform(0.001, 0.1, *lead, *channels)
  state = draw.normal(sizes.batch, sizes.heads, k, k)
  keys = draw.unit(*lead, k), draw.unit(*lead, k)
  if name == "diag_plus_rank_one":  # as RWKV-7 has them
    gates["a"] = -keys[1]
    gates["b"] = draw.uniform(0.1, 0.9, *lead, 1) * keys[1]
  return state, *keys, draw.normal(*lead, k), gates


def recurrence_group(numbers: str, sizes: Sizes) -> timing.Group:
  """The diagonal recurrence, its `numbers` 'real' or 'complex'."""
  width = sizes.heads * sizes.width

  def build():
    draw, lead = Draw(0), (sizes.batch, sizes.length)
    normal, decay = draw.normal, draw.uniform(0.5, 0.999, *lead, width)
    if numbers == "complex":
      normal = draw.complex
      phase = draw.normal(*decay.shape)
      decay = jnp.exp(jax.lax.complex(jnp.log(decay), phase))

    def call(form, h, x, decay):
      return jax.vmap(
        lambda h, x, decay: ops.linear_recurrence(
          h, x, decay=decay, implementation=form
        )
      )(h, x, decay)

    inputs = normal(sizes.batch, width), normal(*lead, width), decay
    return _forms(call, ("scan", "assoc", "chunk"), inputs)

  return _op_group(
    f"linear_recurrence, {numbers}", f"N={width}", sizes, build,
    dtype="complex64" if numbers == "complex" else "float32",
  )  # fmt: skip


def selective_scan_inputs(sizes: Sizes):
  """(h, x, dt, a, b, c) at the width of a Mamba layer of `sizes.width`."""
  draw, lead = Draw(0), (sizes.batch, sizes.length)
  width, n = 2 * sizes.width, 16
  a = -jnp.tile(jnp.arange(1.0, n + 1, dtype=jnp.float32), (width, 1))
  return (
    draw.normal(sizes.batch, width, n), draw.normal(*lead, width),
    draw.uniform(0.001, 0.1, *lead, width), a, draw.normal(*lead, n),
    draw.normal(*lead, n),
  )  # fmt: skip


def run_selective_scan(form, h, x, dt, a, b, c):
  """The op over a batch."""
  return jax.vmap(
    lambda h, x, dt, b, c: ops.selective_scan(
      h, x, dt, a, b, c, implementation=form
    )
  )(h, x, dt, b, c)


def selective_scan_group(sizes: Sizes) -> timing.Group:
  def build():
    inputs = selective_scan_inputs(sizes)
    return _forms(run_selective_scan, ("scan", "chunk"), inputs)

  shape = f"D={2 * sizes.width} N=16"
  return _op_group("selective_scan", shape, sizes, build)


def window_group(sizes: Sizes) -> timing.Group:
  """Attention to the last 64 tokens."""
  slots = min(64, sizes.length)

  def build():
    inputs = _attention_inputs(sizes, slots)
    return _forms(_attention, ("scan", "chunk"), inputs)

  shape = f"{_heads(sizes)} window={slots}"
  return _op_group("attention, window", shape, sizes, build)


def causal_group(sizes: Sizes) -> timing.Group:
  """Attention to all tokens before, held against JAX's own."""
  reference = "jax.nn.dot_product_attention"

  def dense(state, q, k, v):
    del state
    return None, jax.nn.dot_product_attention(q, k, v, is_causal=True)

  def build():
    inputs = _attention_inputs(sizes, sizes.length)
    forms = _forms(_attention, ("scan", "chunk"), inputs)
    calls = {reference: dense, **forms.calls}
    return timing.Forms(calls, inputs, forms.default)

  return _op_group(
    "attention, causal", _heads(sizes), sizes, build, reference=reference
  )


def _attention(form, state, q, k, v):
  return ops.batched(ops.attention)(state, q, k, v, implementation=form)


def _attention_inputs(sizes, slots):
  draw, (b, h, k) = Draw(0), (sizes.batch, sizes.heads, sizes.width)
  state = jax.tree.map(
    lambda x: jnp.tile(x, (b, h) + (1,) * x.ndim), ring_empty(slots, k, k)
  )
  qkv = (draw.normal(b, sizes.length, h, k) for _ in range(3))
  return state, *qkv


def gradient_step_group(sizes: Sizes) -> timing.Group:
  """Test-time learning in mini-batches of 16, with bias and layer norm."""
  n = min(16, sizes.length)

  def build():
    draw, (b, h, k) = Draw(0), (sizes.batch, sizes.heads, sizes.width)
    lead = (b, sizes.length, h)
    w, bias = draw.normal(b, h, k, k) * 0.02, draw.normal(b, h, k) * 0.02
    state = jax.vmap(jax.vmap(start))(Model(w, bias))
    learner = Learner(
      rates=1 / jnp.arange(1.0, n + 1), norm_scale=jnp.ones((k,)),
      norm_bias=jnp.zeros((k,)),
    )  # fmt: skip

    def call(form, state, q, k, v, rate, learner):
      state, out = ops.batched(ops.gradient_step)(
        state, q, k, v, rate=rate, learner=learner, residual=True,
        implementation=form,
      )  # fmt: skip
      return state, out.o

    keys = draw.unit(*lead, k), draw.unit(*lead, k)
    inputs = (
      state, *keys, draw.normal(*lead, k), draw.uniform(0, 1 / k, *lead),
      learner,
    )  # fmt: skip
    return _forms(call, ("scan", "chunk"), inputs)

  shape = f"{_heads(sizes)} n={n}"
  return _op_group("gradient_step", shape, sizes, build)


def conv_group(sizes: Sizes) -> timing.Group:
  width, taps = sizes.heads * sizes.width, 4

  def build():
    draw = Draw(0)
    kernel = draw.normal(taps, width) * taps**-0.5
    state = jnp.tile(conv_empty(kernel), (sizes.batch, 1, 1))

    def call(form, state, x, kernel):
      return jax.vmap(lambda s, x: conv(s, x, kernel, implementation=form))(
        state, x
      )

    inputs = state, draw.normal(sizes.batch, sizes.length, width), kernel
    return _forms(call, ("scan", "chunk"), inputs)

  return _op_group("conv", f"D={width} W={taps}", sizes, build)


def hopfield_group(sizes: Sizes) -> timing.Group:
  """Three updates by each separation, held against softmax; the op has one
  form."""
  separations = ("softmax", "softmax1", "sparsemax", "entmax15")

  def build():
    draw = Draw(0)
    patterns = draw.unit(sizes.slots, sizes.width)
    query = draw.normal(sizes.batch, sizes.length, sizes.width)

    def call(separation, patterns, query):
      return None, ops.hopfield(
        patterns, query, beta=4.0, steps=3, separation=separation
      )

    calls = {s: functools.partial(call, s) for s in separations}
    return timing.Forms(calls, (patterns, query), same=False)

  return _op_group(
    "hopfield, 3 updates", f"K={sizes.width} M={sizes.slots}", sizes, build,
    reference="softmax",
  )  # fmt: skip


def product_key_group(sizes: Sizes) -> timing.Group:
  """The read of 8 of n² values, held against a search of all n² keys."""
  n, k = sizes.half_keys, 8

  def build():
    draw, width = Draw(0), sizes.width
    query = draw.normal(sizes.batch, sizes.length, width)
    keys, values = draw.normal(2, n, width // 2), draw.normal(n * n, width)

    def product(query, keys, values):
      return None, ops.product_key(query, keys, values, k=k)

    def search(query, keys, values):
      each = jnp.repeat(keys[0], n, axis=0), jnp.tile(keys[1], (n, 1))
      scores = query @ jnp.concatenate(each, axis=-1).T
      scores, indices = jax.lax.top_k(scores, k)
      return None, product_key_read(values, jax.nn.softmax(scores), indices)

    calls = {"search of all": search, "product": product}
    return timing.Forms(calls, (query, keys, values), "product")

  return _op_group(
    "product_key", f"K={sizes.width} n={n} k={k}", sizes, build,
    reference="search of all",
  )  # fmt: skip


def _heads(sizes):
  return f"H={sizes.heads} K=V={sizes.width}"


def _op_group(
  what, shape, sizes, build, *, reference="scan", dtype="float32",
  directions=timing.DIRECTIONS,
):  # fmt: skip
  return timing.Group(
    "op", what, f"B={sizes.batch} T={sizes.length} {shape}",
    sizes.batch * sizes.length, build, (reference,), directions, dtype,
  )  # fmt: skip


def _forms(call, forms, inputs):
  """`call(form, *inputs)` by every form."""
  default = memzoo.explain(functools.partial(call, None), *inputs)[-1].form
  calls = {f: functools.partial(call, f) for f in forms}
  return timing.Forms(calls, inputs, default)


def cell_groups(sizes: Sizes) -> Iterator[timing.Group]:
  """Every registered cell, as its defaults are, with all its forms."""
  for name in memzoo.names():
    yield cell_group(
      name, sizes.cell_batch, sizes.cell_length, d_model=sizes.d_model
    )


def chunked_cell_groups(sizes: Sizes) -> Iterator[timing.Group]:
  """Matrix and test-time memories in chunks, where ops are measured: as many
  heads, of K = V, in a model that is as wide as all of them."""
  for name in memzoo.names():
    about = memzoo.describe(name)
    if about.family in ("matrix", "ttt") and "chunk" in about.forms:
      options = {
        "num_heads": sizes.heads, "head_dim": sizes.width,
        "value_dim": sizes.width,
      }  # fmt: skip
      known = {field.name for field in dataclasses.fields(about.cls)}
      options = {k: v for k, v in options.items() if k in known}
      yield cell_group(
        name, sizes.batch, sizes.length, timing.DIRECTIONS[1:],
        kind="chunked cell", forms=("step", "chunk"),
        d_model=sizes.heads * sizes.width, **options,
      )  # fmt: skip


def diagonal_cells(sizes: Sizes) -> dict[str, dict[str, int]]:
  """Options of cells whose state is a diagonal recurrence, of N numbers, real
  or complex, as the paper of each has them."""
  n, d = sizes.state, sizes.d_model
  return {
    "fast_and_forgetful": dict(d_model=d, num_traces=n // 4, num_contexts=4),
    "hgrn": dict(d_model=d, d_state=n),
    "lru": dict(d_model=d, d_state=n),
    "min_gru": dict(d_model=d, d_state=n),
    "min_lstm": dict(d_model=d, d_state=n),
    "qrnn": dict(d_model=n),
    "rg_lru": dict(d_model=d, d_rnn=n),
    "s4d": dict(d_model=n // 8, d_state=16),
    "s5": dict(d_model=d, d_state=2 * n),
  }


def diagonal_cell_groups(sizes: Sizes) -> Iterator[timing.Group]:
  """Diagonal recurrences over a long sequence."""
  for name, options in diagonal_cells(sizes).items():
    yield cell_group(
      name, sizes.cell_batch, sizes.long, timing.DIRECTIONS[1:],
      kind="diagonal cell", **options,
    )  # fmt: skip


def decode_groups(sizes: Sizes) -> Iterator[timing.Group]:
  """One token of the diagonal recurrences, and of Mamba: by `cell.step`, and by
  `memzoo.scan` as models call it, held against a step by hand."""
  for name, options in decode_cells(sizes).items():
    yield decode_group(name, **options)


def decode_cells(sizes: Sizes) -> dict[str, dict[str, int]]:
  """Options of the cells whose decoding is measured."""
  return diagonal_cells(sizes) | {"mamba": dict(d_model=sizes.d_model)}


def decode_group(name: str, **options) -> timing.Group:
  """One token of a cell, from a state in which tokens have been."""
  cell = memzoo.make(name, **options)
  rest = "".join(f" {k}={v}" for k, v in options.items() if k != "d_model")

  def build():
    params = jax.jit(cell.init)(jax.random.key(0))
    xs = Draw(0).normal(9, cell.d_model)
    state, _ = jax.jit(functools.partial(memzoo.scan, cell))(
      params, None, xs[:8]
    )

    def scan(params, state, x):
      state, ys = memzoo.scan(cell, params, state, x[None])
      return state, ys[0]

    calls = {
      BY_HAND: bench_decode.STEPS[name], "cell.step": cell.step,
      "memzoo.scan": scan,
    }  # fmt: skip
    return timing.Forms(calls, (params, state, xs[8]), "memzoo.scan")

  return timing.Group(
    "decode", name, f"T=1 D={cell.d_model}{rest}", 1, build, (BY_HAND,),
    timing.DIRECTIONS[:1], state=memzoo.state_size(cell), calls=100,
  )  # fmt: skip


def cell_group(
  name: str, batch: int, length: int, directions=timing.DIRECTIONS, *,
  kind: str = "cell", forms=None, **options,
) -> timing.Group:  # fmt: skip
  """A cell by `forms`, or every one, held against its step loop."""
  cell = memzoo.make(name, **options)
  rest = "".join(f" {k}={v}" for k, v in options.items() if k != "d_model")

  def build():
    params = jax.jit(cell.init)(jax.random.key(0))
    xs = Draw(0).normal(batch, length, cell.d_model)
    form = lambda f: functools.partial(run_cell, cell, implementation=f)
    # Kernels have suites of their own.
    names = forms or [f for f in memzoo.describe(name).forms if f != "pallas"]
    default = memzoo.explain(form(None), params, xs)[-1].form
    return timing.Forms({f: form(f) for f in names}, (params, xs), default)

  return timing.Group(
    kind, name, f"B={batch} T={length} D={cell.d_model}{rest}",
    batch * length, build, ("step",), directions,
    state=memzoo.state_size(cell),
  )  # fmt: skip


def run_cell(cell, params, xs, *, implementation):
  """A batch xs [B, T, D] from fresh states: (states, ys)."""
  return jax.vmap(
    lambda x: memzoo.scan(cell, params, None, x, implementation=implementation)
  )(xs)


class Draw:
  """Random arrays, drawn on the host: nothing is compiled for them."""

  def __init__(self, seed: int):
    self._rng = np.random.default_rng(seed)

  def normal(self, *shape) -> jax.Array:
    return jnp.asarray(self._rng.standard_normal(shape, np.float32))

  def complex(self, *shape) -> jax.Array:
    return jax.lax.complex(self.normal(*shape), self.normal(*shape))

  def unit(self, *shape) -> jax.Array:
    """Of norm 1 over the last axis."""
    x = self._rng.standard_normal(shape, np.float32)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))

  def uniform(self, low: float, high: float, *shape) -> jax.Array:
    return jnp.asarray(self._rng.uniform(low, high, shape).astype(np.float32))
