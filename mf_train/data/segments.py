"""Where long documents are cut, so that they are tokenised in bounded memory."""

SEGMENT_BYTES = 16384  # changing it changes the batches of documents that have longer runs without a space

_SPACE = 0x20


def segment_end(utf8: bytes, limit: int = SEGMENT_BYTES) -> int:
    """Bytes of the first segment of a UTF-8 text, at most `limit` (which is 4, the longest character, or more).

    Documents are cut there for a tokenizer of `memoryformer tokenizer train`: part of the stream's contract.

    `utf8` is the text, or at least its first limit + 1 bytes. The segment ends before the last space that follows
    something else than a space. Pieces of a BPE vocabulary never hold a space after another character, so the
    tokens of the segments, concatenated, are the tokens of the whole text. Only a run of `limit` bytes without such
    a space is cut inside a word, then between two characters.
    """
    if len(utf8) <= limit:
        return len(utf8)
    end = utf8.rfind(b" ", 1, limit + 1)
    while end > 0 and utf8[end - 1] == _SPACE:
        end -= 1
    if end > 0:
        return end
    end = limit
    while utf8[end] & 0xC0 == 0x80:  # a continuation byte: its character began earlier
        end -= 1
    return end
