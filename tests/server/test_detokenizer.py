"""Text pieces: never half a character, never part of a stop string, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import ByteLevel

from lorary.server.engine.detokenizer import Detokenizer, TextStream
from tests.conftest import build_tokenizer


@pytest.fixture(scope="module")
def backend() -> Any:
    return build_tokenizer().backend_tokenizer


def stream(
    backend: Any, ids: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], TextStream]:
    text = Detokenizer(backend).stream(stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.matched_stop:
            break
    pieces.append(text.finish())
    return pieces, text


@pytest.mark.parametrize("text", ["the cat sat on the mat", "é ü €", "😀 the 😀", "big\n\nred"])
def test_pieces_add_up_and_never_split_a_character(backend: Any, text: str) -> None:
    ids = backend.encode(text).ids
    pieces, result = stream(backend, ids)
    assert "".join(pieces) == text == result.text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stop_string_across_tokens_is_cut_off(backend: Any) -> None:
    ids = backend.encode("the cat sat on the red mat").ids
    pieces, result = stream(backend, ids, ("on the r",))
    assert "".join(pieces) == "the cat sat "
    assert result.matched_stop == "on the r"


def test_text_that_only_looked_like_a_stop_is_released(backend: Any) -> None:
    ids = backend.encode("the cat sat on a mat").ids
    pieces, result = stream(backend, ids, ("sat on the",))
    assert "".join(pieces) == "the cat sat on a mat"
    assert result.matched_stop == ""


def test_earliest_stop_wins(backend: Any) -> None:
    ids = backend.encode("a big red cat").ids
    _, result = stream(backend, ids, ("red", "big red"))
    assert result.text == "a "
    assert result.matched_stop == "big red"


def test_special_tokens_are_not_text(backend: Any) -> None:
    pieces, _ = stream(backend, [*backend.encode("cat").ids, 2])
    assert "".join(pieces) == "cat"


@settings(deadline=None, max_examples=150)
@given(ids=st.lists(st.integers(0, 118), max_size=30))
def test_pieces_that_are_looked_up_equal_those_of_the_tokenizers_own_stream(ids: list[int]) -> None:
    """Characters of several tokens, bytes that are none, special tokens: piece by piece."""
    backend = build_tokenizer().backend_tokenizer
    assert isinstance(backend.decoder, ByteLevel)
    detokenizer = Detokenizer(backend)
    # The second stream finds what the first has looked up.
    for _ in range(2):
        streams = detokenizer.stream(()), TextStream(backend, ())
        for token in ids:
            looked_up, own = (text.push(token) for text in streams)
            assert looked_up == own


@settings(deadline=None, max_examples=150)
@given(
    ids=st.lists(st.integers(3, 118), max_size=30),
    stop=st.lists(st.text("abcdehinorst ", min_size=1, max_size=5), max_size=3),
)
def test_stream_equals_the_decode_of_the_whole(ids: list[int], stop: list[str]) -> None:
    """Whatever the tokens, the pieces add up to the whole decode, cut at the first stop string."""
    backend = build_tokenizer().backend_tokenizer
    pieces, result = stream(backend, ids, tuple(stop))
    whole = backend.decode(ids, skip_special_tokens=True)
    cuts = [position for s in stop if (position := whole.find(s)) >= 0]
    joined = "".join(pieces)
    assert joined == result.text
    if "\ufffd" in whole:
        # Invalid bytes may be shown later or as one mark; what is certain is the common beginning.
        return
    assert joined == (whole[: min(cuts)] if cuts else whole)
