"""Completion: the names of guests, disks and snapshots, from the daemon, if it answers within a second.

A completion never fails aloud. Only words that no shell would interpret are offered: names come from guests, and the
code that completes in some shells evaluates what it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from hvsnap.cli.session import Session

if TYPE_CHECKING:
    from hvsnap.cli.client import Client

TIMEOUT_S = 1.0
SNAPSHOTS_MAX = 200
"""The newest ones; nobody chooses from more."""

_PLAIN = re.compile(r"[\w./+@%:,][\w./+@%:,-]*")
_PLAIN_HELP = re.compile(r"[\w./+@%:, -]*")

Words = list[tuple[str, str]]


def plain(words: Words, incomplete: str) -> Words:
    """Return the words that begin as what was typed and that no shell interprets, each once."""
    found = {
        word: note if _PLAIN_HELP.fullmatch(note) else ""
        for word, note in words
        if word.startswith(incomplete) and _PLAIN.fullmatch(word)
    }
    return list(found.items())


@contextmanager
def _daemon(ctx: typer.Context) -> Iterator[Client]:
    outer = ctx.find_root()
    session = outer.obj if isinstance(outer.obj, Session) else Session()
    for params in (outer.params, ctx.params):
        session = session.overlaid(connect="", config=params.get("config"), as_json=False, quiet=True)
    with session.client(timeout_s=TIMEOUT_S) as client:
        yield client


def _offered(found: Callable[[Client, typer.Context], Words]) -> Callable[[typer.Context, str], Words]:
    """Make a completion of a function that asks the daemon."""

    def complete(ctx: typer.Context, incomplete: str) -> Words:
        try:
            with _daemon(ctx) as client:
                return plain(found(client, ctx), incomplete)
        except Exception:
            return []  # a word that is not completed is better than an error in the middle of a command line

    return complete


@_offered
def guests(client: Client, _ctx: typer.Context) -> Words:
    """Return the guests' names."""
    from hvsnap import wire  # noqa: PLC0415 - it is slow to import, and most completions are of commands

    return [(guest.name, guest.state) for guest in client.get("/guests", wire.GuestList).guests]


@_offered
def disks_of_guest(client: Client, ctx: typer.Context) -> Words:
    """Return the targets of the disks of the guest that was typed before."""
    from hvsnap import wire  # noqa: PLC0415 - as above

    named = ctx.params.get("guest")
    typed = ctx.params.get("disks") or ()
    return [
        (disk.target, disk.path)
        for guest in client.get("/guests", wire.GuestList).guests
        if named in (guest.name, guest.uuid)
        for disk in guest.disks
        if disk.target not in typed
    ]


@_offered
def disks(client: Client, _ctx: typer.Context) -> Words:
    """Return the disks that have a chain, as GUEST/TARGET and by their ids."""
    from hvsnap import wire  # noqa: PLC0415 - as above

    chains = client.get("/chains", wire.ChainList).chains
    words = [(f"{chain.guest}/{chain.target}", chain.disk) for chain in chains if not chain.released]
    return words + [(chain.disk, f"{chain.guest}/{chain.target}") for chain in chains]


@_offered
def attached_disks(client: Client, _ctx: typer.Context) -> Words:
    """Return the disks of all guests as GUEST/TARGET."""
    from hvsnap import wire  # noqa: PLC0415 - as above

    found = client.get("/guests", wire.GuestList).guests
    return [(f"{guest.name}/{disk.target}", disk.path) for guest in found for disk in guest.disks]


@_offered
def images(client: Client, _ctx: typer.Context) -> Words:
    """Return the images' names and ids."""
    from hvsnap import wire  # noqa: PLC0415 - as above

    found = client.get("/images", wire.ImageList).images
    return [(one.name, one.id) for one in found] + [(one.id, one.name) for one in found]


@_offered
def policies(client: Client, _ctx: typer.Context) -> Words:
    """Return the policies' names."""
    from hvsnap import wire  # noqa: PLC0415 - as above

    found = client.get("/policies", wire.PolicyList).policies
    return [(one.name, f"{len(one.disks)} disks") for one in found]


@_offered
def served(client: Client, _ctx: typer.Context) -> Words:
    """Return the ids of the snapshots that are served."""
    from hvsnap import wire  # noqa: PLC0415 - as above

    return [(one.snapshot, f"{one.guest}/{one.target}") for one in client.get("/served", wire.ServedList).served]


@_offered
def snapshots(client: Client, _ctx: typer.Context) -> Words:
    """Return the ids of the newest snapshots, with their names."""
    return _newest(client)


@_offered
def snapshots_of_disk(client: Client, ctx: typer.Context) -> Words:
    """Return the ids of the newest snapshots of the disk that was typed before."""
    return _newest(client, disk=str(ctx.params.get("disk") or ""))


@_offered
def under_way(client: Client, _ctx: typer.Context) -> Words:
    """Return the ids of the tasks that run, and of the snapshots that are being made."""
    from hvsnap import wire  # noqa: PLC0415 - as above

    tasks = client.get("/tasks", wire.TaskList).tasks
    made = client.get("/snapshots", wire.SnapshotList, state="progressing", limit=SNAPSHOTS_MAX).snapshots
    running = [(one.id, f"{one.kind} {one.subject}") for one in tasks if one.state is wire.TaskState.RUNNING]
    return running + [(one.id, f"{one.guest}/{one.target}") for one in made]


def guests_and_disks(ctx: typer.Context, incomplete: str) -> Words:
    """Return the guests' names, and their disks as GUEST/TARGET."""
    return guests(ctx, incomplete) + attached_disks(ctx, incomplete)


def sources(ctx: typer.Context, incomplete: str) -> Words:
    """Return what a disk can be made of: images and the newest snapshots."""
    return images(ctx, incomplete) + snapshots(ctx, incomplete)


def _newest(client: Client, disk: str = "") -> Words:
    from hvsnap import wire  # noqa: PLC0415 - as above

    answer = client.get("/snapshots", wire.SnapshotList, disk=disk, limit=SNAPSHOTS_MAX)
    return [(one.id, one.name) for one in answer.snapshots]
