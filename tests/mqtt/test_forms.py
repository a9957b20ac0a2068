"""The documents that are made from the code, and what they promise of every kind of event."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest

from hvsnap.happenings import EventType, disk_payload, snapshot_payload
from hvsnap.model import GroupId, State
from hvsnap.mqtt import asyncapi
from hvsnap.mqtt.messages import AnyEvent, PublishedEvent
from tests.catalog_kit import a_disk, a_snapshot
from tests.mqtt.forms import DOCS, check

DISK = a_disk()
GUEST = {"guest": DISK.guest_name, "guest_uuid": DISK.guest_uuid}
NEW_DISK = {"snapshot": "s-aaaaaaaaaaaa", "disk": DISK.id, "guest": "web01", "path": "/images/new.qcow2"}
IMAGE = disk_payload(DISK) | {"image": "i-aaaaaaaaaaaa", "name": "debian", "snapshot": "s-aaaaaaaaaaaa"}
ROLLBACK = disk_payload(DISK) | {"snapshot": "s-aaaaaaaaaaaa"}
DAEMON = {"host": "kvm1", "version": "0.1.0"}
SNAPSHOT = snapshot_payload(DISK, a_snapshot(DISK.id, 1, group=GroupId("g-aaaaaaaaaaaa")))
FAILED = snapshot_payload(DISK, a_snapshot(DISK.id, 1, state=State.FAILED, error="no space"))

DRILL = disk_payload(DISK) | {
    "snapshot": "s-aaaaaaaaaaaa",
    "outcome": "passed",
    "written_bytes": 65536,
    "duration_s": 1.5,
    "error": "",
}

PAYLOADS: dict[EventType, dict[str, Any]] = {
    EventType.SNAPSHOT_CREATED: SNAPSHOT,
    EventType.SNAPSHOT_ACCOMPLISHED: SNAPSHOT,
    EventType.SNAPSHOT_FAILED: FAILED,
    EventType.SNAPSHOT_DELETED: SNAPSHOT,
    EventType.SNAPSHOT_EXPIRED: SNAPSHOT,
    EventType.SNAPSHOT_EVICTED: SNAPSHOT,
    EventType.SNAPSHOT_UNUSUAL: SNAPSHOT
    | {
        "level": "severe",
        "faster": True,
        "denser": True,
        "changed_bytes_h": 3e10,
        "usual_bytes_h": 1e9,
        "stored_share": 0.99,
        "usual_share": 0.4,
        "last_good": "s-aaaaaaaaaaaa",
        "held_until": "2026-06-15T02:00:00Z",
    },
    EventType.SNAPSHOT_ACKNOWLEDGED: SNAPSHOT,
    EventType.POLICY_RUN: disk_payload(DISK)
    | {"policy": "nightly", "snapshot": "s-aaaaaaaaaaaa", "name": "auto_20260601_1"},
    EventType.POLICY_MISSED: {"policy": "nightly", "missed": 2, "last": "2026-06-01T02:00:00Z"},
    EventType.POLICY_FAILED: disk_payload(DISK) | {"policy": "nightly", "error": "no space"},
    EventType.DISK_CREATED: NEW_DISK,
    EventType.DISK_FILLED: NEW_DISK,
    EventType.DISK_CREATE_FAILED: NEW_DISK | {"error": "no space"},
    EventType.DISK_ATTACH_FAILED: NEW_DISK | {"error": "there is a vdb already"},
    EventType.IMAGE_CREATED: IMAGE,
    EventType.IMAGE_DELETED: IMAGE,
    EventType.ROLLBACK_STARTED: ROLLBACK,
    EventType.ROLLBACK_FINISHED: ROLLBACK,
    EventType.ROLLBACK_FAILED: ROLLBACK | {"error": "no space"},
    EventType.DISK_ATTACHED: disk_payload(DISK),
    EventType.DISK_DETACHED: disk_payload(DISK),
    EventType.DISK_RELEASED: disk_payload(DISK),
    EventType.GUEST_ATTACHED: GUEST,
    EventType.GUEST_LOST: GUEST,
    EventType.GUEST_STARTED: GUEST,
    EventType.GUEST_START_FAILED: GUEST | {"error": "no network"},
    EventType.VERIFICATION_FAILED: {"snapshots": ["s-aaaaaaaaaaaa"], "blocks": 2, "detail": "its digest is wrong"},
    EventType.DRILL_PASSED: DRILL,
    EventType.DRILL_FAILED: DRILL | {"outcome": "damaged", "written_bytes": 0, "error": "block 7 is damaged"},
    EventType.STORE_INCOMPLETE: {"missing": ["packs/ab/ab"], "count": 1},
    EventType.STORE_NEARLY_FULL: {"free_bytes": 1, "total_bytes": 100, "days_to_full": 2.5},
    EventType.DAEMON_ONLINE: DAEMON,
    EventType.DAEMON_OFFLINE: DAEMON,
}


def test_the_documents_are_up_to_date() -> None:
    for path, text in asyncapi.files().items():
        assert (DOCS / path).read_text() == text, "run: python -m hvsnap.mqtt.asyncapi docs"


def test_every_type_of_event_has_a_form() -> None:
    union, _field = get_args(AnyEvent)
    described = {kind for form in get_args(union) for kind in get_args(form.model_fields["type"].annotation)}
    assert described == set(EventType), "add it to hvsnap/mqtt/messages.py"
    assert set(PAYLOADS) == set(EventType), "add it here"


@pytest.mark.parametrize("kind", EventType)
def test_an_event_of_each_type_is_as_documented(kind: EventType) -> None:
    at = "2026-05-01T12:00:00Z"
    message = PublishedEvent.model_validate(
        {"host": "kvm1", "sequence": 1, "id": "x", "at": at, "type": kind, "payload": PAYLOADS[kind]}
    )
    check("hvsnap/kvm1/event", message.to_json())
    for key in PAYLOADS[kind]:
        less = message.model_copy(update={"payload": {k: v for k, v in message.payload.items() if k != key}})
        with pytest.raises(jsonschema.ValidationError):
            check("hvsnap/kvm1/event", less.to_json())


def test_the_schemas_are_schemas() -> None:
    for kind in asyncapi.MESSAGES:
        jsonschema.Draft202012Validator.check_schema(asyncapi.schema(kind))


def test_references_of_the_document_lead_somewhere() -> None:
    document = asyncapi.document()
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        place: Any = document
        for part in reference.split("/"):
            place = place[part]


def test_examples_of_the_documentation_are_as_documented() -> None:
    text = (DOCS / "mqtt.md").read_text()
    examples = re.findall(r"<!-- (\S+) -->\n+```json\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= 4
    for topic, example in examples:
        check(topic, example.encode())


def test_topics_of_the_documentation_are_those_of_the_code() -> None:
    text = Path(DOCS / "mqtt.md").read_text()
    for topic, _kind, _how in asyncapi.CHANNELS.values():
        assert re.sub(r"\{(\w+)\}", lambda found: found[1].upper(), topic) in text
