"""What the tests of bare guests share: a guest of plain QEMU with a daemon beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e_bare.rig import QUICK, BareRig, DoctoredDaemon, table
from tests.guest.bare import BareDisk, BareGuest
from tests.guest.image import GuestImage

MakeRig = Callable[..., BareRig]


@pytest.fixture
def make_bare(workdir: Path) -> Iterator[Callable[..., BareGuest]]:
    """Make bare guests that are gone after the test."""
    made: list[BareGuest] = []

    def make(disks: list[BareDisk], image: GuestImage | None = None, **options: object) -> BareGuest:
        guest = BareGuest(workdir, f"bare{len(made)}", disks, image, **options)  # type: ignore[arg-type]
        made.append(guest)
        return guest

    yield make
    for guest in made:
        guest.remove()


@pytest.fixture
def make_daemon(workdir: Path) -> Iterator[Callable[..., DoctoredDaemon]]:
    """Start daemons for bare guests that are gone after the test."""
    made: list[DoctoredDaemon] = []

    def make(
        *guests: BareGuest,
        capture: str = QUICK,
        libvirt: str = "",
        mode: str = "fleece",
        more: dict[str, str] | None = None,
    ) -> DoctoredDaemon:
        directory = workdir / f"daemon-{len(made)}"
        directory.mkdir()
        tables = {name: body for guest in guests for name, body in table(guest, capture=mode).items()}
        tables |= more or {}
        daemon = DoctoredDaemon(directory, libvirt, "", capture=capture, **tables)
        made.append(daemon)
        return daemon.start()

    yield make
    for daemon in made:
        daemon.stop()


@pytest.fixture
def make_rig(
    make_bare: Callable[..., BareGuest], make_daemon: Callable[..., DoctoredDaemon], workdir: Path
) -> MakeRig:  # fmt: skip
    """Start a guest without an operating system and a daemon; ``mode`` is how it is captured."""

    def make(
        disks: list[BareDisk],
        mode: str = "fleece",
        capture: str = QUICK,
        tables: dict[str, str] | None = None,
        **options: object,
    ) -> BareRig:
        guest = make_bare(disks, **options).start()
        return BareRig(guest, make_daemon(guest, capture=capture, mode=mode, more=tables), workdir)

    return make
