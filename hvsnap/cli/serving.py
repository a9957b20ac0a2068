"""Commands that serve snapshots as disks, in the foreground until Ctrl-C, or left to the daemon."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from hvsnap import wire
from hvsnap.cli import render
from hvsnap.cli.client import Client, DaemonError, body, place
from hvsnap.cli.session import Session
from hvsnap.errors import BadRequest, Failed

POLL_S = 1.0


def serve(session: Session, snapshot: str, *, writable: bool, detach: bool) -> int:
    """Serve a snapshot until Ctrl-C, or detached; without one list what is served. Return the exit status."""
    with session.client() as client:
        if not snapshot:
            if writable or detach:
                raise BadRequest("no snapshot is named", hint="`hvsnap snapshot-list` shows the snapshots")
            answer = client.get("/served", wire.ServedList)
            session.answer(answer, render.served(answer, headers=not session.quiet))
            return 0
        with _interruptible():
            theirs = _find(client, snapshot) is not None
            request = body(wire.SnapshotServe, writable=writable)
            one = client.post(place("snapshots", snapshot, "serve"), wire.Served, request)
            session.answer(one, one.uri)
            if detach:
                return 0
            if theirs:
                session.remark("it was served already, and stays so when this command ends")
            _stay(session, client, one, ours=not theirs)
    return 0


def unserve(session: Session, snapshot: str) -> None:
    """End it."""
    with session.client() as client:
        one = client.post(place("snapshots", snapshot, "unserve"), wire.Served)
    session.answer(one, "" if session.quiet else f"{one.snapshot} is not served any more")


def _find(client: Client, snapshot: str) -> wire.Served | None:
    found = client.get("/served", wire.ServedList).served
    return next((one for one in found if one.snapshot == snapshot), None)


def _stay(session: Session, client: Client, one: wire.Served, *, ours: bool) -> None:
    """Return after Ctrl-C, having ended it if it is ours. Raises :class:`Failed` when it ends by itself."""
    session.remark("Ctrl-C ends it")
    try:
        while _find(client, one.snapshot) is not None:
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        if ours:
            with contextlib.suppress(DaemonError):  # somebody has ended it already
                client.post(place("snapshots", one.snapshot, "unserve"), wire.Served)
        return
    raise Failed(f"{one.snapshot} is not served any more", hint="somebody has ended it, or see the daemon's log")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: nothing stays served that a script started in its foreground."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: the tests' way to run commands
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
