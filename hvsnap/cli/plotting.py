"""Plots of what was stored: to a file with matplotlib, to the terminal with plotext; loaded when asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from hvsnap import wire
from hvsnap.cli.text import safe
from hvsnap.errors import BadRequest, Failed, TargetExists

TERMINAL = "-"
ENDINGS = (".png", ".svg")
CHAINS_MAX = 10
"""Lines that a plot shows by themselves; what the smaller chains hold is one line together."""

GIB = 1 << 30
_INSTALL = "pip install 'hvsnap[plot]'"


def check(plot: str) -> Path | None:
    """Return the file that a plot goes to, None for the terminal; refuse what cannot be, before anything is asked."""
    if plot == TERMINAL:
        _require("plotext")
        return None
    path = Path(os.path.abspath(plot))
    if path.suffix.lower() not in ENDINGS:
        raise BadRequest(f"{path.name} is neither .png nor .svg", hint="name a .png or .svg, or - for the terminal")
    if os.path.lexists(path):
        raise TargetExists(f"{path} exists")
    if not path.parent.is_dir():
        raise BadRequest(f"there is no directory {path.parent}", hint="create it first")
    _require("matplotlib")
    return path


def _require(library: str) -> None:
    if find_spec(library) is None:
        raise Failed(f"plots need {library}, which is not installed", hint=_INSTALL)


def curves(answer: wire.Usage) -> dict[str, list[tuple[datetime, float]]]:
    """Return what is drawn: for each label moments and GiB, the largest chains first, the others together."""
    found = {_label(line): [(one.at, one.bytes / GIB) for one in line.points] for line in answer.lines[:CHAINS_MAX]}
    if rest := answer.lines[CHAINS_MAX:]:
        columns = zip(*(line.points for line in rest), strict=True)
        together = [(column[0].at, sum(one.bytes for one in column) / GIB) for column in columns]
        found[f"{len(rest)} others"] = together
    if answer.by == "chain":
        found["host"] = [(one.at, one.bytes / GIB) for one in answer.total.points]
    return found


def _label(line: wire.UsageLine) -> str:
    # A name of a guest is not trusted with the terminal, nor with matplotlib's mathematics between dollars.
    return safe(line.subject if line.guest is None else f"{line.guest}/{line.target} {line.subject}")


def _title(answer: wire.Usage) -> str:
    return f"Stored, {answer.since.astimezone():%Y-%m-%d} to {answer.until.astimezone():%Y-%m-%d}"


def save(answer: wire.Usage, path: Path) -> None:
    """Draw into a new file, whole or not at all. Raises :class:`TargetExists`, :class:`Failed`."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, and not always there

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for label, points in curves(answer).items():
        moments, amounts = [at for at, _ in points], [amount for _, amount in points]
        style = {"color": "black", "linestyle": "--"} if label == "host" and answer.by == "chain" else {}
        axes.step(moments, amounts, where="post", label=label.replace("$", r"\$"), **style)  # type: ignore[arg-type]
    axes.set_title(_title(answer))
    axes.set_ylabel("GiB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="upper left", fontsize="small")
    figure.autofmt_xdate()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format=path.suffix.lower().lstrip("."))
        os.link(temporary, path)
    except FileExistsError as error:
        raise TargetExists(f"{path} exists") from error
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}", hint="choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def terminal(answer: wire.Usage) -> str:
    """Return the plot as text, as wide as the terminal."""
    import plotext  # noqa: PLC0415 - not always there

    columns, _rows = shutil.get_terminal_size()
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(min(columns, 120), 18)
    plotext.title(_title(answer))
    for label, points in curves(answer).items():
        plotext.plot([at.timestamp() for at, _ in points], [amount for _, amount in points], label=label)
    ticks = _ticks(answer)
    plotext.xticks([at.timestamp() for at in ticks], [f"{at:%m-%d %H:%M}" for at in ticks])
    plotext.ylabel("GiB")
    plotext.ylim(0, None)
    text: str = plotext.uncolorize(plotext.build())
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip("\n")


def _ticks(answer: wire.Usage) -> Sequence[datetime]:
    points = answer.total.points
    return [points[at].at.astimezone() for at in range(0, len(points), max(1, len(points) // 4))]
