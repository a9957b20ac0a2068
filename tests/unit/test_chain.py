"""Single facts of the chain's algebra; tests/property/test_chain_*.py hold its laws."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from hvsnap.catalog import chain
from hvsnap.catalog.chain import Page
from hvsnap.errors import CatalogFailed
from hvsnap.model import PAGE_BLOCKS
from tests.catalog_kit import a_page

HEAD_BYTES = 5


def blob(form: int, *columns: tuple[str, list[int]]) -> bytes:
    """Return bytes with a right checksum and whatever content."""
    body = b"".join(np.array(values, kind).tobytes() for kind, values in columns)
    return struct.pack("<BI", form, zlib.crc32(body, form)) + body


def test_a_page_stored_in_one_go_takes_a_few_bytes() -> None:
    page = Page(np.arange(PAGE_BLOCKS, dtype=np.uint16), np.arange(7, 7 + PAGE_BLOCKS, dtype=np.uint64))
    assert len(chain.encode(page)) == HEAD_BYTES + 8


def test_a_trimmed_page_takes_a_few_bytes() -> None:
    page = Page(np.arange(PAGE_BLOCKS, dtype=np.uint16), np.zeros(PAGE_BLOCKS, np.uint64))
    assert len(chain.encode(page)) == HEAD_BYTES + 8


def test_scattered_entries_take_six_bytes_each_and_ten_beyond_four_billion_blocks() -> None:
    assert len(chain.encode(a_page({3: 90, 7: 20, 4000: 2**32 - 1}))) == HEAD_BYTES + 3 * 6
    assert len(chain.encode(a_page({3: 90, 7: 20, 4000: 2**32}))) == HEAD_BYTES + 3 * 10


def test_a_zero_before_block_one_is_no_run() -> None:
    # 0, 1, 2 count up, but 0 is "zero" and not a stored block: as one run it would read back as three zeroes.
    entries = {10: 0, 11: 1, 12: 2, 13: 3, 14: 4}
    page = chain.decode(chain.encode(a_page(entries)))
    assert page.block.tolist() == [0, 1, 2, 3, 4]


def test_an_empty_page_is_a_page() -> None:
    assert len(chain.decode(chain.encode(chain.EMPTY))) == 0


@pytest.mark.parametrize(
    ("index", "block"),
    [
        pytest.param([5, 5], [1, 2], id="twice"),
        pytest.param([6, 5], [1, 2], id="descending"),
        pytest.param([PAGE_BLOCKS], [1], id="beyond-the-page"),
        pytest.param([1, 2], [1], id="unequal"),
        pytest.param([1], [2**63], id="id-beyond-sqlite"),
    ],
)
def test_what_is_no_page_is_never_written(index: list[int], block: list[int]) -> None:
    with pytest.raises(ValueError, match="not a block-map page"):
        chain.encode(Page(np.array(index, np.uint16), np.array(block, np.uint64)))


def test_indexes_of_another_type_are_never_written() -> None:
    with pytest.raises(ValueError, match="uint16"):
        chain.encode(Page(np.array([1], np.int64), np.array([1], np.uint64)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(blob(4, ("<u2", [1]), ("<u4", [1])), id="unknown-form"),
        pytest.param(blob(0, ("<u2", [1, 2]), ("<u1", [1])), id="no-whole-entries"),
        pytest.param(blob(0, ("<u2", [2, 1]), ("<u4", [1, 1])), id="descending"),
        pytest.param(blob(0, ("<u2", [PAGE_BLOCKS]), ("<u4", [1])), id="beyond-the-page"),
        pytest.param(blob(2, ("<u2", [1]), ("<u8", [2**63])), id="id-beyond-sqlite"),
        pytest.param(blob(1, ("<u2", [4095]), ("<u2", [1]), ("<u4", [1])), id="run-beyond-the-page"),
        pytest.param(blob(1, ("<u2", [0, 5]), ("<u2", [9, 9]), ("<u4", [1, 50])), id="runs-overlap"),
        pytest.param(blob(1, ("<u2", [0] * 4096), ("<u2", [4095] * 4096), ("<u4", [1] * 4096)), id="bomb"),
        pytest.param(blob(3, ("<u2", [0]), ("<u2", [9]), ("<u8", [2**63 - 4])), id="run-counts-beyond-sqlite"),
        pytest.param(blob(0, ("<u2", [0] * 4097), ("<u4", [1] * 4097)), id="too-many"),
    ],
)
def test_nonsense_with_a_right_checksum_is_refused(damaged: bytes) -> None:
    with pytest.raises(CatalogFailed, match="damaged") as failure:
        chain.decode(damaged)
    assert "store-rebuild" in failure.value.hint


def test_a_zero_over_data_is_a_change_and_over_nothing_is_none() -> None:
    parent = chain.lay_over([a_page({1: 7})])
    kept = chain.changed(parent, np.array([1, 2], np.uint16), np.zeros(2, np.uint64))
    assert (kept.index.tolist(), kept.block.tolist()) == ([1], [0])


def test_a_child_with_entries_everywhere_is_handed_nothing() -> None:
    child = a_page({1: 7, 2: 0})
    assert chain.hand_over(a_page({1: 3, 2: 4}), child) is child
