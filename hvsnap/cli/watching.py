"""`watch`: events and progress as they happen."""

from __future__ import annotations

import shutil
import sys
import time

from hvsnap import wire
from hvsnap.cli import render
from hvsnap.cli.complaints import INTERRUPTED
from hvsnap.cli.session import Session, json_text, say
from hvsnap.errors import DaemonUnreachable

LINE_INTERVAL_S = 5.0
"""Off a terminal, progress of one thing is told at most so often."""

FORGOTTEN_S = 600.0


def watch(session: Session, guest: str) -> int:
    """Print what happens until Ctrl-C, which ends it with 130, or until the daemon ends, which is an error."""
    show = _Json() if session.json else _Lines(quiet=session.quiet)
    with session.client() as client:
        if guest:
            client.get("/snapshots", wire.SnapshotList, guest=guest, limit=1)  # raises if there is no such guest
        try:
            for item in client.events(guest):
                if item.event is not None:
                    show.event(item.event)
                elif item.progress is not None:
                    show.progress(item.progress)
                elif sys.stderr.isatty():  # the stream stands
                    session.remark("watching; Ctrl-C ends it")
        except KeyboardInterrupt:
            return INTERRUPTED
        finally:
            show.end()
    raise DaemonUnreachable("the daemon has ended", hint="start it again, and `hvsnap watch`")


class _Json:
    """One object a line: ``{"event": …}`` or ``{"progress": …}``."""

    def event(self, event: wire.Event) -> None:
        say(json_text({"event": event.model_dump(mode="json")}, indent=None))

    def progress(self, progress: wire.Progress) -> None:
        say(json_text({"progress": progress.model_dump(mode="json")}, indent=None))

    def end(self) -> None:
        pass


class _Lines:
    """A line for each event; progress in place on a terminal, now and then elsewhere, never with `--quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._live = sys.stdout.isatty()
        self._said: dict[str, float] = {}

    def event(self, event: wire.Event) -> None:
        self.end()
        say(render.event(event))

    def progress(self, progress: wire.Progress) -> None:
        if self._quiet:
            return
        text = render.progress(progress)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write(f"\r\x1b[K{text[:width]}")
            sys.stdout.flush()
            return
        now = time.monotonic()
        # What is quickly done is told by its events alone.
        if now - self._said.setdefault(progress.id, now) >= LINE_INTERVAL_S:
            self._said = {name: at for name, at in self._said.items() if now - at < FORGOTTEN_S} | {progress.id: now}
            say(text)

    def end(self) -> None:
        """Take the line of progress away."""
        if self._live:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()
