"""What can be typed: the commands, their arguments, options and help. What they do is in the modules beside.

Those are imported when a command runs, since they bring HTTP and the API's models: `--help` and completion of commands
are quick without.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer

from hvsnap import __version__
from hvsnap.cli import words
from hvsnap.cli.complaints import complain
from hvsnap.cli.session import Session, say
from hvsnap.errors import HvsnapError
from hvsnap.model import Consistency

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


@functools.cache
def root() -> typer.core.TyperGroup:
    """Return all commands as one, as typer parses it."""
    from hvsnap.cli import (  # noqa: F401 - they register their commands
        grammar_disks,
        grammar_host,
        grammar_images,
        grammar_policies,
        grammar_serving,
        grammar_store,
    )

    group = typer.main.get_command(app)
    return cast(typer.core.TyperGroup, group)


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
) -> int | None:
    ctx.obj = (ctx.obj or Session()).overlaid(connect=connect, config=config, as_json=as_json, quiet=quiet)
    if ctx.invoked_subcommand is None and not ctx.resilient_parsing:
        from hvsnap.cli import shell

        return shell.without_command(ctx, ctx.obj)
    return None


# -- arguments that several commands take ---------------------------------------------------------

Guest = Annotated[str, typer.Argument(metavar="GUEST", help="Its name or UUID.", autocompletion=words.guests)]
Disk = Annotated[
    str,
    typer.Argument(metavar="DISK", help="Its id, GUEST/TARGET, target (vda) or path.", autocompletion=words.disks),
]
Snapshot = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Its id.", autocompletion=words.snapshots)]
Detach = Annotated[bool, flag("--detach", help="Return the id at once; the work goes on in the daemon.")]


# -- guests ---------------------------------------------------------------------------------------


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


# -- snapshots and chains -------------------------------------------------------------------------


@command(
    "snapshot-create",
    SNAPSHOTS,
    example='hvsnap snapshot-create web01 vda --name "before upgrade" --tag release=9',
)
def snapshot_create(
    session: Session,
    guest: Guest,
    disks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DISK",
            help="Targets (vda), paths or ids; else every disk that can be captured.",
            autocompletion=words.disks_of_guest,
        ),
    ] = None,
    name: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="Else one is made of the time.")] = "",
    description: Annotated[str, typer.Option(metavar="TEXT", show_default=False, help="Up to 256 characters.")] = "",
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A tag; may be given up to 20 times.")
    ] = None,
    consistency: Annotated[
        Consistency,
        typer.Option(
            help="app: file systems frozen through the guest agent, or it fails; crash: as if power was cut; "
            "auto: app if it can be had, else crash."
        ),
    ] = Consistency.AUTO,
    group: Annotated[bool, flag("--group", help="All disks at the same instant.")] = False,
    wait: Annotated[bool, flag("--wait", help="Queue behind a running capture of a disk.")] = False,
    detach: Detach = False,
) -> int:
    """Make snapshots of a guest's disks.

    Returns when they are accomplished; the exit status says whether they were. Ctrl-C asks whether to cancel.
    """
    from hvsnap.cli import snapshots

    wanted = snapshots.Wanted(guest, disks or [], name, description, tag or [], consistency, group=group, wait=wait)
    return snapshots.create(session, wanted, detach=detach)


@command("snapshot-list", SNAPSHOTS, example="hvsnap snapshot-list web01 vda")
def snapshot_list(
    session: Session,
    guest: Annotated[
        str, typer.Argument(metavar="GUEST", help="Only its snapshots.", autocompletion=words.guests)
    ] = "",
    disk: Annotated[
        str, typer.Argument(metavar="DISK", help="Only those of this disk.", autocompletion=words.disks_of_guest)
    ] = "",
) -> None:
    """List snapshots, newest first: all, a guest's, or a disk's."""
    from hvsnap.cli import snapshots

    snapshots.listing(session, guest, disk)


@command("snapshot-info", SNAPSHOTS, example="hvsnap snapshot-info s-mfrggzdfmztw")
def snapshot_info(session: Session, snapshot: Snapshot) -> None:
    """Show all that is known of a snapshot."""
    from hvsnap.cli import snapshots

    snapshots.info(session, snapshot)


@command("snapshot-delete", SNAPSHOTS, example="hvsnap snapshot-delete s-mfrggzdfmztw --dry-run")
def snapshot_delete(
    session: Session,
    ids: Annotated[list[str], typer.Argument(metavar="SNAPSHOT", help="Their ids.", autocompletion=words.snapshots)],
    dry_run: Annotated[bool, flag("--dry-run", help="Only tell what that would free.")] = False,
) -> None:
    """Delete snapshots, all of them or none.

    The others restore to what they did before.
    """
    from hvsnap.cli import snapshots

    snapshots.delete(session, ids, dry_run=dry_run)


@command("chain-list", SNAPSHOTS, example="hvsnap chain-list")
def chain_list(session: Session) -> None:
    """List the chains: of each disk its snapshots, and their logical, stored and exclusive bytes."""
    from hvsnap.cli import looking

    looking.chains(session)


@command("chain-info", SNAPSHOTS, example="hvsnap chain-info web01/vda")
def chain_info(session: Session, disk: Disk) -> None:
    """Show the chain of a disk, node by node."""
    from hvsnap.cli import looking

    looking.chain(session, disk)


# -- the daemon and the host ----------------------------------------------------------------------


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


def names() -> Sequence[str]:
    """Return the names of all commands."""
    return sorted(root().commands)
