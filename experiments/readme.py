"""Writes the generated parts of README.md: the table of memories.

python -m experiments.readme
"""

import pathlib
import re

from absl import app

from memzoo.core import card

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- memories -->\n).*?(\n<!-- /memories -->)", re.S)


def main(argv):
  del argv
  text = README.read_text()
  if not BLOCK.search(text):
    raise app.UsageError("README.md has no <!-- memories --> block")
  README.write_text(BLOCK.sub(lambda m: m[1] + card.table() + m[2], text))


if __name__ == "__main__":
  app.run(main)
