"""Who is at the other end of the Unix socket, and what they may ask for.

The kernel tells it: ``SO_PEERCRED`` has the user and group that connected, ``SO_PEERGROUPS`` their other groups, as
they were at that moment (unix(7), socket(7)). So nothing that a client sends decides anything here, and a user who
joins a group may do more from their next login on, as with any file.
"""

from __future__ import annotations

import errno
import grp
import os
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hvsnap import wire
from hvsnap.config import Api
from hvsnap.errors import ConfigInvalid, NotAllowed

SO_PEERGROUPS = 59
"""Not in :mod:`socket`; so on every architecture but PA-RISC and SPARC (linux/asm-generic/socket.h)."""

GROUPS_BYTES_MAX = 1024
"""The longest answer that Python's getsockopt takes: 256 groups. Of somebody with more only the primary one counts."""

STATE = "peer"
"""Where :mod:`hvsnap.api.server` leaves the peer for the application: in the connection's ASGI ``state``."""

READING = {"GET", "HEAD", "OPTIONS"}
"""Verbs that change nothing. No answer to one of them holds what is on a disk."""


class Right(IntEnum):
    """What somebody may ask for; each includes those before it."""

    NOTHING = 0
    READ = 1
    ALL = 2


@dataclass(frozen=True, slots=True)
class Peer:
    """A process that connected, as the kernel knows it."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(sock: socket.socket) -> Peer | None:
    """Return who connected; None on a socket that is no Unix socket."""
    if sock.family != socket.AF_UNIX:
        return None
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        others = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GROUPS_BYTES_MAX)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        others = b""
    return Peer(pid, uid, frozenset((gid, *struct.unpack(f"{len(others) // 4}I", others))))


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what. Without groups whoever can connect may do all: the socket's own permissions decide."""

    read_group: int | None = None
    admin_group: int | None = None

    @classmethod
    def of(cls, settings: Api) -> Access:
        """Return what the configuration says; raises :class:`ConfigInvalid` for a group that there is not."""
        return cls(_number("api.read_group", settings.read_group), _number("api.admin_group", settings.admin_group))

    def right_of(self, peer: Peer | None) -> Right:
        """Return what ``peer`` may ask for. Root and the daemon's own user may ask for everything."""
        if self.read_group is None and self.admin_group is None:
            return Right.ALL
        if peer is None:
            return Right.NOTHING
        if peer.uid in (0, os.geteuid()) or self.admin_group in peer.groups:
            return Right.ALL
        return Right.READ if self.read_group in peer.groups else Right.NOTHING


def _number(key: str, name: str) -> int | None:
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        hint = f"create it (groupadd {name}), or name another in the configuration"
        raise ConfigInvalid(f"{key}: there is no group {name}", hint=hint) from error


class Doorkeeper:
    """Holds who may do what; it can be told anew while the daemon runs."""

    def __init__(self, access: Access | None = None) -> None:
        self.access = access or Access()

    def check(self, peer: Peer | None, method: str) -> None:
        """Raise :class:`NotAllowed` unless ``peer`` may send a request of this method."""
        right = self.access.right_of(peer)
        if right is Right.ALL or (right is Right.READ and method in READING):
            return
        who = "somebody unknown" if peer is None else f"user {peer.uid}"
        if right is Right.READ:
            raise NotAllowed(
                f"{who} may look, and change nothing", hint="that takes root, or a member of api.admin_group"
            )
        raise NotAllowed(
            f"{who} is in neither of the groups that may use hvsnap",
            hint="join api.read_group or api.admin_group of the configuration, and log in anew",
        )


class PeerCheck:
    """ASGI middleware, before all others: whoever may not ask is refused before a byte of the body is read."""

    def __init__(self, app: ASGIApp, doorkeeper: Doorkeeper) -> None:
        self._app = app
        self._doorkeeper = doorkeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            try:
                self._doorkeeper.check(scope.get("state", {}).get(STATE), scope["method"])
            except NotAllowed as error:
                answer = JSONResponse(wire.Error.of(error).model_dump(mode="json"), error.http_status)
                answer.headers["Connection"] = "close"
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)
