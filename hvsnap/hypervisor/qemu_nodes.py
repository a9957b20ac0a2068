"""Which node of QEMU's block graph is a disk: pure functions on what QMP answers.

Node names are in no fixed order and change with every overlay: they are asked for each time, never kept.
"""

from __future__ import annotations

from typing import Any

from hvsnap.errors import HypervisorFailed
from hvsnap.model import Bitmap

FORMAT_DRIVERS = ("qcow2", "raw", "luks")


def _is_device(qdev: str, alias: str) -> bool:
    """Whether QEMU's name of a device is ours: the id itself, or its path (``/machine/peripheral/ID/…``)."""
    return qdev == alias or f"/{alias}/" in f"{qdev}/"


def device_entry(query_block: list[dict[str, Any]], alias: str) -> dict[str, Any]:
    """Return the ``query-block`` entry of a device; raises :class:`HypervisorFailed` if there is none."""
    for entry in query_block:
        if _is_device(entry.get("qdev", ""), alias) and "inserted" in entry:
            return entry
    raise HypervisorFailed(f"QEMU shows no disk for the device {alias}")


def needs_graph(inserted: dict[str, Any]) -> bool:
    """Whether a filter (copy-on-read, throttle, a job's) is on top, so that the graph must be asked for."""
    return inserted["drv"] not in FORMAT_DRIVERS


def format_node(inserted: dict[str, Any], named_nodes: list[dict[str, Any]], graph: dict[str, Any] | None) -> str:
    """Return the name of the node that holds the image's format, below the filters on top of it.

    ``named_nodes`` answers ``query-named-block-nodes`` (flat), ``graph`` ``x-debug-query-block-graph``; the graph
    may be None unless :func:`needs_graph`.
    """
    drivers = {node["node-name"]: node["drv"] for node in named_nodes}
    current = str(inserted["node-name"])
    ids = {node["name"]: node["id"] for node in graph["nodes"]} if graph else {}
    names = {node_id: name for name, node_id in ids.items()}
    for _ in range(len(drivers) + 1):
        if drivers.get(current) in FORMAT_DRIVERS:
            return current
        edges = graph["edges"] if graph else []
        below = [names[edge["child"]] for edge in edges if edge["parent"] == ids.get(current)]
        if len(below) != 1:
            raise HypervisorFailed(f"no image format below the node {current}, a {drivers.get(current)}")
        current = below[0]
    raise HypervisorFailed("QEMU's block graph has a loop")


def bitmaps(named_nodes: list[dict[str, Any]], node: str) -> list[Bitmap]:
    """Return the bitmaps of a node, from ``query-named-block-nodes`` (flat)."""
    for entry in named_nodes:
        if entry.get("node-name") == node:
            return [_bitmap(raw) for raw in entry.get("dirty-bitmaps", [])]
    raise HypervisorFailed(f"QEMU no longer shows the node {node}")


def _bitmap(raw: dict[str, Any]) -> Bitmap:
    return Bitmap(
        name=raw.get("name", ""),
        granularity=raw["granularity"],
        recording=raw["recording"],
        persistent=raw["persistent"],
        inconsistent=raw.get("inconsistent", False),
        busy=raw["busy"],
        dirty_bytes=raw["count"],
    )
