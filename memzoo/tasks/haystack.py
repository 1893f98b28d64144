"""Text in which facts and needles are hidden, and where they are put."""

from collections.abc import Iterable, Iterator
import functools
import os
import re

import numpy as np

from memzoo.tasks.text_rows import Draws

# RULER's depths of needles, in percent of the sentences.
DEPTHS = tuple(np.round(np.linspace(0, 100, 40)).astype(int).tolist())

# RULER's noise, which it repeats as a whole.
NOISE = (
  b"The grass is green.",
  b"The sky is blue.",
  b"The sun is yellow.",
  b"Here we go.",
  b"There and back again.",
)

ADJECTIVES = tuple(
  """
  amber ancient bitter blank bold brave brief bright broad broken calm careful
  cheap clean clever cloudy cold common cool cosy crisp curious damp dark deep
  dim distant dry dusty eager early empty even faint fair famous fast fierce
  final firm flat fond fresh frozen full gentle giant glad golden grand grave
  grim hasty heavy hollow honest humble icy idle jolly keen large late lazy
  light little lively local lonely long loud lucky mellow merry mild modern
  modest narrow neat new noble odd old pale patient plain polite proud quick
  quiet rapid rare raw rich ripe rough round royal rusty sharp shiny short shy
  silent silver simple slow small smooth soft solid sour square steady steep
  stiff strange strict strong sturdy subtle sudden sweet swift tall tame tender
  thick thin tidy tiny tired tough vast vivid warm weak wide wild wise young
  """.split()
)
NOUNS = tuple(
  """
  acorn anchor ant apron arrow axe badge bank barrel basin basket beach bead
  beam bear bee bell belt bench berry bird boat bolt book boot bottle bowl box
  branch bread brick bridge broom brush bucket bush button cabin cable cage cake
  candle canoe cape card cart castle cave chain chalk chest city clay cliff
  clock cloud coal coast coat coin comb compass copper cork corn cotton crab
  crane crow crown cup curtain daisy desk dish dock dome door dove drum duck
  dune eagle elm engine fan farm feather fence fern field fig fire fish flag
  flame flint flute fog forest fork fort fox frog gate gem glass globe glove
  goat goose grain grape harbor harp hat hawk hay helmet hen hill hook horn
  horse house ink iron island ivory jar jewel kettle key kite knife knot ladder
  lake lamp lane lantern leaf lemon lens letter lily lion lock log loom map
  maple marble mask mast meadow melon mill mint mirror moon moss moth mountain
  mud nail needle nest net nut oak oar onion orchard otter oven owl ox paint
  palm pan paper pear pearl pebble pen pepper piano pine pipe pit plate plow
  plum pond pony pot prism pump quilt rabbit raft rail rain raven reed ribbon
  ring river road robe rock rod roof rope rose rug sail salt sand saw scarf
  seed shed sheep shell ship shoe silk skate sled snail snow soap spade spoon
  spring star stone stove straw string sugar swan sword tent thread tiger tile
  torch tower toy train tree trout trunk tulip tunnel valley vase veil vine
  violin wagon wall walnut wave wax well whale wheat wheel whistle willow wind
  window wing wolf wool yarn
  """.split()
)
_PEOPLE = tuple(
  """
  baker carpenter clerk cook doctor driver farmer fisher gardener guard hunter
  judge lawyer mason merchant miller nurse painter pilot poet porter sailor
  scholar shepherd singer soldier tailor teacher weaver writer
  """.split()
)
_DEEDS = tuple(
  """
  admired borrowed bought carried cleaned described drew examined forgot
  guarded kept mended mentioned noticed ordered painted praised remembered
  repaired sketched sold studied watched weighed wrapped
  """.split()
)
_TIMES = tuple("autumn evening morning night season spring summer".split())
_FORMS = tuple(
  form.split()
  for form in (
    "The A P D the A N near the A N before the T was over .",
    "In the A T the P often D the N , although nobody had noticed it .",
    "It was the A N that the P D first , and then the A N .",
    "Every P who D the A N would later speak of the A T .",
    "Some people say that the P D the N because the N was A .",
    "After the A T the P and the P D the N by the N .",
  )
)
_SLOTS = {"A": ADJECTIVES, "N": NOUNS, "P": _PEOPLE, "D": _DEEDS, "T": _TIMES}
_SPACE = re.compile(rb"\s+")
_END = re.compile(rb"(?<=[.!?])\s+")


def words() -> tuple[str, ...]:
  """Every word and mark of the generated text, in lower case, sorted."""
  fixed = (w for form in _FORMS for w in form if w not in _SLOTS)
  slots = (w for slot in _SLOTS.values() for w in slot)
  return tuple(sorted({w.lower() for w in (*fixed, *slots)}))


def generated(draws: Draws) -> Iterator[bytes]:
  """Sentences of a small grammar, without end; 12 words and marks or more."""
  while True:
    text = " ".join(
      draws.pick(_SLOTS[word]) if word in _SLOTS else word
      for word in draws.pick(_FORMS)
    )
    yield text.replace(" ,", ",").replace(" .", ".").encode()


def noise() -> Iterator[bytes]:
  """RULER's five sentences of noise, one by one, again and again."""
  while True:
    yield from NOISE


def from_file(draws: Draws, path: str, least: int = 1) -> Iterator[bytes]:
  """Successive sentences of a file from a random place, without end.

  A sentence ends with `.`, `!` or `?` before white space; runs of white space
  count as one space. After the last sentence of the file comes the first.

  Args:
    draws: where the random place comes from.
    path: the file, in any encoding that extends ASCII.
    least: sentences of fewer words are passed over.
  """
  data = _open(path, os.stat(path).st_mtime_ns, os.path.getsize(path))
  place, rest, fruitless = draws.below(len(data)), b"", 0
  first = place > 0
  while fruitless <= 2 * len(data):
    chunk = data[place : place + 2**16].tobytes()
    place = (place + len(chunk)) % len(data)
    *whole, rest = _END.split(rest + chunk)
    if not place:
      whole, rest = [*whole, rest], b""
    if whole and first:
      whole, first = whole[1:], False
    fruitless += len(chunk)
    for sentence in whole:
      sentence = _SPACE.sub(b" ", sentence).strip()
      if sentence and len(sentence.split()) >= least:
        fruitless = 0
        yield sentence
  raise ValueError(f"{path!r} has no sentence of at least {least} words")


def check_file(owner: str, path: str | os.PathLike | None) -> str | None:
  """The path of a file with something in it, or one clear error."""
  if path is None:
    return None
  path = os.fspath(path)
  if not os.path.exists(path):
    raise FileNotFoundError(f"{owner}: there is no file {path!r}")
  if not os.path.isfile(path):
    raise ValueError(f"{owner}: {path!r} is not a file")
  if not os.path.getsize(path):
    raise ValueError(f"{owner}: {path!r} is empty")
  return path


@functools.lru_cache(maxsize=8)
def _open(path: str, mtime: int, size: int) -> np.ndarray:
  del mtime, size  # A file that changed is mapped anew.
  return np.memmap(path, dtype=np.uint8, mode="r")


def take(sentences: Iterable[bytes], room: int) -> list[bytes]:
  """The first sentences that fit into `room` bytes, each with a space."""
  taken = []
  for sentence in sentences:
    room -= len(sentence) + 1
    if room < 0:
      return taken
    taken.append(sentence)
  return taken


def insert(units: list[bytes], needles, places: list[int]) -> list[bytes]:
  """The units, with needle i before unit places[i]; places ascend."""
  mixed = list(units)
  for shift, (needle, place) in enumerate(zip(needles, places)):
    mixed.insert(place + shift, needle)
  return mixed
