"""docs/drawings: the pictures are what their script computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_drawings_are_what_their_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("draw", DOCS / "drawings" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    for name, text in draw.files().items():
        assert (DOCS / "drawings" / name).read_text() == text, "run: python docs/drawings/draw.py"
    assert {path.name for path in (DOCS / "drawings").glob("*.svg")} == set(draw.files())
    # SERVICE 4.2's own example.
    after, freed = draw.without(draw.WRITTEN, "S2")
    assert (list(freed.values()), after[-1]) == (["B1"], ("S3", {"B": "B2", "C": "C1"}))
    assert list(draw.restores_to(after, "S3").values()) == list(draw.restores_to(draw.WRITTEN, "S3").values())
