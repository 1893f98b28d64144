"""The table of memories: what exists, and how to make one by name."""

import dataclasses
import inspect
import typing
from typing import Any

from memzoo.core import dispatch

FAMILIES = (
  "matrix", "ssm", "rnn", "slot", "hopfield", "table", "ttt", "kv", "spiking",
)  # fmt: skip
EVIDENCE = ("gold", "silver", "bronze", "none")


@dataclasses.dataclass(frozen=True)
class Entry:
  """What the registry knows of a memory.

  Attributes:
    name: file name, registry name and flag value.
    cls: the cell class.
    family: one of `FAMILIES`.
    year: of the paper.
    paper: short reference with an identifier ("Cho et al. 2014,
      arXiv:1406.1078").
    write: the write rule, in two or three words.
    op: the op that carries its algebra.
    tiny: options of the smallest odd-sized form; every suite runs on it.
    evidence: 'gold', 'silver', 'bronze' or 'none' yet (DESIGN section 8).
    parity: the public code that it was held against, or ''.
  """

  name: str
  cls: type
  family: str
  year: int
  paper: str
  write: str
  tiny: dict[str, Any]
  evidence: str = "none"
  parity: str = ""

  @property
  def op(self) -> str:
    return self.cls.op

  @property
  def forms(self) -> tuple[str, ...]:
    return ("step", *self.cls.implementations)


_ENTRIES: dict[str, Entry] = {}


def register(name: str, **about):
  """Class decorator that enters a cell under `name`.

  Args:
    name: snake case of the paper's short name; the file's name in this zoo.
    **about: the other fields of `Entry`.

  Raises:
    ValueError: on a name that is taken by another class, an unknown family or
      evidence level.
    TypeError: where the class is no frozen dataclass.
  """

  def enter(cls):
    params = getattr(cls, "__dataclass_params__", None)
    if params is None or not params.frozen:
      raise TypeError(
        f"memory {name!r}: {cls.__name__} must be a frozen dataclass"
      )
    entry = Entry(name=name, cls=cls, **about)
    if entry.family not in FAMILIES:
      raise ValueError(
        f"memory {name!r}: unknown family {entry.family!r}; "
        + dispatch.nearest(entry.family, FAMILIES)
      )
    if entry.evidence not in EVIDENCE:
      raise ValueError(
        f"memory {name!r}: unknown evidence {entry.evidence!r}; "
        + dispatch.nearest(entry.evidence, EVIDENCE)
      )
    old = _ENTRIES.get(name)
    if old is not None and (
      old.cls.__module__,
      old.cls.__qualname__,
    ) != (cls.__module__, cls.__qualname__):
      raise ValueError(
        f"memory {name!r} is already registered, as {old.cls.__qualname__}"
        f" of {old.cls.__module__}"
      )
    _ENTRIES[name] = entry
    cls.name = name
    return cls

  return enter


def names(family: str | None = None) -> tuple[str, ...]:
  """Registered names, sorted; of one family where it is given."""
  if family is not None and family not in FAMILIES:
    raise ValueError(
      f"unknown family {family!r}: " + dispatch.nearest(family, FAMILIES)
    )
  return tuple(
    sorted(n for n, e in _ENTRIES.items() if family in (None, e.family))
  )


def describe(name: str) -> Entry:
  """The entry of `name`.

  Raises:
    ValueError: on an unknown name, with the nearest ones.
  """
  if name not in _ENTRIES:
    raise ValueError(
      f"unknown memory {name!r}: " + dispatch.nearest(name, _ENTRIES)
    )
  return _ENTRIES[name]


def make(name: str, **options):
  """Makes the cell `name` with `options`, the fields of its dataclass.

  >>> cell = memzoo.make('gated_delta', d_model=64, num_heads=2)

  Raises:
    ValueError: on an unknown name, or a value that the cell refuses.
    TypeError: on an unknown or missing option.
  """
  cls = describe(name).cls
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  for option in options:
    if option not in fields:
      raise TypeError(
        f"memory {name!r} has no option {option!r}: "
        + dispatch.nearest(option, fields)
      )
  missing = [
    n
    for n, f in fields.items()
    if f.default is dataclasses.MISSING
    and f.default_factory is dataclasses.MISSING
    and n not in options
  ]
  if missing:
    raise TypeError(f"memory {name!r} needs the option(s) {missing}")
  _check_types(name, cls, options)
  return cls(**options)


def _check_types(name, cls, options) -> None:
  hints = typing.get_type_hints(cls)
  for option, value in options.items():
    kind = hints.get(option)
    kinds = typing.get_args(kind) or (kind,)
    plain = [k for k in kinds if k in (int, float, bool, str, type(None))]
    if len(plain) != len(kinds):
      continue
    ok = any(
      (k is float and type(value) in (int, float)) or type(value) is k
      for k in plain
    )
    if not ok:
      want = " or ".join(k.__name__ for k in plain)
      raise TypeError(
        f"memory {name!r}: option {option!r} takes {want}, got {value!r}"
      )


def tiny(name: str, **options):
  """The cell `name` in its smallest odd-sized form: what the suites run on."""
  return make(name, **{**describe(name).tiny, **options})


def to_config(cell) -> dict[str, Any]:
  """A cell as plain data: {'cell': name, option: value, …}, nested cells too.

  Raises:
    TypeError: on a cell whose class is not registered.
  """
  name = getattr(type(cell), "name", None)
  if name is None or name not in _ENTRIES:
    raise TypeError(
      f"{type(cell).__name__} is not registered: decorate it with "
      "@memzoo.register(name, ...)"
    )
  config = {"cell": name}
  for field in dataclasses.fields(cell):
    if field.init:
      config[field.name] = _plain(getattr(cell, field.name))
  return config


def _plain(value):
  if dataclasses.is_dataclass(value) and not inspect.isclass(value):
    return to_config(value)
  if isinstance(value, (tuple, list)):
    return [_plain(v) for v in value]
  return value


def from_config(config: dict[str, Any]):
  """The cell that `to_config` described.

  Raises:
    ValueError: where 'cell' is missing or unknown.
  """
  if not isinstance(config, dict) or "cell" not in config:
    raise ValueError(f"no cell config (a dict with the key 'cell'): {config!r}")
  options = {k: _cells(v) for k, v in config.items() if k != "cell"}
  return make(config["cell"], **options)


def _cells(value):
  if isinstance(value, dict) and "cell" in value:
    return from_config(value)
  if isinstance(value, (list, tuple)):
    return tuple(_cells(v) for v in value)
  return value
