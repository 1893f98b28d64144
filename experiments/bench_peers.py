"""What `experiments.bench` times against code that is not ours.

Both sides run in one process, under the peer's interpreter and version of JAX.
Peers: jax-linear-attention 0.1.0 (import name jla) and memax 0.1.1. Where one
is missing its rows say so.
"""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp

from experiments import bench_cases, timing
from experiments.bench_cases import Sizes
import memzoo
from memzoo import ops

DIRECTIONS = ("forward+backward",)
CHUNK_SIZES = (16, 32, 64, 128)
# jax-linear-attention's name of each op, and the order of its gates.
JLA = {
  ("linear_attention", "scalar"): ("simple_gla", ("log_decay",)),
  ("linear_attention", "per-channel"): ("gla", ("log_decay",)),
  ("delta_rule", "no"): ("deltanet", ("beta",)),
  ("delta_rule", "scalar"): ("gated_deltanet", ("log_decay", "beta")),
  ("delta_rule", "per-channel"): ("kda", ("log_decay", "beta")),
}


def groups(sizes: Sizes) -> Iterator[timing.Group]:
  """Every group that has a peer; the reference is the peer's fastest form."""
  for op, decay in JLA:
    yield jla_group(op, decay, sizes)
  yield jla_mamba_group(sizes)
  wide = sizes.heads * sizes.width
  yield memax_group(sizes.batch, sizes.length, wide)
  yield memax_group(sizes.cell_batch, sizes.long, sizes.d_model)
  yield memax_s6_group(sizes.batch, sizes.length, wide)
  yield memax_s6_group(sizes.cell_batch, sizes.long, sizes.d_model)


def jla_group(op: str, decay: str, sizes: Sizes) -> timing.Group:
  """A matrix op in the form that we choose, and theirs in chunks of each
  size that the sequence fills."""
  ours = bench_cases.matrix_group(op, decay, sizes)
  kind, gates = JLA[op, decay]
  chunks = _chunks(sizes)

  def build():
    from jla.ops import linear_attention

    forms = ours.build()

    def call(size, s, q, k, v, given):
      names = {"log_decay": "g", "beta": "beta"}
      outputs, state = linear_attention(
        kind, q, k, v, impl="chunked", scale=1.0, initial_state=s,
        output_final_state=True, chunk_size=size,
        **{names[n]: given[n] for n in gates},
      )  # fmt: skip
      return state, outputs

    calls = {forms.default: forms.calls[forms.default]}
    calls |= {_jla(size): functools.partial(call, size) for size in chunks}
    return timing.Forms(calls, forms.inputs, forms.default)

  return _group(ours, build, map(_jla, chunks))


def jla_mamba_group(sizes: Sizes) -> timing.Group:
  """Mamba's scan in the form that we choose, and theirs in chunks."""
  ours = bench_cases.selective_scan_group(sizes)
  chunks = _chunks(sizes)

  def build():
    from jla.ops import linear_attention

    def call(size, h, x, dt, a, b, c):
      outputs, state = linear_attention(
        "mamba1", c, b, x, dt=dt, a=a, impl="chunked", initial_state=h,
        output_final_state=True, chunk_size=size,
      )  # fmt: skip
      return state, outputs

    forms = ours.build()
    calls = {forms.default: forms.calls[forms.default]}
    calls |= {_jla(size): functools.partial(call, size) for size in chunks}
    return timing.Forms(calls, forms.inputs, forms.default)

  return _group(ours, build, map(_jla, chunks))


def memax_group(batch: int, length: int, width: int) -> timing.Group:
  """The LRU cell, and memax's with our parameters in it: D = N = `width`, as
  its annotations ask. Its own scan is associative; it has a sequential one
  too."""
  ours = bench_cases.cell_group(
    "lru", batch, length, d_model=width, d_state=width
  )
  theirs = {
    "memax, semigroup_scan": "semigroup_scan",
    "memax, set_action_scan": "set_action_scan",
  }

  def build():
    import equinox as eqx
    from memax.equinox import scans
    from memax.equinox.semigroups import lru

    forms = ours.build()
    layer = lru.LRU(width, width, jax.random.key(0))
    matrices = ("b_re", "b_im", "c_re", "c_im")
    names = ("nu_log", "theta_log", "gamma_log", *matrices, "d")
    fields = lambda m: [
      getattr(m, n.capitalize() if n in matrices or n == "d" else n)
      for n in names
    ]

    def call(scan, params, xs):
      arrays = [params[n].T if n in matrices else params[n] for n in names]
      module = eqx.tree_at(fields, layer, arrays)
      module = eqx.tree_at(lambda m: m.scan, module, getattr(scans, scan))
      start = jnp.zeros((length,), bool)
      one = lambda x: module(module.initialize_carry(), (x, start))
      (state, _), ys = jax.vmap(one)(xs)
      return jax.tree.map(lambda h: h[:, -1], state), ys

    calls = {forms.default: forms.calls[forms.default]}
    calls |= {form: functools.partial(call, s) for form, s in theirs.items()}
    return timing.Forms(calls, forms.inputs, forms.default)

  return _group(ours, build, theirs)


def memax_s6_group(batch: int, length: int, width: int) -> timing.Group:
  """memax's S6, which has one state a channel and maps of its own around it,
  and the same layer on our selective scan, N = 1, with its parameters.

  What the exact write has beside Δ goes into the scan's input:
  (Ā − 1) / (ΔA) ⊙ B x, with 1 for the scan's B and C.
  """
  theirs = {
    "memax, semigroup_scan": "semigroup_scan",
    "memax, set_action_scan": "set_action_scan",
  }

  def build():
    import equinox as eqx
    from memax.equinox import scans
    from memax.equinox.semigroups import s6

    layer = s6.S6(width, width, jax.random.key(0))
    arrays, static = eqx.partition(layer, eqx.is_array)
    xs = bench_cases.Draw(0).normal(batch, length, width)

    def call(scan, arrays, xs):
      module = eqx.combine(arrays, static)
      module = eqx.tree_at(lambda m: m.scan, module, getattr(scans, scan))
      start = jnp.zeros((length,), bool)
      one = lambda x: module(module.initialize_carry(), (x, start))
      (state, _), ys = jax.vmap(one)(xs)
      return state[1][:, -1], ys

    def ours(form, arrays, xs):
      maps = lambda layer, x: x @ layer.weight.T + layer.bias
      a, one = -jnp.exp(arrays.A_log), jnp.ones((length, 1))

      def row(x):
        dt = jax.nn.softplus(maps(arrays.dt.layers[0], x))
        write = (jnp.exp(dt * a) - 1) / (dt * a) * maps(arrays.B, x) * x
        h, y = ops.selective_scan(
          jnp.zeros((width, 1)), write, dt, a[:, None], one, one,
          implementation=form,
        )  # fmt: skip
        return h[:, 0], maps(arrays.C, x) * y

      return jax.vmap(row)(xs)

    default = memzoo.explain(
      functools.partial(ours, None), arrays, xs
    )[-1].form  # fmt: skip
    calls = {default: functools.partial(ours, default)}
    calls |= {form: functools.partial(call, s) for form, s in theirs.items()}
    return timing.Forms(calls, (arrays, xs), default)

  shape = f"B={batch} T={length} D={width} N=1"
  return timing.Group(
    "peer", "s6", shape, batch * length, build, tuple(theirs), DIRECTIONS,
    state=width,
  )  # fmt: skip


def _group(ours, build, reference):
  return timing.Group(
    "peer", ours.what, ours.shape, ours.tokens, build, tuple(reference),
    DIRECTIONS, ours.dtype, ours.state,
  )  # fmt: skip


def _chunks(sizes):
  return [c for c in CHUNK_SIZES if c <= max(sizes.length, CHUNK_SIZES[0])]


def _jla(size: int) -> str:
  return f"jax-linear-attention, chunks of {size}"
