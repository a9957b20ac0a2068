"""What a snapshot may be called (SERVICE 2.5): names, descriptions, tags. Pure; raises :class:`BadRequest`.

Text is taken in Unicode's composed form (NFC), so that what looks the same is the same.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime

from hvsnap.errors import BadRequest

NAME_LENGTH_MIN = 2
NAME_LENGTH_MAX = 128
DESCRIPTION_LENGTH_MAX = 256
TAGS_MAX = 20
TAG_KEY_LENGTH_MAX = 128
TAG_VALUE_LENGTH_MAX = 256

_PUNCTUATION = frozenset("._-: ")
_RESERVED = ("auto", "http://", "https://")
_NAME_HINT = (
    f"a name has {NAME_LENGTH_MIN} to {NAME_LENGTH_MAX} characters: first a letter, then letters, digits, "
    "`.` `_` `-` `:` or spaces; it does not start with `auto`, `http://` or `https://`"
)
_TAG_HINT = (
    f"a tag is key=value: a key of 1 to {TAG_KEY_LENGTH_MAX} letters, digits, `.` `_` `-` `:`, "
    f"a value of at most {TAG_VALUE_LENGTH_MAX} characters; at most {TAGS_MAX} tags"
)


def _is_letter(character: str) -> bool:
    return unicodedata.category(character).startswith("L")


def _is_word(character: str) -> bool:
    """Letters of any script with the marks that belong to them (vowel signs, accents), and decimal digits."""
    return unicodedata.category(character)[0] in "LM" or unicodedata.category(character) == "Nd"


def _shown(text: str) -> str:
    """Return a bounded, printable form of a user's text for an error message."""
    return ascii(text if len(text) <= 40 else text[:40] + "...")


def _wrong(text: str, *, lines: bool) -> str | None:
    """Return the first character that is not text (a control or a lone surrogate), if there is one."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and not (lines and character in "\n\t"):
            return character
    return None


def check_name(name: str) -> str:
    """Return a manual snapshot's name in its stored form, or refuse it (SERVICE 2.5)."""
    name = unicodedata.normalize("NFC", name)
    for reserved in _RESERVED:
        if name.startswith(reserved):
            raise BadRequest(f"the name {_shown(name)} starts with {reserved!r}", hint=_NAME_HINT)
    if not NAME_LENGTH_MIN <= len(name) <= NAME_LENGTH_MAX:
        raise BadRequest(f"the name {_shown(name)} has {len(name)} characters", hint=_NAME_HINT)
    if not _is_letter(name[0]):
        raise BadRequest(f"the name {_shown(name)} does not start with a letter", hint=_NAME_HINT)
    for character in name:
        if not _is_word(character) and character not in _PUNCTUATION:
            raise BadRequest(f"the name {_shown(name)} contains {character!a}", hint=_NAME_HINT)
    return name


def default_name(now: float) -> str:
    """Return the name of a manual snapshot whose owner gave none; ``now`` in seconds since the epoch."""
    return datetime.fromtimestamp(now, UTC).strftime("snapshot-%Y-%m-%dT%H:%M:%SZ")


def check_description(description: str) -> str:
    """Return a description in its stored form, or refuse it."""
    description = unicodedata.normalize("NFC", description)
    hint = f"a description has at most {DESCRIPTION_LENGTH_MAX} characters, and no control characters but line breaks"
    if len(description) > DESCRIPTION_LENGTH_MAX:
        raise BadRequest(f"the description has {len(description)} characters", hint=hint)
    wrong = _wrong(description, lines=True)
    if wrong is not None:
        raise BadRequest(f"the description contains {wrong!a}", hint=hint)
    return description


def check_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags in their stored form, or refuse them."""
    if len(tags) > TAGS_MAX:
        raise BadRequest(f"{len(tags)} tags were given", hint=_TAG_HINT)
    checked: dict[str, str] = {}
    for raw_key, raw_value in tags.items():
        key, value = (unicodedata.normalize("NFC", text) for text in (raw_key, raw_value))
        if not 1 <= len(key) <= TAG_KEY_LENGTH_MAX:
            raise BadRequest(f"the tag key {_shown(key)} has {len(key)} characters", hint=_TAG_HINT)
        if any(not _is_word(character) and character not in "._-:" for character in key):
            raise BadRequest(f"the tag key {_shown(key)} contains more than letters, digits and ._-:", hint=_TAG_HINT)
        if len(value) > TAG_VALUE_LENGTH_MAX or _wrong(value, lines=False) is not None:
            raise BadRequest(f"the value of the tag {_shown(key)} is too long, or not text", hint=_TAG_HINT)
        if key in checked:
            raise BadRequest(f"the tag {_shown(key)} was given twice", hint=_TAG_HINT)
        checked[key] = value
    return checked
