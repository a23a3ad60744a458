"""Small tokenizers of the kinds that others publish, made here from the shipped text."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (
    Path(__file__).resolve().parents[1] / "configs" / "quickstart-text" / "validation" / "sotu-00000.jsonl.gz"
)
OTHER_SCRIPTS = "Ｆｕｌｌ ｗｉｄｔｈ ﬁne １２３ é è ü ñ 中文字符 漢字 かな русский текст العربية 🚀"

# The patterns are facts of the published files.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
}

# Settings of sentencepiece's trainer
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "llama": {**_BYTES, "model_type": "bpe", "allow_whitespace_only_pieces": True, "split_digits": True},
    "bpe": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram"},
    "unigram-bytes": {**_BYTES, "model_type": "unigram", "control_symbols": ["<ctl>"]},
    "unigram-user": {"model_type": "unigram", "user_defined_symbols": ["<sep>", "<seps>"]},
    "gemma": {
        **_BYTES,
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<start_of_turn>", "\n\n", "<sep>", "<seps>"],
        "control_symbols": ["<ctl>"],
    },
    "suffix": {**_BYTES, "model_type": "bpe", "treat_whitespace_as_suffix": True},
    "crossing": {**_BYTES, "model_type": "bpe", "split_by_whitespace": False, "add_dummy_prefix": False},
    "unigram-crossing": {"model_type": "unigram", "split_by_whitespace": False},
    "nfkc": {"model_type": "bpe", "normalization_rule_name": "nfkc", "byte_fallback": True},
    "char": {"model_type": "char"},
}
JSON = ("neox", "llama3", "qwen", "metaspace")


def lines() -> Iterator[str]:
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        for line in itertools.islice(file, 4):
            yield from (json.loads(line)["text"][:15_000]).splitlines()
    for _ in range(40):
        yield OTHER_SCRIPTS


def write_sentencepiece(kind: str, path: Path, vocab_size: int = 700) -> Path:
    """A model of a kind of SENTENCEPIECE, at `path`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **SENTENCEPIECE[kind],
    )
    path.write_bytes(model.getvalue())
    return path


def write_json(kind: str, folder: Path, vocab_size: int = 700) -> Path:
    """A tokenizer.json of a kind of JSON, in `folder` with a tokenizer_config.json."""
    made = {"neox": _neox, "llama3": _llama3, "qwen": _qwen, "metaspace": _metaspace}[kind]
    fast, config = made(vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _of_bytes(vocab_size: int, special: list[str], **parts: Any) -> tokenizers.Tokenizer:
    fast = tokenizers.Tokenizer(models.BPE(**parts.pop("model", {})))
    for name, part in parts.items():
        setattr(fast, name, part)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(lines(), trainer)
    return fast


def _neox(vocab_size: int) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    fast = _of_bytes(
        vocab_size,
        ["<|endoftext|>", "<|padding|>"],
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        post_processor=processors.ByteLevel(trim_offsets=True),
    )
    fast.add_tokens([AddedToken(" " * count, normalized=True) for count in range(24, 1, -1)])
    return fast, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _llama3(vocab_size: int) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    fast = _of_bytes(vocab_size, special, model={"ignore_merges": True}, pre_tokenizer=_split(_LLAMA3))
    begin = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    fast.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    return fast, {
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"content": "<|end_of_text|>", "lstrip": False},
        "chat_template": template,
    }


def _qwen(vocab_size: int) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    fast = _of_bytes(vocab_size, special, normalizer=normalizers.NFC(), pre_tokenizer=_split(_QWEN))
    fast.add_tokens(["<tool_call>"])
    return fast, {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}


def _metaspace(vocab_size: int) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Unigram, as XLM-R's and T5's."""
    fast = tokenizers.Tokenizer(models.Unigram())
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fast.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    fast.train_from_iterator(lines(), trainer)
    return fast, {"eos_token": "</s>", "unk_token": "<unk>"}


def write(kind: str, folder: Path) -> Path:
    """A tokenizer of any kind; gives what `tokenizer.path` has to be."""
    if kind in JSON:
        return write_json(kind, folder / kind)
    (folder / kind).mkdir()
    return write_sentencepiece(kind, folder / kind / "tokenizer.model")
