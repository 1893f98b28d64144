"""Associative retrieval over segments: Remember and Rewrite."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRetrieval(Generator):
  """Recall the value of a key from one of many segments, one pair in each.

  With N = symbols, n pairs, keys of k symbols and values of v: a segment has
  S = k + v + 2 tokens and holds `key sep value eos`; n segments with pairs are
  followed by one with the question, `key gen value eos`. Symbols are 0..N-1,
  uniform; sep, gen and eos are N, N + 1, N + 2. The targets are the tokens of
  the value, asked at gen and at the value's tokens but the last.

  'Remember' (`rewrite` False): the keys differ, and each is as likely to be
  asked. 'Rewrite': keys are drawn with replacement; each key that occurs is as
  likely to be asked, and its latest value is the answer.

  Attributes:
    pairs: n, or the highest n where `vary`; no more than N^k in Remember.
    key_size: k.
    value_size: v.
    symbols: N.
    rewrite: whether keys come again with new values.
    vary: in the training split n is uniform in 1..pairs for each row; the
      steps after the question are masked. Other splits have `pairs` pairs.

  Presets:
    armt_remember_{n}_{k}: the stages of the paper's curriculum, n = 1, 2, 3, 5,
      10 with k = 1, n = 20, 40, 50 with k = 2, n = 50, 200 with k = 3; v = 1.
      A stage starts from the weights of the stage before. There 1,000,000
      training rows, batch 512, 2,000 steps for the first stage, 15,000 for the
      last, 10,000 for the others, AdamW with decay 1e-3, rate 3e-4 with linear
      warm-up and decay, clipping at 1.
    armt_rewrite_{n}_1: n = 1, 2, 3, 5, 10, 20, 40, 50, all with k = 1; the last
      stage has 30,000 steps. Tested on longer rows by `make(name, pairs=500)`.
    remember_small, rewrite_small: 16 pairs, one symbol each. Not published
      settings.

  Differs: the special tokens are the next free numbers (there 100 to 102). The
    loss of the reference also counts gen and eos, and a row is right there if
    value and eos are. `vary` draws n for each row (there for each batch, when
    evaluating too). There are as many validation rows as test rows (there 1,000
    and 10,000). Figures of the paper count pairs that were recalled.

  Paper: Rodkin, Kuratov et al. 2024, Associative Recurrent Memory Transformer,
    arXiv:2407.04841; constants from the code of the paper,
    `run_finetuning_associative_retrieval.py` and
    `scripts/associative_retrieval/`.
  """

  kind: ClassVar[str] = "tokens"
  pairs: int = 50
  key_size: int = 1
  value_size: int = 1
  symbols: int = 16
  rewrite: bool = False
  vary: bool = False

  def __post_init__(self):
    super().__post_init__()
    owner = "AssociativeRetrieval"
    task_lib.check_int(owner, "symbols", self.symbols, 2)
    task_lib.check_int(owner, "key_size", self.key_size, 1)
    task_lib.check_int(owner, "value_size", self.value_size, 1)
    task_lib.check_int(owner, "pairs", self.pairs, 1)
    keys = self.symbols**self.key_size
    if keys > 2**20:
      raise ValueError(
        f"{owner}: symbols ** key_size must be 2 ** 20 or less; got {keys}"
      )
    if not self.rewrite and self.pairs > keys:
      raise ValueError(
        f"{owner}: pairs must be symbols ** key_size = {keys} or less unless"
        f" rewrite; got {self.pairs}"
      )

  @property
  def vocab_size(self) -> int:
    return self.symbols + 3

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def segment(self) -> int:
    """S, the tokens of a segment; T is a multiple of it."""
    return self.key_size + self.value_size + 2

  @property
  def length(self) -> int:
    return (self.pairs + 1) * self.segment

  @property
  def chance(self) -> float:
    return 1 / self.symbols

  def _generate(self, split, *place):
    task = self
    if self.vary and split != "train":
      task = dataclasses.replace(self, vary=False)
    return Generator._generate(task, split, *place)

  def example(self, key):
    pairs, k, v = self.pairs, self.key_size, self.value_size
    keys, values, ask, count = sampling.words(key, pairs, pairs * v, pairs, 1)
    if self.rewrite:
      keys = sampling.below(keys, self.symbols**k)
    else:
      keys = sampling.distinct(keys, 0, self.symbols**k)
    values = sampling.below(values, self.symbols).reshape(pairs, v)
    here = np.arange(pairs, dtype=np.int32)
    n = pairs
    if self.vary:
      n = 1 + sampling.below(count[0], pairs)
    # One candidate for each key that occurs: its last pair.
    last = jnp.full((self.symbols**k,), -1, jnp.int32)
    last = last.at[keys].max(jnp.where(here < n, here, -1))
    candidate = (last[keys] == here) & (here < n)
    log_p = jnp.where(candidate, 0.0, -jnp.inf).astype(jnp.float32)
    asked = sampling.weighted_distinct(ask, 1, log_p)[0]

    digits = keys[:, None] // self.symbols ** np.arange(k, dtype=np.int32)
    digits = digits % self.symbols
    sep, gen, eos = (
      np.full((pairs, 1), self.symbols + i, np.int32) for i in range(3)
    )
    shown = jnp.concatenate([digits, sep, values, eos], axis=1)
    question = jnp.concatenate(
      [digits[asked], gen[0], values[asked], eos[0]], axis=0
    )
    inputs = jnp.pad(shown.reshape(-1), (0, self.segment))
    start = jnp.asarray(n * self.segment, jnp.int32)
    inputs = inputs.at[start + np.arange(self.segment)].set(question)
    where = start + k + np.arange(v)
    targets = jnp.zeros((self.length,), jnp.int32)
    targets = targets.at[where].set(values[asked])
    weights = jnp.zeros((self.length,), jnp.float32).at[where].set(1.0)
    if not self.vary:
      return inputs, targets, weights
    mask = np.arange(self.length) < start + self.segment
    return jnp.where(mask, inputs, 0), targets, weights, None, mask

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    k, v = self.key_size, self.value_size
    predictions = np.zeros_like(inputs)
    for row, tokens in enumerate(inputs):
      segments = tokens.reshape(-1, self.segment)
      question = int((segments[:, k] == self.symbols + 1).argmax())
      same = (segments[:question, :k] == segments[question, :k]).all(1)
      answer = segments[np.flatnonzero(same)[-1], k + 1 : k + 1 + v]
      start = question * self.segment + k
      predictions[row, start : start + v] = answer
    return predictions


_ROWS = dict(num_train=1_000_000, num_test=10_000, vary=True)
for _pairs, _key_size in (
  (1, 1),
  (2, 1),
  (3, 1),
  (5, 1),
  (10, 1),
  (20, 2),
  (40, 2),
  (50, 2),
  (50, 3),
  (200, 3),
):
  task_lib.register(
    f"armt_remember_{_pairs}_{_key_size}",
    AssociativeRetrieval,
    pairs=_pairs,
    key_size=_key_size,
    **_ROWS,
  )
for _pairs in (1, 2, 3, 5, 10, 20, 40, 50):
  task_lib.register(
    f"armt_rewrite_{_pairs}_1",
    AssociativeRetrieval,
    pairs=_pairs,
    rewrite=True,
    **_ROWS,
  )
task_lib.register("remember_small", AssociativeRetrieval, pairs=16)
task_lib.register("rewrite_small", AssociativeRetrieval, pairs=16, rewrite=True)
