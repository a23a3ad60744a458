"""Documents are cut where their tokens do not change."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mf_train.data.documents import segment_end
from mf_train.data.tokenizer import Tokenizer
from tests.data.texts import any_text
from tests.examples import examples

SHIPPED = Tokenizer(Path(__file__).resolve().parents[2] / "tokenizer")


def split_text(text: str, limit: int) -> list[str]:
    """Its segments, found as the stream finds them: seeing one byte more than a segment may have."""
    utf8, segments = text.encode(), []
    while utf8:
        end = segment_end(utf8[: limit + 1], limit)
        assert end == segment_end(utf8, limit)
        segments.append(utf8[:end].decode())
        utf8 = utf8[end:]
    return segments


@examples(300)
@given(any_text(), st.integers(4, 40))
def test_segments_join_to_the_text(text: str, limit: int) -> None:
    segments = split_text(text, limit)
    assert "".join(segments) == text
    assert all(1 <= len(segment.encode()) <= limit for segment in segments)


@examples(200)
@given(st.lists(st.text("ab.\n\u2581é1", min_size=1, max_size=9), min_size=1), st.integers(40, 80))
def test_cutting_at_spaces_does_not_change_the_tokens(words: list[str], limit: int) -> None:
    text = "  ".join(words)
    joined = [token for segment in split_text(text, limit) for token in SHIPPED.encode(segment)]
    assert joined == SHIPPED.encode(text)


def test_segment_ends() -> None:
    assert segment_end(b"aaa bbb ccc", 7) == 7  # the byte after the segment is the space
    assert segment_end(b"aaa bbb ccc", 6) == 3
    assert segment_end(b"aaa   bb ccc", 6) == 3  # before the run of spaces
    assert segment_end(b"   aaaaaaaa", 6) == 6  # no space after a character: cut in the word
    assert segment_end("aaaaé".encode(), 5) == 4  # not inside a character
    assert segment_end(b"aaa", 6) == 3
