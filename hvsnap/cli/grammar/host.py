"""What can be typed about libvirt's hook and the service."""
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from hvsnap.cli.grammar.command import command, flag
from hvsnap.cli.session import Session

HOST = "Setting up a host"

Directory = Annotated[str, typer.Option(metavar="DIR", help="libvirt's hooks.")]


@command("hook-install", HOST, example="hvsnap hook-install")
def hook_install(session: Session, directory: Directory = "/etc/libvirt/hooks") -> None:
    """Put libvirt's hook in place: it keeps a guest from starting in the middle of a rollback.

    Hooks that are there already stay. The first hook of a host needs libvirtd to be restarted once; it says so.
    """
    from hvsnap.cli import hooks

    hooks.install(session, directory)


@command("hook-status", HOST, example="hvsnap hook-status")
def hook_status(session: Session, directory: Directory = "/etc/libvirt/hooks") -> int:
    """Show whether libvirt's hook is in place, and which guests it keeps from starting.

    Exits with 1 if it is not, or not as it should be.
    """
    from hvsnap.cli import hooks

    return hooks.status(session, directory)


@command("hook-remove", HOST, example="hvsnap hook-remove")
def hook_remove(session: Session, directory: Directory = "/etc/libvirt/hooks") -> None:
    """Remove libvirt's hook; others' hooks stay."""
    from hvsnap.cli import hooks

    hooks.remove(session, directory)


@command("install", HOST, example="hvsnap install --dry-run")
def install(
    session: Session,
    dry_run: Annotated[bool, flag("--dry-run", help="Only tell what would be done.")] = False,
    prefix: Annotated[
        str, typer.Option(metavar="DIR", show_default=False, help="Below this directory, for making packages.")
    ] = "",
) -> None:
    """Put the service in place: systemd's units, the group hvsnap, a first configuration.

    Nothing is started, and a configuration that is there stays. What is left to do is told.
    """
    from hvsnap.cli import installing

    installing.install(session, prefix, dry_run=dry_run)
