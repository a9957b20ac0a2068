"""What can be typed about disks."""
# ruff: noqa: PLC0415

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from hvsnap.cli import words
from hvsnap.cli.grammar.command import DISKS, Detach, Disk, command, flag
from hvsnap.cli.session import Session


class ImageFormat(StrEnum):
    """Formats of disks that can be made."""

    QCOW2 = "qcow2"
    RAW = "raw"


AttachedDisk = Annotated[
    str,
    typer.Argument(metavar="DISK", help="GUEST/TARGET, an id or a path.", autocompletion=words.attached_disks),
]
Stop = Annotated[bool, flag("--stop", help="Shut the guest down gracefully first.")]
Start = Annotated[bool, flag("--start", help="Start the guest afterwards.")]
NoSafety = Annotated[bool, flag("--no-safety-snapshot", help="Do not make a snapshot of the present state first.")]
DryRun = Annotated[bool, flag("--dry-run", help="Only tell what would be done.")]


@command("disk-create", DISKS, example="hvsnap disk-create s-mfrggzdfmztw old.qcow2 --pool default --attach web01 vdb")
def disk_create(
    session: Session,
    snapshot: Annotated[
        str,
        typer.Argument(metavar="SNAPSHOT", help="Its id, or an image's id or name.", autocompletion=words.sources),
    ],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A new file; with --pool a new volume's name.")],
    image_format: Annotated[ImageFormat, typer.Option("--format", help="Of the new image.")] = ImageFormat.QCOW2,
    pool: Annotated[
        str, typer.Option(metavar="POOL", show_default=False, help="Make a volume in this storage pool of libvirt.")
    ] = "",
    attach: Annotated[
        tuple[str, str],
        typer.Option(
            metavar="GUEST TARGET",
            show_default=False,
            help="Attach the disk to a guest of libvirt, running or off, as vdb or the like.",
            autocompletion=words.guests,
        ),
    ] = ("", ""),
    force: Annotated[
        bool, flag("--force", help="Write over TARGET: a file (in one step, at the end) or a block device.")
    ] = False,
    instant: Annotated[
        bool, flag("--instant", help="Return when the disk can be used; it is filled in the background.")
    ] = False,
    detach: Detach = False,
) -> int:
    """Make a new disk of a snapshot or image.

    The exit status says whether it was made, and attached. Without --force nothing is written over; with it, nothing
    that is in use.
    """
    from hvsnap.cli import disks

    wanted = disks.NewDisk(snapshot, target, image_format.value, pool, attach, force=force, instant=instant)
    return disks.create(session, wanted, detach=detach)


@command("disk-rollback", DISKS, example="hvsnap disk-rollback web01/vda s-mfrggzdfmztw --stop --start")
def disk_rollback(
    session: Session,
    disk: Disk,
    snapshot: Annotated[
        str, typer.Argument(metavar="SNAPSHOT", help="Its id.", autocompletion=words.snapshots_of_disk)
    ],
    stop: Stop = False,
    start: Start = False,
    no_safety_snapshot: NoSafety = False,
    dry_run: DryRun = False,
    detach: Detach = False,
) -> int:
    """Set a disk back to one of its snapshots.

    What was written since is lost, but for the safety snapshot. The guest must be off. Only the blocks that differ
    are written.
    """
    from hvsnap.cli import disks

    wanted = disks.Wanted(disk, snapshot, stop=stop, start=start, safety=not no_safety_snapshot, dry_run=dry_run)
    return disks.rollback(session, wanted, detach=detach)


@command("disk-reinit", DISKS, example="hvsnap disk-reinit web01/vdb --stop --start")
def disk_reinit(
    session: Session,
    disk: AttachedDisk,
    stop: Stop = False,
    start: Start = False,
    no_safety_snapshot: NoSafety = False,
    dry_run: DryRun = False,
    detach: Detach = False,
) -> int:
    """Bring a disk back to the snapshot or image that `disk-create` made it of, while that is there.

    As with a rollback: what was written since is lost, but for the safety snapshot; the guest must be off; only the
    blocks that differ are written. The disk's own snapshots stay.
    """
    from hvsnap.cli import disks

    wanted = disks.Wanted(disk, "", stop=stop, start=start, safety=not no_safety_snapshot, dry_run=dry_run)
    return disks.reinitialise(session, wanted, detach=detach)


@command("disk-edit", DISKS, example="hvsnap disk-edit web01/vdb --delete-auto-with-disk")
def disk_edit(
    session: Session,
    disk: AttachedDisk,
    delete_auto_with_disk: Annotated[
        bool | None,
        typer.Option(
            "--delete-auto-with-disk/--no-delete-auto-with-disk",
            show_default=False,
            help="Whether its automatic snapshots go with the disk when it is released.",
        ),
    ] = None,
    encrypted: Annotated[
        bool | None,
        typer.Option(
            "--encrypted/--no-encrypted", show_default=False, help="Whether it must never be stored in plain."
        ),
    ] = None,
) -> None:
    """Change what holds for a disk."""
    from hvsnap.cli import disks

    disks.edit(session, disk, delete_auto_with_disk, encrypted)


@command("disk-release", DISKS, example="hvsnap disk-release web01/vdb --dry-run")
def disk_release(session: Session, disk: Disk, dry_run: DryRun = False) -> None:
    """Forget a disk that is gone from its guest, or whose guest is gone.

    Its automatic snapshots go with it where `disk-edit` said so; else they live on until they expire. Manual ones stay.
    """
    from hvsnap.cli import disks

    disks.release(session, disk, dry_run=dry_run)
