"""Chains of snapshots, and what they weigh."""

from __future__ import annotations

from pydantic import Field

from hvsnap.wire.base import Answer
from hvsnap.wire.drills import Drill
from hvsnap.wire.snapshots import Snapshot


class ChainSummary(Answer):
    """One chain, without its nodes."""

    disk: str
    guest: str
    target: str
    path: str
    system: bool
    released: bool = Field(description="the disk is gone from its guest")
    head: str | None = Field(description="the snapshot that the disk's present state continues from")
    snapshots: int = Field(description="accomplished ones")
    limit: int = Field(description="how many snapshots the chain may hold")
    drill: Drill | None = Field(default=None, description="the newest restore drill of the disk; null: it had none")
    size_bytes: int
    logical_bytes: int = Field(description="what all its snapshots restore to, together")
    stored_bytes: int = Field(description="what the store holds for them; blocks shared within the chain count once")
    exclusive_bytes: int = Field(description="sum over the snapshots of what only each of them holds")


class ChainNode(Answer):
    """One snapshot in its chain."""

    snapshot: Snapshot
    exclusive_bytes: int = Field(description="stored bytes that only this snapshot refers to")
    head: bool


class Chain(ChainSummary):
    """One chain with its nodes, oldest first."""

    nodes: list[ChainNode]


class ChainList(Answer):
    """All chains."""

    chains: list[ChainSummary]
