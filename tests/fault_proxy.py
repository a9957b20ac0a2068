"""A small HTTP proxy in front of an S3 endpoint that makes what networks and gateways do wrong, on demand.

Faults are taken from a list, one for each request that passes; without one the request goes through untouched:
``503`` and ``429`` answer so without asking the endpoint; ``reset`` drops the connection before, ``lost`` after the
endpoint has carried the request out; ``hang`` says nothing for ever; ``drip`` sends the answer byte by byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

DRIP_S = 0.02


@dataclass
class FaultProxy:
    """Listens on :attr:`port`; ``faults`` are used up in order, ``seen`` has what was asked for, method and path."""

    upstream_port: int
    port: int = 0
    faults: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, a request at a time."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head, body = await _message(reader)
                self.seen.append(" ".join(head.split(b"\r\n")[0].decode().split()[:2]))
                fault = self.faults.pop(0) if self.faults else ""
                if fault == "hang":
                    await asyncio.sleep(3600)
                if fault == "reset":
                    break
                if fault in ("503", "429"):
                    writer.write(f"HTTP/1.1 {fault} Fault\r\nContent-Length: 0\r\n\r\n".encode())
                    await writer.drain()
                    continue
                answer = await self._ask(head, body)
                if fault == "lost":
                    break
                if fault == "drip":
                    for at in range(len(answer)):
                        writer.write(answer[at : at + 1])
                        await writer.drain()
                        await asyncio.sleep(DRIP_S)
                    continue
                writer.write(answer)
                await writer.drain()
        _reset(writer)

    async def _ask(self, head: bytes, body: bytes) -> bytes:
        """Ask the endpoint, on a connection of its own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        try:
            writer.write(head + body)
            await writer.drain()
            method = head.split(b" ", 1)[0]
            answer_head, answer_body = await _message(reader, without_body=method == b"HEAD")
            return answer_head + answer_body
        finally:
            writer.close()


async def _message(reader: asyncio.StreamReader, *, without_body: bool = False) -> tuple[bytes, bytes]:
    """Read one request or answer whose length is announced."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
        if line.startswith(b"transfer-encoding:") and b"chunked" in line and not without_body:
            return head, await _chunks(reader)
    return head, b"" if without_body or not length else await reader.readexactly(length)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while True:
        line = await reader.readline()
        body += line
        size = int(line.strip() or b"0", 16)
        body += await reader.readexactly(size + 2)
        if size == 0:
            return body


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a reset: the other side must not take it for a regular end."""
    with contextlib.suppress(OSError):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


@contextlib.asynccontextmanager
async def fault_proxy(upstream_port: int) -> AsyncIterator[FaultProxy]:
    """Run a proxy for as long as the context lasts."""
    proxy = FaultProxy(upstream_port)
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0, limit=1 << 26)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
