"""The tokenizer that transformers loads gives sentencepiece's ids for every text."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mf_train.config import TokenizerConfig
from mf_train.data.open_tokenizer import load_tokenizer
from mf_train.data.sentencepiece_file import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    parse_sentencepiece,
)
from mf_train.data.tokenizer import Tokenizer
from mf_train.data.tokenizer_training import train_tokenizer
from mf_train.standalone.conversion.tokenizer_files import tokenizer_files
from tests.examples import examples
from tests.tokenizers_of_others import JSON, OTHER_SCRIPTS, SENTENCEPIECE, lines, write
from tests.training.runs import TOKENIZER

SHIPPED = Tokenizer(TOKENIZER)
FAST = tokenizers.Tokenizer.from_str(tokenizer_files(SHIPPED, 256)["tokenizer.json"].decode())
FAST.encode_special_tokens = True  # as split_special_tokens=True has it
QUICK = ("llama", "unigram", "gemma", "nfkc", "neox", "llama3", "qwen")
KINDS = [
    kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in (*SENTENCEPIECE, *JSON)
]

LETTERS = "aehilnorst ,.\n\té\u2581\ufffd\U0001f680"
ODD = [
    *OTHER_SCRIPTS,
    *(
        "e\u0301",
        "\u1100\u1161",
        "\U0001f469\u200d\U0001f467",
        "\u2581",
        "  ",
        "\r\n",
        "\u3000",
        "\ufdfa",
        "\ufffe",
        "\x00",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "<sep>",
        "<seps>",
        "<se",
        "<ctl>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<tool_call>",
    ),
]
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
    fast = tokenizers.Tokenizer.from_str(tokenizer_files(slow, 16)["tokenizer.json"].decode())
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def opened(kind: str, folder: Path) -> Tokenizer:
    made = folder / kind
    path = made if made.is_dir() else write(kind, folder)
    return load_tokenizer(TokenizerConfig(path=str(path)))


def exported(tokenizer: Tokenizer, folder: Path) -> Any:
    """The converted model's tokenizer, as transformers loads it from a folder of its own."""
    from transformers import AutoTokenizer

    folder.mkdir()
    for name, content in tokenizer_files(tokenizer, 64).items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_has_the_trainers_ids(kind: str, folder: Path, tmp_path: Path) -> None:
    tokenizer = opened(kind, folder)
    fast = exported(tokenizer, tmp_path / "model")
    assert len(fast) == tokenizer.vocab_size and fast.eos_token_id == tokenizer.end_of_text_id

    @examples(10_000)
    @given(texts)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert fast(text, split_special_tokens=True).input_ids == ids
        assert fast.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)

    check()
    ids = fast("hi" + fast.eos_token).input_ids
    assert ids == [*tokenizer.encode("hi"), tokenizer.end_of_text_id]
    if kind != "metaspace":  # a unigram tokenizer.json has the name among its pieces
        assert (
            tokenizer.end_of_text_id not in fast("hi" + fast.eos_token, split_special_tokens=True).input_ids
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", (*SENTENCEPIECE, *JSON))
def test_a_hundred_thousand_texts(kind: str, folder: Path, tmp_path: Path) -> None:
    """All kinds together: words, pieces of other scripts, names of special tokens, and any code points."""
    tokenizer = opened(kind, folder)
    fast = exported(tokenizer, tmp_path / "model")
    seed = random.randrange(1 << 32)
    numbers = random.Random(seed)
    words = " ".join(itertools.islice(lines(), 100)).split(" ")
    code_points = [
        (0, 0x80),
        (0, 0x300),
        (0x300, 0x3000),
        (0x3000, 0xD800),
        (0xE000, 0x10000),
        (0x10000, 0x110000),
    ]
    for _ in range(100_000 // (len(SENTENCEPIECE) + len(JSON)) + 1):
        text = numbers.choice(
            (
                " ".join(numbers.choices(words, k=numbers.randint(0, 12))),
                "".join(numbers.choices(words + 40 * ODD, k=numbers.randint(1, 14))),
                "".join(
                    chr(numbers.randrange(*numbers.choice(code_points)))
                    for _ in range(numbers.randint(1, 12))
                ),
                "".join(numbers.choices("ab 1\u2581<s>ep\n", k=numbers.randint(1, 25))),
            )
        )
        assert fast(text, split_special_tokens=True).input_ids == tokenizer.encode(text), (seed, text)


def test_a_file_that_adds_no_tokens_is_copied_as_it_is(folder: Path) -> None:
    for kind in ("neox", "qwen", "llama3"):
        tokenizer = opened(kind, folder)
        made = tokenizer_files(tokenizer, 64)["tokenizer.json"]
        assert (made == tokenizer.path.read_bytes()) == (kind != "llama3")  # whose own begins every text
    tree = json.loads(tokenizer.path.read_bytes())
    tree["post_processor"]["processors"].pop()
    assert json.loads(made) == tree


def test_chats_and_special_tokens_travel(folder: Path, tmp_path: Path) -> None:
    fast = exported(opened("llama3", folder), tmp_path / "llama3")
    assert (fast.bos_token, fast.eos_token, fast.pad_token) == (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|end_of_text|>",
    )
    chat = fast.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=True)["input_ids"]
    assert chat == [0, *opened("llama3", folder).encode("hi"), 2]
    assert set(exported(opened("qwen", folder), tmp_path / "qwen").all_special_tokens) == {
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    }
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenizer.model").write_bytes(SHIPPED.path.read_bytes())
    (own / "chat_template.jinja").write_text("{{ messages[0]['content'] }}{{ eos_token }}")
    fast = exported(load_tokenizer(TokenizerConfig(path=str(own))), tmp_path / "model")
    chat = fast.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=True)["input_ids"]
    assert chat == [*SHIPPED.encode("hi"), 0]
    fast.add_tokens(["<|user|>"], special_tokens=True)
    assert fast("<|user|>hi").input_ids == [SHIPPED.vocab_size, *SHIPPED.encode("hi")]
