"""One connection to one QEMU's QMP socket: made when needed, kept, made anew; what is absent is told from what is deaf.

QEMU's socket has room for a single client, and says nothing to a second one: it accepts its connection in the kernel
only. So a greeting that does not come in time means that another program holds the socket (or that QEMU hangs).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError, Runstate

from hvsnap.errors import HypervisorFailed, HypervisorUnreachable

GREETING_S = 3.0
COMMAND_S = 30.0
"""A transaction waits for the disks' requests in flight, and a slow disk takes its time."""

DEAF_S = 10.0
"""How long a socket that did not greet is left alone: each look would wait for :data:`GREETING_S`."""

LOOK_S = 2.0
RETRY_S_FIRST = 0.5
RETRY_S_MAX = 10.0

_PEER = struct.Struct("3i")  # struct ucred: process, user, group

# What it logs as errors are our findings: an absent guest is none.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

OnEvent = Callable[[str, dict[str, Any]], None]
"""Called with a QMP event's name and data, in asyncio's thread."""


class GuestAway(HypervisorFailed):
    """The guest's QEMU is not at the other end. Not :class:`HypervisorUnreachable`: the next look tells more."""


class GuestOff(GuestAway):
    """Nothing listens at the socket: the guest's QEMU does not exist."""


class ConnectionLost(GuestAway):
    """QEMU closed the connection: it has ended, or will answer another one."""


class QmpConnection:
    """Commands to one QEMU. Safe to use from several tasks: QEMU answers in order."""

    def __init__(self, guest: str, path: str, on_event: OnEvent, on_change: Callable[[], None]) -> None:
        self.guest = guest
        self._socket = path
        self._on_event = on_event
        self._on_change = on_change
        self._client: QMPClient | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._lost = asyncio.Event()
        self._deaf_until = 0.0
        self.number = 0
        """Counts connections: another number may be another QEMU."""

        self.directory = ""
        """QEMU's own directory, where relative paths of images start; empty where it cannot be told."""

        self.instance = ""
        """Names QEMU's process: its number, and when it began; empty where it cannot be told."""

    @property
    def up(self) -> bool:
        """Whether there is a connection now."""
        return self._client is not None and self._client.runstate == Runstate.RUNNING

    async def connect(self) -> None:
        """Connect, if there is no connection.

        Raises :class:`GuestOff`, :class:`HypervisorFailed` for a socket that another program holds, and
        :class:`HypervisorUnreachable` for any other reason.
        """
        async with self._connecting:
            if self.up:
                return
            await self._drop()
            if time.monotonic() < self._deaf_until:
                raise self._deaf()
            client = QMPClient(self.guest)
            try:
                async with asyncio.timeout(GREETING_S):
                    await client.connect(await self._reach())
            except TimeoutError as error:
                self._deaf_until = time.monotonic() + DEAF_S
                raise self._deaf() from error
            except ConnectError as error:
                raise self._refused(error.exc) from error
            except OSError as error:
                raise self._refused(error) from error
            self._client = client
            self.number += 1
            self._lost.clear()
            self._watcher = asyncio.create_task(self._watch(client), name=f"qmp-{self.guest}")
        self._on_change()

    async def execute(self, command: str, /, **arguments: Any) -> Any:
        """Run one command and return its answer. Keys with dashes go through ``**{...}``.

        Raises :class:`HypervisorFailed` with QEMU's words; :class:`ConnectionLost` when the connection was lost on the
        way, :class:`HypervisorUnreachable` when the answer did not come: whether it took effect is then unknown.
        """
        await self.connect()
        client = self._client
        if client is None:
            raise self._gone(command)
        try:
            async with asyncio.timeout(COMMAND_S):
                return await client.execute(command, arguments)
        except ExecuteError as error:
            raise HypervisorFailed(f"QEMU: {command}: {error}") from error
        except TimeoutError as error:
            await self.close()
            why = f"the QEMU of guest {self.guest} did not answer {command} within {COMMAND_S:.0f} s"
            raise HypervisorUnreachable(why, hint="look whether it hangs, or its disks do") from error
        except (QMPError, OSError, EOFError) as error:
            raise self._gone(command) from error

    def send_fd(self, fd: int) -> None:
        """Pass a file descriptor; ``getfd`` gives it a name."""
        if self._client is None:
            raise self._gone("getfd")
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as error:
            raise self._gone("getfd") from error

    async def keep_up(self) -> None:
        """Keep the connection up until cancelled, with growing pauses while the guest is off or does not answer."""
        pause_s = RETRY_S_FIRST
        while True:
            try:
                await self.connect()
            except (HypervisorFailed, HypervisorUnreachable):
                await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
                pause_s = min(RETRY_S_MAX, pause_s * 2)
            else:
                pause_s = RETRY_S_FIRST
                await self._lost.wait()

    async def close(self) -> None:
        """Close the connection; commands in flight end as unreachable."""
        async with self._connecting:
            await self._drop()

    # -- inside -----------------------------------------------------------------------------------

    async def _reach(self) -> socket.socket:
        """Return a connected socket, having asked the kernel who listens at the other end."""
        reached = socket.socket(socket.AF_UNIX)
        try:
            reached.setblocking(False)
            await asyncio.get_running_loop().sock_connect(reached, self._socket)
            peer = reached.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        except BaseException:
            reached.close()
            raise
        self.directory, self.instance = _process(_PEER.unpack(peer)[0])
        return reached

    async def _watch(self, client: QMPClient) -> None:
        """Pass events on until the connection ends."""
        changed = asyncio.ensure_future(client.runstate_changed())
        try:
            while client.runstate == Runstate.RUNNING:
                event = asyncio.ensure_future(client.events.get())
                # The time-out is for a connection that ended before its change of state was waited for.
                await asyncio.wait([event, changed], timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    continue
                message = event.result()
                data = message.get("data", {})
                self._on_event(str(message["event"]), data if isinstance(data, dict) else {})
        finally:
            changed.cancel()
            self._lost.set()
            self._on_change()

    async def _drop(self) -> None:
        """Forget the present client. Its end may be an error of its own, which says nothing new."""
        client, self._client = self._client, None
        watcher, self._watcher = self._watcher, None
        if client is not None:
            with contextlib.suppress(QMPError, OSError, EOFError):
                await client.disconnect()
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()
            await asyncio.wait([watcher])

    def _deaf(self) -> HypervisorFailed:
        return HypervisorFailed(
            f"the QMP socket {self._socket} of guest {self.guest} takes connections and says nothing: "
            "another program holds it, or QEMU hangs",
            hint="give hvsnap a QMP socket of its own: QEMU's -qmp may be given several times",
        )

    def _refused(self, cause: Exception) -> HypervisorFailed | HypervisorUnreachable:
        if isinstance(cause, FileNotFoundError | ConnectionRefusedError | EOFError | ConnectionResetError):
            return GuestOff(f"guest {self.guest} is off: nothing listens at {self._socket}")
        if isinstance(cause, BlockingIOError):  # as many wait to be accepted as the socket has room for
            self._deaf_until = time.monotonic() + DEAF_S
            return self._deaf()
        why = getattr(cause, "strerror", None) or str(cause)
        hint = "check who may use the socket, and that it is QMP and not another protocol"
        return HypervisorUnreachable(f"the QMP socket {self._socket} of guest {self.guest}: {why}", hint=hint)

    def _gone(self, command: str) -> ConnectionLost:
        return ConnectionLost(f"the QEMU of guest {self.guest} was lost at {command}", hint="is it still running?")


def _process(pid: int) -> tuple[str, str]:
    """Return a process's directory and its name for ever; empty for one that is gone, or in another namespace."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            began = file.read().rpartition(b")")[2].split()[19]  # proc(5): starttime, in ticks since the boot
        return os.readlink(f"/proc/{pid}/cwd"), f"{pid}.{began.decode()}"
    except (OSError, IndexError):
        return "", ""
