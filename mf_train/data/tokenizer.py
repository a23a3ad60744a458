"""The tokenizer: a sentencepiece model, text to ids and back. The only file that imports sentencepiece."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mf_train.config import TokenizerConfig
from mf_train.config.paths import expand_path
from mf_train.errors import UserError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
UNKNOWN_ID = 1  # never produced: what has no piece is written as bytes
FIRST_BYTE_ID = 2  # <0x00> ... <0xFF> are ids 2 ... 257
SMALLEST_VOCABULARY = FIRST_BYTE_ID + 256 + 1

SPACE_MARK = "\u2581"  # how sentencepiece writes a space inside pieces


class Tokenizer:
    """A sentencepiece model: text to ids and back.

    A model that `train_tokenizer` made loses nothing: `decode(encode(text)) == text` for every valid text.
    Raises UserError when `path` is neither a sentencepiece model nor a folder holding `tokenizer.model`,
    or when the model has no end-of-text piece.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = find_model(path)
        self.model_bytes = self.path.read_bytes()
        self.fingerprint = hashlib.blake2b(self.model_bytes, digest_size=8).hexdigest()
        self._processor = load_processor(self.model_bytes, self.path)
        self.vocab_size: int = self._processor.vocab_size()
        self.end_of_text_id = self._find_end_of_text()
        self._space_mark_ids = self._find_bytes(SPACE_MARK.encode("utf-8"))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.path,)  # sentencepiece's processor stays in its process

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-text id. `<|endoftext|>` written in the text is ordinary text."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> npt.NDArray[np.int32]:
        """As `encode`, as an int32 array [T]."""
        if SPACE_MARK not in text or self._space_mark_ids is None:
            return self._encode(text)
        # sentencepiece would read the mark itself as a space and lose it: write it as its three bytes
        parts = [self._encode(part) for part in text.split(SPACE_MARK)]
        joined = [parts[0]]
        for part in parts[1:]:
            joined += [self._space_mark_ids, part]
        return np.concatenate(joined)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of `ids`; end of text adds nothing. Raises ValueError on an id outside the vocabulary."""
        plain = [int(i) for i in ids]
        if plain and not 0 <= min(plain) <= max(plain) < self.vocab_size:
            raise ValueError(
                f"ids {min(plain)} to {max(plain)}: this vocabulary has ids 0 to {self.vocab_size - 1}"
            )
        text: str = self._processor.decode(plain)
        return text

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """UTF-8 bytes of text that each id stands for, [V]; 0 for control ids such as end of text."""
        sizes = np.zeros(self.vocab_size, np.int32)
        for token in range(self.vocab_size):
            if self._processor.is_byte(token):
                sizes[token] = 1
            elif not (self._processor.is_control(token) or self._processor.is_unknown(token)):
                sizes[token] = len(
                    self._processor.id_to_piece(token).replace(SPACE_MARK, " ").encode("utf-8")
                )
        return sizes

    def _encode(self, text: str) -> npt.NDArray[np.int32]:
        ids: npt.NDArray[np.int32] = self._processor.encode(text, return_type="numpy")
        return ids

    def _find_end_of_text(self) -> int:
        end: int = self._processor.eos_id()
        if end >= 0:
            return end
        end = self._processor.piece_to_id(END_OF_TEXT)
        if end != self._processor.unk_id():
            return end
        raise UserError(
            f"tokenizer.path: {self.path} has neither an end-of-sentence piece nor {END_OF_TEXT!r}: "
            "train one with 'memoryformer tokenizer train'"
        )

    def _find_bytes(self, utf8: bytes) -> npt.NDArray[np.int32] | None:
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in utf8]
        return np.array(ids, np.int32) if all(self._processor.is_byte(i) for i in ids) else None


class TokenIds(Tokenizer):
    """Stands for the tokenizer that made token shards elsewhere: it knows ids, and no text.

    `encode` raises UserError, `decode` writes the ids as numbers, `token_bytes` are 0.
    """

    def __init__(self, vocab_size: int, end_of_text_id: int) -> None:
        if not 0 <= end_of_text_id < vocab_size:
            raise UserError(
                f"tokenizer.end_of_text_id is {end_of_text_id}: it must be one of the ids 0 to {vocab_size - 1} "
                "of model.vocab_size"
            )
        self.path = Path("(ids only: tokenizer.path is not set)")
        self.model_bytes = b""
        self.fingerprint = f"ids with end of text {end_of_text_id}"
        self.vocab_size = vocab_size
        self.end_of_text_id = end_of_text_id

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenIds, (self.vocab_size, self.end_of_text_id)

    def encode_array(self, text: str) -> npt.NDArray[np.int32]:
        raise UserError(
            "tokenizer.path is not set, and text cannot be tokenised without it: name a sentencepiece model"
        )

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        return " ".join(str(int(i)) for i in ids)

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        return np.zeros(self.vocab_size, np.int32)


def open_tokenizer(settings: TokenizerConfig, model_vocab_size: int) -> Tokenizer:
    """The configuration's tokenizer, after `check_vocabulary`. Raises UserError."""
    if settings.end_of_text_id is None:
        tokenizer = Tokenizer(settings.path)
        check_vocabulary(tokenizer, model_vocab_size)
        return tokenizer
    if settings.path:
        raise UserError(
            "tokenizer.end_of_text_id and tokenizer.path are both set: the model at the path says its end of text "
            "itself; remove one of them"
        )
    return TokenIds(model_vocab_size, settings.end_of_text_id)


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Refuse a tokenizer with more ids than the model has embeddings. Raises UserError."""
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"model.vocab_size is {model_vocab_size}, but the tokenizer {tokenizer.path} has "
            f"{tokenizer.vocab_size} ids: set model.vocab_size to {tokenizer.vocab_size} or more"
        )


def find_model(path: str | Path) -> Path:
    """The sentencepiece model that `tokenizer.path` means: a file, or its folder's. Raises UserError."""
    if not str(path):
        raise UserError(
            "tokenizer.path is not set: name a sentencepiece model or the folder of 'tokenizer.model' (or, for token "
            "shards of another tokenizer, set tokenizer.end_of_text_id)"
        )
    found = Path(expand_path(str(path), "tokenizer.path"))
    if found.is_dir():
        found = found / "tokenizer.model"
    if not found.is_file():
        raise UserError(
            f"tokenizer.path: {found} does not exist: "
            "train one with 'memoryformer tokenizer train --output DIR'"
        )
    return found


def load_processor(proto: bytes, path: Path) -> Any:
    """sentencepiece's processor of a model's bytes, which came from `path`. Raises UserError."""
    import sentencepiece

    if proto:
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=proto, num_threads=1)
        except RuntimeError:
            pass
    raise UserError(
        f"tokenizer.path: {path} is not a sentencepiece model: give the .model file that was trained"
    )


def train_model(sentences: Iterator[str], vocab_size: int, longest_sentence: int) -> bytes:
    """A lossless byte-fallback BPE model of `sentences`; those of more than `longest_sentence` bytes are left out.

    Raises sentencepiece's RuntimeError when the text does not support the vocabulary size.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.9999,
        max_sentence_length=longest_sentence,
        eos_id=END_OF_TEXT_ID,
        eos_piece=END_OF_TEXT,
        unk_id=UNKNOWN_ID,
        unk_piece="<unk>",
        bos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
