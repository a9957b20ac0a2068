"""hvsnap(1), made from the commands themselves, in the macros of man(7).

``python -m hvsnap.cli.manual`` writes it; `hvsnap install` puts it in place. A test fails when it is not up to date.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from hvsnap import __version__
from hvsnap.cli import grammar
from hvsnap.cli.grammar.command import COMMON
from hvsnap.config import DEFAULT_PATH, ENVIRONMENT, Settings

PLACE = Path(__file__).parents[1] / "units" / "hvsnap.1"
WIDTH = 72

EXIT_STATUS = {
    0: "Done; for a snapshot: accomplished.",
    1: "Failed, and nothing half is left.",
    2: "Wrong usage, a wrong name or a wrong configuration; nothing was touched.",
    3: "Not found: a guest, disk, snapshot, policy or the like.",
    4: "Refused by a rule: a quota, a state, a lock, a right that the caller lacks.",
    5: "Busy: something else is at work on it.",
    6: "The daemon does not answer.",
    7: "Damaged data; nothing of it was handed out.",
    130: "Ended by Ctrl-C.",
}

ABOUT = """\
hvsnap makes snapshots of the disks of running KVM guests: the first one of a disk is full, each later one holds what
has changed. Any of them can be made a new disk, or the disk be set back to it. The commands talk to the daemon over
its Unix socket; what is refused is refused by the daemon, before anything is touched.

Guests go by name or UUID; disks by target (vda), GUEST/TARGET, path or id (d-...); snapshots by id (s-...).

Without a command, on a terminal, hvsnap is an interactive shell."""


def page() -> str:
    """Return the whole page."""
    lines = [
        '.\\" Made by python -m hvsnap.cli.manual: change the commands instead.',
        f'.TH HVSNAP 1 "" "hvsnap {__version__}" "Snapshots of KVM guests"',
        ".SH NAME",
        "hvsnap \\- snapshots of running KVM guests, and disks made of them",
        ".SH SYNOPSIS",
        ".B hvsnap",
        "[\\fB\\-c\\fR \\fIURI\\fR] [\\fB\\-\\-config\\fR \\fIFILE\\fR]",
        "[\\fB\\-\\-json\\fR] [\\fB\\-\\-quiet\\fR]",
        "\\fICOMMAND\\fR [\\fIARGUMENTS\\fR]",
        ".SH DESCRIPTION",
        *_prose(ABOUT),
        ".SH OPTIONS",
        "They may stand before the command or after it.",
        *(line for one in grammar.root().params for line in _parameter(one)),
        ".SH COMMANDS",
        *_commands(),
        ".SH EXIT STATUS",
        *(line for code, what in EXIT_STATUS.items() for line in (".TP", f".B {code}", _text(what))),
        *_around(),
    ]
    return "\n".join(lines) + "\n"


def _commands() -> Iterator[str]:
    panels: dict[str, list[Any]] = {}
    for command in grammar.root().commands.values():
        panels.setdefault(str(getattr(command, "rich_help_panel", "")), []).append(command)
    for panel, commands in panels.items():
        yield f".SS {_quoted(panel)}"
        for command in commands:
            yield from _command(command)


def _command(command: Any) -> Iterator[str]:
    own = [one for one in command.params if one.rich_help_panel != COMMON]
    pieces = [_usage(one) for one in own if one.param_type_name == "argument"]
    options = [one for one in own if one.param_type_name == "option"]
    yield ".TP"
    yield " ".join([f"\\fB{_text(command.name)}\\fR", *(["[\\fIOPTIONS\\fR]"] if options else []), *pieces])
    yield from _prose(command.help or "", indented=True)
    yield ".RS"
    for one in own:
        if one.help:
            yield from _parameter(one)
    yield ".PP"
    yield "Example:"
    (example,) = re.findall(r"\[bold\](.*)\[/bold\]", command.epilog.replace("\\[", "["))
    yield ".PP"
    yield ".RS 4"
    yield ".nf"
    yield _text(example)
    yield ".fi"
    yield ".RE"
    yield ".RE"


def _usage(argument: Any) -> str:
    name = f"\\fI{_text(argument.metavar or argument.name.upper())}\\fR" + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _parameter(one: Any) -> Iterator[str]:
    yield ".TP"
    if one.param_type_name == "argument":
        yield f".I {_text(one.metavar or one.name.upper())}"
    else:
        names = ", ".join(f"\\fB{_text(name)}\\fR" for name in sorted(one.opts, key=len))
        value = "" if one.is_flag else f" \\fI{_text(_value(one))}\\fR"
        yield names + value + (" (required)" if one.required else "")
    yield from _prose(one.help or "", indented=True)


def _value(option: Any) -> str:
    if option.metavar:
        return str(option.metavar)
    if isinstance(option.default, Enum):
        return "|".join(str(choice.value) for choice in type(option.default))
    return "N" if isinstance(option.default, int) else "TEXT"


def _around() -> Iterator[str]:
    defaults = Settings()
    yield ".SH ENVIRONMENT"
    yield from (".TP", f".B {ENVIRONMENT}", f"The configuration, unless {_text('--config')} names one.")
    yield ".SH FILES"
    for path, what in (
        (
            str(DEFAULT_PATH),
            "The configuration; every key has a default, and docs/configuration.md tells what it is.",
        ),
        (defaults.socket, "Where the daemon answers (socket in the configuration)."),
        (defaults.state_dir, "Catalog, journal and spool (state_dir in the configuration)."),
    ):
        yield from (".TP", f".I {_text(path)}", _text(what))
    yield ".SH SEE ALSO"
    yield ".BR virsh (1),"
    yield ".BR qemu\\-img (1),"
    yield ".BR nbdkit (1)"


def _prose(text: str, *, indented: bool = False) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".IP" if indented else ".PP"
        yield from map(_text, textwrap.wrap(paragraph, WIDTH))


def _text(text: str) -> str:
    """Return text so that roff prints it as it is; the marks that rich needs (``\\[``) are taken out."""
    plain = text.replace("\\[", "[").replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga")
    return f"\\&{plain}" if plain.startswith((".", "'")) else plain


def _quoted(text: str) -> str:
    return '"' + _text(text).replace('"', '""') + '"'


def main() -> None:
    """Write the file beside what else `hvsnap install` puts in place."""
    PLACE.write_text(page())


if __name__ == "__main__":
    main()
