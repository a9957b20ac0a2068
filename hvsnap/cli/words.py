"""Completion: the names of guests, disks and snapshots, from the daemon, if it answers within a second.

A completion never fails aloud. Only words that no shell would interpret are offered: names come from guests, and the
code that completes in some shells evaluates what it is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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


def guests(ctx: typer.Context, incomplete: str) -> Words:
    """Return the guests' names."""
    try:
        from hvsnap import wire  # noqa: PLC0415 - it is slow to import, and most completions are of commands

        with _daemon(ctx) as client:
            answer = client.get("/guests", wire.GuestList)
            return plain([(guest.name, guest.state) for guest in answer.guests], incomplete)
    except Exception:
        return []  # a word that is not completed is better than an error in the middle of a command line


def disks_of_guest(ctx: typer.Context, incomplete: str) -> Words:
    """Return the targets of the disks of the guest that was typed before."""
    try:
        from hvsnap import wire  # noqa: PLC0415 - as above

        named = ctx.params.get("guest")
        typed = ctx.params.get("disks") or ()
        with _daemon(ctx) as client:
            answer = client.get("/guests", wire.GuestList)
        words = [
            (disk.target, disk.path)
            for guest in answer.guests
            if named in (guest.name, guest.uuid)
            for disk in guest.disks
            if disk.target not in typed
        ]
        return plain(words, incomplete)
    except Exception:
        return []


def disks(ctx: typer.Context, incomplete: str) -> Words:
    """Return the disks that have a chain, as GUEST/TARGET and by their ids."""
    try:
        from hvsnap import wire  # noqa: PLC0415 - as above

        with _daemon(ctx) as client:
            chains = client.get("/chains", wire.ChainList).chains
        words = [(f"{chain.guest}/{chain.target}", chain.disk) for chain in chains if not chain.released]
        return plain(words + [(chain.disk, f"{chain.guest}/{chain.target}") for chain in chains], incomplete)
    except Exception:
        return []


def attached_disks(ctx: typer.Context, incomplete: str) -> Words:
    """Return the disks of all guests as GUEST/TARGET."""
    try:
        from hvsnap import wire  # noqa: PLC0415 - as above

        with _daemon(ctx) as client:
            guests_now = client.get("/guests", wire.GuestList).guests
        words = [(f"{guest.name}/{disk.target}", disk.path) for guest in guests_now for disk in guest.disks]
        return plain(words, incomplete)
    except Exception:
        return []


def guests_and_disks(ctx: typer.Context, incomplete: str) -> Words:
    """Return the guests' names, and their disks as GUEST/TARGET."""
    return guests(ctx, incomplete) + attached_disks(ctx, incomplete)


def images(ctx: typer.Context, incomplete: str) -> Words:
    """Return the images' names and ids."""
    try:
        from hvsnap import wire  # noqa: PLC0415 - as above

        with _daemon(ctx) as client:
            answer = client.get("/images", wire.ImageList).images
        return plain([(one.name, one.id) for one in answer] + [(one.id, one.name) for one in answer], incomplete)
    except Exception:
        return []


def policies(ctx: typer.Context, incomplete: str) -> Words:
    """Return the policies' names."""
    try:
        from hvsnap import wire  # noqa: PLC0415 - as above

        with _daemon(ctx) as client:
            answer = client.get("/policies", wire.PolicyList)
        return plain([(one.name, f"{len(one.disks)} disks") for one in answer.policies], incomplete)
    except Exception:
        return []


def served(ctx: typer.Context, incomplete: str) -> Words:
    """Return the ids of the snapshots that are served."""
    try:
        from hvsnap import wire  # noqa: PLC0415 - as above

        with _daemon(ctx) as client:
            answer = client.get("/served", wire.ServedList)
        return plain([(one.snapshot, f"{one.guest}/{one.target}") for one in answer.served], incomplete)
    except Exception:
        return []


def snapshots(ctx: typer.Context, incomplete: str) -> Words:
    """Return the ids of the newest snapshots, with their names."""
    return _snapshots(ctx, incomplete, disk="")


def under_way(ctx: typer.Context, incomplete: str) -> Words:
    """Return the ids of the tasks that run, and of the snapshots that are being made."""
    try:
        from hvsnap import wire  # noqa: PLC0415 - as above

        with _daemon(ctx) as client:
            tasks = client.get("/tasks", wire.TaskList).tasks
            made = client.get("/snapshots", wire.SnapshotList, state="progressing", limit=SNAPSHOTS_MAX).snapshots
        running = [(one.id, f"{one.kind} {one.subject}") for one in tasks if one.state is wire.TaskState.RUNNING]
        return plain(running + [(one.id, f"{one.guest}/{one.target}") for one in made], incomplete)
    except Exception:
        return []


def sources(ctx: typer.Context, incomplete: str) -> Words:
    """Return what a disk can be made of: images and the newest snapshots."""
    return images(ctx, incomplete) + snapshots(ctx, incomplete)


def snapshots_of_disk(ctx: typer.Context, incomplete: str) -> Words:
    """Return the ids of the newest snapshots of the disk that was typed before."""
    return _snapshots(ctx, incomplete, disk=str(ctx.params.get("disk") or ""))


def _snapshots(ctx: typer.Context, incomplete: str, disk: str) -> Words:
    try:
        from hvsnap import wire  # noqa: PLC0415 - as above

        with _daemon(ctx) as client:
            answer = client.get("/snapshots", wire.SnapshotList, disk=disk, limit=SNAPSHOTS_MAX)
        return plain([(one.id, one.name) for one in answer.snapshots], incomplete)
    except Exception:
        return []
