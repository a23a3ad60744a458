"""One field of a JSON object that is too long to hold: its text is handed on in pieces, the rest is checked only."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r"[-+.0-9A-Za-z]*")
_DECODER = json.JSONDecoder()
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_LITERALS = {"true": "true or false", "false": "true or false", "null": "null"}
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # which json.loads takes, too
_LONGEST_SCALAR = 1 << 20
_DEEPEST = 900  # about where json.loads gives up
_KEYS_SHOWN, _KEY_SHOWN = 5, 80


class JsonError(ValueError):
    """What is wrong, in a few words."""


@dataclass
class Outcome:
    """What a line held."""

    kind: str | None = None  # of the whole value; None: the line is blank
    keys: dict[str, None] = field(default_factory=dict)  # the first of the object
    text_kind: str | None = None  # of the field's value; None: there is no such field
    half_surrogate: bool = False  # in the text, which is then not complete


def read_text(
    pieces: Iterator[str], text_field: str, write: Callable[[bytes], None], restart: Callable[[], None]
) -> Outcome:
    """Parses one JSON value given in `pieces`, none of them empty, in memory of a few pieces.

    If it is an object, the text at its key `text_field` is written as UTF-8; `restart` takes back what was written
    (of a key that comes twice the last value counts, as in json.loads). Accepts what json.loads accepts, but for
    nesting and numbers of unreasonable size. Raises JsonError, after some text may have been written.
    """
    parser = _Parser(pieces)
    outcome = Outcome()
    first = parser.peek()
    if first == "{":
        outcome.kind = "an object"
        parser.advance()
        _read_members(parser, text_field, write, restart, outcome)
    elif first:
        outcome.kind = parser.skip_value()
    if parser.peek():
        raise JsonError("Extra data")
    return outcome


def _read_members(
    parser: _Parser,
    text_field: str,
    write: Callable[[bytes], None],
    restart: Callable[[], None],
    outcome: Outcome,
) -> None:
    def write_text(text: str) -> None:
        if not outcome.half_surrogate:
            try:
                write(text.encode("utf-8"))
            except UnicodeEncodeError:
                outcome.half_surrogate = True

    if parser.peek() == "}":
        parser.advance()
        return
    while True:
        key = parser.key(max(len(text_field) + 1, _KEY_SHOWN))
        if len(outcome.keys) < _KEYS_SHOWN:
            outcome.keys[key[:_KEY_SHOWN]] = None
        if key != text_field:
            parser.skip_value()
        else:
            restart()
            outcome.half_surrogate = False
            if parser.peek() == '"':
                parser.advance()
                parser.string(write_text)
                outcome.text_kind = "text"
            else:
                outcome.text_kind = parser.skip_value()
        if parser.next_of("}") == "}":
            return


class _Parser:
    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """The next character that is no space, which stays; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def advance(self) -> None:
        self._at += 1

    def next_of(self, closer: str) -> str:
        """Takes the comma or the `closer` that must follow a value."""
        character = self.peek()
        if character != "," and character != closer:
            raise JsonError("Expecting ',' delimiter")
        self.advance()
        return character

    def key(self, longest: int) -> str:
        """Takes a key and its colon; gives at most `longest` characters of the key."""
        if self.peek() != '"':
            raise JsonError("Expecting property name enclosed in double quotes")
        self.advance()
        key = ""

        def keep(text: str) -> None:
            nonlocal key
            key += text[: longest - len(key)]

        self.string(keep)
        if self.peek() != ":":
            raise JsonError("Expecting ':' delimiter")
        self.advance()
        return key

    def skip_value(self) -> str:
        """Takes a value, however deep; gives the name of its kind."""
        kind = ""
        closers: list[str] = []
        while True:
            first = self.peek()
            if first in ("{", "["):
                self.advance()
                closers.append("}" if first == "{" else "]")
                kind = kind or ("an object" if first == "{" else "an array")
                if len(closers) > _DEEPEST:
                    raise JsonError("nested too deeply or a number too long")
                if self.peek() != closers[-1]:
                    if first == "{":
                        self.key(0)
                    continue
                self.advance()
                closers.pop()
            elif first == '"':
                self.advance()
                self.string(lambda text: None)
                kind = kind or "text"
            else:
                scalar = self._scalar()
                kind = kind or scalar
            while closers:  # a value is complete
                if self.next_of(closers[-1]) == ",":
                    if closers[-1] == "}":
                        self.key(0)
                    break
                closers.pop()
            else:
                return kind

    def string(self, take: Callable[[str], None]) -> None:
        """Takes a string, after its opening quote, and hands on its text in pieces."""
        high = ""  # the first half of a surrogate pair, whose second half may be in the next piece
        while True:
            piece, ended = self._string_piece()
            if high:
                piece = _join_surrogates(high, piece)
                high = ""
            if not ended and "\ud800" <= piece[-1:] <= "\udbff":
                piece, high = piece[:-1], piece[-1]
            take(piece)
            if ended:
                return
            if not self._more():
                raise JsonError("Unterminated string")
            self._text = '"' + self._text  # each buffer's share of it is decoded as a string of its own
            self._at = 1

    def _string_piece(self) -> tuple[str, bool]:
        """The text up to the end of the string or nearly to that of the buffer, and whether the string ended."""
        quote = self._at - 1
        try:
            piece, self._at = _DECODER.raw_decode(self._text, quote)
            return piece, True
        except json.JSONDecodeError:
            pass  # it does not end in what was read so far, or is wrong: then the next raises again
        cut = _before_open_escape(self._text, self._at)
        try:
            piece, _ = _DECODER.raw_decode(self._text[quote:cut] + '"')
        except json.JSONDecodeError as error:
            raise JsonError(error.msg) from None
        self._at = cut
        return piece, False

    def _scalar(self) -> str:
        while True:
            match = _SCALAR.match(self._text, self._at)
            assert match is not None
            if match.end() < len(self._text) or not self._more():
                break
            if match.end() - match.start() > _LONGEST_SCALAR:
                raise JsonError("nested too deeply or a number too long")
        scalar = match.group()
        self._at = match.end()
        if scalar in _LITERALS:
            return _LITERALS[scalar]
        number = _NUMBER.fullmatch(scalar)
        if number is None and scalar not in _NOT_FINITE:
            raise JsonError("Expecting value")
        most_digits = sys.get_int_max_str_digits()
        if number is not None and number.group(1) is None and number.group(2) is None:
            if most_digits and len(scalar.removeprefix("-")) > most_digits:
                raise JsonError("nested too deeply or a number too long")
        return "a number"

    def _more(self) -> bool:
        piece = next(self._pieces, "")
        self._text = self._text[self._at :] + piece
        self._at = 0
        return bool(piece)


def _before_open_escape(text: str, start: int) -> int:
    """Where the text from `start` can be cut: not inside an escape, which has at most six characters."""
    backslash = text.rfind("\\", max(start, len(text) - 6))
    if backslash < 0:
        return len(text)
    head = text[start : backslash + 1]
    run = len(head) - len(head.rstrip("\\"))
    return backslash if run % 2 else len(text)


def _join_surrogates(high: str, text: str) -> str:
    if not "\udc00" <= text[:1] <= "\udfff":
        return high + text
    return chr(0x10000 + ((ord(high) - 0xD800) << 10) + ord(text[0]) - 0xDC00) + text[1:]
