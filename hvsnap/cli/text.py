"""Text that came from elsewhere, on its way to a terminal."""

from __future__ import annotations

import unicodedata


def safe(text: str) -> str:
    """Return text without anything that a terminal would obey: controls, escapes, marks that turn the direction."""
    return "".join(c if unicodedata.category(c)[0] != "C" else f"\\x{ord(c):02x}" for c in text)


def one_line(text: str) -> str:
    """Return text on one line, safe for a terminal."""
    return safe(" ".join(text.split()))
