"""What can be typed about guests."""
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from hvsnap.cli import words
from hvsnap.cli.grammar.command import GUESTS, command
from hvsnap.cli.session import Session


@command("list", GUESTS, example="hvsnap list")
def list_(session: Session) -> None:
    """List the guests and their disks: how each is protected, and its last snapshot."""
    from hvsnap.cli import looking

    looking.guests(session)


@command("watch", GUESTS, example="hvsnap watch web01")
def watch(
    session: Session,
    guest: Annotated[
        str, typer.Argument(metavar="GUEST", help="Only what concerns this one.", autocompletion=words.guests)
    ] = "",
    mqtt: Annotated[str, typer.Option(metavar="URL", show_default=False, help="All hosts of this broker.")] = "",
    mqtt_prefix: Annotated[str, typer.Option(metavar="TOPIC", help="What their topics begin with.")] = "hvsnap",
    mqtt_user: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="Who we are.")] = "",
    mqtt_password_file: Annotated[str, typer.Option(metavar="PATH", show_default=False, help="Mode 0600.")] = "",
    mqtt_ca_file: Annotated[str, typer.Option(metavar="PATH", show_default=False, help="Else the system's.")] = "",
) -> int:
    """Show events and progress as they happen, until Ctrl-C; with `--mqtt` many hosts', as a picture on a terminal."""
    if mqtt:
        from hvsnap.cli import dashboard

        return dashboard.watch(session, guest, mqtt, mqtt_prefix, mqtt_user, mqtt_password_file, mqtt_ca_file)
    from hvsnap.cli import watching

    return watching.watch(session, guest)
