"""Trains a memory as an agent: recurrent PPO on a game of memory.

  python -m experiments.agent --cell=gru --env=repeat_first --difficulty=easy \\
    --d_model=64 --total_steps=400000 --workdir=runs/agent

The games are POPGym's (`memzoo/tasks/environments.py`). As in its experiments,
the model sees the observation, its previous action and a mark on the first
step of an episode. The score is the MMER, the highest mean return of episodes:
the mean over the latest update's, or over those of as many updates as make 100
episodes. The workdir gets `metrics.jsonl`. `experiments/ppo.py` is the
algorithm.
"""

import collections
import json
import math
import time

from absl import app, flags
from flax import nnx
import jax

from experiments import train
from experiments.ppo import Agent, Ppo
from memzoo import training
from memzoo.tasks import environments
import memzoo.tasks.popgym  # noqa: F401, registers the games

SMOOTHING = 100  # episodes, at least, in a mean return


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not on import, so that others can use `run`."""
  to = dict(flag_values=values)
  flags.DEFINE_list("cell", "gru", "A memory, or several for a hybrid.", **to)
  for name, default, about in (
    ("cell_options", "", "'num_heads=2,gru.reset_after=true', or JSON."),
    ("model_options", "", "'conv_size=4,mlp_width=0', or JSON."),
    ("implementation", None, "Form of the cells in training."),
    ("env", "repeat_first", "A game of memzoo.tasks.environments."),
    ("env_options", "", "'num_ranks=4', or JSON."),
    ("difficulty", "easy", "easy, medium, hard or small."),
    ("workdir", None, "Folder or bucket; nothing is kept if unset."),
  ):
    flags.DEFINE_string(name, default, about, **to)
  for name, default, about in (
    ("d_model", 64, "Width."),
    ("depth", 1, "Number of blocks."),
    ("num_envs", 64, "Players."),
    ("unroll", 64, "Steps of every player between two updates."),
    ("total_steps", 1_000_000, "Steps of all players together."),
    ("epochs", 4, "Passes over the sequences of an update."),
    ("minibatches", 4, "Gradient steps of a pass; each has whole sequences."),
    ("seed", 0, "Of parameters, deals and actions."),
    ("log_every", 10, "Updates to a line."),
  ):
    lower = 0 if name == "seed" else 1
    flags.DEFINE_integer(name, default, about, lower_bound=lower, **to)
  for name, default, about in (
    ("learning_rate", 1e-3, "At the start; a cosine brings it to zero."),
    ("gamma", 0.99, "Discount."),
    ("gae_lambda", 0.95, "Of the advantages."),
    ("clip", 0.2, "Of the ratio of probabilities."),
    ("entropy", 0.01, "Weight of the policy's entropy."),
    ("value", 0.5, "Weight of the critic's squared error."),
    ("grad_norm", 0.5, "Largest norm of the gradient."),
  ):
    flags.DEFINE_float(name, default, about, **to)


def build(config) -> tuple[environments.Environment, Agent]:
  """The game and the agent that the flags ask for.

  Raises:
    ValueError, TypeError: on unknown names and impossible options.
  """
  options = train.parse_options
  game = environments.make(
    config.env, config.difficulty, **options(config.env_options)
  )
  agent = Agent(
    train.make_cells(config),
    config.depth,
    game.observation_size + game.num_actions + 1,
    game.num_actions,
    rngs=nnx.Rngs(config.seed),
    **options(config.model_options),
  )
  if (agent.max_length or math.inf) < game.length:
    raise ValueError(
      f"{config.env}: an episode has up to {game.length} steps; the model holds"
      f" at most {agent.max_length}"
    )
  return game, agent


def run(config, writers=()) -> dict:
  """Trains as the flags say.

  Returns:
    'mmer', the mean return of the latest episodes ('mean_return'), counts and
    times. Means are None where no episode ended.
  """
  game, agent = build(config)
  ppo = Ppo(config, game, agent)
  state = ppo.init()
  window, best = collections.deque(), None
  mean, episodes, began = math.nan, 0, time.perf_counter()
  for writer in writers:
    writer.start(0)
  for update in range(1, ppo.updates + 1):
    state, metrics = ppo.update(state)
    metrics = {name: float(value) for name, value in metrics.items()}
    ended = int(metrics.pop("episodes"))
    episodes += ended
    window.append((metrics.pop("returns"), ended))
    while sum(n for _, n in window) - window[0][1] >= SMOOTHING:
      window.popleft()
    count = sum(n for _, n in window)
    mean = sum(total for total, _ in window) / count if count else math.nan
    if count >= SMOOTHING:
      best = mean if best is None else max(best, mean)
    if update % config.log_every == 0 or update == ppo.updates:
      mmer = mean if best is None else best
      metrics = {"mean_return": mean, "mmer": mmer, **metrics}
      for writer in writers:
        writer.write(update * ppo.steps_per_update, "train", metrics)
  seconds = time.perf_counter() - began
  mean = mean if math.isfinite(mean) else None
  return {
    "mmer": mean if best is None else best,
    "mean_return": mean,
    "episodes": episodes,
    "env_steps": ppo.updates * ppo.steps_per_update,
    "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    "seconds": seconds,
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  with train.one_line_errors():
    writers = [train.Progress(FLAGS.total_steps)]
    if FLAGS.workdir is not None:
      path = training.open_workdir(FLAGS.workdir) / "metrics.jsonl"
      writers.append(training.JsonlWriter(path))
    print(json.dumps(run(FLAGS, writers)))


FLAGS = flags.FLAGS

if __name__ == "__main__":
  define()
  app.run(main)
