"""The contract: what a cell is, and `scan`, which runs one over a sequence.

A cell is a value: a frozen dataclass of hyper-parameters with pure functions
over plain pytrees, written for ONE sequence. `jax.vmap` batches it. An own
cell is a frozen dataclass that subclasses `Cell` and writes `init`,
`initial_state` and `step`; every test, form and model takes it from there.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from memzoo.core import dispatch
from memzoo.core.axes import Key, Mask, Params, Reset, State


class Cell(Protocol):
  """A memory over a stream of inputs.

  Class attributes that a cell sets where the default does not hold:

  Attributes:
    d_model: width of the input and of the output.
    implementations: the whole-sequence forms beside `'step'`.
    op: the op that carries the algebra; its row of the preference table
      orders the forms.
    reports: names of the per-token arrays that `observe` adds.
    causal: output t depends on inputs up to t alone.
    differentiable: gradients mean something in every float leaf.
    resettable: `reset` is served.
    convolutions: those of `implementations` that refuse a `reset`
      (NotImplementedError) and are causal up to rounding alone: Fourier
      transforms of the whole sequence.
  """

  d_model: int
  name: ClassVar[str] = ""
  implementations: ClassVar[tuple[str, ...]] = ()
  op: ClassVar[str] = ""
  reports: ClassVar[tuple[str, ...]] = ()
  causal: ClassVar[bool] = True
  differentiable: ClassVar[bool] = True
  resettable: ClassVar[bool] = True
  convolutions: ClassVar[tuple[str, ...]] = ()

  @property
  def x_spec(self) -> Any:
    """Shape and dtype of one input: a pytree of `jax.ShapeDtypeStruct`."""
    return jax.ShapeDtypeStruct((self.d_model,), jnp.float32)

  @property
  def y_spec(self) -> Any:
    """Shape and dtype of one output."""
    return jax.ShapeDtypeStruct((self.d_model,), jnp.float32)

  @property
  def max_length(self) -> int | None:
    """The most tokens a fresh state can take; None where there is no limit."""
    return None

  def init(self, key: Key) -> Params:
    """Draws parameters: a dict of real arrays. Untrained ones go under the
    key 'buffers'."""
    ...

  def initial_state(self, params: Params, key: Key | None = None) -> State:
    """The state before the first input. It may depend on learned `params`;
    `key` is for stochastic memories alone."""
    ...

  def fresh_state(self, params: Params, state: State) -> State:
    """The state after a reset that interrupts `state`. A stochastic memory
    draws its new key from the one in `state`."""
    del state
    return self.initial_state(params)

  def step(self, params: Params, state: State, x) -> tuple[State, Any]:
    """One input: the paper's equation. x [D] -> (state, y [D])."""
    return self.observe(params, state, x)[:2]

  def observe(self, params: Params, state: State, x):
    """`step` and its reports: (state, y, {name: array}). A cell that
    declares `reports` writes this one, and `step` follows."""
    state, y = self.step(params, state, x)
    return state, y, {}

  def parallel(
    self,
    params: Params,
    state: State,
    xs,
    reset: Reset | None,
    mask: Mask | None,
    implementation: str,
  ):
    """A whole sequence by one of `implementations`: xs [T, D] ->
    (state, ys [T, D]), or (state, ys, reports) where `reports` are declared.
    `scan` has checked the arguments, zeroed the inputs under `mask` and
    cleared `reset` there."""
    raise NotImplementedError(f"{type(self).__name__} has the step form alone")

  def refresh(self, params: Params, xs) -> Params:
    """Updates the untrained `buffers` of `params` from a batch xs [B, T, D];
    called by the trainer after a step."""
    del xs
    return params


def scan(
  cell: Cell,
  params: Params,
  state: State | None,
  xs,
  *,
  reset: Reset | None = None,
  mask: Mask | None = None,
  implementation: str | None = None,
  reports: bool = False,
):
  """Runs `cell` over one sequence.

  Args:
    cell: the memory.
    params: as `cell.init` made them.
    state: the state to go on from; None for `cell.initial_state(params)`.
    xs: [T, D], or what `cell.x_spec` says with a leading T.
    reset: bool [T]. True: the memory is fresh before input t (an episode
      starts, the next packed document starts).
    mask: bool [T]. False: there is no input t. The state passes untouched,
      y and the reports are zero, and a reset at t is not seen: it belongs on
      the first input that is there (`reset_from_segment_ids` puts it there).
    implementation: a form ('step', or one of `cell.implementations`), or None
      for the first that serves the call on this platform. A sequence of one
      token then takes 'step'.
    reports: also return what the cell declares in `Cell.reports`.

  Returns:
    (state, ys), or (state, ys, {name: [T, ...]}) with `reports`. Only the
    last state comes back. ys has the dtype of xs.

  Raises:
    ValueError: on arguments of wrong shape or dtype, a sequence longer than
      `cell.max_length`, a `reset` for a cell that is not `resettable`, or an
      unknown implementation.
    NotImplementedError: on a form that the cell does not have.
  """
  who = f"memzoo.scan({cell.name or type(cell).__name__})"
  length = _check_inputs(who, cell, xs)
  reset = check_flags(who, "reset", reset, length)
  mask = check_flags(who, "mask", mask, length)
  if cell.max_length is not None and length > cell.max_length:
    raise ValueError(
      f"{who}: got {length} inputs, holds at most {cell.max_length}; make the "
      "cell with a larger capacity, or let it slide"
    )
  if reset is not None and not cell.resettable:
    raise ValueError(f"{who}: this memory cannot reset; got reset=")
  if state is None:
    state = cell.initial_state(params)
  if mask is not None:
    xs = jax.tree.map(lambda x: where(mask, x, jnp.zeros_like(x)), xs)
    reset = None if reset is None else reset & mask
  forms = {"step": lambda: _step(cell, params, state, xs, reset, mask)}
  for form in cell.implementations:
    forms[form] = lambda form=form: _parallel(
      cell, params, state, xs, reset, mask, form
    )
  if implementation is None and length <= 1:
    implementation = "step"
  out = dispatch.run(
    cell.name or type(cell).__name__, forms, implementation, op=cell.op
  )
  return out if reports else out[:2]


def _step(cell, params, state, xs, reset, mask):
  def body(state, inputs):
    x, reset_t, mask_t = inputs
    old = state
    if reset_t is not None:
      fresh = cell.fresh_state(params, state)
      state = jax.tree.map(lambda f, s: jnp.where(reset_t, f, s), fresh, state)
    state, y, report = cell.observe(params, state, x)
    if mask_t is not None:
      state, y, report = jax.tree.map(
        lambda new, kept: jnp.where(mask_t, new, kept),
        (state, y, report),
        (old, *jax.tree.map(jnp.zeros_like, (y, report))),
      )
    return state, (y, report)

  state, (ys, report) = jax.lax.scan(body, state, (xs, reset, mask))
  return state, ys, report


def _parallel(cell, params, state, xs, reset, mask, form):
  out = cell.parallel(params, state, xs, reset, mask, form)
  state, ys, report = out if len(out) == 3 else (*out, {})
  if mask is not None:
    ys, report = jax.tree.map(
      lambda y: where(mask, y, jnp.zeros_like(y)), (ys, report)
    )
  return state, ys, report


def where(flags, a, b):
  """`jnp.where` with flags [T] against arrays [T, ...]."""
  return jnp.where(flags.reshape(flags.shape + (1,) * (a.ndim - 1)), a, b)


def _check_inputs(who, cell, xs) -> int:
  spec_leaves, spec_tree = jax.tree.flatten(cell.x_spec)
  leaves, tree = jax.tree.flatten(xs)
  if tree != spec_tree:
    raise ValueError(f"{who}: xs is {tree}, expected {spec_tree}")
  length = None
  for x, spec in zip(leaves, spec_leaves):
    shape, want = jnp.shape(x), spec.shape
    if len(shape) != len(want) + 1 or shape[1:] != want:
      hint = ""
      if len(shape) == len(want) + 2 and shape[2:] == want:
        hint = "; a cell takes one sequence: batch it with jax.vmap"
      raise ValueError(
        f"{who}: xs must be [T, {', '.join(map(str, want))}], got {shape}{hint}"
      )
    for kind in (jnp.floating, jnp.integer, jnp.bool_):
      if jnp.issubdtype(spec.dtype, kind) != jnp.issubdtype(
        jnp.result_type(x), kind
      ):
        raise ValueError(
          f"{who}: xs must be of a dtype like {spec.dtype}, got "
          f"{jnp.result_type(x)}"
        )
    if length not in (None, shape[0]):
      raise ValueError(f"{who}: xs leaves differ in length: {length}, {shape}")
    length = shape[0]
  return length


def check_flags(who: str, what: str, flags, length: int):
  """`flags` as bool [T], or None; `ValueError` on another shape or dtype."""
  if flags is None:
    return None
  if jnp.shape(flags) != (length,) or jnp.result_type(flags) != jnp.bool_:
    raise ValueError(
      f"{who}: {what} must be bool [{length}], got "
      f"{jnp.result_type(flags)} {jnp.shape(flags)}"
    )
  return jnp.asarray(flags)


def state_size(cell: Cell) -> int:
  """Floats held between two tokens, for one sequence.

  Complex numbers count twice; integers, flags and keys do not count. The axis
  on which memories are compared.
  """
  return sum(
    leaf.size * (2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1)
    for leaf in jax.tree.leaves(_state_spec(cell))
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  )


def state_bytes(cell: Cell) -> int:
  """Bytes held between two tokens, for one sequence, everything counted."""
  return sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(_state_spec(cell))
  )


def param_count(cell: Cell) -> int:
  """Numbers in the cell's parameters, `buffers` among them."""
  params = jax.eval_shape(cell.init, jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def step_flops(cell: Cell) -> float:
  """Floating-point operations of one step, as XLA counts them."""
  params = jax.eval_shape(cell.init, jax.random.key(0))
  lowered = jax.jit(cell.step).lower(params, _state_spec(cell), cell.x_spec)
  return float(lowered.cost_analysis().get("flops", 0.0))


def _state_spec(cell):
  return jax.eval_shape(
    lambda key: cell.initial_state(cell.init(key), key), jax.random.key(0)
  )


def reset_from_done(done: jax.Array) -> jax.Array:
  """Resets from episode ends: `done[t]` True means that input t was the last.

  Args:
    done: bool [..., T].

  Returns:
    bool [..., T]: True at the input after each end. Whether the first input
    starts an episode is the caller's to say: by a fresh state, as everywhere.
  """
  done = jnp.asarray(done)
  first = jnp.zeros_like(done[..., :1])
  return jnp.concatenate([first, done[..., :-1]], axis=-1)


def reset_from_segment_ids(
  segment_ids: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
  """Resets from the segment ids of packed sequences.

  Args:
    segment_ids: int [..., T]; a new id starts a new document.
    mask: bool [..., T]; where False the id is that of padding and is not
      read: the next document's reset falls on its first real input, also
      where padding stands between two parts of one document.

  Returns:
    bool [..., T], False at the first input (the state given to `scan` is what
    the first document starts from).
  """
  ids = jnp.asarray(segment_ids)
  if mask is None:
    change = ids[..., 1:] != ids[..., :-1]
    first = jnp.zeros(ids.shape[:-1] + (1,), bool)
    return jnp.concatenate([first, change], axis=-1)
  mask = jnp.asarray(mask)
  # The position of the last real input before t, or −1.
  where_real = jnp.where(mask, jnp.arange(ids.shape[-1]), -1)
  last = jax.lax.cummax(where_real, axis=where_real.ndim - 1)
  before = jnp.concatenate(
    [jnp.full(ids.shape[:-1] + (1,), -1, last.dtype), last[..., :-1]], axis=-1
  )
  previous = jnp.take_along_axis(ids, jnp.maximum(before, 0), axis=-1)
  return mask & (before >= 0) & (ids != previous)


def reset_from_cu_seqlens(cu_seqlens: jax.Array, length: int) -> jax.Array:
  """Resets from cumulative lengths, as varlen attention kernels take them.

  Args:
    cu_seqlens: int [n + 1]: 0, then the end of each packed sequence.
    length: T, static.

  Returns:
    bool [T], True at the start of every sequence but the first.
  """
  starts = jnp.asarray(cu_seqlens)[1:-1]
  return jnp.zeros((length,), bool).at[starts].set(True, mode="drop")


def options(cell: Cell) -> dict[str, Any]:
  """The fields of a cell, by name."""
  return {f.name: getattr(cell, f.name) for f in dataclasses.fields(cell)}
