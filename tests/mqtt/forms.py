"""Holds what was published against the documented forms: channels and schemas of docs/asyncapi.json, docs/schemas/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema

from hvsnap.mqtt.asyncapi import MESSAGES

DOCS = Path(__file__).parents[2] / "docs"
ASYNCAPI = json.loads((DOCS / "asyncapi.json").read_text())


def _pattern(address: str) -> re.Pattern[str]:
    """Return what matches the topics of a channel: the prefix may have several levels, other parameters have one."""
    text = re.escape(address).replace(r"\{prefix\}", ".+")
    return re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", text))


_CHANNELS = [
    (_pattern(channel["address"]), next(iter(channel["messages"]))) for channel in ASYNCAPI["channels"].values()
]
_FORMATS = jsonschema.FormatChecker()


def kind_of(topic: str) -> str:
    """Return the kind of message that the document promises on a topic."""
    (kind,) = {kind for pattern, kind in _CHANNELS if pattern.fullmatch(topic)}
    return kind


def check(topic: str, payload: bytes) -> dict[str, Any]:
    """Return a message that is as documented: by the AsyncAPI document, by the JSON Schema, and without other keys."""
    kind = kind_of(topic)
    message: dict[str, Any] = json.loads(payload)
    reference = ASYNCAPI["components"]["messages"][kind]["payload"]
    jsonschema.Draft202012Validator({**ASYNCAPI, **reference}, format_checker=_FORMATS).validate(message)
    form = json.loads((DOCS / "schemas" / f"mqtt-{kind}.json").read_text())
    jsonschema.Draft202012Validator(form, format_checker=_FORMATS).validate(message)
    adapter, _title = MESSAGES[kind]
    again = json.loads(adapter.dump_json(adapter.validate_json(payload), exclude_unset=True))
    assert again == message, "keys that are not documented"
    return message
