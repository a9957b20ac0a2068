"""What is published: the form of every message, version 1. JSON Schemas and docs/asyncapi.json are made from these.

Within a version fields are only ever added; readers should ignore those that they do not know. Times are ISO 8601 in
UTC, sizes bytes, rates bytes per second.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from hvsnap.alarm import Level
from hvsnap.happenings import EventType
from hvsnap.model import Consistency, Kind
from hvsnap.mqtt.payloads import (
    DaemonPayload,
    DiskPayload,
    DrillPayload,
    GuestFailedPayload,
    GuestPayload,
    ImagePayload,
    IncompletePayload,
    NewDiskFailedPayload,
    NewDiskPayload,
    PolicyFailedPayload,
    PolicyMissedPayload,
    PolicyRunPayload,
    RollbackFailedPayload,
    RollbackPayload,
    SnapshotPayload,
    SpacePayload,
    UnusualPayload,
    VerificationPayload,
)

VERSION: Literal[1] = 1


class Message(BaseModel):
    """What all messages have."""

    model_config = ConfigDict(frozen=True, json_schema_serialization_defaults_required=True)

    version: Literal[1] = Field(default=VERSION, description="of the message's form")
    host: str = Field(description="host_id of the configuration, unescaped", examples=["kvm1"])

    def to_json(self) -> bytes:
        """Return it as it is published."""
        return self.model_dump_json().encode()


# -- the host -------------------------------------------------------------------------------------


class Presence(StrEnum):
    """Whether the host's daemon is there."""

    ONLINE = "online"
    OFFLINE = "offline"


class Absence(StrEnum):
    """Why a host is offline."""

    STOPPED = "stopped"  # the daemon ended in good order
    LOST = "lost"  # the broker has lost the connection: a crash, or the network


class HostStatus(Message):
    """Retained. Published again every minute while the host is online, so an old ``at`` is a sign of trouble, too."""

    state: Presence
    reason: Absence | None = Field(description="why it is offline; null if it is not")
    at: AwareDatetime | None = Field(description="null if the broker published it in the host's place")
    hvsnap: str = Field(description="version of the software", examples=["0.1.0"])


# -- progress -------------------------------------------------------------------------------------


class ProgressReport(Message):
    """How far a capture or a task is; outdated by the next one, at most one a second."""

    at: AwareDatetime
    id: str = Field(description="of the snapshot (s-…) or task (t-…)", examples=["s-mfrggzdfmztw"])
    disk: str | None = Field(description="null for a task")
    guest: str | None = Field(description="name; null for a task")
    guest_uuid: str | None = Field(description="null for a task")
    target: str | None = Field(description="null for a task", examples=["vda"])
    progress: int = Field(ge=0, le=100, description="percent of the bytes; what is done is told by an event alone")
    done_bytes: int = Field(ge=0)
    total_bytes: int = Field(ge=0)
    rate_bytes_s: float = Field(ge=0)
    eta_s: float | None = Field(description="null until there is a rate to tell it by")


# -- the state of a disk --------------------------------------------------------------------------


class Health(StrEnum):
    """What the chain says of a disk."""

    OK = "ok"  # its last snapshot succeeded
    FAILED = "failed"  # the last attempt failed
    UNPROTECTED = "unprotected"  # it has no snapshot
    UNUSUAL = "unusual"  # its last snapshot succeeded, and an alarm is open: see `alarm`


class LastSnapshot(BaseModel):
    """The newest accomplished snapshot."""

    id: str
    name: str
    created_at: AwareDatetime = Field(description="the instant that it holds")
    accomplished_at: AwareDatetime | None
    kind: Kind
    consistency: Consistency
    size_bytes: int
    changed_bytes: int
    stored_bytes: int = Field(description="what the store grew by")


class LastFailure(BaseModel):
    """The newest attempt, if it failed."""

    id: str
    at: AwareDatetime = Field(description="when it was begun")
    error: str


class OpenAlarm(BaseModel):
    """The newest alarm that nobody has acknowledged."""

    snapshot: str = Field(description="the unusual one")
    at: AwareDatetime = Field(description="the instant that it holds")
    level: Level


class DiskState(Message):
    """Retained. A disk that has a chain, as the catalog knows it; published when it changes and at each connection."""

    at: AwareDatetime
    guest: str = Field(description="name, unescaped")
    guest_uuid: str
    disk: str = Field(description="id of the disk and its chain", examples=["d-mfrggzdfmztw"])
    target: str = Field(examples=["vda"])
    system: bool = Field(description="the guest boots from it")
    size_bytes: int
    health: Health
    snapshots: int = Field(ge=0, description="accomplished snapshots in the chain")
    stored_bytes: int | None = Field(
        description="what the store holds for the chain, blocks that its snapshots share counted once; null: unknown"
    )
    last_snapshot: LastSnapshot | None
    last_failure: LastFailure | None = Field(description="null unless the newest attempt failed")
    alarm: OpenAlarm | None = Field(default=None, description="null unless a snapshot is unusual")


# -- events ---------------------------------------------------------------------------------------


class EventMessage(Message):
    """What all events have. ``sequence`` rises by one from event to event of a host; ``id`` is unique for ever."""

    sequence: int = Field(ge=1, description="order of the host's events; one that was seen already is a repetition")
    id: str = Field(description="key for deduplication", examples=["3c9d5ae4f5a94a5d8e8f5c2f6f1c1e0b"])
    at: AwareDatetime


class SnapshotEvent(EventMessage):
    """A snapshot was begun, is accomplished, has failed; was deleted, came to its end, or made room for another.

    Acknowledged: somebody has said that what was unusual about it is all right.
    """

    type: Literal[
        EventType.SNAPSHOT_CREATED,
        EventType.SNAPSHOT_ACCOMPLISHED,
        EventType.SNAPSHOT_FAILED,
        EventType.SNAPSHOT_DELETED,
        EventType.SNAPSHOT_EXPIRED,
        EventType.SNAPSHOT_EVICTED,
        EventType.SNAPSHOT_ACKNOWLEDGED,
    ]
    payload: SnapshotPayload


class SnapshotUnusualEvent(EventMessage):
    """A snapshot is accomplished, and its disk has changed up to it as it never does."""

    type: Literal[EventType.SNAPSHOT_UNUSUAL]
    payload: UnusualPayload


class PolicyRunEvent(EventMessage):
    """A policy has begun a snapshot of a disk."""

    type: Literal[EventType.POLICY_RUN]
    payload: PolicyRunPayload


class PolicyMissedEvent(EventMessage):
    """Hours of a policy passed without a run: the daemon was down, or the clock was changed."""

    type: Literal[EventType.POLICY_MISSED]
    payload: PolicyMissedPayload


class PolicyFailedEvent(EventMessage):
    """A policy could not make a snapshot of a disk."""

    type: Literal[EventType.POLICY_FAILED]
    payload: PolicyFailedPayload


class NewDiskEvent(EventMessage):
    """A new disk was made of a snapshot; an instant one is filled, and needs the snapshot no more."""

    type: Literal[EventType.DISK_CREATED, EventType.DISK_FILLED]
    payload: NewDiskPayload


class NewDiskFailedEvent(EventMessage):
    """A new disk could not be made, and nothing is left of it; or it is whole, and could not be attached."""

    type: Literal[EventType.DISK_CREATE_FAILED, EventType.DISK_ATTACH_FAILED]
    payload: NewDiskFailedPayload


class ImageEvent(EventMessage):
    """A snapshot of a system disk was promoted to an image, or such an image was deleted."""

    type: Literal[EventType.IMAGE_CREATED, EventType.IMAGE_DELETED]
    payload: ImagePayload


class RollbackEvent(EventMessage):
    """A rollback writes from now on, or has finished."""

    type: Literal[EventType.ROLLBACK_STARTED, EventType.ROLLBACK_FINISHED]
    payload: RollbackPayload


class RollbackFailedEvent(EventMessage):
    """A rollback was interrupted."""

    type: Literal[EventType.ROLLBACK_FAILED]
    payload: RollbackFailedPayload


class DiskEvent(EventMessage):
    """A disk is known from now on, or is back; is gone from its guest; is released, and forgotten."""

    type: Literal[EventType.DISK_ATTACHED, EventType.DISK_DETACHED, EventType.DISK_RELEASED]
    payload: DiskPayload


class GuestEvent(EventMessage):
    """A guest is there, or is there no more; was started, as nothing keeps it from that any more."""

    type: Literal[EventType.GUEST_ATTACHED, EventType.GUEST_LOST, EventType.GUEST_STARTED]
    payload: GuestPayload


class GuestStartFailedEvent(EventMessage):
    """A guest that had been kept from starting could not be started afterwards."""

    type: Literal[EventType.GUEST_START_FAILED]
    payload: GuestFailedPayload


class VerificationEvent(EventMessage):
    """A verification has found damage that was not known before."""

    type: Literal[EventType.VERIFICATION_FAILED]
    payload: VerificationPayload


class DrillEvent(EventMessage):
    """A restore drill has passed, or has not."""

    type: Literal[EventType.DRILL_PASSED, EventType.DRILL_FAILED]
    payload: DrillPayload


class StoreIncompleteEvent(EventMessage):
    """The store is older than the catalog, or lacks something."""

    type: Literal[EventType.STORE_INCOMPLETE]
    payload: IncompletePayload


class StoreNearlyFullEvent(EventMessage):
    """The store's device is nearly full."""

    type: Literal[EventType.STORE_NEARLY_FULL]
    payload: SpacePayload


class DaemonEvent(EventMessage):
    """The daemon is at work, or ends."""

    type: Literal[EventType.DAEMON_ONLINE, EventType.DAEMON_OFFLINE]
    payload: DaemonPayload


AnyEvent = Annotated[
    SnapshotEvent
    | SnapshotUnusualEvent
    | PolicyRunEvent
    | PolicyMissedEvent
    | PolicyFailedEvent
    | NewDiskEvent
    | NewDiskFailedEvent
    | ImageEvent
    | RollbackEvent
    | RollbackFailedEvent
    | DiskEvent
    | GuestEvent
    | GuestStartFailedEvent
    | VerificationEvent
    | DrillEvent
    | StoreIncompleteEvent
    | StoreNearlyFullEvent
    | DaemonEvent,
    Field(discriminator="type"),
]
"""Every event that is published."""


class PublishedEvent(EventMessage):
    """An event on its way out: the payload goes as it was stored, also one whose type is not listed above."""

    type: str
    payload: dict[str, object]
