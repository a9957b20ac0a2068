"""What can be typed about work that goes on in the daemon."""
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from hvsnap.cli import words
from hvsnap.cli.grammar.command import command, flag
from hvsnap.cli.session import Session

WORK = "Work in the daemon"

Ids = Annotated[
    list[str],
    typer.Argument(metavar="ID...", help="Of tasks, and of snapshots being made.", autocompletion=words.under_way),
]


@command("task-list", WORK, example="hvsnap task-list")
def task_list(
    session: Session,
    everything: Annotated[bool, flag("--all", help="Also the tasks that have ended since the daemon's start.")] = False,
) -> None:
    """List what is under way: snapshots being made, and all other long work, whoever asked for it."""
    from hvsnap.cli import work

    work.listing(session, everything=everything)


@command("task-wait", WORK, example="hvsnap task-wait t-mfrggzdfmztw")
def task_wait(session: Session, ids: Ids) -> int:
    """Follow work to its end, as the command that began it would have without --detach.

    The exit status says whether all of it succeeded.
    """
    from hvsnap.cli import work

    return work.wait(session, ids)


@command("task-cancel", WORK, example="hvsnap task-cancel s-mfrggzdfmztw")
def task_cancel(session: Session, ids: Ids) -> int:
    """Cancel work, and wait until what it had begun is undone.

    A snapshot that is cancelled becomes failed, and with it all others of its group.
    """
    from hvsnap.cli import work

    return work.give_up(session, ids)
