"""Needles in a haystack, as in RULER."""

import dataclasses
import itertools
import os
import re
from typing import NamedTuple
import uuid

from memzoo.tasks import haystack, task as task_lib, text_rows
from memzoo.tasks.text_rows import TextRows

HAYSTACKS = ("noise", "text", "needles")
TYPES = ("numbers", "words", "uuids", "nouns")
_SHORT_NOUNS = tuple(n for n in haystack.NOUNS if len(n) <= 4)


class _Wording(NamedTuple):
  """Templates; `types` is the type of the values, in the plural or not."""

  intro: str
  needle: str
  question: str


_RULER = _Wording(
  intro=(
    "{some} special magic {types} {are} hidden within the following text. Make"
    " sure to memorize it. I will quiz you about the {types} afterwards.\n"
  ),
  needle="One of the special magic {plural} for {key} is: {value}.",
  question=(
    "\nWhat {are_all} the special magic {types} for {query} mentioned in the"
    " provided text? The special magic {types} for {query} mentioned in the"
    " provided text {are} "
  ),
)
_SHORT = _Wording(
  intro="",
  needle="The value of {key} is {value}.",
  question="\nThe value of {query} is ",
)
_WORDINGS = {"ruler": _RULER, "short": _SHORT}
_NEEDLE = {
  "ruler": re.compile(
    r"One of the special magic [a-z]+ for ([\w-]+) is: ([\w-]+)\."
  ),
  "short": re.compile(r"The value of ([\w-]+) is ([\w-]+)\."),
}
_QUESTION = {
  "ruler": re.compile(
    r"\nWhat (?:is|are all) the special magic [a-z]+ for (?P<query>[\w, -]+)"
    r" mentioned in the provided text\? The special magic [a-z]+ for"
    r" (?P=query) mentioned in the provided text (?:is|are) "
  ),
  "short": re.compile(r"\nThe value of (?P<query>[\w, -]+) is "),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles(TextRows):
  """Find the values of keys that were hidden in a long text.

  The context holds `num_keys` * `num_values` needles, each of which says one
  value of one key; then come the question for `num_queries` of the keys and
  the answer: the values of each key in the order of their needles, joined by
  ", ". Only the bytes of the values are asked for. As much haystack is put in
  as fits. Bytes and weights: see `TextRows`.

  Attributes:
    length: T, in bytes.
    haystack: 'noise' (five sentences, repeated, one group a line), 'text'
      (sentences of a small grammar, or of the file `path`) or 'needles'
      (needles of other keys, one a line).
    path: any file, which takes the place of the grammar; all splits read all
      of it. A row begins at a random sentence.
    type_key: 'words' (adjective-noun), 'numbers', 'uuids' or 'nouns' (of four
      letters at most).
    type_value: likewise.
    num_keys: raised to `num_queries` where lower.
    num_values: values of each key.
    num_queries: keys that are asked for.
    digits: digits of a number.
    depths: candidates for the depths of the needles, in percent of the
      sentences, drawn without replacement. None: RULER's: 40 depths from 0 to
      100 in a text, uniform distinct places in other haystacks.
    wording: 'ruler' or 'short', without the introduction and with the
      sentences of noise one by one, for short rows.

  Presets (T = 4096; give `length` for others):
    ruler_niah_single_1: noise, one word key, one number of 7 digits.
    ruler_niah_single_2: text. ruler_niah_single_3: text, a uuid.
    ruler_niah_multikey_1: text, 4 keys. ruler_niah_multikey_2: a haystack of
      needles. ruler_niah_multikey_3: likewise, uuids for keys and values.
    ruler_niah_multivalue: text, 4 values of one key.
    ruler_niah_multiquery: text, 4 keys, all asked for.
    ruler_niah_single_small, ruler_niah_multikey_small (4 keys),
      ruler_niah_multivalue_small, ruler_niah_multiquery_small (2 each): T = 256
      or less, short wording, noun keys, numbers of 3 digits, noise. Not a
      published setting.

  Differs: lengths are bytes, not tokens of a language model (about four bytes
    each), and the accuracy is that of the answer's bytes under teacher
    forcing, not a match of generated text; so the answer has an order, where
    RULER takes any. The words are a short list of this package (RULER:
    `wonderwords`) and the text of 'text' is generated (RULER: essays that are
    downloaded), unless `path` is given. Keys are distinct, and so are values:
    a haystack of needles never repeats one that is asked for (RULER does not
    check). Text ends at a sentence, not at a word.

  Paper: Hsieh et al. 2024, RULER: What's the Real Context Size of Your
    Long-Context Language Models?, arXiv:2404.06654, section 3 and appendix B.
  """

  length: int = 4096
  haystack: str = "noise"
  path: str | os.PathLike | None = None
  type_key: str = "words"
  type_value: str = "numbers"
  num_keys: int = 1
  num_values: int = 1
  num_queries: int = 1
  digits: int = 7
  depths: tuple[int, ...] | None = None
  wording: str = "ruler"

  def __post_init__(self):
    super().__post_init__()
    task_lib.check_choice("Needles", "haystack", self.haystack, HAYSTACKS)
    task_lib.check_choice("Needles", "type_key", self.type_key, TYPES)
    task_lib.check_choice("Needles", "type_value", self.type_value, TYPES)
    task_lib.check_choice("Needles", "wording", self.wording, _WORDINGS)
    for name in ("num_keys", "num_values", "num_queries", "digits"):
      task_lib.check_int("Needles", name, getattr(self, name), 1)
    path = haystack.check_file("Needles", self.path)
    if path is not None and self.haystack != "text":
      raise ValueError(
        f"Needles: path is for haystack 'text'; got {self.haystack!r}"
      )
    object.__setattr__(self, "path", path)
    keys = max(self.num_keys, self.num_queries)
    object.__setattr__(self, "num_keys", keys)
    needles = keys * self.num_values
    for name, kind, need in (
      ("keys", self.type_key, keys),
      ("values", self.type_value, needles),
    ):
      # As many again are left for the haystack of needles.
      if self._candidates(kind) < 2 * need:
        raise ValueError(
          f"Needles: {need} distinct {name} of type {kind!r} need"
          f" {2 * need} candidates; there are {self._candidates(kind)}"
        )
    depths = self.depths
    if depths is not None:
      if not isinstance(depths, (tuple, list)):
        raise ValueError(
          f"Needles: depths must be percents in a tuple; got {depths!r}"
        )
      depths = tuple(
        task_lib.check_int("Needles", "a depth", depth, 0, 100)
        for depth in depths
      )
      object.__setattr__(self, "depths", depths)
    elif self.haystack == "text":
      depths = haystack.DEPTHS
    if depths is not None and len(depths) < needles:
      raise ValueError(
        f"Needles: {needles} needles need as many depths; got {len(depths)}"
      )
    longest = {kind: self._longest(kind) for kind in TYPES}
    texts = self._texts(
      [longest[self.type_key]] * keys,
      [[longest[self.type_value]] * self.num_values] * keys,
      range(self.num_queries),
    )
    # Room for the places of all needles; in a text they may share them.
    unit, units = {
      "noise": (max(map(len, self._noise())), needles),
      "needles": (len(texts[1][0]), needles),
      "text": (128, 1),
    }[self.haystack]
    least = self._size(*texts) + units * (unit + 1)
    if self.length < least:
      raise ValueError(
        f"Needles: length must be at least {least} bytes for {needles} needles"
        f" in a haystack of {self.haystack}; got {self.length}"
      )

  @property
  def chance(self) -> float:
    if self.type_value == "numbers":
      return (1 / 9 + (self.digits - 1) / 10) / self.digits
    if self.type_value == "uuids":
      # 4 dashes and the version are known, one digit has 4 values, 30 have 16.
      return (5 + 1 / 4 + 30 / 16) / 36
    return text_rows.guess(_words(self.type_value))

  def _candidates(self, kind):
    sizes = {"numbers": 9 * 10 ** (self.digits - 1), "uuids": 2**122}
    return sizes[kind] if kind in sizes else len(_words(kind))

  def _longest(self, kind):
    sizes = {"numbers": self.digits, "uuids": 36}
    return "x" * (sizes.get(kind) or max(map(len, _words(kind))))

  def _noise(self):
    if self.wording == "short":
      return haystack.NOISE
    return (b" ".join(haystack.NOISE),)

  def _draw(self, draws, kind):
    if kind == "numbers":
      low = 10 ** (self.digits - 1)
      return str(low + draws.below(9 * low))
    if kind == "uuids":
      bits = draws.below(2**64) << 64 | draws.below(2**64)
      return str(uuid.UUID(int=bits, version=4))
    return draws.pick(_words(kind))

  def _distinct(self, draws, kind, size):
    found = {}
    while len(found) < size:
      found[self._draw(draws, kind)] = None
    return list(found)

  def _needle(self, key, value):
    template = _WORDINGS[self.wording].needle
    plural = "words" if self.type_value == "nouns" else self.type_value
    return template.format(plural=plural, key=key, value=value).encode()

  def _texts(self, keys, values, asked):
    """Introduction, needles [key][value] in a flat list, question, answers."""
    wording = _WORDINGS[self.wording]
    plural = "words" if self.type_value == "nouns" else self.type_value
    many = self.num_queries * self.num_values > 1
    queries = [keys[i] for i in asked]
    query = ", ".join(queries[:-1]) + ", and " if queries[:-1] else ""
    fields = dict(
      some="Some" if many else "A",
      types=plural if many else plural[:-1],
      are="are" if many else "is",
      are_all="are all" if many else "is",
      query=query + queries[-1],
    )
    needles = [self._needle(k, v) for k, vs in zip(keys, values) for v in vs]
    return (
      wording.intro.format(**fields).encode(),
      needles,
      wording.question.format(**fields).encode(),
      [value.encode() for i in asked for value in values[i]],
    )

  def _size(self, intro, needles, question, answers):
    """Bytes of a row without haystack; every needle with a separator."""
    parts = [intro, question, *answers]
    return (
      sum(map(len, parts))
      + 2 * (len(answers) - 1)
      + sum(len(needle) + 1 for needle in needles)
    )

  def row(self, draws):
    keys = self._distinct(draws, self.type_key, self.num_keys)
    total = self.num_keys * self.num_values
    flat = self._distinct(draws, self.type_value, total)
    owner = [i % self.num_keys for i in range(total)]
    # The order of the needles, which the values of each key follow.
    order = draws.shuffled(range(total))
    values = [
      [flat[i] for i in order if owner[i] == key]
      for key in range(self.num_keys)
    ]
    asked = draws.sample(self.num_keys, self.num_queries)
    intro, _, question, answers = self._texts(keys, values, asked)
    needles = [self._needle(keys[owner[i]], flat[i]) for i in order]
    size = self._size(intro, needles, question, answers)
    units = haystack.take(
      self._sentences(draws, keys, flat), self.length - size
    )
    places = self._places(draws, len(units), total)
    separator = b" " if self.haystack == "text" else b"\n"
    context = separator.join(haystack.insert(units, needles, places))
    pieces = [(intro + context + question, False), (answers[0], True)]
    for answer in answers[1:]:
      pieces += [(b", ", False), (answer, True)]
    return pieces

  def _sentences(self, draws, keys, values):
    if self.haystack == "noise":
      return itertools.cycle(self._noise())
    if self.haystack == "needles":
      return self._distractors(draws, set(keys), set(values))
    if self.path is None:
      return haystack.generated(draws)
    return haystack.from_file(draws, self.path)

  def _distractors(self, draws, keys, values):
    while True:
      key = self._draw(draws, self.type_key)
      value = self._draw(draws, self.type_value)
      if key not in keys and value not in values:
        yield self._needle(key, value)

  def _places(self, draws, units, needles):
    if self.depths is None and self.haystack != "text":
      return sorted(draws.sample(units, needles))
    depths = self.depths or haystack.DEPTHS
    drawn = (depths[i] for i in draws.sample(len(depths), needles))
    return sorted(units * depth // 100 for depth in drawn)

  def solve(self, symbols):
    text = bytes(symbols.astype("uint8")).decode("latin-1")
    question = list(_QUESTION[self.wording].finditer(text))[-1]
    found = {}
    context = text[: question.start()]
    for key, value in _NEEDLE[self.wording].findall(context):
      found.setdefault(key, []).append(value)
    queries = re.split(r", (?:and )?", question["query"])
    answer = ", ".join(value for key in queries for value in found[key])
    return question.end(), answer.encode()


def _words(kind: str) -> tuple[str, ...]:
  return _SHORT_NOUNS if kind == "nouns" else _COMPOUNDS


_COMPOUNDS = tuple(
  f"{adjective}-{noun}"
  for adjective in haystack.ADJECTIVES
  for noun in haystack.NOUNS
)

for _name, _options in (
  ("single_1", {}),
  ("single_2", dict(haystack="text")),
  ("single_3", dict(haystack="text", type_value="uuids")),
  ("multikey_1", dict(haystack="text", num_keys=4)),
  ("multikey_2", dict(haystack="needles")),
  (
    "multikey_3",
    dict(haystack="needles", type_key="uuids", type_value="uuids"),
  ),
  ("multivalue", dict(haystack="text", num_values=4)),
  ("multiquery", dict(haystack="text", num_queries=4)),
):
  task_lib.register(f"ruler_niah_{_name}", Needles, **_options)
for _name, _length, _options in (
  ("single", 128, {}),
  ("multikey", 256, dict(num_keys=4)),
  ("multivalue", 192, dict(num_values=2)),
  ("multiquery", 192, dict(num_queries=2)),
):
  task_lib.register(
    f"ruler_niah_{_name}_small",
    Needles,
    length=_length,
    type_key="nouns",
    digits=3,
    wording="short",
    **_options,
  )
