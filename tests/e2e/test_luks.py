"""Disks with LUKS inside: what the guest sees is captured and set back, into an encrypted store or not at all."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from hvsnap.cli.client import DaemonError
from tests.conftest import short_directory
from tests.e2e.oracle import BLOCK
from tests.e2e.rig import DoctoredDaemon, Rig
from tests.e2e.scenarios import write
from tests.guest.domain import DiskSpec, make_image
from tests.guest.libvirtd import Libvirtd
from tests.guest.luks import PASSPHRASE, Secret, keep_secret, make_luks, opened_luks, passphrase_file

MIB = 1 << 20
SIZE = 4 * MIB + 512 * 77
MARKER = b"what only the guest may see 0123456789"


@dataclass(frozen=True)
class LuksSpec(DiskSpec):
    """A disk whose image libvirt opens with a secret."""

    secret: Secret | None = None

    @property
    def opened(self) -> tuple[list[str], str]:
        return super().opened if self.secret is None else opened_luks(self.path, self.secret)

    def xml(self, number: int) -> str:
        assert self.secret is not None
        inside = f"<encryption format='luks'><secret type='passphrase' {self.secret.name}/></encryption></source>"
        head, _, tail = super().xml(number).partition("/><target")
        return f"{head}>{inside}<target{tail}"


@pytest.fixture(scope="module")
def blank() -> Iterator[Path]:
    """Return an encrypted image to be copied: making one takes QEMU two seconds."""
    directory = short_directory()
    yield make_luks(directory / "blank.qcow2", str(SIZE), Secret("", passphrase_file(directory)))
    shutil.rmtree(directory)


def a_copy(blank: Path, path: Path, secret: Secret, template: Path | None = None, **spec: str) -> LuksSpec:
    """Return an encrypted disk, on a template where one is named."""
    shutil.copy(blank, path)
    disk = LuksSpec(path, secret=secret, **spec)  # type: ignore[arg-type]
    if template is not None:
        how, image = disk.opened
        argv = ["qemu-img", "rebase", *how, "-u", "-b", template, "-F", "qcow2", image]
        subprocess.run(argv, check=True, capture_output=True)
    return disk


def in_no_file(directory: Path) -> None:
    """Check that a marker lies nowhere: not in the images and overlays, and not in the store."""
    for path in [*directory.rglob("*")]:
        if path.is_file() and not path.name.startswith("pattern"):
            assert MARKER not in path.read_bytes(), path


def test_encrypted_disks_live_like_others_and_nothing_of_them_is_left_in_plain(
    libvirtd: Libvirtd, sealed: dict[str, str], make_rig: Callable[..., Rig], workdir: Path, blank: Path
) -> None:
    secret, by_usage = keep_secret(libvirtd.uri, workdir), keep_secret(libvirtd.uri, workdir, usage=f"{workdir}/b")
    template = make_image(workdir / "template.qcow2", str(SIZE))
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 300k", template], check=True, capture_output=True)
    rig = make_rig(
        [
            a_copy(blank, workdir / "a, b.qcow2", secret),
            a_copy(blank, workdir / "b.qcow2", by_usage, template, bus="scsi"),
            DiskSpec(make_image(workdir / "c.qcow2", str(SIZE))),
        ],
        **sealed,
    )
    first, second, _plain = rig.disks
    random = Random(4)
    for disk in rig.disks:
        rig.random_operations(random, disk, 8)
    made = rig.capture(rig.disks, storm=random, group=True)
    assert {one.target: one.encrypted for one in made} == {"vda": True, "sdb": True, "vdc": False}
    for disk in rig.disks:
        rig.flush(disk)
    rig.guest.destroy()
    by_target = {one.target: one.id for one in made}
    for disk in rig.disks:
        rig.random_operations(random, disk, 4)
        rig.roll_back(disk, by_target[disk.target], safety_snapshot=disk is first)
        rig.random_operations(random, disk, 2)
    rig.capture(rig.disks, group=True)
    rig.guest.start()

    def die() -> None:
        """The guest writes, and dies: its overlays are merged without it."""
        for disk in (first, second):
            marked = write(2 * BLOCK, 3 * BLOCK, 1)
            marked = replace(marked, data=np.resize(np.frombuffer(MARKER, np.uint8), marked.length))
            rig.do(disk, marked)
            rig.flush(disk)
        assert len(rig.overlays()) == 2
        in_no_file(workdir)
        rig.guest.kill()

    rig.capture([first, second], die, group=True)
    rig.guest.start()

    def die_and_return() -> None:
        rig.do(first, write(6 * BLOCK, 3 * BLOCK, 2))
        rig.flush(first)
        rig.guest.kill()
        rig.guest.start()
        rig.do(first, write(7 * BLOCK, 3 * BLOCK, 3))

    (last,) = rig.capture([first], die_and_return)
    assert last.method == "bitmap"
    for disk in rig.disks:
        rig.check_disk(disk, "at the end")
        rig.check_snapshots(disk)


def test_what_cannot_be_kept_secret_or_opened_is_refused_and_untouched(
    libvirtd: Libvirtd,
    sealed: dict[str, str],
    make_rig: Callable[..., Rig],
    make_daemon: Callable[..., DoctoredDaemon],
    workdir: Path,
    blank: Path,
) -> None:
    secret = keep_secret(libvirtd.uri, workdir)
    private = keep_secret(libvirtd.uri, workdir, private=True)
    rig = make_rig(
        [
            a_copy(blank, workdir / "a.qcow2", secret),
            a_copy(blank, workdir / "b.qcow2", private),
            DiskSpec(make_image(workdir / "c.qcow2", str(SIZE))),
        ]
    )
    plain_store = rig.daemon
    sealed_store = make_daemon("", **sealed)
    before = {path: path.read_bytes() for path in workdir.glob("*.qcow2")}
    for daemon, disks, why in (
        (plain_store, ["vda"], "the store has no key"),
        (plain_store, [], "the store has no key"),
        (sealed_store, ["vdb"], "does not give out the secret"),
    ):
        with pytest.raises(DaemonError) as caught:
            daemon.begin(rig.guest.name, disks)
        assert (caught.value.error.code, caught.value.error.exit_status) == ("refused", 4)
        assert why in caught.value.error.message, caught.value.error
        assert PASSPHRASE.decode() not in daemon.log.read_text()
        assert daemon.status().snapshots == 0
    assert before == {path: path.read_bytes() for path in workdir.glob("*.qcow2")}
