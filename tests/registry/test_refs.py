from __future__ import annotations

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.errors import InvalidRef
from lorary.registry import AdapterRef, parse_ref
from lorary.registry.refs import MAX_NAME, check_alias, check_name, parse_selector

EDGE = string.ascii_lowercase + string.digits
part = st.from_regex(r"\A[a-z0-9](?:[a-z0-9_-]|\.(?!\.)){0,20}[a-z0-9]\Z").filter(
    lambda text: ".." not in text
)
names = st.one_of(part, st.tuples(part, part).map("/".join))
aliases = part.filter(lambda text: text[0] in string.ascii_lowercase)
digests = st.text("0123456789abcdef", min_size=4, max_size=64).map(lambda text: f"sha256:{text}")
versions = st.integers(1, 999_999_999)
refs = st.one_of(
    st.builds(AdapterRef, name=names, alias=aliases),
    st.builds(AdapterRef, name=names, version=versions),
    st.builds(AdapterRef, name=names, digest=digests),
)


@settings(deadline=None)
@given(refs)
def test_a_printed_ref_parses_to_itself(ref: AdapterRef) -> None:
    assert parse_ref(str(ref)) == ref


@settings(deadline=None)
@given(names)
def test_a_bare_name_means_latest(name: str) -> None:
    assert parse_ref(name) == AdapterRef(name=name, alias="latest")


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_parses_to_something_harmless_or_is_refused(text: str) -> None:
    message = ""
    try:
        ref = parse_ref(text)
    except InvalidRef as error:
        message = str(error)
    else:
        assert re.fullmatch(r"[a-z0-9._-]+(/[a-z0-9._-]+)?", ref.name)
        assert ".." not in ref.name
        assert len(ref.name) <= MAX_NAME
    assert not message or message.isprintable()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("sentiment@prod", AdapterRef(name="sentiment", alias="prod")),
        ("sentiment@3", AdapterRef(name="sentiment", version=3)),
        ("sentiment@sha256:ab12", AdapterRef(name="sentiment", digest="sha256:ab12")),
        ("team/fr-legal_2.1", AdapterRef(name="team/fr-legal_2.1", alias="latest")),
        ("3@3", AdapterRef(name="3", version=3)),
    ],
)
def test_refs_that_people_write(text: str, wanted: AdapterRef) -> None:
    assert parse_ref(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "", "@", "@prod", "a@", "a@@prod", "a@prod@3", "../x", "a/../b", "/etc/passwd", "a/b/c", "a//b",
        "a/", "/a", ".", "..", "a..b", ".hidden", "trailing.", "-dash", "UPPER", "Sentiment", "a b",
        "a\n", "a\x00", "a\\b", "C:a", "cafe\u0301", "sent\u0456ment", "a%2fb", "a@0", "a@-1", "a@03",
        "a@1.5", "a@1234567890", "a@sha256:", "a@sha256:ab1", "a@sha256:AB12", "a@md5:abcd",
        "a@sha256:" + "a" * 65, "a@Prod", "a@../prod", "a@3d", "a" * 97, "x" * 300, "a@" + "b" * 65,
        "a@\u0664", "\u0661",
    ],
)  # fmt: skip
def test_what_is_not_a_ref_is_refused(text: str) -> None:
    with pytest.raises(InvalidRef):
        parse_ref(text)


@pytest.mark.parametrize(
    "parts",
    [
        {"name": "a"},
        {"name": "a", "alias": "b", "version": 1},
        {"name": "../a", "alias": "b"},
        {"name": "a", "version": 0},
        {"name": "a", "digest": "ab12"},
        {"name": "a", "alias": "../b"},
    ],
)
def test_a_ref_built_by_hand_is_checked_too(parts: dict[str, str | int]) -> None:
    with pytest.raises(InvalidRef):
        AdapterRef(**parts)  # type: ignore[arg-type]


def test_a_selector_may_stand_apart_from_its_name() -> None:
    assert parse_selector("a", "@3") == parse_selector("a", "3") == parse_ref("a@3")
    assert parse_selector("a", "@prod") == parse_ref("a@prod")


def test_a_long_name_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidRef) as caught:
        check_name("x" * 10_000)
    assert len(str(caught.value)) < 300
    with pytest.raises(InvalidRef):
        check_alias("")
