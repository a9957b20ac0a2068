"""What the tests end to end share: a guest with a daemon beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.rig import DoctoredDaemon, Rig
from tests.guest.domain import DiskSpec, Guest
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd

MakeRig = Callable[..., Rig]


@pytest.fixture
def make_daemon(libvirtd: Libvirtd, workdir: Path) -> Iterator[Callable[..., DoctoredDaemon]]:
    """Start daemons that are gone after the test."""
    made: list[DoctoredDaemon] = []

    def make(fault: str = "", **config: str) -> DoctoredDaemon:
        directory = workdir / f"daemon-{len(made)}"
        directory.mkdir()
        daemon = DoctoredDaemon(directory, libvirtd.uri, fault, **{"capture": "parallel = 8", **config})
        made.append(daemon)
        return daemon.start()

    yield make
    for daemon in made:
        daemon.stop()


@pytest.fixture
def make_rig(
    make_daemon: Callable[..., DoctoredDaemon], make_guest: Callable[..., Guest], workdir: Path
) -> MakeRig:  # fmt: skip
    """Start a guest (with an operating system only if ``image`` is given) and a daemon."""

    def make(
        disks: list[DiskSpec],
        image: GuestImage | None = None,
        fault: str = "",
        agent: bool = False,
        emulator: str = "",
        **config: str,
    ) -> Rig:
        guest = make_guest(disks, image, agent=agent, emulator=emulator).start()
        return Rig(guest, make_daemon(fault, **config), workdir)

    return make
