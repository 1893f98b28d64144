"""The `hopfield` kernels, in Pallas' interpreter and compiled for devices."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import kernels, ops, targets
from memzoo.core import dispatch
from memzoo.kernels.hopfield import block, hopfield, pallas_gpu, pallas_tpu
from memzoo.ops import separation as separations

PLATFORMS = ("tpu", "gpu")
SMALL = dict(block_queries=16, block_patterns=32, interpret=True)


def draw(seed, *shapes):
  r = np.random.default_rng(seed)
  return [r.normal(size=shape).astype(np.float32) for shape in shapes]


def oracle(x, q, v, beta, g, *, steps=1, extra=False, mask=None, causal=False):
  """Ramsauer et al. 2020 eq. 3 in float64, and its derivatives times g:
  (o, dx, dq, dv, dβ); extra: softmax over [s, 0] without the last."""
  x, q, v, g = (np.asarray(a, np.float64) for a in (x, q, v, g))
  there = np.ones((len(q), len(x)), bool)
  if mask is not None:
    there &= np.asarray(mask)
  if causal:
    there &= np.arange(len(x)) <= np.arange(len(q))[:, None]

  def weights(state):
    s = np.where(there, beta * state @ x.T, -np.inf)
    s = np.concatenate([s, np.full((len(q), 1), 0.0 if extra else -1e3)], 1)
    e = np.exp(s - s.max(axis=1, keepdims=True))
    if not extra:
      e[:, -1] = (~there.any(axis=1)).astype(float)
    return (e / e.sum(axis=1, keepdims=True))[:, :-1]

  states = [q]
  for _ in range(steps - 1):
    states.append(weights(states[-1]) @ x)
  o = weights(states[-1]) @ v
  dx, dbeta = np.zeros_like(x), 0.0
  for step, state in reversed(list(enumerate(states))):
    contents = v if step == steps - 1 else x
    p, dp = weights(state), g @ contents.T
    ds = p * (dp - (p * dp).sum(axis=1, keepdims=True))
    if step == steps - 1:
      dv = p.T @ g
    else:
      dx += p.T @ g
    dx += beta * ds.T @ state
    dbeta += (ds * (state @ x.T)).sum()
    g = beta * ds @ x
  return o, dx, g, dv, dbeta


def dense(x, q, v, beta, *, separation="softmax", mask=None, causal=False,
          steps=1):  # fmt: skip
  """The op's dense form; with `causal`, one written out."""
  if not causal:
    return ops.hopfield(
      x, q, values=v, beta=beta, steps=steps, separation=separation, mask=mask,
      implementation="dense",
    )  # fmt: skip
  seen = jnp.tril(jnp.ones((q.shape[0], x.shape[0]), bool))
  seen &= jnp.ones(x.shape[0], bool) if mask is None else mask
  scores = beta * jnp.matmul(q, x.T, precision="highest")
  return jnp.matmul(separations.separate(separation, scores, seen), v)


def pulled(fn, x, q, v, beta, g):
  """(o, dx, dq, dv, dβ) of fn(x, q, v, beta)."""
  y, pull = jax.vjp(fn, x, q, v, beta)
  return y, *pull(g.astype(y.dtype))


def agree(got, want, forward=checks.FORWARD, gradient=checks.GRADIENT):
  names = ("o", "dx", "dq", "dv", "dbeta")
  for name, a, b in zip(names, got, want, strict=True):
    # Of M = 1 and the like the derivative is zero, up to rounding.
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.isfinite(a).all(), name
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-2)
    assert error < (forward if name == "o" else gradient), (name, error)


CASES = {  # M, N, K, V, beta and what else
  "one": (1, 3, 5, 3, 1.0, {}),
  "seven": (7, 1, 3, 8, 0.1, dict(separation="softmax1", masked=True)),
  "below": (63, 17, 20, 7, 0.3, dict(steps=3, masked=True)),
  "whole": (64, 33, 5, 4, 50.0, {}),
  "above": (65, 70, 5, 17, 0.7, dict(causal=True, masked=True)),
  "many": (200, 49, 16, 3, 0.1, dict(separation="softmax1", steps=3)),
  "wide": (200, 31, 5, 3, 50.0, dict(separation="softmax1", causal=True)),
}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_form_and_the_oracle(case, platform):
  """Values, and the gradients of patterns, query, values and beta."""
  m, n, k, w, beta, options = CASES[case]
  options = dict(options)
  x, q, v, g = draw(m + n, (m, k), (n, k), (m, w), (n, w))
  if beta > 10:
    # Scores of a spread of about 3: large, and weights of every size.
    x, q = x / 4, q / 4
  mask = np.arange(m) % 3 != 0 if options.pop("masked", False) else None
  kernel = lambda x, q, v, b: hopfield(
    x, q, values=v, beta=b, platform=platform, mask=mask, **options, **SMALL
  )
  plain = lambda x, q, v, b: dense(x, q, v, b, mask=mask, **options)
  both = jax.jit(lambda *a: (pulled(kernel, *a), pulled(plain, *a)))
  got, reference = both(x, q, v, jnp.float32(beta), g)
  extra = options.pop("separation", "softmax") == "softmax1"
  want = oracle(x, q, v, beta, g, extra=extra, mask=mask, **options)
  agree(got, want)
  agree(got, reference)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_nothing_there(platform):
  """All patterns masked, or, causally, all that a query could see: zero, and
  gradients that are finite and zero there."""
  x, q, v, g = draw(0, (37, 5), (19, 5), (37, 4), (19, 4))
  mask = np.zeros(37, bool)
  late = np.arange(37) >= 6

  @jax.jit
  def run(x, q, v, beta, g):
    def call(separation, mask, causal):
      kernel = lambda x, q, v, b: hopfield(
        x, q, values=v, beta=b, separation=separation, mask=mask,
        causal=causal, platform=platform, **SMALL,
      )  # fmt: skip
      return pulled(kernel, x, q, v, beta, g)

    none = [call(s, mask, False) for s in ("softmax", "softmax1")]
    return none, call("softmax", late, True)

  none, some = run(x, q, v, jnp.float32(2.0), g)
  for leaf in jax.tree.leaves(none):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
  agree(some, oracle(x, q, v, 2.0, g, mask=late, causal=True))
  assert not np.any(some[0][:6]) and np.all(some[0][6:])
  assert not np.any(some[2][:6]) and not np.any(some[1][:6])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bfloat16(platform):
  """Within 4 times what rounding the inputs alone does, each gradient."""
  shapes = (70, 20), (33, 20), (70, 9), (33, 9)
  arrays = draw(3, *shapes)
  half = [jnp.asarray(a, jnp.bfloat16) for a in arrays]

  def kernel(x, q, v, b):
    return hopfield(x, q, values=v, beta=b, platform=platform, **SMALL)

  run = jax.jit(lambda x, q, v, g, b: pulled(kernel, x, q, v, b, g))
  got = run(*half, jnp.float32(0.5))
  assert [a.dtype for a in got] == [jnp.bfloat16] * 4 + [jnp.float32]

  def exact(x, q, v, g):
    return oracle(x, q, v, 0.5, g)

  want = exact(*arrays)
  rounded = exact(*(a.astype(jnp.float32) for a in half))
  for a, r, b in zip(got, rounded, want):
    error = checks.relative(a.astype(jnp.float32), b)
    assert error < 4 * checks.relative(r, b)


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_vmap(platform):
  """Shared patterns, own patterns, and a beta each: as one after the other."""
  xs, qs, vs, gs = draw(4, (3, 21, 5), (3, 17, 5), (3, 21, 4), (3, 17, 4))
  betas = jnp.asarray([0.3, 1.0, 2.0], jnp.float32)

  def kernel(x, q, v, b):
    return hopfield(x, q, values=v, beta=b, platform=platform, **SMALL)

  run = functools.partial(pulled, kernel)
  shared = jax.jit(jax.vmap(run, (None, 0, None, None, 0)))
  for got, beta, x, v in (
    (shared(xs[0], qs, vs[0], betas[1], gs), [1.0] * 3, xs[:1], vs[:1]),
    (jax.jit(jax.vmap(run))(xs, qs, vs, betas, gs), betas, xs, vs),
  ):
    for n in range(3):
      row = n % len(x)
      want = oracle(x[row], qs[n], v[row], float(beta[n]), gs[n])
      agree([a[n] for a in got], want)

  # Under one derivative of all, shared patterns gather their gradients.
  def loss(x, fn):
    return checks.wave(jax.vmap(lambda q: fn(x, q, vs[0], betas[0]))(qs))

  got, want = jax.jit(
    lambda x: (jax.grad(loss)(x, kernel), jax.grad(loss)(x, dense))
  )(xs[0])
  assert checks.relative(got, want) < checks.GRADIENT


def test_leading_dimensions_and_checkpoint():
  x, q = draw(5, (21, 5), (2, 3, 5))

  def loss(x, q, wrap=lambda f: f):
    kernel = lambda x, q: hopfield(x, q, steps=2, **SMALL)
    return checks.wave(wrap(kernel)(x, q))

  def plain(x, q):
    return checks.wave(ops.hopfield(x, q, steps=2))

  @jax.jit
  def run(x, q):
    grads = functools.partial(jax.value_and_grad, argnums=(0, 1))
    wrapped = functools.partial(loss, wrap=jax.checkpoint)
    return [grads(fn)(x, q) for fn in (loss, wrapped, plain)]

  for got, saved in zip(*map(jax.tree.leaves, run(x, q)[:2])):
    assert checks.relative(saved, got) < 1e-6
  kernel, _, reference = run(x, q)
  assert checks.relative(kernel, reference) < checks.GRADIENT
  one = jax.eval_shape(functools.partial(hopfield, **SMALL), x, q[0, 0])
  none = hopfield(x[:0], q, values=np.zeros((0, 2), np.float32), **SMALL)
  assert one.shape == (5,)
  np.testing.assert_array_equal(none, np.zeros((2, 3, 2)))


@pytest.mark.nans
@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_lies_outside_is_poison(platform, monkeypatch):
  """The interpreter has NaN where a block reaches beyond its array. No other
  test sees any; without the kernel's own guard it is everywhere."""
  x, q, v, g = draw(6, (37, 5), (19, 5), (37, 4), (19, 4))

  def kernel(x, q, v, b):
    return hopfield(x, q, values=v, beta=b, platform=platform, **SMALL)

  if platform == "tpu":
    unguarded = lambda self, a, at, axis=0: a
    monkeypatch.setattr(pallas_tpu._Grid, "clean", unguarded)
  else:
    monkeypatch.setattr(pallas_gpu, "_load", lambda ref, inside: ref[...])
  out = jax.jit(lambda *a: pulled(kernel, *a))(x, q, v, jnp.float32(1.0), g)
  assert all(np.isnan(a).any() for a in out)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_float32_is_multiplied_in_full(platform, monkeypatch):
  """A device rounds the operands of a product of less than the highest
  precision; the interpreter does not, so that the test does it."""
  x, q, v, g = draw(7, (37, 5), (19, 5), (37, 4), (19, 4))
  product = jax.lax.dot_general

  def device(always):
    def rounded(a, b, dims, precision=None, preferred_element_type=None):
      exact = precision == jax.lax.Precision.HIGHEST
      if a.dtype == jnp.float32 and (always or not exact):
        # To TF32; bfloat16 would be rounder still.
        a, b = (jax.lax.reduce_precision(z, 8, 10) for z in (a, b))
      return product(
        a, b, dims, precision=precision,
        preferred_element_type=preferred_element_type,
      )  # fmt: skip

    return rounded

  want = oracle(x, q, v, 1.0, g)

  def errors():
    kernel = lambda x, q, v, b: hopfield(
      x, q, values=v, beta=b, platform=platform, **SMALL
    )
    got = jax.jit(lambda *a: pulled(kernel, *a))(x, q, v, jnp.float32(1.0), g)
    return [checks.relative(a, b) for a, b in zip(got[:4], want[:4])]

  monkeypatch.setattr(block.jax.lax, "dot_general", device(always=False))
  assert max(errors()) < 2e-6
  monkeypatch.setattr(block.jax.lax, "dot_general", device(always=True))
  assert min(errors()) > 1e-4


def sizes(jaxpr):
  """The shapes of all arrays of a jaxpr, in kernels and loops too."""
  found = set()
  for equation in jaxpr.eqns:
    found |= {v.aval.shape for v in equation.outvars if v.aval.shape}
    for inner in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"),
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        found |= sizes(inner)
  return found


@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_array_of_scores(platform):
  """Forward and backward: blocks, and arrays as large as the arguments, also
  over several updates."""
  n, m, k, w = 700, 1100, 24, 40
  args = (
    jax.ShapeDtypeStruct((m, k), "float32"),
    jax.ShapeDtypeStruct((n, k), "float32"),
    jax.ShapeDtypeStruct((m, w), "float32"),
    jax.ShapeDtypeStruct((), "float32"),
  )

  def largest(fn):
    loss = lambda *a: checks.wave(fn(*a))
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2, 3)))(*args).jaxpr
    return max(int(np.prod(shape)) for shape in sizes(jaxpr))

  # Lowered for the device, so that the interpreter is not in the way.
  kernel = lambda x, q, v, b: hopfield(
    x, q, values=v, beta=b, steps=4, platform=platform, block_queries=128,
    block_patterns=128,
  )  # fmt: skip
  plain = lambda x, q, v, b: dense(x, q, v, b, steps=4)
  assert largest(kernel) <= max(m * w, 3 * n * k, 128 * 128)
  assert largest(plain) >= n * m


def test_forms():
  """A name never falls back; on CPU the dense form is the automatic one."""
  x, q = draw(8, (9, 5), (3, 5))

  def form(**options):
    call = functools.partial(ops.hopfield, **options)
    return dispatch.explain(call, x, q)[-1].form

  assert form() == "dense"
  with pytest.raises(NotImplementedError, match="on CPU it runs only inside"):
    ops.hopfield(x, q, implementation="pallas")
  assert not kernels.interpreting()
  with kernels.interpret():
    assert form() == "dense" and form(implementation="pallas") == "pallas"
    got = ops.hopfield(x, q, implementation="pallas")
    for options, words in (
      (dict(separation="sparsemax"), "needs all scores"),
      (dict(separation="entmax15"), "needs all scores"),
      (dict(tolerance=0.1), "holds a query still"),
      (dict(beta=jnp.ones(9)), "one beta"),
    ):
      with pytest.raises(NotImplementedError, match=words):
        ops.hopfield(x, q, implementation="pallas", **options)
    with kernels.interpret(False):
      assert not kernels.interpreting()
  assert checks.relative(got, ops.hopfield(x, q)) < checks.FORWARD


@pytest.mark.parametrize(
  "options, error, words",
  [
    (dict(steps=0), ValueError, "steps must be at least 1, got 0"),
    (dict(causal=True), ValueError, r"causal query must be \[N, K\]"),
    (dict(beta=np.ones(3, np.float32)), ValueError, "beta must be a scalar"),
    (dict(platform="gpx"), ValueError, "unknown platform 'gpx'"),
    (dict(separation="softmx"), ValueError, "did you mean 'softmax'"),
    (dict(separation="sparsemax"), NotImplementedError, "needs all scores"),
    (dict(platform="gpu", block_queries=48), ValueError, "power of two"),
    (dict(platform="gpu", block_patterns=8), ValueError, "at least 16"),
    (dict(platform="tpu", block_patterns=8), ValueError, "multiple of 128"),
    (dict(mask=np.ones(8, bool)), ValueError, "mask must be"),
    (dict(), NotImplementedError, "is for TPU and GPU"),
  ],
)
def test_bad_input(options, error, words):
  x, q = draw(9, (9, 5), (2, 3, 5))
  with pytest.raises(error, match=words):
    hopfield(x, q, **options)


def test_what_has_no_room_is_refused():
  for platform, width in (("gpu", 2048), ("tpu", 4096)):
    x = jax.ShapeDtypeStruct((8, width), "float32")
    with pytest.raises(NotImplementedError, match="is more than"):
      jax.eval_shape(functools.partial(hopfield, platform=platform), x, x)
  for dtype in ("float16",):
    x = jax.ShapeDtypeStruct((8, 16), dtype)
    with pytest.raises(NotImplementedError, match="tpu kernel takes"):
      jax.eval_shape(functools.partial(hopfield, platform="tpu"), x, x)


COMPILED = {  # N, M, K, V, dtype and what else
  "square": (4096, 4096, 128, 128, "bfloat16", {}),
  "store": (4096, 65536, 128, 128, "bfloat16", dict(masked=True)),
  "single": (4096, 4096, 128, 128, "float32", {}),
  "odd": (1000, 777, 100, 60, "bfloat16", dict(masked=True, causal=True)),
  "odd_single": (1000, 777, 100, 60, "float32", dict(masked=True, causal=True)),
  "small": (7, 63, 5, 3, "float32", dict(separation="softmax1", steps=3)),
  "wide": (300, 4096, 512, 512, "float32", dict(masked=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu:v5e", "tpu:v6e", "cuda:h200"])
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_for_the_device(case, target):
  """Forward and backward, in less memory than the scores would take."""
  target = targets.get(target)
  if target.missing():
    pytest.skip(f"{target.name} needs {', '.join(target.missing())}")
  n, m, k, w, dtype, options = COMPILED[case]
  options = dict(options)
  masked = options.pop("masked", False)

  def loss(x, q, v, beta, mask):
    return checks.wave(
      hopfield(
        x, q, values=v, beta=beta, mask=mask if masked else None, **options
      )
    )

  args = [
    jax.ShapeDtypeStruct(*a)
    for a in (
      ((m, k), dtype), ((n, k), dtype), ((m, w), dtype), ((), "float32"),
      ((m,), "bool"),
    )
  ]  # fmt: skip
  for fn in (loss, jax.grad(loss, (0, 1, 2, 3))):
    report = target.compile(fn, *args)
    assert report.ok, report.message
    if n * m >= 2**24:
      assert report.temp_bytes < n * m  # a quarter of the scores
