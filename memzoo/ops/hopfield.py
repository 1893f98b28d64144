"""Retrieval from a modern Hopfield network by iterated update.

  ξ ← Xᵀ sep(β X ξ)                     X [M, K] the stored patterns, one a row
  E(ξ) = −β⁻¹ F(β X ξ) + ½ ξᵀξ + β⁻¹ H(M) + ½ max_i ‖x_i‖²

`sep` is a separation function, F its convex conjugate and H(M) the largest
entropy that it has over M patterns. With softmax F is the log-sum-exp, H(M) =
ln M, and E is the paper's; no update ever raises E (concave-convex procedure),
and E >= 0. Sources: Ramsauer et al. 2020, arXiv:2008.02217, eq. 1-3 (softmax;
there the patterns are the columns of X); Hu et al. 2023, arXiv:2309.12673
(sparsemax); Santos et al. 2024, arXiv:2402.13725 (any entropy).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memzoo.core import dispatch, store
from memzoo.ops import arguments, chunk, separation as separations


def hopfield(
  patterns: jax.Array,
  query: jax.Array,
  *,
  values: jax.Array | None = None,
  beta: float | jax.Array | None = None,
  steps: int = 1,
  separation: str = "softmax",
  mask: jax.Array | None = None,
  tolerance: float = 0.0,
  implementation: str | None = None,
) -> jax.Array:
  """What the patterns answer to a query.

  The query is moved `steps` − 1 times by ξ ← Xᵀ sep(β X ξ); the last step
  reads `values` in the place of X. With steps=1 that is attention.

  Args:
    patterns: X [M, K].
    query: ξ [..., K].
    values: [M, V]; the patterns by default, so that the answer is ξ itself.
    beta: β, the inverse temperature; K^−½ by default.
    steps: how many updates, at least 1.
    separation: 'softmax', 'softmax1', 'sparsemax' or 'entmax15'
      (`memzoo.ops.separation`).
    mask: bool [M]; False: the pattern is not there. Where none is there the
      answer is zero.
    tolerance: a query that an update moves by no more (in norm) stays where
      it is; 0 makes every update.
    implementation: 'dense' (all scores at once), 'pallas' (TPU and GPU: by
      blocks, in which memory never holds the scores; softmax and softmax1, a
      scalar beta, no tolerance, first derivatives in reverse mode), or None.

  Returns:
    [..., V] in the query's dtype.

  Raises:
    ValueError: on wrong shapes or dtypes, or an unknown separation or
      implementation.
    NotImplementedError: where the form asked for does not serve the call.
  """
  check("hopfield", patterns, query, values, mask)
  if steps < 1:
    raise ValueError(f"hopfield: steps must be at least 1, got {steps}")
  separations.get(separation)
  call = dict(
    values=values, beta=beta, steps=steps, separation=separation, mask=mask
  )
  forms = {
    "dense": lambda: _dense(patterns, query, **call, tolerance=tolerance),
    "pallas": lambda: _pallas(patterns, query, **call, tolerance=tolerance),
  }
  return dispatch.run("hopfield", forms, implementation)


def _dense(
  patterns, query, *, values, beta, steps, separation, mask, tolerance
):  # fmt: skip
  beta = _beta(beta, patterns)
  patterns = patterns.astype(query.dtype)
  values = patterns if values is None else values.astype(query.dtype)

  def answer(state, contents):
    weights = _separate(separation, patterns, state, beta, mask)
    return chunk.matmul(weights, contents, contents.dtype).astype(state.dtype)

  def update(state, _):
    new = answer(state, patterns)
    move = jnp.sum(
      jnp.square((new - state).astype(jnp.float32)), axis=-1, keepdims=True
    )
    # Held from here on: the same update would move it no further.
    return jnp.where(move > tolerance**2, new, state), None

  if steps > 1:
    query, _ = jax.lax.scan(update, query, length=steps - 1)
  return answer(query, values)


def _pallas(patterns, query, *, beta, tolerance, **call):
  if jnp.ndim(beta if beta is not None else 0.0):
    raise NotImplementedError("the kernel takes one beta for all scores")
  if not isinstance(tolerance, (int, float)) or tolerance > 0:
    raise NotImplementedError(
      "the kernel makes every update; tolerance > 0 holds a query still"
    )
  from memzoo.kernels import hopfield as kernel  # Pallas is slow to import.

  return kernel.hopfield(patterns, query, beta=beta, **call)


def energy(
  patterns: jax.Array,
  state: jax.Array,
  beta: float | jax.Array | None = None,
  *,
  separation: str = "softmax",
  mask: jax.Array | None = None,
) -> jax.Array:
  """E(ξ), Ramsauer et al. 2020 eq. 2, and its like for the other separations.

  Args:
    patterns: X [M, K].
    state: ξ [..., K].
    beta: β; K^−½ by default.
    separation: as for `hopfield`.
    mask: bool [M]; False: the pattern is not there. Where none is there the
      energy is ½ ξᵀξ.

  Returns:
    float32 [...].

  Raises:
    ValueError: on wrong shapes or dtypes, or an unknown separation.
  """
  check("hopfield energy", patterns, state, None, mask)
  beta = _beta(beta, patterns)
  there = jnp.ones(patterns.shape[:1], bool) if mask is None else mask
  count = jnp.sum(there, dtype=jnp.float32)
  x, xi = patterns.astype(jnp.float32), state.astype(jnp.float32)
  x = jnp.where(there[:, None], x, 0.0)
  scores = beta * chunk.matmul(xi, x.T)
  # Without a pattern: scores of 0 stand in, and what they give is not used.
  alive = there | (count == 0)
  match = separations.conjugate(separation, scores, alive)
  largest = jnp.max(jnp.sum(x**2, axis=-1))
  entropy = separations.largest_entropy(separation, jnp.maximum(count, 1.0))
  stored = (entropy - match) / beta + largest / 2
  own = jnp.sum(xi**2, axis=-1) / 2
  return own + jnp.where(count > 0, stored, 0.0)


class StoreState(NamedTuple):
  keys: jax.Array  # [M, K] float32
  values: jax.Array  # [M, V] float32
  count: jax.Array  # int32 [], items written; the next goes to count mod M


@dataclasses.dataclass(frozen=True)
class HopfieldStore(store.Store):
  """A Hopfield network as a store: an item a row, read by `hopfield`.

  A full store gives the place of its oldest item to the next one.

  Attributes:
    key_width: K.
    value_width: V; a network that completes patterns stores each as its own
      value, with V = K.
    capacity: M.
    beta: the inverse temperature; K^−½ by default.
    steps: updates of a read.
    separation: as for `hopfield`.
  """

  key_width: int
  value_width: int
  capacity: int
  beta: float | None = None
  steps: int = 1
  separation: str = "softmax"

  def __post_init__(self):
    arguments.check_positive(
      self, "key_width", "value_width", "capacity", "steps"
    )
    separations.get(self.separation)

  def empty(self) -> StoreState:
    return StoreState(
      jnp.zeros((self.capacity, self.key_width), jnp.float32),
      jnp.zeros((self.capacity, self.value_width), jnp.float32),
      jnp.zeros((), jnp.int32),
    )

  def write(self, state: StoreState, key, value) -> StoreState:
    slot = state.count % self.capacity
    return StoreState(
      state.keys.at[slot].set(key.astype(jnp.float32)),
      state.values.at[slot].set(value.astype(jnp.float32)),
      state.count + 1,
    )

  def read(self, state: StoreState, query):
    return hopfield(
      state.keys, query, values=state.values, beta=self.beta,
      steps=self.steps, separation=self.separation, mask=self._there(state),
    )  # fmt: skip

  def energy(self, state: StoreState, pattern):
    return energy(
      state.keys, pattern, self.beta, separation=self.separation,
      mask=self._there(state),
    )  # fmt: skip

  def _there(self, state):
    return jnp.arange(self.capacity, dtype=jnp.int32) < state.count


def _separate(name, patterns, state, beta, mask):
  scores = beta * chunk.matmul(state, patterns.T, state.dtype)
  return separations.separate(name, scores, mask)


def _beta(beta, patterns):
  beta = patterns.shape[-1] ** -0.5 if beta is None else beta
  return jnp.asarray(beta, jnp.float32)


def check(who: str, patterns, query, values, mask) -> None:
  """`ValueError` unless the arguments of `hopfield` fit one another."""
  arguments.check_array(who, "patterns", patterns, (None, None))
  count, width = jnp.shape(patterns)
  if jnp.ndim(query) < 1:
    arguments.fail(who, "query", f"floating [..., {width}]", query)
  shape = jnp.shape(query)[:-1] + (width,)
  arguments.check_array(who, "query", query, shape)
  if values is not None:
    arguments.check_array(who, "values", values, (count, None))
  if mask is not None:
    arguments.check_array(who, "mask", mask, (count,), jnp.bool_)
