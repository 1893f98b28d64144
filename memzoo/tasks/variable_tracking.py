"""Chains of variable assignments in a haystack, as in RULER."""

import dataclasses
import itertools
import os
import re

from memzoo.tasks import haystack, task as task_lib
from memzoo.tasks.text_rows import TextRows

_INTRO = (
  b"Memorize and track the chain(s) of variable assignment hidden in the"
  b" following text.\n\n"
)
_QUESTION = (
  "\nQuestion: Find all variables that are assigned the value {value} in the"
  " text above. Answer: According to the chain(s) of variable assignment in the"
  " text above, {count} variables are assigned the value {value}, they are: "
)
_SHORT = "\nVAR = {value}: "
_ASKED = {
  "ruler": re.compile(r"are assigned the value (\d+), they are: "),
  "short": re.compile(r"\nVAR = (\d+): "),
}
_ASSIGNMENT = re.compile(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableTracking(TextRows):
  """Name all variables that got a value, through a chain of assignments.

  Each of `num_chains` chains is `VAR a = 12345` and then `VAR b = VAR a`,
  `VAR c = VAR b` and so on, `num_hops` times; the statements of a chain stand
  in order at uniform distinct places of the haystack. The question gives the
  value of the first chain; the answer is its `num_hops` + 1 variables in the
  order of the chain, separated by spaces. Only the letters of the variables
  are asked for. Bytes and weights: see `TextRows`.

  Attributes:
    length: T, in bytes.
    haystack: 'noise' (five sentences, repeated, one group a line) or 'text'
      (sentences of a small grammar, or of the file `path`).
    path: any file, which takes the place of the grammar; all splits read all
      of it.
    num_chains: number of chains.
    num_hops: assignments of a variable to a variable, in each chain.
    letters: length of the name of a variable.
    digits: digits of a value.
    wording: 'ruler' or 'short', without the introduction and with the
      sentences of noise one by one, for short rows.

  Presets:
    ruler_vt: T = 4096, one chain of 4 hops, 5 letters, 5 digits, noise.
    ruler_vt_small: T = 192, two chains of 2 hops, one letter, two digits,
      short wording. Not a published setting.

  Differs: lengths are bytes, not tokens; the accuracy is that of the answer's
    bytes under teacher forcing, in the order of the chain, where RULER takes
    any; there is no solved example in front of the row (RULER has one), since
    the model is trained on the task; chains have distinct values. In a text,
    places are uniform (RULER: 40 depths).

  Paper: Hsieh et al. 2024, RULER: What's the Real Context Size of Your
    Long-Context Language Models?, arXiv:2404.06654, section 3 and appendix B.
  """

  length: int = 4096
  haystack: str = "noise"
  path: str | os.PathLike | None = None
  num_chains: int = 1
  num_hops: int = 4
  letters: int = 5
  digits: int = 5
  wording: str = "ruler"

  def __post_init__(self):
    super().__post_init__()
    owner = "VariableTracking"
    task_lib.check_choice(owner, "haystack", self.haystack, ("noise", "text"))
    task_lib.check_choice(owner, "wording", self.wording, ("ruler", "short"))
    for name in ("num_chains", "num_hops", "letters", "digits"):
      task_lib.check_int(owner, name, getattr(self, name), 1)
    path = haystack.check_file(owner, self.path)
    if path is not None and self.haystack != "text":
      raise ValueError(
        f"{owner}: path is for haystack 'text'; got {self.haystack!r}"
      )
    object.__setattr__(self, "path", path)
    names = self.num_chains * (self.num_hops + 1)
    if names > 26**self.letters or self.num_chains > 9 * 10 ** (
      self.digits - 1
    ):
      raise ValueError(
        f"{owner}: {names} variables of {self.letters} letters and"
        f" {self.num_chains} values of {self.digits} digits are not distinct"
      )
    # Every statement with a place of its own in the haystack.
    unit = 128 if self.haystack == "text" else max(map(len, self._noise()))
    texts = self._texts("x" * self.digits)
    chain = self._chain(
      ["X" * self.letters] * (self.num_hops + 1), "x" * self.digits
    )
    least = sum(map(len, texts)) + self.num_chains * sum(
      len(statement) + 1 for statement in chain
    )
    least += len(chain) * (self.letters + 1 + unit + 1)
    if self.length < least:
      raise ValueError(
        f"{owner}: length must be at least {least} bytes; got {self.length}"
      )

  @property
  def chance(self) -> float:
    return 1 / 26

  def _noise(self):
    if self.wording == "short":
      return haystack.NOISE
    return (b" ".join(haystack.NOISE),)

  def _texts(self, value):
    if self.wording == "short":
      return b"", _SHORT.format(value=value).encode()
    question = _QUESTION.format(value=value, count=self.num_hops + 1)
    return _INTRO, question.encode()

  def _chain(self, names, value):
    end = "." if self.haystack == "text" else ""
    chain = [f"VAR {names[0]} = {value}{end}"]
    for to, source in zip(names[1:], names):
      chain.append(f"VAR {to} = VAR {source}{end}")
    return [statement.encode() for statement in chain]

  def row(self, draws):
    names = set()
    order = []
    size = self.num_hops + 1
    while len(order) < self.num_chains * size:
      letters = (chr(65 + draws.below(26)) for _ in range(self.letters))
      name = "".join(letters)
      if name not in names:
        names.add(name)
        order.append(name)
    low = 10 ** (self.digits - 1)
    values = draws.sample(9 * low, self.num_chains)
    values = [str(low + value) for value in values]
    chains = [
      self._chain(order[i * size : (i + 1) * size], value)
      for i, value in enumerate(values)
    ]
    intro, question = self._texts(values[0])
    used = len(intro) + len(question) + size * (self.letters + 1)
    used += sum(len(s) + 1 for chain in chains for s in chain)
    mixed = haystack.take(self._sentences(draws), self.length - used)
    for chain in chains:
      places = sorted(draws.sample(len(mixed), size))
      mixed = haystack.insert(mixed, chain, places)
    context = (b"\n" if self.haystack == "noise" else b" ").join(mixed)
    pieces = [(intro + context + question, False)]
    for i, name in enumerate(order[:size]):
      pieces += [(b" " if i else b"", False), (name.encode(), True)]
    return pieces

  def _sentences(self, draws):
    if self.haystack == "noise":
      return itertools.cycle(self._noise())
    if self.path is None:
      return haystack.generated(draws)
    return haystack.from_file(draws, self.path)

  def solve(self, symbols):
    text = bytes(symbols.astype("uint8")).decode("latin-1")
    asked = list(_ASKED[self.wording].finditer(text))[-1]
    # A variable has the value of what it was assigned, to the end of the chain.
    given, found = {}, []
    for name, source, value in _ASSIGNMENT.findall(text[: asked.start()]):
      given[name] = value or given[source]
      if given[name] == asked[1]:
        found.append(name)
    return asked.end(), " ".join(found).encode()


task_lib.register("ruler_vt", VariableTracking)
task_lib.register(
  "ruler_vt_small",
  VariableTracking,
  length=192,
  num_chains=2,
  num_hops=2,
  letters=1,
  digits=2,
  wording="short",
)
