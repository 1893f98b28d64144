"""Test-time learning of a window: the Omega rule, with Muon where asked.

  G_t = ∇ Σ_{i = t−c+1 … t} γ_i^(t) ℓ(M_{t'}; k_i, v_i)
  S_t = θ_t S_{t−1} + G_t                       (no momentum: S_t = G_t)
  M_t = α_t M_{t−1} − η_t N_t ,  o_t = f(q_t; M_t)
  N_t = S_t , or NewtonSchulz-k(S_t)            each matrix for itself

with ℓ(M; k, v) = ½ ‖f(k; M) − v‖², or −⟨f(k; M), v⟩. The state is the weights
M of an MLP f without biases, and the last c − 1 keys and values: at every token
the memory learns all c pairs of the window again, at the weights M_{t'} where
the mini-batch of n tokens began (n = 1 is the exact rule, t' = t − 1). c = 1 is
the rule of `deep_gradient_step` with momentum, but for where the rate stands.
Momentum, forgetting and the window go on from one mini-batch to the next.

The chunk form takes a mini-batch at a time. Its rows are the c − 1 pairs that
came in and its own n. A layer's gradient of row s is x_s g_sᵀ, so with the
band B_ts = γ_s^(t), zero outside the window (the paper's sliding window mask),
and products E, D of θ and α,

  S_t = e_t S + Σ_s (E B)_ts x_s g_sᵀ
  M_t = d_t M − Σ_j D_tj η_j N_j

Without Newton and Schulz no matrix of a single token is made: D η E B is one
[n, n + c − 1] table of scores, at any depth. With them every token has a
momentum of its own to be orthogonalised: a chunk then holds S_t and N_t of its
n tokens, [n, N, M] a layer, and the backward recomputes them chunk by chunk.

Newton-Schulz-k multiplies what is small beside ‖S‖ by 3.4445^k, rounding too:
485 for the usual k = 5, so that float32 keeps four or five digits of N_t where
the momentum is nearly rank-deficient, in this op as in any.

Sources: Behrouz, Li, Kacham, Daliri, Deng, Zhong, Razaviyayn, Mirrokni 2025,
arXiv:2505.23735, eq. 8 to 10, 15, 16, 19, 20 and 32 to 41; Jordan et al. 2024,
kellerjordan.github.io/posts/muon, for Newton-Schulz and its coefficients.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import axes, dispatch
from memzoo.ops import arguments, chunk, decay
from memzoo.ops.deep_gradient_step import (
  ACTIVATIONS,
  NO_NORM,
  Layer as Layer,  # w [N, M] float32; the bias is None
  Model,
  _apply,
  _backward,
  _maps,
  _root,
  aligned,
  check_memory,
)
from memzoo.ops.gradient_step import _gradient, _pick

# Of the quintic that Newton-Schulz iterates, as in Muon's own code.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-14  # beside the square of a norm


def _dot_product(z, target):
  """(∂ℓ/∂z [..., V], ℓ [..., 1]) for ℓ = −⟨z, target⟩."""
  return -target, -jnp.sum(z * target, axis=-1, keepdims=True)


OBJECTIVES = {"l2": partial(_gradient, learner=NO_NORM), "dot": _dot_product}


class State(NamedTuple):
  model: Model  # M_t
  anchor: Model | None  # M_{t'}, the mini-batch's start; None where n = 1
  momentum: Model | None  # S_t; None without momentum
  keys: jax.Array  # [c − 1, K] float32, the newest last
  values: jax.Array  # [c − 1, V] float32
  count: jax.Array  # int32 [], how many of them there are: 0 … c − 1
  phase: jax.Array  # int32 [], tokens of the mini-batch so far: 0 … n − 1


class Outputs(NamedTuple):
  o: jax.Array  # [T, V]
  loss: jax.Array  # [T] float32: Σ γ_i ℓ(M_{t'}; k_i, v_i)
  surprise: jax.Array  # [T] float32: ‖G_t‖, the norm over all weights


def start(
  model: Model, *, window: int, size: int, momentum: bool = False
) -> State:
  """The state of a memory that has seen no token.

  Args:
    model: float32 weights, without biases.
    window: c, the pairs that a step learns.
    size: n, the tokens of a mini-batch.
    momentum: whether the rule has a momentum.
  """
  model = tuple(model)
  zeros = jax.tree.map(jnp.zeros_like, model) if momentum else None
  rows = lambda width: jnp.zeros((window - 1, width), jnp.float32)
  none = jnp.zeros((), jnp.int32)
  return State(
    model, model if size > 1 else None, zeros, rows(model[0].w.shape[0]),
    rows(model[-1].w.shape[1]), none, none,
  )  # fmt: skip


def newton_schulz(s: jax.Array, iterations: int = 5) -> jax.Array:
  """Nearly U Vᵀ of s = U Σ Vᵀ: x ← a x + b (x xᵀ) x + c (x xᵀ)² x from
  s / ‖s‖_F on. Five iterations take singular values that are not small beside
  ‖s‖_F to about 0.7 … 1.2, and leave zeros.

  Args:
    s: float32 [..., N, M].
    iterations: k.
  """
  a, b, c = COEFFICIENTS
  square = jnp.sum(jnp.square(s), axis=(-2, -1), keepdims=True)
  tall = s.shape[-2] > s.shape[-1]

  def improve(_, x):
    y = jnp.swapaxes(x, -2, -1)
    gram = chunk.matmul(y, x) if tall else chunk.matmul(x, y)
    gram = b * gram + c * chunk.matmul(gram, gram)
    return a * x + (chunk.matmul(x, gram) if tall else chunk.matmul(gram, x))

  x = s * jax.lax.rsqrt(square + _EPS)
  return jax.lax.fori_loop(0, iterations, improve, x)


def _orthogonalised(s, n, depth, iterations, activation):
  """Newton-Schulz of S of layer n [..., N, M]: of the two matrices that a
  hidden layer of geglu holds, for itself each."""
  parts = 2 if activation == "geglu" and n + 1 < depth else 1
  shape = s.shape[:-1] + (parts, s.shape[-1] // parts)
  each = jnp.moveaxis(s.reshape(shape), -2, 0)
  return jnp.moveaxis(newton_schulz(each, iterations), 0, -2).reshape(s.shape)


def step(
  state: State,
  q,
  k,
  v,
  gate,
  rate,
  log_decay=None,
  log_momentum=None,
  *,
  size: int,
  iterations: int = 0,
  objective: str = "l2",
  activation: str = "gelu",
):
  """One token: q, k [K], v [V], gate [c] (of the token itself first), rate,
  log_decay, log_momentum [] -> (state, Outputs of o [V], loss, surprise [])."""
  act, depth = ACTIVATIONS[activation], len(state.model)
  anchor = state.model if state.anchor is None else state.anchor
  keys = jnp.concatenate([state.keys, k.astype(jnp.float32)[None]])
  values = jnp.concatenate([state.values, v.astype(jnp.float32)[None]])
  age = jnp.arange(len(keys))[::-1]
  band = jnp.where(age <= state.count, gate.astype(jnp.float32)[::-1], 0.0)
  xs, gs, losses = _backward(
    *_maps(anchor, jnp.matmul), depth, keys, values, OBJECTIVES[objective], act
  )
  factor = lambda log: 1.0 if log is None else jnp.exp(log.astype(jnp.float32))
  model, momentum, square = [], [], 0.0
  for n, (x, g) in enumerate(zip(xs, gs)):
    s = x.T @ (band[:, None] * g)
    square += jnp.sum(jnp.square(s))
    if log_momentum is not None:
      s += factor(log_momentum) * state.momentum[n].w
      momentum.append(Layer(s))
    if iterations:
      s = _orthogonalised(s, n, depth, iterations, activation)
    w = factor(log_decay) * state.model[n].w
    model.append(Layer(w - rate.astype(jnp.float32) * s))
  model, momentum = tuple(model), tuple(momentum) or None
  o = _apply(model, q.astype(jnp.float32), act, jnp.matmul)
  full = state.phase + 1 == size
  anchor = None
  if size > 1:
    pick = lambda a, b: jnp.where(full, a, b)
    anchor = jax.tree.map(pick, model, state.anchor)
  new = State(
    model, anchor, momentum, keys[1:], values[1:],
    jnp.minimum(state.count + 1, len(keys) - 1),
    jnp.where(full, 0, state.phase + 1),
  )  # fmt: skip
  loss = jnp.sum(band * losses[:, 0])
  return new, Outputs(o.astype(v.dtype), loss, _root(square))


def windowed_gradient_step(
  state: State,
  q: axes.Queries,
  k: axes.Keys,
  v: axes.Values,
  *,
  gate: jax.Array,
  rate: axes.Scalars,
  size: int,
  log_decay: axes.Scalars | None = None,
  log_momentum: axes.Scalars | None = None,
  iterations: int = 0,
  objective: str = "l2",
  activation: str = "gelu",
  reset: axes.Reset | None = None,
  mask: axes.Mask | None = None,
  fresh: Model | None = None,
  implementation: str | None = None,
) -> tuple[State, Outputs]:
  """Test-time learning of windows over one sequence of one head.

  Args:
    state: as `start` makes it, float32, for this c, n and rule.
    q: [T, K], what the memory is asked.
    k: [T, K], what it learns to map.
    v: [T, V], to what.
    gate: γ, [T, c]: at t, of the token t itself, of the one before, and so on.
    rate: η, [T].
    size: n, the tokens of a mini-batch; static. 1 is the exact rule.
    log_decay: log α, [T], or None for no forgetting. At most 0; −inf clears
      the memory.
    log_momentum: log θ, [T], or None for no momentum. At most 0; −inf drops
      what came before.
    iterations: k, for steps that are Newton-Schulz-k of the momentum (Muon);
      0 for the momentum itself.
    objective: ℓ: 'l2' or 'dot'.
    activation: between layers, as in `deep_gradient_step`.
    reset: bool [T]; True: the memory is `fresh`, without momentum or window,
      and a mini-batch starts.
    mask: bool [T]; False: no token t. It takes no place in a mini-batch, nor
      in a window.
    fresh: weights, zeros by default.
    implementation: 'scan', 'chunk' (n tokens at a time), or None.

  Returns:
    (state, Outputs(o [T, V] in v's dtype, loss and surprise float32 [T])),
    zero where the mask is False.

  Raises:
    ValueError: on wrong shapes or dtypes, or an unknown objective or
      activation.
    NotImplementedError: on a form that does not exist, and for 'chunk' where
      n = 1: each gradient then waits for the step before.
  """
  gates = dict(rate=rate, log_decay=log_decay, log_momentum=log_momentum)
  options = dict(
    size=size, iterations=iterations, objective=objective, activation=activation
  )
  _check(state, q, k, v, gate, gates, options, reset, mask, fresh)
  if mask is not None and reset is not None:
    reset = reset & mask
  inputs = Inputs(q, k, v, gate, rate, log_decay, log_momentum, reset, mask)
  if fresh is None:
    fresh = jax.tree.map(jnp.zeros_like, state.model)
  fresh = jax.tree.map(lambda x: x.astype(jnp.float32), tuple(fresh))

  def scan():
    one = lambda s, x: step(s, *x[:7], **options)
    begin = start(
      fresh, window=jnp.shape(gate)[1], size=size,
      momentum=state.momentum is not None,
    )  # fmt: skip
    return arguments.scan_steps(one, state, inputs, begin)

  forms = {
    "scan": scan,
    "chunk": lambda: _dual(state, inputs, fresh, **options),
  }
  return dispatch.run("windowed_gradient_step", forms, implementation)


class Inputs(NamedTuple):
  q: jax.Array
  k: jax.Array
  v: jax.Array
  gate: jax.Array
  rate: jax.Array
  log_decay: jax.Array | None
  log_momentum: jax.Array | None
  reset: jax.Array | None
  mask: jax.Array | None


def _dual(state, inputs: Inputs, fresh, *, size, **options):
  """Mini-batches as chunks, or, with resets, chunks of at most n tokens."""
  if size == 1:
    raise NotImplementedError(
      "mini-batches of one token follow one another: there is no chunk of them"
    )
  back = lambda y: y
  if inputs.reset is None:
    inputs, back = aligned(inputs, state.phase, size)
  state, outputs = chunk.run(
    partial(_chunk, size=size, **options), state, inputs, fresh,
    chunk_size=size, columns=True,
  )  # fmt: skip
  flat = [y[:, 0] for y in (outputs.loss, outputs.surprise)]
  return state, jax.tree.map(back, Outputs(outputs.o, *flat))


# What follows works on tiles (`chunk.as_tiles`, `chunk.as_columns`): numbers of
# the state are [1, 1], gates are [C, 1], flags are float32 [C, 1].


class Terms(NamedTuple):
  """What a layer's weights change by: matrices, one a row or one a token."""

  x: jax.Array | None  # [R, N]  of the rows x_r g_rᵀ
  g: jax.Array | None  # [R, M]
  whole: jax.Array | None = None  # [C, N, M]  of tokens, orthogonalised

  def read(self, x, weights, mm):
    """x_t Σ_r weights_tr Z_r of every token: [C, M]."""
    if self.whole is None:
      return mm(mm(x, self.x.T) * weights, self.g)
    each = _einsum("tn,jnm->tjm", x, self.whole)
    return jnp.sum(weights[:, :, None] * each, axis=1)

  def total(self, weights, mm):
    """Σ_r weights_r Z_r for weights [1, R]: [N, M]."""
    if self.whole is None:
      return mm(self.x.T, chunk.column(weights) * self.g)
    return jnp.sum(weights[0][:, None, None] * self.whole, axis=0)


class Weights(NamedTuple):
  """What M_t is made of, for each t of a chunk and, in the last row, its end.

  M_t = model_t M − momentum_t S − Σ_r terms_tr Z_r.
  """

  model: jax.Array  # [C + 1, 1]
  momentum: jax.Array | None  # [C + 1, 1]; None where Z has it
  terms: jax.Array  # [C + 1, R], or [C + 1, C]


def _chunk(
  state: State, inputs: Inputs, fresh, *, size, iterations, objective,
  activation,
):  # fmt: skip
  """A chunk of at most n tokens with resets and gaps anywhere; without resets
  it is one mini-batch, or the part of it that is there.

  Its tokens take their gradients at one of three models: the anchor that came
  in, what was learned where that mini-batch is full, and the fresh memory.
  """
  act, depth, slots = ACTIVATIONS[activation], len(fresh), inputs.q.shape[0]
  cut = inputs.reset is not None
  # Newton-Schulz lifts what is small: its matrices keep their digits.
  mm = partial(
    chunk.matmul, dtype=jnp.float32 if iterations else inputs.q.dtype
  )
  kept = inputs.log_momentum
  if kept is not None:  # −inf is no fault
    kept = jnp.maximum(kept.astype(jnp.float32), decay.FLOOR)
  bad, log_decay, q, k, v, gate, rate, log_momentum = decay.quarantine(
    inputs.reset, inputs.mask, inputs.log_decay, inputs.q, inputs.k, inputs.v,
    inputs.gate, inputs.rate, kept,
  )  # fmt: skip
  q, k, v, gate, rate = (x.astype(jnp.float32) for x in (q, k, v, gate, rate))
  there = jnp.ones((slots, 1), jnp.float32)
  there = there if inputs.mask is None else inputs.mask
  same, live = chunk.lower(slots), jnp.ones((slots, 1), jnp.float32)
  poison = None
  if cut:
    segment = decay.sums(chunk.lower(slots), inputs.reset)
    live = (segment == 0).astype(jnp.float32)
    same = same & (segment == chunk.row(segment))
    # A state that is not finite is kept from the segments after a reset.
    spoiled = jnp.zeros((1, 1), jnp.float32)
    for s in jax.tree.leaves(state):
      if s.size:
        spoiled = jnp.maximum(spoiled, decay.any_bad(s))
    tensors = jax.tree.map(lambda s: chunk.where(spoiled, 0.0, s), state[:5])
    state = State(*tensors, *state[5:])
    poison = (decay.sums(same, bad) > 0).astype(jnp.float32)
    poison = jnp.maximum(poison, live * spoiled)
  number = decay.sums(same, there)  # tokens of the segment, in this chunk
  place = number + live * state.phase

  # The rows of a window, and what they weigh.
  keys = jnp.concatenate([state.keys, k])
  values = jnp.concatenate([state.values, v])
  held = state.keys.shape[0]
  age = held - 1.0 - jnp.arange(held, dtype=jnp.float32)[None]  # [1, c − 1]
  lag = jnp.concatenate([number + age, number - chunk.row(number)], axis=1)
  seen = jnp.concatenate(
    [
      live * (age < state.count).astype(jnp.float32),
      same.astype(jnp.float32) * chunk.row(there),
    ],
    axis=1,
  )
  inside = (seen * there > 0) & (lag <= held)
  index = jnp.where(inside, lag, 0.0).astype(jnp.int32)
  band = jnp.where(inside, jnp.take_along_axis(gate, index, axis=1), 0.0)

  # M_t and S_t of every token and of the end, in terms of the tokens' steps.
  d = decay.decays(log_decay, inputs.reset, inputs.mask, None, slots)
  e = None
  if log_momentum is not None:
    e = decay.decays(log_momentum, inputs.reset, inputs.mask, None, slots)
  ends = lambda x: jnp.concatenate([x, chunk.last(x)])
  steps = jnp.concatenate([d.factor, chunk.row(d.onto)]) * chunk.row(rate)

  def change(xs, gs, band):
    """The terms of each layer, and their weights."""
    table, terms = band if e is None else chunk.matmul(e.factor, band), []
    if not iterations:
      onto = None if e is None else chunk.matmul(steps, live * e.into)
      table = chunk.matmul(steps, table)
      return _terms(xs, gs), Weights(ends(d.into), onto, table)
    for n, (x, g) in enumerate(zip(xs, gs)):
      s = _einsum("rn,trm->tnm", x, table[:, :, None] * g)
      if e is not None:
        s += (live * e.into)[:, :, None] * state.momentum[n].w
      s = _orthogonalised(s, n, depth, iterations, activation)
      terms.append(Terms(None, None, s))
    return terms, Weights(ends(d.into), None, steps)

  def arrive(terms, weights, base):
    """The model that weights of one token, [1, ·] each, make."""
    new = []
    for n, t in enumerate(terms):
      w = weights.model * base[n].w - t.total(weights.terms, mm)
      if weights.momentum is not None:
        w -= weights.momentum * state.momentum[n].w
      new.append(Layer(w))
    return tuple(new)

  def learn(model):
    criterion = OBJECTIVES[objective]
    return _backward(*_maps(model, mm), depth, keys, values, criterion, act)

  xs, gs, losses = learn(state.anchor)
  if cut:
    later = live * (place > size).astype(jnp.float32)
    filled = live * there * (place == size).astype(jnp.float32)
    at = lambda x: jnp.sum(filled * x[:slots], axis=0, keepdims=True)
    first = band * live * (1.0 - later)
    terms, weights = change(xs, gs, first)
    second = arrive(terms, jax.tree.map(at, weights), state.model)
    parts = [(xs, gs, losses), learn(second), learn(fresh)]
    xs, gs, losses = jax.tree.map(lambda *p: jnp.concatenate(p), *parts)
    band = [first, band * later, band * (1.0 - live)]
    band = jnp.concatenate(band, axis=1)
  terms, weights = change(xs, gs, band)

  # What tokens read.
  for n, t in enumerate(terms):
    x = act(z) if n else q
    z = mm(x, state.model[n].w)
    if cut:
      z = chunk.where(live, z, mm(x, fresh[n].w))
    z = weights.model[:slots] * z - t.read(x, weights.terms[:slots], mm)
    if weights.momentum is not None:
      z -= weights.momentum[:slots] * mm(x, state.momentum[n].w)
  gram = lambda x: chunk.matmul(x, x.T)
  alike = sum(gram(x) * gram(g) for x, g in zip(xs, gs))
  square = jnp.sum(chunk.matmul(band, alike) * band, axis=1, keepdims=True)
  outputs = Outputs(z, chunk.matmul(band, losses), _root(square))

  # The state at the end.
  end = jax.tree.map(lambda w: w[slots:], weights)
  alive, total = chunk.last(live), chunk.last(place)
  model = arrive(terms, end, _pick(alive, state.model, fresh))
  momentum = None
  if e is not None:
    rows = _terms(xs, gs)
    into, onto = alive * chunk.last(e.into), chunk.row(e.onto)
    onto = chunk.matmul(onto, band)
    momentum = tuple(
      Layer(into * s.w + r.total(onto, mm))
      for s, r in zip(state.momentum, rows)
    )
  anchor = state.anchor
  if cut:
    over = (total > size).astype(jnp.float32)
    anchor = _pick(alive, _pick(over, second, anchor), fresh)
  full = (total == size).astype(jnp.float32)
  anchor = _pick(full, model, anchor)

  # Of the window's rows, the newest c − 1 of the last segment.
  own = chunk.last(same.astype(jnp.float32)) * chunk.row(there)
  own = jnp.concatenate([alive * jnp.ones_like(age), own], axis=1)
  back = chunk.last(lag)
  stays = (own > 0) & (back < held)
  target = jnp.where(stays, held - 1.0 - back, held)[0].astype(jnp.int32)
  rows = lambda x: jnp.zeros((held, x.shape[1]), jnp.float32)
  # Nothing can be set in no rows, where c = 1.
  move = lambda x: rows(x).at[target].set(x, mode="drop") if held else rows(x)
  tensors = model, anchor, momentum, move(keys), move(values)
  if cut:
    nan = lambda s: chunk.where(chunk.last(poison), jnp.nan, s)
    tensors = jax.tree.map(nan, tensors)
    outputs = jax.tree.map(lambda y: decay.spoil(y, poison), outputs)
  if inputs.mask is not None:
    outputs = jax.tree.map(lambda y: chunk.where(there, y, 0.0), outputs)
  outputs = outputs._replace(o=outputs.o.astype(inputs.v.dtype))
  count = jnp.minimum(alive * state.count + chunk.last(number), held)
  phase = jnp.where(total >= size, total - size, total)
  return State(*tensors, count, phase), outputs


def _terms(xs, gs):
  return [Terms(x, g) for x, g in zip(xs, gs)]


def _einsum(path, a, b):
  return jnp.einsum(path, a, b, precision=jax.lax.Precision.HIGHEST)


def _check(state, q, k, v, gate, gates, options, reset, mask, fresh):
  who = "windowed_gradient_step"
  check_memory(
    who, state, q, k, v, gates["log_momentum"], options["size"],
    options["activation"], reset, mask, fresh,
  )  # fmt: skip
  if (got := options["objective"]) not in OBJECTIVES:
    raise ValueError(
      f"{who}: unknown objective {got!r}; " + dispatch.nearest(got, OBJECTIVES)
    )
  if type(got := options["iterations"]) is not int or got < 0:
    raise ValueError(f"{who}: iterations must be an integer ≥ 0, got {got!r}")
  if any(layer.b is not None for layer in state.model):
    raise ValueError(f"{who}: a memory has no biases here")
  length = jnp.shape(q)[0]
  arguments.check_array(who, "gate", gate, (length, None))
  for name, x in gates.items():
    if x is not None:
      arguments.check_array(who, name, x, (length,))
  held = jnp.shape(gate)[1] - 1
  for name, x, row in (("keys", state.keys, k), ("values", state.values, v)):
    arguments.check_array(who, f"state.{name}", x, (held, jnp.shape(row)[1]))
  arguments.check_array(who, "state.count", state.count, (), jnp.integer)
