"""Recurrent PPO, compiled: a policy over any memory, and how it learns.

An update is one compiled function. All players play `unroll` steps, a token at
a time (a cell's `step`), their memory reset where an episode ends. Then come
`epochs` passes of PPO (Schulman et al. 2017, arXiv:1707.06347) with
generalised advantages over these whole sequences, recomputed by the cell's
fast form from the memory that the players had at the beginning of them.
"""

import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from memzoo import checkpoint, models, training
from memzoo.models.model import Head
from memzoo.tasks import environments


class Agent(models.SequenceModel):
  """A policy and a value over an encoder: floats [B, T, d_input] to (state,
  logits [B, T, A], values [B, T]). Calls are `SequenceModel`'s."""

  def __init__(self, cells, depth, d_input, num_actions, *, rngs, **options):
    self.encoder = models.Encoder(
      cells, depth, d_input=d_input, rngs=rngs, **options
    )
    self.actor = Head(self.encoder.d_model, num_actions, rngs=rngs)
    self.critic = Head(self.encoder.d_model, 1, rngs=rngs)
    self.actor.kernel[...] *= 0.01  # begins as the uniform policy

  def __call__(self, state, inputs, **kwargs):
    state, x = self.encoder(state, inputs, **kwargs)
    return state, self.actor(x), self.critic(x)[..., 0]


class Play(NamedTuple):
  """What the players did, [B, T] each."""

  inputs: Any  # float32 [B, T, d_input]
  start: Any  # bool: this input is the first of an episode
  action: Any  # int32
  log_prob: Any
  value: Any
  reward: Any
  done: Any  # bool: the action was the last of an episode


class State(NamedTuple):
  """All that an update carries to the next."""

  params: Any
  buffers: Any
  opt_state: Any
  memory: Any
  games: Any
  inputs: jax.Array  # float32 [B, d_input], the next
  start: jax.Array  # bool [B]
  score: jax.Array  # float32 [B], return of the episode so far
  key: jax.Array


class Ppo:
  """Recurrent PPO, compiled: `init` and `update`.

  Args:
    config: has the flags as attributes.
    game: of `memzoo.tasks.environments`.
    agent: an `Agent`.

  Raises:
    ValueError: where the players cannot be split over the minibatches.
  """

  def __init__(self, config, game: environments.Environment, agent: Agent):
    if config.num_envs % config.minibatches:
      raise ValueError(
        f"num_envs {config.num_envs} is no multiple of minibatches "
        f"{config.minibatches}"
      )
    self.config, self.game = config, game
    self.steps_per_update = config.num_envs * config.unroll
    self.updates = -(-config.total_steps // self.steps_per_update)
    self._graph = nnx.split(agent, nnx.Param, ...)[0]
    self._variables = checkpoint.variables(agent)
    # Which axis of each leaf of the memory counts players; -1 for none.
    two, three = (
      jax.eval_shape(lambda n=n: agent.initial_state(n)) for n in (2, 3)
    )
    self._axes = jax.tree.map(
      lambda a, b: next(
        (i for i, n in enumerate(a.shape) if n != b.shape[i]), -1
      ),
      two,
      three,
    )
    settings = training.Config(
      steps=self.updates * config.epochs * config.minibatches,
      learning_rate=config.learning_rate,
      warmup=0,
      weight_decay=0.0,
      clip=config.grad_norm,
    )
    self._optimizer = training.optimizer(settings, training.decayed)
    self.update = jax.jit(self._update, donate_argnums=0)

  def init(self) -> State:
    """The state before the first update."""
    key = jax.random.key(self.config.seed)
    return jax.jit(self._init)(key, **self._variables)

  def _init(self, key, params, buffers) -> State:
    rows, size = self.config.num_envs, self.game.num_actions
    key, deal, memory = jax.random.split(key, 3)
    games, seen = jax.vmap(self.game.reset)(jax.random.split(deal, rows))
    start = jnp.ones((rows,), bool)
    return State(
      params=jax.tree.map(jnp.copy, params),  # the update takes them over
      buffers=jax.tree.map(jnp.copy, buffers),
      opt_state=self._optimizer.init(params),
      memory=self._agent(params, buffers).initial_state(rows, memory),
      games=games,
      inputs=self._inputs(seen, jnp.full((rows,), size), start),
      start=start,
      score=jnp.zeros((rows,)),
      key=key,
    )

  def _agent(self, params, buffers) -> Agent:
    return nnx.merge(self._graph, params, buffers)

  def _inputs(self, seen, action, start):
    """float32 [B, d_input]; the action is that before, none at a start."""
    action = jnp.where(start, self.game.num_actions, action)
    before = jax.nn.one_hot(action, self.game.num_actions, dtype=jnp.float32)
    mark = start[:, None].astype(jnp.float32)
    return jnp.concatenate([self.game.features(seen), before, mark], axis=-1)

  def _play(self, state: State, key) -> tuple[State, Play, jax.Array]:
    """A step of every player: (state, [B] each, returns of what ended)."""
    act, luck, deal = jax.random.split(key, 3)
    keys = functools.partial(jax.random.split, num=self.config.num_envs)
    agent = self._agent(state.params, state.buffers)
    memory, logits, value = agent(
      state.memory, state.inputs[:, None], reset=state.start[:, None]
    )
    logits = jax.nn.log_softmax(logits[:, 0])
    action = jax.random.categorical(act, logits).astype(jnp.int32)
    games, seen, reward, done = jax.vmap(self.game.step)(
      keys(luck), state.games, action
    )

    def deal_again():
      def choose(new, old):
        return jnp.where(done.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

      fresh = jax.vmap(self.game.reset)(keys(deal))
      return jax.tree.map(choose, fresh, (games, seen))

    games, seen = jax.lax.cond(jnp.any(done), deal_again, lambda: (games, seen))
    log_prob = jnp.take_along_axis(logits, action[:, None], axis=1)[:, 0]
    play = Play(
      state.inputs, state.start, action, log_prob, value[:, 0], reward, done
    )
    score = state.score + reward
    state = state._replace(
      memory=memory,
      games=games,
      inputs=self._inputs(seen, action, done),
      start=done,
      score=jnp.where(done, 0.0, score),
    )
    return state, play, jnp.where(done, score, 0.0)

  def _advantages(self, play: Play, last):
    """Generalised advantage estimates [B, T]; `last` [B] is the value after
    the last step."""
    gamma, lam = self.config.gamma, self.config.gae_lambda
    goes_on = jnp.where(play.done, 0.0, gamma)
    after = jnp.concatenate([play.value[:, 1:], last[:, None]], axis=1)
    delta = play.reward + goes_on * after - play.value

    def back(advantage, x):
      delta, goes_on = x
      advantage = delta + goes_on * lam * advantage
      return advantage, advantage

    _, advantage = jax.lax.scan(
      back, jnp.zeros_like(last), (delta.T, goes_on.T), reverse=True
    )
    return advantage.T

  def _loss(self, params, buffers, memory, play: Play, advantage, target):
    """(loss, metrics) of whole sequences, from the memory before them."""
    config = self.config
    _, logits, value = self._agent(params, buffers)(
      memory,
      play.inputs,
      reset=play.start,
      implementation=config.implementation,
    )
    logits = jax.nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(logits, play.action[..., None], axis=-1)
    ratio = jnp.exp(log_prob[..., 0] - play.log_prob)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    policy = -jnp.mean(jnp.minimum(ratio * advantage, clipped * advantage))
    error = jnp.mean(jnp.square(value - target))
    entropy = -jnp.mean(jnp.sum(jnp.exp(logits) * logits, axis=-1))
    loss = policy + config.value * error - config.entropy * entropy
    return loss, {
      "loss": loss,
      "policy_loss": policy,
      "value_loss": error,
      "entropy": entropy,
      "ratio_error": jnp.max(jnp.abs(ratio - 1)),
    }

  def _update(self, state: State) -> tuple[State, dict[str, jax.Array]]:
    """Plays, then learns: (state, metrics). `ratio_error` is that before the
    first gradient step, where recomputing should give 1."""
    config, memory = self.config, state.memory
    key, play_key, order_key = jax.random.split(state.key, 3)

    def body(state, key):
      state, *row = self._play(state, key)
      return state, row

    state, (play, scores) = jax.lax.scan(
      body, state, jax.random.split(play_key, config.unroll)
    )
    play = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), play)
    _, _, last = self._agent(state.params, state.buffers)(
      state.memory, state.inputs[:, None], reset=state.start[:, None]
    )
    advantage = self._advantages(play, last[:, 0])
    target = advantage + play.value
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)

    def learn(carry, rows):
      params, opt_state = carry
      begin = jax.tree.map(
        lambda x, axis: x if axis < 0 else jnp.take(x, rows, axis),
        memory,
        self._axes,
      )
      batch = jax.tree.map(lambda x: x[rows], (play, advantage, target))
      grads, metrics = jax.grad(self._loss, has_aux=True)(
        params, state.buffers, begin, *batch
      )
      with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        updates, opt_state = self._optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
      return (params, opt_state), metrics

    rows = jax.vmap(jax.random.permutation, (0, None))(
      jax.random.split(order_key, config.epochs), config.num_envs
    )
    (params, opt_state), metrics = jax.lax.scan(
      learn,
      (state.params, state.opt_state),
      rows.reshape(config.epochs * config.minibatches, -1),
    )
    agent = self._agent(params, state.buffers)
    if agent.has_buffers:
      agent.refresh(memory, play.inputs, reset=play.start)
    first = metrics.pop("ratio_error")[0]
    metrics = {name: values.mean() for name, values in metrics.items()}
    metrics["ratio_error"] = first
    metrics["episodes"] = jnp.sum(play.done, dtype=jnp.float32)
    metrics["returns"] = jnp.sum(scores)
    return state._replace(
      params=params,
      buffers=checkpoint.variables(agent)["buffers"],
      opt_state=opt_state,
      key=key,
    ), metrics
