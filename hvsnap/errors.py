"""One tree of errors: what went wrong, why, and what to do next.

Every error that can reach a user is a :class:`HvsnapError`. Its class fixes the machine-readable
``code`` and the exit status of the command line (docs/cli.md, "Exit codes"); the instance carries
one line of ``message`` and a ``hint`` that names the next step. The leaf classes live here, too, so
that one page shows everything that can be refused.
"""

from __future__ import annotations

from typing import ClassVar


class HvsnapError(Exception):
    """Base of all errors that are shown to a user.

    ``code`` is stable and documented; ``exit_status`` is the command line's; ``http_status`` the API's.
    """

    code: ClassVar[str] = "failed"
    exit_status: int = 1  # of an instance only where it carries another process's error
    http_status: ClassVar[int] = 500
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint

    def as_dict(self) -> dict[str, str]:
        """Return ``code``, ``message`` and ``hint``: the form of the API and of ``--json``."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


# -- the seven kinds, one exit status each --------------------------------------------------------


class Failed(HvsnapError):
    """The operation was tried and did not succeed; nothing half is left."""


class BadRequest(HvsnapError):
    """The request itself is wrong, and nothing was touched."""

    code = "bad-request"
    exit_status = 2
    http_status = 400


class NotFound(HvsnapError):
    """A guest, disk, snapshot, … that the request names does not exist."""

    code = "not-found"
    exit_status = 3
    http_status = 404


class Refused(HvsnapError):
    """A rule forbids it: a quota, a state, a lock."""

    code = "refused"
    exit_status = 4
    http_status = 409


class Busy(HvsnapError):
    """Something else is at work on the same object; later it may succeed."""

    code = "busy"
    exit_status = 5
    http_status = 423


class DaemonUnreachable(HvsnapError):
    """The daemon does not answer on its socket."""

    code = "daemon-unreachable"
    exit_status = 6
    http_status = 503
    default_hint = "start it with `hvsnap daemon`, or name its configuration with --config"


class Damaged(HvsnapError):
    """Stored data is not what was stored; nothing of it was handed out."""

    code = "damaged"
    exit_status = 7
    http_status = 422


# -- leaves ---------------------------------------------------------------------------------------


class ConfigInvalid(BadRequest):
    """An unknown key or a wrong value in the configuration."""

    code = "config-invalid"


class GuestUnknown(NotFound):
    """No guest of that name, UUID or id."""

    code = "guest-unknown"
    default_hint = "`hvsnap list` shows the guests and their disks"


class DiskUnknown(NotFound):
    """No disk of that target, path or id."""

    code = "disk-unknown"
    default_hint = "`hvsnap list` shows the guests and their disks"


class SnapshotUnknown(NotFound):
    """No snapshot of that id."""

    code = "snapshot-unknown"
    default_hint = "`hvsnap snapshot-list` shows the snapshots"


class ImageUnknown(NotFound):
    """No image of that id or name."""

    code = "image-unknown"
    default_hint = "`hvsnap image-list` shows the images"


class NoEligibleDisk(Refused):
    """The guest has no disk that can be captured."""

    code = "no-eligible-disk"
    default_hint = "`hvsnap list` says for each disk why it is skipped"


class NotAllowed(Refused):
    """Whoever asks may not: the configuration gives their groups no right to it."""

    code = "not-allowed"
    http_status = 403


class GuestRunning(Refused):
    """The guest must be shut off for this."""

    code = "guest-running"
    default_hint = "shut the guest off first, or give --stop"


class ChainFull(Refused):
    """The chain holds as many snapshots as it may (SERVICE 3.1)."""

    code = "chain-full"
    default_hint = "delete a snapshot of this disk first: `hvsnap snapshot-delete ID`"


class SnapshotInUse(Refused):
    """The snapshot is being captured, restored or served."""

    code = "snapshot-in-use"


class SnapshotLocked(Refused):
    """The snapshot is locked against deletion."""

    code = "snapshot-locked"
    default_hint = "wait until its lock has ended"


class SnapshotPromoted(Refused):
    """An image was made of the snapshot, which stays until the image is deleted (SERVICE 4.5)."""

    code = "snapshot-promoted"


class PolicyUnknown(NotFound):
    """No policy of that id or name."""

    code = "policy-unknown"
    default_hint = "`hvsnap policy-list` shows the policies"


class TargetExists(Refused):
    """The file or device that was to be created is there already."""

    code = "target-exists"
    default_hint = "choose another path, or write over it with --force"


class CaptureRunning(Busy):
    """A capture is already at work on the disk (SERVICE 2.6)."""

    code = "capture-running"
    default_hint = "wait for it (`hvsnap watch`), or queue behind it with --wait"


class ForeignJob(Busy):
    """Another program's block job is at work on the disk; it is not disturbed."""

    code = "foreign-job"
    default_hint = "try again when it has finished"


class StoreBusy(Busy):
    """Another daemon holds the store or the state directory."""

    code = "store-busy"


class Stopping(Busy):
    """The daemon is ending, and takes no new work."""

    code = "stopping"
    http_status = 503
    default_hint = "try again when it is back"


class AgentUnavailable(Failed):
    """The guest agent did not freeze the file systems in time."""

    code = "agent-unavailable"
    default_hint = "install and start qemu-guest-agent in the guest, or use --consistency crash"


class AgentMissing(AgentUnavailable):
    """The guest has no agent that could be asked: nothing was sent to it, so nothing can be frozen."""


class HypervisorFailed(Failed):
    """libvirt, QEMU or one of its tools reported an error."""

    code = "hypervisor-failed"


class HypervisorUnreachable(Failed):
    """libvirt or QEMU does not answer."""

    code = "hypervisor-unreachable"


class ReadFailed(Failed):
    """The disk could not be read; zeroes never stand in for data."""

    code = "read-failed"


class StoreFailed(Failed):
    """The store could not be written or read."""

    code = "store-failed"


class NoSpace(StoreFailed):
    """The device is full."""

    code = "no-space"
    http_status = 507
    default_hint = "free some space and try again; nothing was lost"


class ObjectExists(StoreFailed):
    """An object of that name is in the store already; objects are never overwritten."""

    code = "object-exists"
    http_status = 409


class FormatUnknown(StoreFailed):
    """The store was written in a format, or with a feature, that this release does not know."""

    code = "format-unknown"
    default_hint = "a newer hvsnap wrote it: use that release or a later one"


class CatalogFailed(Failed):
    """The catalog is unreadable, read-only or from another version."""

    code = "catalog-failed"
