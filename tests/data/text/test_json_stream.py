"""The piecewise reader takes and refuses what json.loads does, wherever the pieces are cut."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mf_train.data.text.json_stream import JsonError, Outcome, read_text

NAMES = {dict: "an object", list: "an array", str: "text", bool: "true or false", type(None): "null"}


def pieces(line: str, size: int) -> Iterator[str]:
    return (line[i : i + size] for i in range(0, len(line), size))


def piecewise(line: str, size: int) -> tuple[Outcome, bytes] | None:
    written = bytearray()
    try:
        outcome = read_text(pieces(line, size), "text", written.extend, written.clear)
    except JsonError:
        return None
    return outcome, bytes(written)


def check(line: str, size: int) -> None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        assert line.strip(" \t\n\r") == "" or piecewise(line, size) is None
        return
    found = piecewise(line, size)
    assert found is not None
    outcome, written = found
    assert outcome.kind == NAMES.get(type(value), "a number")
    if not isinstance(value, dict):
        return
    assert list(outcome.keys) == [key[:80] for key in list(value)[:5]]
    if "text" not in value:
        assert outcome.text_kind is None
        return
    text = value["text"]
    assert outcome.text_kind == NAMES.get(type(text), "a number")
    if not isinstance(text, str):
        return
    try:
        assert (text.encode(), False) == (written, outcome.half_surrogate)
    except UnicodeEncodeError:
        assert outcome.half_surrogate


# text with what json.dumps escapes, and characters whose escapes are pairs; surrogates make invalid text
TEXTS = st.text(st.sampled_from('ab"\\/\n\t\x00é\u2028🎉\ud83d\udc00{}[]:, '), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from(["text", "a", "te", "texts", "t\\", "🎉"]), VALUES, max_size=7)


@given(OBJECTS | VALUES, st.booleans(), st.sampled_from([None, 1]), st.integers(1, 30))
@settings(max_examples=400, deadline=None)
def test_valid_lines(value: object, ascii_only: bool, indent: int | None, size: int) -> None:
    check(json.dumps(value, ensure_ascii=ascii_only, indent=indent), size)


@given(OBJECTS, st.booleans(), st.integers(0, 10**9), st.integers(1, 30))
@example({"text": "a\\"}, True, 3, 1)
@settings(max_examples=400, deadline=None)
def test_damaged_lines(value: object, ascii_only: bool, seed: int, size: int) -> None:
    """One to three characters replaced, left out or doubled."""
    random_state = random.Random(seed)
    line = json.dumps(value, ensure_ascii=ascii_only)
    for _ in range(random_state.randint(1, 3)):
        at = random_state.randrange(len(line) + 1)
        put = random_state.choice(["", line[at : at + 1] * 2, *'"\\{}[],: \t\n\x1f0.-eEuntN'])
        line = line[:at] + put + line[at + random_state.randint(0, 1) :]
    check(line, size)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "old\\ud83d", "text": "new"}',
        '{"text": "old", "text": 5}',
        '{"text": 5, "a": {"text": "inner"}, "text": "\\ud83d\\udc00\\ud83d"}',
        '{"te\\u0078t": "x"}',
        '{"text": "a"} {}',
        '{"text": "a",}',
        '{"a": NaN, "b": -Infinity, "c": -0.5e+10, "text": "n"}',
        '{"a": 01, "text": "n"}',
        '{"a": 1., "text": "n"}',
        '{"a": ' + "7" * 5000 + "}",
        '{"a": ' + "7" * 5000 + '.5, "text": "n"}',
        "[" * 5000,
        "[" * 5000 + "]" * 5000,
        '{"text": "' + "\\\\" * 50 + '"}',
        '{"text": "' + "\\" * 51 + '"}',
        "",
        " \t\r\n",
        "[]",
        "17",
        "nul",
    ],
)
def test_corners(line: str) -> None:
    for size in (1, 2, 3, 5, 7, 11, 64, 10_000):
        check(line, size)
