"""Files that are made once: where they lie, and how they are written."""

from collections.abc import Callable
import os
import pathlib
import tempfile


def cache_dir() -> pathlib.Path:
  """The folder $MEMZOO_CACHE, or ~/.cache/memzoo."""
  folder = os.environ.get("MEMZOO_CACHE") or "~/.cache/memzoo"
  return pathlib.Path(folder).expanduser()


def write_atomically(
  path: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> None:
  """Calls `write(temporary path)` and moves the file to `path` when whole.

  Two processes that write at once both succeed; one that dies leaves the old
  file or none.

  Raises:
    OSError: the folder cannot be made or written; it names MEMZOO_CACHE.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
      dir=path.parent, prefix=path.stem, suffix=path.suffix
    )
  except OSError as error:
    raise OSError(
      f"cannot write the data cache {str(path.parent)!r} ({error.strerror});"
      " set MEMZOO_CACHE to a folder that can be written"
    ) from error
  os.close(handle)
  try:
    write(pathlib.Path(name))
    os.replace(name, path)
  finally:
    if os.path.exists(name):
      os.unlink(name)
