"""MAD: fuzzy in-context recall."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadFuzzyRecall(Generator):
  """Recall values where keys and values are several tokens long.

  With V = vocab_size, L = seq_len, K = (V - 1) // 2: keys are made of the
  tokens 0..K-1, values of K..V-2; V-1 is padding. A key is an ordered selection
  of 1 to `key_size` different tokens: the size is uniform, then the selection;
  a value likewise, up to `value_size`. Pairs with uniform keys follow each
  other, a key always with the value with which it came first, as long as fewer
  than E = L - p - key_size - value_size tokens are out, where p tokens make up
  the probe: a pair drawn beforehand, which takes the place of the first pair
  that begins at or after a uniform place of 0..E-key_size-value_size, unless it
  came up already. The row ends with the probe and is padded on the left to
  L + 1 tokens, of which the last is not shown, so T = L. Asked are all tokens
  of the value of each key that occurred before, at the tokens that precede
  them. In the validation and test splits every key has the size `key_size`.

  Only the tokens that follow tell whether a key has ended; `oracle` looks at
  them, so no causal predictor can be right on every first token of a value.

  Attributes:
    vocab_size: V.
    seq_len: L.
    key_size: longest key.
    value_size: longest value.
    full_keys: every key has the size `key_size` in the training split too.
    next_token: ask for every next token in the training split, as the reference
      does; `oracle` is then right at the answers alone.

  Presets:
    mad_fuzzy_in_context_recall: V = 16, L = 128, sizes up to 3, 12,800 training
      and 1,280 test rows. Variations: _vocab_{32,64,128},
      _length_{256,512,1024}, _train_{6400,3200,1600,800}.
    mad_fuzzy_in_context_recall_small: L = 64, sizes up to 2, the loss on the
      answers, fresh rows. Not a published setting.
    For the training there, see `MadRecall`.

  Differs: in the reference the place of the probe reaches so far to the right
    that in some rows the probe is never shown before it is asked; here it
    always is. The reference can also mix in noise and ask once a row, which
    its benchmark does not use. Its accuracy is the mean over classes.

  Paper: Poli, Thomas et al. 2024, Mechanistic Design and Scaling of Hybrid
    Architectures, arXiv:2403.17844, section 3 and appendix B; constants from
    the code of the paper, `mad/data/instances.py`, `configs/tasks/`.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: int = 16
  seq_len: int = 128
  key_size: int = 3
  value_size: int = 3
  full_keys: bool = False
  next_token: bool = False

  def __post_init__(self):
    super().__post_init__()
    owner = "MadFuzzyRecall"
    task_lib.check_int(owner, "key_size", self.key_size, 1)
    task_lib.check_int(owner, "value_size", self.value_size, 1)
    least = 2 * max(self.key_size, self.value_size) + 1
    task_lib.check_int(owner, "vocab_size", self.vocab_size, least)
    least = 3 * (self.key_size + self.value_size)
    task_lib.check_int(owner, "seq_len", self.seq_len, least)
    if (self.num_keys + 1) ** self.key_size >= 2**31:
      raise ValueError(
        f"{owner}: ((vocab_size + 1) // 2) ** key_size must be under 2 ** 31;"
        f" got vocab_size {self.vocab_size}, key_size {self.key_size}"
      )

  @property
  def num_keys(self) -> int:
    """Number of tokens of which keys are made."""
    return (self.vocab_size - 1) // 2

  @property
  def length(self) -> int:
    return self.seq_len

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / (self.vocab_size - 1 - self.num_keys)

  def _generate(self, split, *place):
    task = self
    if split != "train":
      task = dataclasses.replace(self, next_token=False, full_keys=True)
    return Generator._generate(task, split, *place)

  def example(self, key):
    ks, vs, k = self.key_size, self.value_size, self.num_keys
    # Entry 0 is the probe, the others are the pairs; each has 2 or more tokens.
    n = 1 + -(-(self.seq_len - 2 - ks - vs) // 2)
    key_sizes, keys, value_sizes, values, place = sampling.words(
      key, n, n * ks, n, n * vs, 1
    )
    keys = _selections(keys.reshape(n, ks), 0, k)
    values = _selections(values.reshape(n, vs), k, self.vocab_size - 1)
    key_sizes = 1 + sampling.below(key_sizes, ks)
    if self.full_keys:
      key_sizes = jnp.full((n,), ks, jnp.int32)
    value_sizes = 1 + sampling.below(value_sizes, vs)

    digit = (k + 1) ** np.arange(ks, dtype=np.int32)
    codes = jnp.where(np.arange(ks) < key_sizes[:, None], (keys + 1) * digit, 0)
    codes = codes.sum(1, dtype=jnp.int32)

    def layout(which):
      """Where the pairs begin, if `which` [n] says whose key each pair has."""
      same = codes[which][:, None] == codes[which]
      source = same.argmax(1)  # the entry whose value goes with the key
      size = key_sizes[which] + value_sizes[source]
      start = jnp.cumsum(size) - size - size[0]
      return same, source, size, start

    here = np.arange(n, dtype=np.int32)
    same, source, size, start = layout(here)
    end = self.seq_len - ks - vs - size[0]
    place = sampling.below(place[0], end - ks - vs + 1)
    forced = ((start >= place) & (here > 0)).argmax()
    shown = ((source == 0) & (here > 0) & (here < forced)).any()
    which = jnp.where((here == forced) & ~shown, 0, here)
    same, source, size, start = layout(which)
    used = (start < end) & (here > 0)
    before = (same & (here > 0) & (here < here[:, None])).any(1)

    # The probe comes last, and the row ends there.
    total = jnp.where(used, size, 0).sum(dtype=jnp.int32)
    start = jnp.where(here == 0, total, start)
    start = start + self.seq_len + 1 - total - size[0]
    used, before = used | (here == 0), before | (here == 0)

    tokens = jnp.full((self.seq_len + 1,), self.vocab_size - 1, jnp.int32)
    asked = jnp.zeros((self.seq_len + 1,), bool)
    nowhere = self.seq_len + 1
    for j in range(ks):
      at = jnp.where(used & (j < key_sizes[which]), start + j, nowhere)
      tokens = tokens.at[at].set(keys[which, j], mode="drop")
    start = start + key_sizes[which]
    for j in range(vs):
      at = jnp.where(used & (j < value_sizes[source]), start + j, nowhere)
      tokens = tokens.at[at].set(values[source, j], mode="drop")
      asked = asked.at[at].set(before, mode="drop")
    weights = asked[1:].astype(jnp.float32)
    if self.next_token:
      weights = jnp.ones_like(weights)
    return tokens[:-1], tokens[1:], weights

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    predictions = np.zeros_like(inputs)
    for row, tokens in enumerate(inputs):
      table, at = {}, int((tokens != self.vocab_size - 1).argmax())
      while at < len(tokens):
        middle = at + _run(tokens[at:] < self.num_keys)
        stop = middle + _run(tokens[middle:] >= self.num_keys)
        name = tuple(tokens[at:middle])
        value = table.setdefault(name, tokens[middle:stop])
        room = predictions[row, middle - 1 : middle - 1 + len(value)]
        room[:] = value[: len(room)]
        at = stop
    return predictions


def _selections(words, low: int, high: int):
  """Ordered selections of different numbers of [low, high), one for a row."""
  return jax.vmap(lambda word: sampling.distinct(word, low, high))(words)


def _run(flags: np.ndarray) -> int:
  """How many flags are set before the first that is not."""
  return len(flags) if flags.all() else int((~flags).argmax())


_NAME = "mad_fuzzy_in_context_recall"
_BASE = dict(num_train=12_800, num_test=1280, next_token=True)
task_lib.register(_NAME, MadFuzzyRecall, **_BASE)
for _value in (32, 64, 128):
  task_lib.register(
    f"{_NAME}_vocab_{_value}", MadFuzzyRecall, vocab_size=_value, **_BASE
  )
for _value in (256, 512, 1024):
  task_lib.register(
    f"{_NAME}_length_{_value}", MadFuzzyRecall, seq_len=_value, **_BASE
  )
for _value in (6400, 3200, 1600, 800):
  task_lib.register(
    f"{_NAME}_train_{_value}",
    MadFuzzyRecall,
    **{**_BASE, "num_train": _value},
  )
task_lib.register(
  f"{_NAME}_small", MadFuzzyRecall, seq_len=64, key_size=2, value_size=2
)
