"""Every memory file is registered, documented, and backed by what it claims."""

import configparser
import importlib
import pathlib
import subprocess
import sys

import pytest

import memzoo
from memzoo.core import card, dispatch, registry

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(
  path
  for path in (ROOT / "memzoo" / "cells").glob("*/*.py")
  if path.name != "__init__.py"
)


def test_every_file_is_a_memory_of_its_name():
  assert {path.stem for path in FILES} == set(memzoo.names())
  for path in FILES:
    entry = memzoo.describe(path.stem)
    assert entry.family == path.parent.name
    assert entry.cls.__module__ == f"memzoo.cells.{entry.family}.{path.stem}"
    lines = path.read_text().splitlines()
    assert len(lines) <= 200, f"{path.name} has {len(lines)} lines"


@pytest.mark.parametrize("name", memzoo.names())
def test_docstring_sections(name):
  cls = memzoo.describe(name).cls
  parts = card.sections(cls)
  for section in ("", "State", "Params", "Forms", "Differs", "Paper"):
    assert parts.get(section), f"{name}: the docstring has no {section!r}"
  assert parts[""].count("\n") >= 2, f"{name}: no equations"
  assert "arXiv" in parts["Paper"] or "doi" in parts["Paper"].lower()
  for form in memzoo.describe(name).forms:
    assert form in parts["Forms"], f"{name}: Forms does not speak of {form!r}"


@pytest.mark.parametrize("name", memzoo.names())
def test_main_op_and_forms_exist(name):
  entry = memzoo.describe(name)
  for form in entry.forms:
    assert form in dispatch.IMPLEMENTATIONS
  if entry.op:
    module = importlib.import_module(f"memzoo.ops.{entry.op}")
    assert callable(getattr(module, entry.op))


@pytest.mark.parametrize("name", memzoo.names())
def test_evidence_is_backed(name):
  entry = memzoo.describe(name)
  assert entry.evidence != "none", f"{name} carries no evidence"
  test = ROOT / "tests" / "cells" / f"{name}_test.py"
  text = test.read_text()
  assert "def test_paper_equation" in text
  assert "def test_signature_behaviour" in text
  if entry.evidence in ("silver", "gold"):
    flags = list((ROOT / "experiments").glob(f"*/{name}.flags"))
    assert flags, f"{name} is {entry.evidence} without a flag file"
  if entry.evidence == "gold":
    assert entry.parity


@pytest.mark.parametrize("name", memzoo.names())
def test_card(name):
  page = memzoo.card(name)
  assert name in page and memzoo.describe(name).paper in page
  assert "not recorded" not in page.split("tolerance")[1].splitlines()[0] or (
    memzoo.describe(name).forms == ("step",)
  ), "run pytest tests/conformance_test.py --record"


def test_every_package_is_installed():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  listed = set(config["options"]["packages"].split())
  found = {
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in (ROOT / "memzoo").rglob("__init__.py")
  } | {
    ".".join(("memzoo", *path.parent.relative_to(ROOT).parts))
    for path in (ROOT / "kernels").rglob("__init__.py")
  }
  assert listed == found


def test_readme_table_is_current():
  readme = (ROOT / "README.md").read_text()
  assert card.table() in readme, "run python -m experiments.readme"


def test_import_is_light():
  """`import memzoo` needs the core's packages alone."""
  code = (
    "import jax, flax, sys; before = set(sys.modules); import memzoo;"
    "new = {m.split('.')[0] for m in set(sys.modules) - before};"
    "heavy = {'tensorflow_datasets', 'grain', 'matplotlib', 'torch', "
    "'equinox', 'sklearn', 'mnist1d', 'tensorboardX'} & new;"
    "assert not heavy, heavy"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_register_refuses():
  import dataclasses

  @dataclasses.dataclass(frozen=True)
  class Mine(memzoo.Cell):
    d_model: int

  about = dict(
    family="rnn", year=2026, paper="none", write="none", tiny=dict(d_model=3)
  )
  with pytest.raises(ValueError, match="'gru' is already registered"):
    memzoo.register("gru", **about)(Mine)
  with pytest.raises(ValueError, match="unknown family 'rn'.*'rnn'"):
    memzoo.register("mine", **{**about, "family": "rn"})(Mine)
  with pytest.raises(ValueError, match="unknown evidence 'gld'.*'gold'"):
    memzoo.register("mine", **about, evidence="gld")(Mine)
  with pytest.raises(TypeError, match="frozen dataclass"):
    memzoo.register("mine", **about)(object)
  assert "mine" not in registry.names()
