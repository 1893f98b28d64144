"""`state_space`: the recurrence in complex128, gradients, and sizes."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import kernels
from memzoo.ops.state_space import state_space

T, D, N, R = 70, 3, 4, 2  # T crosses a block of the scan form
FORMS = ("scan", "chunk", "fft", "assoc", "pallas")
DENSE = ("scan", "chunk", "fft")


def make(kind, length=T, seed=0):
  r = np.random.default_rng(seed)
  normal = lambda *shape: r.normal(size=shape)
  c = dict(h=normal(D, N), u=normal(length, D), write=normal(D, N))
  c["read"] = normal(D, N, R) if kind == "outputs" else normal(D, N)
  if kind == "dense":
    a = normal(D, N, N)
    c["transition"] = (
      0.97 * a / np.linalg.norm(a, 2, axis=(1, 2))[:, None, None]
    )
  else:
    c["transition"] = r.uniform(0.8, 1.0, (D, N))
  if kind in ("diagonal", "outputs"):
    for k in ("h", "write", "read"):
      c[k] = c[k] + 1j * normal(*c[k].shape)
    c["transition"] = c["transition"] * np.exp(1j * normal(D, N))
  cast = lambda x: jnp.asarray(
    x, "complex64" if np.iscomplexobj(x) else "float32"
  )
  return {k: cast(x) for k, x in c.items()}


def flags(length=T):
  r = np.random.default_rng(3)
  reset, mask = r.random(length) < 0.1, r.random(length) < 0.7
  return jnp.asarray(reset), jnp.asarray(mask)


def oracle(c, reset=None, mask=None):
  """h_t = A h_{t−1} + B u_t, y_t = Re(C h_t), in complex128."""
  c = {k: np.asarray(x, np.complex128) for k, x in c.items()}
  h, read = c["h"].copy(), c["read"]
  ys = np.zeros(c["u"].shape + read.shape[2:])
  for t, u in enumerate(c["u"]):
    if mask is not None and not mask[t]:
      continue
    if reset is not None and reset[t]:
      h = np.zeros_like(h)
    for d in range(len(h)):
      a = c["transition"][d]
      h[d] = (np.diag(a) if a.ndim == 1 else a) @ h[d] + c["write"][d] * u[d]
      ys[t, d] = (h[d] @ read[d]).real
  return h, ys


def run(c, form, **options):
  c = dict(c)
  return state_space(
    c.pop("h"), c.pop("u"), implementation=form, **c, **options
  )


def cases(kind):
  """(form, {reset, mask}) of all that a transition's forms serve."""
  reset, mask = flags()
  all_flags = ({}, dict(mask=mask), dict(reset=reset, mask=mask))
  return [
    (form, given)
    for form in (DENSE if kind == "dense" else FORMS)
    for given in all_flags
    if form != "fft" or "reset" not in given
  ]


@pytest.mark.parametrize("kind", ("real", "outputs", "dense"))
def test_forms(kind):
  c = make(kind)
  todo = cases(kind)
  with kernels.interpret():
    outs = jax.jit(lambda c: [run(c, f, **given) for f, given in todo])(c)
  for (form, given), out in zip(todo, outs, strict=True):
    error = checks.relative(out, oracle(c, **given))
    assert error < checks.FORWARD, (form, tuple(given), error)


@pytest.mark.parametrize("kind", ("outputs", "dense"))
def test_gradients(kind):
  """Those of 'scan', where steps are missing, and start afresh."""
  c, (reset, mask) = make(kind), flags()
  pairs = (
    ("chunk", dict(reset=reset, mask=mask)),
    ("fft", dict(mask=mask)),
  )

  def grad(c, form, given):
    def loss(c):
      h, y = run(c, form, **given)
      return checks.wave(h.real, h.imag, y)

    return jax.grad(loss)(c)

  both = lambda c: [
    (grad(c, form, given), grad(c, "scan", given)) for form, given in pairs
  ]
  for (form, _), (got, want) in zip(pairs, jax.jit(both)(c), strict=True):
    error = checks.relative(got, want)
    assert error < checks.GRADIENT, (form, error)


@pytest.mark.parametrize("length", (1, 2, 17, 64))
def test_lengths(length):
  c = make("diagonal", length)
  outs = jax.jit(lambda c: [run(c, f) for f in ("scan", "chunk", "fft")])(c)
  for out in outs:
    assert checks.relative(out, oracle(c)) < checks.FORWARD
  empty = {**c, "u": c["u"][:0]}
  h, y = run(empty, "chunk")
  assert y.shape == (0, D) and (h == c["h"]).all()


def test_the_convolution_leaks_less_than_rounding():
  """A large input at the end reaches earlier outputs of 'fft' by about 1e-7 of
  its size, and those of 'chunk' not at all."""
  c = make("diagonal")
  u = c["u"].at[-1].set(1e4)
  for form, bound in (("fft", 1e-6), ("chunk", 0.0)):
    one = jax.jit(lambda c, form=form: run(c, form)[1])
    change = one({**c, "u": u}) - one(c)
    leak = np.abs(change[:-1]).max() / np.abs(change[-1]).max()
    assert leak <= bound, (form, leak)
    assert form == "chunk" or leak > 0


def test_the_convolution_cannot_reset():
  c = make("diagonal")
  with pytest.raises(NotImplementedError, match="'fft': .*cannot reset"):
    run(c, "fft", reset=flags()[0])
  with pytest.raises(NotImplementedError, match="diagonal transition"):
    run(make("dense"), "assoc")


def test_no_form_keeps_every_state():
  """Forward and backward stay far under the [T, D, N] complex64 states."""
  length, width, size = 2048, 16, 32
  spec = jax.ShapeDtypeStruct
  c = dict(
    h=spec((width, size), jnp.complex64), u=spec((length, width), jnp.float32),
    transition=spec((width, size), jnp.complex64),
    write=spec((width, size), jnp.complex64),
    read=spec((width, size), jnp.complex64),
  )  # fmt: skip
  states = length * width * size * 8
  for form in ("scan", "chunk", "fft"):
    loss = lambda c, form=form: jnp.sum(run(c, form)[1])
    compiled = jax.jit(jax.grad(loss)).lower(c).compile()
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used < 0.6 * states, (form, used / states)
    if form == "chunk":
      trips = checks.trip_counts(compiled)
      assert trips and max(trips) <= length // 16


@pytest.mark.parametrize(
  "change, message",
  (
    (dict(u=jnp.zeros((2, T, D))), "u must be floating .T, D."),
    (dict(h=jnp.zeros((D, N), jnp.bfloat16)), "h must be float32 or complex64"),
    (dict(transition=jnp.zeros((D, N))), "transition must be complexfloating"),
    (dict(read=jnp.zeros((D, N + 1), "complex64")), "read must be"),
    (dict(kernel=jnp.zeros((T, D + 1))), "kernel must be"),
  ),
)
def test_bad_arguments(change, message):
  with pytest.raises(ValueError, match="state_space: " + message):
    run({**make("diagonal"), **change}, None)
