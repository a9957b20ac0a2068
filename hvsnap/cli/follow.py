"""Following long work: a live bar on a terminal, plain lines otherwise; Ctrl-C asks what is meant."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from hvsnap.cli import render
from hvsnap.cli.client import Client, DaemonError, place
from hvsnap.cli.text import safe
from hvsnap.errors import HvsnapError, Refused

POLL_S = 0.5
POLL_S_FIRST = 0.05
LINE_INTERVAL_S = 5.0
PROGRESS_S = 0.1
"""Progress comes often; ten looks a second are enough for anybody's eyes. What has happened is looked at at once."""


@dataclass(frozen=True, slots=True)
class Sight:
    """One thing that is followed, as it is now."""

    id: str
    title: str
    done_bytes: int
    total_bytes: int
    percent: int
    rate_bytes_s: float | None
    eta_s: float | None
    ended: bool


class Look(Protocol):
    """Asks the daemon how far all of it is: the truth, whatever a stream has said or missed."""

    def __call__(self) -> list[Sight]:
        """Return what is followed, in a fixed order."""
        ...


class _Waker:
    """Listens to the event stream in a thread, so that the end of something is seen at once."""

    def __init__(self, client: Client) -> None:
        self.woken = threading.Event()
        self._client = client.another()
        self._ended = False
        threading.Thread(target=self._listen, name="events", daemon=True).start()

    def stop(self) -> None:
        """End the stream; the thread ends with it."""
        self._ended = True
        self._client.hang_up()

    def _listen(self) -> None:
        last = time.monotonic()
        try:
            for item in self._client.events():
                if self._ended:
                    break
                now = time.monotonic()
                if item.event is not None or now - last >= PROGRESS_S:
                    last = now
                    self.woken.set()
        except HvsnapError:
            pass  # polling goes on, and says what is wrong
        finally:
            self._client.close()


def _line(sight: Sight) -> str:
    rate = f", {render.size(sight.rate_bytes_s)}/s" if sight.rate_bytes_s else ""
    eta = f", {render.duration(sight.eta_s)} left" if sight.eta_s else ""
    amount = f" of {render.size(sight.total_bytes)}" if sight.total_bytes else ""
    return f"{safe(sight.title)}: {sight.percent} %{amount}{rate}{eta}"


def _amounts(sight: Sight) -> str:
    """Return bytes, rate and time left as the daemon knows them: it has seen all of it, we may have come late."""
    if not sight.total_bytes:
        return ""
    words = [f"{render.size(sight.done_bytes)} of {render.size(sight.total_bytes)}"]
    words += [f"{render.size(sight.rate_bytes_s)}/s"] if sight.rate_bytes_s else []
    words += [f"{render.duration(sight.eta_s)} left"] if sight.eta_s else []
    return ", ".join(words)


class _Plain:
    """A line now and then, on stderr, for logs."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[float, str]] = {}

    def show(self, sights: Sequence[Sight]) -> None:
        now = time.monotonic()
        for sight in sights:
            line = _line(sight)
            # What is quickly done is told by its end alone.
            last, said = self._said.setdefault(sight.id, (now, ""))
            if now - last >= LINE_INTERVAL_S and line != said and not sight.ended:
                self._said[sight.id] = (now, line)
                sys.stderr.write(line + "\n")
                sys.stderr.flush()


class _Bars:
    """A bar for each thing, redrawn in place."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[amounts]}"),
            console=Console(stderr=True),
        )
        self._bars: dict[str, TaskID] = {}
        self._progress.start()

    def show(self, sights: Sequence[Sight]) -> None:
        for sight in sights:
            title, amounts = escape(safe(sight.title)), _amounts(sight)
            if sight.id not in self._bars:
                self._bars[sight.id] = self._progress.add_task(title, total=None, amounts="")
            total = sight.total_bytes or (1 if sight.ended else None)
            done = total if sight.ended and sight.percent == 100 else sight.done_bytes
            self._progress.update(self._bars[sight.id], description=title, total=total, completed=done, amounts=amounts)

    def stop(self) -> None:
        self._progress.stop()


def follow(client: Client, look: Look, *, quiet: bool, cancel: Callable[[], None], leave_hint: str) -> None:
    """Return when all of it has ended. ``cancel`` is called when the user wants that after Ctrl-C.

    Raises :class:`KeyboardInterrupt` when the user leaves it running.
    """
    waker = _Waker(client)
    bars = _Bars() if sys.stderr.isatty() and not quiet else None
    display = bars or _Plain()
    pause_s = POLL_S_FIRST
    try:
        while True:
            try:
                sights = look()
                if not quiet:
                    display.show(sights)
                if all(sight.ended for sight in sights):
                    return
                waker.woken.wait(pause_s)
                waker.woken.clear()
                pause_s = min(POLL_S, pause_s * 1.5)
            except KeyboardInterrupt:
                if bars is not None:
                    bars.stop()
                if not _wants_cancel(leave_hint):
                    raise
                cancel()
                bars = None
                display = _Plain()
    finally:
        waker.stop()
        if bars is not None:
            bars.stop()


def cancel(client: Client, room: str, name: str, answer: type[BaseModel]) -> None:
    """Cancel, unless it has ended by itself or with another of its group: following it shows how."""
    try:
        client.post(place(room, name, "cancel"), answer)
    except DaemonError as error:
        if error.error.code != Refused.code:
            raise


def _wants_cancel(leave_hint: str) -> bool:
    """Ask whether Ctrl-C means to cancel; where nobody can answer, the work goes on."""
    if sys.stdin.isatty():
        sys.stderr.write("\nCancel it? It goes on in the daemon otherwise. [y/N] ")
        sys.stderr.flush()
        try:
            if sys.stdin.readline().strip().lower() in ("y", "yes"):
                return True
        except KeyboardInterrupt:
            pass
    sys.stderr.write(f"it goes on in the daemon: {leave_hint}\n")
    return False
