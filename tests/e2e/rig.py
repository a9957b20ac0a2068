"""A guest, its disks, a real daemon, and for every disk a replica that the same operations were applied to."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import libvirt
import libvirt_qemu
import numpy as np

from hvsnap import wire
from hvsnap.hypervisor import domain_xml, qemu_nodes
from tests.daemon_kit import Daemon
from tests.e2e.oracle import Bytes, Operation, Replica, check_same, converted, load, random_operation, read_image
from tests.guest.domain import DiskSpec, Guest
from tests.guest.libvirtd import wait_for


class DoctoredDaemon(Daemon):
    """The daemon with gates, and with a fault if one is named."""

    module = "tests.e2e.doctored_daemon"

    def __init__(self, directory: Path, libvirt_uri: str, fault: str = "", **config: str) -> None:
        super().__init__(directory, libvirt_uri, **config)
        self.gates = directory / "gates"
        self.gates.mkdir(exist_ok=True)
        self._fault = fault

    def start(self, *arguments: str, wait: bool = True, environment: dict[str, str] | None = None) -> DoctoredDaemon:
        doctored = {"E2E_GATES": str(self.gates), "E2E_FAULT": self._fault}
        super().start(*arguments, wait=wait, environment={**(environment or {}), **doctored})
        return self

    @contextlib.contextmanager
    def gate(self, name: str) -> Iterator[Gate]:
        """Keep a gate closed."""
        gate = Gate(self, name)
        for stale in self.gates.glob(f"{name}.reached.*"):
            stale.unlink()
        gate.closed.touch()
        try:
            yield gate
        finally:
            gate.open()


class Gate:
    """A point in the daemon where captures wait."""

    def __init__(self, daemon: DoctoredDaemon, name: str) -> None:
        self._daemon, self._name = daemon, name
        self.closed = daemon.gates / f"{name}.closed"

    def open(self) -> None:
        self.closed.unlink(missing_ok=True)

    def reached(self, *who: str) -> None:
        """Return when all of these (none named: anybody) wait at the gate."""
        wait_for(lambda: self._there(who), f"arrival of {who or 'somebody'} at the gate {self._name}")

    def _there(self, who: Sequence[str]) -> bool:
        if not self._daemon.alive():
            raise RuntimeError(self._daemon.log.read_text()[-3000:])
        prefix = f"{self._name}.reached."
        there = {path.name.removeprefix(prefix) for path in self._daemon.gates.glob(f"{prefix}*")}
        return bool(there) if not who else set(who) <= there


@dataclass
class TestDisk:
    """One disk: its image, what it must hold, and what its snapshots must."""

    __test__ = False

    target: str
    spec: DiskSpec
    replica: Replica
    states: dict[str, Bytes] = field(default_factory=dict)  # snapshot → what it must restore to

    @property
    def size(self) -> int:
        return self.replica.data.size


class Rig:
    """Drives one guest without an operating system: its QEMU does the operations, one after the other."""

    def __init__(self, guest: Guest, daemon: DoctoredDaemon, scratch: Path) -> None:
        self.guest = guest
        self.daemon = daemon
        self.scratch = scratch
        self.settle_timeout_s = 60.0
        self._connection = libvirt.open(guest.libvirtd.uri)
        self._patterns = 0
        self.disks = [self._disk(number, spec) for number, spec in enumerate(guest.disks)]

    def _disk(self, number: int, spec: DiskSpec) -> TestDisk:
        target = f"{'vd' if spec.bus == 'virtio' else 'sd'}{chr(ord('a') + number)}"
        disk = TestDisk(target, spec, Replica(np.zeros(0, np.uint8)))
        self.replace(disk)
        return disk

    # -- operations -------------------------------------------------------------------------------

    def qmp(self, command: str, **arguments: object) -> Any:
        domain = self._connection.lookupByUUIDString(self.guest.uuid)
        answer = json.loads(
            libvirt_qemu.qemuMonitorCommand(domain, json.dumps({"execute": command, "arguments": arguments}), 0)
        )
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']}")
        return answer["return"]

    def _device(self, disk: TestDisk) -> str:
        xml = self._connection.lookupByUUIDString(self.guest.uuid).XMLDesc(0)
        alias = domain_xml.alias(domain_xml.find_disk(domain_xml.parse(xml), disk.target))
        return str(qemu_nodes.device_entry(self.qmp("query-block"), alias)["qdev"])

    def _command(self, one: Operation) -> str:
        if one.kind == "write":
            assert one.data is not None
            path = self.scratch / f"pattern-{self._patterns % 16}"
            self._patterns += 1
            path.write_bytes(one.data.tobytes())
            path.chmod(0o644)
            return f"write -s {path} {one.offset} {one.length}"
        word = {"zero": "write -z", "unmap": "write -z -u", "discard": "discard"}[one.kind]
        return f"{word} {one.offset} {one.length}"

    def do(self, disk: TestDisk, *operations: Operation) -> None:
        """Do operations on a running guest's disk as its device would, or on the image of one that is off."""
        if not self.guest.active:
            self._do_offline(disk, operations)
            return
        device = self._device(disk)
        for one in operations:
            self._human(device, self._command(one))
            disk.replica.apply(one)

    def _human(self, device: str, command: str) -> None:
        out = str(self.qmp("human-monitor-command", **{"command-line": f'qemu-io -d {device} "{command}"'}))
        if "rror" in out or "ailed" in out:
            raise RuntimeError(f"qemu-io {command}: {out}")

    def _do_offline(self, disk: TestDisk, operations: Sequence[Operation]) -> None:
        for one in operations:
            self.qemu_io(disk, self._command(one))
            disk.replica.apply(one)

    def qemu_io(self, disk: TestDisk, *commands: str) -> None:
        """Run qemu-io on the image of a guest that is off; QEMU's bitmaps see it."""
        words = [word for command in commands for word in ("-c", command)]
        how, image = disk.spec.opened
        argv = ["qemu-io", *how, "-d", "unmap", *words, image]
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        if "rror" in done.stdout or "ailed" in done.stdout:
            raise RuntimeError(f"qemu-io {commands}: {done.stdout}")

    def random_operations(self, random: Random, disk: TestDisk, count: int) -> None:
        for _ in range(count):
            self.do(disk, random_operation(random, disk.size))

    def flush(self, disk: TestDisk) -> None:
        """Write out what a running QEMU still holds of a disk, so that others can read the image."""
        if self.guest.active:
            self._human(self._device(disk), "flush")

    @contextlib.contextmanager
    def storm(self, random: Random, disks: Sequence[TestDisk]) -> Iterator[None]:
        """Do operations on disks all the while, one after the other."""
        seed, stop, failure = random.random(), threading.Event(), []

        def work() -> None:
            mine = Random(seed)
            try:
                while not stop.is_set():
                    disk = mine.choice(disks)
                    self.do(disk, random_operation(mine, min(disk.size, 1 << 40)))
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, name="storm")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        if failure:
            raise failure[0]

    # -- what disks and snapshots hold ------------------------------------------------------------

    def present(self, disk: TestDisk) -> Bytes:
        """Return what a disk holds now, by qemu-img alone; nothing may be writing."""
        self.flush(disk)
        return self._read(disk)

    def _read(self, disk: TestDisk) -> Bytes:
        return read_image(*disk.spec.opened, self.scratch / f"{disk.spec.path.name}.converted")

    def check_disk(self, disk: TestDisk, what: str) -> None:
        """Compare a disk at rest with its replica."""
        disk.replica.check(self.present(disk), f"{what}: disk {disk.target} itself")

    def capture(
        self,
        disks: Sequence[TestDisk],
        meanwhile: Callable[[], None] = lambda: None,
        storm: Random | None = None,
        stormy: Callable[[TestDisk], bool] = lambda _disk: True,
        **options: Any,
    ) -> list[wire.Snapshot]:
        """Make snapshots of disks at rest and note what they must restore to: a copy of the frozen image.

        ``meanwhile`` is called once the images are frozen and before they are read; ``storm`` does random operations
        from then on until the guest is back on its images, on those of the disks that are ``stormy``.
        """
        names = [disk.target for disk in disks]
        running = self.guest.active
        before = {disk.target: self.present(disk) for disk in disks}
        with contextlib.ExitStack() as stack:
            gate = stack.enter_context(self.daemon.gate("read"))
            made = self.daemon.begin(self.guest.name, names, **options)
            gate.reached(*[made[0].id] if options.get("group") else [one.id for one in made])
            for snapshot in made:
                disk = next(one for one in disks if one.target == snapshot.target)
                frozen = self._read(disk)
                check_same(frozen, before[disk.target], f"the frozen image of {disk.target}")
                disk.replica.check(frozen, f"{snapshot.id}: disk {disk.target} at its snapshot's instant")
                disk.states[snapshot.id] = frozen
            meanwhile()
            if storm is not None and running:
                stack.enter_context(self.storm(storm, [disk for disk in disks if stormy(disk)]))
            gate.open()
            ended = self.daemon.ended(made)
            for snapshot in ended:
                if snapshot.state != "accomplished":
                    raise RuntimeError(f"{snapshot.id}: {snapshot.error}\n{self.daemon.log.read_text()[-3000:]}")
            self.daemon.settled(self.settle_timeout_s)
        self.check_on_images()
        return ended

    def restored(self, snapshot_id: str, image_format: str = "raw") -> Bytes:
        """Return what a snapshot restores to."""
        path = self.scratch / f"{snapshot_id}.{image_format}"
        task = self.daemon.create_disk(snapshot_id, path, image_format)
        if task.state != "accomplished":
            raise RuntimeError(f"{snapshot_id}: {task.error}")
        try:
            return load(path) if image_format == "raw" else converted(path, image_format, self.scratch)
        finally:
            path.unlink()

    def check_snapshots(self, disk: TestDisk, *ids: str, image_format: str = "raw") -> None:
        """Restore snapshots (none named: all) and compare."""
        for snapshot_id in ids or list(disk.states):
            check_same(
                self.restored(snapshot_id, image_format),
                disk.states[snapshot_id],
                f"{snapshot_id} of {disk.target} ({disk.spec.format})",
            )

    def delete(self, disk: TestDisk, snapshot_id: str) -> None:
        with self.daemon.client() as client:
            client.post("/snapshots/delete", wire.Deletion, wire.SnapshotDelete(ids=[snapshot_id]))
        del disk.states[snapshot_id]

    def roll_back(self, disk: TestDisk, snapshot_id: str, **options: Any) -> wire.Task:
        """Roll a disk of the shut-off guest back, and compare it."""
        name = f"{self.guest.name}/{disk.target}"
        present = self.present(disk)
        task = self.daemon.roll_back(name, snapshot_id, **options)
        if task.state != "accomplished":
            raise RuntimeError(f"rollback: {task.error}\n{self.daemon.log.read_text()[-3000:]}")
        assert isinstance(task.result, wire.RolledBack)
        if task.result.safety_snapshot:
            disk.states[task.result.safety_snapshot] = present
        wanted = np.zeros(present.size, np.uint8)
        kept = min(present.size, disk.states[snapshot_id].size)
        wanted[:kept] = disk.states[snapshot_id][:kept]
        check_same(self.present(disk), wanted, f"disk {disk.target} after its rollback to {snapshot_id}")
        disk.replica = Replica(wanted)
        return task

    # -- where the guest is -----------------------------------------------------------------------

    def sources(self) -> list[str]:
        """Return the image that each disk of the guest is on, by libvirt."""
        domain = self._connection.lookupByUUIDString(self.guest.uuid)
        found = []
        for flags in {0, libvirt.VIR_DOMAIN_XML_INACTIVE}:
            root = ElementTree.fromstring(domain.XMLDesc(flags))
            found += [str(source.get("file") or source.get("dev")) for source in root.findall("devices/disk/source")]
        return found

    def overlays(self) -> list[str]:
        """Return the overlays that lie beside the images."""
        directories = {disk.spec.path.parent for disk in self.disks}
        return sorted(name for directory in directories for name in os.listdir(directory) if name.endswith(".overlay"))

    def bitmaps(self, disk: TestDisk) -> list[str]:
        """Return the bitmaps of a running guest's image."""
        device = self._device(disk)
        entry = next(one for one in self.qmp("query-block") if one.get("qdev") == device)
        return sorted(bitmap.get("name", "") for bitmap in entry["inserted"].get("dirty-bitmaps", []))

    def format_node(self, disk: TestDisk) -> str:
        """Return QEMU's name of the node that holds a disk's image."""
        device = self._device(disk)
        entry = next(one for one in self.qmp("query-block") if one.get("qdev") == device)
        return str(entry["inserted"]["node-name"])

    def replace(self, disk: TestDisk) -> None:
        """Take note that somebody else has changed a disk: what it holds now is right."""
        disk.replica = Replica(self.present(disk))

    def check_on_images(self) -> None:
        """Check that the guest is on its own images, and that nothing is left of captures."""
        images = [str(disk.spec.path) for disk in self.disks]
        if sorted(self.sources()) != sorted(images * 2):  # libvirt orders disks by their bus
            raise AssertionError(f"the guest is on {self.sources()} instead of {images}")
        if self.overlays():
            raise AssertionError(f"left behind: {self.overlays()}")
