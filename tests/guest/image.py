"""A guest that boots in about two seconds without KVM: Debian's cloud kernel and an initramfs made on the spot.

Everything is built once into a cache and rebuilt when this recipe or a package changes. ``python -m tests.guest.image``
builds it and prints where.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
KERNEL_PACKAGE = "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_scsi", "sd_mod", "button", "evdev")
LZ4_MAGIC = b"\x02\x21\x4c\x18"

CMDLINE = "console=ttyS0 quiet panic=-1 cryptomgr.notests tsc=reliable no_timer_check mitigations=off noreplace-smp"

INIT = """#!/bin/sh
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
mount -t tmpfs run /run; mount -t tmpfs tmp /tmp
while read -r module; do insmod "$module" 2>/dev/null; done < /modules.list
mkdir -p /dev/virtio-ports
link_ports() {
    for name in /sys/class/virtio-ports/*/name; do
        [ -s "$name" ] && ln -sf "/dev/$(basename "$(dirname "$name")")" "/dev/virtio-ports/$(cat "$name")"
    done
}
until [ -e /dev/virtio-ports/hvsnap.command ]; do link_ports; usleep 20000; done
link_ports
acpid -f -l /dev/null &
[ -e /dev/virtio-ports/org.qemu.guest_agent.0 ] && \\
    qemu-ga -d -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -f /run/ga.pid -t /run
while :; do
    sh -c 'echo hvsnap-guest-ready; exec sh' 0<> /dev/virtio-ports/hvsnap.command 1>&0 2>&1
    usleep 100000
done
"""

POWER_BUTTON = "etc/acpi/PWRF/00000080"
"""What busybox's acpid runs when the power button is pressed."""

SHUTDOWN = """#!/bin/sh
sync; umount -a -r 2>/dev/null
for word; do [ "$word" = -r ] && reboot -f; done
poweroff -f
"""


@dataclass(frozen=True)
class GuestImage:
    """A kernel (ELF) and an initramfs that QEMU and libvirt boot directly."""

    kernel: Path
    initramfs: Path
    cmdline: str = CMDLINE


def _output(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def _kernel_package() -> str:
    """Return the package that the meta-package stands for now."""
    for line in _output("apt-cache", "depends", KERNEL_PACKAGE).splitlines():
        if "Depends:" in line and "linux-image-" in line:
            return line.split()[-1]
    raise RuntimeError(f"{KERNEL_PACKAGE} depends on no kernel: run apt-get update")


def _installed(*packages: str) -> str:
    return _output("dpkg-query", "-W", "-f=${Package}=${Version}\n", *packages)


def _cache_dir() -> Path:
    default = HERE.parent.parent / ".cache" / "guest"
    return Path(os.environ.get("HVSNAP_TEST_CACHE", default))


def build(more_modules: Sequence[str] = (), init: str = INIT) -> GuestImage:
    """Return the guest, building it if the cache has none of this recipe; with another ``init``, maybe, and modules."""
    recipe = [Path(__file__).read_bytes(), (HERE / "stress.c").read_bytes()]
    recipe.append(_installed("busybox-static", "qemu-guest-agent").encode())
    recipe += [" ".join(more_modules).encode(), init.encode()]
    package = _kernel_package()
    recipe.append(package.encode())
    key = hashlib.sha256(b"\0".join(recipe)).hexdigest()[:16]
    final = _cache_dir() / key
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix="build-") as work:
            made = Path(work) / "made"
            made.mkdir()
            _build(Path(work), made, package, (*MODULES, *more_modules), init)
            try:
                made.rename(final)
            except OSError:  # another process was first
                if not final.exists():
                    raise
    return GuestImage(final / "vmlinux", final / "initramfs.cpio")


def _build(work: Path, made: Path, package: str, modules: Sequence[str], init: str) -> None:
    # Unpacked, not installed: the host's own boot files stay as they are.
    subprocess.run(
        ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package],
        cwd=work,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run(["dpkg", "-x", *map(str, work.glob("*.deb")), str(work / "kernel")], check=True)
    _unpack_kernel(next((work / "kernel" / "boot").glob("vmlinuz-*")), made / "vmlinux")
    root = work / "root"
    for directory in ("bin", "sbin", "dev", "proc", "sys", "run", "tmp", "mnt", "lib/modules", "etc", "var"):
        (root / directory).mkdir(parents=True)
    _add_busybox(root)
    _add_program(root, Path("/usr/sbin/qemu-ga"), "sbin")
    subprocess.run(
        ["gcc", "-O2", "-static", "-pthread", "-s", "-o", str(root / "bin/stress"), str(HERE / "stress.c")], check=True
    )
    _add_modules(root, work / "kernel", modules)
    _script(root / "init", init)
    (root / "sbin/shutdown").unlink(missing_ok=True)
    _script(root / "sbin/shutdown", SHUTDOWN)
    (root / POWER_BUTTON).parent.mkdir(parents=True)
    _script(root / POWER_BUTTON, "#!/bin/sh\nexec /sbin/shutdown\n")
    names = _output("find", str(root), "-mindepth", "1", "-printf", "%P\\n")
    with (made / "initramfs.cpio").open("wb") as out:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "-R", "0:0", "--quiet"], input=names.encode(), cwd=root, stdout=out, check=True
        )
    for path in (made, made / "vmlinux", made / "initramfs.cpio"):
        path.chmod(path.stat().st_mode | stat.S_IRGRP | stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0))


def _unpack_kernel(vmlinuz: Path, vmlinux: Path) -> None:
    """Write the ELF inside a compressed kernel: booting it directly saves the guest the unpacking."""
    packed = vmlinuz.read_bytes()
    at = packed.find(LZ4_MAGIC)
    if at >= 0:
        # lz4 complains about what follows the compressed kernel, after it has unpacked all of it.
        data = subprocess.run(["lz4", "-dcq"], input=packed[at:], capture_output=True, check=False).stdout
    else:
        data = gzip.decompress(packed[packed.find(b"\x1f\x8b\x08") :])
    if not data.startswith(b"\x7fELF"):
        raise RuntimeError(f"{vmlinuz} holds no kernel that this recipe can unpack")
    vmlinux.write_bytes(data)


def _add_busybox(root: Path) -> None:
    shutil.copy2("/bin/busybox", root / "bin/busybox")
    for applet in _output("/bin/busybox", "--list").split():
        if applet not in ("busybox", "init"):
            (root / "bin" / applet).symlink_to("busybox")


def _add_program(root: Path, program: Path, directory: str) -> None:
    """Copy a program with the libraries that it loads, stripped."""
    copies = [(program, root / directory / program.name)]
    for word in _output("ldd", str(program)).split():
        if word.startswith("/"):
            copies.append((Path(word), root / word.lstrip("/")))
    for source, target in copies:
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["strip", "-o", str(target), str(source.resolve())], check=True)
        target.chmod(0o755)


def _add_modules(root: Path, kernel: Path, modules: Sequence[str]) -> None:
    version = next((kernel / "lib/modules").iterdir()).name
    subprocess.run(["/sbin/depmod", "-b", str(kernel), version], check=True)
    listed: list[str] = []
    for module in modules:
        shown = _output("/sbin/modprobe", "-d", str(kernel), "-S", version, "--show-depends", module)
        for line in shown.splitlines():
            if not line.startswith("insmod"):
                continue
            source = Path(line.split()[1])
            target = f"lib/modules/{source.name}"
            if f"/{target}" not in listed:
                listed.append(f"/{target}")
                subprocess.run(["strip", "--strip-debug", "-o", str(root / target), str(source)], check=True)
    (root / "modules.list").write_text("\n".join(listed) + "\n")


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


if __name__ == "__main__":
    print(build().initramfs.parent)
