"""How things look: pure functions."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import BaseModel

from hvsnap import wire
from hvsnap.cli import render, watching
from hvsnap.cli.client import body, place
from hvsnap.cli.snapshots import parse_others, parse_tags
from hvsnap.cli.text import one_line, safe
from hvsnap.errors import BadRequest


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (150 * 1024, "150 KiB"),
        (2**40, "1.0 TiB"),
        (2**60, "1024 PiB"),
    ],
)
def test_sizes(value: float | None, text: str) -> None:
    assert render.size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.4, "0 s"), (59, "59 s"), (61, "1:01 min"), (3600, "1:00 h"), (7500, "2:05 h")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert render.duration(seconds) == text


def test_a_table_is_aligned_whatever_the_script() -> None:
    text = render.table(("A", "B"), [("漢字", "1"), ("é", "2"), ("e\u0301", "3"), ("abcd", "4")])
    lines = text.splitlines()
    assert lines == ["A      B", "漢字   1", "é      2", "e\u0301      3", "abcd   4"]
    assert render.table(("A", "B"), [], headers=False) == ""
    assert render.table(("A", "B"), [("x", "")], headers=False) == "x"


@pytest.mark.parametrize(
    "evil", ["\x1b[31m", "\x07", "\x9b31m", "\u202e", "\u2066", "\r", "\n", "\x00", "\x7f", "\u200b"]
)
def test_nothing_that_a_terminal_obeys_gets_through(evil: str) -> None:
    assert evil[0] not in safe(f"a{evil}b")
    assert evil[0] not in one_line(f"a{evil}b")
    assert evil[0] not in render.fields([("Name", f"a{evil}b")])
    assert evil[0] not in render.table(("A",), [(f"a{evil}b",)], headers=False)


def test_what_people_write_is_left_alone() -> None:
    for text in ("before upgrade", "машина", "漢字", "é", "🙂"):
        assert safe(text) == text


def test_an_event_is_one_line_in_a_fixed_order() -> None:
    event = wire.Event(
        sequence=1,
        id="x",
        type="snapshot.failed",
        at=datetime(2026, 5, 1, tzinfo=UTC),
        payload={"error": "full\n\x1b", "snapshot": "s-a", "guest": "web01", "other": "not shown", "name": ""},
    )
    assert render.event(event).endswith("snapshot.failed guest=web01 snapshot=s-a error=full\\x0a\\x1b")


def test_a_user_s_word_stays_one_part_of_a_path() -> None:
    assert place("snapshots", "s-a", "cancel") == "/snapshots/s-a/cancel"
    assert place("chains", "/images/a b.qcow2") == "/chains/%2Fimages%2Fa%20b%2Eqcow2"
    assert place("snapshots", "..") == "/snapshots/%2E%2E"
    assert place("snapshots", "a?b#c%2e") == "/snapshots/a%3Fb%23c%252e"
    for wrong in ("", "x" * 4097):
        with pytest.raises(BadRequest):
            place("snapshots", wrong)


def test_a_request_that_cannot_be_is_wrong_usage() -> None:
    assert body(wire.DiskCreate, snapshot="s-a", path="/x").format == "qcow2"
    for kind, fields in [(wire.DiskCreate, {"snapshot": "s-a", "path": 7}), (wire.SnapshotDelete, {"ids": []})]:
        model: type[BaseModel] = kind
        with pytest.raises(BadRequest):
            body(model, **fields)


def test_tags_are_pairs() -> None:
    assert parse_tags(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}


def test_further_guests_are_named_with_or_without_their_disks() -> None:
    found = parse_others(["web01", "app01/vda", "app01//images/b.qcow2", "0b5a1d7e-0000-4000-8000-000000000001"])
    assert [(one.guest, one.disks) for one in found] == [
        ("web01", []),
        ("app01", ["vda", "/images/b.qcow2"]),
        ("0b5a1d7e-0000-4000-8000-000000000001", []),
    ]


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([""], "names no guest"),
        (["/vda"], "names no guest"),
        (["web01/"], "names no disk"),
        (["web01", "web01"], "asked for twice"),
        (["web01", "web01/vda"], "asked for twice"),
        (["web01/vda", "web01"], "asked for twice"),
    ],
)
def test_further_guests_that_are_not_named_clearly_are_wrong_usage(texts: list[str], why: str) -> None:
    with pytest.raises(BadRequest, match=why) as refused:
        parse_others(texts)
    assert refused.value.hint


@pytest.mark.parametrize(("ms", "shown"), [(0.0, "none"), (12.301, "at most 12.4 ms"), (0.001, "at most 0.1 ms")])
def test_a_skew_is_never_shown_smaller_than_it_is(ms: float, shown: str) -> None:
    assert render.skew(ms).startswith(shown)
    assert ms == 0 or render.bound(ms) == shown


def test_watch_off_a_terminal_tells_progress_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at = [100.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: at[0])
    lines = watching._Lines(quiet=False)
    for second in range(13):
        at[0] = 100.0 + second
        for name in ("s-a", "s-b"):
            lines.progress(
                wire.Progress(id=name, progress=second, done_bytes=second, total_bytes=100, rate_bytes_s=0, eta_s=None)
            )
    out = capsys.readouterr().out.splitlines()
    assert out == [f"{name}: {percent} % of 100 B" for percent in (5, 10) for name in ("s-a", "s-b")]
