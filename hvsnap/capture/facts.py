"""What the journal holds of an open capture: all that finishing or undoing it needs, after any crash."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from hvsnap.errors import CatalogFailed
from hvsnap.model import DiskId, Operation, SnapshotId

KIND = "capture"
"""The journal's name for captures."""


class Mode(StrEnum):
    """How the instant is held (docs/architecture.md, "Capture")."""

    REDIRECT = "redirect"
    FLEECE = "fleece"
    OFFLINE = "offline"


class Step(StrEnum):
    """Intents of a capture, each written down before it is acted on."""

    BITMAPS = "adding bitmaps"
    OVERLAYS = "creating overlays"
    SCRATCH = "preparing scratch images"
    FREEZING = "freezing file systems"
    SWITCHING = "switching to overlays"
    READING = "reading"
    SETTLING = "settling"


@dataclass(frozen=True, slots=True)
class CapturedDisk:
    """One disk of an open capture.

    ``base`` is the guest's image, ``overlay`` what takes its writes meanwhile (redirect), ``scratch`` what takes the
    old data that is overwritten meanwhile (fleece); empty where there is none. ``old`` is the bitmap that the capture
    reads, ``new`` the one that records from its instant on; None where there is none. ``secret`` names what opens the
    image, and its overlay, where they are encrypted.
    """

    disk: DiskId
    snapshot: SnapshotId
    target: str
    base: str
    base_format: str
    overlay: str
    old: str | None
    new: str | None
    scratch: str = ""
    secret: str = ""


@dataclass(frozen=True, slots=True)
class CaptureFacts:
    """An open capture of one or several disks of a guest.

    ``pivoting`` names targets whose pivot was asked for, ``asked`` which QEMU (``GuestView.instance``) each one.
    ``freezing``: the guest's agent may have been asked to freeze.
    """

    mode: Mode
    disks: tuple[CapturedDisk, ...]
    pivoting: tuple[str, ...] = ()
    freezing: bool = False
    asked: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the facts as the journal stores them."""
        return asdict(self)

    @classmethod
    def of(cls, operation: Operation) -> CaptureFacts:
        """Return the facts of a journal entry; raises :class:`CatalogFailed` for one that is not a capture's."""
        raw: dict[str, Any] = operation.facts
        try:
            disks = tuple(CapturedDisk(**disk) for disk in raw["disks"])
            rest = tuple(raw.get("pivoting", ())), bool(raw.get("freezing")), dict(raw.get("asked", {}))
            return cls(Mode(raw["mode"]), disks, *rest)
        except (KeyError, TypeError, ValueError) as error:
            raise CatalogFailed(f"the journal's entry {operation.id} cannot be read: {error}") from error
