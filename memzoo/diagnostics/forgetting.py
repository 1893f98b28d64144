"""How an item fades from the state as others follow."""

from collections.abc import Sequence
import math
from typing import NamedTuple

import jax
import numpy as np

from memzoo.core.cell import Cell
from memzoo.diagnostics import readout, rollout


class Forgetting(NamedTuple):
  """What is recovered of one item after n others."""

  lag: np.ndarray  # int [L]: n
  accuracy: np.ndarray  # [L]: share of items recovered
  recovery: np.ndarray  # [L]: accuracy above chance, 1 is all
  cosine: np.ndarray  # [L]: of the decoded and the presented input
  horizon: int  # recovery is below the threshold from this lag on
  vocab_size: int


def forgetting(
  cell: Cell,
  params,
  key: jax.Array,
  *,
  lags: Sequence[int] = (0, 1, 2, 4, 8, 16, 32),
  before: int = 8,
  vocabulary=None,
  vocab_size: int = 16,
  train: int = 1024,
  test: int = 512,
  threshold: float = math.exp(-1),
  state=None,
) -> Forgetting:
  """The forgetting curve: an item, n others, and a linear read-out.

  `before` random tokens are presented, then the item, then n tokens. A linear
  read-out of the state is fitted at every n by ridge regression to the item,
  on one set of sequences, its ridge chosen on a second one. On a third:

    accuracy(n) = share of sequences whose best-scored token is the item
    cosine(n)   = mean of cos(Σ_v score_v w_v, w_item)

  with w_v the inputs of the vocabulary less their mean. The second is the
  read-out of the input itself, since ridge regression is linear in its
  targets. Unlike the accuracy by position of `tokens_held`, every n here has
  the same past.

  Args:
    cell: the memory; trained or not, its parameters stay.
    params: as `cell.init` made them, or trained.
    key: draws the vocabulary and the tokens.
    lags: the n of the curve, increasing.
    before: tokens in front of the item.
    vocabulary: the V inputs, leaves [V, ...]; None draws `vocab_size` of them.
    vocab_size: V, where no vocabulary is given.
    train: sequences to fit.
    test: sequences to measure, and as many to choose the ridge.
    threshold: of the horizon: the smallest of `lags` from which on the
      recovery is below it, or one past the last of them where it never is.
    state: what every sequence starts from; None for the cell's first state.

  Raises:
    ValueError: where the cell has no state, on sequences longer than it can
      take, and on sizes out of range.
  """
  who = "forgetting"
  lags = tuple(lags)
  for n in (*lags, before):
    rollout.check_count(who, "every lag and before", n, 0)
  for n in (train, test):
    rollout.check_count(who, "train and test", n)
  if not lags or sorted(set(lags)) != list(lags):
    raise ValueError(f"{who}: lags must increase, got {lags}")
  state, vocabulary, tokens = readout.presented(
    who, cell, params, key, state, vocabulary, vocab_size, train + 2 * test,
    before + 1 + lags[-1],
  )  # fmt: skip
  words = jax.tree.leaves(vocabulary)
  vocab_size = len(words[0])
  words = np.concatenate(
    [np.asarray(w, np.float64).reshape(vocab_size, -1) for w in words], axis=1
  )
  words = words - words.mean(0)
  times = [before + 1 + n for n in lags]
  found = readout.features_at(cell, params, state, vocabulary, tokens, times)
  found, item = np.asarray(found), np.asarray(tokens)[:, before]

  accuracy, cosine = np.zeros(len(lags)), np.zeros(len(lags))
  for row in range(len(lags)):
    scores = readout.token_scores(
      found[:, row], item[:, None], vocab_size, train=train, test=test
    )[:, 0]
    accuracy[row] = (scores.argmax(-1) == item[-test:]).mean()
    cosine[row] = _cosine(scores @ words, words[item[-test:]]).mean()
  recovery = readout.above_chance(accuracy, vocab_size)
  ends = (*lags[1:], lags[-1] + 1)
  held = [end for end, r in zip(ends, recovery) if r >= threshold]
  return Forgetting(
    lag=np.asarray(lags),
    accuracy=accuracy,
    recovery=recovery,
    cosine=cosine,
    horizon=max(held, default=0),
    vocab_size=vocab_size,
  )


def _cosine(a, b):
  scale = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  return (a * b).sum(-1) / np.where(scale > 0, scale, 1)
