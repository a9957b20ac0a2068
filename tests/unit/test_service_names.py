"""SERVICE 2.5: what names, descriptions and tags may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvsnap.errors import BadRequest
from hvsnap.service import names


@pytest.mark.parametrize(
    "name",
    ["ab", "web 01: before-upgrade_2.0", "Ärger", "バックアップ", "हिन्दी नाम", "x" * 128, "Автосохранение", "a٣"],
)
def test_a_name_of_letters_of_any_script_is_taken(name: str) -> None:
    assert names.check_name(name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "0 characters"),
        ("a", "1 characters"),
        ("x" * 129, "129 characters"),
        ("1st", "does not start with a letter"),
        (" a name", "does not start with a letter"),
        ("auto_20260101_1", "starts with 'auto'"),
        ("automatic", "starts with 'auto'"),
        ("http://x", "starts with 'http://'"),
        ("https://x", "starts with 'https://'"),
        ("a/b", "contains '/'"),
        ("a\nb", "contains '\\n'"),
        ("a\x1b[31m", "contains '\\x1b'"),
        ("a\u202eb", "contains '\\u202e'"),
        ("snap😀", "contains '\\U0001f600'"),
        ("ab\ud800", "contains '\\ud800'"),
        ("½a", "does not start with a letter"),
        ("a²", "contains '\\xb2'"),
    ],
)
def test_a_wrong_name_is_refused_with_what_is_allowed(name: str, why: str) -> None:
    with pytest.raises(BadRequest) as caught:
        names.check_name(name)
    assert why in caught.value.message
    assert "2 to 128 characters" in caught.value.hint
    assert caught.value.message.isascii()


def test_names_that_look_the_same_are_the_same() -> None:
    assert names.check_name("Cafe\u0301") == names.check_name("Caf\u00e9") == "Caf\u00e9"


@given(st.text(max_size=200))
def test_a_name_that_was_taken_keeps_every_rule_and_is_taken_again(name: str) -> None:
    try:
        taken = names.check_name(name)
    except BadRequest:
        return
    assert 2 <= len(taken) <= 128
    assert taken[0].isalpha()
    assert not taken.startswith(("auto", "http://", "https://"))
    assert not set(taken) & set("/\\\n\t\0\"'<>|&;$`")
    assert names.check_name(taken) == taken


@given(st.floats(min_value=0, max_value=4e9))
def test_the_name_given_to_a_nameless_snapshot_is_a_good_one(now: float) -> None:
    assert names.check_name(names.default_name(now))


def test_a_description_has_at_most_256_characters_and_no_control_characters() -> None:
    assert names.check_description("ü" * 256) == "ü" * 256
    assert names.check_description("two\nlines\tand a tab") == "two\nlines\tand a tab"
    for wrong in ("x" * 257, "a\x1b[2J", "a\0b", "\ud800", "a\rb"):
        with pytest.raises(BadRequest, match="description"):
            names.check_description(wrong)


def test_up_to_20_tags_are_taken() -> None:
    tags = {f"key.{n}": "any value, also = and ü" for n in range(20)}
    assert names.check_tags(tags) == tags
    with pytest.raises(BadRequest, match="21 tags"):
        names.check_tags(tags | {"one": "more"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("", "v"),
        ("k" * 129, "v"),
        ("a=b", "v"),
        ("a b", "v"),
        ("k", "v" * 257),
        ("k", "a\nb"),
        ("k", "\x1b"),
        ("\n", "v"),
    ],
)
def test_a_wrong_tag_is_refused(key: str, value: str) -> None:
    with pytest.raises(BadRequest) as caught:
        names.check_tags({key: value})
    assert "key=value" in caught.value.hint


def test_two_keys_that_look_the_same_are_one_tag_given_twice() -> None:
    with pytest.raises(BadRequest, match="twice"):
        names.check_tags({"caf\u00e9": "1", "cafe\u0301": "2"})
