"""A guest that goes on writing while the daemon, its QEMU or libvirtd are killed, and what must hold afterwards.

The oracle is the guest's own log: every operation that its disk acknowledged must be there, whatever died; a snapshot
that is accomplished must hold one instant of that log; nothing of a capture may be left behind.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from xml.etree import ElementTree

import httpx
import libvirt
import libvirt_qemu
import numpy as np

from hvsnap.errors import HvsnapError
from tests.conftest import short_directory
from tests.daemon_kit import Daemon
from tests.e2e.oracle import (
    Bytes,
    Mismatch,
    Operation,
    Replica,
    check_same,
    converted,
    instant_in_log,
    logged_operation,
)
from tests.faults.killing_daemon import Order
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd, host_pids, wait_for

Case = TypeVar("Case")

EVERY = bool(os.environ.get("HVSNAP_TEST_ALL"))
"""Whether everything is to be killed everywhere (about an hour), instead of a sample that is the same each time."""

MIB = 1 << 20
SIZE = 12 * MIB + 512 * 33
BATCH = 6
LENGTH_MAX = 65536
_MASK = (1 << 64) - 1

_WRITER = """
i={first}
while [ ! -e /tmp/stop ]; do
    for disk in {disks}; do
        echo batch $disk $i
        stress random /dev/$disk $i {count} {length}
        i=$((i + 1))
    done
    usleep 20000
done
echo stopped
"""


def batch(seed: int, size: int) -> list[Operation]:
    """Return the operations that ``stress random`` does with a seed, logged or not (stress.c: do_random)."""
    state = seed

    def draw() -> int:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    made = []
    for _ in range(BATCH):
        kind = draw() % 8
        length = (draw() % (LENGTH_MAX // 512) + 1) * 512
        offset = draw() % ((size - length) // 512 + 1) * 512
        if kind < 2:
            made.append(logged_operation(f"{('discard', 'zero')[kind]} {offset} {length}"))
        else:
            made.append(logged_operation(f"write {offset} {length} {draw()}"))
    return made


def unacknowledged(seen: Bytes, acknowledged: Replica, coming: Sequence[Operation]) -> int:
    """Return how many of the operations after the last acknowledged one a disk holds.

    The one after these may be there in part. Where none of this fits, 0: the difference will be told.
    """
    state = copy.deepcopy(acknowledged)
    for done, one in enumerate(coming):
        wrong = (seen != state.data) & ~(state._loose & (seen == 0))
        then = Replica(state.data[one.offset : one.stop])
        then.apply(Operation(one.kind if one.kind != "discard" else "zero", 0, one.length, one.data))
        wrong[one.offset : one.stop] &= seen[one.offset : one.stop] != then.data
        if not wrong.any():
            return done
        state.apply(one)
    return 0


@dataclass
class CrashDisk:
    """One disk: what it must hold, and what was acknowledged since it was last looked at.

    ``coming`` are the operations after the last acknowledged one: they may have been under way. ``eras``
    go further back, to the last time that everything was checked: each time that the disk was looked at since, what it
    held, and what was done to it from then on.
    """

    target: str
    path: Path
    format: str
    replica: Replica
    log: list[Operation] = field(default_factory=list)
    coming: list[Operation] = field(default_factory=list)
    states: dict[str, str] = field(default_factory=dict)  # snapshot → digest of what it restores to

    def __post_init__(self) -> None:
        self.eras: list[tuple[Bytes, list[Operation]]] = []
        self.forget()

    def forget(self) -> None:
        """Begin anew from what the disk holds now."""
        self.eras.clear()
        self.next_era()

    def next_era(self) -> None:
        """The disk has been looked at."""
        self.log, self.coming = [], []
        self.eras.append((self.replica.data.copy(), []))

    def check_instant(self, got: Bytes) -> None:
        """Raise :class:`Mismatch` unless the disk held this at one instant."""
        for turn, (began, history) in enumerate(self.eras, 1):
            try:
                instant_in_log(got, began, history)
                return
            except Mismatch:
                if turn == len(self.eras):
                    raise


class Rigs:
    """Lends one rig, whose disks have chains, to test after test; one whose test failed is not lent again."""

    def __init__(self, make: Callable[[], CrashRig]) -> None:
        self._make = make
        self._rig: CrashRig | None = None

    @contextlib.contextmanager
    def lent(self) -> Iterator[CrashRig]:
        rig, self._rig = self._rig, None
        if rig is None:
            rig = self._make().__enter__()
            rig.capture(rig.disks)
        try:
            yield rig
        except BaseException:
            print(rig.daemon.log.read_text()[-3000:])
            rig.__exit__()
            raise
        if rig.retired:
            rig.__exit__()
        else:
            self._rig = rig

    def close(self) -> None:
        if self._rig is not None:
            self._rig.__exit__()


class CrashRig:
    """One guest with a file system (vdc) and disks that it writes to, and one daemon that can be killed at points."""

    def __init__(
        self,
        libvirtd: Libvirtd,
        image: GuestImage,
        *,
        formats: Sequence[str] = ("qcow2", "qcow2"),
        cache: str = "writeback",
        images: Path | None = None,
        **config: str,
    ) -> None:
        """``cache``: with "writethrough" what was acknowledged outlives QEMU; else only what the guest had flushed.

        ``images`` is where its images are, if not beside all else.
        """
        self.libvirtd = libvirtd
        self.directory = short_directory()
        self.images = images or self.directory
        self.disks = []
        for number, image_format in enumerate(formats):
            path = make_image(self.images / f"{'ab'[number]}.{image_format}", str(SIZE), image_format)
            replica = Replica(np.zeros(SIZE, np.uint8))
            self.disks.append(CrashDisk(f"vd{'ab'[number]}", path, image_format, replica))
        ext4 = self.directory / "ext4.raw"
        subprocess.run(["mke2fs", "-q", "-t", "ext4", str(ext4), "8M"], check=True)
        driver = f"discard='unmap' cache='{cache}'"
        specs = [DiskSpec(disk.path, disk.format, driver=driver) for disk in self.disks] + [DiskSpec(ext4, "raw")]
        self.guest = Guest(libvirtd, self.directory, self.directory.name, specs, image).define()
        self._config = config
        self.control = self.directory / "control"
        self._daemons = 0
        self.daemon = self.new_daemon()
        self._seed = 1
        self._read = 0
        self._orders = 0
        self._writing: Sequence[str] = ()
        self.retired = False
        self.place = self.images  # of overlays

    def __enter__(self) -> CrashRig:
        self.boot()
        self.daemon.start(str(self.control))
        return self

    def __exit__(self, *_exc: object) -> None:
        self.guest.remove()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.daemon.stop(20)
        self.daemon.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def new_daemon(self) -> Daemon:
        """Return a daemon with a state and a store of its own."""
        self._daemons += 1
        directory = self.directory / f"d{self._daemons}"
        directory.mkdir()
        config = {"capture": "space_reserve_bytes = 1048576", "limits": "snapshots_per_disk = 1000", **self._config}
        return Daemon(directory, self.libvirtd.uri, **config)

    def fresh_daemon(self) -> None:
        """Start a new daemon that knows of no chain; the one before leaves no bitmap behind."""
        self.check_nothing_left()
        self.daemon.stop()
        for disk in self.disks:
            name = self.bitmap_of(disk)
            if name is not None:
                nodes = self.guest.qmp("query-named-block-nodes", flat=True)
                node = next(n for n in nodes if n.get("file") == str(disk.path) and n["drv"] == disk.format)
                self.guest.qmp("block-dirty-bitmap-remove", node=node["node-name"], name=name)
            disk.states.clear()
        self.daemon = self.new_daemon().start(str(self.control))

    def boot(self) -> None:
        """Start the guest (a QEMU that died leaves the disks to whoever is next) and mount its file system."""
        self.guest.start()
        self.guest.run(f"mount -t ext4 /dev/vd{'abc'[len(self.disks)]} /mnt")

    # -- the guest's writes -----------------------------------------------------------------------

    def write_on(self, *, wait: bool = True) -> None:
        """Let the guest write to all disks until :meth:`stop_writing`; ``wait`` until it does."""
        self._read = len(self.guest.logged())
        self.guest.run("rm -f /tmp/stop")
        names = " ".join(disk.target for disk in self.disks)
        self._seed += 100_000
        script = _WRITER.format(first=self._seed, disks=names, count=BATCH, length=LENGTH_MAX)
        self.guest.run(f"cat > /tmp/writer <<'EOF'\n{script}\nEOF")
        self.guest.spawn("exec sh /tmp/writer")  # a program of its own: it keeps no port of the shell's open
        self._writing = names
        if wait:
            self.written(2 * BATCH)

    def written(self, more: int) -> None:
        """Return when the guest has had that many more lines acknowledged: it is not stopped by anything."""
        before = len(self.guest.logged())
        wait_for(lambda: len(self.guest.logged()) >= before + more, "the guest's writes", 20)

    def stop_writing(self) -> None:
        """End the guest's writes in good order."""
        if not self._writing:
            return
        self.guest.run("touch /tmp/stop")
        wait_for(lambda: "stopped" in self.guest.logged()[self._read :], "the end of the guest's writes")
        self._take_log()
        for disk in self.disks:
            disk.coming = []

    def lost_writing(self) -> None:
        """The guest died while it wrote: what was under way may be there, or not, or in part."""
        self._take_log()

    def _take_log(self) -> None:
        self._writing = ()
        last: CrashDisk | None = None
        ahead: dict[str, list[Operation]] = {}
        for line in self.guest.logged()[self._read :]:
            word, *rest = line.split()
            if word == "batch":
                last = next(disk for disk in self.disks if disk.target == rest[0])
                ahead[last.target] = batch(int(rest[1]), SIZE)
            elif word != "stopped":
                assert last is not None, line
                expected = ahead[last.target].pop(0)
                one = logged_operation(line)
                assert (one.kind, one.offset, one.length) == (expected.kind, expected.offset, expected.length), line
                last.log.append(one)
        for disk in self.disks:
            # A dead guest had not logged what was under way.
            disk.coming = ahead.get(disk.target, [])
            disk.eras[-1][1].extend([*disk.log, *disk.coming])
        self._read = len(self.guest.logged())

    # -- killing ----------------------------------------------------------------------------------

    def order(self, order: Order) -> str:
        """Arm the daemon, and return the order's id."""
        self._orders += 1
        Order(order.do, order.name, order.nth, order.side, order.delay_s, f"{self._orders}").write(self.control)
        return f"{self._orders}"

    def disarm(self) -> None:
        self.control.unlink(missing_ok=True)

    def trace(self, action: Callable[[], None]) -> list[tuple[str, int, str]]:
        """Return the points that an action of the daemon passes, once each."""
        log = self.control.with_suffix(".trace")
        log.unlink(missing_ok=True)
        self.order(Order("trace"))
        action()
        self.disarm()
        return [(name, nth, side) for name, nth, side in map(json.loads, log.read_text().splitlines())]

    def begin(self, disks: Sequence[CrashDisk], **options: Any) -> None:
        """Ask for snapshots, and do not wait for them."""
        self.daemon.begin(self.guest.name, [disk.target for disk in disks], group=len(disks) > 1, **options)

    def begin_in_background(self, disks: Sequence[CrashDisk]) -> None:
        """Ask for snapshots; whether there is an answer depends on the point that the daemon is held at."""

        def ask() -> None:
            with contextlib.suppress(HvsnapError, httpx.HTTPError):
                self.begin(disks)

        threading.Thread(target=ask, name="begin", daemon=True).start()

    def hurry(self) -> None:
        """Let a slow commit come to its end."""
        for job in self.guest.qmp("query-block-jobs"):
            self.guest.qmp("block-job-set-speed", device=job["device"], speed=0)

    def reboot(self) -> None:
        """Restart the guest's operating system; its QEMU lives on."""
        self.guest.run("(usleep 100000; reboot -f) > /dev/null 2>&1 &")
        self.guest._disconnect()
        time.sleep(1)
        self.boot()

    def answer_again(self) -> None:
        """Return when the shell of a restored guest answers: it notices its lost connection at some time."""
        for _ in range(10):
            try:
                self.guest.run("true", 3)
                return
            except (TimeoutError, OSError):
                self.guest._disconnect()
        raise TimeoutError("the restored guest's shell does not answer")

    def retire(self) -> None:
        """Take no part in further tests."""
        self.retired = True

    def crash_at(self, order: Order, action: Callable[[], None]) -> bool:
        """Do an action that the daemon does not survive; False if it did: the point was not passed."""
        ident = self.order(order)
        try:
            action()
        except (HvsnapError, httpx.HTTPError, RuntimeError, TimeoutError):
            # Whoever was told of its end may be faster than the kernel with it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.daemon.wait_dead(2)
        self.disarm()
        if self.control.with_suffix(f".reached-{ident}").exists():
            self.daemon.wait_dead()  # it lives on for a moment after the point, maybe for longer than the action took
        return not self.daemon.alive()

    @contextlib.contextmanager
    def held_at(self, name: str, side: str = "before", nth: int = 1) -> Iterator[str]:
        """Keep the daemon at a point; :meth:`reached` says when it is there."""
        held = self.order(Order("hold", name, nth, side))
        try:
            yield held
        finally:
            self.disarm()
            self.let_go(held)

    @contextlib.contextmanager
    def slow_commits(self) -> Iterator[None]:
        """Let commits that begin meanwhile take minutes."""
        slow = self.control.with_suffix(".slow")
        slow.touch()
        try:
            yield
        finally:
            slow.unlink()

    def committing(self) -> None:
        """Return when a commit is under way; it is not about to end."""
        wait_for(lambda: self.guest.qmp("query-block-jobs") != [], "the commit", 30)
        assert not any(job["ready"] for job in self.guest.qmp("query-block-jobs"))

    def reached(self, held: str) -> None:
        wait_for(self.control.with_suffix(f".reached-{held}").exists, "the daemon's arrival at its point", 30)

    def let_go(self, held: str) -> None:
        self.control.with_suffix(f".go-{held}").touch()

    def restart(self) -> None:
        """Start the daemon again after its death, and return when all that can be settled is."""
        self.daemon.wait_dead(10)
        self.daemon.start(str(self.control))
        self.daemon.settled(60)

    # -- what the catalog says --------------------------------------------------------------------

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Return committed rows of the daemon's catalog."""
        return self.daemon.query(sql, *values)

    def snapshots(self) -> list[str]:
        """Return all snapshots' ids, oldest first."""
        return [str(row[0]) for row in self.query("SELECT id FROM snapshots ORDER BY number")]

    def events(self, key: str, value: str) -> list[str]:
        """Return the types of the events whose payload says so."""
        return self.daemon.events(key, value)

    def bitmap_of(self, disk: CrashDisk) -> str | None:
        """Return the bitmap that the catalog expects on a disk."""
        rows = self.query("SELECT bitmap FROM disks WHERE target = ?", disk.target)
        return None if not rows else rows[0][0]

    # -- what must hold ---------------------------------------------------------------------------

    def capture(self, disks: Sequence[CrashDisk], **options: Any) -> None:
        """Make snapshots, as a group if there are several, and return when all is settled."""
        group = len(disks) > 1
        self.daemon.snapshot(self.guest.name, [disk.target for disk in disks], group=group, **options)

    def check(self, new: Sequence[str], *, method: str = "bitmap") -> None:
        """Check all that must hold once a crash has been recovered from; the guest runs, and does not write any more.

        ``new`` are the snapshots made since the last check, in whatever state. ``method`` is how the next capture of
        a disk that has a chain must find its blocks ("any": it depends on how far the guest was when it was stopped).
        """
        self.check_guest()
        self.check_nothing_left(consistent=method == "bitmap")
        accomplished = self.check_snapshots(new)
        self.check_disks()
        self.check_next(method)
        self.check_nothing_left()
        for disk in self.disks:
            disk.forget()
            for snapshot in accomplished.get(disk.target, ()):
                self.check_unchanged(disk, snapshot)

    def check_guest(self) -> None:
        """It runs, unfrozen, on its own images, and starts from them next time."""
        assert self.guest.domain().state()[0] == libvirt.VIR_DOMAIN_RUNNING
        assert self.fsfreeze_status() == "thawed"
        assert self.guest.run("echo x > /mnt/x && sync && cat /mnt/x", 10) == "x"
        self.check_definitions()

    def fsfreeze_status(self) -> str:
        """Return what the guest's agent says of its file systems."""
        ask = '{"execute": "guest-fsfreeze-status"}'
        return str(json.loads(libvirt_qemu.qemuAgentCommand(self.guest.domain(), ask, 5, 0))["return"])

    def check_off(self) -> None:
        """A guest that is off: it starts from its own images, and nothing is left beside them."""
        assert not self.guest.active
        self.check_definitions()
        assert not [name for name in os.listdir(self.directory) if name.endswith((".overlay", ".scratch"))]
        assert not host_pids("qemu-nbd", str(self.directory))

    def check_definitions(self) -> None:
        """The guest is on its own images, and is defined to be."""
        domain = self.guest.domain()
        for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
            root = ElementTree.fromstring(domain.XMLDesc(flags))
            found = [str(source.get("file")) for source in root.findall("devices/disk/source")]
            assert found[: len(self.disks)] == [str(disk.path) for disk in self.disks]
            assert not root.findall("devices/disk/mirror")

    def check_nothing_left(self, *, consistent: bool = True) -> None:
        """No job, overlay, export, process, temporary file; and of bitmaps the expected ones alone."""
        beside = {*os.listdir(self.directory), *os.listdir(self.images), *os.listdir(self.place)}
        assert not [name for name in beside if name.endswith((".overlay", ".scratch", ".hvsnap"))]
        assert self.guest.qmp("query-block-jobs") == self.guest.qmp("query-jobs") == []
        nodes = self.guest.qmp("query-named-block-nodes", flat=True)
        assert not [node for node in nodes if ".overlay" in node.get("file", "")]
        assert not host_pids("qemu-nbd", str(self.directory))
        assert not list(self.daemon.directory.glob("run/nbd/nbd-*"))
        temporaries = self.daemon.store / ".tmp"
        assert not temporaries.exists() or not os.listdir(temporaries)
        for disk in self.disks:
            found = {
                one["name"]: one for node in nodes if node.get("file") == str(disk.path) and node["drv"] == disk.format
                for one in node.get("dirty-bitmaps", [])
            }  # fmt: skip
            expected = self.bitmap_of(disk)
            assert set(found) <= {expected}, f"bitmaps of {disk.target}: {sorted(found)} instead of {expected}"
            if consistent and disk.format == "qcow2":
                assert set(found) == ({expected} - {None})
            assert not consistent or not any(one.get("inconsistent") for one in found.values())

    def check_snapshots(self, new: Sequence[str]) -> dict[str, list[str]]:
        """Every snapshot ended once, was told of once, and holds an instant of its disk if it is accomplished."""
        accomplished: dict[str, list[str]] = {}
        for snapshot in new:
            info = self.daemon.info(snapshot)
            assert info.state in ("accomplished", "failed"), info
            self.daemon.check_told(info)
            disk = next(disk for disk in self.disks if disk.target == info.target)
            if info.state == "accomplished":
                accomplished.setdefault(disk.target, []).append(snapshot)
                restored = np.frombuffer(self.daemon.restored(snapshot, self.directory), np.uint8)
                disk.check_instant(restored)
                disk.states[snapshot] = hashlib.sha256(restored.tobytes()).hexdigest()
            else:
                assert info.error
        return accomplished

    def source_of(self, disk: CrashDisk) -> tuple[Path, str]:
        """Return the image, and its format, that the guest would be started from."""
        root = ElementTree.fromstring(self.guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
        source = root.findall("devices/disk/source")[self.disks.index(disk)]
        path = Path(str(source.get("file")))
        return path, disk.format if path == disk.path else "qcow2"

    def check_disks(self) -> None:
        """Every operation that was acknowledged is there, and nothing else but what was under way."""
        for number, disk in enumerate(self.disks):
            if self.guest.active:
                self.guest.qemu_io(number, "flush")
            seen = converted(*self.source_of(disk), self.directory)
            for one in disk.log:
                disk.replica.apply(one)
            ahead = unacknowledged(seen, disk.replica, disk.coming)
            for one in disk.coming[:ahead]:
                disk.replica.apply(one)
            if ahead < len(disk.coming):
                under_way = slice(disk.coming[ahead].offset, disk.coming[ahead].stop)
                disk.replica.data[under_way] = seen[under_way]
            disk.replica.check(seen, f"disk {disk.target} after {len(disk.log)} operations")
            disk.next_era()

    def check_next(self, method: str = "bitmap") -> None:
        """The next captures succeed, in the expected way, and hold exactly what the disks hold."""
        for disk in self.disks:
            chain = self.query("SELECT head FROM disks WHERE target = ? AND head IS NOT NULL", disk.target)
            (made,) = self.daemon.snapshot(self.guest.name, [disk.target])
            expected = (method if disk.format == "qcow2" else "rescan") if chain else "full"
            assert made.method == expected or "any" in method, f"{made.method} instead of {expected}: {made.reason}"
            assert made.method != "rescan" or made.reason
            restored = np.frombuffer(self.daemon.restored(made.id, self.directory), np.uint8)
            check_same(restored, disk.replica.data, f"the next snapshot of {disk.target}")
            disk.states[made.id] = hashlib.sha256(restored.tobytes()).hexdigest()

    def check_unchanged(self, disk: CrashDisk, snapshot: str) -> None:
        """A snapshot restores to what it did before."""
        restored = self.daemon.restored(snapshot, self.directory)
        assert hashlib.sha256(restored).hexdigest() == disk.states[snapshot]

    def check_all_unchanged(self) -> None:
        for disk in self.disks:
            for snapshot in disk.states:
                self.check_unchanged(disk, snapshot)


TOOLS = ("image.", "nbd.", "switch_", "commit_", "bitmap_", "freeze", "thaw", "redefine", "object.")


def with_during(points: Sequence[tuple[str, int, str]], random: Random) -> list[Order]:
    """Return the orders to kill at each of these points and, where a call takes time, in the middle of it."""
    points = thinned(points)
    orders = [Order("kill", name, nth, side) for name, nth, side in points]
    orders += [
        Order("kill", name, nth, "during", round(random.uniform(0.0005, 0.02), 4))
        for name, nth, side in points
        if side == "before" and name.startswith(TOOLS)
    ]
    return orders


def thinned(points: Sequence[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """Return the points without those in the middle of many that are alike, such as the writes of one file."""
    last = {name: max(nth for other, nth, _side in points if other == name) for name, _nth, _side in points}
    return [one for one in points if one[1] <= 2 or one[1] in (last[one[0]] // 2, last[one[0]])]


def some(cases: Sequence[Case], count: int) -> list[Case]:
    """Return all cases if HVSNAP_TEST_ALL is set, else so many of them, from all over the list."""
    if EVERY:
        return list(cases)
    return [cases[number * len(cases) // count] for number in range(count)]


def chosen(orders: Sequence[Order], count: int, random: Random) -> list[Order]:
    """Return all orders if HVSNAP_TEST_ALL is set, else a sample that takes every kind of call before any twice."""
    orders = random.sample(list(orders), len(orders))
    if EVERY:
        return orders
    seen: set[str] = set()
    first = [one for one in orders if not (one.name in seen or seen.add(one.name))]  # type: ignore[func-returns-value]
    return (first + [one for one in orders if one not in first])[:count]
