"""What goes over the daemon's Unix socket: requests and answers, shared by the API and the command line.

Every answer is one JSON object. Times are ISO 8601 in UTC (``2026-05-01T12:00:00Z``), sizes are bytes, rates bytes per
second. Requests refuse unknown keys; readers of answers should ignore keys that they do not know.

==================================== ================== ============== ==============================================
endpoint                             request            answer         remarks
==================================== ================== ============== ==============================================
GET  /v1/status                                         Status
GET  /v1/guests                                         GuestList      all guests of the hypervisor and their disks
GET  /v1/snapshots                   ?guest= ?disk=     SnapshotList   newest first; ``state`` one of its states;
                                     ?state= ?limit=                   at most ``limit`` (1000)
GET  /v1/snapshots/{id}                                 Snapshot
POST /v1/snapshots                   SnapshotCreate     SnapshotList   202, at once, in state ``progressing``
POST /v1/snapshots/{id}/cancel                          Snapshot       202; it ends in state ``failed``
POST /v1/snapshots/{id}/edit         SnapshotEdit       Snapshot
POST /v1/snapshots/{id}/lock         SnapshotLock       Snapshot       until a time; never made shorter
POST /v1/snapshots/{id}/serve        SnapshotServe      Served         as a disk, at a Unix socket, for clients of NBD
POST /v1/snapshots/{id}/unserve                         Served
GET  /v1/served                                         ServedList
POST /v1/snapshots/delete            SnapshotDelete     Deletion       all of them or none; with ``dry_run`` the plan
POST /v1/snapshots/verify            SnapshotVerify     Task           202; reads every block again
GET  /v1/policies                                       PolicyList
POST /v1/policies                    PolicyCreate       Policy         201
POST /v1/policies/{policy}/edit      PolicyEdit         Policy         for snapshots made from then on
POST /v1/policies/{policy}/delete                       Policy         as it was
POST /v1/policies/{policy}/apply     PolicyDisks        PolicyApplied
POST /v1/policies/cancel             PolicyDisks        PolicyApplied
GET  /v1/chains                                         ChainList
GET  /v1/chains/{disk}                                  Chain          with its nodes
POST /v1/disks                       DiskCreate         Task           202
POST /v1/disks/{disk}/rollback       Rollback           RollbackAnswer 202 and a ``task``; ``dry_run``: 200, none
POST /v1/disks/{disk}/reinit         Reinit             RollbackAnswer as above, to what the disk was made of
POST /v1/disks/{disk}/edit           DiskEdit           Disk
POST /v1/disks/{disk}/release        DiskRelease        DiskReleased   of a disk that is gone from its guest
GET  /v1/images                                         ImageList
POST /v1/images                      ImageCreate        Image          201
POST /v1/images/{image}/export       ImageExport        Task           202
POST /v1/images/{image}/delete                          Image          as it was
GET  /v1/usage                       ?since= ?until=    Usage          what was stored; ``by`` ``chain`` or ``host``;
                                     ?by= ?points=                     ``points`` (0 to 1000) of each line
GET  /v1/store                                          StoreInfo
POST /v1/store/check                                    Task           202; catalog against store, both ways
POST /v1/store/compact               StoreCompact       Task           202; with ``dry_run`` only the plan
GET  /v1/tasks                                          TaskList       running ones and the last finished ones
GET  /v1/tasks/{id}                                     Task
POST /v1/tasks/{id}/cancel                              Task           202
GET  /v1/doctor                                         DoctorReport
POST /v1/recover                     ?image=            Recovery       finishes or undoes what a crash left open; with
                                                                       ``image`` all about that one, captures at work
                                                                       included, so that its guest may be started
POST /v1/hooks                       HookCall           HookTaken      202; what libvirt's hook sees of guests
GET  /v1/events                      ?guest= ?since=    event stream   see below
GET  /openapi.json                                                     the machine-readable form of this table
==================================== ================== ============== ==============================================

``{disk}`` (and ``disk`` in a query) is a disk id, a target (``vda``) or the path of its image, also ``GUEST/TARGET``;
in a URL its slashes may be percent-encoded or not. A guest is named by its name or UUID. What matches several things is
refused, and the error names them.

Every error has the body :class:`Error` and the HTTP status of its kind: 400 wrong request, 403 not allowed, 404 not
found, 409 refused by a rule, 423 busy, 422 damaged data, 503 the daemon is stopping, 500 and 507 failed.
``exit_status`` is what the command line exits with.

**The event stream** (``text/event-stream``). A stored event has its sequence as ``id:`` and ``event: event``; its data
is :class:`Event`. Progress has ``event: progress``, no id, and :class:`Progress` as data. ``Last-Event-ID`` (or
``?since=SEQUENCE``) resumes after that event; without it the stream starts with what happens next. A comment line
(``: keep-alive``) comes at least every 15 seconds. A reader that falls behind loses progress, never events.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from hvsnap.errors import HvsnapError
from hvsnap.model import Consistency, GuestState, Kind, Method, State

API = "/v1"

Name = Annotated[str, Field(max_length=4096)]
"""Something that names a guest, a disk or a snapshot. What it may be is judged where it is looked up."""


Instant = AwareDatetime
"""A moment, with its time zone."""


class Answer(BaseModel):
    """Base of what the daemon sends.

    Built when it is first used: a command needs two of these models, and all of them take 60 ms.
    """

    model_config = ConfigDict(frozen=True, defer_build=True)


class Request(BaseModel):
    """Base of what the daemon is sent; an unknown key is an error, so that a misspelt one is never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Error(Answer):
    """Why a request did not succeed, in one line, and the next step."""

    code: str = Field(description="stable, machine-readable", examples=["snapshot-unknown"])
    message: str
    hint: str = Field(description="the next step; may be empty")
    exit_status: int = Field(description="what the command line exits with", ge=1, le=7)

    @classmethod
    def of(cls, error: HvsnapError) -> Error:
        """Return the body that tells of ``error``."""
        return cls(code=error.code, message=error.message, hint=error.hint, exit_status=error.exit_status)


# -- guests and disks -----------------------------------------------------------------------------


class Protection(StrEnum):
    """Whether a disk has snapshots, or can have any."""

    PROTECTED = "protected"  # at least one accomplished snapshot
    UNPROTECTED = "unprotected"  # eligible, but none yet
    SKIPPED = "skipped"  # cannot be captured, see skip_reason


class BitmapHealth(StrEnum):
    """Whether the next snapshot can be read by the dirty bitmap."""

    NONE = "none"  # no snapshot yet, or the image cannot hold one
    RECORDING = "recording"  # the bitmap records since the chain's head
    LOST = "lost"  # expected, but missing or inconsistent: the next snapshot re-reads the disk
    UNKNOWN = "unknown"  # the guest is off, or did not answer


class GuestDisk(Answer):
    """One disk of a guest."""

    target: str = Field(examples=["vda"])
    id: str | None = Field(description="disk and chain id (d-…); null before the first snapshot")
    bus: str
    path: str = Field(description="the image that takes the guest's writes while no capture is open")
    format: str
    size_bytes: int | None = Field(description="null if it cannot be learnt")
    system: bool
    protection: Protection
    last_snapshot: str | None = Field(description="id of the newest accomplished snapshot")
    last_snapshot_at: AwareDatetime | None
    snapshots: int = Field(description="accomplished snapshots in the chain")
    policy: str | None
    bitmap: BitmapHealth
    capturing: bool
    skip_reason: str = Field(description="why the disk cannot be captured; empty: it can")


class Guest(Answer):
    """One guest of the hypervisor."""

    name: str
    uuid: str
    state: GuestState
    disks: list[GuestDisk]


class GuestList(Answer):
    """All guests, by name."""

    guests: list[Guest]
    notes: list[str] = Field(default=[], description="which hypervisor or guest could not be looked at, and why")


# -- snapshots ------------------------------------------------------------------------------------


class Impact(Answer):
    """What a guest felt of a capture: its requests to the disk at rest before it, and while it was held and read."""

    rest_iops: float = Field(description="reads and writes a second")
    rest_write_us: float | None = Field(description="mean latency of its writes; null: there were none")
    held_iops: float
    held_write_us: float | None
    slowdown: float = Field(description="how many times as long its requests took as the same ones take at rest")
    rate_low_bytes_s: int | None = Field(description="what the reader was slowed down to for it; null: never")


class Snapshot(Answer):
    """One node of a chain, in any of its states."""

    id: str = Field(examples=["s-mfrggzdfmztw"])
    disk: str
    guest: str = Field(description="name of the guest when it was last seen")
    target: str
    sequence: int = Field(description="place in the chain, from 1")
    parent: str | None
    name: str
    description: str
    tags: dict[str, str]
    kind: Kind
    method: Method
    reason: str = Field(description="why this method; empty: the obvious one")
    consistency: Consistency
    state: State
    error: str = Field(description="why it failed; empty unless failed")
    size_bytes: int
    read_bytes: int
    changed_bytes: int
    stored_bytes: int = Field(description="what the store grew by")
    created_at: AwareDatetime
    accomplished_at: AwareDatetime | None
    group: str | None
    automatic: bool = Field(description="a policy made it")
    encrypted: bool = Field(description="its disk is encrypted: it is kept in encrypted stores only")
    expires_at: AwareDatetime | None = Field(description="null: not by time")
    locked_until: AwareDatetime | None
    impact: Impact | None = Field(description="null: not measured, since the guest was off or did too little to tell")
    progress: int = Field(ge=0, le=100, description="percent")
    done_bytes: int | None = Field(description="what is read of total_bytes; null unless it is being read")
    total_bytes: int | None = Field(description="what is to be read")
    rate_bytes_s: float | None = Field(description="null unless it is being read")
    eta_s: float | None


class SnapshotList(Answer):
    """Snapshots, newest first (of a create: in the order of the disks)."""

    snapshots: list[Snapshot]


class SnapshotCreate(Request):
    """Make a snapshot of each of ``disks`` (none named: of every eligible disk of the guest)."""

    guest: Name
    disks: list[Name] = Field(default=[], max_length=256)
    name: str = Field(default="", max_length=4096, description="empty: one is made from the time")
    description: str = Field(default="", max_length=65536)
    tags: dict[str, str] = Field(default={}, max_length=1024)
    consistency: Consistency = Consistency.AUTO
    group: bool = Field(default=False, description="all disks at the same instant")
    wait: bool = Field(default=False, description="queue behind a running capture instead of being refused")


class SnapshotDelete(Request):
    """Delete snapshots, all of them or none."""

    ids: list[Name] = Field(min_length=1, max_length=4096)
    dry_run: bool = False


class Freed(Answer):
    """What deleting this one alone would free."""

    id: str
    freed_bytes: int


class Deletion(Answer):
    """What was deleted, or with ``dry_run`` would be.

    ``freed_bytes`` is what goes when all of them go: more than the sum, if they share blocks with nobody else.
    """

    dry_run: bool
    snapshots: list[Freed]
    freed_bytes: int


class SnapshotEdit(Request):
    """Change what people call a snapshot; what is left out stays."""

    name: str | None = Field(default=None, max_length=4096)
    description: str | None = Field(default=None, max_length=65536)
    tags: dict[str, str] | None = Field(default=None, max_length=1024)


class SnapshotLock(Request):
    """Lock a snapshot against deletion until a time."""

    until: AwareDatetime


class SnapshotServe(Request):
    """Serve a snapshot as a disk; ``writable``: what clients write is kept aside, and lost when it ends."""

    writable: bool = False


class Served(Answer):
    """A snapshot that clients of NBD can open as a disk."""

    snapshot: str
    guest: str
    target: str
    uri: str = Field(examples=["nbd+unix:///?socket=/run/hvsnap/served/s-mfrggzdfmztw.sock"])
    socket: str
    writable: bool
    size_bytes: int
    since: AwareDatetime


class ServedList(Answer):
    """All snapshots that are served, oldest first."""

    served: list[Served]


# -- policies -------------------------------------------------------------------------------------


class PolicyKeep(BaseModel):
    """How many automatic snapshots stay: the newest, and the last of so many hours, days, weeks, months."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0


class PolicyCreate(Request):
    """Make a policy (SERVICE 5.1). ``keep`` goes with ``retain_days`` null."""

    name: str = Field(max_length=4096)
    hours: list[int] = Field(max_length=256, examples=[[0, 6, 12, 18]])
    weekdays: list[int] = Field(default=[0, 1, 2, 3, 4, 5, 6], max_length=256, description="0 is Monday")
    timezone: str = Field(default="", max_length=256, description="empty: the host's")
    retain_days: int | None = Field(default=30, description="null: forever, or as ``keep`` says")
    keep: PolicyKeep | None = None


class PolicyEdit(Request):
    """Change a policy; what is left out stays."""

    name: str = Field(default="", max_length=4096)
    hours: list[int] = Field(default=[], max_length=256)
    weekdays: list[int] = Field(default=[], max_length=256)
    timezone: str = Field(default="", max_length=256)
    retain_days: int | None = None
    keep: PolicyKeep | None = None


class PolicyDisks(Request):
    """Disks to be put under a policy, or taken out of theirs."""

    disks: list[Name] = Field(min_length=1, max_length=4096)


class PolicyDisk(Answer):
    """A disk under a policy."""

    id: str
    guest: str
    target: str


class Policy(Answer):
    """When automatic snapshots are made, and how long they are kept."""

    id: str = Field(examples=["p-mfrggzdfmztw"])
    name: str
    hours: list[int]
    weekdays: list[int] = Field(description="0 is Monday")
    timezone: str = Field(description="empty: the host's")
    retain_days: int | None
    keep: PolicyKeep
    next_run: AwareDatetime | None = Field(description="null: it has no disk")
    disks: list[PolicyDisk]


class PolicyList(Answer):
    """All policies, by name."""

    policies: list[Policy]


class PolicyApplied(Answer):
    """Disks that have a policy now, or none any more; ``replaced`` has, by disk id, the policy that each had."""

    policy: str | None
    disks: list[PolicyDisk]
    replaced: dict[str, str]


# -- chains ---------------------------------------------------------------------------------------


class ChainSummary(Answer):
    """One chain, without its nodes."""

    disk: str
    guest: str
    target: str
    path: str
    system: bool
    released: bool = Field(description="the disk is gone from its guest")
    head: str | None = Field(description="the snapshot that the disk's present state continues from")
    snapshots: int = Field(description="accomplished ones")
    limit: int = Field(description="how many snapshots the chain may hold")
    size_bytes: int
    logical_bytes: int = Field(description="what all its snapshots restore to, together")
    stored_bytes: int = Field(description="what the store holds for them; blocks shared within the chain count once")
    exclusive_bytes: int = Field(description="sum over the snapshots of what only each of them holds")


class ChainNode(Answer):
    """One snapshot in its chain."""

    snapshot: Snapshot
    exclusive_bytes: int = Field(description="stored bytes that only this snapshot refers to")
    head: bool


class Chain(ChainSummary):
    """One chain with its nodes, oldest first."""

    nodes: list[ChainNode]


class ChainList(Answer):
    """All chains."""

    chains: list[ChainSummary]


# -- tasks, restores ------------------------------------------------------------------------------


class Attach(Request):
    """Where a new disk is to be attached, through libvirt."""

    guest: Name
    target: str = Field(max_length=64, examples=["vdb"])


class DiskCreate(Request):
    """Make a new disk of a snapshot or image."""

    snapshot: Name = Field(description="id of a snapshot, or id or name of an image")
    path: Name = Field(description="absolute; with ``pool`` the name of the new volume")
    format: Literal["qcow2", "raw"] = "qcow2"
    force: bool = Field(default=False, description="write over a file that is there, or a block device")
    pool: str = Field(default="", max_length=4096, description="libvirt's storage pool that gets the new volume")
    attach: Attach | None = None
    instant: bool = Field(default=False, description="it can be used when the answer comes; the task fills it")


class Reinit(Request):
    """Bring a disk back to the snapshot or image that it was made of (SERVICE 7.3)."""

    stop: bool = Field(default=False, description="shut the guest down gracefully first")
    start: bool = Field(default=False, description="start the guest afterwards")
    safety_snapshot: bool = Field(default=True, description="make a snapshot of the present state first")
    dry_run: bool = False


class DiskEdit(Request):
    """Change what holds for a disk; what is left out stays."""

    delete_auto_with_disk: bool | None = Field(default=None, description="its release deletes its automatic snapshots")
    encrypted: bool | None = Field(default=None, description="it is never stored in plain")


class DiskRelease(Request):
    """Forget a disk that is gone from its guest (SERVICE 5.6)."""

    dry_run: bool = False


class Disk(Answer):
    """A disk that hvsnap knows."""

    id: str = Field(examples=["d-mfrggzdfmztw"])
    guest: str
    guest_uuid: str
    target: str
    path: str
    format: str
    size_bytes: int
    system: bool
    released: bool = Field(description="it is forgotten; its snapshots that are left can make new disks")
    gone_since: AwareDatetime | None = Field(description="when it was first seen to be gone from its guest")
    policy: str | None = Field(description="its name")
    delete_auto_with_disk: bool
    encrypted: bool
    origin: str | None = Field(description="the snapshot or image that hvsnap made it of")


class DiskReleased(Answer):
    """A disk that was released, or with ``dry_run`` would be."""

    dry_run: bool
    disk: Disk
    deleted: list[str] = Field(description="its automatic snapshots that go with it")
    freed_bytes: int
    kept: int = Field(description="snapshots that stay")


class ImageCreate(Request):
    """Promote a snapshot of a system disk to an image (SERVICE 7.4)."""

    snapshot: Name
    name: str = Field(max_length=4096)
    description: str = Field(default="", max_length=65536)


class ImageExport(Request):
    """Write an image to a new file, a compressed qcow2. ``path`` is absolute, and must not exist."""

    path: Name


class Image(Answer):
    """A snapshot of a system disk that is a template for new disks."""

    id: str = Field(examples=["i-mfrggzdfmztw"])
    name: str
    description: str
    snapshot: str = Field(description="what it is made of; it stays as long as the image is there")
    disk: str = Field(description="of the snapshot")
    guest: str
    target: str
    size_bytes: int
    created_at: AwareDatetime


class ImageList(Answer):
    """All images, by name."""

    images: list[Image]


class Rollback(Request):
    """Set a disk back to one of its snapshots (SERVICE 6)."""

    snapshot: Name
    stop: bool = Field(default=False, description="shut the guest down gracefully first")
    start: bool = Field(default=False, description="start the guest afterwards")
    safety_snapshot: bool = Field(default=True, description="make a snapshot of the present state first")
    dry_run: bool = False


class RollbackPlan(Answer):
    """What a rollback would do, as of now."""

    disk: str
    guest: str
    target: str
    snapshot: str
    path: str
    method: str = Field(description="how the blocks that differ are found")
    write_bytes: int | None = Field(description="at most so much is written; null: known only once the disk is read")
    stop: bool = Field(description="the guest runs and would be shut down")
    safety_snapshot: bool
    start: bool
    notes: list[str] = Field(description="what its user should know, one line each")


class TaskState(StrEnum):
    """Life of a task."""

    RUNNING = "running"
    ACCOMPLISHED = "accomplished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class DiskCreated(Answer):
    """What became of a DiskCreate."""

    kind: Literal["disk-create"] = "disk-create"
    snapshot: str
    made_of: str = Field(description="the snapshot, or the image that it is behind")
    path: str
    format: str
    size_bytes: int
    written_bytes: int
    attached: str | None = Field(description="GUEST/TARGET; null: it was not asked for")
    disk: str | None = Field(description="its id, where it was attached")


class SetBack(Answer):
    """What a rollback or re-initialisation has done."""

    disk: str
    snapshot: str
    written_bytes: int
    safety_snapshot: str | None = Field(description="id of the snapshot of the state that was replaced")
    started: bool
    notes: list[str]


class RolledBack(SetBack):
    """What became of a Rollback."""

    kind: Literal["disk-rollback"] = "disk-rollback"


class Reinitialised(SetBack):
    """What became of a Reinit."""

    kind: Literal["disk-reinit"] = "disk-reinit"
    origin: str = Field(description="the snapshot or image that the disk was made of")


class ImageExported(Answer):
    """What became of an ImageExport."""

    kind: Literal["image-export"] = "image-export"
    image: str
    snapshot: str
    path: str
    size_bytes: int = Field(description="of the disk that it holds")
    written_bytes: int
    file_bytes: int = Field(description="size of the file")


class AffectedSnapshot(Answer):
    """A snapshot that does not restore, as long as some of its blocks are damaged or missing."""

    id: str
    disk: str
    guest: str
    target: str
    name: str
    blocks: int = Field(description="how many of its blocks are")


class DamagedBlock(Answer):
    """A stored block that is not what was stored."""

    block: int
    detail: str


class SnapshotsVerified(Answer):
    """What became of a SnapshotVerify. All is well if ``damaged`` and ``affected`` are empty."""

    kind: Literal["snapshot-verify"] = "snapshot-verify"
    snapshots: int = Field(description="that were verified")
    packs: int
    blocks: int
    read_bytes: int
    damaged_blocks: int
    damaged: list[DamagedBlock] = Field(description="at most 1000 of them")
    healed_blocks: int = Field(description="that were damaged when they were last read, and are whole now")
    rewritten: list[str] = Field(description="manifests and indexes of packs that were damaged, and are written anew")
    affected: list[AffectedSnapshot]


class StoreDifference(Answer):
    """One thing on which catalog and store do not agree."""

    kind: str = Field(examples=["pack-missing"])
    subject: str = Field(description="pack, manifest, snapshot or block")
    detail: str
    harmless: bool = Field(description="no snapshot is the worse for it; the next compaction puts it right")


class StoreChecked(Answer):
    """What became of a check. ``sound``: nothing is wrong that a snapshot suffers from."""

    kind: Literal["store-check"] = "store-check"
    sound: bool
    packs: int
    manifests: int
    blocks: int
    difference_count: int
    differences: list[StoreDifference] = Field(description="at most 1000 of them")
    affected: list[AffectedSnapshot]


class StoreRebuilt(Answer):
    """The catalog that was made from the store alone."""

    disks: int
    snapshots: int
    images: int = 0
    packs: int
    blocks: int
    damaged_blocks: int
    damaged: list[str] = Field(description="packs and manifests that could not be used, and why")
    lost: list[str] = Field(description="snapshots whose manifest, or one that they build on, cannot be read")
    affected: list[AffectedSnapshot]
    kept: str = Field(description="where the catalog that was there before is kept; empty if there was none")


class StoreRekeyed(Answer):
    """The key of an encrypted store was changed."""

    key_file: str = Field(description="the only one that opens it now")


class PackFate(Answer):
    """What becomes of one pack."""

    pack: str
    fate: str = Field(description="punch, rewrite or delete")
    size_bytes: int
    live_bytes: int


class StoreCompacted(Answer):
    """What a compaction did, or with ``dry_run`` would do."""

    kind: Literal["store-compact"] = "store-compact"
    dry_run: bool
    dropped_blocks: int = Field(description="to which no snapshot refers any more")
    freed_bytes: int = Field(description="their stored bytes")
    deleted_packs: int
    punched_packs: int = Field(description="the space of their dead blocks was given back to the file system")
    rewritten_packs: int = Field(description="their live blocks were moved to others")
    orphans: int = Field(description="packs that an interruption had left, and nothing knew")
    manifests: int = Field(description="written anew or removed")
    packs: list[PackFate] = Field(description="with dry_run: what becomes of packs that do not stay as they are")


TaskResult = (
    DiskCreated | RolledBack | Reinitialised | ImageExported | SnapshotsVerified | StoreChecked | StoreCompacted
)
"""What work returns, by its kind."""


class Task(Answer):
    """Long work that goes on in the daemon, whoever asked for it."""

    id: str = Field(examples=["t-mfrggzdfmztw"])
    kind: str = Field(examples=["disk-create", "disk-rollback", "disk-reinit", "image-export", "snapshot-verify"])
    subject: str = Field(description="what it works on, for people")
    state: TaskState
    step: str = Field(description="what it is doing now, for people")
    progress: int = Field(ge=0, le=100, description="percent")
    done_bytes: int
    total_bytes: int
    rate_bytes_s: float | None
    eta_s: float | None
    created_at: AwareDatetime
    finished_at: AwareDatetime | None
    error: Error | None
    result: Annotated[TaskResult, Field(discriminator="kind")] | None


class TaskList(Answer):
    """Tasks, newest first."""

    tasks: list[Task]


class RollbackAnswer(Answer):
    """``plan`` always; ``task`` unless it was a dry run."""

    plan: RollbackPlan
    task: Task | None


# -- the store ------------------------------------------------------------------------------------


class SnapshotVerify(Request):
    """Read every block of these snapshots again, or of all that is stored."""

    ids: list[Name] = Field(default=[], max_length=4096)
    all: bool = False


class UsagePoint(Answer):
    """The average of a part of the interval, which begins here."""

    at: AwareDatetime
    bytes: int


class UsageLine(Answer):
    """What was stored of one chain, or of all, in an interval."""

    subject: str = Field(description="disk and chain id, or ``host``", examples=["d-mfrggzdfmztw"])
    guest: str | None
    target: str | None
    last_bytes: int = Field(description="at the end of the interval")
    mean_bytes: int
    peak_bytes: int
    gib_hours: float
    billable_gib_hours: float = Field(description="beyond what is prepaid; a chain's is its share of the host's")
    cost: float | None = Field(description="an estimate; null without a price")
    points: list[UsagePoint] = Field(description="for a plot; empty unless asked for")


class Usage(Answer):
    """What was stored in an interval, from samples (SERVICE 9.2, 9.3).

    Chains share blocks: their lines come to more than ``total``, which counts each block once. What they cost is shared
    in proportion.
    """

    since: AwareDatetime
    until: AwareDatetime
    known_since: AwareDatetime | None = Field(description="the first sample; what was before counts as nothing")
    by: Literal["chain", "host"]
    estimate: Literal[True] = Field(default=True, description="what it costs is an estimate, not a bill")
    currency: str
    price_per_gib_month: float | None
    prepaid_gib: float
    lines: list[UsageLine]
    total: UsageLine = Field(description="of the host")
    days_to_full: float | None = Field(description="of the store's device, at the pace of the last week; null: unknown")


class StoreCompact(Request):
    """Free what no snapshot refers to."""

    dry_run: bool = False


class StoreInfo(Answer):
    """The store at a glance."""

    url: str
    repository: str = Field(description="the repository's id")
    block_size: int
    packs: int
    size_bytes: int = Field(description="of all packs; holes that were given back to the file system count, too")
    live_bytes: int = Field(description="stored bytes of the blocks that are kept")
    live_blocks: int
    snapshots: int
    free_bytes: int | None = Field(description="of the store's device; null for a bucket")
    total_bytes: int | None
    sweeping: bool
    swept_at: AwareDatetime | None = Field(description="when the daemon last freed space, since it started")
    damaged_blocks: int = Field(description="known ones")
    affected: list[AffectedSnapshot]
    unverified_packs: int = Field(description="never read again since they were written")
    verified_since: AwareDatetime | None = Field(description="every other pack was verified since; null if none was")


# -- the daemon itself ----------------------------------------------------------------------------


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Finding(Answer):
    """One thing that the doctor looked at."""

    severity: Severity
    check: str = Field(description="stable name of the check", examples=["kvm"])
    what: str
    evidence: str = Field(description="what was seen")
    remedy: str = Field(description="what to do about it; empty if nothing")


class DoctorReport(Answer):
    """All findings, in a fixed order; ``worst`` is the worst severity among them."""

    worst: Severity
    findings: list[Finding]


class RecoveredOperation(Answer):
    """One open operation of the journal, and what became of it."""

    id: str
    kind: str
    guest: str
    step: str = Field(description="where the crash had left it")
    outcome: Literal["finished", "undone", "still-open"]
    detail: str


class Recovery(Answer):
    """What a recovery found and did. Empty: nothing was open."""

    operations: list[RecoveredOperation]


class HookReport(Answer):
    """libvirt's hook as it is installed."""

    installed: bool
    script: str
    state_dir: str
    socket: str
    others: list[str] = Field(description="hooks of others for guests, which libvirt runs, too")
    restart_libvirtd: bool = Field(description="it was started when there was no hook for guests, and so runs none")
    barred: list[str] = Field(description="UUIDs of guests that may not start, or only from their overlay")
    problems: list[str]


class InstalledFile(Answer):
    """One file of the service. ``keep``: it is there already, and as it should be, or its owner's."""

    path: str
    action: Literal["create", "update", "keep"]


class Installed(Answer):
    """What was put in place, or with ``dry_run`` would be."""

    dry_run: bool
    files: list[InstalledFile]
    next: list[str] = Field(description="commands that are left to be run")


class MqttStatus(Answer):
    """The publisher of events."""

    configured: bool
    connected: bool
    pending: int = Field(description="events that the broker has not acknowledged yet")
    error: str = Field(description="why it is not connected; empty if it is, or has not been tried")


class Status(Answer):
    """The daemon at a glance."""

    version: str
    host_id: str
    started_at: AwareDatetime
    uptime_s: float
    stopping: bool
    guests: int | None = Field(description="null: the hypervisor does not answer")
    disks: int = Field(description="disks that have a chain")
    snapshots: int = Field(description="accomplished ones")
    captures: int = Field(description="disks being captured")
    tasks: int = Field(description="running ones")
    open_operations: int = Field(description="entries of the journal")
    stored_bytes: int = Field(default=0, description="what the store keeps")
    days_to_full: float | None = Field(
        default=None, description="of the store's device, at the pace of the last week; null: it is not to be told"
    )
    mqtt: MqttStatus


class HookCall(Request):
    """What libvirt's hook was called with. ``id`` is one for each call, on whichever way it comes."""

    id: str = Field(min_length=1, max_length=64)
    at: float = Field(ge=0, le=1e12, description="seconds since the epoch, UTC")
    guest: str = Field(max_length=1024)
    operation: str = Field(max_length=1024, examples=["prepare", "started", "stopped"])
    suboperation: str = Field(default="", max_length=1024)
    extra: str = Field(default="", max_length=1024)
    refused: bool = Field(default=False, description="the guest was kept from starting")
    xml: str = Field(default="", description="the guest's definition")
    truncated: bool = Field(default=False, description="the definition was too large, and is cut off")


class HookTaken(Answer):
    """The call was taken."""

    known: bool = Field(description="it had come before")


class Event(Answer):
    """One thing that happened (SERVICE 10). ``id`` is unique for ever; ``sequence`` orders a host's events."""

    sequence: int
    id: str
    type: str = Field(examples=["snapshot.accomplished"])
    at: AwareDatetime
    payload: dict[str, object]


class Progress(Answer):
    """How far a snapshot or task is."""

    id: str = Field(description="of the snapshot or task")
    progress: int = Field(ge=0, le=100, description="percent")
    done_bytes: int
    total_bytes: int
    rate_bytes_s: float
    eta_s: float | None


def build() -> None:
    """Build all models now: for the daemon, whose first answer should not wait for it."""
    waiting: list[type[BaseModel]] = [Answer, Request]
    while waiting:
        model = waiting.pop()
        # What FastAPI derives from a model would be deferred, too, and built outside of its filter of warnings.
        model.model_config["defer_build"] = False
        model.model_rebuild()
        waiting += model.__subclasses__()
