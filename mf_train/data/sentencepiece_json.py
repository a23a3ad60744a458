"""A sentencepiece model as the `tokenizer.json` of the `tokenizers` package.

Format: https://huggingface.co/docs/tokenizers. A model of the kind that `memoryformer tokenizer train` makes (`is_own`)
is written with plain spaces instead of sentencepiece's mark U+2581, so there is nothing to normalise, and the mark
itself, which no piece holds, is written as its three bytes, as `Tokenizer` does. Any other keeps the mark.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mf_train.data.sentencepiece_file import (
    BPE,
    BYTE,
    CHAR,
    CONTROL,
    NORMAL,
    SPACE_MARK,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORD,
    Piece,
    SentencepieceModel,
)
from mf_train.errors import UserError

_FARTHEST = 1000.0  # below all scores: such a piece is never chosen for a text that spells its name


def is_own(model: SentencepieceModel) -> bool:
    """Whether the model is of the kind of `memoryformer tokenizer train`: nothing of a text is lost or changed, and a
    word with the spaces before it is tokenised by itself.
    """
    return (
        model.model_type == BPE
        and model.byte_fallback
        and model.escape_whitespaces
        and not (model.charsmap or model.add_dummy_prefix or model.remove_extra_whitespaces)
        and all(piece.type in (NORMAL, UNKNOWN, CONTROL, BYTE) for piece in model.pieces)
        and model.splits_at_spaces
    )


def check_exportable(model: SentencepieceModel, path: Path) -> None:
    """Raises UserError, before anything is trained, for a model that tokenizer.json cannot express."""
    merged = [piece.score for piece in model.pieces if piece.type == NORMAL and len(piece.text) > 1]
    reasons = {
        "it is of words": model.model_type == WORD,
        "it has unused pieces": any(piece.type == UNUSED for piece in model.pieces),
        "pieces have equal scores": model.model_type == BPE and len(set(merged)) < len(merged),
        "it has no unknown piece": all(piece.type != UNKNOWN for piece in model.pieces),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise UserError(
            f"tokenizer.path: {path} cannot be a part of a converted model ({', '.join(found)}): take a BPE or unigram "
            "model without that, or train one with 'memoryformer tokenizer train'"
        )


def tokenizer_tree(model: SentencepieceModel, end_of_text_id: int | None = None) -> dict[str, Any]:
    """What tokenizer.json holds of a model that `check_exportable` accepts; the end of text is special in any case."""
    own = is_own(model)
    specials = {i for i, p in enumerate(model.pieces) if p.type in (CONTROL, UNKNOWN) or i == end_of_text_id}
    added = [_added(i, model.pieces[i].text, special=True) for i in sorted(specials)]
    added += [
        _added(i, piece.text, special=False)
        for i, piece in enumerate(model.pieces)
        if piece.type == USER_DEFINED and i not in specials
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": None if own else _sequence("normalizers", _normalizers(model)),
        "pre_tokenizer": None if own else _sequence("pretokenizers", _pre_tokenizers(model)),
        "post_processor": None,
        "decoder": _sequence("decoders", _decoders(model, own)),
        "model": _unigram(model) if model.model_type == UNIGRAM else _bpe(model, own),
    }


def _added(number: int, content: str, *, special: bool) -> dict[str, Any]:
    # user-defined pieces are looked for in the normalised text, where the prefixed space is in front of them
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": number, "content": content, **kind, "special": special}


def _sequence(key: str, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"type": "Sequence", key: steps} if steps else None


def _normalizers(model: SentencepieceModel) -> list[dict[str, Any]]:
    """The steps of sentencepiece's Normalizer::Normalize (src/normalizer.cc), each for the whole text."""
    steps: list[dict[str, Any]] = []
    mark = SPACE_MARK if model.escape_whitespaces else " "
    if model.charsmap:
        steps.append(
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()}
        )
    if model.remove_extra_whitespaces:
        steps += [_replace(r"\A +", ""), _replace(" {2,}", " ")]
    if model.escape_whitespaces:
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK})
    if model.add_dummy_prefix and not model.whitespace_as_suffix:
        steps.append({"type": "Prepend", "prepend": mark})
        if model.user_defined:  # a piece's own text is normalised too, before it is looked for
            pieces = "|".join(re.escape(text) for text in model.user_defined)
            steps.append(_replace(rf"\A{mark}(?=(?:{pieces})\z)", ""))
    if model.remove_extra_whitespaces:
        steps.append(_replace(rf"{mark}+\z", ""))
    if model.add_dummy_prefix and model.whitespace_as_suffix:
        alone = "".join(rf"(?<!\A{re.escape(text)})" for text in model.user_defined)
        steps.append(_replace(rf"(?<=[\s\S]){alone}\z", mark))
    return steps


def _replace(regex: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": regex}, "content": content}


def _pre_tokenizers(model: SentencepieceModel) -> list[dict[str, Any]]:
    """Words with the spaces before them, where no piece crosses those; and a unigram model's names of pieces that stand
    for no text, such as `<s>`, are cut where a text spells them, since they are in its vocabulary.
    """
    steps = []
    if model.model_type == UNIGRAM:
        names = [p.text for p in model.pieces if p.type in (CONTROL, UNKNOWN) and len(p.text) > 1]
        cuts = [f"(?<={re.escape(name[:-1])})(?={re.escape(name[-1])})" for name in names]
        if model.byte_fallback:
            cuts.append("(?<=<0x[0-9A-F]{2})(?=>)")
        steps.append(_split("|".join(cuts)))
    if model.escape_whitespaces and model.splits_at_spaces:
        steps.append(_split(f"{SPACE_MARK}*[^{SPACE_MARK}]+|{SPACE_MARK}+"))
    return steps


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _decoders(model: SentencepieceModel, own: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if not own and model.escape_whitespaces:
        steps.append({"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "})
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _unigram(model: SentencepieceModel) -> dict[str, Any]:
    lowest = min(piece.score for piece in model.pieces if piece.type == NORMAL)
    scores = {NORMAL: None, USER_DEFINED: 0.0}
    vocab = [
        [piece.text, piece.score if piece.type == NORMAL else scores.get(piece.type, lowest - _FARTHEST)]
        for piece in model.pieces
    ]
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": model.byte_fallback}


def _bpe(model: SentencepieceModel, own: bool) -> dict[str, Any]:
    """BPE over characters, bytes or the unknown piece for characters without a piece."""
    texts = [_plain(piece) if own else piece.text for piece in model.pieces]
    scores = {
        text: piece.score for text, piece in zip(texts, model.pieces, strict=True) if piece.type == NORMAL
    }
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next((p.text for p in model.pieces if p.type == UNKNOWN), None),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": not own,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {text: i for i, text in enumerate(texts)},
        "merges": [] if model.model_type == CHAR else list(_merges(scores)),
    }


def _merges(scores: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Every way of joining two pieces into a third, the best-scored third piece first, as sentencepiece joins."""
    for text in sorted(scores, key=lambda text: -scores[text]):
        for cut in range(1, len(text)):
            if text[:cut] in scores and text[cut:] in scores:
                yield text[:cut], text[cut:]


def _plain(piece: Piece) -> str:
    return piece.text.replace(SPACE_MARK, " ") if piece.type == NORMAL else piece.text
