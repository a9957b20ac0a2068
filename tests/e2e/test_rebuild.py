"""The catalog lost, damaged, or beside the wrong store: by commands alone, with a real guest's disk."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.daemon_kit import Daemon
from tests.e2e.test_command_line import CommandLine, raw, write
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd

MIB = 1 << 20


@pytest.fixture
def hvsnap(libvirtd: Libvirtd, workdir: Path) -> Iterator[CommandLine]:
    one = CommandLine(workdir, libvirtd.uri)
    yield one
    one.close()


def packs(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "state" / "store" / "packs").rglob("*") if path.is_file()}


def noise(workdir: Path, seed: int) -> str:
    path = workdir / f"noise-{seed}"
    path.write_bytes(Random(seed).randbytes(2 * MIB))
    return str(path)


def lose_catalog(workdir: Path) -> None:
    for path in (workdir / "state").glob("catalog.db*"):
        path.unlink()


def test_the_catalog_is_lost_and_made_anew(
    hvsnap: CommandLine, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    disk = make_image(workdir / "a.qcow2", "64M")
    guest = make_guest([DiskSpec(disk)])
    states: dict[str, bytes] = {}
    hvsnap.start_daemon()
    for seed in range(3):
        write(disk, f"write -s {noise(workdir, seed)} {seed}M 2M", f"discard {5 - seed}M 64k")
        name = hvsnap.ok("snapshot-create", guest.name, "-q", "--name", f"n{seed}", "--tag", f"k=v{seed}").strip()
        states[name] = raw(disk, workdir / "raw")
    first, second, third = states
    hvsnap.ok("snapshot-delete", second)
    hvsnap.ok("store-compact")
    busy = hvsnap("store-rebuild")
    assert (busy.status, "in use" in busy.err) == (5, True)
    before = json.loads(hvsnap.ok("store-info", "--json"))
    assert hvsnap.end_daemon() == 0
    whole = hvsnap("store-rebuild")
    assert (whole.status, "whole" in whole.err, "--force" in whole.err) == (4, True, True)

    lose_catalog(workdir)
    refused = hvsnap("daemon")
    assert (refused.status, "store-rebuild" in refused.err) == (1, True), refused
    told = json.loads(hvsnap.ok("store-rebuild", "--json"))
    assert (told["snapshots"], told["disks"], told["damaged"], told["lost"], told["affected"]) == (2, 1, [], [], [])
    assert not (workdir / "state" / "rebuild").exists()
    hvsnap.start_daemon()
    after = json.loads(hvsnap.ok("store-info", "--json"))
    for key in ("repository", "snapshots", "packs", "size_bytes", "live_blocks", "live_bytes"):
        assert after[key] == before[key], key
    for snapshot in (first, third):
        hvsnap.ok("disk-create", snapshot, f"{snapshot}.raw", "--format", "raw")
        assert (workdir / f"{snapshot}.raw").read_bytes() == states[snapshot]
    info = json.loads(hvsnap.ok("snapshot-info", third, "--json"))
    assert (info["name"], info["tags"], info["parent"]) == ("n2", {"k": "v2"}, first)

    known = packs(workdir)
    fourth = hvsnap.ok("snapshot-create", guest.name, "-q").strip()
    info = json.loads(hvsnap.ok("snapshot-info", fourth, "--json"))
    assert (info["method"], info["parent"], info["changed_bytes"], info["stored_bytes"]) == ("rescan", third, 0, 0)
    assert packs(workdir) == known
    write(disk, f"write -s {noise(workdir, 7)} 9M 2M")
    fifth = hvsnap.ok("snapshot-create", guest.name, "-q").strip()
    assert json.loads(hvsnap.ok("snapshot-info", fifth, "--json"))["method"] == "bitmap"
    hvsnap.ok("disk-create", fifth, "fifth.raw", "--format", "raw")
    assert (workdir / "fifth.raw").read_bytes() == raw(disk, workdir / "raw")
    assert "sound" in hvsnap.ok("store-check")


def test_a_damaged_catalog_is_replaced_and_kept_and_a_damaged_store_is_told_of(
    hvsnap: CommandLine, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    """FAULTS 14."""
    disk = make_image(workdir / "a.qcow2", "64M")
    guest = make_guest([DiskSpec(disk)])
    write(disk, f"write -s {noise(workdir, 1)} 0 2M")
    hvsnap.start_daemon()
    first = hvsnap.ok("snapshot-create", guest.name, "-q").strip()
    hvsnap.end_daemon()
    catalog = workdir / "state" / "catalog.db"
    catalog.write_bytes(b"not a database, " * 4096)
    assert "store-rebuild" in hvsnap("daemon").err
    assert "catalog.db." in hvsnap.ok("store-rebuild")
    (kept,) = (workdir / "state").glob("catalog.db.*Z")
    assert kept.read_bytes().startswith(b"not a database")
    (pack,) = [path for path in (workdir / "state" / "store" / "packs").rglob("*") if path.is_file()]
    data = bytearray(pack.read_bytes())
    data[100_000] ^= 1
    pack.write_bytes(data)
    damaged = hvsnap("store-rebuild", "--force")
    assert (damaged.status, first in damaged.out) == (7, True), damaged
    hvsnap.start_daemon()
    assert hvsnap("disk-create", first, "bad.raw").status == 7
    hvsnap.ok("snapshot-create", guest.name, "-q")
    hvsnap.ok("disk-create", first, "healed.raw", "--format", "raw")
    assert (workdir / "healed.raw").read_bytes()[: 2 * MIB] == (workdir / "noise-1").read_bytes()


def test_an_old_copy_of_the_store_is_noticed(
    libvirtd: Libvirtd, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    """FAULTS 13."""
    disk = make_image(workdir / "a.qcow2", "64M")
    guest = make_guest([DiskSpec(disk)]).start()
    daemon = Daemon(workdir, libvirtd.uri).start()
    hvsnap = CommandLine(workdir, libvirtd.uri)
    try:
        (old,) = daemon.snapshot(guest.name)
        shutil.copytree(daemon.store, workdir / "copy", symlinks=True)  # while it runs, even
        daemon.snapshot(guest.name)
        assert daemon.stop() == 0
        shutil.move(daemon.store, workdir / "newer")
        missing = hvsnap("daemon")
        assert (missing.status, "there is no repository" in missing.err) == (1, True), missing
        assert not list(daemon.store.rglob("hvsnap.json"))
        shutil.rmtree(daemon.store, ignore_errors=True)
        shutil.copytree(workdir / "copy", daemon.store)
        older = hvsnap("daemon")
        assert (older.status, "older" in older.err, "store-rebuild" in older.err) == (1, True, True), older

        hvsnap.ok("store-rebuild", "--force")
        daemon.start()
        assert [one["id"] for one in json.loads(hvsnap.ok("snapshot-list", "--json"))["snapshots"]] == [old.id]
    finally:
        daemon.stop()
        hvsnap.close()


def test_the_host_burns_and_another_goes_on_with_the_store_and_the_key(
    libvirtd: Libvirtd, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    """The drill of docs/disaster-recovery.md: catalog, configuration and images are gone, the guests go on."""
    safe, old, new = workdir / "safe", workdir / "old", workdir / "new"
    for place in (safe, old, new):
        place.mkdir()
        place.chmod(0o755)
    (safe / "key").write_text(Random(5).randbytes(32).hex())
    (safe / "key").chmod(0o600)
    tables = {"store": f'url = "file://{safe / "store"}"\n[store.encryption]\nkey_file = "{safe / "key"}"'}
    images = [make_image(old / f"{name}.qcow2", "32M") for name in "ab"]
    guest = make_guest([DiskSpec(image) for image in images])
    burning = CommandLine(old, libvirtd.uri, **tables)
    burning.start_daemon()
    states: dict[str, bytes] = {}
    for seed in range(2):
        for image in images:
            write(image, f"write -s {noise(workdir, seed)} {seed * 3}M 2M")
        made = burning.ok("snapshot-create", guest.name, "--group", "-q", "--name", f"n{seed}").split()
        states |= {one: raw(image, workdir / "raw") for one, image in zip(made, images, strict=True)}
    burning.end_daemon(signal.SIGKILL)  # its lease is not given back; under one kernel it is seen to be dead
    burning.close()
    shutil.rmtree(old)

    hvsnap = CommandLine(new, libvirtd.uri, **tables)
    try:
        refused = hvsnap("daemon")
        assert (refused.status, "store-rebuild" in refused.err) == (1, True), refused
        assert "has died: its lease is taken over" in refused.err
        told = json.loads(hvsnap.ok("store-rebuild", "--json"))
        assert (told["snapshots"], told["disks"], told["damaged"], told["lost"]) == (4, 2, [], [])
        hvsnap.start_daemon()
        for snapshot, state in states.items():
            hvsnap.ok("disk-create", snapshot, f"{snapshot}.raw", "--format", "raw")
            assert (new / f"{snapshot}.raw").read_bytes() == state
        # The guests' disks where they were, and the guests go on.
        old.mkdir(mode=0o755)
        for snapshot, image in zip(list(states)[2:], images, strict=True):
            hvsnap.ok("disk-create", snapshot, str(image))
            image.chmod(0o666)
        guest.start()
        guest.qemu_io(0, "write -P 7 20M 1M")
        guest.qemu_io(0, "flush")
        parents = list(states)[2:]
        again = hvsnap.ok("snapshot-create", guest.name, "-q").split()
        for snapshot, parent in zip(again, parents, strict=True):
            info = json.loads(hvsnap.ok("snapshot-info", snapshot, "--json"))
            assert (info["kind"], info["parent"], info["method"]) == ("incremental", parent, "rescan")
        hvsnap.ok("disk-create", again[0], "after.raw", "--format", "raw")
        expected = bytearray(states[parents[0]])
        expected[20 * MIB : 21 * MIB] = b"\x07" * MIB
        assert (new / "after.raw").read_bytes() == expected
        assert "sound" in hvsnap.ok("store-check")
    finally:
        hvsnap.close()
