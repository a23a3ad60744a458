"""The tokenizer loses nothing, is trained reproducibly, and its mistakes are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from mf_train.data.segments import segment_end
from mf_train.data.tokenizer import Tokenizer, check_vocabulary, train_tokenizer
from mf_train.errors import UserError
from tests.data.texts import json_lines, random_documents
from tests.examples import examples

SHIPPED = Tokenizer(Path(__file__).resolve().parents[2] / "tokenizer")
NASTY = "".join(map(chr, range(0, 300))) + "\u2581\u2585\u2047\u2028\ufeff\u200d🎉👩‍🚀é\r\n\t   ａ１"
PIECES = ["<|endoftext|>", "<unk>", "<0x0A>", "  ", "\n\n", "\u2581", " the", "2024", "\r\n"]
texts = st.lists(
    st.one_of(
        st.sampled_from(PIECES), st.sampled_from(NASTY), st.text(st.characters(exclude_categories=["Cs"]))
    )
).map("".join)


@examples(300)
@given(texts)
def test_decode_inverts_encode(text: str) -> None:
    ids = SHIPPED.encode(text)
    assert SHIPPED.decode(ids) == text
    assert all(1 < token < SHIPPED.vocab_size for token in ids)  # neither end of text nor unknown
    assert int(SHIPPED.token_bytes[np.array(ids, int)].sum()) == len(text.encode())
    assert SHIPPED.encode_array(text).tolist() == ids


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
@given(texts, st.integers(4, 40))
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


def test_training_is_reproducible_and_reads_every_format(tmp_path: Path) -> None:
    documents = [text + "\n" for text in random_documents(60, seed=1)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(json_lines(documents[:30]))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(documents[30:])))
    first = train_tokenizer([str(tmp_path / "in" / "*.jsonl*")], 320, tmp_path / "one")
    second = train_tokenizer([str(tmp_path / "in")], 320, tmp_path / "deep" / "two")
    assert first == tmp_path / "one" / "tokenizer.model"
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in first.parent.iterdir()) == ["tokenizer.model", "tokenizer_info.json"]
    info = json.loads((first.parent / "tokenizer_info.json").read_text())
    assert info["vocab_size"] == 320 and info["documents"] == 60
    assert info["bytes"] == sum(len(text.encode()) for text in documents)
    trained = Tokenizer(first.parent)
    assert (trained.vocab_size, trained.end_of_text_id) == (320, 0)
    assert trained.decode(trained.encode(NASTY)) == NASTY
    assert len(trained.encode(documents[1])) < len(documents[1].encode()) * 0.6  # it learned words


def test_training_draws_documents_when_there_is_too_much_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([f"number {i} of the documents" for i in range(1000)]))
    train_tokenizer([str(tmp_path / "a.jsonl")], 290, tmp_path / "out", max_bytes=5000)
    info = json.loads((tmp_path / "out" / "tokenizer_info.json").read_text())
    assert 5000 <= info["bytes"] < 5100


def test_one_long_document_is_used_in_full(tmp_path: Path) -> None:
    """sentencepiece alone would drop a sentence longer than its limit."""
    (tmp_path / "a.txt").write_text("x" * 50_000 + " " + "zebra " * 20_000)
    pieces = Tokenizer(train_tokenizer([str(tmp_path / "a.txt")], 275, tmp_path / "out")).encode(" zebra")
    assert len(pieces) == 1


def test_shipped_tokenizer_is_what_its_readme_says(repository: Path, tmp_path: Path) -> None:
    info = json.loads((repository / "tokenizer" / "tokenizer_info.json").read_text())
    assert SHIPPED.vocab_size == info["vocab_size"] == 4096
    assert SHIPPED.end_of_text_id == 0
    if sentencepiece.__version__ == info["sentencepiece"]:
        again = train_tokenizer([str(repository / "configs" / "quickstart-text" / "train")], 4096, tmp_path)
        assert again.read_bytes() == SHIPPED.path.read_bytes()


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("hello world\n" * 3)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "none.model").write_bytes(b"")
    (tmp_path / "junk.model").write_bytes(b"garbage" * 100)
    few = str(tmp_path / "few.txt")
    cases = [
        (
            lambda: train_tokenizer([few], 4000, tmp_path / "o"),
            r"--vocab-size 4000: this text supports 2\d\d at",
        ),
        (
            lambda: train_tokenizer([few], 262, tmp_path / "o"),
            r"--vocab-size 262: the characters .* need 26\d",
        ),
        (lambda: train_tokenizer([few], 100, tmp_path / "o"), r"--vocab-size 100: .* need 259 or more"),
        (
            lambda: train_tokenizer([str(tmp_path / "empty.txt")], 300, tmp_path / "o"),
            "--input: .*empty.txt holds no text",
        ),
        (
            lambda: train_tokenizer([str(tmp_path / "*.jsonl")], 300, tmp_path / "o"),
            r"--input: no file matches",
        ),
        (lambda: train_tokenizer([few], 270, few), r"--output .*few.txt: cannot be written"),
        (lambda: Tokenizer(""), "tokenizer.path is not set"),
        (lambda: Tokenizer(tmp_path / "absent.model"), "tokenizer.path: .*absent.model does not exist"),
        (lambda: Tokenizer(tmp_path), "tokenizer.path: .*tokenizer.model does not exist"),
        (lambda: Tokenizer(tmp_path / "none.model"), "none.model is not a sentencepiece model"),
        (lambda: Tokenizer(tmp_path / "junk.model"), "junk.model is not a sentencepiece model"),
        (lambda: check_vocabulary(SHIPPED, 4095), "model.vocab_size is 4095, but .* 4096 ids"),
    ]
    for mistake, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            mistake()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()
    check_vocabulary(SHIPPED, 4096)
    with pytest.raises(ValueError, match="ids 4096 to 4096"):
        SHIPPED.decode([4096])
