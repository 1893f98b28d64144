"""POPGym's games of memory as supervised tasks."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import (
  concentration,
  environments,
  quizzes,
  sampling,
  task as task_lib,
)
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopgymTask(Generator):
  """The right action at every step of a quiz (`tasks/quizzes.py`).

  Row: the observations of one episode that are acted on, one token each: with
  several entries, the mixed-radix number of them, first entry highest.
  Targets: the right actions. Weight 1 where one is asked, so that the accuracy
  p is worth the return 2 p - 1 in the game.

  Attributes:
    num_decks: decks that are shuffled together.
    num_ranks: ranks of a suit; 13 make decks of 52 cards.
  """

  kind: ClassVar[str] = "tokens"
  num_decks: int = 1
  num_ranks: int = 13

  def __post_init__(self):
    super().__post_init__()
    self.environment  # noqa: B018, checks the options

  @property
  def environment(self) -> environments.Environment:
    """The game."""
    raise NotImplementedError(type(self).__name__)

  @property
  def vocab_size(self) -> int:
    return int(np.prod(self.environment.symbols))

  @property
  def num_outputs(self) -> int:
    return self.environment.num_actions

  @property
  def length(self) -> int:
    return self.environment.length

  @property
  def chance(self) -> float:
    return 1 / self.num_outputs

  def example(self, key):
    game = self.environment
    hidden = game.deal(key)

    def at(time):
      state = quizzes.QuizState(hidden, time)
      action, asked = game.answer(state)
      token = jnp.zeros((), jnp.int32)
      for size, symbol in zip(game.symbols, game.observe(state)):
        token = size * token + symbol
      return token, action, asked.astype(jnp.float32)

    return jax.vmap(at)(jnp.arange(game.length, dtype=jnp.int32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopgymRepeatFirst(PopgymTask):
  """Name the suit of the first card at every step.

  With N cards, T = N - 1: tokens are suits in 0..3; all targets are the first
  token.

  Presets:
    popgym_repeat_first_easy, _medium, _hard: 1, 8, 16 decks: T = 51, 415, 831.
    popgym_repeat_first_small: 32 cards, T = 31. Not a published setting.

  Differs: supervised, so that no figure of the paper applies: there PPO has
    15 million steps, and sees the previous action and a mark on the first step
    beside the observation. The same holds of the other games.

  Paper: Morad et al. 2023, POPGym: Benchmarking Partially Observable
    Reinforcement Learning, arXiv:2303.01859; popgym 1.0.7.
  """

  @property
  def environment(self) -> quizzes.RepeatFirst:
    return quizzes.RepeatFirst(
      num_decks=self.num_decks, num_ranks=self.num_ranks
    )

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    return np.broadcast_to(inputs[:, :1], inputs.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopgymRepeatPrevious(PopgymTask):
  """Name the suit of the k-th last card, the present one counted.

  With N cards, T = N - 1: tokens are suits in 0..3; the target at t is the
  token at t - k + 1, with weight 0 before there is one.

  Attributes:
    k: 1 asks for the present token.

  Presets:
    popgym_repeat_previous_easy: 1 deck, k = 4, T = 51.
    popgym_repeat_previous_medium: 2 decks, k = 32, T = 103.
    popgym_repeat_previous_hard: 3 decks, k = 64, T = 155.
    popgym_repeat_previous_small: 32 cards, k = 4, T = 31. Not a published
      setting.

  Differs: supervised (see `PopgymRepeatFirst`); k counts as in POPGym's code,
    by whose text k - 1 would be meant.

  Paper: Morad et al. 2023, arXiv:2303.01859; popgym 1.0.7.
  """

  k: int = 4

  @property
  def environment(self) -> quizzes.RepeatPrevious:
    return quizzes.RepeatPrevious(
      num_decks=self.num_decks, num_ranks=self.num_ranks, k=self.k
    )

  def oracle(self, batch):
    return np.roll(np.asarray(batch.inputs), self.k - 1, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopgymAutoencode(PopgymTask):
  """Watch all cards, then name their suits in reverse order.

  With N cards, T = 2N - 1: tokens 4..7 are the suits of the first N - 1 cards,
  the last card is a token of 0..3, and N - 1 tokens 0 follow. Targets, from
  the last card on, are the suits in reverse order.

  Presets:
    popgym_autoencode_easy, _medium, _hard: 1, 2, 3 decks: T = 103, 207, 311.
    popgym_autoencode_small: 16 cards, T = 31. Not a published setting.

  Differs: supervised (see `PopgymRepeatFirst`).

  Paper: Morad et al. 2023, arXiv:2303.01859; popgym 1.0.7.
  """

  @property
  def environment(self) -> quizzes.Autoencode:
    return quizzes.Autoencode(
      num_decks=self.num_decks, num_ranks=self.num_ranks
    )

  def oracle(self, batch):
    return np.asarray(batch.inputs)[:, ::-1] % 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopgymCountRecall(PopgymTask):
  """Say how often the card asked for has been dealt, this deal included.

  With N cards of F faces, T = N - 1: the token F * v + q deals face v and asks
  for face q; the target is the number of v = q so far.

  Attributes:
    deck_type: what tells cards apart: 'colors' (F = 2), 'suits' (4), 'ranks'.

  Presets:
    popgym_count_recall_easy: 1 deck by colour, T = 51.
    popgym_count_recall_medium: 2 decks by suit, T = 103.
    popgym_count_recall_hard: 4 decks by rank, T = 207.
    popgym_count_recall_small: 32 cards by colour, T = 31. Not a published
      setting.

  Differs: supervised (see `PopgymRepeatFirst`); the pair of cards is one
    token.

  Paper: Morad et al. 2023, arXiv:2303.01859; popgym 1.0.7.
  """

  deck_type: str = "colors"

  @property
  def environment(self) -> quizzes.CountRecall:
    return quizzes.CountRecall(
      num_decks=self.num_decks,
      num_ranks=self.num_ranks,
      deck_type=self.deck_type,
    )

  def oracle(self, batch):
    faces = self.environment.symbols[0]
    values, queries = np.divmod(np.asarray(batch.inputs), faces)
    counts = np.cumsum(values[..., None] == np.arange(faces), axis=1)
    right = np.take_along_axis(counts, queries[..., None], axis=2)
    return right[..., 0].astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopgymConcentration(PopgymTask):
  """Say, as a card is flipped, where a card of its face was last seen.

  With N cards of F faces, T = 2N: the token F * p + f is a flip of the card at
  place p that shows face f; when all pairs are found, the token F N fills the
  row. Flips 2i and 2i + 1 make a turn; two of one face are taken off. A player
  of perfect memory makes the flips: the first card of a turn is uniform among
  those on the table; the second is the latest seen other card of the same
  face on the table, or, where there is none, uniform among the others. The
  target at the first card of a turn is the place of that latest seen card;
  weight 0 where there is none, and at second cards.

  Attributes:
    deck_type: what makes a pair: 'colors' (F = 2) or 'ranks'.

  Presets:
    popgym_concentration_easy: 1 deck by colour, T = 104.
    popgym_concentration_medium: 2 decks by colour, T = 208.
    popgym_concentration_hard: 1 deck by rank, T = 104.
    popgym_concentration_small: 16 cards by rank, T = 32. Not a published
      setting.

  Differs: supervised, and a part of the game: the choice of the cards to flip
    is not learned but given, the last seen of several matches alone counts as
    right, and the observation is one flip (which place, which face) in place
    of the table, so that what was taken off must be remembered too.

  Paper: Morad et al. 2023, arXiv:2303.01859; popgym 1.0.7.
  """

  deck_type: str = "ranks"

  @property
  def environment(self) -> concentration.Concentration:
    return concentration.Concentration(
      num_decks=self.num_decks,
      num_ranks=self.num_ranks,
      deck_type=self.deck_type,
    )

  @property
  def vocab_size(self) -> int:
    game = self.environment
    return game.num_faces * game.num_cards + 1

  def example(self, key):
    game = self.environment
    deal, flips = jax.random.split(key)
    state, _ = game.reset(deal)
    place = jnp.arange(game.num_cards, dtype=jnp.int32)

    def flip(carry, word):
      state, seen, over = carry  # seen: int32 [N], when, or -1

      def match(p):  # the latest seen card that makes a pair with that at p
        same = (state.cards == state.cards[p]) & ~state.face_up & (place != p)
        when = jnp.where(same, seen, -1)
        return jnp.argmax(when).astype(jnp.int32), jnp.max(when) >= 0

      free = ~state.face_up & (place != state.first)
      rank = sampling.below(word, jnp.maximum(jnp.sum(free), 1))
      any_card = jnp.argmax(jnp.cumsum(free) > rank).astype(jnp.int32)
      known, is_known = match(state.first)
      second = state.first >= 0
      action = jnp.where(second & is_known, known, any_card)
      target, asked = match(action)
      token = game.num_faces * action + state.cards[action]
      token = jnp.where(over, self.vocab_size - 1, token)
      asked &= ~second & ~over

      seen = seen.at[action].set(state.time)
      state, _, _, done = game.step(None, state, action)
      row = token, target, asked.astype(jnp.float32)
      return (state, seen, over | done), row

    words = jax.random.bits(flips, (game.length,), jnp.uint32)
    seen = jnp.full((game.num_cards,), -1, jnp.int32)
    start = state, seen, jnp.zeros((), bool)
    return jax.lax.scan(flip, start, words)[1]

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    predictions = np.zeros_like(inputs)
    for row, tokens in enumerate(inputs):
      table = {}  # place: face, the latest seen last
      for t in range(0, len(tokens), 2):
        if tokens[t] == self.vocab_size - 1:
          break
        turn = np.divmod(tokens[t : t + 2], self.environment.num_faces)
        (first, second), faces = turn
        for place, face in table.items():
          if face == faces[0] and place != first:
            predictions[row, t] = place
        for place, face in zip((first, second), faces):
          table.pop(place, None)
          table[place] = face
        if faces[0] == faces[1]:
          del table[first], table[second]
    return predictions


for _game, _task in (
  ("autoencode", PopgymAutoencode),
  ("concentration", PopgymConcentration),
  ("count_recall", PopgymCountRecall),
  ("repeat_first", PopgymRepeatFirst),
  ("repeat_previous", PopgymRepeatPrevious),
):
  for _difficulty, _options in environments.presets(_game).items():
    task_lib.register(f"popgym_{_game}_{_difficulty}", _task, **_options)
