"""One connection to libvirt: its event loop in a thread, its blocking calls in threads, reconnecting.

libvirt allows one event loop implementation in a process, for ever; its own default one runs here in a daemon thread
of its own, so that keep-alives and events work whatever asyncio does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import libvirt

from hvsnap.errors import GuestUnknown, HypervisorFailed, HypervisorUnreachable

T = TypeVar("T")

THREADS = 8
KEEPALIVE_S = 5
KEEPALIVE_MISSES = 3
RETRY_S_MAX = 30.0

_LOST = {
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_INVALID_CONN,
    libvirt.VIR_ERR_SYSTEM_ERROR,
}
_LOST_DOMAINS = {libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE}

_event_loop_started = threading.Event()
_event_loop_lock = threading.Lock()


def _start_event_loop() -> None:
    """Register and run libvirt's default event loop, once for the process."""
    with _event_loop_lock:
        if _event_loop_started.is_set():
            return
        libvirt.virEventRegisterDefaultImpl()
        libvirt.registerErrorHandler(lambda _context, _error: None, None)  # errors are raised, not printed

        def loop() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        threading.Thread(target=loop, name="hvsnap-libvirt-events", daemon=True).start()
        _event_loop_started.set()


def translate(error: libvirt.libvirtError) -> HypervisorFailed | HypervisorUnreachable | GuestUnknown:
    """Return our error for libvirt's: unreachable, unknown guest, or its own words."""
    code, domain = error.get_error_code(), error.get_error_domain()
    message = error.get_error_message() or str(error)
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return GuestUnknown(message)
    if domain in _LOST_DOMAINS and code in _LOST | {libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_RPC}:
        return HypervisorUnreachable(f"libvirt does not answer: {message}", hint="is libvirtd running?")
    return HypervisorFailed(f"libvirt: {message}")


Lifecycle = Callable[[str, int, int], None]
"""Called in asyncio's thread with a guest's UUID and libvirt's event and detail numbers."""


class LibvirtConnection:
    """Keeps a connection to ``uri`` open; :meth:`call` runs a function with it in a thread."""

    def __init__(self, uri: str, on_lifecycle: Lifecycle | None = None) -> None:
        self.uri = uri
        self._on_lifecycle = on_lifecycle
        self._connection: Any = None
        self._opened = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="hvsnap-libvirt")
        self._loop = asyncio.get_running_loop()

    async def call(self, function: Callable[[Any], T]) -> T:
        """Run ``function(connection)`` in a thread, connecting first if needed.

        Raises :class:`HypervisorUnreachable` when libvirt cannot be reached or was lost on the way: whether the
        call took effect is then unknown.
        """

        def work() -> T:
            try:
                return function(self._connected())
            except libvirt.libvirtError as error:
                raise translate(error) from error

        return await self._loop.run_in_executor(self._threads, work)

    async def reconnect_loop(self, on_connected: Callable[[], None] | None = None) -> None:
        """Keep the connection up until cancelled, with growing pauses while libvirt is away."""
        pause_s = 0.5
        told = 0
        while True:
            try:
                alive = await self.call(lambda connection: bool(connection.isAlive()))
            except (HypervisorUnreachable, HypervisorFailed):
                alive = False
            # Any call connects anew, so after a short absence this loop never sees libvirt away: count the connections.
            opened = self._opened
            if alive and opened != told:
                told = opened
                if on_connected is not None:
                    on_connected()
            pause_s = 2.0 if alive else min(RETRY_S_MAX, pause_s * 2)
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))

    async def close(self) -> None:
        """Close the connection; calls in flight end first."""
        await asyncio.to_thread(self._threads.shutdown, wait=True)
        with self._lock, contextlib.suppress(libvirt.libvirtError):
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    # -- in threads -------------------------------------------------------------------------------

    def _connected(self) -> Any:
        with self._lock:
            if self._connection is not None:
                with contextlib.suppress(libvirt.libvirtError):
                    if self._connection.isAlive():
                        return self._connection
                with contextlib.suppress(libvirt.libvirtError):
                    self._connection.close()
                self._connection = None
            _start_event_loop()
            try:
                connection = libvirt.open(self.uri)
            except libvirt.libvirtError as error:
                why = error.get_error_message()
                raise HypervisorUnreachable(
                    f"cannot connect to {self.uri}: {why}", hint="is libvirtd running, and may this user use it?"
                ) from error
            connection.setKeepAlive(KEEPALIVE_S, KEEPALIVE_MISSES)
            if self._on_lifecycle is not None:
                connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None)
            self._connection = connection
            self._opened += 1
            return connection

    def _lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
        callback = self._on_lifecycle
        if callback is not None:
            with contextlib.suppress(RuntimeError):  # asyncio's loop is closed: the daemon is ending
                self._loop.call_soon_threadsafe(callback, domain.UUIDString(), event, detail)
