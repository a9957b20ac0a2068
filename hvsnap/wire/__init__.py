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
POST /v1/snapshots/{id}/look         SnapshotServe      event stream   served as long as this answer is being read
POST /v1/snapshots/{id}/unserve                         Served         ends it, whoever looks into it
GET  /v1/served                                         ServedList
POST /v1/snapshots/delete            SnapshotDelete     Deletion       all of them or none; with ``dry_run`` the plan
POST /v1/snapshots/verify            SnapshotVerify     Task           202; reads every block again
POST /v1/snapshots/drill             SnapshotDrill      Task           202; restores for trial, and compares
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

What ``look`` answers is such a stream, too: ``event: served``, with :class:`Served` as data, at once and every 15
seconds, until the snapshot is not served any more. A client that vanishes lets go of its snapshot.
"""

from __future__ import annotations

from hvsnap.wire.base import API, Answer, Error, Instant, Name, Request, build
from hvsnap.wire.chains import Chain, ChainList, ChainNode, ChainSummary
from hvsnap.wire.disks import (
    Attach,
    Disk,
    DiskCreate,
    DiskCreated,
    DiskEdit,
    DiskRelease,
    DiskReleased,
    Reinit,
    Reinitialised,
    Rollback,
    RollbackPlan,
    RolledBack,
    SetBack,
)
from hvsnap.wire.drills import Drill, SnapshotDrill, SnapshotDrilled
from hvsnap.wire.files import (
    FileList,
    FilesCopied,
    FileSkipped,
    FileSystem,
    FileSystemList,
    GuestFile,
)
from hvsnap.wire.guests import BitmapHealth, Guest, GuestDisk, GuestList, Protection
from hvsnap.wire.host import (
    DoctorReport,
    Event,
    Finding,
    HookCall,
    HookReport,
    HookTaken,
    Installed,
    InstalledFile,
    MqttStatus,
    Progress,
    RecoveredOperation,
    Recovery,
    Severity,
    Status,
)
from hvsnap.wire.images import Image, ImageCreate, ImageExport, ImageExported, ImageList
from hvsnap.wire.policies import (
    Policy,
    PolicyApplied,
    PolicyCreate,
    PolicyDisk,
    PolicyDisks,
    PolicyEdit,
    PolicyKeep,
    PolicyList,
)
from hvsnap.wire.snapshots import (
    AffectedSnapshot,
    Alarm,
    DamagedBlock,
    Deletion,
    Freed,
    GuestDisks,
    Impact,
    Served,
    ServedList,
    Snapshot,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotEdit,
    SnapshotList,
    SnapshotLock,
    SnapshotServe,
    SnapshotsVerified,
    SnapshotVerify,
)
from hvsnap.wire.store import (
    PackFate,
    StoreChecked,
    StoreCompact,
    StoreCompacted,
    StoreDifference,
    StoreInfo,
    StoreRebuilt,
    StoreRekeyed,
)
from hvsnap.wire.tasks import RollbackAnswer, Task, TaskList, TaskResult, TaskState, Work
from hvsnap.wire.usage import Usage, UsageLine, UsagePoint

__all__ = [
    "API",
    "AffectedSnapshot",
    "Alarm",
    "Answer",
    "Attach",
    "BitmapHealth",
    "Chain",
    "ChainList",
    "ChainNode",
    "ChainSummary",
    "DamagedBlock",
    "Deletion",
    "Disk",
    "DiskCreate",
    "DiskCreated",
    "DiskEdit",
    "DiskRelease",
    "DiskReleased",
    "DoctorReport",
    "Drill",
    "Error",
    "Event",
    "FileList",
    "FileSkipped",
    "FileSystem",
    "FileSystemList",
    "FilesCopied",
    "Finding",
    "Freed",
    "Guest",
    "GuestDisk",
    "GuestDisks",
    "GuestFile",
    "GuestList",
    "HookCall",
    "HookReport",
    "HookTaken",
    "Image",
    "ImageCreate",
    "ImageExport",
    "ImageExported",
    "ImageList",
    "Impact",
    "Installed",
    "InstalledFile",
    "Instant",
    "MqttStatus",
    "Name",
    "PackFate",
    "Policy",
    "PolicyApplied",
    "PolicyCreate",
    "PolicyDisk",
    "PolicyDisks",
    "PolicyEdit",
    "PolicyKeep",
    "PolicyList",
    "Progress",
    "Protection",
    "RecoveredOperation",
    "Recovery",
    "Reinit",
    "Reinitialised",
    "Request",
    "Rollback",
    "RollbackAnswer",
    "RollbackPlan",
    "RolledBack",
    "Served",
    "ServedList",
    "SetBack",
    "Severity",
    "Snapshot",
    "SnapshotCreate",
    "SnapshotDelete",
    "SnapshotDrill",
    "SnapshotDrilled",
    "SnapshotEdit",
    "SnapshotList",
    "SnapshotLock",
    "SnapshotServe",
    "SnapshotVerify",
    "SnapshotsVerified",
    "Status",
    "StoreChecked",
    "StoreCompact",
    "StoreCompacted",
    "StoreDifference",
    "StoreInfo",
    "StoreRebuilt",
    "StoreRekeyed",
    "Task",
    "TaskList",
    "TaskResult",
    "TaskState",
    "Usage",
    "UsageLine",
    "UsagePoint",
    "Work",
    "build",
]
