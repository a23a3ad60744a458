"""The tokenizer that transformers loads gives sentencepiece's ids for every text."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mf_train.data.tokenizer import Tokenizer
from mf_train.data.tokenizer_training import train_tokenizer
from mf_train.errors import UserError
from mf_train.standalone.conversion.sentencepiece_file import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    parse_sentencepiece,
)
from mf_train.standalone.conversion.tokenizer_files import tokenizer_files
from tests.examples import examples
from tests.training.runs import TOKENIZER

SHIPPED = Tokenizer(TOKENIZER)
FAST = tokenizers.Tokenizer.from_str(tokenizer_files(SHIPPED.path, 256)["tokenizer.json"].decode())
FAST.encode_special_tokens = True  # as split_special_tokens in tokenizer_config.json has it

LETTERS = "aehilnorst ,.\n\té\u2581\ufffd\U0001f680"
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(LETTERS, max_size=80),
    st.lists(
        st.sampled_from(["<|endoftext|>", "<unk>", "<0x0A>", "  ", "\r\n", "\u2581", " the", "é", "1848"])
    ).map("".join),
    st.tuples(st.text(LETTERS, min_size=1, max_size=4), st.integers(1, 40)).map(lambda t: t[0] * t[1]),
)


@examples(1000)
@given(texts)
def test_ids_and_text_are_sentencepieces(text: str) -> None:
    ids = SHIPPED.encode(text)
    assert FAST.encode(text).ids == ids
    assert FAST.decode(ids, skip_special_tokens=False) == text


def test_whole_documents() -> None:
    from mf_train.config import DataConfig, SourceConfig
    from mf_train.data.sources import open_text

    path = TOKENIZER.parent / "configs" / "quickstart-text" / "validation"
    documents = open_text(SourceConfig(path=str(path)), "documents", DataConfig())
    count = min(len(documents), 20)
    assert count >= 3
    for number in range(count):
        text = documents.text(number).decode()
        assert FAST.encode(text).ids == SHIPPED.encode(text)


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    """Whose text has long runs and few words, so that many merges compete."""
    (tmp_path / "text.txt").write_text("aaaa aa aaaaaa abab ababab baba abaab  aabb    x\n" * 50)
    path = train_tokenizer([str(tmp_path / "text.txt")], 270, tmp_path / "t")
    slow = Tokenizer(path)
    fast = tokenizers.Tokenizer.from_str(tokenizer_files(path, 16)["tokenizer.json"].decode())
    for number in range(3**8):
        text, rest = "", number
        while rest:
            rest, digit = divmod(rest, 3)
            text += "ab "[digit]
        assert fast.encode(text).ids == slow.encode(text), text


def test_the_file_is_read_as_sentencepiece_reads_it() -> None:
    model = parse_sentencepiece(SHIPPED.path.read_bytes())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(SHIPPED.path))
    assert len(model.pieces) == processor.vocab_size()
    for i, piece in enumerate(model.pieces):
        assert (piece.text, piece.score) == (processor.id_to_piece(i), processor.get_score(i))
        kind = (
            BYTE
            if processor.is_byte(i)
            else CONTROL
            if processor.is_control(i)
            else UNKNOWN
            if processor.is_unknown(i)
            else NORMAL
        )
        assert piece.type == kind
    assert model.model_type == BPE and model.byte_fallback and not model.add_dummy_prefix


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the order of the union and of the states\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "other"),
        vocab_size=30,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(
        UserError, match="not BPE, no byte fallback, a normaliser, a prefixed space, extra spaces"
    ):
        tokenizer_files(tmp_path / "other.model", 16)
