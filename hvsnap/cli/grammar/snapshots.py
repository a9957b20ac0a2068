"""What can be typed about snapshots and chains."""
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from hvsnap.cli import words
from hvsnap.cli.grammar.command import SNAPSHOTS, Detach, Disk, Guest, Snapshot, command, flag
from hvsnap.cli.session import Session
from hvsnap.model import Consistency


@command(
    "snapshot-create",
    SNAPSHOTS,
    example='hvsnap snapshot-create web01 vda --name "before upgrade" --tag release=9',
)
def snapshot_create(
    session: Session,
    guest: Guest,
    disks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DISK",
            help="Targets (vda), paths or ids; else every disk that can be captured.",
            autocompletion=words.disks_of_guest,
        ),
    ] = None,
    name: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="Else one is made of the time.")] = "",
    description: Annotated[str, typer.Option(metavar="TEXT", show_default=False, help="Up to 256 characters.")] = "",
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A tag; may be given up to 20 times.")
    ] = None,
    consistency: Annotated[
        Consistency,
        typer.Option(
            help="app: file systems frozen through the guest agent, or it fails; crash: as if power was cut; "
            "auto: app if it can be had, else crash."
        ),
    ] = Consistency.AUTO,
    group: Annotated[bool, flag("--group", help="All disks at the same instant.")] = False,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="GUEST[/DISK]",
            help="A further guest, or one disk of it, held together with the first one; may be given many times.",
            autocompletion=words.guests_and_disks,
        ),
    ] = None,
    wait: Annotated[bool, flag("--wait", help="Queue behind a running capture of a disk.")] = False,
    detach: Detach = False,
) -> int:
    """Make snapshots of a guest's disks, or of several guests' as one group.

    Returns when they are accomplished; the exit status says whether they were. Ctrl-C asks whether to cancel.
    """
    from hvsnap.cli import snapshots

    wanted = snapshots.Wanted(
        guest, disks or [], name, description, tag or [], consistency, group=group, wait=wait, others=others or []
    )
    return snapshots.create(session, wanted, detach=detach)


@command("snapshot-list", SNAPSHOTS, example="hvsnap snapshot-list web01 vda")
def snapshot_list(
    session: Session,
    guest: Annotated[
        str, typer.Argument(metavar="GUEST", help="Only its snapshots.", autocompletion=words.guests)
    ] = "",
    disk: Annotated[
        str, typer.Argument(metavar="DISK", help="Only those of this disk.", autocompletion=words.disks_of_guest)
    ] = "",
) -> None:
    """List snapshots, newest first: all, a guest's, or a disk's."""
    from hvsnap.cli import snapshots

    snapshots.listing(session, guest, disk)


@command("snapshot-info", SNAPSHOTS, example="hvsnap snapshot-info s-mfrggzdfmztw")
def snapshot_info(session: Session, snapshot: Snapshot) -> None:
    """Show all that is known of a snapshot."""
    from hvsnap.cli import snapshots

    snapshots.info(session, snapshot)


@command("snapshot-delete", SNAPSHOTS, example="hvsnap snapshot-delete s-mfrggzdfmztw --dry-run")
def snapshot_delete(
    session: Session,
    ids: Annotated[list[str], typer.Argument(metavar="SNAPSHOT", help="Their ids.", autocompletion=words.snapshots)],
    dry_run: Annotated[bool, flag("--dry-run", help="Only tell what that would free.")] = False,
) -> None:
    """Delete snapshots, all of them or none.

    The others restore to what they did before.
    """
    from hvsnap.cli import snapshots

    snapshots.delete(session, ids, dry_run=dry_run)


@command("chain-list", SNAPSHOTS, example="hvsnap chain-list")
def chain_list(session: Session) -> None:
    """List the chains: of each disk its snapshots, and their logical, stored and exclusive bytes."""
    from hvsnap.cli import looking

    looking.chains(session)


@command("chain-info", SNAPSHOTS, example="hvsnap chain-info web01/vda")
def chain_info(session: Session, disk: Disk) -> None:
    """Show the chain of a disk, node by node."""
    from hvsnap.cli import looking

    looking.chain(session, disk)
