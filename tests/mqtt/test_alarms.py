"""A guest's disk whose files are being encrypted, seen from outside: by the API, and over a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random

from hvsnap import wire
from tests.daemon_kit import Daemon
from tests.e2e.test_command_line import write
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd
from tests.mqtt.broker import Broker
from tests.mqtt.forms import check
from tests.mqtt.listener import Listener, listening

MIB = 1 << 20


def _text(path: Path, seed: int, size: int) -> str:
    """Return a file of half its size in information, as what people write is."""
    path.write_bytes(Random(seed).randbytes(size // 2).hex().encode())
    return str(path)


def _live(daemon: Daemon, guest: Guest, disk: Path, scratch: Path) -> tuple[str, str]:
    """Let the guest do its work, and then be encrypted; return the last snapshot before, and the one after."""
    write(disk, f"write -s {_text(scratch / 'files', 0, 40 * MIB)} 0 40M")
    (good,) = daemon.snapshot(guest.name)
    for day in range(3):
        write(disk, f"write -s {_text(scratch / 'work', day + 1, 2 * MIB)} {day}M 2M")
        (good,) = daemon.snapshot(guest.name)
    encrypted = scratch / "encrypted"
    encrypted.write_bytes(Random(99).randbytes(32 * MIB))
    write(disk, f"write -s {encrypted} 0 32M", "write -z 32M 8M")  # what is wiped is no sign, and dilutes none
    (attacked,) = daemon.snapshot(guest.name)
    return good.id, attacked.id


async def test_half_a_disk_that_is_encrypted_is_seen_by_everybody_until_somebody_says_that_all_is_well(
    workdir: Path, libvirtd: Libvirtd, make_guest: Callable[..., Guest], broker: Broker
) -> None:
    disk = make_image(workdir / "a.qcow2", "64M")
    guest = make_guest([DiskSpec(disk)])
    rules = f"history_min = 3\nmin_bytes = {4 * MIB}"
    daemon = Daemon(workdir, libvirtd.uri, mqtt=f'url = "{broker.url}"', alarms=rules)
    async with listening(broker.port) as listener:
        try:
            await asyncio.to_thread(daemon.start)
            good, attacked = await asyncio.to_thread(_live, daemon, guest, disk, workdir)
            await listener.until(_healths_end("unusual"), "the alarm")
            (event,) = [one for one in listener.events() if one["type"] == "snapshot.unusual"]
            told = event["payload"]
            assert (told["snapshot"], told["last_good"], told["level"]) == (attacked, good, "severe")
            assert told["stored_share"] > 0.95
            assert told["usual_share"] < 0.7
            assert (told["changed_bytes"], told["changed_bytes_h"]) == (40 * MIB, 32 * MIB)
            assert _states(listener)[-1]["alarm"]["snapshot"] == attacked  # type: ignore[index]
            await asyncio.to_thread(_seen_and_acknowledged, daemon, good, attacked)
            await listener.until(_healths_end("ok"), "the end of the alarm")
        finally:
            await asyncio.to_thread(daemon.stop)
    for message in listener.heard:
        check(message.topic, message.payload)


def _seen_and_acknowledged(daemon: Daemon, good: str, attacked: str) -> None:
    assert daemon.info(good).alarm is None
    alarm = daemon.info(attacked).alarm
    assert alarm is not None
    assert (alarm.level, alarm.acknowledged_at) == ("severe", None)
    with daemon.client() as client:
        report = client.get("/doctor", wire.DoctorReport)
        (finding,) = [one for one in report.findings if one.check == "unusual-change"]
        assert finding.severity == "error"
        assert good in finding.remedy
        client.post(f"/snapshots/{attacked}/edit", wire.Snapshot, wire.SnapshotEdit(usual=True))


def _states(listener: Listener) -> list[dict[str, object]]:
    return [one.json for one in listener.heard if one.topic.endswith("/state")]


def _healths_end(word: str) -> Callable[[Listener], bool]:
    return lambda listener: bool(states := _states(listener)) and states[-1]["health"] == word
