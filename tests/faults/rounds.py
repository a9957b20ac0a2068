"""How often the kill loop kills: one number for all its tests, and what they tell of it at the end of a run.

A round is a kill -9 of the daemon or of a guest's QEMU at a point of a capture that a seed has chosen, and everything
looked at afterwards. ``ROUNDS=N`` makes N of them in all, ``ROUNDS=0`` (or HVSNAP_TEST_ALL) one at every point;
``E2E_SEED`` names another sample.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

PARTS = {
    "libvirt redirect, daemon, first capture": 3,
    "libvirt redirect, daemon, next capture": 6,
    "libvirt redirect, daemon, group": 5,
    "libvirt redirect, daemon, recovery": 3,
    "libvirt redirect, QEMU": 4,
    "bare fleece, daemon": 10,
    "bare fleece, QEMU": 10,
    "bare redirect, daemon": 10,
    "bare redirect, QEMU": 10,
}
"""The rounds of each loop in an ordinary run. A guest with an operating system takes four times as long for one."""

ORDINARY = sum(PARTS.values())
ROUNDS = 0 if os.environ.get("HVSNAP_TEST_ALL") else int(os.environ.get("ROUNDS", str(ORDINARY)))
ALL = 1 << 30
PROPERTY = "kills"


def share(part: str, rounds: int = ROUNDS) -> int:
    """Return how many rounds a loop makes of so many in all; more than it has points, if all are wanted."""
    return -(-PARTS[part] * rounds // ORDINARY) if rounds else ALL


def told(record: Callable[[str, object], None], part: str, kills: int) -> None:
    """Note for the end of the run (``record`` is pytest's ``record_property``) how many kills came about."""
    record(PROPERTY, f"{kills} {part}")


def summary(properties: Iterable[tuple[str, object]], environment: Mapping[str, str] = os.environ) -> str:
    """Return the line about all kills of a run; empty if there were none."""
    kills: Counter[str] = Counter()
    for key, value in properties:
        if key == PROPERTY:
            count, _, part = str(value).partition(" ")
            kills[part] += int(count)
    if not kills:
        return ""
    parts = ", ".join(f"{count} {part}" for part, count in kills.items())
    seed = environment.get("E2E_SEED", "the default")
    return f"kill loop: {kills.total()} rounds, E2E_SEED {seed} ({parts}); ROUNDS=N makes N, ROUNDS=0 all"
