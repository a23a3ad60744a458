"""The tokenizer of a standalone model: a `transformers` fast tokenizer with the ids of the trainer's."""

import json
import random
from collections.abc import Iterator
from typing import Any

from mf_train.data.json_tokenizer import JsonTokenizer, open_json
from mf_train.data.sentencepiece_file import parse_sentencepiece
from mf_train.data.sentencepiece_json import tokenizer_tree
from mf_train.data.tokenizer import (
    END_OF_TEXT,
    MORE_SPECIAL_TOKENS,
    SPACE_MARK,
    SPECIAL_TOKENS,
    Tokenizer,
    content_of,
)
from mf_train.errors import TrainingError
from mf_train.run_folder import TOKENIZER_CONFIG, TOKENIZER_JSON

_ADDS_TOKENS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
_HARD_TEXTS = (
    "",
    " ",
    "   ",
    "\n\n\t\r\n",
    "\u2581 \u2581",
    "<unk><0x0A>" + END_OF_TEXT,
    "\U0001f680e\u0301",
)


def tokenizer_files(tokenizer: Tokenizer, sequence_length: int) -> dict[str, bytes]:
    """Contents of `tokenizer.json`, `tokenizer_config.json` and what the tokenizer's own files are, by name.

    Of a model of `memoryformer tokenizer train`, the ids of `tokenizer.json` are compared with sentencepiece's on every
    piece, on triples of pieces and on hard texts. Raises TrainingError where they differ.
    """
    text = _exported(tokenizer) if isinstance(tokenizer, JsonTokenizer) else _exported_own(tokenizer)
    config = _tokenizer_config(tokenizer.token(tokenizer.end_of_text_id), sequence_length) | _travels(
        tokenizer
    )
    return tokenizer.files | {
        TOKENIZER_JSON: text,
        TOKENIZER_CONFIG: (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode(),
    }


def _exported(tokenizer: JsonTokenizer) -> bytes:
    """As it is, but for tokens that it would put around every text: the model was trained without."""
    text = tokenizer.json_text()
    tree = json.loads(text)
    processor = tree.get("post_processor")
    kept = _without_tokens(processor)
    if kept == processor:
        return text.encode()
    return json.dumps(tree | {"post_processor": kept}, ensure_ascii=False).encode()


def _without_tokens(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    if processor is None or processor["type"] in _ADDS_TOKENS:
        return None
    if processor["type"] == "Sequence":
        kept = [part for part in map(_without_tokens, processor["processors"]) if part is not None]
        return processor | {"processors": kept} if kept else None
    return processor


def _exported_own(tokenizer: Tokenizer) -> bytes:
    model = parse_sentencepiece(tokenizer.model_bytes)
    text = json.dumps(tokenizer_tree(model, tokenizer.end_of_text_id), ensure_ascii=False)
    fast = open_json(text)
    for sample in _samples([piece.text.replace(SPACE_MARK, " ") for piece in model.pieces]):
        ids, expected = fast.encode(sample).ids, tokenizer.encode(sample)
        if ids != expected:
            raise TrainingError(
                f"{tokenizer.path}: {sample!r} is {expected} in sentencepiece and {ids} in tokenizer.json"
            )
    return text.encode()


def _samples(pieces: list[str]) -> Iterator[str]:
    yield from _HARD_TEXTS
    yield from pieces
    random.Random(0).shuffle(pieces)
    yield from map("".join, zip(pieces, pieces[1:], pieces[2:], strict=False))


def _tokenizer_config(end_of_text: str, sequence_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "pad_token": end_of_text,
        "padding_side": "left",
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _travels(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the tokenizer's own tokenizer_config.json says of special tokens and chats."""
    theirs = json.loads(tokenizer.files.get(TOKENIZER_CONFIG, b"{}"))
    tokens = {name: content_of(theirs.get(name)) for name in SPECIAL_TOKENS}
    kept = {name: theirs[name] for name in (*MORE_SPECIAL_TOKENS, "chat_template") if theirs.get(name)}
    return {name: text for name, text in tokens.items() if text} | kept
