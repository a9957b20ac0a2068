"""A guest's disk whose files are being encrypted, seen from outside: by the command line, and over a real broker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.e2e.test_command_line import CommandLine, write
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


def _live(hvsnap: CommandLine, guest: Guest, disk: Path, scratch: Path) -> tuple[str, str]:
    """Let the guest do its work, and then be encrypted; return the last snapshot before, and the one after."""
    write(disk, f"write -s {_text(scratch / 'files', 0, 32 * MIB)} 0 32M")
    for day in range(5):
        good = hvsnap.ok("snapshot-create", guest.name, "-q").strip()
        write(disk, f"write -s {_text(scratch / 'work', day + 1, 2 * MIB)} {day}M 2M")
    good = hvsnap.ok("snapshot-create", guest.name, "-q").strip()
    encrypted = scratch / "encrypted"
    encrypted.write_bytes(Random(99).randbytes(32 * MIB))
    write(disk, f"write -s {encrypted} 0 32M")
    return good, hvsnap.ok("snapshot-create", guest.name, "-q").strip()


async def test_half_a_disk_that_is_encrypted_is_seen_by_everybody_until_somebody_says_that_all_is_well(
    workdir: Path, libvirtd: Libvirtd, make_guest: Callable[..., Guest], broker: Broker
) -> None:
    disk = make_image(workdir / "a.qcow2", "64M")
    guest = make_guest([DiskSpec(disk)])
    rules = f"history_min = 4\nmin_bytes = {4 * MIB}"
    hvsnap = CommandLine(workdir, libvirtd.uri, mqtt=f'url = "{broker.url}"', alarms=rules)
    try:
        async with listening(broker.port) as listener:
            await asyncio.to_thread(hvsnap.start_daemon)
            good, attacked = await asyncio.to_thread(_live, hvsnap, guest, disk, workdir)
            await listener.until(_healths_end("unusual"), "the alarm")
            (event,) = [one for one in listener.events() if one["type"] == "snapshot.unusual"]
            told = event["payload"]
            assert (told["snapshot"], told["last_good"], told["level"]) == (attacked, good, "severe")
            assert told["stored_share"] > 0.95
            assert told["usual_share"] < 0.7
            assert told["changed_bytes_h"] == 32 * MIB
            assert _states(listener)[-1]["alarm"]["snapshot"] == attacked
            await asyncio.to_thread(_everybody_sees, hvsnap, good, attacked)
            hvsnap.ok("snapshot-edit", attacked, "--usual")
            await listener.until(_healths_end("ok"), "the end of the alarm")
            assert "unusual-change" not in hvsnap("doctor").out
            assert "unusual" not in hvsnap.ok("snapshot-list")
            assert hvsnap.end_daemon() == 0
        for message in listener.heard:
            check(message.topic, message.payload)
    finally:
        hvsnap.close()


def _everybody_sees(hvsnap: CommandLine, good: str, attacked: str) -> None:
    shown = json.loads(hvsnap.ok("snapshot-info", attacked, "--json"))["alarm"]
    assert (shown["level"], shown["acknowledged_at"]) == ("severe", None)
    assert "severe: 32.0 MiB changed an hour" in hvsnap.ok("snapshot-info", attacked)
    assert "accomplished, unusual" in hvsnap.ok("snapshot-list")
    assert "Unusual" not in hvsnap.ok("snapshot-info", good)
    report = json.loads(hvsnap("doctor", "--json").out)
    (finding,) = [one for one in report["findings"] if one["check"] == "unusual-change"]
    assert finding["severity"] == "error"
    assert good in finding["remedy"]


def _states(listener: Listener) -> list[dict[str, object]]:
    return [one.json for one in listener.heard if one.topic.endswith("/state")]


def _healths_end(word: str) -> Callable[[Listener], bool]:
    return lambda listener: bool(states := _states(listener)) and states[-1]["health"] == word
