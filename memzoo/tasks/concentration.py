"""Concentration: find the pairs among cards that lie face down."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import environments, task as task_lib
from memzoo.tasks.environments import Environment


class ConcentrationState(NamedTuple):
  """A table of N cards."""

  cards: jax.Array  # int32 [N], what each place shows when it is face up
  face_up: jax.Array  # bool [N], the pairs that were found
  first: jax.Array  # int32 [], place of the turn's first card; -1 before it
  time: jax.Array  # int32 [], flips so far


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concentration(Environment):
  """Find the pairs among cards that lie face down.

  An action flips the card at a place. The observation shows the pairs that
  were found and the cards of the present turn; a card face down shows the
  number of faces. Two flips make a turn. A pair of one face stays face up and
  earns 2 / N; a turn without a pair costs 2 / (2N); a flip of a card that is
  face up already ends the turn, at 1 / (2N) for each card of it. The episode
  ends when all cards are face up, or after 2N flips.

  Attributes:
    deck_type: what makes a pair: 'colors' or 'ranks'.

  Presets: easy: 1 deck by colour. medium: 2 decks by colour. hard: 1 deck by
    rank. small: 16 cards by rank, not published.

  Differs: the flip that the time limit allows last gives `done` as any end
    does; POPGym reports it apart, as truncation.

  Paper: Morad et al. 2023, arXiv:2303.01859; popgym 1.0.7.
  """

  deck_type: str = "ranks"

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_choice(
      "Concentration", "deck_type", self.deck_type, ("colors", "ranks")
    )

  @property
  def num_faces(self) -> int:
    """Number of faces, which is also what a card face down shows."""
    return self._num_faces(self.deck_type)

  @property
  def symbols(self) -> tuple[int, ...]:
    return (self.num_faces + 1,) * self.num_cards

  @property
  def num_actions(self) -> int:
    return self.num_cards

  @property
  def length(self) -> int:
    return 2 * self.num_cards

  def reset(self, key):
    state = ConcentrationState(
      cards=jax.random.permutation(key, self._faces(self.deck_type)),
      face_up=jnp.zeros((self.num_cards,), bool),
      first=jnp.full((), -1, jnp.int32),
      time=jnp.zeros((), jnp.int32),
    )
    return state, self._observe(state, state.face_up)

  def step(self, key, state, action):
    del key
    cards, first = state.cards, state.first
    place = jnp.arange(self.num_cards)
    turn = (place == action) | (place == first)
    second = first >= 0
    again = state.face_up[action]
    pair = second & ~again & (action != first)
    pair &= cards[action] == cards[first]

    cost = np.float32(1 / self.length)
    flips = jnp.where(second, np.float32(2), np.float32(1))
    reward = jnp.where(again | second, -cost * flips, np.float32(0))
    reward = jnp.where(pair, np.float32(2 / self.num_cards), reward)
    after = ConcentrationState(
      cards=cards,
      face_up=state.face_up | (turn & pair),
      first=jnp.where(again | second, -1, action).astype(jnp.int32),
      time=state.time + 1,
    )
    done = jnp.all(after.face_up) | (after.time == self.length)
    return after, self._observe(after, state.face_up | turn), reward, done

  def _observe(self, state, shown):
    return jnp.where(shown, state.cards, self.num_faces)


environments.register(
  "concentration",
  Concentration,
  easy=dict(num_decks=1, deck_type="colors"),
  medium=dict(num_decks=2, deck_type="colors"),
  hard=dict(num_decks=1, deck_type="ranks"),
  small=dict(num_ranks=4, deck_type="ranks"),
)
