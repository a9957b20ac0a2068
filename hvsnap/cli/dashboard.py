"""`watch --mqtt`: many hosts at once, from what they publish. A picture on a terminal, lines elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from typing import Protocol

from pydantic import ValidationError
from rich.console import Console, Group
from rich.live import Live

from hvsnap import config
from hvsnap.cli import render
from hvsnap.cli.complaints import INTERRUPTED
from hvsnap.cli.picture import picture
from hvsnap.cli.session import Session, json_text, say
from hvsnap.cli.text import one_line, safe
from hvsnap.errors import BadRequest
from hvsnap.mqtt.board import Board, Message
from hvsnap.mqtt.messages import DiskState, HostStatus, ProgressReport, PublishedEvent
from hvsnap.mqtt.subscriber import Arrived, Link, subscribe

REDRAW_S = 0.5
LINE_INTERVAL_S = 5.0
"""Off a terminal, progress of one thing is told at most so often."""


def settings(url: str, prefix: str, user: str, **files: str) -> config.Mqtt:
    """Return what the options come to. Raises :class:`BadRequest`."""
    paths = {key: os.path.abspath(path) for key, path in files.items() if path}
    try:
        return config.Mqtt.model_validate({"url": url, "topic_prefix": prefix, "username": user, **paths})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = {"url": "--mqtt", "topic_prefix": "--mqtt-prefix"}.get(str(first["loc"][0]), str(first["loc"][0]))
        raise BadRequest(f"{option}: {first['msg'].removeprefix('Value error, ')}") from error


def watch(
    session: Session, guest: str, url: str, prefix: str, user: str, password_file: str, ca_file: str
) -> int:  # fmt: skip
    """Show what hosts publish until Ctrl-C, which ends it with 130."""
    if guest:
        raise BadRequest("GUEST and --mqtt exclude each other", hint="without GUEST it shows every host's guests")
    broker = settings(url, prefix, user, password_file=password_file, ca_file=ca_file)
    board = Board(broker.topic_prefix)
    show: _Show
    if session.json:
        show = _Json()
    elif sys.stdout.isatty():
        show = _Picture(board, broker.url)
    else:
        show = _Lines(quiet=session.quiet)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_watch(session, broker, board, show))
    return INTERRUPTED


async def _watch(session: Session, broker: config.Mqtt, board: Board, show: _Show) -> None:
    # Ctrl-C ends it in order: the terminal gets its cursor back, the broker a goodbye.
    if (task := asyncio.current_task()) is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    with show, contextlib.suppress(asyncio.CancelledError):
        async for one in subscribe(broker):
            if isinstance(one, Link):
                show.link(one)
                if not isinstance(show, _Picture):
                    session.remark(_told(one))
            elif (message := board.take(one.topic, one.payload, time.monotonic())) is not None:
                show.message(one, message)


def _told(link: Link) -> str:
    return f"{link.error}; next attempt in {link.pause_s:.0f} s" if link.error else "watching; Ctrl-C ends it"


class _Show(Protocol):
    """A way to show it."""

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...

    def link(self, link: Link) -> None:
        """Show that the connection came about, or was lost."""
        ...

    def message(self, arrived: Arrived, message: Message) -> None:
        """Show a message that is new."""
        ...


_KINDS = {HostStatus: "status", PublishedEvent: "event", ProgressReport: "progress", DiskState: "disk-state"}


class _Json:
    """One object a line: ``{"kind": …, "message": …}``, the message as it was published."""

    def __enter__(self) -> _Json:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def link(self, link: Link) -> None:
        pass

    def message(self, arrived: Arrived, message: Message) -> None:
        say(json_text({"kind": _KINDS[type(message)], "message": message.model_dump(mode="json")}, indent=None))


class _Lines:
    """A line for each event and each change of a host; progress now and then, never with `--quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._said: dict[str, float] = {}

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def link(self, link: Link) -> None:
        pass

    def message(self, arrived: Arrived, message: Message) -> None:
        if isinstance(message, HostStatus):
            reason = f" ({message.reason})" if message.reason else ""
            say(f"{render.when(message.at)} {safe(message.host)} {message.state}{reason}")
        elif isinstance(message, PublishedEvent):
            say(_line(message))
        elif isinstance(message, ProgressReport) and not self._quiet:
            self._progress(message)

    def _progress(self, report: ProgressReport) -> None:
        now = time.monotonic()
        if now - self._said.setdefault(report.id, now) >= LINE_INTERVAL_S:
            self._said = {name: at for name, at in self._said.items() if now - at < 600} | {report.id: now}
            rate = f"{render.size(report.rate_bytes_s)}/s"
            say(f"{render.when(report.at)} {safe(report.host)} {safe(report.id)}: {report.progress} %, {rate}")


def _line(event: PublishedEvent) -> str:
    shown = ("guest", "target", "snapshot", "name", "path", "policy", "error", "detail")
    words = " ".join(f"{key}={one_line(str(event.payload[key]))}" for key in shown if event.payload.get(key))
    return f"{render.when(event.at)} {safe(event.host)} {safe(event.type)} {words}".rstrip()


# -- the picture ----------------------------------------------------------------------------------


class _Picture:
    """Tables that are drawn anew, twice a second."""

    def __init__(self, board: Board, url: str) -> None:
        self._board = board
        self._url = url
        self._link = Link("not connected yet")
        self._console = Console()
        self._live = Live(
            get_renderable=self._draw, console=self._console, screen=True, refresh_per_second=1 / REDRAW_S
        )  # fmt: skip

    def __enter__(self) -> _Picture:
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.__exit__(None, None, None)

    def link(self, link: Link) -> None:
        self._link = link

    def message(self, arrived: Arrived, message: Message) -> None:
        pass

    def _draw(self) -> Group:
        return Group(*picture(self._board, self._url, self._link, time.monotonic(), self._console.size))
