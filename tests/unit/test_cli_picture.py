"""The dashboard on terminals of any size: it fits, names are recognisable, ids are whole, what matters is there."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from hvsnap.cli.columns import GAP, HEAD_LINES, LEGIBLE, Column, Grid, fitting, shares, shortened
from hvsnap.cli.picture import picture
from hvsnap.mqtt.board import Board
from hvsnap.mqtt.messages import Absence, DiskState, Health, HostStatus, LastFailure, Presence, ProgressReport
from hvsnap.mqtt.subscriber import Link

AT = datetime(2026, 5, 1, 12, tzinfo=UTC)
SNAPSHOT = "s-lbyfszmmvhdc"
ERROR = "there is no space left on the device of the store, and nothing that could be given back"


def a_board(hosts: int) -> Board:
    """A fleet: long names that differ at their end; the last host is away, the one before has a disk that failed."""
    board = Board("hvsnap")
    for number in range(hosts):
        name = f"hypervisor-rack{number % 4}-frankfurt-{number:03d}"
        gone = hosts > 1 and number == hosts - 1
        state, reason = (Presence.OFFLINE, Absence.LOST) if gone else (Presence.ONLINE, None)
        status = HostStatus(host=name, state=state, reason=reason, at=None if gone else AT, hvsnap="0.1.0")
        board.take(f"hvsnap/{name}/status", status.to_json(), 0.0)
        failed = hosts > 2 and number == hosts - 2
        one = DiskState(
            host=name, at=AT, guest=f"customer-database-production-{number:03d}", guest_uuid="u",
            disk=f"d-{number:012d}".replace("0", "a").replace("1", "b"), target="vda", system=True, size_bytes=1 << 36,
            health=Health.FAILED if failed else Health.OK, snapshots=7, stored_bytes=number << 30, last_snapshot=None,
            last_failure=LastFailure(id=SNAPSHOT, at=AT, error=ERROR) if failed else None, alarm=None,
        )  # fmt: skip
        board.take(f"hvsnap/{name}/guest/g/disk/{one.disk}/state", one.to_json(), 0.0)
    report = ProgressReport(
        host="hypervisor-rack0-frankfurt-000", at=AT, id=SNAPSHOT, disk="d-a", guest="customer-database-production-000",
        guest_uuid="u", target="vda", progress=3, done_bytes=3, total_bytes=100 << 30, rate_bytes_s=2e8, eta_s=501.0,
    )  # fmt: skip
    board.take(f"hvsnap/{report.host}/snapshot/{SNAPSHOT}/progress", report.to_json(), 0.0)
    return board


def shown(board: Board, width: int, height: int) -> list[str]:
    return [line.plain for line in picture(board, "mqtts://broker.example.org", Link(""), 1.0, (width, height))]


@pytest.mark.parametrize("hosts", [0, 1, 5, 40])
@pytest.mark.parametrize("width", [20, 60, 80, 120, 200])
@pytest.mark.parametrize("height", [1, 2, 4, 8, 24, 60])
def test_it_fits(hosts: int, width: int, height: int) -> None:
    lines = shown(a_board(hosts), width, height)
    assert 1 <= len(lines) <= height
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("width", [60, 80])
def test_names_stay_recognisable_and_ids_are_whole_or_absent(width: int) -> None:
    text = "\n".join(shown(a_board(5), width, 24))
    for number in range(5):
        assert f"-{number:03d}" in text, text
    assert "hyperv" in text
    assert "custo" in text
    for index, _char in enumerate(text):
        if text.startswith("s-", index) and text[index - 1] in " \n":
            assert text.startswith(SNAPSHOT, index), text[index : index + 20]
    assert "failed" in text
    assert width < 80 or "there is no" in text
    assert "offline" in text


def test_what_needs_somebody_is_there_when_the_terminal_is_small() -> None:
    lines = shown(a_board(40), 80, 12)
    assert "Hosts, 2 of 40" in lines[1]
    assert "-038" in lines[3]
    assert "-039" in lines[4]
    assert "offline" in lines[4]
    assert any("-038" in line and "failed" in line for line in lines[5:])
    assert shown(a_board(40), 40, 3)[1:] == ["Hosts: 40", "Chains: 40"]


def test_on_a_wide_terminal_nothing_is_left_out() -> None:
    text = "\n".join(shown(a_board(5), 200, 60))
    for name in ("HVSNAP", "UNPROTECTED", "STORED", "TROUBLES", "NODES", "LAST SNAPSHOT", "RATE"):
        assert name in text
    assert ERROR in text
    assert SNAPSHOT in text
    assert "…" not in text


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 80))
def test_lines_are_shared_out(rows: list[int], lines: int) -> None:
    given_ = shares(rows, lines)
    assert sum(given_) <= lines
    assert all(after == 0 for before, after in pairwise(given_) if before == 0)
    for count, mine in zip(rows, given_, strict=True):
        assert mine <= (HEAD_LINES + count if count else 1)
        assert mine in (0, 1) or mine > HEAD_LINES
    # Titles first, then heads with a row from the front, then rows.
    assert sum(given_) == min(lines, sum(HEAD_LINES + count if count else 1 for count in rows)) or 1 in given_
    assert lines < len(rows) or 0 not in given_


@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(1, 200))
def test_columns_fit_where_they_can(lengths: list[int], width: int) -> None:
    columns = tuple(
        Column(f"C{i}", rank=i, least=8 if i == 0 else 0, middle=i == 0) for i, _length in enumerate(lengths)
    )
    rows = [[Text("x" * length) for length in lengths]]
    widths = fitting(Grid("t", columns, rows), rows, width)
    assert 0 in widths
    taken = sum(widths.values()) + GAP * (len(widths) - 1)
    assert taken <= width or (list(widths) == [0] and widths[0] <= 8)
    assert list(widths) == list(range(len(widths))), "the highest rank goes first"
    if widths[0] < min(lengths[0], LEGIBLE):
        assert list(widths) == [0]


@given(st.text(max_size=40), st.integers(0, 30), st.booleans())
def test_a_shortened_text_takes_its_place_and_no_more(text: str, width: int, middle: bool) -> None:
    assert cell_len(shortened(text, width, middle=middle)) == width


def test_both_ends_of_a_name_stay() -> None:
    assert shortened("hypervisor-rack1-007", 11, middle=True) == "hyper…1-007"
    assert shortened("hypervisor-rack1-007", 11, middle=False) == "hypervisor…"
