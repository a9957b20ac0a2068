"""An encrypted store under a real daemon: guests' bytes go in and come back, none lies there in plain."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvsnap import rebuilding
from hvsnap.config import load
from hvsnap.errors import Refused
from tests.daemon_kit import Daemon
from tests.e2e.test_command_line import CommandLine, raw, write
from tests.e2e.test_rebuild import lose_catalog
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd

MARKER = b"marker-of-a-guest-0123456789abcdef"


@pytest.fixture
def hvsnap(libvirtd: Libvirtd, workdir: Path) -> Iterator[CommandLine]:
    one = CommandLine(workdir, libvirtd.uri)
    yield one
    one.close()


def a_key(path: Path, text: str) -> Path:
    path.write_text(text + "\n")
    path.chmod(0o600)
    return path


def everything(store: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_an_encrypted_store_from_its_creation_to_its_rebuild(
    hvsnap: CommandLine, make_guest: Callable[..., Guest], workdir: Path, libvirtd: Libvirtd
) -> None:
    disk = make_image(workdir / "a.qcow2", "64M")
    guest = make_guest([DiskSpec(disk)])
    store = workdir / "state" / "store"
    old, new = a_key(workdir / "old.key", os.urandom(32).hex()), a_key(workdir / "new.key", "a long passphrase")

    def configure(key: Path | None) -> None:
        tables = {} if key is None else {"store.encryption": f'key_file = "{key}"'}
        Daemon(workdir, libvirtd.uri, **tables)  # writes the configuration that both use

    (workdir / "text").write_bytes(MARKER * 4096)
    (workdir / "noise").write_bytes(os.urandom(100_000) + MARKER + os.urandom(100_000))
    write(disk, f"write -s {workdir / 'text'} 0 128k", f"write -s {workdir / 'noise'} 1M 192k")
    states: dict[str, bytes] = {}
    configure(old)
    hvsnap.start_daemon()
    for number in range(2):
        states[hvsnap.ok("snapshot-create", guest.name, "-q", "--name", "marked-name").strip()] = raw(
            disk, workdir / "raw"
        )
        write(disk, f"write -P {number + 7} {number}M 256k")
    assert "none damaged" in hvsnap.ok("snapshot-verify", "--all")
    assert hvsnap.end_daemon() == 0
    for data in everything(store).values():
        for marker in (MARKER, b"marked-name", guest.name.encode(), str(disk).encode()):
            assert marker not in data

    before = everything(store)
    for wrong, why in ((None, "no key"), (new, "not the store's")):
        configure(wrong)
        for command in (["daemon"], ["recover"], ["store-rebuild", "--force"]):
            ran = hvsnap(*command)
            assert (ran.status, why in ran.err) == (4, True), (command, ran)
    assert everything(store) == before

    configure(old)
    hvsnap.ok("store-rekey", str(new))
    refused = hvsnap("daemon")
    assert (refused.status, "not the store's" in refused.err) == (4, True), refused
    configure(new)
    lose_catalog(workdir)
    print(hvsnap.ok("store-rebuild"))
    hvsnap.start_daemon()
    for snapshot, content in states.items():
        hvsnap.ok("disk-create", snapshot, f"{snapshot}.raw", "--format", "raw")
        assert (workdir / f"{snapshot}.raw").read_bytes() == content
    third = hvsnap.ok("snapshot-create", guest.name, "-q").strip()
    assert json.loads(hvsnap.ok("snapshot-info", third, "--json"))["method"] == "rescan"
    hvsnap.ok("disk-create", third, "third.raw", "--format", "raw")
    assert (workdir / "third.raw").read_bytes() == raw(disk, workdir / "raw")
    check_reading_host(workdir, store, {None: "no key", old: "not the store's"}, new, states)
    assert hvsnap.end_daemon() == 0


def check_reading_host(
    workdir: Path, store: Path, wrong: dict[Path | None, str], key: Path, states: dict[str, bytes]
) -> None:
    """Another host reads the store, while its writer's daemon runs, with the key alone."""
    directory = workdir / "b"
    (directory / "state").mkdir(parents=True)

    def reader(key: Path | None) -> Daemon:
        tables = {} if key is None else {"store.encryption": f'key_file = "{key}"'}
        return Daemon(directory, "", store=f'url = "file://{store}"\nread_only = true', **tables)

    for no, why in wrong.items():
        with pytest.raises(Refused, match=why) as refused:
            rebuilding.rebuild(load(reader(no).config), force=False)
        assert "key" in refused.value.hint
        assert not (directory / "state" / "catalog.db").exists()
    daemon = reader(key)
    assert rebuilding.rebuild(load(daemon.config), force=False).damaged == []
    daemon.start()
    for snapshot, content in states.items():
        assert daemon.restored(snapshot, directory) == content
    assert daemon.stop() == 0
    for no, why in wrong.items():
        daemon = reader(no).start(wait=False)
        assert daemon.wait_dead() == 4
        assert why in daemon.log.read_text()


def test_a_plain_store_stays_plain(
    hvsnap: CommandLine, make_guest: Callable[..., Guest], workdir: Path, libvirtd: Libvirtd
) -> None:
    guest = make_guest([DiskSpec(make_image(workdir / "a.qcow2", "16M"))])
    hvsnap.start_daemon()
    hvsnap.ok("snapshot-create", guest.name, "-q")
    assert hvsnap.end_daemon() == 0
    before = everything(workdir / "state" / "store")
    key = a_key(workdir / "k", os.urandom(32).hex())
    assert hvsnap("store-rekey", str(key)).status == 4
    Daemon(workdir, libvirtd.uri, **{"store.encryption": f'key_file = "{key}"'})
    refused = hvsnap("daemon")
    assert (refused.status, "not encrypted" in refused.err) == (4, True), refused
    assert everything(workdir / "state" / "store") == before
