"""The one form of all errors: `hvsnap: WHAT: WHY`, then `hint: NEXT STEP`; with `--json` an object on stdout.

Exit statuses are the errors' own (hvsnap.errors). Wrong usage, which typer finds, is told in the same form.
"""

from __future__ import annotations

import sys
from typing import Any

from typer.exceptions import TyperException

from hvsnap.cli.session import json_text, say
from hvsnap.cli.text import one_line
from hvsnap.errors import BadRequest, HvsnapError

INTERRUPTED = 130
"""What a shell makes of a program that SIGINT ended: 128 + 2."""


def complain(error: HvsnapError, what: str, *, as_json: bool, also: dict[str, Any] | None = None) -> int:
    """Tell of an error and return the exit status.

    ``what`` is what was tried. With ``as_json`` the keys of ``also`` go beside ``code``, ``message`` and ``hint``:
    what had been reached when it failed.
    """
    if as_json:
        say(json_text(error.as_dict() | (also or {})))
        return error.exit_status
    message, hint = one_line(error.message), one_line(error.hint)
    sys.stderr.write(f"hvsnap: {one_line(what)}: {message}\n" + (f"hint: {hint}\n" if hint else ""))
    sys.stderr.flush()
    return error.exit_status


def wrong_usage(error: TyperException, command: str) -> tuple[BadRequest, str]:
    """Return what typer found wrong with a command line, and what it is about: ``command``, if one was recognised."""
    message = one_line(error.format_message()).replace("Value error, ", "").removesuffix(".")
    hint = f"`hvsnap {command} --help` says what it takes" if command else "`hvsnap --help` lists the commands"
    return BadRequest(message, hint=hint), command or "usage"
