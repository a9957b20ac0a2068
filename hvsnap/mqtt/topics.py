"""Where things are published; pure.

A name becomes one level of a topic by percent-encoding what a level cannot hold or should not: the separator, the
wildcards, the percent sign itself, control characters and non-characters (brokers close the connection on those), and
a leading ``$`` (topics that begin so are the broker's own). ``urllib.parse.unquote`` turns it back.
"""

from __future__ import annotations

import re

_ESCAPED = re.compile(
    "^\\$"
    "|[/+#%]"
    "|[\x00-\x1f\x7f-\x9f]"
    # MQTT 5, 1.5.4: surrogates must not, control characters and non-characters should not occur.
    "|[\ud800-\udfff\ufdd0-\ufdef\ufeff\ufffe\uffff]"
    "|[" + "".join(chr(plane << 16 | low) for plane in range(1, 17) for low in (0xFFFE, 0xFFFF)) + "]"
)


def level(name: str) -> str:
    """Return a name as one level of a topic."""
    return _ESCAPED.sub(_percent, name)


def _percent(found: re.Match[str]) -> str:
    # Surrogates stand for bytes that were no UTF-8 (file names, host names); others cannot be encoded at all.
    try:
        encoded = found[0].encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        encoded = found[0].encode("utf-8", "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in encoded)


class Topics:
    """The topics of one host."""

    def __init__(self, prefix: str, host_id: str) -> None:
        self.root = f"{prefix}/{level(host_id)}"
        self.status = f"{self.root}/status"
        self.event = f"{self.root}/event"

    def progress(self, name: str) -> str:
        """Return where the progress of a snapshot (``s-…``) or task (``t-…``) goes."""
        kind = "task" if name.startswith("t-") else "snapshot"
        return f"{self.root}/{kind}/{level(name)}/progress"

    def disk_state(self, guest: str, disk: str) -> str:
        """Return where the state of a guest's disk goes."""
        return f"{self.root}/guest/{level(guest)}/disk/{level(disk)}/state"
