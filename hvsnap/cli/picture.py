"""The picture of `watch --mqtt`: what is known of many hosts, as lines that fit onto a terminal of any size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.text import Text

from hvsnap.cli import render
from hvsnap.cli.columns import Column, Grid, laid_out, shares
from hvsnap.cli.text import one_line, safe
from hvsnap.mqtt.board import Board, HostSeen
from hvsnap.mqtt.messages import DiskState, Health
from hvsnap.mqtt.subscriber import Link

_COLOURS = {Health.OK: "green", Health.FAILED: "red", Health.UNPROTECTED: "yellow", Health.UNUSUAL: "magenta"}

_HOST = Column("HOST", least=10, middle=True)
_GUEST = Column("GUEST", least=8, middle=True)
_WHY = Column("WHY", rank=1, least=16)

_HOSTS = (
    _HOST, Column("STATE", least=8), Column("HVSNAP", 7), Column("DISKS", 5), Column("FAILED", 1),
    Column("UNPROTECTED", 3), Column("STORED", 6), Column("NEARLY FULL", 4), Column("TROUBLES", 2),
)  # fmt: skip
_UNDER_WAY = (
    _HOST, _GUEST, Column("DISK"), Column("WHAT", 4), Column("DONE"), Column("OF", 3), Column("RATE", 2),
    Column("LEFT", 1),
)  # fmt: skip
_CHAINS = (
    _HOST, _GUEST, Column("DISK"), Column("HEALTH"), Column("NODES", 4), Column("STORED", 3),
    Column("LAST SNAPSHOT", 2), _WHY,
)  # fmt: skip
_TROUBLES = (Column("AT", 2), _HOST, Column("WHAT", least=12), _GUEST, _WHY)


def picture(board: Board, url: str, link: Link, now_s: float, size: tuple[int, int]) -> list[Text]:
    """Return what a terminal of so many columns and lines shows."""
    width, height = size
    state = Text(f"{safe(url)}: ") + (Text(one_line(link.error), "red") if link.error else Text("connected", "green"))
    if board.unreadable:
        state.append(f"  ({board.unreadable} messages of another form)", "dim")
    state.truncate(width, overflow="ellipsis")
    # What needs somebody first: a terminal that is too small loses what is merely going on.
    grids = [_hosts(board, now_s), _chains(board), _troubles(board), _under_way(board, now_s)]
    given = shares([len(grid.rows) for grid in grids], height - 1)
    shown = [line for grid, lines in zip(grids, given, strict=True) for line in laid_out(grid, lines, width)]
    return [state, *shown][:height]


def _row(*cells: object) -> list[Text]:
    """Return cells as text, never markup: names are the guests'."""
    return [cell if isinstance(cell, Text) else Text(one_line(str(cell))) for cell in cells]


def _hosts(board: Board, now_s: float) -> Grid:
    disks: dict[str, list[DiskState]] = defaultdict(list)
    for (host, _disk), one in board.disks.items():
        disks[host].append(one)
    seen = sorted(board.hosts.values(), key=lambda one: (_calm(one, disks[one.name], now_s), one.name))
    return Grid("Hosts", _HOSTS, [_host_row(one, disks[one.name], now_s) for one in seen])


def _calm(host: HostSeen, disks: Sequence[DiskState], now_s: float) -> bool:
    """Whether nobody needs to look at it."""
    well = all(one.health is Health.OK for one in disks)
    return host.presence(now_s) == "online" and well and host.free_bytes is None


def _host_row(host: HostSeen, disks: Sequence[DiskState], now_s: float) -> list[Text]:
    count = {health: sum(1 for one in disks if one.health is health) for health in Health}
    word = host.presence(now_s)
    free = "" if host.free_bytes is None else f"{render.size(host.free_bytes)} of {render.size(host.total_bytes)}"
    return _row(
        host.name,
        Text(word, "green" if word == "online" else "red"),
        "" if host.status is None else host.status.hvsnap,
        len(disks),
        Text(str(count[Health.FAILED]), "red" if count[Health.FAILED] else ""),
        Text(str(count[Health.UNPROTECTED]), "yellow" if count[Health.UNPROTECTED] else ""),
        render.size(sum(one.stored_bytes or 0 for one in disks)),
        Text(free, "yellow"),
        Text(str(host.troubles), "red" if host.troubles else ""),
    )


def _under_way(board: Board, now_s: float) -> Grid:
    rows = [
        _row(
            one.host, one.guest or "", one.target or "", one.id, f"{one.progress} %", render.size(one.total_bytes),
            f"{render.size(one.rate_bytes_s)}/s", render.duration(one.eta_s),
        )
        for one in board.live(now_s)
    ]  # fmt: skip
    return Grid("Under way", _UNDER_WAY, rows)


def _chains(board: Board) -> Grid:
    rows = []
    for one in board.attention():
        last = render.when(one.last_snapshot.created_at) if one.last_snapshot else "-"
        why = one.last_failure.error if one.last_failure else _unusual(one)
        health = Text(one.health, _COLOURS[one.health])
        stored = render.size(one.stored_bytes)
        rows.append(_row(one.host, one.guest, one.target, health, one.snapshots, stored, last, why))
    return Grid("Chains", _CHAINS, rows)


def _unusual(one: DiskState) -> str:
    return "" if one.alarm is None else f"{one.alarm.level}: see {one.alarm.snapshot}"


def _troubles(board: Board) -> Grid:
    rows = []
    for one in reversed(board.troubles):
        why = one.payload.get("error") or one.payload.get("detail") or one.payload.get("level") or ""
        guest = one.payload.get("guest") or ""
        rows.append(_row(render.when(one.at), one.host, Text(safe(one.type), "red"), guest, why))
    return Grid("Troubles since the start", _TROUBLES, rows)
