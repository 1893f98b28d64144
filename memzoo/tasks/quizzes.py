"""Games that ask for what was seen before: the quizzes among POPGym's."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import environments, task as task_lib
from memzoo.tasks.environments import Environment


class QuizState(NamedTuple):
  """A quiz after `time` steps."""

  hidden: Any  # what was dealt: int32 [N], or a tuple of such
  time: jax.Array  # int32 []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quiz(Environment):
  """A game whose observations do not depend on the actions.

  At each step there is one right action or none is asked. A right one earns
  1 / A, a wrong one -1 / A, with A the number of steps that ask, so that a
  player who is right with frequency p has the return 2 p - 1.

  A concrete game writes `deal`, `observe` and `answer`.

  Attributes:
    asked: A.
  """

  @property
  def asked(self) -> int:
    return self.length

  def deal(self, key: jax.Array) -> Any:
    """What the key decides: the `hidden` of the state."""
    return jax.random.permutation(key, self._faces("suits"))

  def observe(self, state: QuizState) -> jax.Array:
    """The observation at `state.time`, int32 [S]."""
    raise NotImplementedError(type(self).__name__)

  def answer(self, state: QuizState) -> tuple[jax.Array, jax.Array]:
    """The right action at `state.time` and whether it is asked, [] each."""
    raise NotImplementedError(type(self).__name__)

  def reset(self, key):
    state = QuizState(self.deal(key), jnp.zeros((), jnp.int32))
    return state, self.observe(state)

  def step(self, key, state, action):
    del key
    right, asked = self.answer(state)
    gain = np.float32(1 / self.asked)
    reward = jnp.where(action == right, gain, -gain)
    reward = jnp.where(asked, reward, np.float32(0))
    state = QuizState(state.hidden, state.time + 1)
    return state, self.observe(state), reward, state.time == self.length


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatFirst(Quiz):
  """Name the suit of the first card at every step.

  The cards are shown one by one, by suit. The last is not acted on.

  Presets: easy, medium, hard: 1, 8, 16 decks. small: 32 cards, not published.

  Differs: POPGym's text speaks of a mark on the first card; its code, followed
    here, has none in the observation (`experiments/agent.py` adds one, as the
    paper's experiments do).

  Paper: Morad et al. 2023, POPGym: Benchmarking Partially Observable
    Reinforcement Learning, arXiv:2303.01859; popgym 1.0.7.
  """

  symbols: ClassVar[tuple[int, ...]] = (4,)
  num_actions: ClassVar[int] = 4

  @property
  def length(self) -> int:
    return self.num_cards - 1

  def observe(self, state):
    return state.hidden[state.time][None]

  def answer(self, state):
    return state.hidden[0], jnp.ones((), bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatPrevious(Quiz):
  """Name the suit of the k-th last card, the present one counted.

  Nothing is asked until k cards have been shown. The last card of all is not
  acted on.

  Attributes:
    k: 1 asks for the card that is shown.

  Presets: easy: 1 deck, k = 4. medium: 2 decks, k = 32. hard: 3 decks, k = 64.
    small: 32 cards, k = 4, not published.

  Differs: POPGym's text counts k from 0; its code, followed here, from 1.

  Paper: Morad et al. 2023, arXiv:2303.01859; popgym 1.0.7.
  """

  k: int = 4

  symbols: ClassVar[tuple[int, ...]] = (4,)
  num_actions: ClassVar[int] = 4

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_int("RepeatPrevious", "k", self.k, 1, self.num_cards - 1)

  @property
  def length(self) -> int:
    return self.num_cards - 1

  @property
  def asked(self) -> int:
    return self.num_cards - self.k

  def observe(self, state):
    return state.hidden[state.time][None]

  def answer(self, state):
    then = state.time - (self.k - 1)
    return state.hidden[jnp.maximum(then, 0)], then >= 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencode(Quiz):
  """Watch all cards, then name their suits in reverse order.

  Observations are (mode, suit), mode 1 while watching and 0 in play. The last
  card comes with mode 0 and is asked at once; after it the observation is
  (0, 0).

  Presets: easy, medium, hard: 1, 2, 3 decks. small: 16 cards, not published.

  Paper: Morad et al. 2023, arXiv:2303.01859; popgym 1.0.7.
  """

  symbols: ClassVar[tuple[int, ...]] = (2, 4)
  num_actions: ClassVar[int] = 4

  @property
  def length(self) -> int:
    return 2 * self.num_cards - 1

  @property
  def asked(self) -> int:
    return self.num_cards

  def observe(self, state):
    last = self.num_cards - 1
    watch = (state.time < last).astype(jnp.int32)
    card = state.hidden[jnp.minimum(state.time, last)]
    return jnp.stack([watch, jnp.where(state.time <= last, card, 0)])

  def answer(self, state):
    last = self.num_cards - 1
    place = jnp.clip(2 * last - state.time, 0, last)
    return state.hidden[place], state.time >= last


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountRecall(Quiz):
  """Say how often the card asked for has been dealt, this deal included.

  Observations are (card dealt, card asked for), from two decks of their own;
  actions are counts. The last pair of cards is not acted on.

  Attributes:
    deck_type: what tells cards apart: 'colors', 'suits' or 'ranks'.

  Presets: easy: 1 deck by colour. medium: 2 decks by suit. hard: 4 decks by
    rank. small: 32 cards by colour, not published.

  Paper: Morad et al. 2023, arXiv:2303.01859; popgym 1.0.7.
  """

  deck_type: str = "colors"

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_choice(
      "CountRecall", "deck_type", self.deck_type, ("colors", "suits", "ranks")
    )

  @property
  def symbols(self) -> tuple[int, ...]:
    return (self._num_faces(self.deck_type),) * 2

  @property
  def num_actions(self) -> int:
    return self.num_cards // self._num_faces(self.deck_type) + 1

  @property
  def length(self) -> int:
    return self.num_cards - 1

  def deal(self, key):
    faces = self._faces(self.deck_type)
    return tuple(
      jax.random.permutation(k, faces) for k in jax.random.split(key)
    )

  def observe(self, state):
    values, queries = state.hidden
    return jnp.stack([values[state.time], queries[state.time]])

  def answer(self, state):
    values, queries = state.hidden
    dealt = jnp.arange(self.num_cards) <= state.time
    same = values == queries[state.time]
    return jnp.sum(dealt & same, dtype=jnp.int32), jnp.ones((), bool)


environments.register(
  "repeat_first",
  RepeatFirst,
  easy=dict(num_decks=1),
  medium=dict(num_decks=8),
  hard=dict(num_decks=16),
  small=dict(num_ranks=8),
)
environments.register(
  "repeat_previous",
  RepeatPrevious,
  easy=dict(num_decks=1, k=4),
  medium=dict(num_decks=2, k=32),
  hard=dict(num_decks=3, k=64),
  small=dict(num_ranks=8, k=4),
)
environments.register(
  "autoencode",
  Autoencode,
  easy=dict(num_decks=1),
  medium=dict(num_decks=2),
  hard=dict(num_decks=3),
  small=dict(num_ranks=4),
)
environments.register(
  "count_recall",
  CountRecall,
  easy=dict(num_decks=1, deck_type="colors"),
  medium=dict(num_decks=2, deck_type="suits"),
  hard=dict(num_decks=4, deck_type="ranks"),
  small=dict(num_ranks=8, deck_type="colors"),
)
