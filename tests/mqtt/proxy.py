"""A TCP proxy before mosquitto that knows MQTT's packets: for what a real broker cannot be made to do on demand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

CONNECT, PUBLISH, PUBACK, DISCONNECT = 1, 3, 4, 14

Packet = bytes
Filter = Callable[[Packet], Packet | None]
"""Takes a packet, returns what goes on in its place; None cuts the connection."""


def kind(packet: Packet) -> int:
    return packet[0] >> 4


def protocol_level(connect: Packet) -> int:
    """Return the version that a CONNECT asks for: 4 is 3.1.1, 5 is 5."""
    name = connect.index(b"\x00\x04MQTT")
    return connect[name + 6]


async def read_packet(reader: asyncio.StreamReader) -> Packet:
    packet = await reader.readexactly(2)
    length, shift = packet[1] & 0x7F, 7
    while packet[-1] & 0x80:
        packet += await reader.readexactly(1)
        length |= (packet[-1] & 0x7F) << shift
        shift += 7
    return packet + await reader.readexactly(length)


class MqttProxy:
    """Passes packets through ``to_broker`` and ``to_client``. ``answer`` may answer a CONNECT in the broker's place."""

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        self.port = 0
        self.connects: list[Packet] = []
        self.to_broker: Filter = lambda packet: packet
        self.to_client: Filter = lambda packet: packet
        self.answer: Callable[[Packet], bytes | None] = lambda connect: None
        self.silent = False
        self.overhear: list[bytes] | None = None
        """Takes the first bytes of each connection, which is then passed on without a look at its packets."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                if self.silent:
                    await reader.read()
                    return
                if self.overhear is not None:
                    await self._overhear(self.overhear, reader, writer)
                    return
                connect = await read_packet(reader)
                self.connects.append(connect)
                answer = self.answer(connect)
                if answer is not None:
                    writer.write(answer)
                    await writer.drain()
                    return
                await self._pass(connect, reader, writer)
        finally:
            writer.close()

    async def _overhear(self, said: list[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(65536)
        said.append(first)
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        try:
            upstream_writer.write(first)
            writer.write(await upstream_reader.read(65536))
        finally:
            upstream_writer.close()

    async def _pass(self, connect: Packet, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        upstream_writer.write(connect)
        both = [
            asyncio.create_task(self._pump(reader, upstream_writer, self._through_to_broker)),
            asyncio.create_task(self._pump(upstream_reader, writer, self._through_to_client)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            upstream_writer.close()

    def _through_to_broker(self, packet: Packet) -> Packet | None:
        return self.to_broker(packet)

    def _through_to_client(self, packet: Packet) -> Packet | None:
        return self.to_client(packet)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, through: Filter) -> None:
        while True:
            packet = through(await read_packet(reader))
            if packet is None:
                return
            if packet:
                writer.write(packet)
                await writer.drain()


@contextlib.asynccontextmanager
async def proxied(upstream_port: int) -> AsyncIterator[MqttProxy]:
    proxy = MqttProxy(upstream_port)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await proxy.serve(reader, writer)
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
