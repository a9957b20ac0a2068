"""A guest of the tests: defined in libvirt, booted without a boot loader, told what to do through virtio ports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import libvirt
import libvirt_qemu

from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd, host_pids, wait_for
from tests.guest.shell import Shell


def kvm_works() -> bool:
    """Whether KVM is real here: /dev/kvm alone may exist and hang the guest."""
    flags = Path("/proc/cpuinfo").read_text()
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and (" vmx" in flags or " svm" in flags)


@dataclass(frozen=True)
class DiskSpec:
    """One disk of a guest. The image is made by the test."""

    path: Path
    format: str = "qcow2"
    bus: str = "virtio"
    serial: str = ""
    iothread: bool = False
    extra: str = ""  # more elements of <disk>, e.g. <readonly/>
    driver: str = "discard='unmap'"

    @property
    def opened(self) -> tuple[list[str], str]:
        """How QEMU's tools open the image: options, and its name."""
        return ["-f", self.format], str(self.path)

    def xml(self, number: int) -> str:
        target = f"{'vd' if self.bus == 'virtio' else 'sd'}{chr(ord('a') + number)}"
        thread = " iothread='1'" if self.iothread else ""
        serial = f"<serial>{self.serial}</serial>" if self.serial else ""
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='{self.format}' {self.driver}{thread}/>"
            f"<source file={quoteattr(str(self.path))}/><target dev='{target}' bus='{self.bus}'/>{serial}{self.extra}"
            "</disk>"
        )


class Guest(Shell):
    """A libvirt domain with a shell; ``image=None`` gives one that has no kernel and only sits there (fast)."""

    __test__ = False

    def __init__(
        self,
        libvirtd: Libvirtd,
        directory: Path,
        name: str,
        disks: list[DiskSpec],
        image: GuestImage | None = None,
        *,
        agent: bool = True,
        emulator: str = "",
    ) -> None:
        super().__init__(name, directory)
        self.libvirtd = libvirtd
        self.uuid = str(uuid.uuid4())
        self.disks = disks
        self._image = image
        self._agent = agent
        self._emulator = f"<emulator>{emulator}</emulator>" * os.path.isabs(emulator)

    # -- life -------------------------------------------------------------------------------------

    def domain(self) -> Any:
        """Return the domain over a connection of its own, so that libvirtd may have died since the last call."""
        return libvirt.open(self.libvirtd.uri).lookupByUUIDString(self.uuid)

    def define(self) -> Guest:
        self.ports.mkdir(exist_ok=True)
        self.ports.chmod(0o777)
        libvirt.open(self.libvirtd.uri).defineXML(self.xml())
        return self

    def start(self, *, wait: bool = True) -> Guest:
        if not self.domain().isActive():
            self.domain().create()
        if self._image is not None and wait:
            self.wait_ready()
        return self

    def kill(self) -> None:
        """SIGKILL its QEMU, and return when libvirt knows."""
        os.kill(self.pid, signal.SIGKILL)
        wait_for(lambda: not self.active, f"the end of {self.name}")
        self._disconnect()

    def shutdown(self) -> None:
        """Shut down from inside."""
        self.domain().shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)
        wait_for(lambda: not self.active, f"the shutdown of {self.name}")
        self._disconnect()

    def destroy(self) -> None:
        """Power off."""
        with contextlib.suppress(libvirt.libvirtError):
            self.domain().destroy()
        self._disconnect()

    def remove(self) -> None:
        """Power off and undefine."""
        self.destroy()
        with contextlib.suppress(libvirt.libvirtError):
            self.domain().undefine()

    @property
    def active(self) -> bool:
        return bool(self.domain().isActive())

    @property
    def pid(self) -> int:
        """Its QEMU, as the host numbers it."""
        (pid,) = host_pids("qemu-system", f"-uuid {self.uuid}")
        return pid

    # -- from outside -----------------------------------------------------------------------------

    def qmp(self, command: str, **arguments: object) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments})
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(self.domain(), request, 0))
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']}")
        return answer["return"]

    def qemu_io(self, number: int, command: str) -> str:
        """Run a qemu-io command on a disk of the running QEMU, as the guest's device would."""
        entry = next(e for e in self.qmp("query-block") if e.get("qdev", "").find(f"virtio-disk{number}") >= 0)
        line = f'qemu-io -d {entry["qdev"]} "{command}"'
        out = str(self.qmp("human-monitor-command", **{"command-line": line}))
        if "rror" in out or "failed" in out:
            raise RuntimeError(f"qemu-io {command}: {out}")
        return out

    def xml(self) -> str:
        """Return the domain's definition."""
        kind = "kvm" if kvm_works() else "qemu"
        boot = ""
        if self._image is not None:
            i = self._image
            boot = f"<kernel>{i.kernel}</kernel><initrd>{i.initramfs}</initrd><cmdline>{i.cmdline}</cmdline>"
        disks = "".join(disk.xml(number) for number, disk in enumerate(self.disks))
        threads = "<iothreads>1</iothreads>" if any(disk.iothread for disk in self.disks) else ""
        agent = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>" * self._agent
        scsi = "<controller type='scsi' index='0' model='virtio-scsi'/>" * any(d.bus == "scsi" for d in self.disks)
        return f"""
<domain type='{kind}'><name>{self.name}</name><uuid>{self.uuid}</uuid><memory unit='MiB'>192</memory><vcpu>1</vcpu>
{threads}<os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os><features><acpi/></features>
<on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
<devices>{self._emulator}{disks}{scsi}<controller type='usb' model='none'/><memballoon model='none'/>{agent}
<channel type='unix'><source mode='bind' path='{self.ports}/command'/>
<target type='virtio' name='hvsnap.command'/></channel>
<channel type='file'><source path='{self.log}' append='on'/><target type='virtio' name='hvsnap.log'/></channel>
<serial type='file'><source path='{self._directory}/{self.name}.console'/></serial>
</devices></domain>"""


def make_image(path: Path, size: str, image_format: str = "qcow2", *options: str) -> Path:
    """Create a disk image that the guest's QEMU can open."""
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, *options, str(path), size], check=True)
    return path
