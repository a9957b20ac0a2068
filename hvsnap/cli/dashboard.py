"""`watch --mqtt`: many hosts at once, from what they publish. A picture on a terminal, lines elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from typing import Any, Protocol

from pydantic import ValidationError
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hvsnap import config
from hvsnap.cli import render
from hvsnap.cli.complaints import INTERRUPTED
from hvsnap.cli.session import Session, json_text, say
from hvsnap.cli.text import one_line, safe
from hvsnap.errors import BadRequest
from hvsnap.mqtt.board import Board, Message
from hvsnap.mqtt.messages import DiskState, Health, HostStatus, ProgressReport, PublishedEvent
from hvsnap.mqtt.subscriber import Arrived, Link, subscribe

REDRAW_S = 0.5
LINE_INTERVAL_S = 5.0
"""Off a terminal, progress of one thing is told at most so often."""

ROWS_MAX = 12
"""Of each table, so that all of them fit; the rest is counted."""

_COLOURS = {Health.OK: "green", Health.FAILED: "red", Health.UNPROTECTED: "yellow", Health.UNUSUAL: "magenta"}


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
        self._live = Live(
            get_renderable=self._draw, console=Console(), screen=True, refresh_per_second=1 / REDRAW_S
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
        return picture(self._board, self._url, self._link, time.monotonic())


def picture(board: Board, url: str, link: Link, now_s: float) -> Group:
    """Return what a terminal shows."""
    state = Text(f" {safe(url)}: ") + (Text(one_line(link.error), "red") if link.error else Text("connected", "green"))
    if board.unreadable:
        state.append(f"  ({board.unreadable} messages of another form)", "dim")
    return Group(state, _hosts(board, now_s), _under_way(board, now_s), _chains(board), _troubles(board))


def _table(title: str, names: list[str], rows: list[list[Any]]) -> Table:
    more = f", {ROWS_MAX} of {len(rows)}" if len(rows) > ROWS_MAX else ""
    table = Table(title=f"{title}{more}", title_justify="left", expand=True, box=None, header_style="bold")
    for name in names:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for row in rows[:ROWS_MAX]:
        # Text, never markup: names are the guests'.
        table.add_row(*(cell if isinstance(cell, Text) else Text(one_line(str(cell))) for cell in row))
    return table


def _hosts(board: Board, now_s: float) -> Table:
    rows = []
    for host in sorted(board.hosts.values(), key=lambda one: one.name):
        disks = board.of_host(host.name)
        count = {health: sum(1 for one in disks if one.health is health) for health in Health}
        word = host.presence(now_s)
        stored = sum(one.stored_bytes or 0 for one in disks)
        free = "" if host.free_bytes is None else f"{render.size(host.free_bytes)} of {render.size(host.total_bytes)}"
        version = "" if host.status is None else host.status.hvsnap
        rows.append(
            [
                host.name, Text(word, "green" if word == "online" else "red"), version, len(disks),
                Text(str(count[Health.FAILED]), "red" if count[Health.FAILED] else ""),
                Text(str(count[Health.UNPROTECTED]), "yellow" if count[Health.UNPROTECTED] else ""),
                render.size(stored), Text(free, "yellow"), Text(str(host.troubles), "red" if host.troubles else ""),
            ]
        )  # fmt: skip
    names = ["HOST", "STATE", "HVSNAP", "DISKS", "FAILED", "UNPROTECTED", "STORED", "NEARLY FULL", "TROUBLES"]
    return _table("Hosts", names, rows)


def _under_way(board: Board, now_s: float) -> Table:
    rows = [
        [one.host, one.guest or "", one.target or "", one.id, f"{one.progress} %", render.size(one.total_bytes),
         f"{render.size(one.rate_bytes_s)}/s", render.duration(one.eta_s)]
        for one in board.live(now_s)
    ]  # fmt: skip
    return _table("Under way", ["HOST", "GUEST", "DISK", "WHAT", "DONE", "OF", "RATE", "LEFT"], rows)


def _chains(board: Board) -> Table:
    rows = []
    for one in board.attention():
        last = render.when(one.last_snapshot.created_at) if one.last_snapshot else "-"
        why = one.last_failure.error if one.last_failure else _unusual(one)
        health = Text(one.health, _COLOURS[one.health])
        rows.append(
            [one.host, one.guest, one.target, health, one.snapshots, render.size(one.stored_bytes), last, why]
        )  # fmt: skip
    return _table("Chains", ["HOST", "GUEST", "DISK", "HEALTH", "NODES", "STORED", "LAST SNAPSHOT", "WHY"], rows)


def _unusual(one: DiskState) -> str:
    return "" if one.alarm is None else f"{one.alarm.level}: see {one.alarm.snapshot}"


def _troubles(board: Board) -> Table:
    rows = [
        [render.when(one.at), one.host, Text(safe(one.type), "red"), one.payload.get("guest") or "",
         one.payload.get("error") or one.payload.get("detail") or one.payload.get("level") or ""]
        for one in reversed(board.troubles)
    ]  # fmt: skip
    return _table("Troubles since the start", ["AT", "HOST", "WHAT", "GUEST", "WHY"], rows)
