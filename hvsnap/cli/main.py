"""The entry of `hvsnap`: one command line in, one exit status out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper

from typer.exceptions import Abort, TyperException

from hvsnap.cli.complaints import INTERRUPTED, complain, wrong_usage
from hvsnap.cli.grammar import NoCommand, root
from hvsnap.cli.session import Session
from hvsnap.errors import BadRequest


def main() -> None:
    """Run the command line of this process, and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        # A locale that lacks a character of some guest's name is no reason to fail.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str], session: Session | None = None) -> int:
    """Run one command line and return its exit status; ``session`` holds options that apply before its own."""
    base = session or Session()
    as_json = base.json or "--json" in arguments
    for argument in arguments:
        if not _is_text(argument):
            shown = argument.encode(errors="surrogateescape").decode(errors="backslashreplace")
            error = BadRequest(f"{shown[:100]} is not UTF-8", hint="names and paths are UTF-8")
            return complain(error, "usage", as_json=as_json)
    try:
        status = root().main(list(arguments), prog_name="hvsnap", standalone_mode=False, obj=base)
    except TyperException as error:
        command = next((word for word in arguments if word in root().commands), "")
        return complain(*wrong_usage(error, command), as_json=as_json)
    except (KeyboardInterrupt, Abort):
        return INTERRUPTED
    except SystemExit as end:  # typer's own options end like this, and so does a reader that went away
        return end.code if isinstance(end.code, int) else 1
    if isinstance(status, NoCommand):
        from hvsnap.cli import shell  # noqa: PLC0415 - readline and its history only where somebody types

        return shell.without_command(status, run)
    return status if isinstance(status, int) else 0


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True
