"""The store: what is in it, its checks, its upkeep."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from hvsnap.wire.base import Answer, Request
from hvsnap.wire.drills import Drill
from hvsnap.wire.snapshots import AffectedSnapshot


class StoreDifference(Answer):
    """One thing on which catalog and store do not agree."""

    kind: str = Field(examples=["pack-missing"])
    subject: str = Field(description="pack, manifest, snapshot or block")
    detail: str
    harmless: bool = Field(description="no snapshot is the worse for it; the next compaction puts it right")


class StoreChecked(Answer):
    """What became of a check. ``sound``: nothing is wrong that a snapshot suffers from."""

    kind: Literal["store-check"] = "store-check"
    sound: bool
    packs: int
    manifests: int
    blocks: int
    difference_count: int
    differences: list[StoreDifference] = Field(description="at most 1000 of them")
    affected: list[AffectedSnapshot]


class StoreRebuilt(Answer):
    """The catalog that was made from the store alone."""

    disks: int
    snapshots: int
    images: int = 0
    packs: int
    blocks: int
    damaged_blocks: int
    damaged: list[str] = Field(description="packs and manifests that could not be used, and why")
    lost: list[str] = Field(description="snapshots whose manifest, or one that they build on, cannot be read")
    affected: list[AffectedSnapshot]
    kept: str = Field(description="where the catalog that was there before is kept; empty if there was none")


class StoreRekeyed(Answer):
    """The key of an encrypted store was changed."""

    key_file: str = Field(description="the only one that opens it now")


class PackFate(Answer):
    """What becomes of one pack."""

    pack: str
    fate: str = Field(description="punch, rewrite or delete")
    size_bytes: int
    live_bytes: int


class StoreCompacted(Answer):
    """What a compaction did, or with ``dry_run`` would do."""

    kind: Literal["store-compact"] = "store-compact"
    dry_run: bool
    dropped_blocks: int = Field(description="to which no snapshot refers any more")
    freed_bytes: int = Field(description="their stored bytes")
    deleted_packs: int
    punched_packs: int = Field(description="the space of their dead blocks was given back to the file system")
    rewritten_packs: int = Field(description="their live blocks were moved to others")
    orphans: int = Field(description="packs that an interruption had left, and nothing knew")
    manifests: int = Field(description="written anew or removed")
    packs: list[PackFate] = Field(description="with dry_run: what becomes of packs that do not stay as they are")


class StoreCompact(Request):
    """Free what no snapshot refers to."""

    dry_run: bool = False


class StoreInfo(Answer):
    """The store at a glance."""

    url: str
    repository: str = Field(description="the repository's id")
    block_size: int
    packs: int
    size_bytes: int = Field(description="of all packs; holes that were given back to the file system count, too")
    live_bytes: int = Field(description="stored bytes of the blocks that are kept")
    live_blocks: int
    snapshots: int
    free_bytes: int | None = Field(description="of the store's device; null for a bucket")
    total_bytes: int | None
    sweeping: bool
    swept_at: AwareDatetime | None = Field(description="when the daemon last freed space, since it started")
    damaged_blocks: int = Field(description="known ones")
    affected: list[AffectedSnapshot]
    unverified_packs: int = Field(description="never read again since they were written")
    drill: Drill | None = Field(default=None, description="the newest restore drill of all; null: there was none")
    drills_failed: int = Field(default=0, description="disks whose newest drill did not pass")
    verified_since: AwareDatetime | None = Field(description="every other pack was verified since; null if none was")
