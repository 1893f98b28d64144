"""Stories and questions as in bAbI."""

import dataclasses
import functools
import re

import numpy as np

from memzoo.tasks import babi_world, task as task_lib, text_rows
from memzoo.tasks.text_rows import TextRows

_TOKEN = re.compile(r"[a-z]+|[.,?]")
# Length of the longest fact, and of a question with its answer, by question.
_LONGEST = {
  "words": {1: (7, 5), 2: (7, 6), 3: (7, 9), 4: (8, 8), 5: (7, 9)},
  "bytes": {1: (34, 25), 2: (37, 31), 3: (37, 51), 4: (38, 38), 5: (35, 39)},
}

STORY_WORDS = ("", *babi_world.words())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Babi(TextRows):
  """Answer a question about a short story.

  A row is the facts of a story, one question and the answer. People move
  between six places, pick up and put down three things and, in question 5, hand
  them on; the answer follows from the facts alone. Only the answer is asked
  for. Layout and weights: see `TextRows`.

  1, one supporting fact: where is a person? 2, two supporting facts: where is a
  thing? 3, three supporting facts: where was a thing before it last came to a
  place? 4, relations of two: what is north of a place, or what is that place
  north of? 5, relations of three: who gave what to whom?

  Attributes:
    question: 1 to 5.
    length: T, in tokens; it limits the number of facts.
    tokens: 'words', the custom of the field, in lower case with '.' and '?' as
      tokens of their own (token 0 fills up), or 'bytes'.
    max_facts: longer stories are thrown away; None: as many as surely fit.

  Presets:
    babi_qa1 to babi_qa5: words, up to 10, 68, 32, 2 and 126 facts; 10,000 rows
      to train on and 1,000 to test, the sizes of the larger published set.
    babi_qa1_small to babi_qa5_small: words, up to 4, 6, 8, 2 and 12 facts,
      fresh rows for ever. Not a published setting.

  Differs: stories are generated, and the published files are not read. Which
    events follow each other and when a question is asked are those of the
    published generator (facebookarchive/bAbI-tasks), which by its sentences is
    not the one that made the published files; in these, people seem to move
    more often and stories of question 3 to be longer. Verbs and forms of the
    questions are those of the files. Question 2 also asks for things that were
    put down. Question 3 asks for any place to which the thing came, as the
    files do (the generator: the last), and means the last time it came there.
    In question 5 things may also be put down, as in the files, and what follows
    a gift happens (in the generator it is told alone). The places at the start
    are random. A story with five questions gives five rows, each with what is
    told before the question, without the other questions.

  Paper: Weston et al. 2015, Towards AI-Complete Question Answering: A Set of
    Prerequisite Toy Tasks, arXiv:1502.05698, section 3.
  """

  question: int
  length: int
  tokens: str = "words"
  max_facts: int | None = None
  num_test: int = 1000

  def __post_init__(self):
    super().__post_init__()
    owner = type(self).__name__
    task_lib.check_int(owner, "question", self.question, 1, 5)
    task_lib.check_choice(owner, "tokens", self.tokens, _LONGEST)
    least = babi_world.LEAST_FACTS[self.question]
    if self.max_facts is not None:
      task_lib.check_int(owner, "max_facts", self.max_facts, least)
    need = length_for(self.question, self.max_facts or least, self.tokens)
    if self.length < need:
      raise ValueError(
        f"{owner}: length must be at least {need} {self.tokens} for"
        f" {self.max_facts or least} facts; got {self.length}"
      )

  @property
  def vocab_size(self) -> int:
    return len(self.vocabulary) or 256

  @property
  def chance(self) -> float:
    answers = babi_world.answers(self.question)
    if self.tokens == "words":
      return 1 / len(answers)
    return text_rows.guess(answers)

  @property
  def vocabulary(self) -> tuple[str, ...]:
    """The word of each token; empty for 'bytes'. Token 0 fills up."""
    return self._words() if self.tokens == "words" else ()

  def _words(self):
    return STORY_WORDS

  def encode(self, text):
    if self.tokens == "bytes":
      return super().encode(text)
    known = _numbers(self._words())
    return np.array([known[word] for word in split(text)], np.int32)

  def story(self, draws) -> babi_world.Story:
    """The story of a row, of as many facts as surely fit."""
    fact, rest = _LONGEST[self.tokens][self.question]
    most = min(
      self.max_facts or babi_world.FACTS[self.question],
      (self.length - rest) // fact,
    )
    return babi_world.tell(self.question, draws, most)

  def row(self, draws):
    story = self.story(draws)
    text = " ".join([*story.facts, story.question, ""])
    return [(text.encode(), False), (story.answer.encode(), True)]

  def solve(self, symbols):
    if self.tokens == "bytes":
      text = bytes(symbols.astype(np.uint8))
      end = text.rindex(b"?") + 1
      words, begin = split(text[:end]), end + 1
    else:
      known = self._words()
      begin = int(np.flatnonzero(symbols == known.index("?"))[-1]) + 1
      words = [known[token] for token in symbols[:begin]]
    spelt = {a.lower(): a for a in babi_world.answers(self.question)}
    return begin, spelt[babi_world.solve(words)].encode()


def split(text: bytes) -> list[str]:
  """Words and marks of a text, in lower case."""
  return _TOKEN.findall(text.decode("latin-1").lower())


def length_for(question: int, facts: int, tokens: str) -> int:
  """The length that surely holds a question after so many facts."""
  fact, rest = _LONGEST[tokens][question]
  return facts * fact + rest


@functools.lru_cache(maxsize=2)
def _numbers(words: tuple[str, ...]) -> dict[str, int]:
  return {word: i for i, word in enumerate(words)}


for _question, _small in ((1, 4), (2, 6), (3, 8), (4, 2), (5, 12)):
  _most = babi_world.FACTS[_question]
  task_lib.register(
    f"babi_qa{_question}",
    Babi,
    question=_question,
    length=length_for(_question, _most, "words"),
    num_train=10_000,
  )
  task_lib.register(
    f"babi_qa{_question}_small",
    Babi,
    question=_question,
    length=length_for(_question, _small, "words"),
  )
