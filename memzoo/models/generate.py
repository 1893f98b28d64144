"""Sampling from a language model, at constant memory per token."""

from collections.abc import Mapping
import functools
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.models.layers import check_flags


def generate(
  model,
  state,
  prompt,
  steps: int,
  key: jax.Array | None = None,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  mask=None,
  stop_token: int | None = None,
  implementation=None,
  with_state: bool = False,
):
  """Continues each row of `prompt` by `steps` tokens.

  The prompt is read in one call, then one token at a time: what is held is the
  model's state and the tokens themselves, whatever the length. The loop ends
  early when every row has stopped.

  >>> tokens = generate(model, None, prompt, 100, jax.random.key(0), top_k=40)

  Args:
    model: a `LanguageModel`, or what has `initial_state`, `next_logits`,
      `vocab_size` and `max_length`.
    state: the memory before the prompt, or None for a fresh one.
    prompt: int [B, T].
    steps: tokens to add.
    key: draws them; not needed where the choice is greedy.
    temperature: divides the logits; 0 is greedy.
    top_k: draw among the k most likely; None for all. 1 is greedy.
    mask: bool [B, T] or None; False where the prompt has no token, at either
      end or between: ragged prompts, padded left or right.
    stop_token: a row that draws it goes on with it and its memory stands still;
      None for none.
    implementation: the form that reads the prompt, as in a call of the model.
    with_state: also return the memory.

  Returns:
    int32 tokens [B, steps]; with `with_state`, (state, tokens). The state has
    read the prompt and all tokens but the last drawn, with which the next
    prompt has to begin; a row that stopped has not read its `stop_token`.

  Raises:
    ValueError: before anything is computed, on a prompt that is no int [B, T]
      of the vocabulary, an empty row, a temperature that is negative or not
      finite, a top_k or stop_token out of the vocabulary, a missing key, or
      where prompt and steps exceed the model's `max_length`. A `state` that
      has read inputs before has less room than that, which is not known here.
  """
  prompt = _check_prompt(model, prompt, mask)
  _check_token("steps", steps, 1, None)
  limit, length = model.max_length, prompt.shape[1]
  if limit is not None and length + steps > limit:
    raise ValueError(
      f"generate: a prompt of {length} and {steps} steps need room for "
      f"{length + steps} tokens, and the model holds at most {limit}"
    )
  if (
    isinstance(temperature, bool)
    or not isinstance(temperature, numbers.Real)
    or not 0 <= temperature < math.inf
  ):
    raise ValueError(
      "generate: temperature must be a finite number, 0 (greedy) or more, got "
      f"{temperature!r}"
    )
  if top_k is not None:
    _check_token("top_k", top_k, 1, model.vocab_size)
  if stop_token is not None:
    _check_token("stop_token", stop_token, 0, model.vocab_size - 1)
  greedy = temperature == 0 or top_k == 1
  if greedy:
    key = None
  elif key is None:
    raise ValueError(
      f"generate: temperature {temperature} draws at random and needs a key; "
      "give key=jax.random.key(...), or temperature=0"
    )
  if isinstance(implementation, Mapping):
    implementation = tuple(sorted(implementation.items()))
  if state is None:
    state = model.initial_state(prompt.shape[0])
  state, tokens = _generate(
    model, state, prompt, mask, key, jnp.float32(temperature),
    steps=steps, top_k=top_k, stop_token=stop_token,
    implementation=implementation,
  )  # fmt: skip
  return (state, tokens) if with_state else tokens


@functools.partial(
  jax.jit, static_argnames=("steps", "top_k", "stop_token", "implementation")
)
def _generate(
  model, state, prompt, mask, key, temperature, *, steps, top_k, stop_token,
  implementation,
):  # fmt: skip
  if isinstance(implementation, tuple):
    implementation = dict(implementation)

  def draw(logits, index):
    if key is None:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    one = jax.random.fold_in(key, index)
    logits = logits / temperature
    if top_k is None:
      return jax.random.categorical(one, logits).astype(jnp.int32)
    logits, tokens = jax.lax.top_k(logits, top_k)
    chosen = jax.random.categorical(one, logits)[:, None]
    return jnp.take_along_axis(tokens, chosen, 1)[:, 0].astype(jnp.int32)

  def stopped(token):
    if stop_token is None:
      return jnp.zeros(token.shape, bool)
    return token == stop_token

  def going(carry):
    index, _, _, _, done = carry
    return (index < steps) & ~jnp.all(done)

  def one(carry):
    index, state, tokens, token, done = carry
    there = None if stop_token is None else ~done[:, None]
    state, logits = model.next_logits(state, token[:, None], mask=there)
    token = jnp.where(done, token, draw(logits, index))
    tokens = jax.lax.dynamic_update_slice_in_dim(
      tokens, token[:, None], index, 1
    )
    return index + 1, state, tokens, token, stopped(token)

  state, logits = model.next_logits(
    state, prompt, mask=mask, implementation=implementation
  )
  token = draw(logits, 0)
  fill = 0 if stop_token is None else stop_token
  tokens = jnp.full((prompt.shape[0], steps), fill, jnp.int32)
  tokens = tokens.at[:, 0].set(token)
  carry = (jnp.int32(1), state, tokens, token, stopped(token))
  _, state, tokens, _, _ = jax.lax.while_loop(going, one, carry)
  return state, tokens


def _check_prompt(model, prompt, mask):
  shape, kind = jnp.shape(prompt), jnp.result_type(prompt)
  if len(shape) != 2 or not all(shape) or not jnp.issubdtype(kind, jnp.integer):
    raise ValueError(
      "generate: prompt must be integer [B, T], one row and one token at "
      f"least, got {kind} {shape}"
    )
  check_flags("generate", shape, None, mask)
  if not isinstance(prompt, jax.core.Tracer) and not isinstance(
    mask, jax.core.Tracer
  ):
    there = np.ones(shape, bool) if mask is None else np.asarray(mask)
    if not there.any(axis=1).all():
      row = int(np.argmin(there.any(axis=1)))
      raise ValueError(
        f"generate: row {row} of the prompt has no token; each needs one"
      )
    read = np.asarray(prompt)[there]
    if read.min() < 0 or read.max() >= model.vocab_size:
      raise ValueError(
        f"generate: prompt has tokens from {read.min()} to {read.max()}, the "
        f"vocabulary is 0 to {model.vocab_size - 1}"
      )
  return jnp.asarray(prompt)


def _check_token(name, value, least, most):
  fits = type(value) is int and value >= least
  if not fits or (most is not None and value > most):
    limit = f"{least} or more" if most is None else f"{least} to {most}"
    raise ValueError(
      f"generate: {name} must be an integer, {limit}, got {value!r}"
    )
