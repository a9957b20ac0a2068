"""The daemon's side of the hook: calls on the socket and in the spool, each taken once, none believed."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from hvsnap.capture.offline import OfflineWork
from hvsnap.model import GuestUuid
from hvsnap.service.hooks import SEEN_MAX, Hooks
from hvsnap.wire import HookCall
from tests.api_kit import a_house, served
from tests.hooks.kit import Hook, domain_xml


def a_call(number: int, operation: str = "started", **changes: object) -> HookCall:
    told = {"id": f"1-{number}", "at": 1.0, "guest": "web01", "operation": operation}
    return HookCall.model_validate(told | changes)


def hooks(directory: Path) -> tuple[Hooks, list[None]]:
    woken: list[None] = []
    return Hooks(directory, lambda: woken.append(None)), woken


def test_guests_are_looked_at_after_what_may_have_changed_them(tmp_path: Path) -> None:
    one, woken = hooks(tmp_path)
    for number, operation in enumerate(["prepare", "start", "started", "stopped", "release", "what's this"]):
        one.take(a_call(number, operation))
    assert len(woken) == 3
    assert one.calls == {"prepare": 1, "start": 1, "started": 1, "stopped": 1, "release": 1, "other": 1}
    one.take(a_call(9, "prepare", refused=True))
    assert (one.refused, len(woken)) == (1, 4)


def test_a_call_that_came_both_ways_counts_once(tmp_path: Path) -> None:
    one, woken = hooks(tmp_path)
    assert [one.take(a_call(1)).known, one.take(a_call(1)).known] == [False, True]
    assert len(woken) == 1
    for number in range(2 * SEEN_MAX):
        one.take(a_call(number))
    assert len(one._seen) == SEEN_MAX


async def test_the_spool_is_taken_in_order_and_what_is_no_call_is_removed(hook: Hook) -> None:
    for operation in ("stopped", "release"):
        hook.run("web01", operation, "end", "-", xml=domain_xml("/a"))
    spool = hook.state / "spool" / "hooks"
    (spool / "0-broken.json").write_bytes(b'{"id": \xff')
    (spool / "1-large.json").write_text(json.dumps({"id": "x" * (3 << 20)}))
    os.mkfifo(spool / "2-fifo.json")
    (spool / "3-link.json").symlink_to("/etc/passwd")
    one, woken = hooks(hook.state)
    assert await asyncio.wait_for(one.read_spool(), 10) == 2
    assert list(one.calls) == ["stopped", "release"]
    assert len(woken) == 2
    assert list(spool.iterdir()) == []
    assert Path("/etc/passwd").exists()
    assert await one.read_spool() == 0


async def test_a_start_waits_for_work_on_its_images_and_no_other_call_does(workdir: Path) -> None:
    starting: list[str] = []
    came, let_go = asyncio.Event(), asyncio.Event()

    async def starts(guest: str, timeout_s: float) -> None:
        assert 0 < timeout_s < 0.35, "the hook does not wait longer"
        starting.append(guest)
        came.set()
        await let_go.wait()

    uuid = "11111111-2222-3333-4444-555555555555"
    one = Hooks(workdir, lambda: None, starts=starts)
    xml = domain_xml("/a", uuid=uuid.upper())
    for number, call in enumerate(
        [a_call(0, "start", xml=xml), a_call(1, "prepare", xml=xml, refused=True), a_call(2, "prepare", xml="<uuid>")]
    ):
        assert not (await one.answer(call)).known, number
    assert starting == []
    answering = asyncio.create_task(one.answer(a_call(3, "prepare", xml=xml)))
    await came.wait()
    assert (starting, answering.done()) == ([uuid], False)
    let_go.set()
    await answering


async def test_work_on_a_guests_images_is_waited_for_and_that_on_others_is_not() -> None:
    work = OfflineWork()
    with work.on(GuestUuid("a")), work.on(GuestUuid("b")):
        waiting = asyncio.create_task(work.ended(GuestUuid("a"), 60))
        await asyncio.sleep(0)
        await work.ended(GuestUuid("a"), 0.001)
        await work.ended(GuestUuid("c"), 60)
        assert not waiting.done()
    await waiting


@pytest.fixture
def hook(workdir: Path) -> Hook:
    return Hook(workdir)


async def test_the_script_and_the_api_understand_each_other(hook: Hook) -> None:
    """The largest and strangest that the script sends is a call that the API takes."""
    async with a_house(hook.state) as house, served(house, hook.socket):
        for xml in (domain_xml("/a"), b'"\\\x01' * (1 << 20), b""):
            ran = await asyncio.to_thread(hook.run, b"web\xff01", "started", "begin", "-", xml=xml)
            assert ran.status == 0
        assert house.service.hooks.calls == {"started": 3}
    assert hook.spooled() == []
