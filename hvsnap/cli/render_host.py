"""How findings of the doctor and what a recovery did look."""

from __future__ import annotations

from hvsnap import wire
from hvsnap.cli.text import safe


def doctor(report: wire.DoctorReport, *, all_of_it: bool = True) -> str:
    """Return the findings, the remedy below each one that needs it; else only what needs attention."""
    lines = []
    for finding in report.findings:
        if not all_of_it and finding.severity in ("ok", "info"):
            continue
        evidence = f" ({safe(finding.evidence)})" if finding.evidence else ""
        lines.append(f"{finding.severity.upper():<8} {finding.check}: {safe(finding.what)}{evidence}")
        if finding.remedy and finding.severity != "ok":
            lines.append(f"{'':<8} -> {safe(finding.remedy)}")
    return "\n".join(lines)


def recovery(answer: wire.Recovery) -> str:
    """Return what a recovery did."""
    if not answer.operations:
        return "nothing was open"
    return "\n".join(
        f"{one.kind} {one.id} of {safe(one.guest)}: {one.outcome}" + (f" ({safe(one.detail)})" if one.detail else "")
        for one in answer.operations
    )
