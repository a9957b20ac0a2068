"""The main path over a real Ceph's S3 gateway: bytes there and back, and one writer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import obstore
import pytest

from hvsnap import wire
from hvsnap.store.s3 import connect
from tests.ceph import ACCESS_KEY, SECRET_KEY, Ceph, make_bucket
from tests.conftest import short_directory
from tests.daemon_kit import Daemon
from tests.e2e.rig import DoctoredDaemon
from tests.e2e.test_encrypted_store import a_key
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd

BUCKET = "hvsnap-e2e"


@pytest.fixture(scope="module")
def ceph() -> Iterator[Ceph]:
    path = short_directory()
    with Ceph(path) as cluster:
        make_bucket(cluster, BUCKET)
        yield cluster
    shutil.rmtree(path, ignore_errors=True)


def s3_tables(ceph: Ceph, key: Path, prefix: str) -> dict[str, str]:
    key.write_text(f"{SECRET_KEY}\n")
    key.chmod(0o600)
    return {
        "store": f'url = "s3://{BUCKET}/{prefix}"',
        "store.s3": f'endpoint = "{ceph.endpoint}"\naccess_key = "{ACCESS_KEY}"\nsecret_key_file = "{key}"',
    }


def as_raw(image: Path, scratch: Path) -> bytes:
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(scratch)], check=True)
    return scratch.read_bytes()


def test_snapshots_in_a_bucket_restore_byte_for_byte(
    ceph: Ceph,
    libvirtd: Libvirtd,
    make_guest: Callable[..., Guest],
    guest_image: GuestImage,
    workdir: Path,
) -> None:
    disk = make_image(workdir / "a.qcow2", "96M")
    guest = make_guest([DiskSpec(disk)], guest_image).start()
    daemon = Daemon(workdir, libvirtd.uri, **s3_tables(ceph, workdir / "key", "host-1")).start()
    try:
        guest.run("stress random /dev/vda 1 120 2000000")
        daemon.snapshot(guest.name)
        guest.run("stress random /dev/vda 2 40 300000")
        (second,) = daemon.snapshot(guest.name)
        assert second.method == "bitmap"
        assert second.read_bytes < second.size_bytes // 2
        # Killed and started again: its own lease does not keep it out.
        daemon.kill()
        daemon.start()
        guest.shutdown()
        assert daemon.restored(second.id, workdir) == as_raw(disk, workdir / "now.raw")
    finally:
        daemon.stop()


def test_s7_2_an_instant_disk_of_an_encrypted_bucket(
    ceph: Ceph, make_daemon: Callable[..., DoctoredDaemon], make_guest: Callable[..., Guest], workdir: Path
) -> None:
    """Read while nothing of it is filled, and after it has become an ordinary disk; the bucket shows no plain byte."""
    marker = b"a marker that compresses badly enough: " + os.urandom(32)
    (workdir / "noise").write_bytes(os.urandom(1 << 20) + marker + os.urandom((1 << 20) - len(marker)))
    source, path = make_image(workdir / "a.qcow2", "64M"), workdir / "new.qcow2"
    words = ["-c", f"write -s {workdir / 'noise'} 3M 2M", "-c", f"write -s {workdir / 'noise'} 60M 2M"]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(source)], check=True, capture_output=True)
    content = as_raw(source, workdir / "content")
    key = a_key(workdir / "store.key", os.urandom(32).hex())
    tables = s3_tables(ceph, workdir / "key", "sealed") | {"store.encryption": f'key_file = "{key}"'}
    daemon = make_daemon(**tables)
    (snapshot,) = daemon.snapshot(make_guest([DiskSpec(source)]).name)
    with daemon.gate("fill"), daemon.client() as client:
        client.post("/disks", wire.Task, wire.DiskCreate(snapshot=snapshot.id, path=str(path), instant=True))
        assert as_raw(path, workdir / "at-once") == content
    daemon.settled()
    shown = json.loads(
        subprocess.run(["qemu-img", "info", "--output=json", path], check=True, capture_output=True).stdout
    )
    assert "backing-filename" not in shown
    assert as_raw(path, workdir / "whole") == content
    bucket = connect(ceph.place(BUCKET))
    names = [one["path"] for listed in obstore.list(bucket, "sealed") for one in listed]
    assert any("packs/" in name for name in names)
    assert not any(marker in bytes(obstore.get(bucket, name).bytes()) for name in names)


def test_a_second_daemon_on_the_same_bucket_is_refused(ceph: Ceph, libvirtd: Libvirtd, workdir: Path) -> None:
    """FAULTS 15."""
    tables = s3_tables(ceph, workdir / "key", "shared")
    first = Daemon(workdir, libvirtd.uri, **tables).start()
    other_directory = workdir / "other"
    other_directory.mkdir()
    second = Daemon(other_directory, libvirtd.uri, **tables)
    try:
        second.start(wait=False)
        assert second.wait_dead(90) == 5
        assert "the store is in use by a daemon on test-host" in second.log.read_text()
        assert first.status().stopping is False
    finally:
        second.kill()
        first.stop()
    # Its end in good order frees the store at once.
    second.start()
    assert second.stop() == 0
