"""The agent: what it recomputes, what it estimates, and that it learns."""

import json

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import agent as program, ppo as ppo_lib
from memzoo import training

# All runs have these, so that they share compilations.
SMALL = (
  "--env_options=num_ranks=2", "--d_model=16", "--model_options=mlp_width=16",
  "--num_envs=32", "--unroll=16", "--minibatches=2", "--learning_rate=3e-3",
  "--total_steps=40960", "--log_every=20",
)  # fmt: skip


def config(*arguments):
  values = flags.FlagValues()
  program.define(values)
  values(["agent", *SMALL, *arguments])
  return values


def make(*arguments):
  """An agent whose first policy is far from uniform."""
  values = config(*arguments)
  game, agent = program.build(values)
  agent.actor.kernel[...] *= 100.0
  return ppo_lib.Ppo(values, game, agent)


def two_updates(*arguments):
  ppo = make(*arguments)
  state, first = ppo.update(ppo.init())
  state, second = ppo.update(state)
  return state.params, jax.device_get([first, second])


def same(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
  "arguments",
  [
    ["--cell=linear_attention", "--cell_options=num_heads=2"],
    pytest.param(
      ["--cell=product_key", "--cell_options=num_keys=4,batch_norm=true"],
      marks=pytest.mark.slow,
    ),
  ],
  ids=["linear_attention", "product_key"],
)
def test_recomputing_gives_the_same_policy(arguments):
  """Seven-step episodes end inside sixteen steps of play, where the fast form
  has to forget; the ratio of probabilities is 1 before the first step."""
  _, metrics = two_updates(*arguments)
  for update in metrics:
    assert update["episodes"] >= 64 and update["ratio_error"] < 1e-4
    assert all(np.isfinite(value) for value in update.values())
    assert -1 <= update["returns"] / update["episodes"] <= 1


@pytest.mark.slow
def test_equal_seeds_equal_numbers():
  runs = [two_updates(f"--seed={seed}") for seed in (0, 0, 1)]
  assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
  metrics = runs[0][1]
  assert metrics[0]["loss"] != metrics[1]["loss"]
  for update in metrics:
    assert update["ratio_error"] < 1e-4
    assert all(np.isfinite(value) for value in update.values())


@pytest.fixture(scope="module")
def played():
  """(algorithm, states before and after, plays and scores [T, B])."""
  ppo = make()

  def body(state, key):
    state, play, score = ppo._play(state, key)
    return state, (play, score)

  before = ppo.init()
  keys = jax.random.split(jax.random.key(5), 16)
  after, rest = jax.jit(lambda s: jax.lax.scan(body, s, keys))(before)
  return ppo, before, after, *jax.device_get(rest)


def test_play_is_as_the_game_has_it(played):
  """Marks, previous actions, rewards and scores of the sequences played."""
  _, _, state, play, scores = played
  seen, before, mark = np.split(play.inputs, [4, 8], axis=-1)
  np.testing.assert_array_equal(np.flatnonzero(play.done[:, 0]), [6, 13])
  np.testing.assert_array_equal(play.start[1:], play.done[:-1])
  assert (
    play.start[0].all() and (np.asarray(state.start) == play.done[-1]).all()
  )
  np.testing.assert_array_equal(mark[..., 0], play.start)
  expected = np.eye(4)[play.action[:-1]] * ~play.start[1:, :, None]
  np.testing.assert_array_equal(before[1:], expected)
  assert not before[0].any()
  for first in (0, 7):
    right = play.action[first : first + 7] == seen[first].argmax(-1)
    rewards = np.where(right, 1 / 7, -1 / 7)
    np.testing.assert_allclose(
      play.reward[first : first + 7], rewards, rtol=1e-6
    )
    np.testing.assert_allclose(scores[first + 6], rewards.sum(0), atol=1e-6)
  assert not scores[~play.done].any()


def test_forgetting_matters(played):
  """Recomputed with the resets the ratio is 1, and without them it is not."""
  ppo, state, _, play, _ = played
  play = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), play)
  zeros = jnp.zeros_like(play.reward)

  @jax.jit
  def error(start):
    return ppo._loss(
      state.params,
      state.buffers,
      state.memory,
      play._replace(start=start),
      zeros,
      zeros,
    )[1]["ratio_error"]

  assert error(play.start) < 1e-4
  assert error(jnp.zeros_like(play.start)) > 1e-2


def test_advantages_by_their_definition(played):
  """Sums of discounted errors up to the end of the episode or of the play."""
  ppo = played[0]
  gamma, rate = ppo.config.gamma, ppo.config.gamma * ppo.config.gae_lambda
  rng = np.random.default_rng(0)
  value, reward = rng.normal(size=(2, 3, 6)).astype(np.float32)
  done = np.zeros((3, 6), bool)
  done[0, 2] = done[1, 5] = done[2, 0] = True
  last = rng.normal(size=3).astype(np.float32)
  play = ppo_lib.Play(None, None, None, None, value, reward, done)
  got = ppo._advantages(jax.tree.map(jnp.asarray, play), jnp.asarray(last))
  after = np.concatenate([value[:, 1:], last[:, None]], 1)
  delta = reward + gamma * after * ~done - value
  for b, t in np.ndindex(3, 6):
    want = 0.0
    for l in range(6 - t):
      want += rate**l * delta[b, t + l]
      if done[b, t + l]:
        break
    assert np.isclose(got[b, t], want, atol=1e-5)


def test_it_learns(tmp_path):
  """Better than any player without memory, who knows the first card at the
  first step alone: later the odds of a suit are 2 in 7 at most."""
  writer = training.JsonlWriter(tmp_path / "metrics.jsonl")
  result = program.run(config(), [writer])
  memoryless = (1 + 6 * (2 * 2 / 7 - 1)) / 7
  assert result["mmer"] > 0.5 > memoryless
  assert result["env_steps"] == 40960 and result["episodes"] >= 40960 // 7 - 32
  lines = [json.loads(line) for line in writer.path.read_text().splitlines()]
  assert [line["step"] for line in lines] == [10240, 20480, 30720, 40960]
  mmer = [line["mmer"] for line in lines]
  assert mmer == sorted(mmer) and np.isclose(mmer[-1], result["mmer"])
  assert all(line["mean_return"] <= line["mmer"] + 1e-6 for line in lines)


@pytest.mark.parametrize(
  "arguments,message",
  [
    (["--env=repeat_frist"], "repeat_first"),
    (["--env_options=num_rank=2"], "num_ranks"),
    (["--cell=grru"], "gru"),
    (["--num_envs=9"], "num_envs 9 is no multiple of minibatches 2"),
    (["--learning_rate=0"], "learning_rate"),
  ],
)
def test_errors_name_what_is_wrong(arguments, message):
  with pytest.raises(ValueError, match=message):
    program.run(config(*arguments))
