"""A real guest is shut down whatever state its agent is in, and while it still boots."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from hvsnap.errors import HypervisorFailed
from hvsnap.hypervisor.libvirt import LibvirtHypervisor
from hvsnap.model import GuestUuid
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd

TIMEOUT_S = 120.0


@pytest.fixture
async def hypervisor(libvirtd: Libvirtd) -> AsyncIterator[LibvirtHypervisor]:
    one = LibvirtHypervisor(libvirtd.uri)
    yield one
    await one.close()


async def test_a_guest_shuts_down_with_a_hung_agent_and_while_it_boots(
    hypervisor: LibvirtHypervisor, make_guest: Callable[..., Guest], guest_image: GuestImage, workdir: Path
) -> None:
    guest = make_guest([DiskSpec(make_image(workdir / "a.qcow2", "16M"))], guest_image).start()
    guest.run("kill -STOP $(cat /run/ga.pid)")
    await hypervisor.shutdown(GuestUuid(guest.uuid), TIMEOUT_S)
    assert not guest.active
    guest._disconnect()
    # Its kernel has no driver for the button yet: the first presses are lost.
    guest.start(wait=False)
    await hypervisor.shutdown(GuestUuid(guest.uuid), TIMEOUT_S)
    assert not guest.active
    await hypervisor.shutdown(GuestUuid(guest.uuid), TIMEOUT_S)  # off already


async def test_a_guest_that_hears_nothing_is_left_alone_at_the_deadline(
    hypervisor: LibvirtHypervisor, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    guest = make_guest([DiskSpec(make_image(workdir / "a.qcow2", "16M"))]).start()
    with pytest.raises(HypervisorFailed) as caught:
        await hypervisor.shutdown(GuestUuid(guest.uuid), 1.0)
    assert f"guest {guest.name} did not shut down within 1 s" in caught.value.message
    assert "power button was pressed" in caught.value.message
    assert f"virsh destroy {guest.name}" in caught.value.hint
    assert guest.active
