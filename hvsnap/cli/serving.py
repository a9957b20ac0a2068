"""Commands that serve snapshots as disks, in the foreground until Ctrl-C, or left to the daemon."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from hvsnap import wire
from hvsnap.cli import render
from hvsnap.cli.client import Client, body, place
from hvsnap.cli.session import Session
from hvsnap.errors import BadRequest, Failed, HvsnapError


def serve(session: Session, snapshot: str, *, writable: bool, detach: bool) -> int:
    """Serve a snapshot until Ctrl-C, or detached; without one list what is served. Return the exit status."""
    with session.client() as client:
        if not snapshot:
            if writable or detach:
                raise BadRequest("no snapshot is named", hint="`hvsnap snapshot-list` shows the snapshots")
            answer = client.get("/served", wire.ServedList)
            session.answer(answer, render.served(answer, headers=not session.quiet))
            return 0
        request = body(wire.SnapshotServe, writable=writable)
        if detach:
            one = client.post(place("snapshots", snapshot, "serve"), wire.Served, request)
            session.answer(one, one.uri)
        else:
            _stay(session, client, snapshot, request)
    return 0


def unserve(session: Session, snapshot: str) -> None:
    """End it."""
    with session.client() as client:
        one = client.post(place("snapshots", snapshot, "unserve"), wire.Served)
    session.answer(one, "" if session.quiet else f"{one.snapshot} is not served any more")


def _stay(session: Session, client: Client, snapshot: str, request: wire.SnapshotServe) -> None:
    """Have it served, and return after Ctrl-C. Raises :class:`Failed` when it ends by itself."""
    one: wire.Served | None = None
    try:
        with interruptible(), client.looking(snapshot, request) as told:
            for now in told:
                if one is None:
                    if now.stays:
                        session.remark("it is served already, and stays so when this command ends")
                    session.remark("Ctrl-C ends it")
                    session.answer(now, now.uri)
                one = now
    except KeyboardInterrupt:
        if one is not None:
            with contextlib.suppress(HvsnapError):
                client.let_go(one)
        return
    raise Failed(f"{snapshot} is not served any more", hint="somebody has ended it, or see the daemon's log")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
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
