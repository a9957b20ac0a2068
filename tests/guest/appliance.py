"""What libguestfs needs where there is no kernel installed, as in a container: one, and where to keep what it makes."""

from __future__ import annotations

import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.guest.image import _cache_dir, _kernel_package


@cache
def environment() -> dict[str, str]:
    """Return the variables for processes that start libguestfs; builds what is missing, once."""
    directory = _cache_dir().parent / "appliance"
    directory.mkdir(parents=True, exist_ok=True)
    found = {"LIBGUESTFS_CACHEDIR": str(directory)}
    if any(os.access(path, os.R_OK) for path in Path("/boot").glob("vmlinuz-*")):
        return found
    package = _kernel_package()
    root = directory / package
    if not root.exists():
        with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as work:
            # Unpacked, not installed: the host's own boot files stay as they are.
            words = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package]
            subprocess.run(words, cwd=work, check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["dpkg", "-x", *map(str, Path(work).glob("*.deb")), f"{work}/root"], check=True)
            (modules,) = Path(work, "root/lib/modules").iterdir()
            subprocess.run(["/sbin/depmod", "-b", f"{work}/root", modules.name], check=True)
            try:
                Path(work, "root").rename(root)
            except OSError:  # another process was first
                if not root.exists():
                    raise
    (kernel,), (modules,) = root.glob("boot/vmlinuz-*"), root.glob("lib/modules/*")
    found |= {"SUPERMIN_KERNEL": str(kernel), "SUPERMIN_MODULES": str(modules)}
    return found | {"SUPERMIN_KERNEL_VERSION": modules.name}
