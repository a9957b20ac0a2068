"""``python -m bench [copying|impact|rollback|instant|all] [--rounds N] [--json]``: as ratios of one run."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from typing import Any

from bench.copying import Copying
from bench.disk import build
from bench.impact import Impact
from bench.instant import BOOT_MAX, BOOT_RATIO, Instant
from bench.rollback import TIME_MAX, WRITTEN_MAX, Rolling

GIB = 1 << 30
LIMITS_IMPACT = {"redirect": (0.97, 1.1)}
"""Share of the IOPS at rest, and times the p99 (docs/service.md, "Promises")."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def copying(rounds: int, mib: int) -> dict[str, Any]:
    disk = build(max(8 * GIB, mib << 22), mib << 20)
    say(f"{disk.files} files of {disk.file_bytes >> 20} MiB on a disk of {disk.size_bytes >> 30} GiB")
    run = Copying(disk, say)
    run.rounds(rounds)
    print(f"\n{'ratio':<46} {'median':>7} {'at most':>8}")
    for ratio, value in run.ratios():
        verdict = "" if ratio.limit is None else f"{ratio.limit:8.2f}  {'ok' if value <= ratio.limit else 'MISSED'}"
        print(f"{ratio.name:<46} {value:7.2f} {verdict}")
    return {"figures": run.figures, "ratios": {ratio.name: value for ratio, value in run.ratios()}}


def impact(rounds: int, seconds: float) -> dict[str, Any]:
    run = Impact(seconds, say)
    run.rounds(rounds)
    print(f"\n{'while it is open':<46} {'IOPS':>7} {'p99':>8}   against the same guest at rest")
    for name, (iops, p99) in run.summary().items():
        least, most = LIMITS_IMPACT.get(name, (0.0, float("inf")))
        verdict = "" if name not in LIMITS_IMPACT else ("ok" if iops >= least and p99 <= most else "MISSED")
        print(f"{name:<46} {iops:7.2f} {p99:7.2f}x   {verdict}")
    return {name: {"iops": iops, "p99": p99} for name, (iops, p99) in run.summary().items()}


def rollback(rounds: int, mib: int) -> dict[str, Any]:
    disk = build(10 * GIB, mib << 20)
    say(
        f"{disk.files} files of {disk.file_bytes >> 20} MiB on a disk of {disk.size_bytes >> 30} GiB, 1 % of it changed"
    )
    run = Rolling(disk, say)
    run.rounds(rounds)
    print(f"\n{'rolling back':<46} {'median':>7} {'at most':>8}")
    for name, value in run.summary().items():
        limits = {"written or zeroed / blocks that differ": WRITTEN_MAX, "rollback / whole restore": TIME_MAX}
        way, _, figure = name.partition(": ")
        # Without a bitmap the whole disk has to be read.
        limit = 0.0 if (way, figure) == ("no bitmap", "rollback / whole restore") else limits.get(figure, 0.0)
        verdict = "" if not limit else f"{limit:8.2f}  {'ok' if value <= limit else 'MISSED'}"
        print(f"{name:<46} {value:7.2f} {verdict}")
    return {"figures": run.figures, "medians": run.summary()}


def instant(rounds: int) -> dict[str, Any]:
    run = Instant(say)
    run.rounds(rounds)
    print(f"\n{'an instant disk':<50} {'median':>7} {'at most':>8}")
    for name, value in run.summary().items():
        limit = BOOT_MAX if name == BOOT_RATIO else None
        verdict = "" if limit is None else f"{limit:8.2f}  {'ok' if value <= limit else 'MISSED'}"
        print(f"{name:<50} {value:7.2f} {verdict}")
    return {"figures": run.figures, "medians": run.summary()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", nargs="?", default="all", choices=["copying", "impact", "rollback", "instant", "all"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mib", type=int, default=2000, help="real file data on the disk")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of the guest")
    parser.add_argument("--json", action="store_true", help="print all figures as one object at the end")
    options = parser.parse_args()
    if os.geteuid() != 0:
        say("the bench starts a private libvirtd: run it as root, or `make bench`, which uses sudo")
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: everything is cleared away
    load = os.getloadavg()[0]
    say(f"load of the machine before: {load:.2f} on {os.cpu_count()} processors")
    result: dict[str, Any] = {"load_before": load}
    if options.what in ("copying", "all"):
        result["copying"] = copying(options.rounds, options.mib)
    if options.what in ("impact", "all"):
        result["impact"] = impact(options.rounds, options.seconds)
    if options.what in ("rollback", "all"):
        result["rollback"] = rollback(options.rounds, options.mib)
    if options.what in ("instant", "all"):
        result["instant"] = instant(options.rounds)
    if options.json:
        print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
