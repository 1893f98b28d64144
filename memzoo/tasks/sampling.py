"""Random streams and orders, the same on every platform and at every step."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np


def stream(seed: jax.typing.ArrayLike, *tags: str) -> jax.Array:
  """A random key for (seed, tags): other tags or seeds, unrelated numbers.

  The generator is fixed (Threefry), whatever the default of the process.
  """
  key = jax.random.key(jnp.asarray(seed, jnp.uint32), impl="threefry2x32")
  for name in tags:
    key = jax.random.fold_in(key, tag(name))
  return key


def tag(name: str) -> np.uint32:
  """The number that stands for a name in `stream`."""
  return np.uint32(zlib.crc32(name.encode()))


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
    words = jax.random.bits(jax.random.fold_in(key, epoch), (6, 2), jnp.uint32)

    def mix(x):
      for a, b in words:
        x = (x + a) & low
        x = (x * (b | jnp.uint32(1))) & low
        x = x ^ (x >> shift)
      return x

    return jax.lax.while_loop(lambda x: x >= count, mix, mix(place))

  return jax.vmap(index)(epochs, place % jnp.uint32(count))


epoch_order_jit = jax.jit(epoch_order, static_argnames=("size", "count"))


def words(key: jax.Array, *sizes: int) -> list[jax.Array]:
  """Random uint32 [size] for each of `sizes`, from one draw.

  One draw compiles several times faster than one for each.
  """
  drawn = jax.random.bits(key, (sum(sizes),), jnp.uint32)
  return jnp.split(drawn, np.cumsum(sizes)[:-1])


def below(word: jax.Array, high: jax.typing.ArrayLike) -> jax.Array:
  """Uniform integers of [0, high) from random words, int32.

  By remainder: probabilities differ by at most high / 2**32, relatively.
  """
  return (word % jnp.asarray(high, jnp.uint32)).astype(jnp.int32)


def distinct(word: jax.Array, low: int, high: int) -> jax.Array:
  """Distinct integers of [low, high) in random order, from as many words.

  The first swaps of a Fisher-Yates shuffle, which cost less than a random
  number for each of the candidates.

  Args:
    word: random uint32 [size].
    low: lowest candidate.
    high: one above the highest; high - low >= size.

  Returns:
    int32 [size].
  """
  size = word.shape[0]
  place = np.arange(size, dtype=np.int32)
  other = below(word, np.uint32(high - low) - place.astype(np.uint32)) + place

  def swap(i, cards):
    here, there = cards[i], cards[other[i]]
    return cards.at[other[i]].set(here).at[i].set(there)

  cards = jnp.arange(low, high, dtype=jnp.int32)
  return jax.lax.fori_loop(0, size, swap, cards)[:size]


def weighted_distinct(
  word: jax.Array, size: int, log_weights: np.ndarray
) -> jax.Array:
  """Draws one after the other without replacement, by weight (Gumbel top-k).

  Args:
    word: random uint32 [N].
    size: how many are drawn, N at most.
    log_weights: float32 [N], not normalised.

  Returns:
    int32 [size], in the order of the draws: the first has probability
    proportional to its weight, the second likewise among the rest, and so on.
  """
  # 23 bits and a half: neither 0 nor 1 after rounding.
  uniform = (word >> 9).astype(jnp.float32) + jnp.float32(0.5)
  noise = -jnp.log(-jnp.log(uniform * jnp.float32(2.0**-23)))
  return jax.lax.top_k(noise + log_weights, size)[1]
