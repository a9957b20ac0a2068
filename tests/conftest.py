"""What tests share: a private libvirtd, the test guest's image, short work directories."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import rounds
from tests.guest.domain import DiskSpec, Guest
from tests.guest.image import GuestImage, build
from tests.guest.libvirtd import Libvirtd

# A run in the background of a script has SIGINT ignored, and its children with it: Ctrl-C would do nothing anywhere.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


NOT_TO_BE_HAD = 3
"""Exit status of the script that gets a newer QEMU, where its mirror does not answer or has none."""


def short_directory() -> Path:
    """Return a new directory whose path is short (sockets) and that QEMU's user may enter."""
    path = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    path.chmod(0o755)
    return path


@pytest.fixture
def workdir() -> Iterator[Path]:
    path = short_directory()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def sealed(workdir: Path) -> dict[str, str]:
    """Return the configuration of an encrypted store."""
    key = workdir / "store.key"
    key.write_text(os.urandom(32).hex() + "\n")
    key.chmod(0o600)
    return {"store.encryption": f'key_file = "{key}"'}


@pytest.fixture(scope="session")
def libvirtd() -> Iterator[Libvirtd]:
    path = short_directory()
    with Libvirtd(path) as daemon:
        yield daemon
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def newer_qemu() -> Path:
    """Return the programs of a newer Debian's QEMU; the test is skipped, and says so, where they cannot be had."""
    script = Path(__file__).parent / "guest" / "newer_qemu.sh"
    cache = Path(os.environ.get("HVSNAP_TEST_CACHE", script.parents[2] / ".cache")) / "newer-qemu"
    done = subprocess.run([str(script), str(cache)], capture_output=True, text=True)
    if done.returncode == NOT_TO_BE_HAD:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(done.stderr)
    return cache / "bin"


@pytest.fixture(params=["host", "newer"])
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the QEMU of guests: the host's, and a newer one, whose tools hvsnap and the test then use, too."""
    if request.param == "host":
        return "qemu-system-x86_64"
    programs = request.getfixturevalue("newer_qemu")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return str(programs / "qemu-system-x86_64")


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    return build()


@pytest.fixture
def make_guest(libvirtd: Libvirtd, workdir: Path) -> Iterator[Callable[..., Guest]]:
    """Make guests that are gone after the test."""
    made: list[Guest] = []

    def make(disks: list[DiskSpec], image: GuestImage | None = None, **options: Any) -> Guest:
        guest = Guest(libvirtd, workdir, f"{workdir.name}-{len(made)}", disks, image, **options)
        made.append(guest)
        return guest.define()

    yield make
    for guest in made:
        guest.remove()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell how many rounds the kill loop made."""
    reports = [one for kind in ("passed", "failed") for one in terminalreporter.stats.get(kind, [])]
    line = rounds.summary(noted for one in reports if one.when == "call" for noted in one.user_properties)
    if line:
        terminalreporter.write_line(line)
