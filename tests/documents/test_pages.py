"""Pages whose commands are run in the order in which they stand there, and show what the pages show."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.conftest import short_directory
from tests.documents.blocks import DOCS, ROOT, blocks
from tests.documents.host import Host
from tests.documents.stage import Stage
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd

PAGES = {"README.md": ROOT / "README.md"} | {
    name: DOCS / name
    for name in ("getting-started.md", "cli.md", "bare-qemu.md", "operations.md", "disaster-recovery.md")
}


@pytest.fixture(scope="module")
def host(libvirtd: Libvirtd, guest_image: GuestImage) -> Iterator[Host]:
    directory = short_directory()
    with Host(libvirtd, directory, guest_image) as one:
        yield one
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.timeout(900)  # some eighty commands of the longest page, each a process of its own
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_is_what_comes(page: str, host: Host) -> None:
    told = [block for block in blocks(PAGES[page]) if block.runs]
    assert told
    with Stage(host) as stage:
        for block in told:
            stage.play(block)
