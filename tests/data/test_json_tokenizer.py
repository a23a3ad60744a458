"""Tokenizers of others: sentencepiece's ids, the whole text's tokens however it is cut, and mistakes before step 1."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from mf_train.config import Config, DataConfig, SourceConfig, TokenizerConfig
from mf_train.data.documents import SEGMENT_BYTES
from mf_train.data.json_tokenizer import JsonTokenizer
from mf_train.data.open_tokenizer import load_tokenizer, open_tokenizer
from mf_train.data.shards.token_files import TokenFiles
from mf_train.data.sources import open_source
from mf_train.data.stream.stream import TokenStream
from mf_train.data.tokenize import shards
from mf_train.data.tokenize.command import tokenize
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from tests.data.texts import any_text, write_json_lines
from tests.examples import examples
from tests.tokenizers_of_others import JSON, OTHER_SCRIPTS, SENTENCEPIECE, lines, write

# Those that are much like another one, or slow to train
SLOW = ("char", "suffix", "bpe", "nfkc", "unigram-user", "unigram-crossing", "qwen", "metaspace")
EVERY = [
    pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in (*SENTENCEPIECE, *JSON)
]
# Where the normaliser is the identity, odd Unicode too has sentencepiece's ids: docs/data.md says why not elsewhere.
EXACT = [kind for kind in SENTENCEPIECE if SENTENCEPIECE[kind].get("normalization_rule_name") == "identity"]
NORMALISED = [kind for kind in SENTENCEPIECE if kind not in EXACT and kind != "unigram-crossing"]

simple = st.lists(
    st.sampled_from(
        [*"aehn .,\n\t", "  ", "the", " of", "<s>", "</s>", "<unk>", "<0x0A>", "<sep>", "<seps>", "<se"]
    )
    | st.sampled_from([*"Ａ１ﬁéü漢かр\u2581\u3000\u00a0\u200b"])
).map("".join)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@cache
def made(kind: str, folder: Path) -> Path:
    return write(kind, folder)


def opened(kind: str, folder: Path) -> JsonTokenizer:
    tokenizer = load_tokenizer(TokenizerConfig(path=str(made(kind, folder))))
    assert isinstance(tokenizer, JsonTokenizer)
    return tokenizer


def check_ids(kind: str, folder: Path, texts: st.SearchStrategy[str]) -> None:
    tokenizer = opened(kind, folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    user_defined = SENTENCEPIECE[kind].get("user_defined_symbols", ())

    @examples(10_000)
    @given(texts)
    def check(text: str) -> None:
        if text not in user_defined:
            assert tokenizer.encode(text) == reference.encode(text)

    check()
    for text in (*itertools.islice(lines(), 40), OTHER_SCRIPTS):
        check.hypothesis.inner_test(text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", EXACT)
def test_ids_are_sentencepieces(kind: str, folder: Path) -> None:
    check_ids(kind, folder, any_text() | simple)


@pytest.mark.parametrize("kind", NORMALISED)
def test_ids_are_sentencepieces_after_a_normaliser(kind: str, folder: Path) -> None:
    check_ids(kind, folder, simple)


def long_text() -> str:
    """Several segments of words, then a run without a place to cut, digits, and no spaces between Han characters."""
    numbers = random.Random(3)
    words = " ".join(lines())[: 2 * SEGMENT_BYTES]
    odd = [
        *"\n\t .,a1\u2581",
        "  ",
        "\r\n\n",
        " the",
        "x y",
        "é",
        "e\u0301",
        "中文。",
        "<sep>",
        "'s",
        OTHER_SCRIPTS,
    ]
    mixed = "".join(numbers.choices(odd, k=5_000))
    digits = "".join(numbers.choices("0123456789", k=SEGMENT_BYTES + 7))
    han = "".join(numbers.choices("的一是不了人我在有他。，", k=SEGMENT_BYTES))
    return f"{words} end{digits} {mixed}{han}{words}"


@pytest.mark.parametrize("kind", EVERY)
def test_a_long_document_has_the_tokens_of_the_whole(kind: str, folder: Path, tmp_path: Path) -> None:
    text = long_text()
    tokenizer = opened(kind, folder)
    path = write_json_lines(tmp_path / "a.jsonl", [text])
    source = open_source(SourceConfig(path=path), "k", DataConfig(cache=str(tmp_path)), tokenizer)
    chunks, document, start = [], 0, 0
    while document == 0:
        chunk = source.read([0], start, 1)
        chunks.append(chunk.tokens)
        document, start = chunk.end
    whole = [*tokenizer.encode(text), tokenizer.end_of_text_id]
    assert np.concatenate(chunks).tolist() == whole
    crosses = kind == "unigram-crossing"
    assert len(chunks) == 1 if crosses else 4 <= len(chunks) < 20


@pytest.mark.parametrize("kind", ["llama3", "llama"])
def test_shards_and_text_give_the_same_batches_and_resume(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents longer than a worker's task among them; a place inside one is found again."""
    tokenizer = opened(kind, folder)
    monkeypatch.setattr(shards, "_RANGE_BYTES", 3 * SEGMENT_BYTES)
    long = " ".join([*lines()] * 3)[: 8 * SEGMENT_BYTES]
    unbroken = "x" * (4 * SEGMENT_BYTES)
    path = write_json_lines(tmp_path / "a.jsonl", ["short one", long, unbroken, "the last"])
    settings = TokenizerConfig(path=str(made(kind, folder)))
    config = Config(data=DataConfig(train=(SourceConfig(path=path),)), tokenizer=settings)
    list(tokenize(config, tmp_path / "out", 1))
    batches = []
    for source in (path, str(tmp_path / "out" / "train-0")):
        data = DataConfig(train=(SourceConfig(path=source),), cache=str(tmp_path), logical_streams=1)
        stream = TokenStream(data, tokenizer, sequence_length=4096, global_batch_size=4)
        assert isinstance(stream.sources[0], TokenFiles) == (source != path)
        batches.append([stream.next_batch() for _ in range(4)])
        state = json.loads(json.dumps(stream.state_dict()))
        expected = stream.next_batch()
        again = TokenStream(data, pickle.loads(pickle.dumps(tokenizer)), 4096, 4)
        again.load_state_dict(state)
        assert np.array_equal(again.next_batch(), expected)
    assert np.array_equal(batches[0], batches[1])


@pytest.mark.parametrize("kind", ["neox", "llama3", "qwen"])
def test_special_tokens_in_a_text_are_text_and_added_ones_themselves(kind: str, folder: Path) -> None:
    tokenizer = opened(kind, folder)
    vocab = {tokenizer.token(i): i for i in range(tokenizer.vocab_size)}
    special = [token for token in json.loads(tokenizer.json_text())["added_tokens"] if token["special"]]
    assert special
    for token in special:
        assert token["id"] not in tokenizer.encode(f"a{token['content']}b")
    if kind == "qwen":
        assert vocab["<tool_call>"] in tokenizer.encode("a<tool_call>b")
    if kind == "neox":
        assert vocab[" " * 7] in tokenizer.encode("a\n" + " " * 7 + "b")


@pytest.mark.parametrize("kind", ["neox", "llama", "gemma"])
def test_token_bytes_add_up(kind: str, folder: Path) -> None:
    """To the text's, with the prefixed space."""
    tokenizer = opened(kind, folder)
    text = "".join(lines())[:5000] + OTHER_SCRIPTS
    prefix = int(kind == "llama")
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode()) + prefix
    assert tokenizer.token_bytes[tokenizer.end_of_text_id] == 0
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(ValueError, match="this vocabulary has ids 0 to"):
        tokenizer.decode([tokenizer.vocab_size])


def test_which_token_ends_a_document(folder: Path, tmp_path: Path) -> None:
    path = made("llama3", folder)
    assert opened("llama3", folder).end_of_text_id == 1  # its tokenizer_config.json
    assert load_tokenizer(TokenizerConfig(path=str(path), end_of_text_id=2)).end_of_text_id == 2
    bare = tmp_path / "tokenizer.json"
    bare.write_bytes((path / "tokenizer.json").read_bytes())
    found = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    assert found.end_of_text_id == 1  # a usual name
    assert found.fingerprint != load_tokenizer(TokenizerConfig(path=str(bare), end_of_text_id=2)).fingerprint


def test_of_a_folder_with_both_the_richer_one_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((made("llama3", folder) / "tokenizer.json").read_bytes())
    for kind, model in (("llama", made("llama", folder)), ("own", Path("tokenizer/tokenizer.model"))):
        (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
        found = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
        assert (found.path.name == "tokenizer.model") == (kind == "own") == (type(found) is Tokenizer)
        named = load_tokenizer(TokenizerConfig(path=str(tmp_path / "tokenizer.model")))
        assert named.path.name == "tokenizer.model"


def test_mistakes_are_named_before_anything_is_trained(folder: Path, tmp_path: Path) -> None:
    source = made("llama3", folder) / "tokenizer.json"

    def given_tree(change: Any) -> TokenizerConfig:
        tree = json.loads(source.read_bytes())
        change(tree)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
        return TokenizerConfig(path=str(tmp_path))

    def nameless(tree: dict[str, Any]) -> None:
        for token in tree["added_tokens"]:
            name = token["content"]
            token["content"] = f"<{token['id']}>"
            tree["model"]["vocab"][token["content"]] = tree["model"]["vocab"].pop(name)
        tree["post_processor"] = None

    def mistake(settings: TokenizerConfig, message: str, vocab_size: int = 4096) -> None:
        with pytest.raises(UserError, match=message) as caught:
            open_tokenizer(settings, vocab_size)
        assert "\n" not in str(caught.value)

    mistake(
        given_tree(lambda tree: tree["model"].update(dropout=0.1)),
        "tokenizer.json drops merges at random: set",
    )
    mistake(
        given_tree(lambda tree: tree["model"].update(type="Other")),
        "is not a tokenizer.json that the package",
    )
    mistake(given_tree(nameless), "does not say which token ends a document: set tokenizer.end_of_text_id")
    (tmp_path / "tokenizer.json").write_bytes(source.read_bytes())
    settings = TokenizerConfig(path=str(tmp_path))
    mistake(TokenizerConfig(path=str(tmp_path), end_of_text_id=-1), "end_of_text_id is -1: .* has no such id")
    mistake(settings, "model.vocab_size is 100, but the tokenizer .* has 700 ids", vocab_size=100)
    mistake(
        TokenizerConfig(path=str(tmp_path), end_of_text_id=700), "end_of_text_id is 700: .* has no such id"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    mistake(settings, "tokenizer_config.json: pad_token is '<pad>', which tokenizer.json does not have")
    (tmp_path / "tokenizer_config.json").write_text("[")
    mistake(settings, "tokenizer_config.json is not a JSON object")
    (tmp_path / "tokenizer_config.json").write_text('{"extra_special_tokens": ["<|eot_id|>", "<a>"]}')
    mistake(settings, "extra_special_tokens is '<a>', which tokenizer.json does not have")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    mistake(settings, "tokenizer.json is not a JSON object")
    mistake(TokenizerConfig(path="tokenizer", end_of_text_id=3), "are both set")


def test_a_sentencepiece_model_that_cannot_be_exported_is_refused(folder: Path, tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    def change_type(model: Any) -> None:
        model.trainer_spec.model_type = 3

    def unused(model: Any) -> None:
        model.pieces[-1].type = model.pieces[-1].UNUSED

    def equal_scores(model: Any) -> None:
        for piece in model.pieces:
            piece.score = 0

    for change, reason in (
        (change_type, "it is of words"),
        (unused, "it has unused pieces"),
        (equal_scores, "pieces have equal scores"),
    ):
        model = sentencepiece_model_pb2.ModelProto.FromString(made("llama", folder).read_bytes())
        change(model)
        (tmp_path / "a.model").write_bytes(model.SerializeToString())
        with pytest.raises(
            UserError, match=rf"a.model cannot be a part of a converted model \({reason}\): take"
        ):
            open_tokenizer(TokenizerConfig(path=str(tmp_path / "a.model")), 4096)
