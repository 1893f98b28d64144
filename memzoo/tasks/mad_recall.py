"""MAD: in-context recall and noisy in-context recall."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from memzoo.tasks import sampling, task as task_lib
from memzoo.tasks.generator import Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadRecall(Generator):
  """Recall the value of a key at every later occurrence of the key.

  With V = vocab_size, R = noise_vocab and N = V - R: keys are 0..N//2-1, values
  N//2..N-1, noise N..V-1. A row draws a value for each key, with replacement,
  and then L / 2 - 1 pairs: a uniform key and its value or, with probability
  `frac_noise`, two tokens of noise (one pair, at a uniform place, is a key for
  certain). The last pair is a key uniform among those that occurred. At every
  key that occurred before, its value is asked; the value of the last key is
  not shown, so T = L - 1.

  Attributes:
    vocab_size: V.
    seq_len: L, even.
    noise_vocab: R.
    frac_noise: probability of noise in place of a pair.
    next_token: ask for every next token in the training split, as the reference
      does; `oracle` is then right at the answers alone.

  Presets:
    mad_in_context_recall: V = 16, L = 128, 12,800 training and 1,280 test rows.
      Variations: _vocab_{32,64,128}, _length_{256,512,1024},
      _train_{6400,3200,1600,800}.
    mad_noisy_in_context_recall: V = 32, of which R = 16, a fifth of the pairs
      noise. Variations: _vocab_{48,80,144}, lengths and training rows as above,
      _noise_{40,60,80} (per cent).
    mad_in_context_recall_small, mad_noisy_in_context_recall_small: L = 64, the
      loss on the answers, fresh rows. Not published settings.
    There: width 128, two blocks of mixer and SwiGLU, batch 128, 200 epochs,
    AdamW, cosine to 1e-6, the best of rates 1e-4, 5e-4, 1e-3 with decay 0 and
    0.1; the score is the mean over the variations.

  Differs: the reference asks at one key only unless `multi_query`, which its
    benchmark always sets. Its generator fails at its own defaults, where the
    noise takes all 16 tokens, and in rare rows of noise alone, which cannot
    occur here. Its accuracy is the mean over classes; here each answer counts
    the same.

  Paper: Poli, Thomas et al. 2024, Mechanistic Design and Scaling of Hybrid
    Architectures, arXiv:2403.17844, section 3 and appendix B; constants from
    the code of the paper, `mad/data/instances.py`, `mad/configs.py`,
    `configs/tasks/`.
  """

  kind: ClassVar[str] = "tokens"
  vocab_size: int = 16
  seq_len: int = 128
  noise_vocab: int = 0
  frac_noise: float = 0.0
  next_token: bool = False

  def __post_init__(self):
    super().__post_init__()
    owner = "MadRecall"
    task_lib.check_int(owner, "noise_vocab", self.noise_vocab, 0)
    task_lib.check_int(owner, "vocab_size", self.vocab_size, 2)
    task_lib.check_int(owner, "seq_len", self.seq_len, 4)
    if self.seq_len % 2:
      raise ValueError(f"{owner}: seq_len must be even; got {self.seq_len}")
    if self.vocab_size - self.noise_vocab < 2:
      raise ValueError(
        f"{owner}: vocab_size must be noise_vocab + 2 = {self.noise_vocab + 2}"
        f" or more; got {self.vocab_size}"
      )
    if not 0 <= self.frac_noise < 1:
      raise ValueError(
        f"{owner}: frac_noise must be in [0, 1); got {self.frac_noise}"
      )
    if self.frac_noise and not self.noise_vocab:
      raise ValueError(f"{owner}: frac_noise above 0 needs noise_vocab; got 0")

  @property
  def num_keys(self) -> int:
    return (self.vocab_size - self.noise_vocab) // 2

  @property
  def num_values(self) -> int:
    return self.vocab_size - self.noise_vocab - self.num_keys

  @property
  def length(self) -> int:
    return self.seq_len - 1

  @property
  def num_outputs(self) -> int:
    return self.vocab_size

  @property
  def chance(self) -> float:
    return 1 / self.num_values

  def _generate(self, split, *place):
    task = self
    if split != "train":
      task = dataclasses.replace(self, next_token=False)
    return Generator._generate(task, split, *place)

  def example(self, key):
    n, k = self.seq_len // 2 - 1, self.num_keys
    values, keys, noise, is_noise, keep, last = sampling.words(
      key, k, n, 2 * n, n, 1, k
    )
    values = k + sampling.below(values, self.num_values)
    keys = sampling.below(keys, k)
    here = np.arange(n, dtype=np.int32)
    # 24 bits: exact in float32.
    is_noise = (is_noise >> 8) < np.uint32(round(self.frac_noise * 2**24))
    is_noise &= here != sampling.below(keep[0], n)

    first = jnp.full((k,), n, jnp.int32)
    first = first.at[keys].min(jnp.where(is_noise, n, here))
    log_p = jnp.where(first < n, 0.0, -jnp.inf).astype(jnp.float32)
    last = sampling.weighted_distinct(last, 1, log_p)

    pairs = jnp.stack([keys, values[keys]], axis=1)
    if self.noise_vocab:
      noise = k + self.num_values + sampling.below(noise, self.noise_vocab)
      pairs = jnp.where(is_noise[:, None], noise.reshape(n, 2), pairs)
    final = jnp.concatenate([last, values[last]])
    tokens = jnp.concatenate([pairs.reshape(-1), final])
    asked = jnp.append(~is_noise & (first[keys] < here), True)
    weights = jnp.stack([asked, jnp.zeros_like(asked)], axis=1).reshape(-1)[:-1]
    if self.next_token:
      weights = jnp.ones_like(weights)
    return tokens[:-1], tokens[1:], weights.astype(jnp.float32)

  def oracle(self, batch):
    inputs = np.asarray(batch.inputs)
    first = (inputs[:, None, :] == inputs[:, :, None]).argmax(-1)
    after = np.minimum(first + 1, inputs.shape[1] - 1)
    return np.take_along_axis(inputs, after, axis=1)


_ROWS = dict(num_train=12_800, num_test=1280, next_token=True)
_PLAIN = dict(vocab_size=16, **_ROWS)
_NOISY = dict(vocab_size=32, noise_vocab=16, frac_noise=0.2, **_ROWS)


def _register(name: str, base: dict, variations: dict):
  task_lib.register(name, MadRecall, **base)
  for suffix, (option, values) in variations.items():
    for value in values:
      options = {**base, option: value}
      if option == "frac_noise":
        value = round(100 * value)
      task_lib.register(f"{name}_{suffix}_{value}", MadRecall, **options)


_BOTH = {
  "length": ("seq_len", (256, 512, 1024)),
  "train": ("num_train", (6400, 3200, 1600, 800)),
}
_register(
  "mad_in_context_recall",
  _PLAIN,
  {"vocab": ("vocab_size", (32, 64, 128)), **_BOTH},
)
_register(
  "mad_noisy_in_context_recall",
  _NOISY,
  {
    "vocab": ("vocab_size", (48, 80, 144)),
    "noise": ("frac_noise", (0.4, 0.6, 0.8)),
    **_BOTH,
  },
)
task_lib.register(
  "mad_in_context_recall_small", MadRecall, vocab_size=16, seq_len=64
)
task_lib.register(
  "mad_noisy_in_context_recall_small",
  MadRecall,
  vocab_size=24,
  noise_vocab=8,
  frac_noise=0.2,
  seq_len=64,
)
