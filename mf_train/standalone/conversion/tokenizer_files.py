"""The tokenizer of a standalone model: a sentencepiece BPE model as a `transformers` fast tokenizer.

`tokenizer.json` gives the ids of `mf_train.data.tokenizer.Tokenizer` for every text. Pieces are written with plain
spaces instead of sentencepiece's mark U+2581, so there is nothing to normalise, and the mark itself, which no piece
holds, is written as its three bytes, as `Tokenizer` does.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mf_train.data.tokenizer import END_OF_TEXT, Tokenizer
from mf_train.errors import TrainingError, UserError
from mf_train.standalone.conversion.sentencepiece_file import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Piece,
    SentencepieceModel,
    parse_sentencepiece,
)

_SPACE_MARK = "\u2581"
_HARD_TEXTS = (
    "",
    " ",
    "   ",
    "\n\n\t\r\n",
    "\u2581 \u2581",
    "<unk><0x0A>" + END_OF_TEXT,
    "\U0001f680e\u0301",
)


def tokenizer_files(path: Path, sequence_length: int) -> dict[str, bytes]:
    """Contents of `tokenizer.json`, `tokenizer_config.json` and `tokenizer.model`, by name.

    The ids of `tokenizer.json` are compared with sentencepiece's on every piece, on pairs of pieces and on hard texts.
    Raises UserError for a sentencepiece model of another kind than `memoryformer tokenizer train` makes, and
    TrainingError where the ids differ.
    """
    import tokenizers

    tokenizer = Tokenizer(path)
    data = path.read_bytes()
    model = parse_sentencepiece(data)
    _check_kind(model, path)
    text = json.dumps(_tokenizer_tree(model, tokenizer.end_of_text_id), ensure_ascii=False)
    fast = tokenizers.Tokenizer.from_str(text)
    fast.encode_special_tokens = True
    for sample in _samples(model):
        if (ids := fast.encode(sample).ids) != (expected := tokenizer.encode(sample)):
            raise TrainingError(
                f"{path}: {sample!r} is {expected} in sentencepiece and {ids} in tokenizer.json"
            )
    config = _tokenizer_config(model.pieces[tokenizer.end_of_text_id].text, sequence_length)
    return {
        "tokenizer.json": text.encode(),
        "tokenizer_config.json": (json.dumps(config, indent=1) + "\n").encode(),
        "tokenizer.model": data,
    }


def _check_kind(model: SentencepieceModel, path: Path) -> None:
    differences = {
        "not BPE": model.model_type != BPE,
        "no byte fallback": not model.byte_fallback,
        "a normaliser": bool(model.charsmap),
        "a prefixed space": model.add_dummy_prefix,
        "extra spaces removed": model.remove_extra_whitespaces,
        "spaces not marked": not model.escape_whitespaces,
        "user-defined pieces": any(p.type not in (NORMAL, UNKNOWN, CONTROL, BYTE) for p in model.pieces),
    }
    if found := [name for name, present in differences.items() if present]:
        raise UserError(
            f"{path}: cannot be converted ({', '.join(found)}): train with a tokenizer that "
            "'memoryformer tokenizer train' made"
        )


def _tokenizer_tree(model: SentencepieceModel, end_of_text_id: int) -> dict[str, Any]:
    """What tokenizer.json holds: BPE over characters, bytes for characters without a piece."""
    specials = {end_of_text_id} | {i for i, p in enumerate(model.pieces) if p.type in (CONTROL, UNKNOWN)}
    unknown = next((p.text for p in model.pieces if p.type == UNKNOWN), None)
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": model.pieces[i].text, **added} for i in sorted(specials)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {_plain(piece): i for i, piece in enumerate(model.pieces)},
            "merges": list(_merges(model)),
        },
    }


def _merges(model: SentencepieceModel) -> Iterator[tuple[str, str]]:
    """Every way of joining two pieces into a third, the best-scored third piece first, as sentencepiece joins."""
    scores = {_plain(piece): piece.score for piece in model.pieces if piece.type == NORMAL}
    for text in sorted(scores, key=lambda text: -scores[text]):
        for cut in range(1, len(text)):
            if text[:cut] in scores and text[cut:] in scores:
                yield text[:cut], text[cut:]


def _plain(piece: Piece) -> str:
    return piece.text.replace(_SPACE_MARK, " ") if piece.type == NORMAL else piece.text


def _samples(model: SentencepieceModel) -> Iterator[str]:
    pieces = [_plain(piece) for piece in model.pieces]
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
        # <|endoftext|> written in a text is text, as in training
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
