"""Games of memory, for agents: POPGym's, as pure functions on the device.

An episode, in a loop that the caller compiles:

  state, observation = game.reset(key)
  state, observation, reward, done = game.step(key, state, action)

`done` is the memory's reset: the caller starts the next episode and passes
`reset` to the model with its first observation. Rewards are scaled as in
POPGym: the return of an episode lies in [-1, 1], and 1 is perfect.

The games are in `tasks/quizzes.py` and `tasks/concentration.py`;
`experiments/agent.py` trains on them, and `tasks/popgym.py` makes supervised
tasks of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import task as task_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
  """A game with a deck of cards: a value with pure functions.

  Card c of the N has suit c mod 4, colour c mod 2 and rank (c // 4) mod
  num_ranks, as in POPGym. All decks are shuffled together.

  Attributes:
    num_decks: decks that are shuffled together.
    num_ranks: ranks of a suit; POPGym's 13 make decks of 52 cards.
    symbols: how many values each entry of an observation takes.
    num_actions: actions are integers in [0, num_actions).
    length: the most steps of an episode.
  """

  num_decks: int = 1
  num_ranks: int = 13

  def __post_init__(self):
    owner = type(self).__name__
    task_lib.check_int(owner, "num_decks", self.num_decks, 1)
    task_lib.check_int(owner, "num_ranks", self.num_ranks, 1)

  @property
  def symbols(self) -> tuple[int, ...]:
    raise NotImplementedError(type(self).__name__)

  @property
  def num_actions(self) -> int:
    raise NotImplementedError(type(self).__name__)

  @property
  def length(self) -> int:
    raise NotImplementedError(type(self).__name__)

  def reset(self, key: jax.Array) -> tuple[Any, jax.Array]:
    """A new episode.

    Args:
      key: shuffles the cards.

    Returns:
      (state, observation int32 [S]).
    """
    raise NotImplementedError(type(self).__name__)

  def step(
    self, key: jax.Array, state: Any, action: jax.Array
  ) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """The answer of the game to an action.

    Args:
      key: for games with chance after the deal; POPGym's have none, and do
        not read it.
      state: of `reset` or `step`. After `done` nothing is defined.
      action: int32 [].

    Returns:
      (state, observation int32 [S], reward float32 [], done bool []).
    """
    raise NotImplementedError(type(self).__name__)

  @property
  def num_cards(self) -> int:
    """N."""
    return 4 * self.num_ranks * self.num_decks

  @property
  def observation_size(self) -> int:
    """Width of `features`."""
    return sum(self.symbols)

  def features(self, observation: jax.Array) -> jax.Array:
    """float32 [..., observation_size]: one indicator vector for each entry."""
    most = max(self.symbols)
    hot = jax.nn.one_hot(observation, most, dtype=jnp.float32)
    used = np.arange(most) < np.array(self.symbols)[:, None]
    hot = hot.reshape(*hot.shape[:-2], used.size)
    return hot[..., np.flatnonzero(used)]

  def _faces(self, kind: str) -> np.ndarray:
    """int32 [N]: what the cards show."""
    card = np.arange(self.num_cards, dtype=np.int32)
    if kind == "ranks":
      return card // 4 % self.num_ranks
    return card % {"colors": 2, "suits": 4}[kind]

  def _num_faces(self, kind: str) -> int:
    return {"colors": 2, "suits": 4, "ranks": self.num_ranks}[kind]


_PRESETS: dict[str, tuple[type[Environment], dict[str, dict[str, Any]]]] = {}


def register(game: str, build: type[Environment], **presets) -> None:
  """Names a game: a class, and its options for each difficulty."""
  if game in _PRESETS:
    raise ValueError(f"environment {game!r} is registered already")
  _PRESETS[game] = (build, presets)


def names() -> tuple[str, ...]:
  """Names of all games, sorted."""
  return tuple(sorted(_PRESETS))


def presets(game: str) -> dict[str, dict[str, Any]]:
  """{difficulty: options} of a game."""
  if game not in _PRESETS:
    raise ValueError(task_lib.unknown("environment", game, names()))
  return _PRESETS[game][1]


def make(game: str, difficulty: str = "easy", **overrides) -> Environment:
  """The game of that name.

  Args:
    game: one of `names()`.
    difficulty: 'easy', 'medium' or 'hard' with POPGym's constants, or 'small'.
    **overrides: options that replace those of the preset.

  Raises:
    ValueError: unknown game, difficulty or option, or a value out of range.
  """
  owner = f"environment {game!r}"
  options = presets(game)
  task_lib.check_choice(owner, "difficulty", difficulty, options)
  build = _PRESETS[game][0]
  fields = [field.name for field in dataclasses.fields(build)]
  for option in overrides:
    if option not in fields:
      raise ValueError(task_lib.unknown(f"option of {owner}", option, fields))
  return build(**{**options[difficulty], **overrides})
