"""The agent's protocol against agents that hang, flood, lie and leave: bounded in time and memory (FAULTS 18)."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hvsnap.errors import AgentUnavailable
from hvsnap.hypervisor.agent import GuestAgent

Behave = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def agent(tmp_path: Path, behave: Behave) -> AsyncIterator[GuestAgent]:
    """Give an agent at the other end of a socket that behaves as told."""
    path = tmp_path / "agent.sock"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await behave(reader, writer)
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield GuestAgent("web01", str(path))
    finally:
        server.close()


async def synchronised(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the synchronisation, as a sane agent does."""
    request = json.loads((await reader.readline()).lstrip(b"\xff"))
    assert request["execute"] == "guest-sync-delimited"
    writer.write(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")


def answering(answer: bytes, before: bytes = b"") -> Behave:
    """Return an agent that says ``before`` first and then answers the one command with ``answer``."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(before)
        await synchronised(reader, writer)
        await reader.readline()
        writer.write(answer)
        await writer.drain()
        await reader.read()

    return behave


async def test_freezes_and_thaws(tmp_path: Path) -> None:
    async with agent(tmp_path, answering(b'{"return": 2}\n')) as guest:
        assert await guest.freeze(2) == 2
    async with agent(tmp_path, answering(b'{"return": 0}\n')) as guest:
        await guest.thaw(2)


@pytest.mark.parametrize(
    "stale",
    [
        b'{"return": 1}\n',
        b"\xff" + b'{"return": 99}\n',
        b'{"return": {}}\n\xff{"return": 5}\n\xff\xff\xff',
        bytes(range(256)) * 1000,
        b"\xff" + b"[" * 100_000 + b"\n",
        b"\xff" + b"x" * 300_000 + b"\n",
    ],
)
async def test_finds_its_place_behind_what_an_abandoned_conversation_left(tmp_path: Path, stale: bytes) -> None:
    async with agent(tmp_path, answering(b'{"return": 3}\n', stale)) as guest:
        assert await guest.freeze(3) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            b'{"error": {"class": "GenericError", "desc": "it is frozen"}}\n',
            "refuses guest-fsfreeze-freeze: it is frozen",
        ),
        (b'{"error": "' + b"e" * 5000 + b'"}\n', "refuses"),
        (b"not json\n", "answers guest-fsfreeze-freeze with b'not json'"),
        (b"[" * 60_000 + b"\n", "answers guest-fsfreeze-freeze with"),
        (b"17\n", "answers guest-fsfreeze-freeze with b'17'"),
        (b'{"return": "many"}\n', "answers the freeze with many"),
        (b'{"return": true}\n', "answers the freeze with True"),
        (b'{"return": -1}\n', "answers the freeze with -1"),
        (b"z" * 1_000_000, "with more than it was asked for"),
    ],
)
async def test_an_answer_that_is_none_is_told_and_bounded(tmp_path: Path, answer: bytes, message: str) -> None:
    async with agent(tmp_path, answering(answer)) as guest:
        with pytest.raises(AgentUnavailable) as caught:
            await guest.freeze(3)
    assert message in caught.value.message
    assert len(caught.value.message) < 300


async def test_one_that_hangs_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    async def hang(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with agent(tmp_path, hang) as guest:
        start = time.monotonic()
        with pytest.raises(AgentUnavailable, match=r"did not answer guest-fsfreeze-thaw within 0\.3 s"):
            await guest.thaw(0.3)
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("chunk", [b"flood " * 10_000, b"\xff" * 60_000, b"\xff{" * 30_000])
async def test_one_that_floods_is_given_up_at_the_deadline_in_constant_memory(tmp_path: Path, chunk: bytes) -> None:
    async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(chunk)
            await writer.drain()

    async with agent(tmp_path, flood) as guest:
        tracemalloc.start()
        with pytest.raises(AgentUnavailable, match="did not answer"):
            await guest.freeze(0.5)
        _now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 << 20


async def test_one_that_is_absent_or_leaves_is_told(tmp_path: Path) -> None:
    with pytest.raises(AgentUnavailable, match="No such file"):
        await GuestAgent("web01", str(tmp_path / "absent")).freeze(1)

    async def leave(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with agent(tmp_path, leave) as guest:
        with pytest.raises(AgentUnavailable, match="web01"):
            await guest.freeze(1)


async def test_a_shutdown_is_asked_for_without_waiting_for_an_answer(tmp_path: Path) -> None:
    asked: asyncio.Queue[bytes] = asyncio.Queue()

    async def shut_down(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await synchronised(reader, writer)
        asked.put_nowait(await reader.readline())

    async with agent(tmp_path, shut_down) as guest:
        await guest.shut_down(2)
        line = await asyncio.wait_for(asked.get(), 10)
    assert json.loads(line)["execute"] == "guest-shutdown"
