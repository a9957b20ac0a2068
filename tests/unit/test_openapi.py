"""docs/openapi.json is what the routes say, and whatever they are: typed answers, one form for errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvsnap import wire
from hvsnap.api import openapi

DOCS = Path(__file__).parents[2] / "docs"
DOCUMENT = openapi.document()
STREAMS = {"/v1/events", "/v1/snapshots/{id}/look"}


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, verbs in DOCUMENT["paths"].items():
        for verb, call in verbs.items():
            yield verb.upper(), path, call


def test_the_document_is_up_to_date() -> None:
    for path, text in openapi.files().items():
        assert (DOCS / path).read_text() == text, "run: python -m hvsnap.api.openapi docs"


def test_the_table_of_the_wire_lists_every_call_and_no_other() -> None:
    told = set(re.findall(r"^(GET|POST) +(/v1/\S+)", wire.__doc__ or "", re.MULTILINE))
    assert told == {(verb, path) for verb, path, _call in calls()}


@pytest.mark.parametrize(("verb", "path", "call"), list(calls()), ids=lambda one: one if isinstance(one, str) else "")
def test_every_call_has_typed_answers_and_errors(verb: str, path: str, call: dict[str, Any]) -> None:
    assert verb in ("GET", "POST"), "a caller that may only look is told from others by its verb"
    for status, response in call["responses"].items():
        (form,) = response["content"].values()
        name = form["schema"].get("$ref", "").rpartition("/")[2]
        if status in ("4XX", "5XX"):
            assert name == "Error"
        elif path not in STREAMS:
            assert issubclass(getattr(wire, name), wire.Answer)
    if "requestBody" in call:
        (form,) = call["requestBody"]["content"].values()
        assert issubclass(getattr(wire, form["schema"]["$ref"].rpartition("/")[2]), wire.Request)
