"""What no client of ours sends, on raw sockets: refused or hung up on, in bounded memory, while others are served.

FAULTS 24; requests that are well-formed HTTP are in tests/e2e/test_api_document.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from hvsnap.api import limits, server
from tests.api_kit import a_house, served

CREATE = b"POST /v1/snapshots HTTP/1.1\r\nHost: hvsnap\r\nContent-Type: application/json\r\n"
CHUNKED = CREATE + b"Transfer-Encoding: chunked\r\n\r\n"
PIECE = b"[" * 65536
MANY = 1024  # pieces: 64 MiB, of which at most one is taken
MEMORY_MAX = 8 << 20

MALFORMED = {
    "noise": (bytes(range(256)) * 4 + b"\r\n\r\n", 400),
    "another protocol": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n", 400),
    "no version": (b"GET /v1/status\r\n\r\n", 400),
    "no host": (b"GET /v1/status HTTP/1.1\r\n\r\n", 400),
    "a header without a colon": (b"GET /v1/status HTTP/1.1\r\nHost: hvsnap\r\nnonsense\r\n\r\n", 400),
    "a header with a zero": (b"GET /v1/status HTTP/1.1\r\nHost: hvsnap\r\na: \x00\r\n\r\n", 400),
    "a length below zero": (CREATE + b"Content-Length: -1\r\n\r\n", 400),
    "a length that is no number": (CREATE + b"Content-Length: many\r\n\r\n", 400),
    "two lengths": (CREATE + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    "a chunk of no length": (CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", 400),
    "an encoding that nobody knows": (CREATE + b"Transfer-Encoding: gzip\r\n\r\n", 400),
    "a body that is no text": (CREATE + b"Content-Length: 2\r\n\r\n\xff\xfe", 400),
    "a body nested too deep": (CREATE + b"Content-Length: 65536\r\n\r\n" + PIECE, 400),
    "a path that is no text": (b"GET /v1/snapshots/%ff%00%fe HTTP/1.1\r\nHost: hvsnap\r\n\r\n", 404),
    "a path out of the tree": (b"GET /v1/../../etc/passwd HTTP/1.1\r\nHost: hvsnap\r\n\r\n", 404),
}


@pytest.fixture
async def door(workdir: Path) -> AsyncIterator[tuple[Path, httpx.AsyncClient]]:
    path = workdir / "run" / "s"
    async with a_house(workdir / "state") as house, served(house, path) as client:
        yield path, client


async def answer(path: Path, *pieces: bytes, pause_s: float = 0.0) -> tuple[int, bytes]:
    """Send pieces as long as they are taken; return the status (0: hung up on without a word) and the whole answer."""
    reader, writer = await asyncio.open_unix_connection(path)
    reading = asyncio.create_task(reader.read(1 << 20))
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            if reading.done():
                break
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionError):
            text = await reading
            writer.close()
            return (int(text.split()[1]) if text else 0), text
    return 0, b""


@pytest.mark.parametrize(("request_", "status"), MALFORMED.values(), ids=MALFORMED)
async def test_a_malformed_request_is_the_client_s_fault(
    door: tuple[Path, httpx.AsyncClient], request_: bytes, status: int
) -> None:
    path, client = door
    got, text = await answer(path, request_)
    assert got == status, text
    assert b"Traceback" not in text
    assert (await client.get("/v1/status")).status_code == 200


@pytest.mark.parametrize(
    ("head", "piece", "statuses"),
    [
        (CREATE + b"Content-Length: 1073741824\r\n\r\n", PIECE, (413,)),
        (CHUNKED, b"10000\r\n" + PIECE + b"\r\n", (413,)),
        (b"GET /v1/status HTTP/1.1\r\nHost: hvsnap\r\n", b"x: " + PIECE + b"\r\n", (400, 431)),
        (b"GET /", PIECE, (400, 431)),
        (b"", PIECE, (400,)),
    ],
    ids=["length", "chunks", "headers", "path", "no-line"],
)
async def test_a_huge_request_is_refused_in_bounded_memory(
    door: tuple[Path, httpx.AsyncClient], head: bytes, piece: bytes, statuses: tuple[int, ...]
) -> None:
    path, client = door
    tracemalloc.start()
    try:
        got, text = await answer(path, head, *[piece] * MANY)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got in (0, *statuses), text  # whoever goes on sending may not get to read why
    assert peak < MEMORY_MAX
    assert (await client.get("/v1/status")).status_code == 200


async def test_slow_clients_are_given_up_and_nobody_waits_for_them(
    door: tuple[Path, httpx.AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, client = door
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 0.5)
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.5)
    slow = [
        answer(path, CREATE + b"Content-Length: 900\r\n\r\n", *[b"x"] * 50, pause_s=0.1),
        answer(path, b"GET /v1/sta", *[b"t"] * 50, pause_s=0.1),
        answer(path),
    ]
    waiting = [asyncio.create_task(one) for one in slow]
    while not all(task.done() for task in waiting):
        assert (await client.get("/v1/status")).status_code == 200
        await asyncio.sleep(0.05)
    assert [task.result()[0] for task in waiting] == [408, 0, 0]
