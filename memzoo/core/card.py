"""What is known of a memory, on one page."""

import importlib.resources
import inspect
import json
import re
from typing import Any

from memzoo.core import cell as cell_lib, registry

# Where a State section goes on from what it is to how it starts.
_START = re.compile(r"[;,.]\s+(?:both |model )?(?:[Ss]tarts?|from|what)\b")
_SECTIONS = ("State", "Params", "Forms", "Differs", "Paper")


def sections(cls: type) -> dict[str, str]:
  """The docstring of a cell by section; the lines before the first is ''.

  Sections open with `Name:` at the margin of the docstring.
  """
  found, current = {"": []}, ""
  for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
    head = re.match(r"(\w+):(\s|$)", line)
    if head and head.group(1) in _SECTIONS:
      current = head.group(1)
      line = line[head.end() :]
      found[current] = []
    found[current].append(line)
  return {k: inspect.cleandoc("\n".join(v)).strip() for k, v in found.items()}


def measured(name: str) -> dict[str, Any]:
  """What the repository has measured of `name` (core/measured.json)."""
  path = importlib.resources.files("memzoo.core") / "measured.json"
  try:
    table = json.loads(path.read_text())
  except FileNotFoundError:
    return {}
  return table.get(name, {})


def card(name: str, **options) -> str:
  """A page of text on the memory `name`.

  Args:
    name: as registered.
    **options: of the cell whose sizes are shown; its tiny form's by default
      with d_model = 64 where nothing is given.

  Raises:
    ValueError: on an unknown name.
  """
  entry = registry.describe(name)
  cell = registry.make(name, **{"d_model": 64, **options})
  parts = sections(entry.cls)
  facts = measured(name)
  tolerance = ", ".join(
    f"{form} {value['forward']:.0e} / {value['gradient']:.0e}"
    for form, value in sorted(facts.get("tolerance", {}).items())
  )
  lines = [
    f"{name} ({entry.family}, {entry.year}): {parts[''].splitlines()[0]}",
    "",
    f"paper      {entry.paper}",
    f"writes by  {entry.write}",
    f"evidence   {entry.evidence}",
    f"parity     {entry.parity or 'none'}",
    f"cell       {cell!r}",
    f"state      {cell_lib.state_size(cell):,} floats, "
    f"{cell_lib.state_bytes(cell):,} bytes",
    f"params     {cell_lib.param_count(cell):,}",
    f"forms      {', '.join(entry.forms)} (main op: {entry.op or 'its own'})",
    f"tolerance  {tolerance or 'not recorded'}",
    "           (largest relative error to the step loop, values / gradients)",
    f"FLOPs      {cell_lib.step_flops(cell):,.0f} a token, as XLA counts step",
    f"hardware   {', '.join(facts.get('hardware', ())) or 'not recorded'}",
    f"differs    {' '.join(parts.get('Differs', '').split())}",
  ]
  return "\n".join(lines)


def table() -> str:
  """The table of memories, in Markdown: what README shows."""
  lines = [
    "| memory | family | year | state | writes by | forms | evidence | paper |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for name in sorted(
    registry.names(), key=lambda n: (registry.describe(n).family, n)
  ):
    entry = registry.describe(name)
    state = sections(entry.cls).get("State", "")
    state = " ".join(_START.split(state)[0].rstrip(".").split())
    forms = ", ".join(entry.forms)
    lines.append(
      f"| `{name}` | {entry.family} | {entry.year} | {state} | {entry.write} "
      f"| {forms} | {entry.evidence} | {entry.paper} |"
    )
  return "\n".join(lines)
