"""A guest of the tests without libvirt: plain QEMU, with a QMP socket for hvsnap and another one for the test."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.guest.domain import kvm_works
from tests.guest.image import GuestImage
from tests.guest.libvirtd import wait_for
from tests.guest.shell import Shell

QEMU = os.environ.get("HVSNAP_TEST_QEMU", "qemu-system-x86_64")
"""Another QEMU can be named, to see whether guests of it are captured as well."""

START_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class BareDisk:
    """One disk. ``style`` is how the launcher names it: ``blockdev`` (nodes), ``drive`` or ``if`` (the short form)."""

    path: Path
    format: str = "qcow2"
    id: str = "vda"
    style: str = "blockdev"
    bus: str = "virtio"
    serial: str = ""
    iothread: bool = False
    extra: str = ""  # more properties of the device
    node_extra: str = ""  # more properties of the block node
    node: str = ""  # the device is put on this node, which the test makes itself

    @property
    def opened(self) -> tuple[list[str], str]:
        """How QEMU's tools open the image: options, and its name."""
        return ["-f", self.format], str(self.path)

    def arguments(self) -> list[str]:
        """Return QEMU's arguments for it."""
        if self.style == "if":
            return ["-drive", f"file={self.path},format={self.format},if=virtio,discard=unmap{self.node_extra}"]
        device = "virtio-blk-pci" if self.bus == "virtio" else "scsi-hd"
        properties = f"{device},id={self.id},drive={self.node or self.id + '-drive'}{self.extra}"
        properties += f",serial={self.serial}" if self.serial else ""
        properties += ",iothread=io1" if self.iothread and self.bus == "virtio" else ""
        if self.node:
            return ["-device", properties]
        if self.style == "drive":
            drive = f"file={self.path},format={self.format},if=none,id={self.id}-drive,discard=unmap{self.node_extra}"
            return ["-drive", drive, "-device", properties]
        file = f"driver=file,node-name={self.id}-file,filename={self.path},discard=unmap"
        node = f"driver={self.format},node-name={self.id}-drive,file={self.id}-file,discard=unmap{self.node_extra}"
        return ["-blockdev", file, "-blockdev", node, "-device", properties]


class BareGuest(Shell):
    """A QEMU of its own; ``image=None`` gives one that has no kernel and only sits there (fast)."""

    __test__ = False

    def __init__(
        self,
        directory: Path,
        name: str,
        disks: list[BareDisk],
        image: GuestImage | None = None,
        *,
        guest_uuid: str | None = "",
        user: int = 0,
        extra: list[str] | None = None,
        qemu: list[str] | None = None,
    ) -> None:
        super().__init__(name, directory)
        self.uuid = str(uuid.uuid4()) if guest_uuid == "" else guest_uuid
        self.disks = disks
        self.qmp_socket = directory / f"{name}.qmp"
        self.agent_socket = directory / f"{name}.qga"
        self._test_socket = directory / f"{name}.mon"
        self._image = image
        self._user = user
        self._extra = extra or []
        self._qemu = qemu or [QEMU]
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: socket.socket | None = None
        self._lines: Any = None

    def table(self, **keys: object) -> str:
        """Return its table of the configuration."""
        settings = {"socket": str(self.qmp_socket), "agent": str(self.agent_socket), **keys}
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        return f"[hypervisor.qmp.{self.name}]\n" + "\n".join(lines) + "\n"

    # -- life -------------------------------------------------------------------------------------

    def start(self, *, wait: bool = True) -> BareGuest:
        if not self.active:
            self.ports.mkdir(exist_ok=True)
            self.ports.chmod(0o777)
            wait_for(self._launch, f"the start of {self.name}", START_TIMEOUT_S)
        if self._image is not None and wait:
            self.wait_ready()
        return self

    def _launch(self) -> bool:
        """Start QEMU and return when its monitor answers; a QEMU that refuses is a failure, with its words."""
        user = ["--reuid", str(self._user), "--regid", str(self._user), "--clear-groups"] if self._user else []
        err = self._directory / f"{self.name}.err"
        for stale in (self.qmp_socket, self.agent_socket, self._test_socket, self.ports / "command"):
            stale.unlink(missing_ok=True)
        with err.open("wb") as out:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *user, "--", *self.command_line()],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        wait_for(lambda: self._answers() or not self.active, f"the monitor of {self.name}", START_TIMEOUT_S)
        if not self.active:
            raise RuntimeError(f"{self.name} did not start: {err.read_text(errors='replace')[-1000:]}")
        return True

    def _answers(self) -> bool:
        """Whether the monitor answers: it greets before QEMU opens the disks, and answers when all is done."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(str(self._test_socket))
            probe.sendall(b'{"execute": "qmp_capabilities"}')
            seen = b""
            while b'"return"' not in seen and (data := probe.recv(4096)):
                seen += data
            return b'"return"' in seen
        return False

    def command_line(self) -> list[str]:
        """Return how QEMU is started."""
        boot: list[str] = []
        if self._image is not None:
            i = self._image
            boot = ["-kernel", str(i.kernel), "-initrd", str(i.initramfs), "-append", i.cmdline]
        disks = [argument for disk in self.disks for argument in disk.arguments()]
        threads = ["-object", "iothread,id=io1"] if any(disk.iothread for disk in self.disks) else []
        scsi_thread = ",iothread=io1" if any(d.iothread and d.bus == "scsi" for d in self.disks) else ""
        scsi = ["-device", f"virtio-scsi-pci,id=scsi0{scsi_thread}"] * any(d.bus == "scsi" for d in self.disks)
        identity = [] if self.uuid is None else ["-uuid", self.uuid]
        kind = ["-accel", "kvm", "-cpu", "host"] if kvm_works() else ["-accel", "tcg"]
        return [
            *self._qemu, "-name", self.name, *identity, "-machine", "q35", *kind, "-m", "192", "-nodefaults",
            "-display", "none", "-no-user-config", *threads, *scsi, *self._extra, *disks, *boot,
            "-serial", f"file:{self._directory}/{self.name}.console",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=command,path={self.ports}/command,server=on,wait=off",
            "-device", "virtserialport,chardev=command,name=hvsnap.command",
            "-chardev", f"file,id=log,path={self.log},append=on",
            "-device", "virtserialport,chardev=log,name=hvsnap.log",
            "-chardev", f"socket,id=agent,path={self.agent_socket},server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
            "-qmp", f"unix:{self.qmp_socket},server=on,wait=off",
            "-qmp", f"unix:{self._test_socket},server=on,wait=off",
        ]  # fmt: skip

    @property
    def active(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL its QEMU."""
        if self._process is not None:
            self._process.kill()
        self._ended()

    def quit(self) -> None:
        """End QEMU in good order; the guest is not asked."""
        self.qmp("quit")
        self._ended()

    def shutdown(self) -> None:
        """Shut down from inside."""
        with contextlib.suppress(ConnectionError, RuntimeError, OSError):
            self.run("shutdown", timeout_s=30.0)
        self._ended()

    def _ended(self) -> None:
        if self._process is not None:
            self._process.wait(60.0)
        self._disconnect()
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def gone(self) -> None:
        """Take note that somebody else ended it."""
        self._ended()

    def remove(self) -> None:
        """End it, however it is."""
        if self.active:
            self.kill()

    # -- from outside -----------------------------------------------------------------------------

    def qmp(self, command: str, **arguments: object) -> Any:
        """Run a command on the test's own monitor."""
        if self._monitor is None:
            self._monitor = socket.socket(socket.AF_UNIX)
            self._monitor.settimeout(60.0)
            self._monitor.connect(str(self._test_socket))
            self._lines = self._monitor.makefile("rb")
            self._lines.readline()
            self._ask({"execute": "qmp_capabilities"})
        return self._ask({"execute": command, "arguments": arguments})

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._monitor is not None
        self._monitor.sendall(json.dumps(request).encode() + b"\n")
        while True:
            line = self._lines.readline()
            if not line:
                raise ConnectionError(f"{self.name} closed its monitor")
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"{request['execute']}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def root_node(self, disk_id: str = "vda") -> str:
        """Return the node that a device is on."""
        for entry in self.qmp("query-block"):
            if f"/{disk_id}/" in f"{entry.get('qdev', '')}/" or entry.get("qdev") == disk_id:
                return str(entry["inserted"]["node-name"])
        raise LookupError(disk_id)

    def qemu_io(self, command: str, disk_id: str = "vda") -> str:
        """Run a qemu-io command on a disk of the running QEMU, as the guest's device would."""
        for entry in self.qmp("query-block"):
            if f"/{disk_id}/" in f"{entry.get('qdev', '')}/" or entry.get("qdev") == disk_id:
                line = f'qemu-io -d {entry["qdev"]} "{command}"'
                out = str(self.qmp("human-monitor-command", **{"command-line": line}))
                if "rror" in out or "failed" in out:
                    raise RuntimeError(f"qemu-io {command}: {out}")
                return out
        raise LookupError(disk_id)


def host_cpu_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
