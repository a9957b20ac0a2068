"""Keys of encrypted images: what tools are told of them, and where they are not."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from hvsnap.errors import HypervisorFailed
from hvsnap.hypervisor import disk_encryption, domain_xml, images, tools
from hvsnap.hypervisor.image_key import handed_over, named
from hvsnap.model import DiskView, GuestState, Layer
from hvsnap.secret import Passphrase
from tests.guest.luks import PASSPHRASE, Secret, make_luks, passphrase_file

KEY = Passphrase(PASSPHRASE)


def test_a_key_shows_in_no_text() -> None:
    with handed_over(KEY) as (arguments, inherited):
        assert len(inherited) == 1
        shown = f"{KEY} {KEY!r} {arguments} {named('/a, b', 'qcow2', KEY)}"
    assert PASSPHRASE.decode() not in shown


def test_names_are_taken_as_they_are() -> None:
    assert named("/a, b=c.qcow2", "qcow2", None) == (["-f", "qcow2"], "/a, b=c.qcow2")
    how, image = named("/a, b=c.qcow2", "qcow2", KEY)
    assert (how, image.split("filename=")[1]) == (["--image-opts"], "/a,, b=c.qcow2,encrypt.key-secret=hvsnap-key")


async def test_an_encrypted_overlay_is_filled_and_merged_by_its_key_alone(tmp_path: Path) -> None:
    base = str(make_luks(tmp_path / "a, base.qcow2", "1M", Secret("", passphrase_file(tmp_path))))
    overlay = f"{base}.overlay"
    await images.create_overlay(overlay, base, "qcow2", key=KEY)
    info = await images.image_info(overlay, "qcow2")
    assert (info.encrypted, info.backing_path, info.size_bytes) == (True, base, 1 << 20)
    assert await images.is_empty(overlay, key=KEY)
    how, image = named(overlay, "qcow2", KEY, below=True)
    await tools.run("qemu-io", how[0], "-c", "write -P 7 64k 3k", image, key=KEY)
    assert not await images.is_empty(overlay, key=KEY)
    for wrong in (None, Passphrase(b"another")):
        with pytest.raises(HypervisorFailed):
            await images.commit_overlay(overlay, base, key=wrong)
    await images.bitmap_add(base, "n", 65536, key=KEY)
    await images.commit_overlay(overlay, base, key=KEY)
    how, image = named(base, "qcow2", KEY)
    await tools.run("qemu-io", how[0], "-c", "read -P 7 64k 3k", image, key=KEY)
    other = str(make_luks(tmp_path / "other.qcow2", "1M", Secret("", tmp_path / "passphrase")))
    with pytest.raises(HypervisorFailed, match="not over"):
        await images.commit_overlay(overlay, other, key=KEY)


def domain(disk: str) -> ElementTree.Element:
    target = "<target dev='vda' bus='virtio'/>"
    return domain_xml.parse(
        f"<domain><uuid>u</uuid><devices><disk type='file'>{disk}{target}</disk></devices></domain>"
    )


def luks(secret: str) -> str:
    return f"<encryption format='luks'><secret type='passphrase' {secret}/></encryption>"


BY_UUID, BY_USAGE = luks("uuid='1-2'"), luks("usage='/x'")


@pytest.mark.parametrize(
    ("disk", "secret", "reason"),
    [
        ("<driver type='qcow2'/><source file='/a'/>", "", ""),
        (f"<driver type='qcow2'/><source file='/a'>{BY_UUID}</source>", "1-2", ""),
        (f"<driver type='qcow2'/><source file='/a'/>{BY_UUID}", "1-2", ""),
        (f"<driver type='qcow2'/><source file='/a'>{BY_USAGE}</source>", "usage:/x", ""),
        (f"<driver type='raw'/><source file='/a'>{BY_UUID}</source>", "1-2", "a raw image inside LUKS"),
        ("<driver type='qcow2'/><source file='/a'><encryption format='qcow'/></source>", "", "its encryption is qcow"),
        ("<driver type='qcow2'/><source file='/a'><encryption format='luks'/></source>", "", "no secret is named"),
    ],
)
def test_the_domain_names_the_secret_or_the_disk_is_skipped(disk: str, secret: str, reason: str) -> None:
    (view,) = domain_xml.guest_view(domain(disk), GuestState.OFF, persistent=True).disks
    assert (view.secret, bool(view.skip_reason)) == (secret, bool(reason))
    assert reason in view.skip_reason


@pytest.mark.parametrize(("secret", "attribute"), [("1-2", "uuid"), ("usage:/x", "usage")])
def test_an_overlay_is_opened_by_the_secret_of_its_disk(secret: str, attribute: str) -> None:
    view = DiskView("vda", "virtio", "", (Layer("/a", "qcow2"),), system=True, secret=secret)
    root = ElementTree.fromstring(domain_xml.snapshot_xml([view], {"vda": "/o"}))
    found = root.find("disks/disk/source/encryption[@engine='qemu']/secret")
    assert found is not None
    assert found.get(attribute) == secret.removeprefix("usage:")
    plain = ElementTree.fromstring(domain_xml.snapshot_xml([DiskView("vda", "", "", (), system=True)], {"vda": "/o"}))
    assert plain.find("disks/disk/source/encryption") is None
    assert disk_encryption.secret_name(secret) == (attribute == "usage", secret.removeprefix("usage:"))
