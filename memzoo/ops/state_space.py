"""Time-invariant state spaces, one per channel.

  h_t = A h_{t−1} + B u_t ,   y_t = Re(C h_t)

A is the same at every step, so that the outputs are a convolution with the
kernel K_n = Re(C Aⁿ B), of a sequence or of a chunk of it. Each channel has
one input and R outputs; A is diagonal or dense.
Sources: Gu et al. 2021, arXiv:2110.13985, section 3 (both views); Gu et al.
2022, arXiv:2206.11893, section 3 (the kernel is a Vandermonde product, here in
two levels of √T powers each, so that [T, D, N] is never built).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.ops import arguments, chunk
from memzoo.ops.linear_recurrence import linear_recurrence
from memzoo.ops.selective_scan import even_blocks

CHUNK_SIZE = 16


def step(h, u, transition, write, read):
  """One step: h [D, N], u [D] -> (h [D, N], y [D], or [D, R] as read is)."""
  h = _apply(transition, h) + write * u.astype(h.dtype)[:, None]
  out = _dot("drn,dn->dr", _rows(read), h)
  return h, (out[:, 0] if read.ndim == 2 else out).astype(u.dtype)


def state_space(
  h: jax.Array,
  u: axes.Xs,
  *,
  transition: jax.Array,
  write: jax.Array,
  read: jax.Array,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  kernel: jax.Array | None = None,
  implementation: str | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[jax.Array, jax.Array]:
  """The state spaces of D channels over one sequence.

  Args:
    h: float32 or complex64 [D, N], the states to go on from.
    u: [T, D].
    transition: A, diagonal [D, N] or dense [D, N, N], in h's dtype.
    write: B [D, N], in h's dtype.
    read: C [D, N], or [D, N, R] for R outputs a channel, in h's dtype.
    reset: bool [T]; True: the state is zero before step t.
    mask: bool [T]; False: no step t; the output there is zero.
    kernel: float32 [T, D], K where the caller has made it for 'fft'.
    implementation: 'scan' (the step loop, in checkpointed blocks), 'chunk'
      (inside chunks the convolution as a matrix product, and a walk over their
      boundaries), 'fft' (the whole convolution by Fourier transforms: no
      reset, and an output feels later inputs by about 1e-7 of their size),
      'assoc' and 'pallas' (of `linear_recurrence`, for a diagonal A: they keep
      [T, D, N]), or None.
    chunk_size: C of the chunk form, a power of two.

  Returns:
    (states [D, N], y [T, D] or [T, D, R] in u's dtype).

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a form that does not exist or does not serve.
  """
  _check(h, u, transition, write, read, kernel, reset, mask)
  chunk.power_of_two("chunk_size", chunk_size)
  if not u.shape[0]:
    return h, jnp.zeros(u.shape + read.shape[2:], u.dtype)
  if mask is not None:
    reset = None if reset is None else reset & mask
    u = jnp.where(mask[:, None], u, 0)
  inputs = Inputs(u, reset, mask)
  space = Space(transition, write, _rows(read))
  forms = {
    "scan": lambda: chunk.run(
      _block, h, inputs, space, chunk_size=even_blocks(u.shape[0])
    ),
    "chunk": lambda: chunk.run(
      FUNCTION,
      h,
      inputs,
      _tables(space, chunk.fit(chunk_size, u.shape[0])),
      chunk_size=chunk_size,
    ),
    "fft": lambda: _fft(h, inputs, space, kernel),
    "assoc": lambda: _diagonal(h, inputs, space, "assoc"),
    "pallas": lambda: _diagonal(h, inputs, space, "pallas"),
  }
  h, y = dispatch.run("state_space", forms, implementation)
  if mask is not None:
    y = jnp.where(mask[:, None, None], y, 0)
  return h, (y[..., 0] if read.ndim == 2 else y).astype(u.dtype)


def _check(h, u, transition, write, read, kernel, reset, mask):
  who = "state_space"
  if jnp.ndim(u) != 2:
    arguments.fail(who, "u", "floating [T, D]; jax.vmap batches", u)
  length, width = jnp.shape(u)
  arguments.check_array(who, "u", u, (length, width))
  if jnp.ndim(h) != 2 or jnp.result_type(h) not in (jnp.float32, jnp.complex64):
    arguments.fail(who, "h", f"float32 or complex64 [{width}, N]", h)
  kind = jnp.complexfloating if jnp.iscomplexobj(h) else jnp.floating
  size = jnp.shape(h)[1]
  arguments.check_array(who, "h", h, (width, size), kind)
  want = (width, size) + (size,) * (jnp.ndim(transition) - 2)
  arguments.check_array(who, "transition", transition, want[:3], kind)
  arguments.check_array(who, "write", write, (width, size), kind)
  want = (width, size) if jnp.ndim(read) == 2 else (width, size, None)
  arguments.check_array(who, "read", read, want, kind)
  if kernel is not None:
    arguments.check_array(who, "kernel", kernel, (length, width))
  arguments.check_flags(who, length, reset, mask)


class Inputs(NamedTuple):
  u: jax.Array  # [T, D]
  reset: jax.Array | None
  mask: jax.Array | None


class Space(NamedTuple):
  a: jax.Array  # [D, N] or [D, N, N]
  b: jax.Array  # [D, N]
  c: jax.Array  # [D, R, N]


class Tables(NamedTuple):
  """What a chunk of C steps needs of A, B and C."""

  kernel: jax.Array  # [C, D, R]  C Aⁿ B
  write: jax.Array  # [C, D, N]  Aⁿ B
  read: jax.Array  # [C, D, R, N]  C Aⁿ⁺¹
  powers: tuple[jax.Array, ...]  # A, A², A⁴ … A^C


class Local(NamedTuple):
  y: jax.Array  # [C, D, R] what the chunk's own inputs give
  h: jax.Array  # [D, N] what they leave
  read: jax.Array  # [C, D, R, N] what reads the state before them
  powers: tuple[jax.Array, ...]
  count: jax.Array | None  # [] steps that are there; None: all
  cut: jax.Array | None  # bool [C] a reset came up to this step


def _rows(read):
  """C as [D, R, N]."""
  return read[:, None] if read.ndim == 2 else jnp.swapaxes(read, 1, 2)


def _apply(a, h):
  """A h: h [..., D, N]."""
  if a.ndim == 2:
    return a * h
  return jnp.einsum("dij,...dj->...di", a, h, precision="highest")


def _square(a):
  return a * a if a.ndim == 2 else jnp.matmul(a, a, precision="highest")


def _transpose(a):
  return a if a.ndim == 2 else jnp.swapaxes(a, 1, 2)


def _dot(subscripts, c, h):
  """The real part of a product of C and h, float32."""
  return jnp.real(jnp.einsum(subscripts, c, h, precision="highest"))


def _powers(a, count: int):
  """A, A², A⁴ … A^(2^count)."""
  out = [a]
  for _ in range(count):
    out.append(_square(out[-1]))
  return out


def _krylov(powers, x):
  """x, A x, A² x … of 2^len(powers) rows: x [..., D, N] -> [n, ..., D, N]."""
  out = x[None]
  for a in powers:
    out = jnp.concatenate([out, _apply(a, out)])
  return out


def _krylov_rows(powers, c):
  """C, C A, C A² …: c [D, R, N] -> [n, D, R, N]."""
  rows = _krylov([_transpose(a) for a in powers], jnp.swapaxes(c, 0, 1))
  return jnp.swapaxes(rows, 1, 2)


def _block(h, inputs: Inputs, space: Space):
  """Steps one after the other, with resets and masks."""

  def body(h, i):
    old = h
    if i.reset is not None:
      h = jnp.where(i.reset, 0, h)
    h = _apply(space.a, h) + space.b * i.u.astype(h.dtype)[:, None]
    if i.mask is not None:
      h = jnp.where(i.mask, h, old)
    return h, _dot("drn,dn->dr", space.c, h)

  return jax.lax.scan(body, h, inputs)


def _tables(space: Space, size: int) -> Tables:
  powers = _powers(space.a, size.bit_length() - 1)
  write = _krylov(powers[:-1], space.b)
  last = _apply(_transpose(space.a), jnp.swapaxes(space.c, 0, 1))
  return Tables(
    _dot("drn,cdn->cdr", space.c, write),
    write,
    _krylov_rows(powers[:-1], jnp.swapaxes(last, 0, 1)),
    tuple(powers),
  )


def _prepare(inputs: Inputs, tables: Tables) -> Local:
  u = inputs.u.astype(jnp.float32)
  size = u.shape[0]
  place = jnp.arange(1, size + 1)  # steps that are there, up to this one
  if inputs.mask is not None:
    place = jnp.cumsum(inputs.mask.astype(jnp.int32))
  met = chunk.lower(size)  # output i sees input j
  left = place[-1] - place  # steps that come after this one
  write, cut, bad = tables.write[left], None, None
  if inputs.reset is not None:
    segment = jnp.cumsum(inputs.reset.astype(jnp.int32))
    met &= segment[:, None] == segment
    cut = segment > 0
    write = jnp.where((segment == segment[-1])[:, None, None], write, 0)
    # What is not finite would cross the zeros of a reset: it is taken out, and
    # marks its own segment.
    bad = jnp.einsum(
      "ij,jd->id", met.astype(u.dtype), (~jnp.isfinite(u)).astype(u.dtype)
    )
    u = jnp.where(jnp.isfinite(u), u, 0)
  lag = jnp.maximum(place[:, None] - place, 0)
  weights = jnp.where(met[..., None, None], tables.kernel[lag], 0)
  y = jnp.einsum("ijdr,jd->idr", weights, u, precision="highest")
  h = jnp.einsum(
    "jdn,jd->dn", write, u.astype(write.dtype), precision="highest"
  )
  if bad is not None:
    y = jnp.where(bad[..., None] > 0, jnp.nan, y)
    h = jnp.where(bad[-1][:, None] > 0, jnp.nan, h)
  return Local(
    y,
    h,
    tables.read[jnp.maximum(place - 1, 0)],
    tables.powers,
    None if inputs.mask is None else place[-1],
    cut,
  )


def _advance(h, local: Local):
  if local.cut is not None:
    h = jnp.where(local.cut[-1], 0, h)
  if local.count is None:
    return _apply(local.powers[-1], h) + local.h
  return _power(local.powers, local.count, h) + local.h


def _power(powers, count, h):
  """A^count h, of a traced count."""
  for bit, a in enumerate(powers):
    h = jnp.where((count >> bit) & 1 == 1, _apply(a, h), h)
  return h


def power(transition, count: int, h):
  """A^count h: transition as in `state_space`, h [D, N]."""
  for a in _powers(transition, max(count.bit_length() - 1, 0)):
    h, count = _apply(a, h) if count & 1 else h, count >> 1
  return h


def _emit(h, local: Local):
  if local.cut is None:
    return local.y + _dot("cdrn,dn->cdr", local.read, h)
  cut = local.cut[:, None]
  good = jnp.isfinite(h).all(axis=1)
  y = _dot("cdrn,dn->cdr", local.read, jnp.where(good[:, None], h, 0))
  y = local.y + jnp.where(cut[..., None], 0, y)
  return jnp.where((cut | good)[..., None], y, jnp.nan)


FUNCTION = chunk.ChunkFunction(_prepare, _advance, _emit)


def _fft(h, inputs: Inputs, space: Space, kernel):
  if inputs.reset is not None:
    raise NotImplementedError(
      "a convolution over the whole sequence cannot reset; use 'scan' or "
      "'chunk', or one call for each document"
    )
  u, length = inputs.u.astype(jnp.float32), inputs.u.shape[0]
  count, target = length, None
  if inputs.mask is not None:
    # Steps that are there are moved together, and the outputs moved back.
    place = jnp.cumsum(inputs.mask.astype(jnp.int32))
    count = place[-1]
    target = jnp.where(inputs.mask, place - 1, length)
    u = jnp.zeros_like(u).at[target].set(u, mode="drop")
  # n = q S + s: powers of A up to S, and up to T / S of A^S.
  bits = max(length - 1, 0).bit_length()
  small = bits // 2
  powers = _powers(space.a, bits)
  high = _krylov_rows(powers[small:bits], space.c)
  high = high[: -(-length >> small)]

  def table(b):
    low = _krylov(powers[:small], b)
    y = _dot("qdrn,sdn->qsdr", high, low)
    return low, y.reshape((-1,) + y.shape[2:])[:length]

  low, own = table(space.b)
  kernel = own if kernel is None else kernel.astype(jnp.float32)[..., None]
  y = table(_apply(space.a, h))[1] + _convolve(u, kernel)
  if target is not None:
    y = y[jnp.minimum(target, length - 1)]
  # The state: inputs end with the last one that is there.
  u = jnp.roll(u, length - count, axis=0)
  rows, width = high.shape[0], low.shape[0]
  u = jnp.pad(u, ((rows * width - length, 0), (0, 0)))
  u = u.reshape(rows, width, -1)
  left = jnp.einsum(
    "qsd,sdn->qdn", u.astype(low.dtype), low[::-1], precision="highest"
  )
  last, _ = jax.lax.scan(
    lambda x, new: (_apply(powers[small], x) + new, None),
    jnp.zeros_like(h),
    left,
  )
  return _power(powers, jnp.asarray(count), h) + last, y


def _convolve(u, kernel):
  """Causal convolution of u [T, D] with kernel [T, D, R]: [T, D, R]."""
  length = u.shape[0]
  spectrum = lambda x: jnp.fft.rfft(x, n=2 * length, axis=0)
  product = spectrum(u)[..., None] * spectrum(kernel)
  return jnp.fft.irfft(product, n=2 * length, axis=0)[:length]


def _diagonal(h, inputs: Inputs, space: Space, form: str):
  if space.a.ndim != 2:
    raise NotImplementedError("this form is for a diagonal transition")
  length = inputs.u.shape[0]
  written = space.b * inputs.u.astype(h.dtype)[..., None]
  last, hs = linear_recurrence(
    h.ravel(),
    written.reshape(length, -1),
    decay=space.a.ravel(),
    reset=inputs.reset,
    mask=inputs.mask,
    implementation=form,
  )
  y = _dot("drn,tdn->tdr", space.c, hs.reshape((length,) + h.shape))
  return last.reshape(h.shape), y
