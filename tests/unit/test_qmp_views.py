"""What is concluded from what QEMU says of a bare guest, and of one that is off; which hypervisor has which guest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hvsnap.errors import GuestUnknown, HypervisorFailed, HypervisorUnreachable
from hvsnap.hypervisor.fleet import Fleet, Member
from hvsnap.hypervisor.qemu_nodes import Graph
from hvsnap.hypervisor.qmp_memory import NO_UUID, Seen, disks_while_off, identity, made_uuid
from hvsnap.hypervisor.qmp_view import Answers, Device, attachments, find
from hvsnap.model import GuestUuid, Layer
from tests.service_kit import MAIL, WEB, FakeHypervisor, a_guest, a_view

OVERLAY, BASE, TEMPLATE = Layer("/i/o", "qcow2"), Layer("/i/base.qcow2", "qcow2"), Layer("/i/t", "raw")


def graph(*edges: tuple[str, str, str]) -> dict[str, Any]:
    names = {name for parent, _edge, child in edges for name in (parent, child)}
    ids = {name: number for number, name in enumerate(sorted(names))}
    kinds = {"job": "block-job", "dev": "block-backend"}
    nodes = [
        {"id": number, "name": name, "type": kinds.get(name.partition(":")[0], "block-driver")}
        for name, number in ids.items()
    ]
    return {"nodes": nodes, "edges": [{"parent": ids[a], "name": n, "child": ids[b]} for a, n, b in edges]}


def node(name: str, driver: str, file: str = "") -> dict[str, Any]:
    return {"node-name": name, "drv": driver, "file": file}


CHAIN = (("q", "file", "qf"), ("q", "backing", "t"), ("t", "file", "tf"))
NODES = [node("q", "qcow2"), node("qf", "file", "/i/q"), node("t", "raw"), node("tf", "host_device", "/dev/t")]


def looked(root: str, driver: str, *edges: tuple[str, str, str], nodes: list[dict[str, Any]] | None = None) -> Answers:
    inserted = {"node-name": root, "drv": driver, "ro": False}
    entry = {"qdev": "/machine/peripheral/vda/virtio-backend", "device": "", "inserted": inserted}
    device = Device(entry["qdev"], {"type": "virtio-blk-device"}, {})  # type: ignore[arg-type]
    return Answers([entry], [*NODES, *(nodes or [])], graph(*CHAIN, *edges), {entry["qdev"]: device}, "/run/vm")  # type: ignore[index]


def test_a_disk_is_its_backing_chain_below_any_filters() -> None:
    (plain,) = attachments(looked("q", "qcow2"))
    assert plain.view.layers == (Layer("/i/q", "qcow2"), Layer("/dev/t", "raw"))
    assert (plain.root, plain.format_node, plain.chain) == ("q", "q", ("q", "t"))
    ours = ("hvsnap-s-x-switch", "file", "hvsnap-s-x-before"), ("hvsnap-s-x-before", "file", "th")
    filters = [node("th", "throttle"), node(ours[0][0], "raw"), node(ours[1][0], "copy-before-write")]
    target = ("hvsnap-s-x-before", "target", "hvsnap-s-x-scratch")
    (below,) = attachments(looked(ours[0][0], "raw", *ours, target, ("th", "file", "q"), nodes=filters))
    assert below.view.layers == plain.view.layers
    assert (below.root, below.format_node) == ("hvsnap-s-x-switch", "q")
    assert below.nodes == {*plain.nodes, "th", "hvsnap-s-x-switch", "hvsnap-s-x-before"}


def test_what_is_no_file_or_half_told_is_skipped_with_a_reason() -> None:
    (nbd,) = attachments(looked("n", "raw", ("n", "file", "nf"), nodes=[node("n", "raw"), node("nf", "nbd")]))
    assert nbd.view.skip_reason == "its source is not a file or block device"
    (gone,) = attachments(looked("n", "raw", ("n", "file", "nf"), nodes=[node("n", "raw")]))
    assert gone.view.skip_reason
    (luks,) = attachments(looked("l", "luks", ("l", "file", "lf"), nodes=[node("l", "luks"), node("lf", "file", "/l")]))
    assert luks.view.skip_reason == "its format is luks, not qcow2 or raw"
    relative = [node("r", "raw"), node("rf", "file", "disk.raw")]
    (found,) = attachments(looked("r", "raw", ("r", "file", "rf"), nodes=relative))
    assert found.view.top.path == "/run/vm/disk.raw"
    with pytest.raises(HypervisorFailed, match="no longer attached"):
        find([found], "vdz")


def test_jobs_are_known_by_the_nodes_that_they_use() -> None:
    shown = Graph(graph(*CHAIN, ("job:a", "main node", "q"), ("job:b", "x", "other"), ("dev:v", "root", "q")))
    assert shown.jobs_on({"q", "qf"}) == ["job:a"]
    assert shown.below("q") == "qf"


def test_a_guest_is_who_it_was() -> None:
    given, made = GuestUuid("0b5a1d7e-0000-4000-8000-000000000001"), made_uuid("host", "web01")
    assert identity(str(given).upper(), None, "host", "web01") == given
    assert identity(NO_UUID, None, "host", "web01") == made == identity(None, None, "host", "web01")
    assert made != made_uuid("host", "web02") != made_uuid("other", "web01")
    assert identity(None, Seen(given, ()), "host", "web01") == given
    assert identity(NO_UUID, Seen(given, ()), "host", "web01") == given
    # Met while it was off: its chains hang on the UUID of ours.
    assert identity(str(given), Seen(made, ()), "host", "web01") == made
    # Another guest in its place.
    assert identity(MAIL, Seen(given, ()), "host", "web01") == MAIL


def test_while_off_a_guest_has_the_disks_it_was_seen_with() -> None:
    vda = a_view("vda", layers=(OVERLAY, BASE))
    seen = Seen(WEB, (vda, a_view("vdb", layers=(TEMPLATE,), system=False)))
    assert Seen.of(seen.as_json()) == seen
    assert Seen.of(None) is None
    assert Seen.of({"uuid": "x", "disks": [{"of": "another release"}]}) is None
    assert disks_while_off(seen, {}) == seen.disks
    # The configuration names the image below the overlay: the newest data is in the overlay all the same.
    assert disks_while_off(seen, {"vda": BASE}) == seen.disks
    other = Layer("/i/other.qcow2", "qcow2")
    assert disks_while_off(seen, {"vdb": other})[1].layers == (other,)
    (configured,) = disks_while_off(None, {"vdc": other})
    assert (configured.layers, configured.system, configured.skip_reason) == ((other,), True, "")


# -- the fleet ------------------------------------------------------------------------------------


class Owned(FakeHypervisor):
    async def run(self) -> None:
        return

    async def close(self) -> None:
        self.log.append("closed")


def fleet(**members: Owned) -> Fleet:
    return Fleet([Member(name, hypervisor) for name, hypervisor in members.items()])  # type: ignore[arg-type]


async def test_one_that_does_not_answer_hides_nobody_elses_guests() -> None:
    web, mail = Owned(a_guest()), Owned(replace(a_guest(), uuid=MAIL, name="mail"))
    both = fleet(libvirt=web, mail=mail)
    assert [guest.name for guest in await both.guests()] == ["mail", "web01"]
    web.unreachable = True
    census = await both.census()
    assert [guest.name for guest in census.guests] == ["mail"]
    assert set(census.silent) == {"libvirt"}
    assert (await both.guest(MAIL)).name == "mail"
    with pytest.raises(HypervisorUnreachable):
        await both.guest(WEB)
    with pytest.raises(HypervisorUnreachable):
        await both.versions()
    mail.unreachable = True
    with pytest.raises(HypervisorUnreachable):
        await both.guests()
    await both.close()
    assert (web.log, mail.log) == (["closed"], ["closed"])


async def test_a_guest_is_unknown_only_when_everybody_says_so() -> None:
    web, mail = Owned(a_guest()), Owned(replace(a_guest(), uuid=MAIL, name="mail"))
    both = fleet(libvirt=web, mail=mail)
    stranger = GuestUuid("0b5a1d7e-0000-4000-8000-00000000000f")
    with pytest.raises(GuestUnknown):
        await both.guest(stranger)
    mail.unreachable = True
    with pytest.raises(HypervisorUnreachable):
        await both.guest(stranger)
    mail.unreachable = False
    await both.start(MAIL)
    assert mail.log == ["start mail"]
    # It moves from one to the other.
    web.shown[MAIL] = mail.shown.pop(MAIL)
    assert (await both.guest(MAIL)).name == "mail"
    assert await fleet().guests() == []
