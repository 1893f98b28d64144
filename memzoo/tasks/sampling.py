"""Random streams and orders, the same on every platform and at every step."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np


def stream(seed: jax.typing.ArrayLike, *tags: str) -> jax.Array:
  """A random key for (seed, tags): other tags or seeds, unrelated numbers.

  The generator is fixed (Threefry), whatever the default of the process.
  """
  key = jax.random.key(jnp.asarray(seed, jnp.uint32), impl='threefry2x32')
  for tag in tags:
    key = jax.random.fold_in(key, np.uint32(zlib.crc32(tag.encode())))
  return key


def locate(step, batch_size: int, count: int | None):
  """Where a batch begins: (epoch, offset in it), two uint32 scalars.

  Args:
    step: integer or traced scalar. The product step * batch_size is exact for
      integers, modulo 2**32 for traced scalars.
    batch_size: rows in a batch.
    count: examples in an epoch; None, one endless epoch.
  """
  if isinstance(step, jax.core.Tracer):
    first = step.astype(jnp.uint32) * jnp.uint32(batch_size)
    if count is None:
      return jnp.zeros((), jnp.uint32), first
    return first // jnp.uint32(count), first % jnp.uint32(count)
  first = int(step) * batch_size
  epoch, offset = (0, first) if count is None else divmod(first, count)
  return np.uint32(epoch % 2**32), np.uint32(offset % 2**32)


def epoch_order(
    key: jax.Array,
    epoch: jax.Array,
    offset: jax.Array,
    size: int,
    count: int,
) -> jax.Array:
  """`size` successive indices of shuffled epochs of `count` examples.

  Each epoch is a permutation of range(count), a pure function of (key, epoch),
  and costs nothing to enter in the middle: a keyed bijection of the k-bit
  numbers, 2**k >= count, is iterated until it falls below count. One round is
  x + a, x * b with b odd, x ^ (x >> k / 2), modulo 2**k: each is invertible.

  Args:
    key: random key.
    epoch: uint32 scalar, the epoch of the first index.
    offset: uint32 scalar in [0, count), its place in that epoch.
    size: how many indices; they may straddle epochs.
    count: examples in an epoch, under 2**31.

  Returns:
    uint32 [size].
  """
  if count == 1:
    return jnp.zeros((size,), jnp.uint32)
  bits = (count - 1).bit_length()
  low = jnp.uint32(2**bits - 1)
  shift = jnp.uint32((bits + 1) // 2)
  place = offset + jnp.arange(size, dtype=jnp.uint32)
  epochs = epoch + place // jnp.uint32(count)

  def index(epoch, place):
    words = jax.random.bits(
        jax.random.fold_in(key, epoch), (6, 2), jnp.uint32
    )

    def mix(x):
      for a, b in words:
        x = (x + a) & low
        x = (x * (b | jnp.uint32(1))) & low
        x = x ^ (x >> shift)
      return x

    return jax.lax.while_loop(lambda x: x >= count, mix, mix(place))

  return jax.vmap(index)(epochs, place % jnp.uint32(count))


epoch_order_jit = jax.jit(epoch_order, static_argnames=('size', 'count'))


def distinct(key: jax.Array, size: int, low: int, high: int) -> jax.Array:
  """`size` distinct integers of [low, high) in random order, int32 [size].

  The first `size` swaps of a Fisher-Yates shuffle, which cost less than a
  random number for each of the candidates.
  """
  place = jnp.arange(size, dtype=jnp.int32)
  other = place + jax.random.randint(
      key, (size,), 0, jnp.int32(high - low) - place, jnp.int32
  )

  def swap(i, cards):
    here, there = cards[place[i]], cards[other[i]]
    return cards.at[other[i]].set(here).at[place[i]].set(there)

  cards = jnp.arange(low, high, dtype=jnp.int32)
  return jax.lax.fori_loop(0, size, swap, cards)[:size]


def weighted_distinct(
    key: jax.Array, size: int, log_weights: jax.Array
) -> jax.Array:
  """Draws one after the other without replacement, by weight (Gumbel top-k).

  Args:
    key: random key.
    size: how many are drawn, N at most.
    log_weights: float32 [N], not normalised.

  Returns:
    int32 [size], in the order of the draws: the first has probability
    proportional to its weight, the second likewise among the rest, and so on.
  """
  noise = jax.random.gumbel(key, log_weights.shape, log_weights.dtype)
  return jax.lax.top_k(log_weights + noise, size)[1]
