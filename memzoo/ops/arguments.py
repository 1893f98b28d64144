"""Checks of the arguments of ops, and the step loop that they share."""

import jax
import jax.numpy as jnp


def fail(who: str, what: str, want: str, got) -> None:
  raise ValueError(f"{who}: {what} must be {want}, got {describe(got)}")


def describe(x) -> str:
  """dtype and shape of an array, for messages."""
  return f"{jnp.result_type(x)} {tuple(jnp.shape(x))}"


def check_array(who: str, what: str, x, shape, kind=jnp.floating) -> None:
  """`ValueError` unless x has `shape` (None: any size) and a dtype of kind."""
  actual = jnp.shape(x)
  fits = len(actual) == len(shape) and all(
    w is None or w == a for w, a in zip(shape, actual)
  )
  if not fits or not jnp.issubdtype(jnp.result_type(x), kind):
    sizes = ", ".join("?" if n is None else str(n) for n in shape)
    fail(who, what, f"{kind.__name__} [{sizes}]", x)


def check_flags(who: str, length: int, reset, mask) -> None:
  for what, flags in (("reset", reset), ("mask", mask)):
    if flags is not None:
      check_array(who, what, flags, (length,), jnp.bool_)


def check_matrix_op(
  who, s, q, k, v, *, beta=None, log_decay=None, reset=None, mask=None,
  fresh=None,
):  # fmt: skip
  """The arguments of an op with a state [K, V] over one sequence."""
  if jnp.ndim(q) == 4:
    raise ValueError(
      f"{who}: q is {describe(q)}; the op takes one sequence of one head "
      "([T, K]): use memzoo.ops.batched for [B, T, H, K]"
    )
  if jnp.ndim(q) != 2:
    fail(who, "q", "floating [T, K]", q)
  length, width = jnp.shape(q)
  check_array(who, "q", q, (length, width))
  check_array(who, "k", k, (length, width))
  check_array(who, "v", v, (length, None))
  values = jnp.shape(v)[1]
  check_array(who, "s", s, (width, values))
  if jnp.result_type(s) != jnp.float32:
    fail(who, "s", f"float32 [{width}, {values}]", s)
  if not jnp.result_type(q) == jnp.result_type(k) == jnp.result_type(v):
    raise ValueError(
      f"{who}: q, k and v must have one dtype, got {describe(q)}, "
      f"{describe(k)}, {describe(v)}"
    )
  if beta is not None:
    check_array(who, "beta", beta, (length,))
  if log_decay is not None:
    want = (length,) if jnp.ndim(log_decay) == 1 else (length, width)
    check_array(who, "log_decay", log_decay, want)
  check_flags(who, length, reset, mask)
  if fresh is not None:
    check_array(who, "fresh", fresh, (width, values))


def scan_steps(step, state, inputs, fresh):
  """`lax.scan` of an op's step, with resets and masks.

  Args:
    step: (state, inputs of one step) -> (state, output).
    state: a pytree.
    inputs: a NamedTuple with fields `reset` and `mask` (bool [T] or None).
    fresh: the state after a reset, or None for zeros.
  """
  if fresh is None:
    fresh = jax.tree.map(jnp.zeros_like, state)
  fresh = jax.tree.map(lambda f, s: f.astype(s.dtype), fresh, state)
  if inputs.mask is not None:
    there = inputs.mask
    inputs = jax.tree.map(
      lambda x: jnp.where(
        there.reshape(there.shape + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x)
      ),
      inputs,
    )

  def body(state, x):
    old = state
    if x.reset is not None:
      state = jax.tree.map(lambda f, s: jnp.where(x.reset, f, s), fresh, state)
    state, y = step(state, x)
    if x.mask is not None:
      state = jax.tree.map(lambda n, o: jnp.where(x.mask, n, o), state, old)
      y = jax.tree.map(lambda y: jnp.where(x.mask, y, jnp.zeros_like(y)), y)
    return state, y

  return jax.lax.scan(body, state, inputs)


def check_positive(cell, *fields: str) -> None:
  """`ValueError` unless each field of a cell is a positive integer."""
  for field in fields:
    value = getattr(cell, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(
        f"{type(cell).__name__}: {field} must be a positive integer, got "
        f"{value!r}"
      )


def check_divides(cell, field: str, total: str) -> None:
  """`ValueError` unless the number in `field` divides the one in `total`."""
  part, whole = getattr(cell, field), getattr(cell, total)
  if whole % part:
    raise ValueError(
      f"{type(cell).__name__}: {field}={part} must divide {total}={whole}"
    )
