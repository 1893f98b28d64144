"""Test-time learning: a deep memory whose weights learn keys and values.

  ℓ(M; k, v) = ½ ‖f(k; M) − v‖² ,  f(x; M) = LN(MLP(x)) (+ x), LN optional

The state is the weights M of an MLP of one to four layers. A mini-batch is n
tokens; the gradients G_s of all of them are taken at the weights M_{t'} at its
start, while momentum and forgetting go on from token to token, and token t
(the i-th of its mini-batch) reads after its own step:

  S_t = η_t S_{t−1} − θ_t G_t ,  M_t = (1 − α_t) M_{t−1} + S_t
  o_t = f(q_t; M_t)      or   f(q_t; M_{t'} + λ_i (M_t − M_{t'}))

With rates λ_i of the place that reads (and no momentum, no forgetting) this is
TTT's rule, and the next mini-batch starts from what its last token read; with
none it is that of Titans. n = 1 is the exact rule, one gradient a token at the
weights before it.

The dual form takes a mini-batch at a time. A layer's gradient is x_s g_sᵀ, of
the layer's input x_s and the gradient g_s of what it gives, so the weights
that token t reads are a_t M + c_t S − Σ_s A_ts θ_s x_s g_sᵀ with numbers that
come from the gates alone. What they give for a query takes [C, C] scores a
layer: the weights of single tokens are never made, at any depth. A chunk holds
x and g of every layer, [C, N] each, and A, [C, C]; the backward keeps the
states at the chunks' boundaries and recomputes the rest.

Sources: Behrouz, Zhong, Mirrokni 2024, arXiv:2501.00663, eq. 8 to 18; Sun et
al. 2024, arXiv:2407.04620, eq. 4 to 7 and the dual form of appendix A.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.ops import arguments, chunk, decay
from memzoo.ops.gradient_step import (
  Learner,
  Model as Layer,  # w [N, M] float32, b [M] float32 or None
  _gradient,
  _last_rate,
  _pick,
  _predict,
  _rates_at,
  _read,
  _sums,
  _task,
)


def _geglu(z):
  """gelu(a) ⊙ b of the halves of z [..., 2N]: [..., N]."""
  a, b = jnp.split(z, 2, axis=-1)
  return jax.nn.gelu(a) * b


ACTIVATIONS = {
  "gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu,
  "geglu": _geglu,
}  # fmt: skip
MAX_DEPTH = 4
NO_NORM = Learner(None)

Model = tuple[Layer, ...]  # the layers, the first to meet the key first


class State(NamedTuple):
  model: Model  # M_t
  anchor: Model | None  # M_{t'}, the mini-batch's start; None where n = 1
  momentum: Model | None  # S_t; None without momentum
  phase: jax.Array  # int32 [], tokens of the mini-batch so far: 0 … n − 1


class Outputs(NamedTuple):
  o: jax.Array  # [T, V]
  loss: jax.Array  # [T] float32: ℓ(M_{t'}; k_t, v_t), before its own step
  surprise: jax.Array  # [T] float32: ‖G_t‖, the norm over all weights


def start(model: Model, *, size: int, momentum: bool = False) -> State:
  """The state of a memory that has seen no token.

  Args:
    model: float32 weights.
    size: n, the size of a mini-batch.
    momentum: whether the rule has a momentum.
  """
  model = tuple(model)
  zeros = jax.tree.map(jnp.zeros_like, model) if momentum else None
  anchor = model if size > 1 else None
  return State(model, anchor, zeros, jnp.zeros((), jnp.int32))


def read(
  model: Model,
  q,
  *,
  learner: Learner = NO_NORM,
  residual: bool = False,
  activation: str = "gelu",
):
  """f(q; M), nothing learned: q [..., K] -> [..., V], in q's dtype."""
  mm = partial(chunk.matmul, dtype=q.dtype)
  x = q.astype(jnp.float32)
  z = _apply(model, x, ACTIVATIONS[activation], mm)
  return _read(z, x, learner, residual).astype(q.dtype)


def step(
  state: State,
  q,
  k,
  v,
  rate,
  log_decay=None,
  log_momentum=None,
  *,
  size: int,
  learner: Learner = NO_NORM,
  residual: bool = False,
  activation: str = "gelu",
):
  """One token: q, k [K], v [V]; rate, log_decay, log_momentum [] or [L], one a
  layer -> (state, Outputs(o [V], loss [], surprise []))."""
  act, depth = ACTIVATIONS[activation], len(state.model)
  anchor = state.model if state.anchor is None else state.anchor
  x, target = _task(k, v, residual)
  criterion = partial(_gradient, learner=learner)
  xs, gs, loss = _backward(
    *_maps(anchor, jnp.matmul), depth, x, target, criterion, act
  )
  model, momentum = [], []
  for n in range(depth):
    eta = _of_layer(rate, n).astype(jnp.float32)
    change = Layer(
      -eta * xs[n][:, None] * gs[n],
      None if state.model[n].b is None else -eta * gs[n],
    )
    if log_momentum is not None:
      keep = jnp.exp(_of_layer(log_momentum, n).astype(jnp.float32))
      change = _mixed(keep, state.momentum[n], 1.0, change)
      momentum.append(change)
    keep = 1.0
    if log_decay is not None:
      keep = jnp.exp(_of_layer(log_decay, n).astype(jnp.float32))
    model.append(_mixed(keep, state.model[n], 1.0, change))
  model, momentum = tuple(model), tuple(momentum) or None
  place = None if learner.rates is None else learner.rates[state.phase]
  learned = _rebased(anchor, model, place)
  q32 = q.astype(jnp.float32)
  o = _read(_apply(learned, q32, act, jnp.matmul), q32, learner, residual)
  done = start(learned, size=size)._replace(momentum=momentum)
  if size > 1:
    kept = State(model, state.anchor, momentum, state.phase + 1)
    full = state.phase + 1 == size
    done = jax.tree.map(lambda a, b: jnp.where(full, a, b), done, kept)
  surprise = _norm(state.model, xs, gs)[0]
  return done, Outputs(o.astype(v.dtype), loss[0], surprise)


def deep_gradient_step(
  state: State,
  q: axes.Queries,
  k: axes.Keys,
  v: axes.Values,
  *,
  rate: jax.Array,
  size: int,
  log_decay: jax.Array | None = None,
  log_momentum: jax.Array | None = None,
  learner: Learner = NO_NORM,
  residual: bool = False,
  activation: str = "gelu",
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: Model | None = None,
  implementation: str | None = None,
) -> tuple[State, Outputs]:
  """Test-time learning of a deep memory over one sequence of one head.

  Args:
    state: as `start` makes it, float32, for this n and this rule.
    q: [T, K], what the memory is asked.
    k: [T, K], what it learns to map.
    v: [T, V], to what.
    rate: θ, [T], or [T, L] for one a layer.
    size: n, the tokens of a mini-batch; static. 1 is the exact rule.
    log_decay: log(1 − α), [T] or [T, L], or None for no forgetting. At most 0;
      −inf clears the memory.
    log_momentum: log η, [T] or [T, L], or None for no momentum. At most 0;
      −inf drops what came before.
    learner: the rates λ [n] of the places in a mini-batch (None: all are 1),
      and the layer norm (None: there is none).
    residual: f(x) = x + …; needs K = V.
    activation: between layers: 'gelu', 'relu', 'silu', or 'geglu', gelu of one
      half of a layer's units times the other.
    reset: bool [T]; True: the memory is `fresh`, without momentum, and a
      mini-batch starts.
    mask: bool [T]; False: no token t. It takes no place in a mini-batch.
    fresh: weights, zeros by default.
    implementation: 'scan' (the primal form), 'chunk' (the dual form, n tokens
      at a time), or None.

  Returns:
    (state, Outputs(o [T, V] in v's dtype, loss and surprise float32 [T])),
    zero where the mask is False.

  Raises:
    ValueError: on wrong shapes or dtypes, or an unknown activation.
    NotImplementedError: on a form that does not exist, and for 'chunk' where
      n = 1: each gradient then waits for the step before.
  """
  gates = dict(rate=rate, log_decay=log_decay, log_momentum=log_momentum)
  _check(
    state, q, k, v, gates, size, learner, residual, activation, reset, mask,
    fresh,
  )  # fmt: skip
  if mask is not None and reset is not None:
    reset = reset & mask
  inputs = Inputs(q, k, v, rate, log_decay, log_momentum, reset, mask)
  if fresh is None:
    fresh = jax.tree.map(jnp.zeros_like, state.model)
  single = lambda x: jnp.asarray(x).astype(jnp.float32)
  fresh, learner = jax.tree.map(single, (tuple(fresh), learner))
  options = dict(size=size, residual=residual, activation=activation)

  def scan():
    one = lambda s, x: step(s, *x[:6], learner=learner, **options)
    begin = start(fresh, size=size, momentum=state.momentum is not None)
    return arguments.scan_steps(one, state, inputs, begin)

  forms = {
    "scan": scan,
    "chunk": lambda: _dual(state, inputs, learner, fresh, **options),
  }
  return dispatch.run("deep_gradient_step", forms, implementation)


class Inputs(NamedTuple):
  q: jax.Array
  k: jax.Array
  v: jax.Array
  rate: jax.Array
  log_decay: jax.Array | None
  log_momentum: jax.Array | None
  reset: jax.Array | None
  mask: jax.Array | None


def _dual(state, inputs: Inputs, learner, fresh, *, size, **options):
  """Mini-batches as chunks."""
  if size == 1:
    raise NotImplementedError(
      "mini-batches of one token follow one another: there is no chunk of them"
    )
  options["size"] = size
  columns = lambda body, inputs, constants: chunk.run(
    partial(body, **options), state, inputs, constants, chunk_size=size,
    columns=True,
  )  # fmt: skip
  back = lambda y: y
  if inputs.reset is not None:
    state, outputs = columns(_chunk, inputs, (learner, fresh))
  else:
    inputs, back = aligned(inputs, state.phase, size)
    state, outputs = columns(_mini_batch, inputs, learner)
  flat = [y[:, 0] for y in (outputs.loss, outputs.surprise)]
  return state, jax.tree.map(back, Outputs(outputs.o, *flat))


def aligned(inputs, phase: jax.Array, size: int):
  """Tokens moved so that runs of `size` of them are chunks.

  The first takes slot `phase`, and no slot is left empty in between.

  Args:
    inputs: a NamedTuple of leaves [T, ...], one of them `mask`: bool or None.
    phase: int32 [], tokens of the first run that came before: 0 … size − 1.
    size: of a run; static.

  Returns:
    (inputs with leaves [T + size − 1, ...] and a mask, a function that moves
    an output [T + size − 1, ...] back to [T, ...], zero where there was none).
  """
  mask, length = inputs.mask, jax.tree.leaves(inputs)[0].shape[0]
  slots, count = length + size - 1, length
  empty = lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype)
  if mask is None:
    place = lambda x: jax.lax.dynamic_update_slice_in_dim(empty(x), x, phase, 0)
    back = lambda y: jax.lax.dynamic_slice_in_dim(y, phase, length)
  else:
    rank = jnp.cumsum(mask.astype(jnp.int32))
    count = rank[-1]
    target = jnp.where(mask, phase + rank - 1, slots)
    place = lambda x: empty(x).at[target].set(x, mode="drop")
    back = lambda y: y.at[target].get(mode="fill", fill_value=0)
  index = jnp.arange(slots, dtype=jnp.int32)
  taken = (index >= phase) & (index < phase + count)
  moved = jax.tree.map(place, inputs._replace(mask=None))
  return moved._replace(mask=taken), back


# What follows works on tiles (`chunk.as_tiles`, `chunk.as_columns`): biases and
# rates of places are rows [1, N], the phase is [1, 1], gates are [C, 1] or
# [C, L], flags are float32 [C, 1].


class Weights(NamedTuple):
  """What M_t and S_t are made of, for each t of a chunk ([C, ·]) or for one of
  them: tokens are then [C, 1], and the other numbers [1, 1]."""

  tokens: jax.Array  # [C, C]  of −θ_s G_s in M_t
  model: jax.Array  # [C, 1]  of the M that the piece starts from
  momentum: jax.Array | None  # [C, 1]  of the S that it starts from
  s_tokens: jax.Array | None  # [C, C]  of −θ_s G_s in S_t
  s_momentum: jax.Array | None  # [C, 1]  of S in S_t


def _weights(log_decay, log_momentum, cut, mask, size):
  """Those of every token, and of the chunk's end.

  M_t = d_t M + Σ_{j ≤ t} D_tj S_j and S_j = e_j S − Σ_{s ≤ j} E_js θ_s G_s,
  where D and E are products of 1 − α and of η over (j, t] and (s, j], d and e
  those from the start of the piece, and `cut` starts a piece.
  """
  d = decay.decays(log_decay, cut, mask, None, size)
  if log_momentum is None:
    every = Weights(d.factor, d.into, None, None, None)
    return every, Weights(d.onto, chunk.last(d.into), None, None, None)
  e = decay.decays(log_momentum, cut, mask, None, size)
  total = lambda x: jnp.sum(x, axis=0, keepdims=True)
  every = Weights(
    tokens=chunk.matmul(d.factor, e.factor),
    model=d.into,
    momentum=jnp.sum(d.factor * chunk.row(e.into), axis=1, keepdims=True),
    s_tokens=e.factor,
    s_momentum=e.into,
  )
  end = Weights(
    tokens=chunk.column(total(d.onto * e.factor)),
    model=chunk.last(d.into),
    momentum=total(d.onto * e.into),
    s_tokens=e.onto,
    s_momentum=chunk.last(e.into),
  )
  return every, end


def _at(every: Weights, flag) -> Weights:
  """Those of the one token that `flag` [C, 1] marks; zero where there is
  none."""

  def pick(x):
    x = jnp.sum(flag * x, axis=0, keepdims=True)
    return chunk.column(x) if x.shape[1] > 1 else x

  return jax.tree.map(pick, every)


def _arrive(weights, model, momentum, xs, gs, rate, mm):
  """M and S where `weights` (of one token, a layer each) say."""
  new, moved = [], []
  for n, w in enumerate(weights):
    eta = _column_of(rate, n)
    base = jax.tree.map(lambda m, w=w: w.model * m, model[n])
    if momentum is not None:
      base = _mixed(1.0, base, w.momentum, momentum[n])
      kept = jax.tree.map(lambda s, w=w: w.s_momentum * s, momentum[n])
      moved.append(_sums(-w.s_tokens * eta, xs[n], gs[n], kept, mm))
    new.append(_sums(-w.tokens * eta, xs[n], gs[n], base, mm))
  return tuple(new), tuple(moved) or None


def _answer(base, weights, xs, gs, rate, rates, q, biased, act, mm):
  """What tokens read of the weights of their own: [C, V].

  Args:
    base: (layer, input [C, N]) -> (what the piece's M and S give, with each
      token's weights, and what its anchor gives, or None).
    weights: of every token, a layer each.
    xs: inputs of the layers.
    gs: gradients of what they give.
    rate: θ.
    rates: λ of each token [C, 1], or None.
    q: [C, K].
    biased: whether each layer has a bias.
    act: the activation.
    mm: the matmul.
  """
  for n, w in enumerate(weights):
    x = act(z) if n else q
    scores = mm(x, xs[n].T) + (1.0 if biased[n] else 0.0)
    scores = scores * w.tokens * chunk.row(_column_of(rate, n))
    z, anchor = base(n, x)
    z = z - mm(scores, gs[n])
    if rates is not None:
      z = anchor + rates * (z - anchor)
  return z


def _mini_batch(
  state: State, inputs: Inputs, learner: Learner, *, size, residual, activation
):
  """A chunk that is one mini-batch, or the part of it that is there."""
  act, depth = ACTIVATIONS[activation], len(state.model)
  mm = partial(chunk.matmul, dtype=inputs.q.dtype)
  slots = inputs.q.shape[0]
  x, target = _task(inputs.k, inputs.v, residual)
  criterion = partial(_gradient, learner=learner)
  xs, gs, loss = _backward(
    *_maps(state.anchor, mm), depth, x, target, criterion, act
  )
  rate = chunk.where(inputs.mask, inputs.rate.astype(jnp.float32), 0.0)
  every, end = _of_layers(
    depth, inputs.log_decay, inputs.log_momentum, None, inputs.mask, slots
  )

  def base(n, x):
    z = every[n].model * _predict(state.model[n], x, mm)
    if state.momentum is not None:
      z += every[n].momentum * _predict(state.momentum[n], x, mm)
    if learner.rates is None:
      return z, None
    return z, _predict(state.anchor[n], x, mm)

  q = inputs.q.astype(jnp.float32)
  rates = None if learner.rates is None else chunk.column(learner.rates)
  biased = [layer.b is not None for layer in state.model]
  z = _answer(base, every, xs, gs, rate, rates, q, biased, act, mm)
  o = _read(z, q, learner, residual)
  model, momentum = _arrive(end, state.model, state.momentum, xs, gs, rate, mm)
  total = state.phase + jnp.sum(inputs.mask, axis=0, keepdims=True)
  learned = _rebased(state.anchor, model, _final_rate(learner))
  done = State(learned, learned, momentum, jnp.zeros_like(total))
  kept = State(model, state.anchor, momentum, total)
  full = (total == size).astype(jnp.float32)
  surprise = _norm(state.model, xs, gs)
  return _pick(full, done, kept), _outputs(o, loss, surprise, inputs)


def _chunk(
  state: State, inputs: Inputs, constants, *, size, residual, activation
):
  """A chunk of at most n slots, with resets and gaps anywhere.

  Its tokens fall into pieces of one mini-batch each: (a) goes on with the one
  that came in, (b) starts where that one is full, with what it learned, and
  each reset starts one with the fresh memory. None but (b) can follow a full
  mini-batch inside the chunk, so three starting models serve every token.
  """
  learner, fresh = constants
  act, depth, slots = ACTIVATIONS[activation], len(fresh), inputs.q.shape[0]
  mm = partial(chunk.matmul, dtype=inputs.q.dtype)
  kept = inputs.log_momentum
  if kept is not None:  # −inf is no fault
    kept = jnp.maximum(kept.astype(jnp.float32), decay.FLOOR)
  bad, log_decay, q, k, v, rate, log_momentum = decay.quarantine(
    inputs.reset, inputs.mask, inputs.log_decay, inputs.q, inputs.k, inputs.v,
    inputs.rate, kept,
  )  # fmt: skip
  there = jnp.ones((slots, 1), jnp.float32)
  there = there if inputs.mask is None else inputs.mask
  x, target = _task(k, v, residual)
  q, rate = q.astype(jnp.float32), rate.astype(jnp.float32)
  rate = chunk.where(there, rate, 0.0)

  # Which tokens share a segment, and a piece.
  segment = decay.sums(chunk.lower(slots), inputs.reset)
  live = (segment == 0).astype(jnp.float32)
  same = chunk.lower(slots) & (segment == chunk.row(segment))
  # Tokens of the segment up to here.
  number = decay.sums(same, there) + live * state.phase
  later = live * (number > size).astype(jnp.float32)
  first = live * (1.0 - later)
  filled = live * there * (number == size).astype(jnp.float32)
  begins = live * there * (number == size + 1).astype(jnp.float32)
  every, end = _of_layers(
    depth, log_decay, log_momentum, jnp.maximum(inputs.reset, begins),
    inputs.mask, slots,
  )  # fmt: skip

  # A state that is not finite is kept from the segments after a reset.
  spoiled = jnp.zeros((1, 1), jnp.float32)
  for s in jax.tree.leaves(state):
    spoiled = jnp.maximum(spoiled, decay.any_bad(s))
  model, anchor, momentum = jax.tree.map(
    lambda s: chunk.where(spoiled, 0.0, s), state[:3]
  )
  poison = (decay.sums(same, bad) > 0).astype(jnp.float32)
  poison = jnp.maximum(poison, live * spoiled)

  def choose(a, b, c):
    return chunk.where(first, a, chunk.where(live, b, c))

  # What (a) has learned where it is full.
  criterion = partial(_gradient, learner=learner)
  xs, gs, _ = _backward(*_maps(anchor, mm), depth, x, target, criterion, act)
  arrival = [_at(w, filled) for w in every]
  second, past = _arrive(arrival, model, momentum, xs, gs, first * rate, mm)
  second = _rebased(anchor, second, _final_rate(learner))

  # Every token's gradient at the start of its own piece, and what it reads.
  starts = anchor, second, fresh
  predict = lambda models, n, x: [_predict(m[n], x, mm) for m in models]
  xs, gs, loss = _backward(
    lambda n, x: choose(*predict(starts, n, x)),
    lambda n, g: choose(*(mm(g, m[n].w.T) for m in starts)),
    depth, x, target, criterion, act,
  )  # fmt: skip

  def base(n, x):
    mine, second_z, fresh_z = predict((model, second, fresh), n, x)
    z = every[n].model * choose(mine, second_z, fresh_z)
    if momentum is not None:
      mine, again = predict((momentum, past), n, x)
      z += every[n].momentum * choose(mine, again, 0.0)
    if learner.rates is None:
      return z, None
    return z, choose(_predict(anchor[n], x, mm), second_z, fresh_z)

  rates = None
  if learner.rates is not None:
    rates = _rates_at(learner, number - size * later - 1.0)
  biased = [layer.b is not None for layer in fresh]
  z = _answer(base, every, xs, gs, rate, rates, q, biased, act, mm)
  o = decay.spoil(_read(z, q, learner, residual), poison)
  loss = decay.spoil(loss, poison)
  surprise = decay.spoil(_norm(fresh, xs, gs), poison)

  # The state at the end: that of the last piece.
  total, ends_live = chunk.last(number), chunk.last(live)
  in_first = ends_live * (total < size).astype(jnp.float32)
  just = ends_live * (total == size).astype(jnp.float32)
  full = (1.0 - ends_live) * (total == size).astype(jnp.float32)
  started = _pick(ends_live, second, fresh)
  if momentum is not None:
    none = jax.tree.map(jnp.zeros_like, momentum)
    moving = _pick(in_first, momentum, _pick(ends_live, past, none))
  else:
    moving = None
  origin = _pick(in_first, model, started)
  new, moved = _arrive(end, origin, moving, xs, gs, rate, mm)
  new, moved = _pick(just, (second, past), (new, moved))
  learned = _rebased(fresh, new, _final_rate(learner))
  started = _pick(full, learned, _pick(in_first, anchor, started))
  new = _pick(full, learned, new)
  nan = lambda s: chunk.where(chunk.last(poison), jnp.nan, s)
  tensors = jax.tree.map(nan, (new, started, moved))
  phase = jnp.where(total >= size, total - size, total)
  return State(*tensors, phase), _outputs(o, loss, surprise, inputs)


def _outputs(o, loss, surprise, inputs: Inputs) -> Outputs:
  out = o, loss, surprise
  if inputs.mask is not None:
    out = [chunk.where(inputs.mask, y, 0.0) for y in out]
  return Outputs(out[0].astype(inputs.v.dtype), *out[1:])


def _of_layers(depth, log_decay, log_momentum, cut, mask, slots):
  """`_weights` of each layer: (of every token, of the end)."""
  column = lambda x, n: None if x is None else _column_of(x, n)
  return zip(*[
    _weights(column(log_decay, n), column(log_momentum, n), cut, mask, slots)
    for n in range(depth)
  ])  # fmt: skip


def _of_layer(gate, n):
  """The gate of layer n: gate [] or [L]."""
  return gate[n] if gate.ndim else gate


def _column_of(gate, n):
  """The gate of layer n: gate [C, 1] or [C, L]."""
  return gate[:, n : n + 1] if gate.shape[1] > 1 else gate


def _mixed(a, x, b, y):
  """a x + b y of trees."""
  return jax.tree.map(lambda x, y: a * x + b * y, x, y)


def _rebased(anchor, model, rate):
  """Weights that are read: `model`, or anchor + λ (model − anchor)."""
  if rate is None:
    return model
  return jax.tree.map(lambda a, m: a + rate * (m - a), anchor, model)


def _final_rate(learner: Learner):
  return None if learner.rates is None else _last_rate(learner)


def _maps(model, mm):
  """How the layers of a model take inputs forward, and gradients back."""
  return (
    lambda n, x: _predict(model[n], x, mm),
    lambda n, g: mm(g, model[n].w.T),
  )


def _apply(model, x, act, mm):
  for layer in model[:-1]:
    x = act(_predict(layer, x, mm))
  return _predict(model[-1], x, mm)


def _backward(predict, pull, depth, x, target, criterion, act):
  """The inner loss and its gradients, by hand.

  Args:
    predict: (layer, input [..., N]) -> what it gives [..., M].
    pull: (layer, gradient [..., M]) -> [..., N].
    depth: L.
    x: [..., K].
    target: [..., V].
    criterion: (z, target) -> (∂ℓ/∂z, ℓ [..., 1]).
    act: the activation.

  Returns:
    (inputs of the layers, gradients of what they give, ℓ [..., 1]).
  """
  xs, slopes = [x], []
  for n in range(depth - 1):
    y, slope = jax.vjp(act, predict(n, xs[n]))
    xs.append(y)
    slopes.append(slope)
  g, loss = criterion(predict(depth - 1, xs[-1]), target)
  gs = [g]
  for n in range(depth - 1, 0, -1):
    (g,) = slopes[n - 1](pull(n, g))
    gs.insert(0, g)
  return xs, gs, loss


def _norm(model, xs, gs):
  """‖G‖ of each token, [..., 1], from the two vectors of each layer."""
  square = lambda y: jnp.sum(jnp.square(y), axis=-1, keepdims=True)
  total = sum(
    (square(x) + (0.0 if layer.b is None else 1.0)) * square(g)
    for layer, x, g in zip(model, xs, gs)
  )
  return _root(total)


def _root(square):
  """sqrt, with gradient 0 at 0."""
  some = square > 0
  return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)


def _check(
  state, q, k, v, gates, size, learner, residual, activation, reset, mask,
  fresh,
):  # fmt: skip
  who = "deep_gradient_step"
  check_memory(
    who, state, q, k, v, gates["log_momentum"], size, activation, reset, mask,
    fresh,
  )  # fmt: skip
  length, width, values = *jnp.shape(k), jnp.shape(v)[1]
  if residual and width != values:
    raise ValueError(
      f"{who}: residual needs K = V, got K={width} and V={values}"
    )
  for name, gate in gates.items():
    if gate is not None:
      layers = () if jnp.ndim(gate) == 1 else (len(state.model),)
      arguments.check_array(who, name, gate, (length, *layers))
  if learner.rates is not None:
    arguments.check_array(who, "learner.rates", learner.rates, (size,))
  if (learner.norm_scale is None) != (learner.norm_bias is None):
    raise ValueError(
      f"{who}: learner.norm_scale and learner.norm_bias go together"
    )
  for what, x in zip(("norm_scale", "norm_bias"), learner[1:]):
    if x is not None:
      arguments.check_array(who, f"learner.{what}", x, (values,))


def check_memory(
  who, state, q, k, v, log_momentum, size, activation, reset, mask, fresh
):
  """What an op on a deep memory, in mini-batches, asks of its arguments."""
  if activation not in ACTIVATIONS:
    raise ValueError(
      f"{who}: unknown activation {activation!r}; "
      + dispatch.nearest(activation, ACTIVATIONS)
    )
  if type(size) is not int or size < 1:
    raise ValueError(f"{who}: size must be a positive integer, got {size!r}")
  depth = len(state.model)
  if not 1 <= depth <= MAX_DEPTH:
    raise ValueError(
      f"{who}: a memory has 1 to {MAX_DEPTH} layers, got {depth}"
    )
  # The whole memory is checked as one map from K to V.
  ends = jnp.shape(state.model[0].w)[0], jnp.shape(state.model[-1].w)[-1]
  whole = jax.ShapeDtypeStruct(ends, jnp.result_type(state.model[0].w))
  arguments.check_matrix_op(who, whole, q, k, v, reset=reset, mask=mask)
  models = {"state.model": state.model, "fresh": fresh}
  models |= {"state.anchor": state.anchor, "state.momentum": state.momentum}
  for name, model in models.items():
    if model is not None:
      _check_model(who, name, model, state.model, activation)
  if (state.anchor is None) != (size == 1):
    raise ValueError(
      f"{who}: a state has an anchor where size > 1, and none where it is 1; "
      f"got size={size}: make it with start(model, size={size})"
    )
  if (state.momentum is None) != (log_momentum is None):
    raise ValueError(
      f"{who}: log_momentum and state.momentum go together; make the state "
      "with start(model, size=…, momentum=True)"
    )
  arguments.check_array(who, "state.phase", state.phase, (), jnp.integer)


def _check_model(who, name, model, like, activation):
  if len(model) != len(like):
    raise ValueError(
      f"{who}: {name} must have {len(like)} layers, as state.model has, got "
      f"{len(model)}"
    )
  width = jnp.shape(like[0].w)[0]
  for n, (layer, other) in enumerate(zip(model, like)):
    out = jnp.shape(other.w)[-1]
    arguments.check_array(who, f"{name}[{n}].w", layer.w, (width, out))
    if (layer.b is None) != (other.b is None):
      raise ValueError(f"{who}: {name}[{n}].b and state.model's go together")
    if layer.b is not None:
      arguments.check_array(who, f"{name}[{n}].b", layer.b, (out,))
    width = out
    if activation == "geglu" and n + 1 < len(like):
      if out % 2:
        raise ValueError(
          f"{who}: geglu takes an even number of units, got {name}[{n}].w "
          f"with {out}"
        )
      width = out // 2
