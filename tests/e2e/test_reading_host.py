"""A second host restores from the store of a first one, which goes on writing, deleting and sweeping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from hvsnap import rebuilding, wire
from hvsnap.cli.client import DaemonError
from hvsnap.config import load
from tests.daemon_kit import Daemon
from tests.e2e.test_command_line import raw, write
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd

MIB = 1 << 20


@pytest.fixture
def writer(libvirtd: Libvirtd, workdir: Path) -> Iterator[Daemon]:
    daemon = Daemon(workdir, libvirtd.uri).start()
    yield daemon
    daemon.stop()


@pytest.fixture
def reader(workdir: Path) -> Iterator[Daemon]:
    directory = workdir / "b"
    (directory / "state").mkdir(parents=True)
    daemon = Daemon(directory, "", store=f'url = "file://{workdir}/state/store"\nread_only = true')
    yield daemon
    daemon.stop()


def everything(store: Path) -> dict[str, bytes]:
    found = {str(path): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return {path: data for path, data in found.items() if "/lease/" not in path}


def listed(daemon: Daemon) -> dict[str, str]:
    with daemon.client() as client:
        return {one.id: one.name for one in client.get("/snapshots", wire.SnapshotList).snapshots}


def test_another_hosts_snapshots_are_listed_and_restored_while_it_goes_on(
    writer: Daemon, reader: Daemon, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    disk = make_image(workdir / "a.qcow2", "8M")
    guest = make_guest([DiskSpec(disk)])
    states: dict[str, bytes] = {}
    for seed in range(2):
        (workdir / "noise").write_bytes(Random(seed).randbytes(2 * MIB))
        write(disk, f"write -s {workdir / 'noise'} {seed}M 2M")
        (made,) = writer.snapshot(guest.name, name=f"n{seed}")
        states[made.id] = raw(disk, workdir / "raw")
    first, second = states

    reader.start(wait=False)
    assert reader.wait_dead() == 1
    assert "store-rebuild" in reader.log.read_text()
    before = everything(writer.store)
    told = rebuilding.rebuild(load(reader.config), force=False)
    assert (told.snapshots, told.damaged) == (2, [])
    reader.start()
    assert listed(reader) == {first: "n0", second: "n1"}
    for snapshot, content in states.items():
        assert reader.restored(snapshot, workdir) == content
    delete = wire.SnapshotDelete(ids=[first])
    with reader.client() as client, pytest.raises(DaemonError, match="another host's store"):
        client.post("/snapshots/delete", wire.Deletion, delete)
    assert everything(writer.store) == before

    # Its writer has been at work all the time, and now frees what the reader still knows of.
    with writer.client() as client:
        client.post("/snapshots/delete", wire.Deletion, delete)
        assert writer.task(client.post("/store/compact", wire.Task, wire.StoreCompact())).state == "accomplished"
    gone = reader.create_disk(first, workdir / "gone.raw", "raw")
    assert gone.error is not None
    assert (gone.error.code, "store-rebuild" in gone.error.hint) == ("damaged", True)
    assert not (workdir / "gone.raw").exists()
    assert reader.restored(second, workdir) == states[second]
    assert reader.stop() == 0
    rebuilding.rebuild(load(reader.config), force=False)  # without force: such a catalog is a copy
    reader.start()
    assert listed(reader) == {second: "n1"}
    assert writer.status().stopping is False
