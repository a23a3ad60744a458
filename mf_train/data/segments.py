"""Where a document is cut, so that a long one is tokenised in bounded memory. Part of the stream's contract."""

from __future__ import annotations

import itertools

SEGMENT_BYTES = 16384  # changing it changes the batches of documents that have longer runs without a space

_SPACE = 0x20


def segment_end(utf8: memoryview | bytes, start: int, limit: int = SEGMENT_BYTES) -> int:
    """End of the segment of a UTF-8 text that begins at byte `start`: at most `limit` bytes further.

    It ends before the last space that follows something else than a space. Pieces of a BPE vocabulary
    never hold a space after another character, so the tokens of the segments, concatenated, are the
    tokens of the whole text. Only a run of `limit` bytes without such a space is cut inside a word,
    then between two characters. `limit` must be at least 4, the longest character.
    """
    if len(utf8) - start <= limit:
        return len(utf8)
    window = bytes(utf8[start : start + limit + 1])
    end = window.rfind(b" ", 1)
    while end > 0 and window[end - 1] == _SPACE:
        end -= 1
    if end > 0:
        return start + end
    end = limit
    while window[end] & 0xC0 == 0x80:  # a continuation byte: its character began earlier
        end -= 1
    return start + end


def split_text(text: str, limit: int = SEGMENT_BYTES) -> list[str]:
    """The segments of `text`; joined, they are the text again."""
    utf8 = text.encode("utf-8")
    starts = [0]
    while starts[-1] < len(utf8):
        starts.append(segment_end(utf8, starts[-1], limit))
    return [utf8[a:b].decode("utf-8") for a, b in itertools.pairwise(starts)]
