"""What can be typed about the store."""
# ruff: noqa: PLC0415

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from hvsnap.cli import words
from hvsnap.cli.grammar.command import SNAPSHOTS, Detach, command, flag
from hvsnap.cli.session import Session

STORE = "The store"


class By(StrEnum):
    """What a line of the answer is about."""

    CHAIN = "chain"
    HOST = "host"


@command("snapshot-verify", SNAPSHOTS, example="hvsnap snapshot-verify s-mfrggzdfmztw")
def snapshot_verify(
    session: Session,
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="SNAPSHOT", help="Their ids.", autocompletion=words.snapshots),
    ] = None,
    everything: Annotated[bool, flag("--all", help="All that is stored.")] = False,
    detach: Detach = False,
) -> int:
    """Read every stored block of snapshots again, and name the snapshots that a damaged one affects.

    Exits with 7 if there is damage. A damaged block is never reused, and heals when a capture brings the same content.
    """
    from hvsnap.cli import store

    return store.verify(session, ids or [], everything=everything, detach=detach)


@command("snapshot-drill", SNAPSHOTS, example="hvsnap snapshot-drill --disk web01/vda")
def snapshot_drill(
    session: Session,
    snapshot: Annotated[
        str, typer.Argument(metavar="SNAPSHOT", show_default=False, help="Its id.", autocompletion=words.snapshots)
    ] = "",
    disk: Annotated[
        str,
        typer.Option(
            metavar="DISK", show_default=False, help="Instead: the newest of this disk.", autocompletion=words.disks
        ),
    ] = "",
    detach: Detach = False,
) -> int:
    """Restore a snapshot for trial: proof that it restores. Nothing of it is left.

    The image is written as in earnest, checked by qemu-img, read back and compared with the manifests, block by block.
    It needs as much space as the snapshot has data (drill.dir, drill.max_bytes). Exits with 7 if it does not restore.
    """
    from hvsnap.cli import store

    return store.drill(session, snapshot, disk, detach=detach)


@command("store-info", STORE, example="hvsnap store-info")
def store_info(session: Session) -> None:
    """Show what the store holds, and whether damage is known."""
    from hvsnap.cli import store

    store.info(session)


@command("usage", STORE, example="hvsnap usage --since 30d --by chain")
def usage(
    session: Session,
    since: Annotated[
        str, typer.Option(metavar="TIME", show_default=False, help="2026-11-01, or 7d or 12h ago; else 30d.")
    ] = "",
    until: Annotated[str, typer.Option(metavar="TIME", show_default=False, help="The same; else now.")] = "",
    by: Annotated[By, typer.Option(help="A line for each chain, or one for the host.")] = By.CHAIN,
    plot: Annotated[
        str,
        typer.Option(metavar="FILE", show_default=False, help="Draw it: a new .png or .svg, or - for the terminal."),
    ] = "",
) -> None:
    """Show what was stored over an interval, in GiB·hours, and what that costs by the configured price.

    What it costs is an estimate. The daemon notes what is stored every five minutes.
    """
    from hvsnap.cli import usage as commands

    commands.show(session, since, until, by.value, plot)


@command("store-check", STORE, example="hvsnap store-check")
def store_check(session: Session, detach: Detach = False) -> int:
    """Compare catalog and store, both ways, without reading blocks.

    Exits with 7 if snapshots suffer from what is missing.
    """
    from hvsnap.cli import store

    return store.check(session, detach=detach)


@command("store-compact", STORE, example="hvsnap store-compact --dry-run")
def store_compact(
    session: Session,
    dry_run: Annotated[bool, flag("--dry-run", help="Only tell what that would free.")] = False,
    detach: Detach = False,
) -> int:
    """Free what no snapshot refers to any more.

    The daemon does it by itself after every deletion.
    """
    from hvsnap.cli import store

    return store.compact(session, dry_run=dry_run, detach=detach)


@command("store-rekey", STORE, example="hvsnap store-rekey /etc/hvsnap/new.key")
def store_rekey(
    session: Session,
    new_key_file: Annotated[str, typer.Argument(metavar="NEW_KEY_FILE", help="The file with the new key.")],
) -> None:
    """Let another key open an encrypted store, and the present one no more, where no daemon runs.

    What is stored stays as it is. Then name the new file in store.encryption.key_file.
    """
    from hvsnap.cli import host

    host.rekey(session, new_key_file)


@command("store-rebuild", STORE, example="hvsnap store-rebuild")
def store_rebuild(
    session: Session,
    force: Annotated[bool, flag("--force", help="Also where there is a catalog that is whole; it is kept.")] = False,
) -> int:
    """Make the catalog anew from the store alone, where no daemon runs.

    Every stored block is read. Exits with 7 if something is damaged: the rest is rebuilt all the same.
    """
    from hvsnap.cli import host

    return host.rebuild(session, force=force)
