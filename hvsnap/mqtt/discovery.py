"""What Home Assistant, and who else reads its form of discovery, is told of the topics that are there; pure.

https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload. It says where states are published and how
they are read, and holds none itself. Off unless ``mqtt.discovery_prefix`` is set.
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hvsnap import __version__
from hvsnap.mqtt.messages import DiskState
from hvsnap.mqtt.topics import Topics


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True)


class Component(_Form):
    """One thing to be shown: a sensor, or one that knows two states. Templates are of the state's JSON."""

    platform: Literal["sensor", "binary_sensor"]
    unique_id: str
    name: str
    state_topic: str
    value_template: str
    device_class: str | None = None
    unit_of_measurement: str | None = None
    state_class: str | None = None


class Device(_Form):
    """What the components belong to."""

    identifiers: list[str]
    name: str
    manufacturer: str = "hvsnap"
    model: str
    sw_version: str = __version__
    via_device: str | None = Field(default=None, description="identifier of the host that a disk is on")


class Origin(_Form):
    """Who says so."""

    name: str = "hvsnap"
    sw_version: str = __version__


class Availability(_Form):
    """When what is shown is to be believed: while the host is online."""

    topic: str
    value_template: str = "{{ value_json.state }}"
    payload_available: str = "online"
    payload_not_available: str = "offline"


class Discovery(_Form):
    """Retained. A host or a disk, and what is to be shown of it; fields that are null are left out of the message."""

    device: Device
    origin: Origin = Origin()
    components: dict[str, Component]
    availability: list[Availability] | None = None

    def to_json(self) -> bytes:
        """Return it as it is published."""
        return self.model_dump_json(exclude_none=True).encode()


def object_id(name: str) -> str:
    """Return a name of the characters that discovery allows; names that differ stay different."""
    plain = re.sub(r"[^a-zA-Z0-9_-]", "_", name)
    return plain if plain == name else f"{plain}_{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def topic(prefix: str, host_id: str, disk: str | None = None) -> str:
    """Return where a host, or a disk of it, is announced."""
    name = f"hvsnap-{object_id(host_id)}" + (f"-{object_id(disk)}" if disk else "")
    return f"{prefix}/device/{name}/config"


def of_host(topics: Topics, host_id: str) -> Discovery:
    """Return how a host is shown: whether its daemon is there."""
    ident = f"hvsnap-{object_id(host_id)}"
    return Discovery(
        device=Device(identifiers=[ident], name=f"hvsnap on {host_id}", model="host"),
        components={
            "online": Component(
                platform="binary_sensor",
                unique_id=f"{ident}-online",
                name="Daemon",
                state_topic=topics.status,
                value_template="{{ 'ON' if value_json.state == 'online' else 'OFF' }}",
                device_class="connectivity",
            )
        },
    )


def of_disk(topics: Topics, state: DiskState) -> Discovery:
    """Return how a disk is shown: whether something is wrong, its last snapshot, how many there are, what they take."""
    host = f"hvsnap-{object_id(state.host)}"
    ident = f"{host}-{object_id(state.disk)}"
    where = topics.disk_state(state.guest, state.disk)

    def sensor(key: str, name: str, template: str, **kind: str) -> Component:
        return Component(
            platform="sensor", unique_id=f"{ident}-{key}", name=name, state_topic=where, value_template=template, **kind
        )  # fmt: skip

    last = "{{ value_json.last_snapshot.created_at if value_json.last_snapshot else None }}"
    return Discovery(
        device=Device(identifiers=[ident], name=f"{state.guest} {state.target}", model="disk", via_device=host),
        availability=[Availability(topic=topics.status)],
        components={
            "problem": Component(
                platform="binary_sensor",
                unique_id=f"{ident}-problem",
                name="Snapshots",
                state_topic=where,
                value_template="{{ 'OFF' if value_json.health == 'ok' else 'ON' }}",
                device_class="problem",
            ),
            "last": sensor("last", "Last snapshot", last, device_class="timestamp"),
            "count": sensor("count", "Number of snapshots", "{{ value_json.snapshots }}", state_class="measurement"),
            "stored": sensor(
                "stored", "Stored", "{{ value_json.stored_bytes }}", device_class="data_size", unit_of_measurement="B"
            ),
        },
    )
