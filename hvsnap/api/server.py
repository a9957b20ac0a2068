"""The daemon's Unix socket, and uvicorn on it."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from hvsnap.api.peers import STATE, peer_of
from hvsnap.errors import ConfigInvalid, Failed, StoreBusy

BACKLOG = 128
CONNECTIONS_MAX = 256
REQUEST_TIMEOUT_S = 15.0
"""How long a connection may say nothing, or not finish its request's head."""

GRACE_S = 5
PROBE_TIMEOUT_S = 2.0
PATH_BYTES_MAX = 107  # sizeof(sockaddr_un.sun_path) - 1


class Listening(Protocol):
    """A socket that connections come to."""

    @property
    def socket(self) -> socket.socket:
        """The socket itself."""
        ...

    def close(self) -> None:
        """Listen no more."""
        ...


class ListeningSocket:
    """A Unix socket that exists under its name only once it is ready, and whose name goes with it."""

    def __init__(self, path: Path, sock: socket.socket) -> None:
        self.path = path
        self._socket = sock
        self._identity = _identity(path)

    @property
    def socket(self) -> socket.socket:
        """The socket itself."""
        return self._socket

    def close(self) -> None:
        """Close it; the name is removed unless somebody else has taken it over."""
        with contextlib.suppress(FileNotFoundError):
            if _identity(self.path) == self._identity:
                self.path.unlink()
        self._socket.close()


def _identity(path: Path) -> tuple[int, int]:
    seen = path.lstat()
    return seen.st_dev, seen.st_ino


def listen(path: Path, group: str = "") -> ListeningSocket:
    """Listen at ``path``: mode 0660, of ``group`` if one is named, in a directory of mode 0750 if it must be made.

    The socket of a dead daemon is replaced. Raises :class:`StoreBusy` when a living one answers there,
    :class:`ConfigInvalid` for a path or group that cannot be used. Blocking, at start only.
    """
    if len(os.fsencode(path)) > PATH_BYTES_MAX - len(".new"):
        raise ConfigInvalid(f"socket: {path} is too long", hint=f"at most {PATH_BYTES_MAX - 4} bytes are possible")
    gid = _group_id(group)
    try:
        _prepare_directory(path.parent, gid)
        _check_free(path)
        return _bind(path, gid)
    except OSError as error:
        hint = "check `socket` in the configuration, and the permissions of its directory"
        raise Failed(f"cannot listen at {path}: {error.strerror or error}", hint=hint) from error


def _group_id(group: str) -> int:
    """Return a group's number, -1 for none."""
    if not group:
        return -1
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        hint = f"create it (groupadd {group}), or name another in the configuration"
        raise ConfigInvalid(f"there is no group {group}", hint=hint) from error


def _prepare_directory(directory: Path, gid: int) -> None:
    """Make the directory; one that exists belongs to whoever made it, and stays as it is."""
    if not directory.exists():
        directory.mkdir(parents=True)
        os.chown(directory, -1, gid)
        directory.chmod(0o750)


def _check_free(path: Path) -> None:
    """Raise unless nothing, or only the socket of a dead daemon, is at ``path``."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigInvalid(f"{path} exists and is no socket", hint="remove it, or name another `socket`")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return  # its daemon is dead: the new name will take its place
        except TimeoutError:
            pass  # it is alive, and very busy
    raise StoreBusy(f"another daemon answers at {path}", hint="stop it first, or name another `socket`")


def _bind(path: Path, gid: int) -> ListeningSocket:
    """Bind under a passing name and move it into place: nobody ever finds a socket with other permissions."""
    passing = path.with_name(path.name + ".new")
    passing.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(passing))
        os.chown(passing, -1, gid)
        passing.chmod(0o660)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        passing.rename(path)
    except BaseException:
        sock.close()
        passing.unlink(missing_ok=True)
        raise
    return ListeningSocket(path, sock)


class ListeningTcp:
    """A TCP socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @property
    def socket(self) -> socket.socket:
        """The socket itself."""
        return self._socket

    def close(self) -> None:
        """Close it."""
        self._socket.close()


def listen_tcp(host: str, port: int) -> ListeningTcp:
    """Listen for metrics; raises :class:`Failed`. Blocking (a name is looked up), at start only."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        sock = socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        hint = "check metrics.listen in the configuration"
        raise Failed(f"cannot listen at {host} port {port}: {error.strerror or error}", hint=hint) from error
    return ListeningTcp(sock)


class _PatientProtocol(H11Protocol):
    """uvicorn's protocol, which by itself waits for ever for the first request of a connection, and knows no peer.

    Every request's scope gets a copy of the connection's ``app_state`` as its ``state``.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = self.app_state | {STATE: peer_of(transport.get_extra_info("socket"))}
        self.loop.call_later(REQUEST_TIMEOUT_S, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: signals are the daemon's."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves an application on one listening socket until it is stopped."""

    def __init__(self, app: ASGIApp, listening: Listening) -> None:
        self._listening = listening
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_PatientProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=CONNECTIONS_MAX,
                timeout_graceful_shutdown=GRACE_S,
            )
        )

    async def serve(self) -> None:
        """Serve until :meth:`stop`; requests under way are answered first, for at most :data:`GRACE_S`."""
        try:
            await self._server.serve(sockets=[self._listening.socket])
        finally:
            self._listening.close()

    async def started(self) -> None:
        """Return once connections are accepted."""
        await self._server.ready.wait()

    async def serve_until_cancelled(self) -> None:
        """Serve, and end in good order when cancelled."""
        serving = asyncio.create_task(self.serve(), name="serve")
        try:
            await asyncio.shield(serving)
        finally:
            self.stop()
            await serving

    def stop(self) -> None:
        """Take no more requests, and let :meth:`serve` return."""
        self._server.should_exit = True
