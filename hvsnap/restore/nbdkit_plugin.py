"""nbdkit's plugin that shows a snapshot as a disk: it asks the daemon for every block (``nbdkit python THIS_FILE``).

It holds no key and knows no store: catalog, keys and credentials stay in the daemon, the one process
that has them. With ``patience=SECONDS`` requests wait for a daemon that is being restarted, so that a guest whose disk
this is waits, too, and sees no error.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import nbdkit

from hvsnap.restore import block_protocol as protocol

API_VERSION = 2
RETRY_S = 0.1
RETRY_S_MAX = 2.0
PIECE_BYTES = 256 << 10
"""A guest that starts reads thousands of times 4 KiB, near to each other: for less than this a whole aligned piece is
asked for and kept. Each request to the daemon wakes up two processes, which on a busy host takes longer than decoding.
"""

PIECES_KEPT = 64

ANSWER_TIMEOUT_S = 120.0
"""A store that hangs must not hang its clients for ever; retries of S3 within the daemon take a minute."""

T = TypeVar("T")


class _Refused(Exception):
    """The daemon answered, and cannot do it: asking again would not help."""


class _Silent(_Refused):
    """The daemon has not answered as long as the patience lasts."""


class _Away(Exception):
    """The daemon does not answer, or does not serve the snapshot (again) yet."""


class _Daemon:
    """Connections to the daemon: as many as requests are under way at once, kept for the next ones."""

    def __init__(self) -> None:
        self.path = ""
        self.snapshot = ""
        self.size_bytes = 0
        self.patience_s = 0.0
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()

    def ask(self, operation: int, offset: int, length: int, take: Callable[[socket.socket, int], T]) -> T:
        """Ask once more until the daemon answers or the patience is over; ``take`` receives what it answers.

        Raises :class:`_Refused`.
        """
        deadline = time.monotonic() + self.patience_s
        pause_s = RETRY_S
        while True:
            try:
                return self._ask(protocol.request(operation, self.snapshot, offset, length), take)
            except (OSError, _Away) as error:
                if time.monotonic() >= deadline:
                    raise _Silent(f"the daemon does not answer: {error}") from None
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_S_MAX)

    def _ask(self, request: bytes, take: Callable[[socket.socket, int], T]) -> T:
        connection = self._connection()
        try:
            connection.sendall(request)
            status, length = protocol.ANSWER.unpack(_exactly(connection, protocol.ANSWER.size))
            if length > protocol.ANSWER_BYTES_MAX:
                raise _Refused("the daemon's answer is not one: is it of another release?")
            if status == protocol.OK:
                answer = take(connection, length)
            else:
                why = _exactly(connection, length).decode(errors="replace")
                raise _Away(why) if status == protocol.NOT_SERVED else _Refused(why)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)
        return answer

    def _connection(self) -> socket.socket:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(ANSWER_TIMEOUT_S)
        try:
            connection.connect(self.path)
        except BaseException:
            connection.close()
            raise
        return connection


_daemon = _Daemon()


def _into(connection: socket.socket, buffer: memoryview) -> None:
    while buffer:
        count = connection.recv_into(buffer)
        if not count:
            raise _Away("it went away")
        buffer = buffer[count:]


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    _into(connection, memoryview(data))
    return bytes(data)


def _read(offset: int, view: memoryview) -> None:
    """Fill ``view`` from the daemon."""
    for start in range(0, len(view), protocol.READ_BYTES_MAX):
        part = view[start : start + protocol.READ_BYTES_MAX]

        def take(connection: socket.socket, length: int, part: memoryview = part) -> None:
            if length != len(part):
                raise _Refused(f"{length} bytes came for {len(part)}")
            _into(connection, part)

        _daemon.ask(protocol.READ, offset + start, len(part), take)


class _Pieces:
    """The pieces of the disk that were used last. A snapshot never changes, so they are never stale."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, bytearray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> bytearray:
        """Return a piece, from the daemon if it is not kept; two that miss it at once both ask."""
        with self._lock:
            kept = self._kept.get(number)
            if kept is not None:
                self._kept.move_to_end(number)
                return kept
        start = number * PIECE_BYTES
        piece = bytearray(min(PIECE_BYTES, _daemon.size_bytes - start))
        _read(start, memoryview(piece))
        with self._lock:
            self._kept[number] = piece
            while len(self._kept) > PIECES_KEPT:
                self._kept.popitem(last=False)
        return piece


_pieces = _Pieces()


def _read_by_pieces(offset: int, view: memoryview) -> None:
    """Fill ``view`` from pieces."""
    done = 0
    while done < len(view):
        number, start = divmod(offset + done, PIECE_BYTES)
        part = memoryview(_pieces.get(number))[start : start + len(view) - done]
        view[done : done + len(part)] = part
        done += len(part)


# -- what nbdkit calls ----------------------------------------------------------------------------


def thread_model() -> int:
    """Let requests run side by side: they wait for the daemon, without the interpreter's lock."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    """Take ``source=SOCKET``, ``snapshot=ID``, ``size=BYTES`` and ``patience=SECONDS``."""
    if key == "source":
        _daemon.path = os.path.abspath(value)
    elif key == "snapshot":
        _daemon.snapshot = value
    elif key == "size":
        _daemon.size_bytes = int(value)
    elif key == "patience":
        _daemon.patience_s = float(value)
    else:
        raise RuntimeError(f"unknown parameter {key}")


def config_complete() -> None:
    """Refuse to start with half of the parameters."""
    if not _daemon.path or not _daemon.snapshot or not _daemon.size_bytes:
        raise RuntimeError("source=SOCKET, snapshot=ID and size=BYTES must be given")


def open(_readonly: bool) -> int:  # nbdkit's name
    """Return the state of a client's connection: there is none."""
    return 1


def get_size(_handle: int) -> int:
    """Return the disk's size in bytes. It never changes, so that a guest starts while the daemon is being restarted."""
    return _daemon.size_bytes


def block_size(_handle: int) -> tuple[int, int, int]:
    """Return the smallest, best and largest request, in bytes."""
    return 1, 65536, 32 << 20


def can_multi_conn(_handle: int) -> bool:
    """Let clients use several connections: they all see the same, which never changes."""
    return True


def can_extents(_handle: int) -> bool:
    """Tell clients what is zero."""
    return True


def pread(_handle: int, buf: bytearray, offset: int, _flags: int) -> None:
    """Fill ``buf`` with what the disk holds at ``offset``."""
    view = memoryview(buf)
    try:
        if len(view) < PIECE_BYTES:
            try:
                _read_by_pieces(offset, view)
            except _Silent:
                raise
            except _Refused:
                pass  # a damaged block beside what is asked for, maybe
            else:
                return
        _read(offset, view)
    except _Refused as error:
        raise _failed(error) from None


def _failed(error: _Refused) -> RuntimeError:
    """Return what nbdkit writes to its log; its client sees an I/O error."""
    nbdkit.set_error(errno.EIO)
    return RuntimeError(str(error))


def extents(_handle: int, count: int, offset: int, _flags: int) -> list[tuple[int, int, int]]:
    """Return ``(offset, length, type)`` of what is data and what zeroes, from ``offset`` on."""

    def take(connection: socket.socket, length: int) -> bytes:
        return _exactly(connection, length)

    zero = int(nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO)
    found = []
    try:
        answer = _daemon.ask(protocol.EXTENTS, offset, count, take)
    except _Refused as error:
        raise _failed(error) from None
    for length, is_zero in protocol.EXTENT.iter_unpack(answer):
        found.append((offset, length, zero if is_zero else 0))
        offset += length
    return found
