"""Common words and frequent words, as in RULER."""

from collections import Counter
import dataclasses
import itertools
import re

import numpy as np

from memzoo.tasks import haystack, task as task_lib, text_rows
from memzoo.tasks.text_rows import TextRows

_CWE_INTRO = (
  b"Below is a numbered list of words. In these words, some appear more often"
  b" than others. Memorize the ones that appear most often.\n"
)
_CWE_QUESTION = (
  "\nQuestion: What are the {count} most common words in the above list?"
  " Answer: The top {count} words that appear most often in the list are:"
)
_FWE_INTRO = (
  b"Read the following coded text and track the frequency of each coded word."
  b" Find the three most frequently appeared coded words. "
)
_FWE_QUESTION = (
  b"\nQuestion: Do not provide any explanation. Please ignore the dots '....'."
  b" What are the three most frequently appeared words in the above coded text?"
  b" Answer: According to the coded text above, the three most frequently"
  b" appeared words are:"
)
_SHORT = b"\nMost:"
_DOTS = b"..."


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonWords(TextRows):
  """Name the words of a list that come more often than the others.

  `num_common` words come `freq_common` times each and as many others as fit
  `freq_uncommon` times each, all distinct, in random order, numbered
  `1. word 2. word`. The answer holds the common words in the order in which
  they first come, numbered likewise; only their letters are asked for. Bytes
  and weights: see `TextRows`.

  Attributes:
    length: T, in bytes.
    num_common: number of common words.
    freq_common: how often each of them comes.
    freq_uncommon: how often each of the others comes; below `freq_common`.
    wording: 'ruler' or 'short', without introduction and numbers and with
      words of four letters at most, for short rows.

  Presets:
    ruler_cwe: T = 8192, 10 words that come 30 times, others 3 times (RULER's
      setting for 4,096 tokens and more).
    ruler_cwe_short: T = 4096, 10 words that come 6 times, others once (RULER's
      setting below 4,096 tokens).
    ruler_cwe_small: T = 192, two words that come 4 times, others once, short
      wording. Not a published setting.

  Differs: lengths are bytes, not tokens; the accuracy is that of the answer's
    bytes under teacher forcing, in the order of first appearance, where RULER
    takes any; there is no solved example in front of the row (RULER has one).
    The words are a short list of this package, continued by compounds of two
    (RULER: `wonderwords`).

  Paper: Hsieh et al. 2024, RULER: What's the Real Context Size of Your
    Long-Context Language Models?, arXiv:2404.06654, section 3 and appendix B.
  """

  length: int = 8192
  num_common: int = 10
  freq_common: int = 30
  freq_uncommon: int = 3
  wording: str = "ruler"

  def __post_init__(self):
    super().__post_init__()
    owner = "CommonWords"
    task_lib.check_choice(owner, "wording", self.wording, ("ruler", "short"))
    task_lib.check_int(
      owner, "num_common", self.num_common, 1, len(self._words())
    )
    task_lib.check_int(owner, "freq_uncommon", self.freq_uncommon, 1)
    task_lib.check_int(
      owner, "freq_common", self.freq_common, self.freq_uncommon + 1
    )
    longest = max(map(len, self._words()))
    words = self.num_common * self.freq_common + self.freq_uncommon
    least = self._size(words, words * longest) + self.num_common * longest
    if self.length < least:
      raise ValueError(
        f"{owner}: length must be at least {least} bytes for {self.num_common}"
        f" words that come {self.freq_common} times; got {self.length}"
      )

  @property
  def chance(self) -> float:
    return text_rows.guess(self._words())

  def _words(self):
    return _SHORT_WORDS if self.wording == "short" else _WORDS

  def _texts(self):
    if self.wording == "short":
      return b"", _SHORT
    return _CWE_INTRO, _CWE_QUESTION.format(count=self.num_common).encode()

  def _number(self, index):
    """What stands before word `index` of a list."""
    return b" " if self.wording == "short" else b" %d. " % (index + 1)

  def _size(self, words, letters):
    """Bytes of a row whose list has so many words and letters; no answers."""
    size = letters + sum(map(len, self._texts()))
    for count in (words, self.num_common):
      size += count * (1 if self.wording == "short" else 3)
      if self.wording != "short":
        size += sum(max(0, count - 10**d + 1) for d in range(len(str(count))))
    return size

  def row(self, draws):
    listed = self._words()
    chosen = (listed[i] for i in draws.sample(len(listed), len(listed)))
    common = list(itertools.islice(chosen, self.num_common))
    letters = sum(map(len, common))
    size = letters  # The answer.
    letters *= self.freq_common
    count = self.num_common * self.freq_common
    others = {}
    for word in itertools.chain(chosen, _compounds(draws)):
      if word in others:
        continue
      letters += len(word) * self.freq_uncommon
      count += self.freq_uncommon
      if size + self._size(count, letters) > self.length:
        break
      others[word] = None
      if self.wording == "short" and len(others) + len(common) == len(listed):
        break
    words = draws.shuffled(
      common * self.freq_common + list(others) * self.freq_uncommon
    )
    intro, question = self._texts()
    context = b"".join(
      self._number(i) + word.encode() for i, word in enumerate(words)
    )
    answers = sorted(common, key=words.index)
    pieces = [(intro + context[1:] + question, False)]
    for i, word in enumerate(answers):
      pieces += [(self._number(i), False), (word.encode(), True)]
    return pieces

  def solve(self, symbols):
    text = bytes(symbols.astype("uint8"))
    intro, question = self._texts()
    end = text.rindex(question)
    words = re.findall(rb"[a-z][a-z-]*", text[len(intro) : end])
    counts = Counter(words)
    top = sorted(counts, key=lambda w: (-counts[w], words.index(w)))
    top = sorted(top[: self.num_common], key=words.index)
    answer = b"".join(self._number(i) + word for i, word in enumerate(top))
    return end + len(question), answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequentWords(TextRows):
  """Name the three most frequent words of a coded text.

  The coded words are made of random letters. The word of rank k comes
  floor(N k^-alpha / zeta(alpha)) times, in random order; rank 1 is `...`, which
  is not asked for. N is the largest that fits. The answer is ranks 2, 3 and 4,
  by falling frequency; only their letters are asked for. Bytes and weights: see
  `TextRows`.

  Attributes:
    length: T, in bytes.
    alpha: exponent, above 1.
    letters: length of a coded word.
    vocabulary: number of words, the dots included; None: T / 50, as in RULER.
    wording: 'ruler' or 'short', without introduction, for short rows.

  Presets:
    ruler_fwe: T = 4096, alpha 2, 6 letters.
    ruler_fwe_small: T = 256, 8 words of 2 letters, short wording. Not a
      published setting.

  Differs: lengths are bytes, not tokens; the accuracy is that of the answer's
    bytes under teacher forcing, by falling frequency, where RULER takes any
    order. Words and their order are drawn anew for each row (RULER shuffles
    all rows alike).

  Paper: Hsieh et al. 2024, RULER: What's the Real Context Size of Your
    Long-Context Language Models?, arXiv:2404.06654, section 3 and appendix B.
  """

  length: int = 4096
  alpha: float = 2.0
  letters: int = 6
  vocabulary: int | None = None
  wording: str = "ruler"

  def __post_init__(self):
    super().__post_init__()
    owner = "FrequentWords"
    task_lib.check_choice(owner, "wording", self.wording, ("ruler", "short"))
    task_lib.check_int(owner, "letters", self.letters, 1)
    if not self.alpha > 1:
      raise ValueError(f"{owner}: alpha must be above 1; got {self.alpha!r}")
    if self.vocabulary is not None:
      task_lib.check_int(owner, "vocabulary", self.vocabulary, 5)
    if self._size() > 26**self.letters // 2:
      raise ValueError(
        f"{owner}: {self._size()} words need more than {self.letters} letters"
      )
    counts = self._counts()
    if len(counts) < 4 or len(set(counts[1:5].tolist())) < len(counts[1:5]):
      raise ValueError(
        f"{owner}: length {self.length} is too short for ranks 2 to 5 to differ"
        f" in frequency; got {counts[:5].tolist()}"
      )

  @property
  def chance(self) -> float:
    return 1 / 26

  def _size(self):
    return max(5, self.length // 50) if not self.vocabulary else self.vocabulary

  def _texts(self):
    if self.wording == "short":
      return b"", _SHORT
    return _FWE_INTRO, _FWE_QUESTION

  def _counts(self):
    """How often each rank comes, ranks that never come left out."""
    room = self.length - sum(map(len, self._texts())) - 3 * (self.letters + 1)
    rank = np.arange(1, self._size() + 1, dtype=np.float64)
    share = rank**-self.alpha / _zeta(self.alpha)
    size = np.where(rank == 1, len(_DOTS), self.letters) + 1
    low, high = 0, self.length
    while low < high:
      middle = (low + high + 1) // 2
      fits = (np.floor(middle * share) * size).sum() - 1 <= room
      low, high = (middle, high) if fits else (low, middle - 1)
    counts = np.floor(low * share).astype(np.int64)
    return counts[counts > 0]

  def row(self, draws):
    counts = self._counts()
    ranked = [_DOTS]
    while len(ranked) < len(counts):
      word = bytes(97 + draws.below(26) for _ in range(self.letters))
      if word not in ranked:
        ranked.append(word)
    words = [w for w, count in zip(ranked, counts) for _ in range(count)]
    intro, question = self._texts()
    context = b" ".join(draws.shuffled(words))
    pieces = [(intro + context + question, False)]
    for word in ranked[1:4]:
      pieces += [(b" ", False), (word, True)]
    return pieces

  def solve(self, symbols):
    text = bytes(symbols.astype("uint8"))
    intro, question = self._texts()
    end = text.rindex(question)
    words = Counter(text[len(intro) : end].split())
    del words[_DOTS]
    top = (b" " + word for word, _ in words.most_common(3))
    return end + len(question), b"".join(top)


def _compounds(draws):
  while True:
    adjective = draws.pick(haystack.ADJECTIVES)
    yield f"{adjective}-{draws.pick(haystack.NOUNS)}"


def _zeta(alpha: float) -> float:
  """Riemann's zeta function for alpha > 1, by Euler and Maclaurin."""
  n = 1000.0
  head = (np.arange(1.0, n) ** -alpha).sum()
  tail = n ** (1 - alpha) / (alpha - 1) + n**-alpha / 2
  return float(head + tail + alpha * n ** (-alpha - 1) / 12)


_WORDS = tuple(sorted({*haystack.ADJECTIVES, *haystack.NOUNS}))
_SHORT_WORDS = tuple(word for word in _WORDS if len(word) <= 4)

task_lib.register("ruler_cwe", CommonWords)
task_lib.register(
  "ruler_cwe_short",
  CommonWords,
  length=4096,
  freq_common=6,
  freq_uncommon=1,
)
task_lib.register(
  "ruler_cwe_small",
  CommonWords,
  length=192,
  num_common=2,
  freq_common=4,
  freq_uncommon=1,
  wording="short",
)
task_lib.register("ruler_fwe", FrequentWords)
task_lib.register(
  "ruler_fwe_small",
  FrequentWords,
  length=256,
  letters=2,
  vocabulary=8,
  wording="short",
)
