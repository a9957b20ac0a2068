"""What can be typed: the commands, their arguments, options and help. What they do is in the modules above.

Those are imported when a command runs, since they bring HTTP and the API's models: `--help` and completion of commands
are quick without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

import typer

from hvsnap import __version__
from hvsnap.cli.grammar.command import COMMON, Config, Connect, Json, Quiet, app, flag
from hvsnap.cli.session import Session, say

# They register their commands, and the help shows them in this order.
# isort: off
from hvsnap.cli.grammar import guests, snapshots, disks, policies, images, serving, files, work, store, daemon, host  # noqa: F401

# isort: on


@dataclass(frozen=True, slots=True)
class NoCommand:
    """What a command line comes to that names no command: what it said besides, and what prints the help to stdout.

    Which returns nothing or the help, by the libraries that are there: it is made only where somebody is to see it.
    """

    session: Session
    help: Callable[[], str]


@functools.cache
def root() -> typer.core.TyperGroup:
    """Return all commands as one, as typer parses it."""
    return cast(typer.core.TyperGroup, typer.main.get_command(app))


def names() -> Sequence[str]:
    """Return the names of all commands."""
    return sorted(root().commands)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"hvsnap {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    connect: Connect = "",
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    version: Annotated[
        bool,
        flag("--version", callback=_print_version, is_eager=True, rich_help_panel=COMMON, help="Print the version."),
    ] = False,
) -> NoCommand | None:
    ctx.obj = (ctx.obj or Session()).overlaid(connect=connect, config=config, as_json=as_json, quiet=quiet)
    if ctx.invoked_subcommand is None and not ctx.resilient_parsing:
        return NoCommand(ctx.obj, ctx.get_help)
    return None
