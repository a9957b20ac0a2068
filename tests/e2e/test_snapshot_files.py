"""`snapshot-ls` and `snapshot-cp`: what a guest wrote is found in its snapshot and comes out of it; nothing is left."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvsnap import wire
from hvsnap.cli.client import DaemonError
from tests.cli_kit import HVSNAP
from tests.e2e.rig import DoctoredDaemon
from tests.guest import appliance
from tests.guest.domain import DiskSpec, Guest
from tests.guest.image import GuestImage
from tests.guest.libvirtd import host_pids, wait_for

WRITE = r"""
mount /dev/vda /mnt && cd /mnt && mkdir -p files/closed files/deep/er && cd files
seq 1 200000 > numbers; head -c 3000000 /dev/urandom > random; truncate -s 30000000 sparse; echo end >> sparse
echo odd > "$(printf 'line\nbreak')"; echo odd > "$(printf 'byte\377')"; echo odd > '$(touch PWNED); -rf'
ln -s /etc/shadow shadow; ln -s ../../../../../../../../etc up; ln numbers again; mkfifo pipe; mknod disk b 254 0
cp /bin/busybox su; chmod 6755 su; chown 1000:1001 random; echo deep > deep/er/file; chmod 640 deep/er/file
touch -d '2001-02-03 04:05:06' deep/er/file; echo closed > closed/file; chmod 500 closed
echo report > /mnt/report.txt; sync; md5sum random su
"""


class Files:
    """The commands, of a daemon and its snapshot, in a directory of their own."""

    def __init__(self, daemon: DoctoredDaemon, snapshot: str, directory: Path) -> None:
        self.daemon = daemon
        self.snapshot = snapshot
        self.directory = directory
        self.temporary = directory / "tmp"
        self.temporary.mkdir()

    def begin(self, command: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a command; `@` stands for the snapshot."""
        words = [argument.replace("@", self.snapshot, 1) for argument in arguments]
        return subprocess.Popen(
            [HVSNAP, "--config", str(self.daemon.config), command, *words],
            env={**os.environ, **appliance.environment(), "TMPDIR": str(self.temporary)},
            cwd=self.directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def lookers(self) -> int:
        with self.daemon.client() as client:
            return sum(one.lookers for one in client.get("/served", wire.ServedList).served)

    def qemus(self) -> list[int]:
        """Return the machines of libguestfs that run for us."""
        return host_pids("qemu-system", str(self.temporary))

    def check_nothing_is_left(self) -> None:
        assert self.lookers() == 0
        assert self.qemus() == []
        assert list(self.temporary.iterdir()) == []
        assert [path.name for path in self.directory.rglob(".hvsnap-copy-*")] == []


def ended(process: subprocess.Popen[str]) -> tuple[Any, str]:
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    return json.loads(out), err


def test_s12_files_that_a_guest_wrote_come_back_and_nothing_else_is_touched(
    make_guest: Callable[..., Guest],
    make_daemon: Callable[..., DoctoredDaemon],
    guest_image: GuestImage,
    workdir: Path,
) -> None:
    disk = workdir / "disk.raw"
    subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", str(disk), "48M"], check=True)
    guest = make_guest([DiskSpec(disk, "raw")], guest_image).start()
    sums = guest.run(WRITE).split()
    daemon = make_daemon()
    (snapshot,) = daemon.snapshot(guest.name)  # still mounted: its journal is to be replayed
    guest.run("rm -rf /mnt/files /mnt/report.txt; sync")
    guest.destroy()
    files = Files(daemon, snapshot.id, workdir)

    copying = files.begin("snapshot-cp", "@:/files", "@:/report.txt", "new", "--json")
    assert "there is no directory new" in copying.communicate(timeout=60)[0]
    (workdir / "new").mkdir()
    copying = files.begin("snapshot-cp", "@:/files", "@:/report.txt", "new", "--json")
    listing = files.begin("snapshot-ls", "@:/files", "--recursive", "--json")
    wait_for(lambda: files.lookers() == 2, "both to look into it", 60)
    delete = wire.SnapshotDelete(ids=[snapshot.id])
    with daemon.client() as client, pytest.raises(DaemonError, match="being served"):
        client.post("/snapshots/delete", wire.Deletion, delete)

    answer, _err = ended(copying)
    copied = wire.FilesCopied.model_validate(answer)
    assert copied.targets == [str(workdir / "new" / "files"), str(workdir / "new" / "report.txt")]
    left_out = sorted((one.path, one.kind) for one in copied.skipped)
    assert left_out == [("/files/disk", "block device"), ("/files/pipe", "fifo")]
    assert (copied.files, copied.directories, copied.symlinks, copied.disarmed) == (11, 4, 2, 1)
    check_copy(workdir / "new", sums)

    listed = wire.FileList.model_validate(ended(listing)[0])
    by_path = {one.path: one for one in listed.files}
    assert (listed.filesystem, len(by_path)) == ("/dev/sda", 17)
    assert by_path["/files/sparse"].size_bytes == 30_000_004
    assert (by_path["/files/random"].uid, by_path["/files/random"].gid) == (1000, 1001)
    assert (by_path["/files/su"].mode, by_path["/files/up"].kind) == (0o6755, "symlink")
    assert by_path["/files/byte\\xff"].mode is None
    assert by_path["/files/line\nbreak"].size_bytes == 4
    assert not os.path.lexists(workdir / "PWNED")
    files.check_nothing_is_left()

    check_interruptions(files)
    with daemon.client() as client:
        client.post("/snapshots/delete", wire.Deletion, delete)


def check_copy(new: Path, sums: list[str]) -> None:
    """Check a copy byte for byte, with what belongs to each file."""
    root = new / "files"
    assert (new / "report.txt").read_text() == "report\n"
    assert (root / "numbers").read_text() == "".join(f"{number}\n" for number in range(1, 200_001))
    assert (root / "again").samefile(root / "numbers")
    assert hashlib.md5((root / "random").read_bytes()).hexdigest() == sums[0]
    assert hashlib.md5((root / "su").read_bytes()).hexdigest() == sums[2]
    assert (root / "sparse").read_bytes() == bytes(30_000_000) + b"end\n"
    assert (root / "sparse").stat().st_blocks < 1000
    for name in (b"line\nbreak", b"byte\xff", b"$(touch PWNED); -rf"):
        assert Path(os.fsdecode(os.path.join(os.fsencode(root), name))).read_text() == "odd\n"
    assert (os.readlink(root / "shadow"), os.readlink(root / "up")) == ("/etc/shadow", "../" * 8 + "etc")
    assert (root / "deep" / "er" / "file").stat().st_mtime == 981_173_106
    assert stat.S_IMODE((root / "deep" / "er" / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((root / "closed").stat().st_mode) == 0o500
    assert (root / "closed" / "file").read_text() == "closed\n"
    assert stat.S_IMODE((root / "su").stat().st_mode) == 0o755
    assert ((root / "random").stat().st_uid, (root / "random").stat().st_gid) == (1000, 1001)


def check_interruptions(files: Files) -> None:
    """Check that neither Ctrl-C nor SIGKILL leaves anything, whatever libguestfs is doing."""
    process = files.begin("snapshot-cp", "@:/files", "half")
    wait_for(lambda: bool(files.qemus()), "libguestfs' machine", 60)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False)
    files.check_nothing_is_left()
    process = files.begin("snapshot-cp", "@:/files", "half")
    wait_for(lambda: bool(files.qemus()), "libguestfs' machine", 60)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while files.lookers() or files.qemus() or list(files.temporary.iterdir()):
        assert time.monotonic() < deadline, "something is left of a command that was killed"
        time.sleep(0.1)
    assert not os.path.lexists(files.directory / "half")
