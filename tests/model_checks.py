"""What the suites of whole models share; `checks` has the same for cells."""

import functools
import json

from checks import FORWARD, relative, wave
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


def shaken(model, scale=0.1):
  """The model with no parameter at its starting value."""
  r = np.random.default_rng(3)
  noise = lambda x: jnp.asarray(x + scale * r.normal(size=x.shape), x.dtype)
  return jax.tree.map(noise, model)


def values(module):
  """The variables of a module as float64, in dictionaries."""
  return jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(module)))


@functools.partial(
  jax.jit, static_argnames=("implementation", "reports", "max_resets")
)
def call(model, state, inputs, **given):
  return model(state, inputs, **given)


def streams(
  model, inputs, *, unit=1, mask=None, reset=None, prompt=True, **given
):
  """Holds a call in parts to the whole call: outputs and the state at the end.

  Args:
    model: a model, `(state, inputs, reset, mask) -> (state, outputs)`.
    inputs: [B, T, ...].
    unit: inputs in a part.
    mask: as in a call, or None.
    reset: as in a call, or None; [B, T], or [B, T / unit].
    prompt: outputs are told at once: they are zero just where mask is False.
    **given: to every call.

  Returns:
    (state, outputs) of the whole call.
  """
  batch, length = inputs.shape[:2]
  flags = {"mask": mask, "reset": reset}
  flags = {name: x for name, x in flags.items() if x is not None}
  end, whole = call(model, None, inputs, **flags, **given)
  if mask is not None and prompt:
    np.testing.assert_array_equal(np.any(whole, -1), mask)
  state, parts = model.initial_state(batch), []
  for n in range(length // unit):
    part = lambda x, n=n: jnp.split(x, length // unit, axis=1)[n]
    state, y = call(
      model, state, part(inputs), **jax.tree.map(part, flags), **given
    )
    parts.append(y)
  assert relative(jnp.concatenate(parts, 1), whole) < FORWARD
  assert relative(state, end) < FORWARD
  return end, whole


def no_dead_gradient(grads):
  """Every leaf is finite and somewhere not zero."""
  for path, g in jax.tree_util.tree_leaves_with_path(grads):
    path = jax.tree_util.keystr(path)
    assert np.isfinite(g).all() and np.abs(g).max() > 0, path


def train(model, loss, steps, rate=1e-2):
  """Trains with Adam; no parameter's gradient may be dead at the start.

  Args:
    model: its `nnx.Param`s are trained.
    loss: (model, key) -> scalar.
    steps: how many, each with a key of its own.
    rate: Adam's learning rate.

  Returns:
    (trained model, losses [steps]).
  """
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  optimizer = optax.adam(rate)
  cost = lambda params, key: loss(nnx.merge(graph, params, rest), key)

  def step(carry, key):
    params, state = carry
    value, grads = jax.value_and_grad(cost)(params, key)
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
      updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), value

  @jax.jit
  def run(params):
    keys = jax.random.split(jax.random.key(1), steps)
    first = jax.grad(cost)(params, keys[0])
    (params, _), losses = jax.lax.scan(
      step, (params, optimizer.init(params)), keys
    )
    return first, params, losses

  first, params, losses = run(nnx.to_pure_dict(params))
  no_dead_gradient(first)
  return nnx.merge(graph, params, rest), losses


def next_token_loss(model, tokens, start=0, **given):
  """Mean cross-entropy of tokens [B, T] from position `start` + 1 on."""
  _, logits = model(None, tokens[:, :-1], **given)
  cost = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
  return cost[:, start:].mean()


def learns_to_repeat(model, vocab_size, steps=150, **given):
  """Random halves that come twice: the second is told from the first."""
  half = jax.random.randint(jax.random.key(5), (32, 5), 0, vocab_size)
  text = jnp.concatenate([half, half], 1)
  loss = lambda model, key: next_token_loss(model, text, 5, **given)
  model, losses = train(model, loss, steps)
  assert losses[-1] < 0.2 * losses[0], losses[::15]
  return model


def no_gradient_through_a_reset(model, vocab_size):
  """Of the outputs since a reset: some for each input since, none before."""
  stack, embedding = model.encoder.stack, model.encoder.embedding[...]
  tokens = jax.random.randint(jax.random.key(6), (2, 10), 0, vocab_size)
  reset = jnp.zeros((2, 10), bool).at[:, 4].set(True)

  @jax.jit
  @jax.grad
  def through(weight):
    x = embedding[tokens] * weight[None, :, None]
    return wave(stack(stack.initial_state(2), x, reset=reset)[1][:, 4:])

  g = through(jnp.ones(10))
  assert not np.any(g[:4]) and np.all(g[4:])


def config_round_trip(make):
  """A model is again what its config says, after JSON.

  Args:
    make: () -> model; only its shapes are computed.
  """
  model = nnx.eval_shape(make)
  config = json.loads(json.dumps(model.config()))
  again = nnx.eval_shape(lambda: type(model)(**config, rngs=nnx.Rngs(0)))
  assert again.config() == model.config()
  assert jax.tree.structure(again) == jax.tree.structure(model)


def refuses(make, *cases):
  """Each case, (match, options), is a ValueError of `make(**options)`."""
  for match, options in cases:
    with pytest.raises(ValueError, match=match):
      nnx.eval_shape(lambda options=options: make(**options))
