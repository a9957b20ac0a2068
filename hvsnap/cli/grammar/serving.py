"""What can be typed to look into snapshots."""
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from hvsnap.cli import words
from hvsnap.cli.grammar.command import SNAPSHOTS, command, flag
from hvsnap.cli.session import Session


@command("snapshot-serve", SNAPSHOTS, example="hvsnap snapshot-serve s-mfrggzdfmztw --detach")
def snapshot_serve(
    session: Session,
    snapshot: Annotated[
        str,
        typer.Argument(
            metavar="SNAPSHOT", help="Its id; without one: what is served now.", autocompletion=words.snapshots
        ),
    ] = "",
    writable: Annotated[
        bool, flag("--writable", help="Clients may write; what they write is lost when it ends.")
    ] = False,
    detach: Annotated[bool, flag("--detach", help="Return at once; it is served until snapshot-unserve.")] = False,
) -> int:
    """Serve a snapshot as a disk, and print its NBD URI, until Ctrl-C.

    Clients of NBD (nbdcopy, qemu-img, nbdfuse) read it without its being restored. It cannot be deleted
    meanwhile.
    """
    from hvsnap.cli import serving

    return serving.serve(session, snapshot, writable=writable, detach=detach)


@command("snapshot-unserve", SNAPSHOTS, example="hvsnap snapshot-unserve s-mfrggzdfmztw")
def snapshot_unserve(
    session: Session,
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Its id.", autocompletion=words.served)],
) -> None:
    """Serve a snapshot no more: its clients are cut off."""
    from hvsnap.cli import serving

    serving.unserve(session, snapshot)
