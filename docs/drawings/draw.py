"""Draws the pictures of docs/concepts.md: ``python docs/drawings/draw.py`` writes the SVG files beside it.

The chain is that of SERVICE 4.2 (blocks A B C D), and what each snapshot holds and restores to is computed here by its
rule, not drawn by hand. A test holds the files against this script.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
CELL, GAP = 46, 8
FONT = "font-family='DejaVu Sans, Verdana, sans-serif' font-size='13'"
COLOURS = {"A": "#cfe3f7", "B": "#d5efd3", "C": "#fbe3c0", "D": "#e9d6f0"}
INK, PALE = "#333", "#999"


class Sheet:
    """An SVG being drawn; sizes are pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size = (width, height)
        self._parts = [f"<title>{escape(title)}</title>", f"<rect width='{width}' height='{height}' fill='white'/>"]

    def text(self, x: float, y: float, words: str, *, anchor: str = "start", colour: str = INK) -> None:
        """Write a line; ``y`` is its base line."""
        self._parts.append(
            f"<text x='{x}' y='{y}' {FONT} text-anchor='{anchor}' fill='{colour}'>{escape(words)}</text>"
        )

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, words: str = "", dashed: str = ""
    ) -> None:
        """Draw a rectangle with a word in its middle."""
        dash = f" stroke-dasharray='{dashed}'" if dashed else ""
        self._parts.append(
            f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='4' fill='{fill}' stroke='{INK}'{dash}/>"
        )
        if words:
            self.text(x + width / 2, y + height / 2 + 5, words, anchor="middle")

    def arrow(self, x1: float, y1: float, x2: float, y2: float, words: str = "") -> None:
        """Draw an arrow, with a word above its middle."""
        self._parts.append(
            f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='{INK}' stroke-width='1.5' marker-end='url(#tip)'/>"
        )
        if words:
            self.text((x1 + x2) / 2, min(y1, y2) + abs(y2 - y1) / 2 - 7, words, anchor="middle")

    def svg(self) -> str:
        """Return the file."""
        width, height = self._size
        tip = (
            "<defs><marker id='tip' markerWidth='9' markerHeight='8' refX='8' refY='4' orient='auto'>"
            f"<path d='M0,0 L9,4 L0,8 z' fill='{INK}'/></marker></defs>"
        )
        head = (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}'>"
        )
        return "\n".join([head, tip, *self._parts, "</svg>"]) + "\n"


# -- the chain ------------------------------------------------------------------------------------

Chain = list[tuple[str, dict[str, str]]]
"""Snapshots in order, each with the blocks that it holds: place → version."""

WRITTEN: Chain = [("S1", {name: name for name in "ABCD"}), ("S2", {"B": "B1", "C": "C1"}), ("S3", {"B": "B2"})]


def restores_to(chain: Chain, name: str) -> dict[str, str]:
    """Return the disk as of a snapshot: for each place the newest version up to it."""
    view: dict[str, str] = {}
    for one, held in chain:
        view |= held
        if one == name:
            return view
    raise KeyError(name)


def without(chain: Chain, name: str) -> tuple[Chain, dict[str, str]]:
    """Return the chain after a deletion, and what that frees; the next snapshot gets what it still needs."""
    at = [one for one, _held in chain].index(name)
    held = chain[at][1]
    if at + 1 == len(chain):
        return chain[:at], held
    later, own = chain[at + 1]
    freed = {place: version for place, version in held.items() if place in own}
    return [*chain[:at], (later, held | own), *chain[at + 2 :]], freed


def _rows(sheet: Sheet, chain: Chain, left: int, top: int, freed: Iterable[str] = ()) -> None:
    for number, (name, held) in enumerate(chain):
        y = top + number * (CELL + GAP)
        sheet.text(left, y + CELL / 2 + 5, name)
        view = restores_to(chain, name)
        for column, place in enumerate("ABCD"):
            x = left + 36 + column * (CELL + GAP)
            if place in held:
                gone = held[place] in freed
                sheet.box(x, y, CELL, CELL, "white" if gone else COLOURS[place], held[place], "4 3" if gone else "")
            else:
                sheet.text(x + CELL / 2, y + CELL / 2 + 5, "·", anchor="middle", colour=PALE)
        words = " ".join(view[place] for place in "ABCD")
        sheet.text(left + 36 + 4 * (CELL + GAP) + 8, y + CELL / 2 + 5, f"→ {words}")


def chain() -> str:
    """Draw a chain, and what deleting its middle does."""
    after, freed = without(WRITTEN, "S2")
    sheet = Sheet(860, 250, "A chain of three snapshots, and the same after the middle one is deleted")
    sheet.text(16, 26, "What each snapshot holds, and what it restores to")
    _rows(sheet, WRITTEN, 16, 44, freed.values())
    sheet.arrow(380, 125, 458, 125, "delete S2")
    sheet.text(476, 26, f"{', '.join(freed.values())} is freed; the rest becomes S3's")
    _rows(sheet, after, 476, 71)
    sheet.text(16, 236, "S1 and S3 restore to the same as before. Dashed: what nobody needs any more.", colour=PALE)
    return sheet.svg()


# -- the capture ----------------------------------------------------------------------------------

PHASES = (
    ("at rest", "writes and reads", "", ""),
    ("the instant: overlay", "", "writes", "frozen, read by qemu-nbd"),
    ("merge", "", "writes", "takes the overlay back"),
    ("at rest again", "writes and reads", "", ""),
)


def capture() -> str:
    """Draw where a guest's writes go while a snapshot is taken."""
    width = 215
    sheet = Sheet(len(PHASES) * width + 20, 300, "Where a guest's writes go while a snapshot is taken")
    for number, (phase, to_image, to_overlay, image) in enumerate(PHASES):
        x = 20 + number * width
        sheet.text(x, 26, f"{number + 1}. {phase}")
        sheet.box(x, 44, 150, 34, "#eee", "guest")
        sheet.box(x, 190, 150, 44, COLOURS["A"], "image")
        if to_overlay:
            sheet.box(x, 118, 150, 34, COLOURS["C"], "overlay")
            sheet.arrow(x + 40, 78, x + 40, 116)
            sheet.text(x + 48, 104, to_overlay)
        else:
            sheet.arrow(x + 40, 78, x + 40, 188)
            sheet.text(x + 48, 140, to_image)
        if number == 1:
            sheet.arrow(x + 75, 234, x + 75, 262)
            sheet.text(x + 75, 280, "store: only what changed", anchor="middle")
        if number == 2:
            sheet.arrow(x + 75, 152, x + 75, 188)
        if image:
            sheet.text(x + 4, 250 if number != 1 else 184, image, colour=PALE)
    return sheet.svg()


def files() -> dict[str, str]:
    """Return what is written: names below this directory, and texts."""
    return {"chain.svg": chain(), "capture.svg": capture()}


if __name__ == "__main__":
    for name, text in files().items():
        (HERE / name).write_text(text)
