"""Commands that look into the file systems of a snapshot, and copy out of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hvsnap import wire
from hvsnap.cli import files_shown
from hvsnap.cli.appliance import Appliance, appliance, check_installed
from hvsnap.cli.client import Client
from hvsnap.cli.files_shown import Pace
from hvsnap.cli.placing import Copies, plan_copies
from hvsnap.cli.serving import interruptible
from hvsnap.cli.session import Session, say
from hvsnap.cli.text import safe
from hvsnap.errors import BadRequest, Failed, HvsnapError

PRINTED = "-"
"""The target that stands for the standard output."""

_FILES_HINT = "for example s-mfrggzdfmztw:/etc/fstab"


@dataclass(frozen=True, slots=True)
class Place:
    """A snapshot, and a path in it; without one the snapshot itself is meant."""

    snapshot: str
    path: str


def place_of(text: str) -> Place:
    """Return what `SNAPSHOT[:/PATH]` names. Raises :class:`BadRequest`."""
    snapshot, colon, path = text.partition(":")
    if not snapshot:
        raise BadRequest(f"{text!a} names no snapshot", hint=_FILES_HINT)
    if colon and not path.startswith("/"):
        raise BadRequest(f"the path after {snapshot}: begins with /", hint=_FILES_HINT)
    if {".", ".."} & set(path.split("/")):
        raise BadRequest("a path in a snapshot has neither . nor .. in it", hint=_FILES_HINT)
    return Place(snapshot, path)


# -- looking --------------------------------------------------------------------------------------


def ls(session: Session, text: str, *, filesystem: str, recursive: bool) -> None:
    """Show the file systems of a snapshot, or what lies in a directory of it."""
    place = place_of(text)
    if not place.path and (filesystem or recursive):
        raise BadRequest("that goes with a path in the snapshot", hint=f"{place.snapshot}:/ is all of it")
    check_installed()
    with _opened(session, place.snapshot) as (_client, one, pace):
        if not place.path:
            found = _done(one.ask({"do": "filesystems"}), pace)
            systems = wire.FileSystemList.model_validate({"snapshot": place.snapshot, **found})
            session.answer(systems, files_shown.filesystems(systems, headers=not session.quiet))
            return
        request = {"do": "list", "filesystem": filesystem, "path": place.path, "recursive": recursive}
        files: list[wire.GuestFile] = []
        headers = not session.quiet
        for message in one.ask(request):
            listed = [wire.GuestFile.model_validate(entry) for entry in message.get("entries", [])]
            if session.json:
                files += listed
            elif "entries" in message:
                pace.stop()
                say(files_shown.files(listed, recursive=recursive, headers=headers))
                headers = False
        if session.json:
            device = message["done"]["filesystem"]
            answer = wire.FileList(snapshot=place.snapshot, filesystem=device, path=place.path, files=files)
            session.answer(answer, "")


# -- copying --------------------------------------------------------------------------------------


def cp(session: Session, sources: Sequence[str], target: str, *, filesystem: str, force: bool) -> None:
    """Copy files and directories out of a snapshot."""
    places = [place_of(source) for source in sources]
    first = places[0].snapshot
    if any(place.snapshot != first for place in places):
        raise BadRequest("the sources are of several snapshots", hint="copy from one after the other")
    if not all(place.path for place in places):
        raise BadRequest(f"what of {first} is to be copied is not said", hint=f"{first}:/ is all of it")
    paths = [place.path for place in places]
    if target == PRINTED:
        _print(session, first, paths, filesystem)
        return
    # All that can be wrong about the target is said before anything starts.
    with plan_copies(first, paths, target, force=force) as copies:
        check_installed()
        _copy(session, first, copies, filesystem)


def _copy(session: Session, snapshot: str, copies: Copies, filesystem: str) -> None:
    with _opened(session, snapshot) as (_client, one, pace):
        request = {"do": "copy", "filesystem": filesystem, "into": str(copies.passing), "sources": copies.sources}
        done = _done(one.ask(request), pace)
    copies.settle()
    targets = [str(target) for target in copies.targets]
    tally = done.pop("tally")
    skipped = [{"path": path, "kind": kind} for path, kind in tally.pop("skipped")]
    answer = wire.FilesCopied.model_validate(
        {"snapshot": snapshot, "targets": targets, "skipped": skipped, **done, **tally}
    )
    session.answer(answer, "\n".join(map(safe, targets)) if session.quiet else files_shown.copied(answer))
    for note in files_shown.notes(answer):
        session.remark(note)


def _print(session: Session, snapshot: str, paths: Sequence[str], filesystem: str) -> None:
    """Write a file, or a directory as a tar stream, to the standard output."""
    if len(paths) > 1:
        raise BadRequest("only one source at a time is written to the standard output")
    if session.json:
        raise BadRequest("--json and what is copied cannot both go to the standard output", hint="name a target")
    check_installed()
    sys.stdout.flush()
    with (
        files_shown.output() as (descriptor, archive),
        _opened(session, snapshot, [descriptor]) as (_client, one, pace),
    ):
        request = {"do": "print", "filesystem": filesystem, "path": paths[0], "descriptor": descriptor}
        _done(one.ask(request | {"archive": archive}), pace)


# -- the process that reads -----------------------------------------------------------------------


@contextlib.contextmanager
def _opened(session: Session, snapshot: str, outputs: Sequence[int] = ()) -> Iterator[tuple[Client, Appliance, Pace]]:
    """Have a snapshot served and read by libguestfs as long as the block lasts; nothing is left of either."""
    with session.client() as client, interruptible():
        served: wire.Served | None = None
        try:
            with client.looking(snapshot, wire.SnapshotServe()) as told:
                served = next(told, None)
                if served is None:
                    raise _gone(snapshot)
                try:
                    with appliance(served.uri, outputs) as one, Pace(quiet=session.quiet) as pace:
                        pace.show("starting libguestfs")
                        _done(one.messages(), pace)
                        yield client, one, pace
                except HvsnapError as error:
                    if error.exit_status == Failed.exit_status and not _still(client, snapshot):
                        raise _gone(snapshot) from error
                    raise
        finally:
            if served is not None:
                with contextlib.suppress(HvsnapError):
                    client.let_go(served)


def _done(messages: Iterator[dict[str, Any]], pace: Pace) -> dict[str, Any]:
    """Follow messages to the last one, and return what it holds."""
    for message in messages:
        if "progress" in message:
            pace.copied(**message["progress"])
    found: dict[str, Any] = message["done"]
    return found


def _still(client: Client, snapshot: str) -> bool:
    listed = client.get("/served", wire.ServedList).served
    return any(one.snapshot == snapshot for one in listed)


def _gone(snapshot: str) -> Failed:
    return Failed(f"{snapshot} is not served any more", hint="somebody has ended it, or see the daemon's log")
