"""Tables that fit where they are shown: which columns stay, how wide they are, how many lines each table gets.

Decided purely. A column that is not the least important is never left out, and names are shortened in the middle, since
hosts and guests of a fleet differ at their beginning or at their end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from rich.cells import cell_len, set_cell_size
from rich.text import Text

GAP = 2
COMFORTABLE = 24
"""Names that are longer are shortened to this before a column is left out for them."""

LEGIBLE = 16
"""And to this before the last column that could be left out is."""

_EMPTY = 100
HEAD_LINES = 2
"""A table's title, and the names of its columns."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: the higher its rank, the earlier it is left out, 0 never; ``least`` is how narrow it may become."""

    name: str
    rank: int = 0
    least: int = 0
    middle: bool = False  # shortened in its middle, not at its end


@dataclass(frozen=True, slots=True)
class Grid:
    """A table before it is laid out."""

    title: str
    columns: tuple[Column, ...]
    rows: Sequence[Sequence[Text]]


def fitting(grid: Grid, rows: Sequence[Sequence[Text]], width: int) -> dict[int, int]:
    """Return the columns that stay, by their index, with their widths; together they fit, if that can be at all."""
    widths = {
        index: max([cell_len(column.name), *(cell_len(row[index].plain) for row in rows)])
        for index, column in enumerate(grid.columns)
    }
    ranks = {i: column.rank for i, column in enumerate(grid.columns)}
    # A column in which nothing stands goes before all others.
    ranks |= {i: rank + _EMPTY for i, rank in ranks.items() if rank and not any(row[i].plain for row in rows)}
    while True:
        over = sum(widths.values()) + GAP * (len(widths) - 1) - width
        spare = {i: w - min(w, grid.columns[i].least or w) for i, w in widths.items()}
        dispensable = [i for i in widths if ranks[i]]
        if over > 0:
            enough = COMFORTABLE if max(ranks[i] for i in widths) > 1 else LEGIBLE
            long = {i: max(w - enough, 0) for i, w in widths.items() if grid.columns[i].middle}
            narrowed = _narrowed(widths, long, over)
            if narrowed != widths:
                widths = narrowed
                continue
        # What explains may be shortened before anything is left out; names are shortened last.
        words = {i: spare[i] for i in dispensable}
        for there in (words, spare if not dispensable else {}):
            if over <= sum(there.values()) or (there and there is spare):
                return _narrowed(widths, there, over)
        del widths[max(dispensable, key=lambda i: ranks[i])]


def _narrowed(widths: dict[int, int], spare: dict[int, int], over: int) -> dict[int, int]:
    """Take what is too much from the widest columns that have something to spare."""
    widths, spare = dict(widths), dict(spare)
    for _ in range(min(max(over, 0), sum(spare.values()))):
        widest = max((i for i in spare if spare[i]), key=lambda i: widths[i])
        widths[widest] -= 1
        spare[widest] -= 1
    return widths


def shortened(text: str, width: int, *, middle: bool) -> str:
    """Return a text that takes so many columns: padded, or with an ellipsis for what is left out."""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    if not middle or width < 5:
        return set_cell_size(text, max(width - 1, 0)) + "…" * (width > 0)
    tail, kept = "", (width - 1) // 2
    for char in reversed(text):
        if cell_len(char + tail) > kept:
            break
        tail = char + tail
    return set_cell_size(set_cell_size(text, width - 1 - kept) + "…" + tail, width)


def shares(rows: Sequence[int], lines: int) -> list[int]:
    """Return how many lines each table gets of those that there are, its head included; the first ones matter most.

    A table with nothing in it takes the line of its title, which says so. Where heads and one row of each do not fit,
    the last tables have their title alone, which tells how many rows there are, or nothing. What remains goes round, a
    row for each.
    """
    given = [HEAD_LINES + 1 if count else 1 for count in rows]
    for last in reversed(range(len(given))):
        # The titles behind it count as well.
        given[last] = given[last] if sum(given) <= lines else 1
    given = [
        max(min(mine, lines - before), 0) for mine, before in zip(given, accumulate(given, initial=0), strict=False)
    ]
    spare = lines - sum(given)
    while spare > 0:
        wanting = [i for i, count in enumerate(rows) if HEAD_LINES < given[i] < HEAD_LINES + count]
        if not wanting:
            break
        for i in wanting[:spare]:
            given[i] += 1
        spare -= len(wanting[:spare])
    return given


def laid_out(grid: Grid, lines: int, width: int) -> list[Text]:
    """Return a table as so many lines at most, each at most so wide."""
    if lines <= 0:
        return []
    if not grid.rows or lines <= HEAD_LINES:
        return [_cut(Text(f"{grid.title}: {len(grid.rows) or 'none'}", "italic"), width)]
    rows = grid.rows[: lines - HEAD_LINES]
    more = f", {len(rows)} of {len(grid.rows)}" if len(rows) < len(grid.rows) else ""
    widths = fitting(grid, rows, width)
    names = [Text(column.name, "bold") for column in grid.columns]
    shown = [_cut(Text(grid.title + more, "italic"), width)]
    for row in (names, *rows):
        cells = [
            Text(shortened(row[i].plain, wide, middle=grid.columns[i].middle and row is not names), row[i].style)
            for i, wide in widths.items()
        ]
        shown.append(_cut(Text(" " * GAP).join(cells), width))
    return shown


def _cut(text: Text, width: int) -> Text:
    text.truncate(width)
    return text
