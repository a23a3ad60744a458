"""The tokenizer: text to ids and back. The only file that imports sentencepiece.

`Tokenizer` is of the models that `memoryformer tokenizer train` makes, `TokenIds` stands for one that is not there, and
`mf_train.data.json_tokenizer` has those of others. `mf_train.data.open_tokenizer` chooses.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mf_train.config.paths import expand_path
from mf_train.data.segments import segment_end
from mf_train.data.sentencepiece_file import SPACE_MARK
from mf_train.errors import UserError
from mf_train.run_folder import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_JSON

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
UNKNOWN_ID = 1  # never produced: what has no piece is written as bytes
FIRST_BYTE_ID = 2  # <0x00> ... <0xFF> are ids 2 ... 257
SMALLEST_VOCABULARY = FIRST_BYTE_ID + 256 + 1
LARGEST_VOCABULARY = 2**31 - 1  # ids are int32, here and in sentencepiece

# Special tokens by their use, which a tokenizer_config.json names; the end of text is `end_of_text_id`.
SPECIAL_TOKENS = ("bos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
MORE_SPECIAL_TOKENS = ("additional_special_tokens", "extra_special_tokens")  # each names several
CONTEXT_CHARACTERS = 64  # before a segment of a document, that some tokenizers have to see


class Tokenizer:
    """A sentencepiece model that `train_tokenizer` made: text to ids and back.

    It loses nothing: `decode(encode(text)) == text` for every valid text. `files` holds the model and what travels
    with it, by name.
    Raises UserError when `path` is neither a sentencepiece model nor a folder holding `tokenizer.model`,
    or when the model has no end-of-text piece.
    """

    library = "sentencepiece"  # whose version the ids depend on
    reads_context = False

    def __init__(self, path: str | Path) -> None:
        self.path = find_model(path)
        self.model_bytes = self.path.read_bytes()
        self.fingerprint = hashlib.blake2b(self.model_bytes, digest_size=8).hexdigest()
        self.files = {TOKENIZER: self.model_bytes} | read_companions(self.path)
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

    def encode_array(self, text: str, context: str = "") -> npt.NDArray[np.int32]:
        """As `encode`, as an int32 array [T].

        Where `text` goes on in a document, cut by `cut`, `context` is the last CONTEXT_CHARACTERS before it for a
        tokenizer that `reads_context`.
        """
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
        text: str = self._processor.decode(self._checked(ids))
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

    def cut(self, utf8: bytes, limit: int) -> int:
        """Bytes of the first segment of a UTF-8 text, at most `limit`, such that segments have the tokens of the text.

        `utf8` has more than `limit` bytes of the text. 0: no such place was found within the limit.
        """
        return segment_end(utf8, limit)

    def token(self, number: int) -> str:
        """How the vocabulary writes an id."""
        return str(self._processor.id_to_piece(number))

    def has_token(self, text: str) -> bool:
        """Whether the vocabulary has an entry that is written so."""
        return bool(self._processor.id_to_piece(self._processor.piece_to_id(text)) == text)

    def _checked(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> list[int]:
        plain = [int(i) for i in ids]
        if plain and not 0 <= min(plain) <= max(plain) < self.vocab_size:
            raise ValueError(
                f"ids {min(plain)} to {max(plain)}: this vocabulary has ids 0 to {self.vocab_size - 1}"
            )
        return plain

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
        self.files: dict[str, bytes] = {}
        self.fingerprint = f"ids with end of text {end_of_text_id}"
        self.vocab_size = vocab_size
        self.end_of_text_id = end_of_text_id

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenIds, (self.vocab_size, self.end_of_text_id)

    def encode_array(self, text: str, context: str = "") -> npt.NDArray[np.int32]:
        raise UserError(
            "tokenizer.path is not set, and text cannot be tokenised without it: name a sentencepiece model or a "
            "tokenizer.json"
        )

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        return " ".join(str(int(i)) for i in ids)

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        return np.zeros(self.vocab_size, np.int32)


def find_model(path: str | Path) -> Path:
    """The file that `tokenizer.path` means: a tokenizer, or the one in its folder. Raises UserError.

    Of a folder with both, `tokenizer.model` is it.
    """
    if not str(path):
        raise UserError(
            "tokenizer.path is not set: name a sentencepiece model, a tokenizer.json, or the folder of either (or, for "
            "token shards of another tokenizer, set tokenizer.end_of_text_id)"
        )
    found = Path(expand_path(str(path), "tokenizer.path"))
    if found.is_dir():
        made = found / TOKENIZER_JSON
        found = found / TOKENIZER
        if not found.is_file() and made.is_file():
            return made
    if not found.is_file():
        raise UserError(
            f"tokenizer.path: {found} does not exist: "
            "train one with 'memoryformer tokenizer train --output DIR', or name the folder of a tokenizer.json"
        )
    return found


def read_companions(path: Path) -> dict[str, bytes]:
    """The files beside the tokenizer at `path` that travel with it: special tokens by their use, the form of chats."""
    beside = (path.with_name(name) for name in (TOKENIZER_CONFIG, CHAT_TEMPLATE))
    return {file.name: file.read_bytes() for file in beside if file.is_file()}


def content_of(token: Any) -> str:
    """Of a special token as a tokenizer_config.json writes it; empty for none."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that a file of a tokenizer holds. Raises UserError."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(
            f"tokenizer.path: {path} is not a JSON object: take the file as its author published it"
        )
    return tree


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
