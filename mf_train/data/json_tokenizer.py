"""Tokenizers of others: a `tokenizer.json`, or a sentencepiece model as one. The only file that imports tokenizers.

What encodes here is what the converted model has, so the ids of both are the same. A text's special tokens are text, as
in all pretraining here; other added tokens are themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mf_train.data.sentencepiece_file import SPACE_MARK, SentencepieceModel, parse_sentencepiece
from mf_train.data.sentencepiece_json import check_exportable, tokenizer_tree
from mf_train.data.tokenizer import (
    CONTEXT_CHARACTERS,
    END_OF_TEXT,
    Tokenizer,
    content_of,
    load_processor,
    parse_object,
    read_companions,
)
from mf_train.errors import UserError
from mf_train.run_folder import TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_JSON

_USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")

# Places to cut at, the likeliest to be right first; each is tried.
_CUTS = (
    re.compile(r"[A-Za-z]( )[A-Za-z]"),
    re.compile(r"[^\W\d_](\s)[^\W\d_]"),
    re.compile(r"\w([^\w\s])\w"),
)
_TRIES = 8  # of each
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class JsonTokenizer(Tokenizer):
    """A tokenizer that the `tokenizers` package runs: text to ids and back; some change the text.

    `path` is a tokenizer.json or a sentencepiece model. `end_of_text_id` None: the `eos_token` of tokenizer_config.json
    beside it, the sentencepiece model's own, or a special token with one of the usual names.
    Raises UserError for a file that is neither, cannot be in a converted model, or has no end of text.
    """

    library = "tokenizers"
    reads_context = True

    def __init__(self, path: Path, end_of_text_id: int | None = None) -> None:
        self.path = path
        self.model_bytes = path.read_bytes()
        self._given = end_of_text_id
        companions = read_companions(path)
        config = parse_object(companions.get(TOKENIZER_CONFIG, b"{}"), path.with_name(TOKENIZER_CONFIG))
        if path.suffix == ".json":
            self.files = {TOKENIZER_JSON: self.model_bytes} | companions
            tree = parse_object(self.model_bytes, path)
            named = content_of(config.get("eos_token"))
            ends = [named] if named else list(_USUAL_ENDS)
        else:
            self.files = {TOKENIZER: self.model_bytes} | companions
            model = parse_sentencepiece(self.model_bytes)
            check_exportable(model, path)
            tree = tokenizer_tree(model)
            ends = self._ends_of_sentencepiece(model)
        model_tree = tree.pop("model", None)
        if isinstance(model_tree, dict) and model_tree.get("dropout"):
            raise UserError(f"tokenizer.path: {path} drops merges at random: set its model.dropout to null")
        try:
            self._fast = open_json(self.json_text())
        except Exception as error:  # it has no narrower one
            raise UserError(
                f"tokenizer.path: {path} is not a tokenizer.json that the package tokenizers "
                f"{version('tokenizers')} reads ({_line(error)}): take one that it wrote, or another version"
            ) from None
        self._settings = tree  # without the vocabulary, which every worker would hold once more
        self._unigram = type(self._fast.model).__name__ == "Unigram"
        self.vocab_size = 1 + max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1)
        self.end_of_text_id = self._find_end(ends)
        told = path.suffix != ".json" and end_of_text_id is None  # by the model's bytes
        end = b"" if told else b" with end of text %d" % self.end_of_text_id
        self.fingerprint = hashlib.blake2b(self.model_bytes + end, digest_size=8).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonTokenizer, (self.path, self._given)

    def encode_array(self, text: str, context: str = "") -> npt.NDArray[np.int32]:
        if not context:
            return np.array(self._fast.encode(text, add_special_tokens=False).ids, np.int32)
        # What stands at the beginning alone, such as a prefixed space, belongs to the context.
        encoding = self._fast.encode(context + text, add_special_tokens=False)
        return np.array(encoding.ids[_tokens_before(encoding, len(context)) :], np.int32)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        plain = self._checked(ids)
        text: str = self._fast.decode(plain, skip_special_tokens=True)
        return text

    def cut(self, utf8: bytes, limit: int) -> int:
        """As `Tokenizer.cut`. A place is one where the text around it is tokenised alike as a whole, in the two parts,
        and in the second part after less context.
        """
        if not self._cuts:
            return 0
        text = utf8[:limit].decode("utf-8", "ignore")
        for pattern in _CUTS:
            last = len(text) - CONTEXT_CHARACTERS
            places = [match.start(1) for match in pattern.finditer(text, CONTEXT_CHARACTERS, max(0, last))]
            for place in reversed(places[-_TRIES:]):
                if self._parts_at(text, place):
                    return len(text[:place].encode("utf-8"))
        return 0

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        sizes = np.zeros(self.vocab_size, np.int32)
        added = {token["id"]: token["special"] for token in self._settings.get("added_tokens") or ()}
        of_bytes = any(part.get("type") == "ByteLevel" for part in _parts(self._settings))
        for text, token in self._fast.get_vocab(with_added_tokens=True).items():
            if added.get(token):
                continue
            if of_bytes and token not in added:
                sizes[token] = len(text)  # a character stands for a byte
            elif _BYTE_TOKEN.fullmatch(text):
                sizes[token] = 1
            else:
                sizes[token] = len(text.replace(SPACE_MARK, " ").encode("utf-8"))
        return sizes

    def json_text(self) -> str:
        """What the converted model's tokenizer.json is made from."""
        if TOKENIZER_JSON in self.files:
            return self.model_bytes.decode("utf-8")
        return json.dumps(tokenizer_tree(parse_sentencepiece(self.model_bytes)), ensure_ascii=False)

    def token(self, number: int) -> str:
        return str(self._fast.id_to_token(number))

    def has_token(self, text: str) -> bool:
        return self._fast.token_to_id(text) is not None

    @cached_property
    def _cuts(self) -> bool:
        """Whether a text can be cut at all. A unigram model chooses the likeliest pieces of all that it is given, which
        has to be a word; BPE joins neighbours only.
        """
        return not self._unigram or self._splits()

    def _splits(self) -> bool:
        probe = self._fast.pre_tokenizer
        return probe is not None and len(probe.pre_tokenize_str(f"a{SPACE_MARK}b c")) > 1

    def _parts_at(self, text: str, place: int) -> bool:
        before, after = text[place - CONTEXT_CHARACTERS : place], text[place : place + CONTEXT_CHARACTERS]
        whole = self._fast.encode(before + after, add_special_tokens=False)
        count = _tokens_before(whole, len(before))
        if whole.ids[:count] != self._fast.encode(before, add_special_tokens=False).ids:
            return False
        less = before[CONTEXT_CHARACTERS // 2 :]
        return whole.ids[count:] == self.encode_array(after, less).tolist()

    def _ends_of_sentencepiece(self, model: SentencepieceModel) -> list[str]:
        end = load_processor(self.model_bytes, self.path).eos_id()
        return [model.pieces[end].text] if end >= 0 else [END_OF_TEXT]

    def _find_end(self, names: list[str]) -> int:
        if self._given is not None:
            if not 0 <= self._given < self.vocab_size or self._fast.id_to_token(self._given) is None:
                raise UserError(
                    f"tokenizer.end_of_text_id is {self._given}: {self.path} has no such id: name one of its "
                    "special tokens"
                )
            return self._given
        for name in names:
            found: int | None = self._fast.token_to_id(name)
            if found is not None:
                return found
        raise UserError(
            f"tokenizer.path: {self.path} does not say which token ends a document: set tokenizer.end_of_text_id, or "
            f"eos_token in {TOKENIZER_CONFIG} beside it"
        )


def open_json(text: str) -> Any:
    """The package's tokenizer of a tokenizer.json's text: whole texts, in which special tokens are text.

    Raises its Exception.
    """
    import tokenizers

    fast = tokenizers.Tokenizer.from_str(text)
    fast.no_truncation()
    fast.no_padding()
    fast.encode_special_tokens = True
    return fast


def _tokens_before(encoding: Any, characters: int) -> int:
    """How many tokens begin before a place in the text; a token that stands for nothing belongs to what is before."""
    count = len(encoding.ids)
    for index, (begin, end) in enumerate(encoding.offsets):
        if begin >= characters and end > begin:
            count = index
            break
    return count


def _parts(tree: Any) -> Iterator[dict[str, Any]]:
    """Every normaliser, pre-tokenizer and so on, those in sequences too."""
    for part in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(part, dict):
            yield part
        if isinstance(part, dict | list):
            yield from _parts(part)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
