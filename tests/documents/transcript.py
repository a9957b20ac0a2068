"""A session at a terminal as documents show it, and whether what really came out is the same.

Ids, times, sizes, digests and larger numbers are others each time: an id of the document stands for one real id from
the line on in which it is first shown, and for no other. ``…`` stands for anything. ``0 B`` is nothing else, nor
anything else ``0 B``. How wide a table's columns are does not matter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

INTERRUPT = "^C"
"""What a terminal shows for Ctrl-C; the test then presses it."""

_UNIT = r"(?:B|KiB|MiB|GiB|TiB)"
_TELLING = {
    "id": r"\b[sdgpti]-[a-z2-7]{12}\b",
    "time": r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(?::\d\d)?(?:[,.]\d+)?Z?",
    "automatic": r"(?<=auto_)\d{8}",
    "day": r"\b\d{4}-\d\d-\d\d\b",
    "nothing": rf"(?<![\d.])0 {_UNIT}\b",
    "size": rf"(?<![\d.])\d+(?:\.\d+)? {_UNIT}\b",
    "span": r"\b\d+(?::\d\d)? (?:s|min|h|ms|µs)\b",
    "hex": r"\b(?:[0-9a-f]{2}/)?[0-9a-f]{32,}\b",
    "version": r"\b\d+\.\d+\.\d+[\w.~+-]*",
    "decimal": r"\b\d+\.\d+\b",
    "many": r"\b\d{2,}\b",
    "gap": " +",
    "any": "…",
}
_TOKEN = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _TELLING.items()))
_MEANS = {
    "time": _TELLING["time"],
    "automatic": r"\d{8}",
    "day": r"\d{4}-\d\d-\d\d",
    "nothing": rf"0 {_UNIT}",
    "size": rf"(?!0 )\d+(?:\.\d+)? {_UNIT}",
    "span": r"\d+(?::\d\d)? (?:s|min|h|ms|µs)",
    "hex": r"(?:[0-9a-f]{2}/)?[0-9a-f]{32,}",
    "version": r"\d+\.\d+[\w.~+-]*",
    "decimal": r"\d+(?:\.\d+)?",
    "many": r"\d+",
    "gap": " +",
    "any": ".*?",
}


@dataclass
class Exchange:
    """A command, and the lines that are shown below it."""

    command: str
    shown: list[str] = field(default_factory=list)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ends it."""
        return INTERRUPT in self.shown


def exchanges(text: str) -> list[Exchange]:
    """Return what a block says. Commands begin with ``$``; a backslash at the end of a line goes on in the next."""
    found: list[Exchange] = []
    for line in text.splitlines():
        if found and found[-1].command.endswith("\\"):
            found[-1].command += "\n" + line
        elif line.startswith("$ "):
            found.append(Exchange(line[2:]))
        elif not found:
            raise ValueError(f"output before any command: {line!r}")
        else:
            found[-1].shown.append(line)
    return found


class Ids:
    """Which real id each id of a document stands for."""

    def __init__(self) -> None:
        self._real: dict[str, str] = {}

    def real(self, text: str) -> str:
        """Return a command with the ids that there are. Raises ValueError for one that nothing has shown yet."""

        def one(found: re.Match[str]) -> str:
            if found[0] not in self._real:
                raise ValueError(f"{found[0]} comes from nowhere: no output above shows it")
            return self._real[found[0]]

        return re.sub(_TELLING["id"], one, text)

    def same(self, shown: str, came: str) -> bool:
        """Return whether what came is what is shown, and remember the ids in it."""
        groups: dict[str, str] = {}
        found = re.fullmatch(self._pattern(shown, groups), came, re.DOTALL)
        if found is None:
            return False
        told = {name: found[group] for name, group in groups.items()}
        taken = set(self._real.values())
        if len(set(told.values())) < len(told) or taken & set(told.values()):
            return False
        self._real.update(told)
        return True

    def _pattern(self, shown: str, groups: dict[str, str]) -> str:
        def one(found: re.Match[str]) -> str:
            kind = found.lastgroup or ""
            if kind != "id":
                return _MEANS[kind]
            if (name := found[0]) in self._real:
                return re.escape(self._real[name])
            if name in groups:
                return f"(?P={groups[name]})"
            groups[name] = f"id{len(groups)}"
            return f"(?P<{groups[name]}>{name[0]}-[a-z2-7]{{12}})"

        pattern, end = "", 0
        for found in _TOKEN.finditer(shown):
            pattern += re.escape(shown[end : found.start()]) + one(found)
            end = found.end()
        return pattern + re.escape(shown[end:])
