"""POPGym's games: the rules, the deals, and the supervised tasks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import task_checks

from memzoo import tasks
from memzoo.tasks import concentration, environments, popgym, quizzes

del popgym  # registers the tasks

GAMES = (
  "autoencode",
  "concentration",
  "count_recall",
  "repeat_first",
  "repeat_previous",
)
QUIZZES = tuple(game for game in GAMES if game != "concentration")
LEVELS = ("easy", "medium", "hard")
PARITY = [(game, level) for game in GAMES for level in LEVELS]

CASES = {
  "autoencode": dict(name="popgym_autoencode_small", num_ranks=3),
  "concentration": dict(name="popgym_concentration_small", num_ranks=3),
  "concentration_colors": dict(name="popgym_concentration_easy", num_ranks=2),
  "count_recall": dict(
    name="popgym_count_recall_small", num_ranks=3, deck_type="ranks"
  ),
  "repeat_first": dict(
    name="popgym_repeat_first_small", num_ranks=2, num_decks=2
  ),
  "repeat_previous": dict(
    name="popgym_repeat_previous_small", num_ranks=3, k=5
  ),
}

test_contract = task_checks.contract_test(CASES)


# Constants


def test_published_constants():
  """Episode lengths, actions and reward scales of popgym 1.0.7."""
  got = {
    (game, level): (g.length, g.num_actions, g.symbols[0], len(g.symbols))
    for game, level in PARITY
    for g in [environments.make(game, level)]
  }
  assert got == {
    ("repeat_first", "easy"): (51, 4, 4, 1),
    ("repeat_first", "medium"): (415, 4, 4, 1),
    ("repeat_first", "hard"): (831, 4, 4, 1),
    ("repeat_previous", "easy"): (51, 4, 4, 1),
    ("repeat_previous", "medium"): (103, 4, 4, 1),
    ("repeat_previous", "hard"): (155, 4, 4, 1),
    ("autoencode", "easy"): (103, 4, 2, 2),
    ("autoencode", "medium"): (207, 4, 2, 2),
    ("autoencode", "hard"): (311, 4, 2, 2),
    ("count_recall", "easy"): (51, 27, 2, 2),
    ("count_recall", "medium"): (103, 27, 4, 2),
    ("count_recall", "hard"): (207, 17, 13, 2),
    ("concentration", "easy"): (104, 52, 3, 52),
    ("concentration", "medium"): (208, 104, 3, 104),
    ("concentration", "hard"): (104, 52, 14, 52),
  }
  previous = [environments.make("repeat_previous", level) for level in LEVELS]
  assert [(g.k, g.asked) for g in previous] == [(4, 48), (32, 72), (64, 92)]
  for game, level in PARITY:
    task = tasks.make(f"popgym_{game}_{level}")
    assert task.environment == environments.make(game, level)
    assert task.length == task.environment.length


# The parity with the package


def deck_of(env, fields):
  """What the cards of a popgym deck show, in the order of the deal."""
  return jnp.asarray(getattr(env, fields)[env.idx[::-1]], jnp.int32)


def hidden_state(game, env):
  """The state of ours that popgym's environment is in after its reset."""
  zero = jnp.zeros((), jnp.int32)
  if game == "concentration":
    cards = jnp.asarray(env.deck_idx_type[env.deck.idx], jnp.int32)
    return concentration.ConcentrationState(
      cards, jnp.zeros(cards.shape, bool), jnp.full((), -1, jnp.int32), zero
    )
  if game == "count_recall":
    values, queries = (
      jnp.asarray(env.deck_idx_type[deck.idx[::-1]], jnp.int32)
      for deck in (env.value_deck, env.query_deck)
    )
    return quizzes.QuizState((values, queries), zero)
  return quizzes.QuizState(deck_of(env.deck, "suits_idx"), zero)


def players(game, seed):
  """Two ways to act, so that every rule is met: by chance; and mostly right,
  by one who sees the cards, and at times flips a card twice."""
  rng = np.random.default_rng(seed)

  def chance(state):
    return rng.integers(game.num_actions)

  def clever(state):
    if rng.random() < 0.2:
      return chance(state)
    if isinstance(game, quizzes.Quiz):
      return int(game.answer(state)[0])
    free = np.flatnonzero(~np.asarray(state.face_up))
    first, cards = int(state.first), np.asarray(state.cards)
    if first < 0:
      return rng.choice(free)
    if rng.random() < 0.1:
      return first
    pairs = free[(cards[free] == cards[first]) & (free != first)]
    return rng.choice(pairs) if len(pairs) else chance(state)

  return chance, clever


@pytest.mark.parametrize(
  "name,level", PARITY, ids=["_".join(p) for p in PARITY]
)
def test_same_game_as_the_package(name, level):
  """Equal cards and actions: equal observations, rewards and ends."""
  envs = pytest.importorskip("popgym.envs")
  words = "".join(word.capitalize() for word in name.split("_"))
  env = getattr(envs, words + level.capitalize())()
  game = environments.make(name, level)
  step = jax.jit(functools.partial(game.step, None))
  ends = []
  for seed, player in enumerate(players(game, 0)):
    shown, _ = env.reset(seed=seed)
    state = hidden_state(name, env)
    _, fresh = game.reset(jax.random.key(0))
    assert fresh.shape == (len(game.symbols),) and fresh.dtype == jnp.int32
    observe = getattr(game, "observe", None) or (lambda s: fresh)
    np.testing.assert_array_equal(observe(state), np.atleast_1d(shown))
    total, done = 0.0, False
    while not done:
      action = int(player(state))
      shown, reward, terminated, truncated, _ = env.step(action)
      done = terminated or truncated
      state, observation, ours, over = step(state, jnp.int32(action))
      np.testing.assert_array_equal(observation, np.atleast_1d(shown))
      np.testing.assert_allclose(ours, reward, rtol=1e-6)
      assert bool(over) == done
      total += reward
    ends.append(total)
  assert -1 - 1e-6 <= ends[0] < ends[1] <= 1 + 1e-6


# The rules, without the package


@functools.partial(jax.jit, static_argnums=0)
def play(game, state, actions):
  """(observations, rewards, dones) after each action."""

  def step(state, action):
    state, *rest = game.step(None, state, action)
    return state, rest

  return jax.lax.scan(step, state, actions)[1]


@pytest.mark.parametrize("name", QUIZZES)
def test_answers_win_the_game(name):
  """A task's row is an episode: its inputs are the observations, its targets
  earn 1 in all, and other actions -1."""
  case = dict(CASES[name])
  task = tasks.make(**case)
  game, key = task.environment, jax.random.key(7)
  inputs, targets, weights = map(np.asarray, jax.jit(task.example)(key))
  state, first = game.reset(key)
  seen, rewards, dones = play(game, state, jnp.asarray(targets))
  seen = np.concatenate([np.asarray(first)[None], seen[:-1]])
  radix = np.cumprod((1, *game.symbols[:0:-1]))[::-1]
  np.testing.assert_array_equal(seen @ radix, inputs)
  np.testing.assert_array_equal(np.asarray(rewards) > 0, weights > 0)
  assert np.isclose(rewards.sum(), 1, atol=1e-5)
  assert dones[-1] and not dones[:-1].any()
  wrong = jnp.asarray((targets + 1) % game.num_actions)
  assert np.isclose(play(game, state, wrong)[1].sum(), -1, atol=1e-5)


def test_layouts_by_hand():
  """Each game of six or eight cards, written out."""
  zero = jnp.zeros((), jnp.int32)
  cards = jnp.array([2, 0, 1, 3], jnp.int32)

  def rows(game, hidden):
    times = range(game.length)
    states = [quizzes.QuizState(hidden, zero + t) for t in times]
    answers = [game.answer(s) for s in states]
    return (
      [tuple(map(int, game.observe(s))) for s in states],
      [int(a) if asked else None for a, asked in answers],
    )

  one = dict(num_ranks=1)
  assert rows(quizzes.RepeatFirst(**one), cards) == (
    [(2,), (0,), (1,)], [2, 2, 2],
  )  # fmt: skip
  assert rows(quizzes.RepeatPrevious(k=2, **one), cards) == (
    [(2,), (0,), (1,)], [None, 2, 0],
  )  # fmt: skip
  assert rows(quizzes.Autoencode(**one), cards) == (
    [(1, 2), (1, 0), (1, 1), (0, 3), (0, 0), (0, 0), (0, 0)],
    [None, None, None, 3, 1, 0, 2],
  )
  values, queries = jnp.array([1, 1, 0, 0]), jnp.array([0, 1, 0, 1])
  hidden = values.astype(jnp.int32), queries.astype(jnp.int32)
  assert rows(quizzes.CountRecall(**one), hidden) == (
    [(1, 0), (1, 1), (0, 0)], [0, 2, 1],
  )  # fmt: skip


class Table:
  """Concentration in plain Python, from its description."""

  def __init__(self, cards):
    self.cards, self.found, self.turn, self.flips = cards, set(), [], 0

  def flip(self, place):
    n = len(self.cards)
    self.turn.append(place)
    self.flips += 1
    up = self.found | set(self.turn)
    shown = [
      c if p in up else max(self.cards) + 1 for p, c in enumerate(self.cards)
    ]
    reward, ends = 0.0, True
    if place in self.found:
      reward = -len(self.turn) / (2 * n)
    elif len(self.turn) == 1:
      ends = False
    elif (
      len(set(self.turn)) == 2 and len({self.cards[p] for p in self.turn}) == 1
    ):
      self.found |= set(self.turn)
      reward = 2 / n
    else:
      reward = -2 / (2 * n)
    if ends:
      self.turn = []
    done = len(self.found) == n or self.flips == 2 * n
    return shown, reward, done


@pytest.mark.parametrize("seed", range(3))
def test_concentration_by_its_rules(seed):
  game = concentration.Concentration(num_ranks=2, deck_type="ranks")
  state, shown = game.reset(jax.random.key(seed))
  cards = np.asarray(state.cards).tolist()
  assert sorted(cards) == [0] * 4 + [1] * 4 and (np.asarray(shown) == 2).all()
  rng, table, log = np.random.default_rng(seed), Table(cards), []
  for _ in range(game.length):
    free = [p for p in range(8) if p not in table.found]
    place = rng.choice(free) if rng.random() < 0.9 else rng.integers(8)
    log.append((int(place), *table.flip(int(place))))
    if log[-1][-1]:
      break
  actions, shown, rewards, dones = (np.array(x) for x in zip(*log))
  padded = np.zeros(game.length, np.int32)
  padded[: len(log)] = actions
  got = [np.asarray(x)[: len(log)] for x in play(game, state, padded)]
  np.testing.assert_array_equal(got[0], shown)
  np.testing.assert_allclose(got[1], rewards, rtol=1e-6)
  np.testing.assert_array_equal(got[2], dones)
  assert {-1, 1} <= set(np.sign(rewards))  # the rules were met


def test_perfect_and_worst_returns_of_concentration():
  game = concentration.Concentration(num_ranks=2, deck_type="colors")
  state, _ = game.reset(jax.random.key(0))
  order = np.argsort(np.asarray(state.cards), kind="stable").astype(np.int32)
  _, rewards, dones = play(game, state, np.tile(order, 2))
  assert np.isclose(rewards[:8].sum(), 1) and dones[7] and not dones[:7].any()
  _, rewards, dones = play(game, state, np.zeros(16, np.int32))
  assert np.isclose(rewards.sum(), -1) and dones[15] and not dones[:15].any()


@pytest.mark.parametrize("case", ["concentration", "concentration_colors"])
def test_concentration_rows_are_episodes(case):
  """The tokens are flips of one game, and each target is a pair when played;
  the player has perfect memory and flips by chance else."""
  task = tasks.make(**CASES[case])
  game, n = task.environment, task.environment.num_cards
  batch = task.batch(0, 0, 8)
  asked = ended = 0
  for tokens, targets, weights in zip(*map(np.asarray, batch[:3])):
    length = int((tokens < n * game.num_faces).sum())
    assert (tokens[length:] == task.vocab_size - 1).all()
    places, faces = np.divmod(tokens[:length], game.num_faces)
    cards = dict(zip(places, faces))
    assert len(cards) == n or length == task.length
    table = Table([cards.get(p, game.num_faces - 1) for p in range(n)])
    seen = {}
    for t, (place, face) in enumerate(zip(places, faces)):
      assert cards[place] == face and place not in table.found
      first = not table.turn
      known = [
        p
        for p in seen
        if cards[p] == face and p not in table.found and p != place
      ]
      assert weights[t] == (first and bool(known))
      if weights[t]:
        assert targets[t] == max(known, key=seen.get) == places[t + 1]
      *_, reward, done = table.flip(place)
      assert t == 0 or not weights[t - 1] or np.isclose(reward, 2 / n)
      seen[place] = t
    assert done and not weights[length:].any()
    asked += weights.sum()
    ended += length < task.length
  assert asked > 8 and ended > 4


# The deals


def test_decks_are_dealt_without_replacement():
  """Suits even in every row; neighbours equal as often as in a shuffled deck,
  12 of 51 times, and not as in independent draws."""
  batch = tasks.make("popgym_autoencode_easy").batch(0, 0, 2048)
  suits = np.asarray(batch.inputs)[:, :52] % 4
  counts = (suits[..., None] == np.arange(4)).sum(1)
  assert (counts == 13).all()
  first = np.bincount(suits[:, 0], minlength=4) / len(suits)
  assert np.abs(first - 0.25).max() < 5 * np.sqrt(3 / 16 / 2048)
  equal = (suits[:, 1:] == suits[:, :-1]).mean()
  assert abs(equal - 12 / 51) < 0.005


def test_the_two_decks_of_count_recall_differ():
  task = tasks.make("popgym_count_recall_hard", num_decks=1)
  values, queries = np.divmod(np.asarray(task.batch(0, 0, 512).inputs), 13)
  assert abs((values == queries).mean() - 1 / 13) < 0.01
  counts = (values[..., None] == np.arange(13)).sum(1)
  assert counts.max() == 4 and counts.sum(1).min() == 51


# As an agent's environment


@pytest.mark.parametrize("name", ["concentration", "count_recall"])
def test_rollout_with_resets(name):
  """Under jit, vmap and scan, with the reset by the caller."""
  game = environments.make(name, "small", num_ranks=2)
  length = 2 * game.length + 1

  @jax.jit
  def rollout(key):
    def step(carry, key):
      state, observation = carry
      act, deal, luck = jax.random.split(key, 3)
      action = jax.random.randint(act, (), 0, game.num_actions, jnp.int32)
      state, observation, reward, done = game.step(luck, state, action)
      carry = jax.tree.map(
        lambda new, old: jnp.where(done, new, old),
        game.reset(deal),
        (state, observation),
      )
      return carry, (game.features(observation), reward, done)

    return jax.lax.scan(step, game.reset(key), jax.random.split(key, length))[1]

  features, rewards, dones = jax.vmap(rollout)(
    jax.random.split(jax.random.key(1), 4)
  )
  assert features.shape == (4, length, game.observation_size)
  assert features.dtype == rewards.dtype == jnp.float32 and dones.dtype == bool
  np.testing.assert_array_equal(features.sum(-1), len(game.symbols))
  assert (dones.sum(1) >= 2).all()
  for row in range(4):
    ends = np.flatnonzero(dones[row])
    for start, end in zip([0, *ends[:-1] + 1], ends + 1):
      assert end - start <= game.length
      assert -1 - 1e-5 <= rewards[row, start:end].sum() <= 1 + 1e-5


def test_features_name_each_entry():
  game = environments.make("autoencode", "small")
  np.testing.assert_array_equal(
    game.features(jnp.array([[1, 2], [0, 3]], jnp.int32)),
    [[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]],
  )


@pytest.mark.parametrize(
  "call,message",
  [
    (lambda: environments.make("repeat_frist"), "repeat_first"),
    (lambda: environments.make("repeat_first", "esay"), "easy"),
    (lambda: environments.make("repeat_first", k=2), "num_decks"),
    (lambda: environments.make("repeat_previous", k=52), "1 to 51; got 52"),
    (lambda: environments.make("autoencode", num_decks=0), "num_decks"),
    (lambda: environments.make("concentration", deck_type="suits"), "ranks"),
    (
      lambda: tasks.make("popgym_count_recall_easy", deck_type="kings"),
      "suits",
    ),
    (lambda: tasks.make("popgym_repeat_previous_easy", k=0), "1 to 51; got 0"),
    (lambda: tasks.make("popgym_autoencode_easy", num_test=0), "num_test"),
  ],
)
def test_errors_say_what_is_accepted(call, message):
  with pytest.raises(ValueError, match=message):
    call()
