"""The machine-readable form of docs/mqtt.md, made from the messages themselves.

``python -m hvsnap.mqtt.asyncapi docs`` writes ``docs/asyncapi.json`` (AsyncAPI 3.0) and a JSON Schema for each kind of
message below ``docs/schemas/``. A test fails when they are not up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hvsnap.mqtt import discovery
from hvsnap.mqtt.connection import Timings
from hvsnap.mqtt.messages import VERSION, AnyEvent, DiskState, HostStatus, ProgressReport
from hvsnap.mqtt.progress import EXPIRY_S
from hvsnap.mqtt.topics import Topics

MESSAGES: dict[str, tuple[TypeAdapter[Any], str]] = {
    "status": (TypeAdapter(HostStatus), "Whether a host's daemon is there"),
    "event": (TypeAdapter(AnyEvent), "Something happened"),
    "progress": (TypeAdapter(ProgressReport), "How far a capture or task is"),
    "disk-state": (TypeAdapter(DiskState), "What the chain says of a disk"),
    "discovery": (
        TypeAdapter(discovery.Discovery),
        "How a host or a disk is to be shown, for Home Assistant and its like",
    ),
}
"""Kinds of messages: their form, and what they are."""

_TOPICS = Topics("{prefix}", "{host}")

CHANNELS = {
    "status": (_TOPICS.status, "status", {"qos": 1, "retain": True}),
    "event": (_TOPICS.event, "event", {"qos": 1, "retain": False}),
    "snapshotProgress": (
        _TOPICS.progress("{snapshot}"),
        "progress",
        {"qos": 0, "retain": False, "messageExpiryInterval": EXPIRY_S},
    ),
    "taskProgress": (
        _TOPICS.progress("t-").replace("t-", "{task}"),
        "progress",
        {"qos": 0, "retain": False, "messageExpiryInterval": EXPIRY_S},
    ),
    "diskState": (_TOPICS.disk_state("{guest}", "{disk}"), "disk-state", {"qos": 1, "retain": True}),
    "discovery": ("{discovery}/device/{object}/config", "discovery", {"qos": 1, "retain": True}),
}
"""Channels: the topic, the kind of message, how it is published."""

_PARAMETERS = {
    "prefix": {"description": "mqtt.topic_prefix of the configuration", "default": "hvsnap"},
    "host": {"description": "host_id of the configuration, escaped"},
    "guest": {"description": "name of the guest, escaped"},
    "disk": {"description": "id of the disk and its chain, d-…"},
    "snapshot": {"description": "id of the snapshot, s-…"},
    "task": {"description": "id of the task, t-…"},
    "discovery": {"description": "mqtt.discovery_prefix of the configuration; empty: nothing is announced"},
    "object": {"description": "hvsnap-HOST or hvsnap-HOST-DISK, of letters, digits, _ and -"},
}

_BINDING_VERSION = "0.2.0"


def schema(kind: str) -> dict[str, Any]:
    """Return the JSON Schema of one kind of message."""
    adapter, title = MESSAGES[kind]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:hvsnap:mqtt:{kind}:{VERSION}",
        "title": title,
    }
    return head | {
        key: value for key, value in adapter.json_schema(mode="serialization").items() if key not in ("title",)
    }


def document() -> dict[str, Any]:
    """Return the AsyncAPI document."""
    schemas, definitions = TypeAdapter.json_schemas(
        [(kind, "serialization", adapter) for kind, (adapter, _title) in MESSAGES.items()],
        ref_template="#/components/schemas/{model}",
    )
    forms = dict(definitions.get("$defs", {}))
    messages = {}
    for kind, (_adapter, title) in MESSAGES.items():
        payload = schemas[kind, "serialization"]
        if "$ref" not in payload:
            forms[kind] = payload
            payload = {"$ref": f"#/components/schemas/{kind}"}
        messages[kind] = {"name": kind, "title": title, "contentType": "application/json", "payload": payload}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "hvsnap over MQTT",
            "version": str(VERSION),
            "description": "What hvsnap publishes. It subscribes to nothing. docs/mqtt.md explains it.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"plain": _server("mqtt"), "tls": _server("secure-mqtt")},
        "channels": {name: _channel(topic, kind) for name, (topic, kind, _how) in CHANNELS.items()},
        "operations": {
            f"publish{name[0].upper()}{name[1:]}": {
                "action": "send",
                "channel": {"$ref": f"#/channels/{name}"},
                "bindings": {"mqtt": how | {"bindingVersion": _BINDING_VERSION}},
            }
            for name, (_topic, _kind, how) in CHANNELS.items()
        },
        "components": {"messages": messages, "schemas": {name: _plain(form) for name, form in sorted(forms.items())}},
    }


def _server(protocol: str) -> dict[str, Any]:
    return {
        "host": "{broker}",
        "protocol": protocol,
        "protocolVersion": "5",
        "description": "mqtt.url of the configuration; MQTT 3.1.1 where the broker does not know 5",
        "variables": {"broker": {"description": "host and port of the broker"}},
        "bindings": {
            "mqtt": {
                "cleanSession": True,
                "keepAlive": Timings().keepalive_s,
                "lastWill": {"topic": _TOPICS.status, "qos": 1, "retain": True},
                "bindingVersion": _BINDING_VERSION,
            }
        },
    }


def _channel(topic: str, kind: str) -> dict[str, Any]:
    return {
        "address": topic,
        "messages": {kind: {"$ref": f"#/components/messages/{kind}"}},
        "parameters": {name: about for name, about in _PARAMETERS.items() if f"{{{name}}}" in topic},
    }


def _plain(form: Any) -> Any:
    """Return a schema without ``discriminator``: AsyncAPI's is another than that of OpenAPI, which pydantic writes."""
    if isinstance(form, dict):
        return {key: _plain(value) for key, value in form.items() if key != "discriminator"}
    if isinstance(form, list):
        return [_plain(value) for value in form]
    return form


def files() -> dict[str, str]:
    """Return what is written: paths below docs/, and texts."""
    made = {"asyncapi.json": document()} | {f"schemas/mqtt-{kind}.json": schema(kind) for kind in MESSAGES}
    return {path: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for path, content in made.items()}


def main(directory: str) -> None:
    """Write the files below ``directory``."""
    for path, text in files().items():
        target = Path(directory) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
