"""Stories of the first five bAbI questions, from a simulated world.

The people of a world move between places, pick things up, put them down and
hand them on. Where everybody and everything is at the start is uniform and not
told: a question is asked only where the story settles its answer.
"""

import re
from typing import NamedTuple

from memzoo.tasks.text_rows import Draws

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
_PEOPLE = ("Daniel", "John", "Mary", "Sandra")
# The people of question 5.
_GIVERS = ("Bill", "Fred", "Jeff", "Mary")
_MOVES = ("journeyed to", "moved to", "travelled to", "went back to", "went to")
_TAKES = ("got", "grabbed", "picked up", "took")
_DROPS = ("discarded", "dropped", "left", "put down")
_GIVES = ("gave", "handed", "passed")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

# Facts that a row of BABILong may have, from the table of its README.
FACTS = {1: 10, 2: 68, 3: 32, 4: 2, 5: 126}
# Facts between two questions of a story, at least.
LEAST_FACTS = {1: 2, 2: 3, 3: 3, 4: 2, 5: 2}


class Story(NamedTuple):
  """One question and what is told before it."""

  facts: list[str]
  question: str
  answer: str


def answers(question: int) -> tuple[str, ...]:
  """What an answer may be."""
  return (*_GIVERS, *THINGS) if question == 5 else PLACES


def words() -> tuple[str, ...]:
  """Every word and mark of the stories, in lower case, sorted."""
  texts = [*PLACES, *THINGS, *_PEOPLE, *_GIVERS, *_MOVES, *_TAKES, *_DROPS]
  texts += [*_GIVES, *_OPPOSITE]
  texts += [
    "the there . is of to where was before ? what who did give received"
  ]
  return tuple(
    sorted({word for text in texts for word in text.lower().split()})
  )


def tell(question: int, draws: Draws, most: int) -> Story:
  """A story of at most `most` facts; longer ones are thrown away."""
  if question == 4:
    return _directions(draws)
  # A story has five questions; each with what is before it is a row.
  numbers = min(5, most // LEAST_FACTS[question])
  while True:
    number = 1 + draws.below(numbers)
    story = _tell(_World(question, draws), number, most)
    if story is not None:
      return story


def _tell(world, number, most):
  """The facts before question `number`, or None where they are too many."""
  fresh = 0
  while len(world.facts) < most:
    world.step()
    fresh += 1
    asked = world.question(fresh)
    if asked is not None and len(world.facts) <= most:
      number, fresh = number - 1, 0
      if not number:
        return Story(world.facts, *asked)
  return None


class _World:
  """What is true, and what the reader can know of it."""

  def __init__(self, question, draws):
    self._kind = question
    self._draws = draws
    self.facts = []
    self._people = _GIVERS if question == 5 else _PEOPLE
    self._at = {who: draws.pick(PLACES) for who in self._people}
    self._holder = dict.fromkeys(THINGS)
    self._lies = {thing: draws.pick(PLACES) for thing in THINGS}
    self._told = set()  # People whose place the reader knows.
    self._trail = {thing: [] for thing in THINGS}  # Places the reader knows.
    self._gift = None  # (giver, thing, receiver) of the last fact, if a gift.

  def _say(self, who, verbs, rest):
    self.facts.append(f"{who} {self._draws.pick(verbs)} {rest}.")

  def _there(self):
    return self._draws.pick(("", " there"))

  def _note(self):
    """Extends the trail of everything whose place can now be known."""
    for thing, trail in self._trail.items():
      who = self._holder[thing]
      place = self._at[who] if who else self._lies[thing]
      if (who in self._told or trail) and trail[-1:] != [place]:
        trail.append(place)

  def _possible(self):
    """Every take, drop and gift that could happen now."""
    found = []
    for thing in THINGS:
      who = self._holder[thing]
      if who is None:
        found += [
          ("take", person, thing, None)
          for person in self._people
          if self._at[person] == self._lies[thing]
        ]
        continue
      found.append(("drop", who, thing, None))
      if self._kind == 5:
        found += [
          ("give", who, thing, person)
          for person in self._people
          if person != who and self._at[person] == self._at[who]
        ]
    return found

  def _choose(self):
    """The next event: (deed, who, what, to whom)."""
    deeds = {1: ("go",), 5: ("go", "take", "drop", "give")}
    deeds = deeds.get(self._kind, ("go", "take", "drop"))
    while True:
      deed = self._draws.pick(deeds)
      if deed == "go":
        who = self._draws.pick(self._people)
        others = [place for place in PLACES if place != self._at[who]]
        return "go", who, self._draws.pick(others), None
      possible = self._possible()
      # In questions 2 and 3, taking and dropping are one choice.
      if self._kind == 5:
        possible = [event for event in possible if event[0] == deed]
      if possible:
        return self._draws.pick(possible)

  def step(self, event=None):
    """Lets something happen and tells it."""
    deed, who, what, to = event or self._choose()
    self._gift = None
    if deed == "go":
      self._at[who] = what
      self._told.add(who)
      self._say(who, _MOVES, f"the {what}")
    elif deed == "take":
      self._holder[what] = who
      self._say(who, _TAKES, f"the {what}{self._there()}")
    elif deed == "drop":
      self._holder[what], self._lies[what] = None, self._at[who]
      self._say(who, _DROPS, f"the {what}{self._there()}")
    else:
      self._holder[what] = to
      self._say(who, _GIVES, f"the {what} to {to}")
      self._gift = who, what, to
    self._note()

  def question(self, fresh):
    """(question, answer) after `fresh` facts since the last one, or None."""
    draws = self._draws
    if self._kind == 1:
      if fresh < 2:
        return None
      who = draws.pick(sorted(self._told))
      return f"Where is {who}?", self._at[who]
    if self._kind == 5:
      if fresh < 2 or not self._gift:
        return None
      return self._about_gift()
    if fresh < 3 or draws.below(2):
      return None
    if self._kind == 2:
      known = [thing for thing, trail in self._trail.items() if trail]
      if not known:
        return None
      thing = draws.pick(known)
      return f"Where is the {thing}?", self._trail[thing][-1]
    known = [thing for thing, trail in self._trail.items() if trail[1:]]
    if not known:
      return None
    thing = draws.pick(known)
    trail = self._trail[thing]
    # The last time that it came to a place, for each place it came to.
    last = {place: i for i, place in enumerate(trail) if i}
    came = draws.pick(list(last.values()))
    return f"Where was the {thing} before the {trail[came]}?", trail[came - 1]

  def _about_gift(self):
    """A question about the last fact, which is a gift, after some others."""
    who, thing, to = self._gift
    for _ in range(self._draws.below(6)):
      # Nothing about the thing, and no other gift between the two.
      event = self._choose()
      while event[2] == thing or (event[0], event[1], event[3]) == (
        "give",
        who,
        to,
      ):
        event = self._choose()
      self.step(event)
    return self._draws.pick(
      (
        (f"What did {who} give to {to}?", thing),
        (f"Who did {who} give the {thing} to?", to),
        (f"Who gave the {thing} to {to}?", who),
        (f"Who gave the {thing}?", who),
        (f"Who received the {thing}?", to),
      )
    )


def _directions(draws):
  """Three places in a line and two facts about them, in either order."""
  way = draws.pick(tuple(_OPPOSITE))
  first, middle, last = (PLACES[i] for i in draws.sample(len(PLACES), 3))
  facts = []
  for a, b in draws.shuffled([(first, middle), (middle, last)]):
    # Either is said from either end.
    if draws.below(2):
      facts.append(f"The {a} is {way} of the {b}.")
    else:
      facts.append(f"The {b} is {_OPPOSITE[way]} of the {a}.")
  a, b = draws.pick(((first, middle), (middle, last)))
  asked = draws.pick(
    (
      (f"What is {way} of the {b}?", a),
      (f"What is the {a} {way} of?", b),
      (f"What is {_OPPOSITE[way]} of the {a}?", b),
      (f"What is the {b} {_OPPOSITE[way]} of?", a),
    )
  )
  return Story(facts, *asked)


def _either(*names):
  return "(" + "|".join(sorted({n.lower() for n in names}, key=len)) + ")"


_WHO = _either(*_PEOPLE, *_GIVERS)
_EVENT = re.compile(
  rf"\b(?:{_WHO} {_either(*_MOVES)} the {_either(*PLACES)}"
  rf"|{_WHO} {_either(*_TAKES, *_DROPS, *_GIVES)} the {_either(*THINGS)}"
  rf"(?: there| to {_WHO})?"
  rf"|the {_either(*PLACES)} is {_either(*_OPPOSITE)} of the"
  rf" {_either(*PLACES)}) \."
)


def solve(words: list[str]) -> str:
  """The answer to the question at the end of a text, by reading backwards.

  Args:
    words: words and marks in lower case, `?` last. Whatever is no fact is
      passed over.
  """
  asks = ("where", "what", "who")
  start = max(i for i, word in enumerate(words) if word in asks)
  asked = words[start:-1]
  events = [m.groups() for m in _EVENT.finditer(" ".join(words[:start]))]
  if asked[0] == "where" and asked[1] == "was":
    return _before(events, asked[3], asked[-1])
  if asked[0] == "where":
    if asked[2] == "the":
      return _thing_at(events, asked[3])
    return _person_at(events, asked[2])
  if asked[:2] == ["what", "is"]:
    return _direction(events, asked[2:])
  return _gift(events, asked)


def _person_at(events, who):
  for person, _, place, *_ in reversed(events):
    if person == who and place:
      return place
  return None


def _thing_at(events, thing):
  """Where a thing is, None if the events do not say."""
  for i in reversed(range(len(events))):
    _, _, _, who, verb, what, to, *_ = events[i]
    if what != thing:
      continue
    if verb in _DROPS:
      place = _person_at(events[:i], who)
    else:
      place = _person_at(events, to or who)
    # Nobody says where the holder is: the thing has not moved meanwhile.
    return place or _thing_at(events[:i], thing)
  return None


def _before(events, thing, place):
  trail = []
  for i in range(len(events)):
    at = _thing_at(events[: i + 1], thing)
    if at and trail[-1:] != [at]:
      trail.append(at)
  return trail[len(trail) - trail[::-1].index(place) - 2]


def _direction(events, asked):
  """`asked` is `north of the kitchen` or `the kitchen north of`."""
  way, place, swap = asked[0], asked[-1], False
  if asked[0] == "the":
    place, way, swap = asked[1], asked[2], True
  for *_, a, said, b in events:
    if not a:
      continue
    for one, its_way, other in ((a, said, b), (b, _OPPOSITE[said], a)):
      if swap:
        one, other = other, one
      if its_way == way and other == place:
        return one
  return None


def _gift(events, asked):
  """The last gift that matches what the question names."""
  for _, _, _, giver, verb, thing, to, *_ in reversed(events):
    if verb not in _GIVES:
      continue
    if asked[0] == "what" and asked[2] == giver and asked[-1] == to:
      return thing
    if asked[0] == "what" or asked[3 if asked[1] != "did" else 5] != thing:
      continue
    if asked[1] == "received" or (asked[1] == "did" and asked[2] == giver):
      return to
    if asked[1] == "gave" and (len(asked) == 4 or asked[-1] == to):
      return giver
  return None
