"""What the doctor concludes of guests' disks: how they are driven, what is in their images. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hvsnap.errors import HvsnapError
from hvsnap.model import Bitmap
from hvsnap.service.findings import FREE_BYTES_MIN, FREE_SHARE_MIN, DirectorySeen, size
from hvsnap.wire import Finding, GuestList, Protection, Severity

NAMED_MAX = 5
"""Disks that one finding names; of more it says how many."""

QCOW2_MAGIC = b"QFI\xfb"
OURS = "hvsnap-"
MEDIA = ("it is a cdrom", "it is a floppy", "the drive is empty", "it is read-only")
"""Why disks are left out that nobody misses in a snapshot."""


@dataclass(frozen=True, slots=True)
class DiskSeen:
    """A disk that is captured, as far as it could be looked at. ``head``: the first bytes of a raw image.

    ``backing_unnamed`` is the path of a backing file whose format the image does not name.
    """

    guest: str
    target: str
    path: str
    format: str
    cache: str = ""
    discard: str | None = None
    head: bytes = b""
    backing_unnamed: str = ""
    bitmaps: tuple[Bitmap, ...] = ()
    expected: str | None = None
    capturing: bool = False

    @property
    def where(self) -> str:
        """The disk, for people."""
        return f"{self.target} of {self.guest}"


def named(places: Iterable[str]) -> str:
    """Return places as one text of bounded length."""
    every = list(places)
    more = f" and {len(every) - NAMED_MAX} more" if len(every) > NAMED_MAX else ""
    return ", ".join(every[:NAMED_MAX]) + more


def _about(severity: Severity, check: str, what: str, evidence: Sequence[str], remedy: str) -> list[Finding]:
    if not evidence:
        return []
    return [Finding(severity=severity, check=check, what=what, evidence=named(evidence), remedy=remedy)]


def settings(disks: Sequence[DiskSeen]) -> list[Finding]:
    """Judge how disks are driven: one finding for each trap, naming the disks that are in it."""
    return [
        *_about(
            Severity.WARNING,
            "cache-unsafe",
            "disks ignore their guests' flushes: when the host loses power, images and snapshots' bitmaps may be torn",
            [f"cache='unsafe' on {disk.where}" for disk in disks if disk.cache == "unsafe"],
            "set cache='none' or 'writeback' on the disk's <driver>, and restart the guest",
        ),
        *_about(
            Severity.INFO,
            "no-discard",
            "what guests trim stays in their images, and goes into snapshots as if it was in use",
            [disk.where for disk in disks if disk.discard is not None and disk.discard != "unmap"],
            "set discard='unmap' on the disk's <driver>, and run fstrim in the guest",
        ),
        *_about(
            Severity.WARNING,
            "raw-header",
            "raw disks begin with a qcow2 header: either the definition names the wrong format, or the guest wrote it",
            [f"{disk.path} ({disk.where})" for disk in disks if disk.format == "raw" and disk.head == QCOW2_MAGIC],
            "let no tool guess the format of these images; if one really is qcow2, name that in the definition",
        ),
        *_about(
            Severity.WARNING,
            "backing-format",
            "images do not name the format of their backing file: who opens them guesses, and a guest may have lied",
            [f"{disk.path} on {disk.backing_unnamed}" for disk in disks if disk.backing_unnamed],
            "with the guest off: qemu-img rebase -u -f qcow2 -b BACKING -F FORMAT IMAGE",
        ),
    ]


def bitmaps(disks: Sequence[DiskSeen]) -> list[Finding]:
    """Judge the dirty bitmaps beside the one that a disk's next snapshot reads."""

    def beside(disk: DiskSeen) -> list[Bitmap]:
        return [one for one in disk.bitmaps if one.name != disk.expected]

    broken = [f"{one.name} on {d.where}" for d in disks for one in beside(d) if one.inconsistent]
    foreign = [
        f"{one.name} on {d.where}" for d in disks for one in beside(d)
        if not one.inconsistent and not one.name.startswith(OURS)
    ]  # fmt: skip
    left = [
        f"{one.name} on {d.where}" for d in disks for one in beside(d)
        if not d.capturing and not one.inconsistent and one.name.startswith(OURS)
    ]  # fmt: skip
    remove = "with the guest off: qemu-img bitmap --remove IMAGE NAME"
    return [
        *_about(
            Severity.WARNING,
            "bitmap-inconsistent",
            "dirty bitmaps are broken, as after a crash of QEMU: useless, and their disks cannot be resized",
            broken,
            f"{remove}, and tell the tool that made them",
        ),
        *_about(Severity.INFO, "bitmap-foreign", "another tool's dirty bitmaps are left alone", foreign, ""),
        *_about(
            Severity.INFO,
            "bitmap-unused",
            "dirty bitmaps of hvsnap record for no snapshot, as after a rebuild of the catalog: they cost some writes",
            left,
            remove,
        ),
    ]


def checkpoints(found: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Tell of others' checkpoints, by the guest's name."""
    what = "another backup tool keeps checkpoints of guests; they are left alone, and each costs a dirty bitmap"
    evidence = [f"{guest}: {named(names)}" for guest, names in found.items()]
    remedy = "if nobody uses them any more: virsh checkpoint-delete GUEST NAME"
    return _about(Severity.INFO, "checkpoints", what, evidence, remedy)


def left_out(guests: GuestList) -> list[Finding]:
    """Tell of disks that no snapshot holds, but for media."""
    evidence = [
        f"{disk.target} of {guest.name} ({disk.skip_reason})"
        for guest in guests.guests
        for disk in guest.disks
        if disk.protection is Protection.SKIPPED and not disk.skip_reason.startswith(MEDIA)
    ]
    remedy = "attach them as virtio or scsi disks on qcow2 or raw images, or keep copies of them otherwise"
    return _about(Severity.WARNING, "disk-left-out", "disks are in no snapshot", evidence, remedy)


def fleece(guest: str, error: HvsnapError) -> Finding:
    """Tell that a bare guest cannot be captured as it is."""
    what = f"guest {guest} cannot be captured while it runs"
    return Finding(
        severity=Severity.ERROR, check="fleece", what=what, evidence=error.message, remedy=error.hint
    )  # fmt: skip


def devices(disks: Sequence[DiskSeen], block_devices: set[str], overlay_dir: str) -> list[Finding]:
    """Judge disks on block devices, beside which no overlay can be made."""
    evidence = [] if overlay_dir else [f"{one.path} ({one.where})" for one in disks if one.path in block_devices]
    what = "disks on block devices cannot be captured while their guests run: there is no place for an overlay"
    remedy = "name a directory for what guests write meanwhile: capture.overlay_dir"
    return _about(Severity.WARNING, "overlay-place", what, evidence, remedy)


def overlay_space(seen: Sequence[DirectorySeen]) -> list[Finding]:
    """Judge the space where overlays take what guests write during a snapshot: beside the images."""
    short = [
        f"{one.path}: {size(one.free_bytes)} of {size(one.total_bytes)} free"
        for one in seen
        if one.free_bytes < FREE_BYTES_MIN or one.free_bytes < FREE_SHARE_MIN * one.total_bytes
    ]
    what = "there is little space beside images, where guests' writes go while a snapshot is read"
    remedy = "free some, or name another file system in capture.overlay_dir; a snapshot that finds none is given up"
    return _about(Severity.WARNING, "overlay-space", what, short, remedy)
