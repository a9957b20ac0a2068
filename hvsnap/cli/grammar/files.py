"""What can be typed to look at the files in snapshots."""
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from hvsnap.cli import words
from hvsnap.cli.grammar.command import SNAPSHOTS, command, flag
from hvsnap.cli.session import Session

FileSystem = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        show_default=False,
        help="As snapshot-ls lists it; else the only one there is, or those of the only operating system.",
    ),
]


@command("snapshot-ls", SNAPSHOTS, example="hvsnap snapshot-ls s-mfrggzdfmztw:/etc")
def snapshot_ls(
    session: Session,
    place: Annotated[
        str,
        typer.Argument(metavar="SNAPSHOT[:/PATH]", help="Its id, and a path in it.", autocompletion=words.snapshots),
    ],
    filesystem: FileSystem = "",
    recursive: Annotated[bool, flag("--recursive", "-R", help="Also what lies in directories below.")] = False,
) -> None:
    """List the file systems of a snapshot, or what lies in a directory of it.

    Needs libguestfs (python3-guestfs), which reads them in a virtual machine of its own.
    """
    from hvsnap.cli import files

    files.ls(session, place, filesystem=filesystem, recursive=recursive)


@command("snapshot-cp", SNAPSHOTS, example="hvsnap snapshot-cp s-mfrggzdfmztw:/etc/fstab .")
def snapshot_cp(
    session: Session,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SNAPSHOT:/PATH", help="Files and directories of one snapshot.", autocompletion=words.snapshots
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="A directory to copy into, or a new name; - is the standard output."),
    ],
    filesystem: FileSystem = "",
    force: Annotated[bool, flag("--force", help="Write over files; never over a directory.")] = False,
) -> None:
    """Copy files and directories out of a snapshot.

    Permissions and times are kept, for root owners, too. Needs libguestfs (python3-guestfs).
    """
    from hvsnap.cli import files

    files.cp(session, sources, target, filesystem=filesystem, force=force)
