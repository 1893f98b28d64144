"""Test-time learning: a linear model that takes a gradient step a token.

  ℓ(W; k, v) = ½ ‖f(k; W) − v‖² ,  f(x; W) = LN(x W + b)  (+ x)

A mini-batch is n tokens. The gradients G_s of all of them are taken at the
weights W_0 at its start, and token t (the i-th of its mini-batch) reads after
the steps of those up to itself:

  W_t = W_0 − λ_i Σ_{s ≤ t} η_s G_s ,  o_t = f(q_t; W_t) ,  W_0 ← W_n at its end

with a rate η_s of the token that is learned and a rate λ_i of the place of the
token that reads. A mini-batch of one token is online gradient descent; without
layer norm it is the delta rule. Source: Sun et al. 2024, arXiv:2407.04620,
eq. 4 to 7 (mini-batch, dual form); layer norm and rates as in the authors'
code.

Where a mini-batch starts is part of the state: it is counted in tokens that
are there, from the last reset on.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.kernels.chunk_scan import Axes, chunk_scan
from memzoo.ops import arguments, chunk, decay, norm

EPS = 1e-6  # of the layer norm


class Model(NamedTuple):
  """The inner model's weights, or sums of its gradients."""

  w: jax.Array  # [K, V] float32
  b: jax.Array | None = None  # [V] float32


class State(NamedTuple):
  model: Model  # at the start of the mini-batch
  grads: Model  # Σ η_s G_s over the tokens of the mini-batch so far
  phase: jax.Array  # int32 [], their number: 0 … n − 1


class Learner(NamedTuple):
  """How the inner model learns. Shared by heads in `memzoo.ops.batched`."""

  rates: jax.Array  # [n]: λ_i; n is the size of the mini-batch
  norm_scale: jax.Array | None = None  # [V]; None for no layer norm
  norm_bias: jax.Array | None = None  # [V]


class Outputs(NamedTuple):
  o: jax.Array  # [T, V]
  loss: jax.Array  # [T] float32: ℓ(W_0; k_t, v_t), before its own step


def start(model: Model) -> State:
  """The state of a model that has seen no token."""
  grads = jax.tree.map(jnp.zeros_like, model)
  return State(model, grads, jnp.zeros((), jnp.int32))


def step(state: State, q, k, v, rate, learner: Learner, residual: bool = False):
  """One token: q, k [K], v [V], rate [] -> (state, Outputs(o [V], loss []))."""
  x, target = _task(k, v, residual)
  g, loss = _gradient(_predict(state.model, x, jnp.matmul), target, learner)
  new = Model(x[:, None] * g, None if state.model.b is None else g)
  rate = rate.astype(jnp.float32)
  grads = jax.tree.map(lambda s, n: s + rate * n, state.grads, new)
  model = _learned(state.model, learner.rates[state.phase], grads)
  q32 = q.astype(jnp.float32)
  o = _read(_predict(model, q32, jnp.matmul), q32, learner, residual)
  full = state.phase + 1 == learner.rates.shape[0]
  kept = State(state.model, grads, state.phase + 1)
  state = jax.tree.map(lambda a, b: jnp.where(full, a, b), start(model), kept)
  return state, Outputs(o.astype(v.dtype), loss[0])


def positions(
  phase: jax.Array,
  length: int,
  size: int,
  *,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
) -> jax.Array:
  """Each token's place in its mini-batch.

  Args:
    phase: int32 [], of the state.
    length: T.
    size: n, the size of a mini-batch.
    reset: bool [T] or None.
    mask: bool [T] or None.

  Returns:
    int32 [T], 0 … n − 1; where the mask is False, that of the next token.
  """
  if mask is None:
    before = jnp.arange(length, dtype=jnp.int32)
  else:
    before = jnp.cumsum(mask.astype(jnp.int32)) - mask.astype(jnp.int32)
  first = -phase
  if reset is not None:
    reset = reset if mask is None else reset & mask
    first = jax.lax.cummax(jnp.where(reset, before, -phase))
  return (before - first) % size


def gradient_step(
  state: State,
  q: axes.Queries,
  k: axes.Keys,
  v: axes.Values,
  *,
  rate: axes.Scalars,
  learner: Learner,
  residual: bool = False,
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: Model | None = None,
  implementation: str | None = None,
) -> tuple[State, Outputs]:
  """Test-time learning over one sequence of one head.

  Args:
    state: as `start` makes it, float32.
    q: [T, K], what the learned model is asked.
    k: [T, K], what it learns to map.
    v: [T, V], to what.
    rate: [T], η_t.
    learner: the rates λ [n] of the places in a mini-batch, and the layer norm.
    residual: f(x) = x + …; needs K = V.
    reset: bool [T]; True: the model is `fresh`, and a mini-batch starts.
    mask: bool [T]; False: no token t. It takes no place in a mini-batch.
    fresh: a model, zeros by default.
    implementation: 'scan' (the primal form), 'chunk' (the dual form, n tokens
      at a time), 'pallas' (the dual form as a kernel), or None.

  Returns:
    (state, Outputs(o [T, V] in v's dtype, loss float32 [T])), zero where the
    mask is False.

  Raises:
    ValueError: on wrong shapes or dtypes.
    NotImplementedError: on a form that does not exist.
  """
  _check(state, q, k, v, rate, learner, residual, reset, mask, fresh)
  if mask is not None and reset is not None:
    reset = reset & mask
  inputs = Inputs(q, k, v, rate, reset, mask)
  if fresh is None:
    fresh = jax.tree.map(jnp.zeros_like, state.model)
  fresh = jax.tree.map(lambda x: x.astype(jnp.float32), fresh)
  learner = jax.tree.map(lambda x: x.astype(jnp.float32), learner)
  forms = {
    "scan": lambda: arguments.scan_steps(
      lambda s, x: step(s, x.q, x.k, x.v, x.rate, learner, residual),
      state, inputs, start(fresh),
    ),
    "chunk": lambda: _dual(
      partial(chunk.run, columns=True), state, inputs, learner, residual, fresh
    ),
    "pallas": lambda: _dual(_kernel, state, inputs, learner, residual, fresh),
  }  # fmt: skip
  return dispatch.run("gradient_step", forms, implementation)


class Inputs(NamedTuple):
  q: jax.Array
  k: jax.Array
  v: jax.Array
  rate: jax.Array
  reset: jax.Array | None
  mask: jax.Array | None


def _dual(run, state, inputs: Inputs, learner, residual, fresh):
  """Mini-batches as chunks, by `chunk.run` or what is called like it."""
  size = learner.rates.shape[0]
  if inputs.reset is not None:
    body = partial(_chunk, residual=residual)
    state, outputs = run(body, state, inputs, (learner, fresh), chunk_size=size)
    return state, outputs._replace(loss=outputs.loss[:, 0])
  # Without resets the tokens are moved so that mini-batches are chunks: the
  # first token takes slot `phase`, and no slot is left empty in between.
  length, mask, phase = inputs.rate.shape[0], inputs.mask, state.phase
  slots = length + size - 1
  if mask is None:
    count = length
    place = lambda x: jax.lax.dynamic_update_slice_in_dim(
      jnp.zeros((slots, *x.shape[1:]), x.dtype), x, phase, 0
    )
    back = lambda y: jax.lax.dynamic_slice_in_dim(y, phase, length)
  else:
    rank = jnp.cumsum(mask.astype(jnp.int32))
    count = rank[-1]
    target = jnp.where(mask, phase + rank - 1, slots)
    place = lambda x: (
      jnp.zeros((slots, *x.shape[1:]), x.dtype).at[target].set(x, mode="drop")
    )
    back = lambda y: y.at[target].get(mode="fill", fill_value=0)
  index = jnp.arange(slots, dtype=jnp.int32)
  taken = (index >= phase) & (index < phase + count)
  moved = jax.tree.map(place, inputs._replace(mask=None))._replace(mask=taken)
  body = partial(_mini_batch, residual=residual)
  state, outputs = run(body, state, moved, learner, chunk_size=size)
  outputs = outputs._replace(loss=outputs.loss[:, 0])
  return state, jax.tree.map(back, outputs)


def _kernel(body, state, inputs, constants, *, chunk_size):
  if chunk_size < 16 or chunk_size & (chunk_size - 1):
    raise NotImplementedError(
      "the kernel takes mini-batches of a power of two from 16, "
      f"got {chunk_size}"
    )
  # What is normed is neither padded nor cut.
  model = Model("NN", "1N")
  learner = Learner("1C", "1N", "1N")
  axes = Axes(
    state=State(model, model, "11"),
    inputs=Inputs("CN", "CN", "CN", "C1", "C1", "C1"),
    constants=learner if isinstance(constants, Learner) else (learner, model),
    outputs=Outputs("CN", "C1"),
  )
  return chunk_scan(
    body, state, inputs, constants, axes=axes, chunk_size=chunk_size
  )


# What follows works on tiles (`chunk.as_tiles`, `chunk.as_columns`): biases and
# rates are rows [1, N], the phase is [1, 1], flags are float32 [C, 1].


def _mini_batch(state: State, inputs: Inputs, learner: Learner, *, residual):
  """A chunk that is one mini-batch, or the part of it that is there."""
  batch = learner.rates.shape[1]
  mm = partial(chunk.matmul, dtype=inputs.q.dtype)
  x, target = _task(inputs.k, inputs.v, residual)
  g, loss = _gradient(_predict(state.model, x, mm), target, learner)
  rate = chunk.where(inputs.mask, inputs.rate.astype(jnp.float32), 0.0)
  grads = _sums(rate, x, g, state.grads, mm)
  new = _learned(state.model, _last_rate(learner), grads)
  q = inputs.q.astype(jnp.float32)
  pairs = chunk.lower(inputs.rate.shape[0])
  own = _own_steps(pairs, rate, q, x, g, state.model, mm)
  z = _predict(state.model, q, mm) - chunk.column(learner.rates) * (
    _predict(state.grads, q, mm) + own
  )
  o = _read(z, q, learner, residual)
  total = state.phase + jnp.sum(inputs.mask, axis=0, keepdims=True)
  kept = State(state.model, grads, total)
  state = _pick((total == batch).astype(jnp.float32), _begin(new), kept)
  return state, _outputs(o, loss, inputs)


def _chunk(state: State, inputs: Inputs, constants, *, residual):
  """A chunk of at most n slots, with resets and gaps anywhere.

  Its tokens fall into pieces of one mini-batch each: (a) goes on with the one
  that came in, (b) starts where that one is full, with what it learned, and
  each reset starts one with the fresh model. None but (b) can follow a full
  mini-batch inside the chunk, so three starting models serve every token.
  """
  learner, fresh = constants
  size, batch = inputs.rate.shape[0], learner.rates.shape[1]
  mm = partial(chunk.matmul, dtype=inputs.q.dtype)
  bad, _, q, k, v, rate = decay.quarantine(
    inputs.reset, inputs.mask, None, inputs.q, inputs.k, inputs.v, inputs.rate
  )
  there = jnp.ones((size, 1), jnp.float32)
  there = there if inputs.mask is None else inputs.mask
  x, target = _task(k, v, residual)
  q, rate = q.astype(jnp.float32), rate.astype(jnp.float32)

  # Which tokens share a segment, and a piece.
  segment = decay.sums(chunk.lower(size), inputs.reset)
  live = (segment == 0).astype(jnp.float32)
  same = chunk.lower(size) & (segment == chunk.row(segment))
  # Tokens of the segment up to here.
  number = decay.sums(same, there) + live * state.phase
  later = (number > batch).astype(jnp.float32)
  first = live * (1.0 - later)
  rates = _rates_at(learner, number - batch * later - 1.0)

  # A state that is not finite is kept from the segments after a reset.
  spoiled = jnp.zeros((1, 1), jnp.float32)
  for s in jax.tree.leaves(state):
    spoiled = jnp.maximum(spoiled, decay.any_bad(s))
  model, old = jax.tree.map(
    lambda s: chunk.where(spoiled, 0.0, s), (state.model, state.grads)
  )
  poison = (decay.sums(same, bad) > 0).astype(jnp.float32)
  poison = jnp.maximum(poison, live * spoiled)

  def choose(a, b, c):
    return chunk.where(first, a, chunk.where(live, b, c))

  z = _predict(model, x, mm)
  g, _ = _gradient(z, target, learner)
  grads = _sums(first * rate, x, g, old, mm)
  second = _learned(model, _last_rate(learner), grads)
  z = choose(z, _predict(second, x, mm), _predict(fresh, x, mm))
  g, loss = _gradient(z, target, learner)

  pairs = same & (later == chunk.row(later))
  own = _own_steps(pairs, rate, q, x, g, model, mm)
  z = choose(
    _predict(model, q, mm) - rates * _predict(old, q, mm),
    _predict(second, q, mm),
    _predict(fresh, q, mm),
  )
  o = decay.spoil(_read(z - rates * own, q, learner, residual), poison)
  loss = decay.spoil(loss, poison)

  # The state at the end: that of the last piece.
  total, ends_live = chunk.last(number), chunk.last(live)
  in_first = ends_live * (total < batch).astype(jnp.float32)
  full = (1.0 - ends_live) * (total == batch).astype(jnp.float32)
  tail = (segment == chunk.last(segment)).astype(jnp.float32) * (1.0 - first)
  nothing = jax.tree.map(jnp.zeros_like, old)
  tail = _sums(tail * rate, x, g, nothing, mm)
  base = _pick(ends_live, second, fresh)
  done = _begin(_learned(base, _last_rate(learner), tail))
  phase = jnp.where(total >= batch, total - batch, total)
  new = _pick(full, done, State(base, tail, phase))
  new = _pick(in_first, State(model, grads, phase), new)
  nan = lambda s: chunk.where(chunk.last(poison), jnp.nan, s)
  new = State(*jax.tree.map(nan, (new.model, new.grads)), new.phase)
  return new, _outputs(o, loss, inputs)


def _begin(model: Model) -> State:
  grads = jax.tree.map(jnp.zeros_like, model)
  return State(model, grads, jnp.zeros((1, 1), jnp.float32))


def _pick(flag, a, b):
  return jax.tree.map(lambda x, y: chunk.where(flag, x, y), a, b)


def _rates_at(learner: Learner, place):
  """λ of places [C, 1] in a mini-batch."""
  shape = place.shape[0], learner.rates.shape[1]
  index = jax.lax.broadcasted_iota(jnp.int32, shape, 1).astype(jnp.float32)
  terms = jnp.where(index == jnp.maximum(place, 0.0), learner.rates, 0.0)
  return jnp.sum(terms, axis=1, keepdims=True)


def _last_rate(learner: Learner):
  last = jnp.full((1, 1), learner.rates.shape[1] - 1, jnp.float32)
  return _rates_at(learner, last)


def _outputs(o, loss, inputs: Inputs) -> Outputs:
  if inputs.mask is not None:
    o, loss = (chunk.where(inputs.mask, y, 0.0) for y in (o, loss))
  return Outputs(o.astype(inputs.v.dtype), loss)


def _task(k, v, residual):
  """What the model maps, to what: LN(k W + b) to v, or to v − k."""
  x, target = k.astype(jnp.float32), v.astype(jnp.float32)
  return x, target - x if residual else target


def _predict(model: Model, x, matmul):
  z = matmul(x, model.w)
  return z if model.b is None else z + model.b


def _read(z, q, learner: Learner, residual):
  if learner.norm_scale is not None:
    z = norm.layer_norm(z, learner.norm_scale, learner.norm_bias, EPS)
  return q + z if residual else z


def _gradient(z, target, learner: Learner):
  """(∂ℓ/∂z [..., V], ℓ [..., 1]) for ℓ = ½ ‖LN(z) − target‖²."""
  if learner.norm_scale is None:
    error = z - target
    return error, 0.5 * jnp.sum(jnp.square(error), axis=-1, keepdims=True)
  mean = partial(jnp.mean, axis=-1, keepdims=True)
  z = z - mean(z)
  inverse = jax.lax.rsqrt(mean(jnp.square(z)) + EPS)
  z = z * inverse
  error = z * learner.norm_scale + learner.norm_bias - target
  g = error * learner.norm_scale
  g = (g - mean(g) - z * mean(g * z)) * inverse
  return g, 0.5 * jnp.sum(jnp.square(error), axis=-1, keepdims=True)


def _sums(rate, x, g, grads: Model, mm) -> Model:
  """grads + Σ_s η_s G_s, with G_s = x_s g_sᵀ (and g_s of the bias)."""
  g = rate * g
  w, b = grads.w + mm(x.T, g), None
  if grads.b is not None:
    b = grads.b + jnp.sum(g, axis=0, keepdims=True)
  return Model(w, b)


def _own_steps(pairs, rate, q, x, g, model: Model, mm):
  """q_t Σ_s η_s G_s over the `pairs` (t, s) of the chunk: [C, V]."""
  scores = mm(q, x.T)
  if model.b is not None:
    scores += 1.0
  return mm(jnp.where(pairs, scores * chunk.row(rate), 0.0), g)


def _learned(model: Model, rate, grads: Model) -> Model:
  return jax.tree.map(lambda w, g: w - rate * g, model, grads)


def _check(state, q, k, v, rate, learner, residual, reset, mask, fresh):
  who = "gradient_step"
  arguments.check_matrix_op(
    who, state.model.w, q, k, v, reset=reset, mask=mask,
    fresh=None if fresh is None else fresh.w,
  )  # fmt: skip
  length, width = jnp.shape(q)
  values = jnp.shape(v)[1]
  if residual and width != values:
    raise ValueError(
      f"{who}: residual needs K = V, got K={width} and V={values}"
    )
  arguments.check_array(who, "rate", rate, (length,))
  arguments.check_array(who, "learner.rates", learner.rates, (None,))
  if learner.rates.shape[0] < 1:
    arguments.fail(who, "learner.rates", "of one rate or more", learner.rates)
  norms = learner.norm_scale, learner.norm_bias
  if (norms[0] is None) != (norms[1] is None):
    raise ValueError(
      f"{who}: learner.norm_scale and learner.norm_bias go together"
    )
  for what, x in zip(("norm_scale", "norm_bias"), norms):
    if x is not None:
      arguments.check_array(who, f"learner.{what}", x, (values,))
  arguments.check_array(who, "state.grads.w", state.grads.w, (width, values))
  parts = [("state.model.b", state.model.b), ("state.grads.b", state.grads.b)]
  if fresh is not None:
    parts.append(("fresh.b", fresh.b))
  for what, x in parts:
    if (x is None) != (state.model.b is None):
      raise ValueError(f"{who}: {what} and state.model.b go together")
    if x is not None:
      arguments.check_array(who, what, x, (values,))
  arguments.check_array(who, "state.phase", state.phase, (), jnp.integer)
