"""The guest agent of a bare guest, on its own socket: freezing and thawing, whatever the guest answers.

The agent runs inside the guest and is not trusted: it may hang, flood, or answer garbage. Every call is bounded in time
and memory. QEMU's agent protocol (``qga/qapi-schema.json``, "guest-sync-delimited") has a way to find one's place in
what an earlier, abandoned conversation left in the channel: everything up to a byte 0xFF and an answer with our random
number is thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

from hvsnap.errors import AgentUnavailable

MARK = b"\xff"
CHUNK_BYTES = 65536
ANSWER_BYTES_MAX = 65536
"""An answer to what is asked here has some dozen bytes; the rest is a flood."""


class GuestAgent:
    """One guest's agent. A connection lives for one call: QEMU's socket has room for a single client."""

    def __init__(self, guest: str, socket: str) -> None:
        self._guest = guest
        self._socket = socket

    async def freeze(self, timeout_s: float) -> int:
        """Freeze file systems, and return how many were. One that timed out may have happened all the same."""
        answer = await self._call("guest-fsfreeze-freeze", timeout_s)
        if not isinstance(answer, int) or isinstance(answer, bool) or answer < 0:
            raise AgentUnavailable(f"the agent of guest {self._guest} answers the freeze with {_shown(answer)}")
        return answer

    async def thaw(self, timeout_s: float) -> None:
        """Thaw file systems; thawed ones are no error."""
        await self._call("guest-fsfreeze-thaw", timeout_s)

    async def shut_down(self, timeout_s: float) -> None:
        """Ask the guest to power off. There is no answer to wait for when it does."""
        async with self._deadline("guest-shutdown", timeout_s), self._connected() as (reader, writer):
            await self._synchronise(reader, writer)
            await _send(writer, {"execute": "guest-shutdown", "arguments": {"mode": "powerdown"}})

    async def _call(self, command: str, timeout_s: float) -> Any:
        """Run one command; raises :class:`AgentUnavailable` with what stood in the way."""
        async with self._deadline(command, timeout_s), self._connected() as (reader, writer):
            await self._synchronise(reader, writer)
            await _send(writer, {"execute": command})
            return self._result(command, await self._line(reader))

    @contextlib.asynccontextmanager
    async def _deadline(self, command: str, timeout_s: float) -> AsyncIterator[None]:
        """Bound a whole conversation, and tell in the same way of all that can end it."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            why = f"the agent of guest {self._guest} did not answer {command} within {timeout_s:g} s"
            raise AgentUnavailable(why) from error
        except (OSError, EOFError) as error:
            why = getattr(error, "strerror", None) or "it closed the connection"
            raise AgentUnavailable(f"the agent socket {self._socket} of guest {self._guest}: {why}") from error

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_unix_connection(self._socket, limit=CHUNK_BYTES)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _synchronise(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Find our place in the channel. Constant memory: what precedes the mark is dropped as it comes."""
        number = secrets.randbits(31)
        writer.write(MARK)
        await _send(writer, {"execute": "guest-sync-delimited", "arguments": {"id": number}})
        while True:
            while MARK not in (data := await _read(reader)):
                pass
            # A stale answer may be marked, too: only our own number counts.
            line = data[data.rindex(MARK) + 1 :]
            while b"\n" not in line and len(line) < ANSWER_BYTES_MAX:
                line += await _read(reader)
                line = line[line.rfind(MARK) + 1 :]
            answer = _parsed(line.partition(b"\n")[0])
            if isinstance(answer, dict) and answer.get("return") == number:
                return

    async def _line(self, reader: asyncio.StreamReader) -> bytes:
        data = b""
        while b"\n" not in data:
            data += await _read(reader)
            if len(data) > ANSWER_BYTES_MAX:
                raise AgentUnavailable(f"the agent of guest {self._guest} answers with more than it was asked for")
        return data[: data.index(b"\n")]

    def _result(self, command: str, line: bytes) -> Any:
        answer = _parsed(line)
        if not isinstance(answer, dict) or ("return" not in answer and "error" not in answer):
            raise AgentUnavailable(f"the agent of guest {self._guest} answers {command} with {_shown(line)}")
        if "error" in answer:
            error = answer["error"]
            why = error.get("desc") if isinstance(error, dict) else error
            raise AgentUnavailable(f"the agent of guest {self._guest} refuses {command}: {_shown(why)}")
        return answer["return"]


def _parsed(line: bytes) -> Any:
    """Return what a line holds; None for what is no JSON, or nested to bring a parser down."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


async def _send(writer: asyncio.StreamWriter, request: dict[str, Any]) -> None:
    writer.write(json.dumps(request).encode() + b"\n")
    await writer.drain()


async def _read(reader: asyncio.StreamReader) -> bytes:
    data = await reader.read(CHUNK_BYTES)
    if not data:
        raise EOFError
    return data


def _shown(value: object) -> str:
    """Return a bounded, printable form of what a guest said."""
    text = ascii(value)[1:-1] if isinstance(value, str) else ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
