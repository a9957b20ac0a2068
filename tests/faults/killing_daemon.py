"""The real daemon with points put in from outside: ``python -m tests.faults.killing_daemon CONTROL CONFIG``.

Every call with which captures, new disks and rollbacks change something outside of the process is a point, before and
after: libvirt's and QEMU's changes, image files, qemu-nbd, objects of the store, transactions of the catalog, and the
system calls by which files are made durable and named. CONTROL is a file that says what to do there, read anew at each
point (:class:`Order`); without it the daemon is an ordinary one. ``CONTROL.trace`` lists the points that were passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import inspect
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import libvirt

from hvsnap.catalog.db import Cursor, Database
from hvsnap.hypervisor import images, nbd_server, tools
from hvsnap.hypervisor.libvirt import LibvirtHypervisor
from hvsnap.restore.writer import NbdWriter
from hvsnap.store.objects import LocalObjects, LocalWriter
from tests import run_daemon

POLL_S = 0.005
SLOW_BYTES_S = 65536
_ID = re.compile(r"[a-z]-[a-z2-7]{12}|[0-9a-f]{12,}")


@dataclass(frozen=True)
class Order:
    """What to do at the ``nth`` passing of the point ``name``, counted since the order was given.

    ``do``: "trace" only lists points, "kill" is SIGKILL at once, "hold" waits for ``CONTROL.go-ID`` (and has left
    ``CONTROL.reached-ID``), "fail" is an input/output error. ``side`` "during" leaves ``CONTROL.reached-ID``, and
    kills ``delay_s`` after the call began.
    """

    do: str
    name: str = ""
    nth: int = 1
    side: str = "before"
    delay_s: float = 0.0
    id: str = ""

    def write(self, control: Path) -> None:
        """Give the order: whole, or not at all."""
        new = control.with_suffix(".new")
        new.write_text(json.dumps(asdict(self)))
        new.rename(control)


class Points:
    """Counts what is passed, and carries the order out. Its methods are called from any thread."""

    def __init__(self, control: Path) -> None:
        self._control = control
        self._lock = threading.Lock()
        self._order: Order | None = None
        self._counts: Counter[tuple[str, str]] = Counter()

    def passing(self, name: str, side: str) -> Order | None:
        """Count a point; return the order if it is to be carried out here and now."""
        with self._lock:
            try:
                order = Order(**json.loads(self._control.read_text()))
            except FileNotFoundError:
                return None
            if self._order is None or order.id != self._order.id:
                self._counts.clear()
                self._order = order
            self._counts[name, side] += 1
            nth = self._counts[name, side]
            if order.do == "trace":
                with self._control.with_suffix(".trace").open("a") as out:
                    out.write(json.dumps([name, nth, side]) + "\n")
            wanted = "before" if order.side == "during" else order.side
            return order if order.do != "trace" and (order.name, order.nth, wanted) == (name, nth, side) else None

    def act(self, order: Order) -> bool:
        """Carry an order out; True while it has to be waited for."""
        if order.do == "hold":
            self._control.with_suffix(f".reached-{order.id}").touch()
            return not self._control.with_suffix(f".go-{order.id}").exists()
        if order.do == "fail":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if order.side == "during":
            self._control.with_suffix(f".reached-{order.id}").touch()
            threading.Timer(order.delay_s, _kill).start()
            return False
        _kill()
        return False

    def blocking(self, name: str, side: str) -> None:
        """A point in a thread."""
        order = self.passing(name, side)
        while order is not None and self.act(order):
            time.sleep(POLL_S)

    async def waiting(self, name: str, side: str) -> None:
        """A point in the event loop."""
        order = self.passing(name, side)
        while order is not None and self.act(order):  # noqa: ASYNC110 - another process lets it go
            await asyncio.sleep(POLL_S)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(points: Points, owner: Any, attribute: str, name: str | Callable[..., str]) -> None:
    """Put points around a function or method; ``name`` may be made of its arguments."""
    function = getattr(owner, attribute)

    def named(args: Any) -> str:
        return name if isinstance(name, str) else name(*args)

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def around(*args: Any, **options: Any) -> Any:
            told = named(args)
            await points.waiting(told, "before")
            result = await function(*args, **options)
            await points.waiting(told, "after")
            return result

        setattr(owner, attribute, around)
        return

    @functools.wraps(function)
    def around_blocking(*args: Any, **options: Any) -> Any:
        told = named(args)
        if not told:
            return function(*args, **options)
        points.blocking(told, "before")
        result = function(*args, **options)
        points.blocking(told, "after")
        return result

    setattr(owner, attribute, around_blocking)


def _wrap_catalog(points: Points) -> None:
    """Name each transaction by what is in it: its commit is the point."""
    contents: dict[int, list[str]] = {}
    _begin, _commit = Database._begin, Database._commit
    execute, insert = Cursor.execute, Cursor.insert

    def note(cursor: Cursor, sql: str, parameters: Any) -> None:
        verb, table = _verb_and_table(sql)
        if not verb:
            return
        values = list(parameters)
        detail = ""
        if table == "operations" and verb != "delete":
            detail = f" {values[0] if verb == 'update' else values[3]}"
        elif table == "events" and verb == "insert":
            detail = f" {values[1]}"
        said = f"{verb} {table}{detail}"
        told = contents.setdefault(id(cursor), [])
        if said not in told:
            told.append(said)

    async def noted_execute(self: Cursor, sql: str, parameters: Any = ()) -> Any:
        note(self, sql, parameters)
        return await execute(self, sql, parameters)

    async def noted_insert(self: Cursor, sql: str, parameters: Any = ()) -> Any:
        note(self, sql, parameters)
        return await insert(self, sql, parameters)

    async def commit(self: Database, cursor: Cursor) -> None:
        name = f"commit({', '.join(contents.pop(id(cursor), []))})"
        await points.waiting(name, "before")
        await _commit(self, cursor)
        contents.pop(id(cursor), None)
        await points.waiting(name, "after")

    Cursor.execute, Cursor.insert = noted_execute, noted_insert  # type: ignore[method-assign]
    Database._commit = commit  # type: ignore[method-assign]


def _verb_and_table(sql: str) -> tuple[str, str]:
    words = sql.replace("(", " ").split()
    verb = words[0].lower()
    if verb == "update":
        return verb, words[1]
    if verb in ("insert", "delete"):
        at = next(i for i, word in enumerate(words) if word.upper() in ("INTO", "FROM"))
        return verb, words[at + 1]
    return "", ""


def _wrap_system_calls(points: Points) -> None:
    """Files that are made durable, named, and removed: by the kind of their names."""

    def of_fd(verb: str) -> Callable[..., str]:
        def name(fd: int, *_rest: Any) -> str:
            with contextlib.suppress(OSError):
                return f"{verb}({_kind(os.readlink(f'/proc/self/fd/{fd}'))})"
            return ""

        return name

    def of_path(verb: str) -> Callable[..., str]:
        def name(path: Any, *_rest: Any) -> str:
            return f"{verb}({_kind(os.fspath(path))})"

        return name

    for verb in ("fsync", "fdatasync"):
        wrap(points, os, verb, of_fd(verb))
    for verb in ("link", "unlink", "rename", "replace", "mkdir"):
        wrap(points, os, verb, of_path(verb))


def _kind(path: str) -> str:
    """Return a path's last two parts without what is different each time."""
    return _ID.sub("*", "/".join(path.split("/")[-2:]))


def _slow_commits(control: Path) -> None:
    """Let commits crawl while there is a file ``CONTROL.slow``, so that somebody can die in the middle of one."""
    commit = libvirt.virDomain.blockCommit

    def slow(domain: Any, disk: str, base: str, top: str | None, bandwidth: int = 0, flags: int = 0) -> Any:
        if control.with_suffix(".slow").exists():
            bandwidth, flags = SLOW_BYTES_S, flags | libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
        return commit(domain, disk, base, top, bandwidth, flags)

    libvirt.virDomain.blockCommit = slow


def _other_devices(control: Path) -> None:
    """Put drivers of QEMU's below the format's.

    Sectors that cannot be read: ``CONTROL.bad`` holds options for the driver blkdebug. A note of every write to an
    image: ``CONTROL.writes`` is the log of the driver blklogwrites.
    """
    create = asyncio.create_subprocess_exec
    bad, writes = control.with_suffix(".bad"), control.with_suffix(".writes")

    async def with_others(*command: str, **options: Any) -> Any:
        if "qemu-nbd" in command:
            path, below = command[-1], ""
            if "--read-only" in command and bad.exists():
                below = f"file.driver=blkdebug,file.image.driver=file,file.image.filename={path},{bad.read_text()}"
            if "--read-only" not in command and writes.exists():
                log = f"file.log.driver=file,file.log.filename={writes},file.log-sector-size=512"
                below = f"file.driver=blklogwrites,file.file.driver=file,file.file.filename={path},{log}"
            if below:
                at = command.index("-f")
                how = f"driver={command[at + 1]},{below}"
                command = (*command[:at], *command[at + 2 : -1], "--image-opts", how)
        return await create(*command, **options)

    asyncio.create_subprocess_exec = with_others


def install(control: Path) -> None:
    """Put all points in."""
    points = Points(control)
    _slow_commits(control)
    _other_devices(control)
    for method in ("bitmap_add", "bitmap_remove", "switch_to_overlays", "commit_start", "commit_pivot"):
        wrap(points, LibvirtHypervisor, method, method)
    for method in ("freeze", "thaw", "redefine_source", "start", "shutdown"):
        wrap(points, LibvirtHypervisor, method, method)
    for function in ("create_overlay", "create_image", "bitmap_add", "bitmap_remove", "commit_overlay", "remove"):
        wrap(points, images, function, f"image.{function}")
    wrap(points, images, "_create_empty", "image.create_empty")
    wrap(points, nbd_server, "_wait_listening", "nbd.start")
    wrap(points, nbd_server, "end", "nbd.end")
    wrap(points, NbdWriter, "write", "nbd.write")
    wrap(points, NbdWriter, "zero", "nbd.zero")
    wrap(points, NbdWriter, "finish", "nbd.finish")
    for method in ("write", "commit"):
        wrap(points, LocalWriter, method, lambda writer, *_rest, method=method: f"object.{method}({_object(writer)})")
    wrap(points, LocalObjects, "delete", lambda _objects, name: f"object.delete({name.split('/', 1)[0]})")
    _wrap_catalog(points)
    _wrap_system_calls(points)


def _object(writer: LocalWriter) -> str:
    return _kind(str(writer._file.path))


if __name__ == "__main__":
    install(Path(sys.argv.pop(1)))
    assert tools.run is images.run  # what the wrapped functions rely on
    sys.exit(run_daemon.main())
