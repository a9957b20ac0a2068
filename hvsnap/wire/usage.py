"""What was stored when, and what it costs."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from hvsnap.wire.base import Answer


class UsagePoint(Answer):
    """The average of a part of the interval, which begins here."""

    at: AwareDatetime
    bytes: int


class UsageLine(Answer):
    """What was stored of one chain, or of all, in an interval."""

    subject: str = Field(description="disk and chain id, or ``host``", examples=["d-mfrggzdfmztw"])
    guest: str | None
    target: str | None
    last_bytes: int = Field(description="at the end of the interval")
    mean_bytes: int
    peak_bytes: int
    gib_hours: float
    billable_gib_hours: float = Field(description="beyond what is prepaid; a chain's is its share of the host's")
    cost: float | None = Field(description="an estimate; null without a price")
    points: list[UsagePoint] = Field(description="for a plot; empty unless asked for")


class Usage(Answer):
    """What was stored in an interval, from samples (SERVICE 9.2, 9.3).

    Chains share blocks: their lines come to more than ``total``, which counts each block once. What they cost is shared
    in proportion.
    """

    since: AwareDatetime
    until: AwareDatetime
    known_since: AwareDatetime | None = Field(description="the first sample; what was before counts as nothing")
    by: Literal["chain", "host"]
    estimate: Literal[True] = Field(default=True, description="what it costs is an estimate, not a bill")
    currency: str
    price_per_gib_month: float | None
    prepaid_gib: float
    lines: list[UsageLine]
    total: UsageLine = Field(description="of the host")
    days_to_full: float | None = Field(description="of the store's device, at the pace of the last week; null: unknown")
