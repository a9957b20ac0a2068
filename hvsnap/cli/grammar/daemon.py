"""What can be typed about the daemon."""
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from hvsnap.cli.grammar.command import DAEMON, command
from hvsnap.cli.session import Session


@command("daemon", DAEMON, example="hvsnap daemon --config /etc/hvsnap/hvsnap.toml")
def daemon(session: Session) -> None:
    """Run the daemon in the foreground.

    SIGTERM ends it, once the guests are safe. systemd is told when it is ready.
    """
    from hvsnap.cli import host

    host.daemon(session)


@command("status", DAEMON, example="hvsnap status")
def status(session: Session) -> None:
    """Show the daemon at a glance."""
    from hvsnap.cli import looking

    looking.status(session)


@command("doctor", DAEMON, example="hvsnap doctor")
def doctor(session: Session) -> int:
    """Look at the host, and say what to do about each finding.

    Exits with 1 if one of them is an error. Works without a running daemon, too.
    """
    from hvsnap.cli import host

    return host.doctor(session)


@command("recover", DAEMON, example="hvsnap recover")
def recover(
    session: Session,
    image: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            show_default=False,
            help="Only what concerns this image, so that its guest may be started; give it way.",
        ),
    ] = "",
) -> int:
    """Finish or undo what a crash left open.

    Exits with 1 if something is open still. Works without a running daemon, too. With --image it is the step before a
    bare guest's start (docs/bare-qemu.md): a snapshot that is being taken of the image is given up.
    """
    from hvsnap.cli import host

    return host.recover(session, image)
