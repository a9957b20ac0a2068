"""Who a bare guest is, and which disks it has while it is off; pure functions on what was remembered and configured.

A launcher's command line is nobody's but its own: while the guest is off, its disks are those of the last look at it,
or those that the configuration names.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hvsnap.model import DiskView, GuestUuid, Layer

NO_UUID = "00000000-0000-0000-0000-000000000000"
"""What QEMU says of a guest that was started without ``-uuid``."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A guest as it was seen last."""

    uuid: GuestUuid
    disks: tuple[DiskView, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it as it is remembered."""
        return {"uuid": self.uuid, "disks": [asdict(disk) for disk in self.disks]}

    @classmethod
    def of(cls, raw: Mapping[str, Any] | None) -> Seen | None:
        """Return what was remembered; None for nothing, and for what another release wrote."""
        if raw is None:
            return None
        try:
            disks = [DiskView(**{**disk, "layers": _layers(disk["layers"])}) for disk in raw["disks"]]
            return cls(GuestUuid(str(raw["uuid"])), tuple(disks))
        except (KeyError, TypeError):
            return None


def _layers(raw: Sequence[Mapping[str, str]]) -> tuple[Layer, ...]:
    return tuple(Layer(**layer) for layer in raw)


def made_uuid(host_id: str, name: str) -> GuestUuid:
    """Return the UUID of a guest whose launcher gives it none: always the same for a host's guest of that name."""
    return GuestUuid(str(uuid.uuid5(uuid.NAMESPACE_URL, f"hvsnap:{host_id}/{name}")))


def identity(shown: str | None, seen: Seen | None, host_id: str, name: str) -> GuestUuid:
    """Return a guest's UUID; ``shown`` is QEMU's, None while the guest is off.

    A guest that was met while it was off, and so got a UUID of ours, keeps it: its chains hang on it.
    """
    made = made_uuid(host_id, name)
    if seen is not None and (shown in (None, NO_UUID) or seen.uuid == made):
        return seen.uuid
    return made if shown in (None, NO_UUID) else GuestUuid(str(shown).lower())


def disks_while_off(seen: Seen | None, configured: Mapping[str, Layer]) -> tuple[DiskView, ...]:
    """Return the disks of a guest that is off. The configuration goes before memory, where they differ."""
    found = {disk.target: disk for disk in seen.disks} if seen is not None else {}
    for target, layer in configured.items():
        known = found.get(target)
        if known is None:
            found[target] = DiskView(target, "virtio", "", (layer,), system=False)
        elif layer.path not in [one.path for one in known.layers]:
            found[target] = replace(known, layers=(layer,), skip_reason="")
    disks = list(found.values())
    if disks and not any(disk.system for disk in disks):
        first = next((number for number, disk in enumerate(disks) if not disk.skip_reason), 0)
        disks[first] = replace(disks[first], system=True)
    return tuple(disks)


def with_layers(seen: Seen, target: str, layers: tuple[Layer, ...]) -> Seen:
    """Return what is remembered with another chain of images of one disk."""
    return replace(seen, disks=tuple(replace(d, layers=layers) if d.target == target else d for d in seen.disks))
