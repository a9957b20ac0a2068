"""Which node of QEMU's block graph is a disk: pure functions on what QMP answers.

Node names are in no fixed order and change with every overlay: they are asked for each time, never kept.
"""

from __future__ import annotations

from typing import Any

from hvsnap.errors import HypervisorFailed
from hvsnap.model import Bitmap

FORMAT_DRIVERS = ("qcow2", "raw", "luks")

OURS = "hvsnap-"
"""How the names of nodes, jobs and exports begin that hvsnap makes in a guest's QEMU (at most 31 characters)."""

SWITCH = "-switch"
"""How the name of a ``raw`` node ends that hvsnap puts above a disk: a filter, though its driver is a format's."""


def _is_device(qdev: str, alias: str) -> bool:
    """Whether QEMU's name of a device is ours: the id itself, or its path (``/machine/peripheral/ID/…``)."""
    return qdev == alias or f"/{alias}/" in f"{qdev}/"


def device_entry(query_block: list[dict[str, Any]], alias: str) -> dict[str, Any]:
    """Return the ``query-block`` entry of a device; raises :class:`HypervisorFailed` if there is none."""
    for entry in query_block:
        if _is_device(entry.get("qdev", ""), alias) and "inserted" in entry:
            return entry
    raise HypervisorFailed(f"QEMU shows no disk for the device {alias}")


def is_format(name: str, driver: str | None) -> bool:
    """Whether a node holds an image's format, and is not one of hvsnap's own filters."""
    return driver in FORMAT_DRIVERS and not (name.startswith(OURS) and name.endswith(SWITCH))


def needs_graph(inserted: dict[str, Any]) -> bool:
    """Whether a filter (copy-on-read, throttle, a job's) is on top, so that the graph must be asked for."""
    return not is_format(inserted["node-name"], inserted["drv"])


class Graph:
    """QEMU's block graph, from ``x-debug-query-block-graph``: which node lies below which, and who uses it."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self._names = {node["id"]: str(node["name"]) for node in raw["nodes"]}
        self._types = {node["id"]: str(node["type"]) for node in raw["nodes"]}
        self._edges = [(edge["parent"], str(edge["name"]), edge["child"]) for edge in raw["edges"]]

    def below(self, name: str) -> str | None:
        """Return the node that holds what a filter or format shows: its ``file``, or ``backing`` of a filter."""
        found = self.children(name)
        return found.get("file", found.get("backing"))

    def children(self, name: str) -> dict[str, str]:
        """Return the children of a block node by the names of the edges."""
        drivers = {key for key, kind in self._types.items() if kind == "block-driver" and self._names[key] == name}
        return {edge: self._names[child] for parent, edge, child in self._edges if parent in drivers}

    def jobs_on(self, names: set[str]) -> list[str]:
        """Return the ids of the jobs that use any of these nodes."""
        jobs = {key for key, kind in self._types.items() if kind == "block-job"}
        return sorted({self._names[p] for p, _edge, child in self._edges if p in jobs and self._names[child] in names})


def format_node(inserted: dict[str, Any], named_nodes: list[dict[str, Any]], graph: dict[str, Any] | None) -> str:
    """Return the name of the node that holds the image's format, below the filters on top of it.

    ``named_nodes`` answers ``query-named-block-nodes`` (flat), ``graph`` ``x-debug-query-block-graph``; the graph
    may be None unless :func:`needs_graph`.
    """
    return filters_and_format(inserted, named_nodes, graph)[-1]


def filters_and_format(
    inserted: dict[str, Any], named_nodes: list[dict[str, Any]], graph: dict[str, Any] | None
) -> list[str]:
    """Return the nodes from a device's root down to its format node, which is the last; see :func:`format_node`."""
    drivers = {node["node-name"]: node["drv"] for node in named_nodes}
    shown = None if graph is None else Graph(graph)
    path = [str(inserted["node-name"])]
    for _ in range(len(drivers) + 1):
        if is_format(path[-1], drivers.get(path[-1])):
            return path
        below = None if shown is None else shown.below(path[-1])
        if below is None:
            raise HypervisorFailed(f"no image format below the node {path[-1]}, a {drivers.get(path[-1])}")
        path.append(below)
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
