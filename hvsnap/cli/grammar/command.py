"""A command's frame: the options that all take, the arguments that several take, errors told, statuses returned."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from hvsnap.cli import words
from hvsnap.cli.complaints import complain
from hvsnap.errors import HvsnapError

GUESTS, SNAPSHOTS, DISKS, DAEMON = "Guests", "Snapshots and chains", "Disks", "The daemon and the host"
COMMON = "Common options"

app = typer.Typer(
    name="hvsnap",
    help="Snapshots of running KVM guests, and disks made of them.",
    epilog="Without a command on a terminal: an interactive shell.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def flag(*names: str, **settings: Any) -> Any:
    """Return an option that takes no value, and whose help shows none."""
    return typer.Option(*names, metavar="", **settings)


Connect = Annotated[
    str,
    typer.Option(
        "-c",
        "--connect",
        metavar="URI",
        show_default=False,
        rich_help_panel=COMMON,
        help="libvirt's URI, in the place of hypervisor.libvirt_uri: for daemon, and for recover and doctor where no "
        "daemon runs.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        rich_help_panel=COMMON,
        help="The configuration; else $HVSNAP_CONFIG, else /etc/hvsnap/hvsnap.toml.",
    ),
]
Json = Annotated[bool, flag("--json", rich_help_panel=COMMON, help="Print one JSON object, also for an error.")]
Quiet = Annotated[
    bool, flag("--quiet", "-q", rich_help_panel=COMMON, help="Only the data: no progress, headers, remarks.")
]


def _common(connect: Connect = "", config: Config = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Only its parameters count: every command has them."""


Work = TypeVar("Work", bound=Callable[..., int | None])
"""What a command does: given the session and its own arguments, it returns an exit status, or None for 0."""


def command(name: str, panel: str, *, example: str) -> Callable[[Work], Work]:
    """Register a function as a command: with the common options, its errors told, its exit status returned."""

    def register(work: Work) -> Work:
        def run(ctx: typer.Context, **given: Any) -> int:
            common = {key: given.pop(key) for key in ("connect", "config", "as_json", "quiet")}
            session = ctx.obj.overlaid(**common)
            try:
                return work(session, **given) or 0
            except HvsnapError as error:
                return complain(error, name, as_json=session.json)

        own = list(inspect.signature(work, eval_str=True).parameters.values())[1:]
        every = inspect.signature(_common, eval_str=True).parameters.values()
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        by_name = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own, *every)]
        run.__signature__ = inspect.Signature([context, *by_name])  # type: ignore[attr-defined]
        run.__annotations__ = {}
        help_text = (inspect.getdoc(work) or "").replace("[", "\\[")
        epilog = f"Example:\n\n[bold]$ {example.replace('[', chr(92) + '[')}[/bold]"
        app.command(name, help=help_text, epilog=epilog, rich_help_panel=panel)(run)
        return work

    return register


# -- arguments that several commands take ---------------------------------------------------------

Guest = Annotated[str, typer.Argument(metavar="GUEST", help="Its name or UUID.", autocompletion=words.guests)]
Disk = Annotated[
    str,
    typer.Argument(metavar="DISK", help="Its id, GUEST/TARGET, target (vda) or path.", autocompletion=words.disks),
]
Snapshot = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Its id.", autocompletion=words.snapshots)]
Detach = Annotated[bool, flag("--detach", help="Return the id at once; the work goes on in the daemon.")]
