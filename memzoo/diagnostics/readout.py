"""What a linear read-out finds in a state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.core.cell import Cell
from memzoo.diagnostics import rollout

# Of the ridge, in units of the features' variance.
STRENGTHS = (1e0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10)


def ridge(features, targets, *, train: int, validation: int):
  """Linear regression of many targets with the ridge chosen on held-out rows.

    minimise ‖X W − Y‖² / M + α ‖W‖²     X, Y centred, X of unit variance

  α is the one of `STRENGTHS` with the least squared error on the validation
  rows, for each group of targets of its own. In float64, so that what float32
  states hold is not lost to the solver.

  Args:
    features: [R, F]; columns that are constant in training are left out.
    targets: [R, G, K]: G groups of K targets. Those of the rows after the
      first train + validation are not read.
    train: M, the rows to fit, the first ones.
    validation: the rows after them, to choose α.

  Returns:
    float64 [R − train − validation, G, K]: predictions for the other rows.
  """
  x = np.asarray(features, np.float64)
  y = np.asarray(targets, np.float64)
  groups, width = y.shape[1:]
  y = y.reshape(len(y), -1)
  offset, mean = x[:train].mean(0), y[:train].mean(0)
  scale = x[:train].std(0)
  moves = scale > 1e-12 * np.abs(offset) + 1e-30
  x = (x[:, moves] - offset[moves]) / scale[moves]
  fit, rest = x[:train], x[train:]
  if not fit.shape[1]:
    flat = np.broadcast_to(mean, (len(x) - train - validation, len(mean)))
    return flat.reshape(-1, groups, width)
  if fit.shape[1] <= train:
    values, vectors = np.linalg.eigh(fit.T @ fit / train)
    left = rest @ vectors
    right = vectors.T @ (fit.T @ (y[:train] - mean)) / train
  else:  # the same solution from the matrix of inner products
    values, vectors = np.linalg.eigh(fit @ fit.T / train)
    left = rest @ fit.T @ vectors
    right = vectors.T @ (y[:train] - mean) / train
  values = np.maximum(values, 0)
  wanted = y[train : train + validation]
  best, chosen = np.full(groups, np.inf), None
  for strength in STRENGTHS:
    found = mean + (left / (values + strength)) @ right
    error = np.square(found[:validation] - wanted)
    error = error.reshape(-1, groups, width).mean((0, 2))
    found = found[validation:].reshape(-1, groups, width)
    chosen = found if chosen is None else chosen
    chosen = np.where((error < best)[:, None], found, chosen)
    best = np.minimum(error, best)
  return chosen


def token_scores(features, tokens, vocab_size, *, train, test):
  """Scores [test, G, V] of the tokens int [R, G] in the last `test` rows, by
  regression on one-hot targets; the rows between choose the ridge."""
  targets = np.eye(vocab_size)[np.asarray(tokens)]
  return ridge(features, targets, train=train, validation=test)


def features_at(cell: Cell, params, state, vocabulary, tokens, times):
  """float32 [R, len(times), F]: the states after `times` inputs.

  Args:
    cell: the memory.
    params: its parameters.
    state: what every row starts from.
    vocabulary: inputs, leaves [V, ...].
    tokens: int [R, T], rows of the vocabulary.
    times: numbers of inputs, from 1 to T.
  """
  times = jnp.asarray(times, jnp.int32)
  return _features_at(cell, params, state, vocabulary, tokens, times)


@functools.partial(jax.jit, static_argnums=0)
def _features_at(cell, params, state, vocabulary, tokens, times):
  def body(carry, inputs):
    state, kept = carry
    token, t = inputs
    x = jax.tree.map(lambda v: v[token], vocabulary)
    state, _ = cell.step(params, state, x)
    now = rollout.features(state)
    return (state, jnp.where((times == t)[:, None], now, kept)), None

  def row(tokens):
    kept = jnp.zeros((times.size, rollout.features(state).size), jnp.float32)
    count = jnp.arange(1, tokens.size + 1, dtype=jnp.int32)
    return jax.lax.scan(body, (state, kept), (tokens, count))[0][1]

  return jax.vmap(row)(tokens)


def presented(who, cell, params, key, state, vocabulary, vocab_size, rows, to):
  """What the read-outs are fitted on: (state, vocabulary, tokens [R, T]).

  Draws a vocabulary where it is None, and uniform tokens from it.

  Raises:
    ValueError: on a cell without a state, sequences that are too long for it,
      and sizes out of range.
  """
  state = rollout.start(cell, params, state)
  rollout.check_state(who, cell, state)
  who = f"{who}({rollout.label(cell)})"
  rollout.check_length(who, cell, to)
  key_words, key_tokens = jax.random.split(key)
  if vocabulary is None:
    rollout.check_count(who, "vocab_size", vocab_size, 2)
    vocabulary = rollout.draw(cell, key_words, vocab_size)
  else:
    (vocab_size,) = rollout.check_inputs(who, cell, vocabulary, 1)
    rollout.check_count(who, "the size of the vocabulary", vocab_size, 2)
  tokens = jax.random.randint(key_tokens, (rows, to), 0, vocab_size)
  return state, vocabulary, tokens


def information(accuracy, vocab_size: int):
  """A lower bound in bits on what is known of a uniform token.

    I >= log2 V − h(e) − e log2(V − 1) ,  e = 1 − accuracy     (Fano)

  with h the binary entropy; 0 at chance and below.
  """
  accuracy = np.asarray(accuracy, np.float64)
  error = np.clip(1 - accuracy, 1e-15, 1 - 1e-15)
  entropy = -error * np.log2(error) - (1 - error) * np.log2(1 - error)
  bits = np.log2(vocab_size) - entropy - error * np.log2(vocab_size - 1)
  return np.where(accuracy > 1 / vocab_size, np.maximum(bits, 0), 0.0)


def above_chance(accuracy, vocab_size: int):
  """(accuracy − 1 / V) / (1 − 1 / V): 1 where all is right, 0 for guesses."""
  chance = 1 / vocab_size
  return (np.asarray(accuracy) - chance) / (1 - chance)
