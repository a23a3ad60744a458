"""Every format and compression reads to the same documents; every mistake is named with its file and line."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mf_train.config import SourceConfig
from mf_train.data.sources import Documents, open_source
from mf_train.errors import UserError
from tests.data.texts import json_lines

# the second column changes type from line to line, as metadata does; the texts look like other types
LINES = json_lines([]) + b"".join(
    (json.dumps(line, ensure_ascii=False) + "\n").encode()
    for line in (
        {"text": "2024-01-01 12:00:00", "meta": 1},
        {"text": "", "meta": "x", "extra": None},
        {"meta": [1, {"a": [2]}], "text": "é🎉\n\tz\u2028 \u2581"},
        {"text": "17"},
        {"text": "null", "meta": {"a": 1.5}, "messages": [{"role": "user"}]},
    )
)
TEXTS = ["2024-01-01 12:00:00", "", "é🎉\n\tz\u2028 \u2581", "17", "null"]


def read(path: Path | str, **settings: str) -> list[str]:
    documents = open_source(SourceConfig(path=str(path), **settings), "data.train[0]")  # type: ignore[arg-type]
    return [documents[i] for i in range(len(documents))]


def test_json_lines(tmp_path: Path) -> None:
    contents = {
        "a.jsonl": LINES,
        "a.json": LINES.rstrip(b"\n"),
        "bom.jsonl": b"\xef\xbb\xbf" + LINES,
        "crlf.jsonl": LINES.replace(b"\n", b"\r\n \r\n"),
        "a.jsonl.gz": gzip.compress(LINES),
        "two-members.jsonl.gz": gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]),
        "A.JSONL.ZST": zstandard.compress(LINES),
        "two-frames.json.zst": zstandard.compress(LINES[:40]) + zstandard.compress(LINES[40:]),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == TEXTS, name


def test_plain_text_is_one_document_a_file(tmp_path: Path) -> None:
    text = "one\n\n\ntwo\r\n  three"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(text.encode()))
    assert read(tmp_path) == [text] * 3


def test_parquet(tmp_path: Path) -> None:
    columns = {
        "string": pa.array(TEXTS * 200),
        "large": pa.array(TEXTS * 200, pa.large_string()),
        "view": pa.array(TEXTS * 200).cast(pa.string_view()),
        "categories": pa.array(TEXTS * 200).dictionary_encode(),
        "number": pa.array(range(1000)),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=300)
    for name in ("string", "large", "view", "categories"):
        assert read(tmp_path / "a.parquet", text_field=name) == TEXTS * 200


def test_files_are_found_in_sorted_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.jsonl", "b/10.jsonl", "a.jsonl", ".hidden/x.jsonl", "b/.partial.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json_lines([name]))
    (tmp_path / "notes.md").write_text("not a document")
    (tmp_path / "b" / "[x].jsonl").write_bytes(json_lines(["brackets"]))
    monkeypatch.chdir(tmp_path)
    assert read(".") == read(tmp_path) == ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "brackets"]
    assert read("b/*0.jsonl") == ["b/10.jsonl"]
    assert read("**/[ab0-9]*.jsonl") == ["a.jsonl", "b/10.jsonl", "b/2.jsonl"]
    assert read("b/[x].jsonl") == ["brackets"]  # a file's own name comes before the pattern


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    source = SourceConfig(path=str(tmp_path / "a.jsonl"))
    documents = open_source(source, "k")
    assert isinstance(documents, Documents) and documents.name == source.path
    assert documents.files == (tmp_path / "a.jsonl",)
    assert documents.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert bytes(documents.utf8(2)) == TEXTS[2].encode() and bytes(documents.utf8(1)) == b""
    with pytest.raises(IndexError, match="5 documents"):
        documents[5]


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(*names: str) -> str:
        pattern = tmp_path / (names[0] if len(names) == 1 else "*-shard.jsonl")
        return open_source(SourceConfig(path=str(pattern)), "k").fingerprint

    lines = LINES.splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "1-shard.jsonl").write_bytes(b"".join(lines[:2]))
    (tmp_path / "2-shard.jsonl").write_bytes(b"".join(lines[2:]))
    (tmp_path / "other.jsonl").write_bytes(LINES.replace(b'"17"', b'"18"'))
    (tmp_path / "order.jsonl").write_bytes(b"".join(reversed(lines)))
    assert fingerprint("a.jsonl") == fingerprint("b.jsonl.gz") == fingerprint("1-shard", "2-shard")
    assert len({fingerprint("a.jsonl"), fingerprint("other.jsonl"), fingerprint("order.jsonl")}) == 3


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["1"]))
    assert read(path) == ["1"]
    path.write_bytes(json_lines(["2"]))
    os.utime(path, ns=(1, 1))
    assert read(path) == ["2"]


def test_a_changed_field_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "t", "body": "b"}\n')
    assert read(tmp_path / "a.jsonl") == ["t"]
    assert read(tmp_path / "a.jsonl", text_field="body") == ["b"]


def test_many_large_documents(tmp_path: Path) -> None:
    """More than one Arrow table: 60 MB in documents of 0.5 and of 20 MB."""
    texts = ["a" * 500_000] * 40 + ["b" * 20_000_000] * 2 + ["c"]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    assert read(tmp_path / "a.jsonl") == texts


def _parquet(**columns: pa.Array) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


LONG = json_lines([os.urandom(2000).hex() for _ in range(50)])
GZ, ZST = gzip.compress(LONG), zstandard.compress(LONG)
PARQUET = _parquet(text=pa.array(["a", "b"] * 50), n=pa.array(range(100)))
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "truncated gz": ("a.jsonl.gz", GZ[:-9], "a.jsonl.gz: truncated or damaged gzip"),
    "half a gz": ("a.jsonl.gz", GZ[: len(GZ) // 2], "a.jsonl.gz: truncated or damaged gzip"),
    "damaged gz": ("a.jsonl.gz", GZ[:-5] + b"x" + GZ[-4:], "a.jsonl.gz: truncated or damaged gzip"),
    "not a gz": ("a.txt.gz", LINES, "a.txt.gz: truncated or damaged gzip"),
    "truncated zst": ("a.jsonl.zst", ZST[:-9], "a.jsonl.zst: truncated or damaged zstd"),
    "half a zst": ("a.txt.zst", ZST[: len(ZST) // 2], "a.txt.zst: truncated or damaged zstd"),
    "not a zst": ("a.jsonl.zst", LINES, "a.jsonl.zst: truncated or damaged zstd"),
    "not JSON": ("a.jsonl", LINES + b"{oops\n", "a.jsonl: line 6 is not JSON"),
    "cut JSON": ("a.jsonl", LINES[:-4], "a.jsonl: line 5 is not JSON"),
    "pretty JSON": ("a.json", b'{\n"text": "a"\n}\n', "a.json: line 1 is not JSON"),
    "deep JSON": ("a.jsonl", b"[" * 200_000 + b"\n", "a.jsonl: line 1 is not JSON"),
    "array": ("a.json", b'[{"text": "a"}]', "a.json: line 1 is an array, not a JSON object"),
    "a string": ("a.jsonl", LINES + b"\n" + b'"text"\n', "a.jsonl: line 7 is text, not a JSON object"),
    "no field": ("a.jsonl", LINES + b'{"txt": ""}\n', "a.jsonl: line 6 lacks the field 'text' .it has 'txt'"),
    "a number": ("a.jsonl", LINES + b'{"text": 5}\n', "a.jsonl: line 6: 'text' is a number, not text"),
    "null": ("a.jsonl", LINES + b'{"text": null}\n', "a.jsonl: line 6: 'text' is null, not text"),
    "not UTF-8": ("a.jsonl", LINES + b'{"text": "\xff"}\n', "a.jsonl: line 6 is not valid UTF-8"),
    "surrogate": (
        "a.jsonl",
        LINES + b'{"text": "\\ud83d"}\n',
        "a.jsonl: line 6: 'text' holds half of a surro",
    ),
    "UTF-16": ("a.txt", "text\n".encode("utf-16"), "a.txt: line 1 is not valid UTF-8"),
    "text not UTF-8": ("a.txt", b"a\nb\nc\xe9\n", "a.txt: line 3 is not valid UTF-8"),
    "in gz": ("a.jsonl.gz", gzip.compress(LINES + b"x\n"), "a.jsonl.gz: line 6 is not JSON"),
    "no column": (
        "a.parquet",
        _parquet(body=pa.array(["a"])),
        "a.parquet: has no column 'text' .it has 'body'",
    ),
    "numbers": ("a.parquet", _parquet(text=pa.array([1])), "a.parquet: column 'text' is int64, not text"),
    "null in Parquet": (
        "a.parquet",
        _parquet(text=pa.array(["a"] * 700 + [None, "b"])),
        "a.parquet: row 700 .counted from 0. has no 'text'",
    ),
    "Parquet not UTF-8": (
        "a.parquet",
        _parquet(text=pa.array([b"\xff"]).view(pa.string())),
        "a.parquet: damaged or not a Parquet file .Invalid UTF8",
    ),
    "cut Parquet": ("a.parquet", PARQUET[:-20], "a.parquet: damaged or not a Parquet file"),
    "damaged Parquet": ("a.parquet", PARQUET[:4] + b"\xff" * 30 + PARQUET[34:], "a.parquet: damaged or not"),
    "empty Parquet": ("a.parquet", b"", "a.parquet: damaged or not a Parquet file"),
    "no documents": ("a.jsonl", b"\n\n", "data.train.0.: .*a.jsonl holds no documents"),
    "unknown format": ("a.csv", b"text\na\n", "data.train.0.: .*a.csv is not of a known format: use .jsonl"),
    "compressed Parquet": ("a.parquet.gz", b"", "data.train.0.: .*a.parquet.gz is not of a known format"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(case: str, tmp_path: Path) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_the_bad_file_of_many_is_named(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(LINES) if number != 3 else GZ[:-9])
    with pytest.raises(UserError, match=r"3\.jsonl\.gz: truncated"):
        read(tmp_path)
    (tmp_path / "3.jsonl.gz").write_bytes(gzip.compress(LINES))
    assert read(tmp_path) == TEXTS * 5  # the failure left nothing behind


def test_missing_files_are_named(tmp_path: Path) -> None:
    cases: list[tuple[str, str]] = [
        (str(tmp_path / "a.jsonl"), "data.train.0.: .*a.jsonl does not exist"),
        (str(tmp_path / "*.jsonl"), r"data.train.0.: no file matches .*\*.jsonl"),
        (str(tmp_path), "data.train.0.: folder .* has no file of a known format"),
    ]
    for path, message in cases:
        with pytest.raises(UserError, match=message):
            read(path)


def test_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    with pytest.raises(
        UserError, match=r"the cache of documents .*file/datasets cannot be used .*set HF_HOME"
    ):
        read(tmp_path / "a.jsonl")


def test_hub(tmp_path: Path) -> None:
    """A dataset folder stands for the hub: load_dataset resolves its name, splits and columns the same way."""
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": TEXTS, "n": range(5)}), tmp_path / "data" / "train.parquet")
    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2]}), tmp_path / "data" / "test.parquet")

    def hub(**settings: str) -> Callable[[], Documents]:
        source = SourceConfig(hub=settings.pop("hub", str(tmp_path)), **settings)  # type: ignore[arg-type]
        return lambda: open_source(source, "data.train[1]")

    documents = hub()()
    assert [documents[i] for i in range(len(documents))] == TEXTS
    assert documents.files == ()
    cases = [
        (hub(split="dev"), "data.train.1..hub: .*split dev. cannot be loaded: .*Unknown split"),
        (hub(split="test"), "data.train.1..hub: .*: 1 rows have no 'text'"),
        (hub(text_field="body"), "has no column 'body' .it has 'text', 'n'.: set data.train.1..text_field"),
        (hub(text_field="n"), "column 'n' is int64, not text: set data.train.1..text_field"),
    ]
    for mistake, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            mistake()
        assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_named(repository: Path) -> None:
    code = """
from mf_train.config import SourceConfig
from mf_train.data.sources import open_source
from mf_train.errors import UserError
try:
    open_source(SourceConfig(hub="nobody/nothing-here"), "data.train[1]")
except UserError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # read when huggingface_hub is imported
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, cwd=repository, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"data.train\[1\].hub: nobody/nothing-here .* cannot be loaded: .*\n", done.stdout)
