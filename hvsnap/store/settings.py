"""What is set for policies and disks, and what disks were made of, as objects of the repository (docs/format.md).

A rebuild knows from them what no manifest tells. The newest counts; the older ones are removed once it is written.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from blake3 import blake3

from hvsnap.errors import Damaged, FormatUnknown, NotFound
from hvsnap.model import DiskId, Origin
from hvsnap.policy import Keep, Policy, PolicyId
from hvsnap.ports import ObjectStore
from hvsnap.store.repository import Repository

SETTINGS = "settings"
BYTES_MAX = 16 << 20

_FORMAT, _VERSION = "hvsnap-settings", 1
_NAME = re.compile(SETTINGS + r"/([0-9]{8})")
_KIND = b"settings"


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """What is set for one disk, where it is not what a new one has."""

    id: DiskId
    policy: PolicyId | None = None
    delete_auto_with_disk: bool = False
    released: bool = False


@dataclass(frozen=True, slots=True)
class HostSettings:
    """All policies, and what is set for disks, in order of their ids; what files were made of, by their paths."""

    policies: tuple[Policy, ...] = ()
    disks: tuple[DiskSettings, ...] = ()
    origins: tuple[Origin, ...] = ()


def encode(settings: HostSettings, name: str, repository: Repository) -> bytes:
    """Return an object; in an encrypted repository what it says is sealed."""
    document = json.dumps(asdict(settings), sort_keys=True)
    values: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "repository": repository.id.hex(), "name": name}
    if repository.seal is None:
        values["settings"] = document
    else:
        values["sealed"] = repository.seal.seal(_KIND, name.encode(), document.encode()).hex()
    values["check"] = _check(values, repository)
    return (json.dumps(values, indent=2) + "\n").encode()


def decode(data: bytes, name: str, repository: Repository) -> HostSettings:
    """Return what an object says. Raises :class:`Damaged`, :class:`FormatUnknown`."""
    try:
        values = json.loads(data) if len(data) <= BYTES_MAX else None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise Damaged(f"{name} does not hold settings")
    if values.get("version") != _VERSION:
        raise FormatUnknown(f"{name} has format version {values.get('version')}, this release knows {_VERSION}")
    if values.pop("check", None) != _check(values, repository):
        raise Damaged(f"{name} was changed: its check value is wrong")
    if (values.get("repository"), values.get("name")) != (repository.id.hex(), name):
        raise Damaged(f"{name} is another object, or of another repository")
    try:
        return _settings(json.loads(_document(values, name, repository)))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(f"{name}: its settings are wrong: {error}") from error


def _document(values: dict[str, Any], name: str, repository: Repository) -> str | bytes:
    """Return the document; one that is sealed in a plain repository, or the other way round, is refused."""
    if repository.seal is None:
        return str(values["settings"])
    if "settings" in values:
        raise Damaged(f"{name} is in plain, in an encrypted repository")
    return repository.seal.open(_KIND, name.encode(), bytes.fromhex(values["sealed"]), name)


def _settings(document: dict[str, Any]) -> HostSettings:
    policies = [
        Policy(
            **one
            | {
                "id": PolicyId(one["id"]),
                "hours": tuple(one["hours"]),
                "weekdays": tuple(one["weekdays"]),
                "keep": Keep(**one["keep"]),
            }
        )
        for one in document["policies"]
    ]
    disks = tuple(DiskSettings(**one) for one in document["disks"])
    origins = tuple(Origin(**one) for one in document.get("origins", []))  # earlier releases wrote none
    return HostSettings(tuple(policies), disks, origins)


def _check(values: dict[str, Any], repository: Repository) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return blake3(text.encode(), key=repository.keys.settings).hexdigest()


class SettingsObjects:
    """The settings of one repository."""

    def __init__(self, objects: ObjectStore, repository: Repository) -> None:
        self._objects = objects
        self._repository = repository

    async def newest(self) -> HostSettings:
        """Return the newest that can be read; nothing is set where there is none.

        Raises :class:`Damaged` or :class:`FormatUnknown` if there are some, and none can be read.
        """
        failed: Damaged | FormatUnknown | None = None
        for name in reversed(await self._names()):
            try:
                return decode(await self._objects.get(name), name, self._repository)
            except NotFound:
                continue  # replaced since it was listed
            except (Damaged, FormatUnknown) as error:
                failed = error
        if failed is not None:
            raise failed
        return HostSettings()

    async def put(self, settings: HostSettings) -> str:
        """Write the next object, durable on return; return its name."""
        names = await self._names()
        number = int(names[-1].removeprefix(f"{SETTINGS}/")) + 1 if names else 1
        name = f"{SETTINGS}/{number:08d}"
        await self._objects.put(name, encode(settings, name, self._repository))
        return name

    async def remove(self, *, but: str = "") -> None:
        """Remove all objects but one."""
        for name in await self._names():
            if name != but:
                await self._objects.delete(name)

    async def _names(self) -> list[str]:
        return sorted([item.name async for item in self._objects.list(SETTINGS) if _NAME.fullmatch(item.name)])
