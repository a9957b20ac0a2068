"""What is published: the form of every message, version 1. JSON Schemas and docs/asyncapi.json are made from these.

Within a version fields are only ever added; readers should ignore those that they do not know. Times are ISO 8601 in
UTC, sizes bytes, rates bytes per second.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from hvsnap.happenings import EventType
from hvsnap.model import Consistency, Kind, Method, State

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


# -- events ---------------------------------------------------------------------------------------


class GuestPayload(BaseModel):
    """Which guest."""

    guest: str
    guest_uuid: str


class DiskPayload(GuestPayload):
    """Which disk."""

    disk: str
    target: str


class SnapshotPayload(DiskPayload):
    """A snapshot at that moment. Byte counts are final once it is accomplished."""

    snapshot: str
    name: str
    state: State
    kind: Kind
    method: Method
    reason: str = Field(description="why this method; empty: the obvious one")
    consistency: Consistency
    group: str | None
    size_bytes: int
    read_bytes: int
    changed_bytes: int
    stored_bytes: int
    error: str = Field(description="why it failed; empty unless it did")


class NewDiskPayload(BaseModel):
    """A disk made of a snapshot; ``disk`` and ``guest`` are those that the snapshot is of."""

    snapshot: str
    disk: str
    guest: str
    path: str = Field(description="of the new disk")


class NewDiskFailedPayload(NewDiskPayload):
    """What could not be done with a new disk."""

    error: str


class ImagePayload(DiskPayload):
    """An image; the disk is the one that its snapshot is of."""

    image: str
    name: str
    snapshot: str


class RollbackPayload(DiskPayload):
    """A disk that is set back to a snapshot."""

    snapshot: str


class RollbackFailedPayload(RollbackPayload):
    """A rollback that was interrupted: the disk is neither the old nor the new one until it is resumed."""

    error: str


class PolicyRunPayload(DiskPayload):
    """A policy's run on one disk."""

    policy: str = Field(description="its name")
    snapshot: str
    name: str = Field(description="of the snapshot")


class PolicyMissedPayload(BaseModel):
    """Hours that passed without a run."""

    policy: str = Field(description="its name")
    missed: int = Field(ge=1, description="how many")
    last: AwareDatetime = Field(description="the last one of them")


class PolicyFailedPayload(DiskPayload):
    """A policy's run on one disk that did not begin, or did not end well."""

    policy: str = Field(description="its name")
    error: str


class VerificationPayload(BaseModel):
    """What was read again, and is not what was stored."""

    snapshots: list[str] = Field(description="that do not restore as long as that is so; at most 100")
    blocks: int = Field(ge=0, description="damaged ones, of all that were read")
    detail: str = Field(description="the first reason")


class IncompletePayload(BaseModel):
    """What the catalog knows and the store does not hold: a part of it was lost, or an older copy put back."""

    missing: list[str] = Field(description="packs and manifests; at most 100")
    count: int = Field(ge=1)


class SpacePayload(BaseModel):
    """The device of the store."""

    free_bytes: int = Field(ge=0)
    total_bytes: int = Field(ge=0)
    days_to_full: float | None = Field(ge=0, description="at the pace of the last week; null: it is not to be told")


class DaemonPayload(BaseModel):
    """The daemon itself."""

    host: str
    version: str = Field(description="of the software")


class EventMessage(Message):
    """What all events have. ``sequence`` rises by one from event to event of a host; ``id`` is unique for ever."""

    sequence: int = Field(ge=1, description="order of the host's events; one that was seen already is a repetition")
    id: str = Field(description="key for deduplication", examples=["3c9d5ae4f5a94a5d8e8f5c2f6f1c1e0b"])
    at: AwareDatetime


class SnapshotEvent(EventMessage):
    """A snapshot was begun, is accomplished, has failed; was deleted, came to its end, or made room for another."""

    type: Literal[
        EventType.SNAPSHOT_CREATED,
        EventType.SNAPSHOT_ACCOMPLISHED,
        EventType.SNAPSHOT_FAILED,
        EventType.SNAPSHOT_DELETED,
        EventType.SNAPSHOT_EXPIRED,
        EventType.SNAPSHOT_EVICTED,
    ]
    payload: SnapshotPayload


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
    """A guest is there, or is there no more."""

    type: Literal[EventType.GUEST_ATTACHED, EventType.GUEST_LOST]
    payload: GuestPayload


class VerificationEvent(EventMessage):
    """A verification has found damage that was not known before."""

    type: Literal[EventType.VERIFICATION_FAILED]
    payload: VerificationPayload


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
    | VerificationEvent
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
