"""The doctor on a host that has traps set: each is found, named with its evidence, and has a way out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.cli_kit import HVSNAP
from tests.conftest import short_directory
from tests.daemon_kit import Daemon
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd, wait_for

CHECKPOINT = "<domaincheckpoint><name>nightly</name><disks><disk name='vda'/></disks></domaincheckpoint>"


class Host:
    """A libvirtd, a guest with one good disk and some that are not, a daemon."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.libvirtd = Libvirtd(directory / "libvirt")
        self.libvirtd.start()
        images = directory / "images"
        images.mkdir()
        disks = [DiskSpec(make_image(images / "good.qcow2", "16M"))]
        disks.append(DiskSpec(make_image(images / "unsafe.qcow2", "16M"), driver="cache='unsafe'"))
        disks.append(DiskSpec(self._raw(images / "odd.raw"), "raw"))
        disks.append(DiskSpec(make_image(images / "shared.raw", "16M", "raw"), "raw", extra="<shareable/>"))
        for path in images.iterdir():
            path.chmod(0o666)
        self.guest = Guest(self.libvirtd, directory, "web01", disks).define()
        self.daemon = Daemon(directory, self.libvirtd.uri, capture=f"overlay_dir = '{self._overlays()}'")

    def _raw(self, path: Path) -> Path:
        """Return a raw disk whose guest has written a qcow2 header into it."""
        header = make_image(path, "16M").read_bytes()[:512]
        make_image(path, "16M", "raw")
        with path.open("r+b") as image:
            image.write(header)
        return path

    def _overlays(self) -> Path:
        """Return a directory that QEMU's user cannot enter."""
        path = self.directory / "closed" / "overlays"
        path.mkdir(parents=True)
        path.parent.chmod(0o700)
        return path

    def doctor(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """Return the exit status, and the finding of each check."""
        done = subprocess.run([HVSNAP, "--config", self.daemon.config, "--json", "doctor"], capture_output=True)
        report = json.loads(done.stdout)
        return done.returncode, {one["check"]: one for one in report["findings"]}

    def close(self) -> None:
        self.daemon.kill()
        self.guest.remove()
        self.libvirtd.stop()
        subprocess.run(["rm", "-rf", self.directory], check=True)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    one = Host(short_directory())
    yield one
    one.close()


def test_every_trap_of_a_guest_is_a_finding_with_evidence_and_remedy(host: Host) -> None:
    good = host.directory / "images" / "good.qcow2"
    for name in ("theirs", "hvsnap-forgotten"):
        subprocess.run(["qemu-img", "bitmap", "--add", "--disable", good, name], check=True)
    host.guest.start()
    host.guest.domain().checkpointCreateXML(CHECKPOINT, 0)
    host.daemon.start()
    _status, found = host.doctor()
    expected = {
        "cache-unsafe": ("warning", "cache='unsafe' on vdb of web01"),
        "no-discard": ("info", "vdb of web01"),
        "raw-header": ("warning", "odd.raw (vdc of web01)"),
        "raw-image": ("info", "odd.raw is raw"),
        "disk-left-out": ("warning", "vdd of web01 (it is shared with other guests)"),
        "bitmap-foreign": ("info", "theirs on vda of web01"),
        "bitmap-unused": ("info", "hvsnap-forgotten on vda of web01"),
        "checkpoints": ("info", "web01: nightly"),
        "hook": ("warning", "50-hvsnap"),
        "qemu-nbd-iothread": ("info", "QEMU 7"),
        "mqtt": ("info", "mqtt.url is empty"),
        "catalog": ("ok", "0 disks"),
        "journal": ("ok", "no entry is open"),
    }
    seen = {check: (one["severity"], one["evidence"]) for check, one in found.items()}
    for check, (severity, evidence) in expected.items():
        assert check in seen, check
        assert seen[check][0] == severity, seen[check]
        assert evidence in seen[check][1], seen[check]
    assert all(one["remedy"] for one in found.values() if one["severity"] in ("warning", "error"))


def test_an_overlay_directory_that_qemu_cannot_enter_is_an_error_until_it_can(host: Host) -> None:
    """As libvirt's user of guests, tried by the kernel, not guessed from modes."""
    if not host.daemon.alive():
        host.daemon.start()
    label = libvirt.open(host.libvirtd.uri).getCapabilities()
    if "<model>dac</model>" not in label:
        pytest.skip("this libvirt runs guests as its own user")
    status, found = host.doctor()
    if found["overlay-access"]["evidence"].endswith("as uid 0, gid 0"):
        assert found["overlay-access"]["severity"] == "ok"
        return
    assert (status, found["overlay-access"]["severity"]) == (1, "error")
    (host.directory / "closed").chmod(0o711)
    assert host.doctor()[1]["overlay-access"]["severity"] == "ok"


def test_broken_bitmaps_of_others_are_named_with_the_way_to_remove_them(host: Host) -> None:
    if not host.daemon.alive():
        host.daemon.start()
    host.guest.start()
    node = next(one for one in host.guest.qmp("query-named-block-nodes") if one["file"].endswith("good.qcow2"))
    host.guest.qmp("block-dirty-bitmap-add", node=node["node-name"], name="torn", persistent=True)
    host.guest.qemu_io(0, "write 0 64k")
    # Stored once, then open for writing when QEMU dies: in use, and never closed.
    host.guest.destroy()
    host.guest.start()
    host.guest.qemu_io(0, "write 0 64k")
    host.guest.qemu_io(0, "flush")
    host.guest.kill()
    wait_for(lambda: not host.guest.active, "the end of the guest")
    _status, found = host.doctor()
    assert found["bitmap-inconsistent"]["severity"] == "warning"
    assert "torn on vda of web01" in found["bitmap-inconsistent"]["evidence"]
    image = host.directory / "images" / "good.qcow2"
    assert "qemu-img bitmap --remove" in found["bitmap-inconsistent"]["remedy"]
    named = found["bitmap-inconsistent"]["evidence"].split(", ")
    for name in [one.split(" on ")[0] for one in named]:
        subprocess.run(["qemu-img", "bitmap", "--remove", image, name], check=True)
    assert "bitmap-inconsistent" not in host.doctor()[1]


def test_without_a_daemon_it_says_so_and_looks_at_what_can_be_seen(host: Host) -> None:
    host.daemon.stop()
    status, found = host.doctor()
    assert (status, found["daemon"]["severity"]) == (1, "error")
    assert {"kvm", "libvirt", "hook", "clock", "configuration"} <= found.keys()
    good = host.daemon.config.read_text()
    host.daemon.config.write_text(good + '[mqtt]\nurl = "mqtt://127.0.0.1:9"\n')
    assert "Connection refused" in host.doctor()[1]["mqtt"]["evidence"]
    host.daemon.config.write_text(good + "[capture2]\n")
    status, found = host.doctor()
    assert (status, found["configuration"]["severity"]) == (1, "error")
    assert "capture2: there is no such key" in found["configuration"]["evidence"]
    host.daemon.config.write_text(good)
