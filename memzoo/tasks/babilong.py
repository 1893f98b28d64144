"""Facts of bAbI among sentences of a long text, as in BABILong."""

import dataclasses
import os

from memzoo.tasks import babi, haystack, task as task_lib
from memzoo.tasks.babi import Babi

# BABILong passes over background sentences of fewer tokens.
_LEAST_WORDS = 10
# Tokens of the stories are those of `Babi`; the others come after them.
_WORDS = (
  *babi.STORY_WORDS,
  *sorted(set(haystack.words()) - set(babi.STORY_WORDS)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BabiLong(Babi):
  """Answer a question of bAbI whose facts are scattered in a long text.

  Each fact is put before one of the n background sentences, or after the last,
  at one of n + 1 places, uniform and with replacement; the facts keep their
  order. Successive sentences fill the row to exactly T = length tokens; the
  last one is cut. Then come the question and the answer. Stories and
  questions: see `Babi`.

  Attributes:
    question: 1 to 5.
    length: T, in tokens.
    tokens: 'bytes', or 'words' with the generated background alone.
    max_facts: longer stories are thrown away; None: as many as surely fit, up
      to the figures of `babi_qa1` to `babi_qa5`.
    path: any file, whose sentences of ten words and more are the background,
      from a random place on; all splits read all of it. None: sentences of a
      small grammar.

  Presets:
    babilong_qa1 to babilong_qa5: T = 1024 bytes; give `length` for others, and
      `path` for a book.
    babilong_qa1_small to babilong_qa5_small: words, up to 4, 4, 6, 2 and 8
      facts in T = 96, generated background. Not a published setting.

  Differs: the stories are generated (see `Babi`), and so is the background
    unless `path` is given (BABILong: books of PG19). Lengths are bytes or words
    (BABILong: tokens of GPT-2, without the question), and sentences of under
    ten words, not tokens, are passed over. There are no instructions and no
    solved examples. The score is that of the answer's symbols under teacher
    forcing, not a match of generated text.

  Paper: Kuratov et al. 2024, BABILong: Testing the Limits of LLMs with Long
    Context Reasoning-in-a-Haystack, arXiv:2406.10149, section 2.
  """

  length: int = 1024
  tokens: str = "bytes"
  path: str | os.PathLike | None = None

  def __post_init__(self):
    super().__post_init__()
    path = haystack.check_file("BabiLong", self.path)
    object.__setattr__(self, "path", path)
    if path is not None and self.tokens == "words":
      raise ValueError(
        "BabiLong: tokens 'words' are for the generated background; got the"
        f" path {path!r}"
      )

  def _words(self):
    return _WORDS

  def row(self, draws):
    story = self.story(draws)
    # What is added to the facts, with a space after each piece.
    end = f"{story.question} ".encode()
    answer = story.answer.encode()
    facts = [f"{fact} ".encode() for fact in story.facts]
    room = self.length - sum(len(self.encode(p)) for p in (*facts, end, answer))
    background = self._background(draws, room)
    places = sorted(draws.below(len(background) + 1) for _ in facts)
    context = haystack.insert(background, facts, places)
    return [(b"".join((*context, end)), False), (answer, True)]

  def _background(self, draws, room):
    """Sentences, each with a space, of exactly `room` symbols in all."""
    if self.path is None:
      sentences = haystack.generated(draws)
    else:
      sentences = haystack.from_file(draws, self.path, _LEAST_WORDS)
    taken = []
    while room:
      sentence = next(sentences) + b" "
      size = len(self.encode(sentence))
      if size > room:
        sentence = self._cut(sentence, room)
      taken.append(sentence)
      room -= min(size, room)
    return taken

  def _cut(self, sentence, room):
    """The first `room` symbols of a sentence, the last of them a space."""
    if self.tokens == "bytes":
      return sentence[: room - 1] + b" "
    words = babi.split(sentence)[:room]
    return " ".join(words).encode() + b" "


for _question, _small in ((1, 4), (2, 4), (3, 6), (4, 2), (5, 8)):
  task_lib.register(f"babilong_qa{_question}", BabiLong, question=_question)
  task_lib.register(
    f"babilong_qa{_question}_small",
    BabiLong,
    question=_question,
    length=96,
    tokens="words",
    max_facts=_small,
  )
