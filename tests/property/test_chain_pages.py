"""The algebra of single pages against dicts, and their form as bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvsnap.catalog import chain
from hvsnap.errors import CatalogFailed
from hvsnap.model import PAGE_BLOCKS
from tests.catalog_kit import a_page

indexes = st.integers(0, PAGE_BLOCKS - 1)
ids = st.one_of(st.integers(0, 5), st.integers(0, 2**32), st.integers(2**32 - 3, 2**63 - 1))
scattered = st.dictionaries(indexes, ids, max_size=60)


@st.composite
def in_runs(draw: st.DrawFn) -> dict[int, int]:
    entries: dict[int, int] = {}
    for start, length, first in draw(st.lists(st.tuples(indexes, st.integers(1, 900), ids), max_size=8)):
        for offset in range(min(length, PAGE_BLOCKS - start)):
            entries[start + offset] = min(first + offset, 2**63 - 1) if first else 0
    return entries


entries_of_a_page = st.one_of(scattered, in_runs())


def as_dict(page: chain.Page) -> dict[int, int]:
    return dict(zip(page.index.tolist(), page.block.tolist(), strict=True))


@given(entries_of_a_page)
def test_a_page_survives_its_form_as_bytes(entries: dict[int, int]) -> None:
    blob = chain.encode(a_page(entries))
    assert as_dict(chain.decode(blob)) == entries
    assert len(blob) <= 5 + 10 * len(entries)


@given(st.lists(entries_of_a_page, max_size=9))
def test_many_pages_are_decoded_as_each_of_them(pages: list[dict[int, int]]) -> None:
    blobs = [chain.encode(a_page(entries)) for entries in pages]
    assert [as_dict(page) for page in chain.decode_many(blobs)] == pages


@given(entries_of_a_page, st.data())
@settings(max_examples=200)
def test_no_flipped_bit_goes_unnoticed(entries: dict[int, int], data: st.DataObject) -> None:
    blob = bytearray(chain.encode(a_page(entries)))
    bit = data.draw(st.integers(0, 8 * len(blob) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CatalogFailed):
        chain.decode(bytes(blob))


@given(entries_of_a_page, st.data())
def test_no_truncation_goes_unnoticed(entries: dict[int, int], data: st.DataObject) -> None:
    blob = chain.encode(a_page(entries))
    with pytest.raises(CatalogFailed):
        chain.decode(blob[: data.draw(st.integers(0, len(blob) - 1))])


@given(st.binary(max_size=200))
def test_noise_is_never_a_page(noise: bytes) -> None:
    with pytest.raises(CatalogFailed):
        chain.decode(noise)


@given(st.lists(scattered, max_size=6))
def test_newer_entries_lie_over_older_ones(layers: list[dict[int, int]]) -> None:
    laid: dict[int, int] = {}
    for layer in layers:
        laid |= layer
    view = chain.lay_over(a_page(layer) for layer in layers)
    assert {int(i): int(view[i]) for i in np.flatnonzero(view)} == {i: b for i, b in laid.items() if b}


@given(scattered, scattered)
def test_only_what_differs_from_the_parent_is_kept(parent: dict[int, int], read: dict[int, int]) -> None:
    page = a_page(read)
    kept = as_dict(chain.changed(chain.lay_over([a_page(parent)]), page.index, page.block))
    assert kept == {index: block for index, block in read.items() if parent.get(index, 0) != block}


@given(scattered, scattered)
def test_a_childs_entries_win_over_those_handed_over(deleted: dict[int, int], child: dict[int, int]) -> None:
    assert as_dict(chain.hand_over(a_page(deleted), a_page(child))) == deleted | child


@given(scattered, scattered)
def test_the_difference_of_two_views_is_exact(one: dict[int, int], other: dict[int, int]) -> None:
    found = chain.difference(chain.lay_over([a_page(one)]), chain.lay_over([a_page(other)]))
    assert found.tolist() == sorted(i for i in one.keys() | other.keys() if one.get(i, 0) != other.get(i, 0))


@given(st.sets(indexes), st.sets(indexes))
def test_carried_indexes_are_joined_and_survive_their_form_as_bytes(one: set[int], other: set[int]) -> None:
    joined = chain.join_indexes(np.array(sorted(one), np.uint16), np.array(sorted(other), np.uint16))
    assert chain.decode_indexes(chain.encode_indexes(joined)).tolist() == sorted(one | other)


@given(st.sets(indexes), st.data())
def test_damage_of_carried_indexes_is_noticed(carried: set[int], data: st.DataObject) -> None:
    blob = bytearray(chain.encode_indexes(np.array(sorted(carried), np.uint16)))
    bit = data.draw(st.integers(0, 8 * len(blob) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    for damaged in (bytes(blob), bytes(blob[: bit // 8]), chain.encode(a_page(dict.fromkeys(carried, 0)))):
        with pytest.raises(CatalogFailed):
            chain.decode_indexes(damaged)
