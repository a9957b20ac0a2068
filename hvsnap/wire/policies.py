"""Policies of automatic snapshots."""

from __future__ import annotations

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from hvsnap.wire.base import Answer, Name, Request


class PolicyKeep(BaseModel):
    """How many automatic snapshots stay: the newest, and the last of so many hours, days, weeks, months."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0


class PolicyCreate(Request):
    """Make a policy (SERVICE 5.1). ``keep`` goes with ``retain_days`` null."""

    name: str = Field(max_length=4096)
    hours: list[int] = Field(max_length=256, examples=[[0, 6, 12, 18]])
    weekdays: list[int] = Field(default=[0, 1, 2, 3, 4, 5, 6], max_length=256, description="0 is Monday")
    timezone: str = Field(default="", max_length=256, description="empty: the host's")
    retain_days: int | None = Field(default=30, description="null: forever, or as ``keep`` says")
    keep: PolicyKeep | None = None


class PolicyEdit(Request):
    """Change a policy; what is left out stays."""

    name: str = Field(default="", max_length=4096)
    hours: list[int] = Field(default=[], max_length=256)
    weekdays: list[int] = Field(default=[], max_length=256)
    timezone: str = Field(default="", max_length=256)
    retain_days: int | None = None
    keep: PolicyKeep | None = None


class PolicyDisks(Request):
    """Disks to be put under a policy, or taken out of theirs."""

    disks: list[Name] = Field(min_length=1, max_length=4096)


class PolicyDisk(Answer):
    """A disk under a policy."""

    id: str
    guest: str
    target: str


class Policy(Answer):
    """When automatic snapshots are made, and how long they are kept."""

    id: str = Field(examples=["p-mfrggzdfmztw"])
    name: str
    hours: list[int]
    weekdays: list[int] = Field(description="0 is Monday")
    timezone: str = Field(description="empty: the host's")
    retain_days: int | None
    keep: PolicyKeep
    next_run: AwareDatetime | None = Field(description="null: it has no disk")
    disks: list[PolicyDisk]


class PolicyList(Answer):
    """All policies, by name."""

    policies: list[Policy]


class PolicyApplied(Answer):
    """Disks that have a policy now, or none any more; ``replaced`` has, by disk id, the policy that each had."""

    policy: str | None
    disks: list[PolicyDisk]
    replaced: dict[str, str]
