"""How many tokens a state holds and gives back."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from memzoo.core.cell import Cell
from memzoo.diagnostics import readout, rollout


class TokensHeld(NamedTuple):
  """What linear read-outs recover from the state after n tokens."""

  length: np.ndarray  # int [L]: n
  accuracy: np.ndarray  # [L, N], by lag: 0 is the last token; NaN beyond n
  tokens: np.ndarray  # [L]: sum over positions of accuracy above chance
  bits: np.ndarray  # [L]: lower bound on the information about the tokens
  bits_per_float: np.ndarray  # [L]: bits over the floats of the state
  vocab_size: int
  state_size: int


def tokens_held(
  cell: Cell,
  params,
  key: jax.Array,
  *,
  lengths: Sequence[int] = (1, 2, 4, 8, 16, 32),
  vocabulary=None,
  vocab_size: int = 16,
  train: int = 1024,
  test: int = 512,
  state=None,
) -> TokensHeld:
  """How many of n random tokens can be read from the state after them.

  n tokens, independent and uniform over V inputs, are presented to the cell.
  For every position a linear read-out of the whole state (real and imaginary
  parts and integers, of every leaf) is fitted to the token there by ridge
  regression on one set of sequences, its ridge chosen on a second one, and
  its accuracy measured on a third:

    tokens(n) = Σ_positions (accuracy − 1 / V) / (1 − 1 / V)
    bits(n)   = Σ_positions max(0, log2 V − h(e) − e log2(V − 1)), e = 1 − acc.

  The bits are Fano's bound on the mutual information of the tokens and the
  state, up to the error of the test set: tokens are independent, so what is
  known of each adds up. It bounds from below, since other read-outs may find
  more. To compare cells at equal state, compare `bits_per_float`.

  Args:
    cell: the memory; trained or not, its parameters stay.
    params: as `cell.init` made them, or trained.
    key: draws the vocabulary and the tokens.
    lengths: the n of the curve, increasing.
    vocabulary: the V inputs, leaves [V, ...]; None draws `vocab_size` of them.
    vocab_size: V, where no vocabulary is given.
    train: sequences to fit. Read-outs of F numbers need more than F.
    test: sequences to measure, and as many to choose the ridge.
    state: what every sequence starts from; None for the cell's first state.

  Raises:
    ValueError: where the cell has no state, on sequences longer than it can
      take, and on sizes out of range.
  """
  who = "tokens_held"
  lengths = tuple(lengths)
  for n in (*lengths, train, test):
    rollout.check_count(who, "every length, train and test", n)
  if not lengths or sorted(set(lengths)) != list(lengths):
    raise ValueError(f"{who}: lengths must increase, got {lengths}")
  longest = lengths[-1]
  state, vocabulary, tokens = readout.presented(
    who, cell, params, key, state, vocabulary, vocab_size, train + 2 * test,
    longest,
  )  # fmt: skip
  vocab_size = len(jax.tree.leaves(vocabulary)[0])
  found = readout.features_at(cell, params, state, vocabulary, tokens, lengths)
  found, tokens = np.asarray(found), np.asarray(tokens)

  accuracy = np.full((len(lengths), longest), np.nan)
  for row, n in enumerate(lengths):
    latest_first = tokens[:, n - 1 :: -1] if n > 1 else tokens[:, :1]
    scores = readout.token_scores(
      found[:, row], latest_first, vocab_size, train=train, test=test
    )
    right = scores.argmax(-1) == latest_first[-test:]
    accuracy[row, :n] = right.mean(0)
  bits = readout.information(accuracy, vocab_size).sum(1)
  floats = rollout.size(cell, state)
  return TokensHeld(
    length=np.asarray(lengths),
    accuracy=accuracy,
    tokens=np.nansum(readout.above_chance(accuracy, vocab_size), axis=1),
    bits=bits,
    bits_per_float=bits / floats,
    vocab_size=vocab_size,
    state_size=floats,
  )
