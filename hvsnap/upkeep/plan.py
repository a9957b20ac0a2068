"""What becomes of each pack: decided purely, from the catalog's figures."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvsnap.model import Pack

LIVE_SHARE_MIN = 0.5
"""A pack of which less than this is live is rewritten, where no holes can be punched: it wastes more than it holds."""

LIVE_SHARE_PUNCHED_MIN = 0.1
"""The same where the space was given back already: only files are wasted, and reads are scattered."""


class Fate(enum.StrEnum):
    """What becomes of a pack."""

    KEEP = "keep"
    PUNCH = "punch"  # the space of its dead blocks is given back
    REWRITE = "rewrite"  # its live blocks move to another pack, then it is deleted
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class PackPlan:
    """A pack, what it will hold once dead blocks are dropped, and what becomes of it."""

    pack: Pack
    live_blocks: int
    live_bytes: int
    fate: Fate


def plan_pack(pack: Pack, dead_blocks: int, dead_bytes: int, *, can_punch: bool) -> PackPlan:
    """Decide what becomes of one pack that loses dead blocks."""
    live_blocks, live_bytes = pack.live_blocks - dead_blocks, pack.live_bytes - dead_bytes
    share_min = LIVE_SHARE_PUNCHED_MIN if can_punch else LIVE_SHARE_MIN
    if live_blocks == 0:
        fate = Fate.DELETE
    elif not pack.to_sweep and not dead_blocks:
        fate = Fate.KEEP  # it was looked at since it last changed
    elif live_bytes < share_min * pack.size_bytes:
        fate = Fate.REWRITE
    elif can_punch:
        fate = Fate.PUNCH
    else:
        fate = Fate.KEEP
    return PackPlan(pack, live_blocks, live_bytes, fate)


def plan_packs(packs: Sequence[Pack], dead: Mapping[int, tuple[int, int]], *, can_punch: bool) -> list[PackPlan]:
    """Decide for all packs; ``dead`` has the blocks and bytes that each is about to lose, by its number."""
    return [plan_pack(pack, *dead.get(pack.number, (0, 0)), can_punch=can_punch) for pack in packs]
