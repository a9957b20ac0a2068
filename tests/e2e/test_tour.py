"""docs/tour.md, walked: its commands as they stand there, with a real guest whose file is lost and comes back."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hvsnap import wire
from tests.cli_kit import HVSNAP
from tests.e2e.test_policies import TurnedDaemon
from tests.guest import appliance
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd, wait_for

TOUR = (Path(__file__).parents[2] / "docs" / "tour.md").read_text()
REPORT = "all figures of the year\n"
LOST_BYTES = 1 << 20
NOON = datetime.now(UTC).replace(hour=12, minute=0, second=0)
"""Of today: it is not two o'clock while the policy is being made."""


def chapter(title: str) -> list[str]:
    """Return the commands under a heading."""
    text = re.split(rf"^## {title}$", TOUR, flags=re.MULTILINE)[1].split("\n## ")[0]
    return re.findall(r"^\$ (.*)$", text, re.MULTILINE)


class Walk:
    """A shell in which the chapters run one after the other, so that a later one knows the variables of the earlier."""

    def __init__(self, directory: Path, daemon: TurnedDaemon) -> None:
        self.directory = directory
        self.script = f'set -euo pipefail\nhvsnap() {{ "{HVSNAP}" --config "{daemon.config}" "$@"; }}\n'

    def go(self, title: str) -> str:
        """Run a chapter, and return what it prints."""
        commands = chapter(title)
        assert commands
        done = subprocess.run(
            ["bash", "-c", self.script + "\n".join(commands)],
            cwd=self.directory, capture_output=True, text=True, timeout=170,
            env={**os.environ, **appliance.environment()},
        )  # fmt: skip
        assert done.returncode == 0, (title, done.stdout, done.stderr)
        self.script += "\n".join(one for one in commands if re.match(r"[a-z]+=", one)) + "\n"
        return done.stdout


@pytest.fixture
def data(workdir: Path) -> Path:
    """A disk with a file system, in which the report lies."""
    (workdir / "files").mkdir()
    (workdir / "files" / "report.txt").write_text(REPORT)
    plain = workdir / "data.raw"
    command = ["/sbin/mke2fs", "-q", "-t", "ext4", "-d", str(workdir / "files"), str(plain), "16M"]
    subprocess.run(command, check=True)
    image = workdir / "data.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(plain), str(image)], check=True)
    return image


@pytest.fixture
def guest(libvirtd: Libvirtd, guest_image: GuestImage, workdir: Path, data: Path) -> Iterator[Guest]:
    system = make_image(workdir / "system.qcow2", "16M")
    one = Guest(libvirtd, workdir, "web01", [DiskSpec(system), DiskSpec(data)], guest_image)
    yield one.define().start()
    one.remove()


@pytest.fixture
def daemon(libvirtd: Libvirtd, workdir: Path) -> Iterator[TurnedDaemon]:
    one = TurnedDaemon(workdir, libvirtd.uri)
    one.turn(NOON.timestamp())
    one.start()
    yield one
    one.stop()


def test_the_walk_of_the_tour(daemon: TurnedDaemon, guest: Guest, data: Path, workdir: Path) -> None:
    walk = Walk(workdir, daemon)
    told = walk.go("Snapshots by themselves")
    assert "web01" in told
    daemon.turn((NOON + timedelta(hours=14, minutes=2)).timestamp())
    wait_for(lambda: sum(one.state == "accomplished" for one in daemon.snapshots()) == 2, "the night's snapshots", 60)
    daemon.settled()
    before = subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", str(data), str(workdir / "before.raw")])
    assert before.returncode == 0
    guest.qemu_io(1, f"write -z 0 {LOST_BYTES}")

    told = walk.go("A file of yesterday")
    assert "auto_" in told
    assert REPORT in told
    walk.go("Back with it")
    assert "<target dev='vdc'" in guest.domain().XMLDesc()
    booted = guest.pid
    walk.go("Or the whole disk")
    night = next(one for one in daemon.snapshots() if one.target == "vdb" and one.automatic)
    assert (workdir / "before.raw").read_bytes() == daemon.restored(night.id, workdir)
    with daemon.client() as client:
        tasks = client.get("/tasks", wire.TaskList).tasks
    (done,) = [task.result for task in tasks if isinstance(task.result, wire.RolledBack)]
    assert done.started
    assert done.safety_snapshot is not None
    assert 0 < done.written_bytes <= LOST_BYTES * 1.05, "only what differs is written"
    assert guest.pid != booted, "it was shut down and started"
    guest.destroy()
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(data), str(workdir / "after.raw")], check=True)
    assert (workdir / "after.raw").read_bytes() == (workdir / "before.raw").read_bytes()
    told = walk.go("What it costs")
    assert "web01" in told
    assert "would free" in told
