"""Fenced blocks of documents, and what the comment before each says of it.

An HTML comment, which readers do not see, stands right before a fence:

``<!-- run -->``               it is run: a transcript (``console``) or a script (``sh``); ``any status`` may follow
``<!-- run after: … -->``      the same, after hidden lines (:mod:`tests.documents.stage`), one a line
``<!-- run by: tests/….py -->``  a test of its own reads the page and runs it
``<!-- not run: why -->``      it cannot be run by a test, or is nothing that could be run
``<!-- a/topic -->``           (JSON) what a broker has at this topic

What is checked by itself needs none: ``toml`` is a configuration, ``ini`` a unit of systemd, ``mosquitto`` and
``mosquitto-acl`` are a broker's.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", ROOT / "vagrant" / "README.md", *sorted(DOCS.rglob("*.md"))]

CHECKED_BY_KIND = frozenset({"toml", "ini", "mosquitto", "mosquitto-acl"})
_FENCE = re.compile(
    r"(?:^[ ]*<!--\s(?P<mark>(?:(?!-->).)*?)\s-->\n)?"
    r"^(?P<indent>[ ]*)```(?P<kind>[\w-]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    path: Path
    line: int
    kind: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it is run from its page, in the page's order."""
        return re.match(r"run($|:| after:)(?! by)", self.mark) is not None

    @property
    def any_status(self) -> bool:
        """Whether it may fail."""
        return "any status" in self.mark.partition("\n")[0]

    @property
    def before(self) -> list[str]:
        """The hidden lines that are run before it."""
        return [line.strip() for line in self.mark.partition("after:")[2].splitlines() if line.strip()]

    @cached_property
    def reader(self) -> Path | None:
        """The test that runs it by itself, if there is one."""
        found = re.match(r"run by: (\S+)", self.mark)
        return ROOT / found[1] if found else None

    @property
    def topic(self) -> str:
        """The topic that a message is published at."""
        return self.mark if self.kind == "json" and re.fullmatch(r"[^\s:]+/\S+", self.mark) else ""

    @property
    def accounted(self) -> bool:
        """Whether it is run, checked for what it is, or says why neither can be done."""
        why = re.match(r"not run: \S.{5,}", self.mark, re.DOTALL)
        return bool(self.runs or self.reader or self.topic or why or self.kind in CHECKED_BY_KIND)


def blocks(path: Path) -> Iterator[Block]:
    """Yield the blocks of a document."""
    text = path.read_text()
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("kind")) + 1
        body = textwrap.dedent(found["text"]) if found["indent"] else found["text"]
        yield Block(path, line, found["kind"], found["mark"] or "", body)


def fences(path: Path) -> int:
    """Return how many blocks there must be: half of the lines that begin with a fence."""
    return len(re.findall(r"^ *```", path.read_text(), re.MULTILINE)) // 2
