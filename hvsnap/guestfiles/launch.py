"""Starting libguestfs' virtual machine over a disk that is served by NBD."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hvsnap.errors import Failed

KERNEL_HINT = (
    "it boots a kernel of this host: install one (apt-get install linux-image-cloud-amd64), or name it in "
    "SUPERMIN_KERNEL and SUPERMIN_MODULES; one that only root may read takes root"
)


def start(uri: str, scratch: Path) -> Any:
    """Return a handle of libguestfs, its machine running, with the disk at ``uri`` as ``/dev/sda``.

    What the machine writes (a journal that it replays) goes to an overlay in ``scratch``. Raises :class:`Failed`.
    """
    overlay = scratch / "overlay.qcow2"
    _make_overlay(uri, overlay)
    if _kvm_works():
        try:
            return _launched(overlay, scratch, tcg=False)
        except RuntimeError:
            pass  # a KVM that is there and cannot run it (nested, forbidden) is no reason to fail
    try:
        return _launched(overlay, scratch, tcg=True)
    except RuntimeError as error:
        text = str(error)
        if "supermin" in text:
            raise Failed("libguestfs cannot make its virtual machine", hint=KERNEL_HINT) from error
        raise Failed(
            f"libguestfs' virtual machine does not start: {text.splitlines()[0]}",
            hint="`LIBGUESTFS_DEBUG=1 libguestfs-test-tool` (of libguestfs-tools) shows why",
        ) from error


def _make_overlay(uri: str, overlay: Path) -> None:
    """Put an overlay over the disk, both formats named.

    libguestfs makes one by itself for a disk that is read-only, but has QEMU guess what is in it: a guest that writes a
    qcow2 header to its disk could then have any file of the host read as its backing file.
    """
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, str(overlay)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="backslashreplace", check=False)
    except FileNotFoundError as error:
        raise Failed("qemu-img is not installed", hint="install it: apt-get install qemu-utils") from error
    if done.returncode:
        why = done.stderr.strip().partition("\n")[0].removeprefix(f"qemu-img: {overlay}: ")
        hint = "is it still served? `hvsnap snapshot-serve` lists what is"
        if "Permission" in why:
            hint = "use sudo, or join the group that the daemon's socket belongs to"
        raise Failed(f"the snapshot cannot be opened where it is served: {why}", hint=hint)


def _kvm_works() -> bool:
    """Whether KVM can be had: the device alone does not tell, and with it in vain the machine hangs or aborts."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    with open("/proc/cpuinfo") as lines:
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return bool({"vmx", "svm"} & set(flags))


@contextlib.contextmanager
def _temporary_files_in(directory: Path) -> Iterator[None]:
    """Let the programs that are started meanwhile have their temporary files in a directory."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


def _launched(overlay: Path, scratch: Path, *, tcg: bool) -> Any:
    import guestfs  # noqa: PLC0415 - the distribution's binding may be absent, and whoever starts us says so

    handle = guestfs.GuestFS(python_return_dict=True)
    try:
        # QEMU as our own child, whatever the library was built to prefer: it ends with us, and as our user.
        handle.set_backend("direct")
        if tcg:
            handle.set_backend_setting("force_tcg", "1")
        handle.set_tmpdir(str(scratch))
        handle.set_cachedir(handle.get_cachedir())  # it is for later commands, too: it stays where it was
        handle.set_autosync(False)
        # Nothing of it is kept, so nothing needs to be written out.
        handle.add_drive_opts(str(overlay), format="qcow2", cachemode="unsafe")
        # QEMU opens the appliance over a file of its own and removes its name at once; killed in between, it leaves it
        # to us.
        with _temporary_files_in(scratch):
            handle.launch()
    except BaseException:
        handle.close()
        raise
    return handle
