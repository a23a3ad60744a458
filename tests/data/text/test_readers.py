"""Every format and compression reads to the same documents; every mistake is named with its file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import resource
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mf_train.data.files.input_files import find_files
from mf_train.data.text import readers
from mf_train.data.text.readers import read_documents
from mf_train.errors import UserError
from tests.data.texts import json_lines
from tests.processes import run_python

# the second column changes type from line to line, as metadata does; the texts look like other types
LINES = b"".join(
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


class Kept:
    """A sink that keeps documents; what is wrong is raised, or kept as well."""

    def __init__(self, skip: bool) -> None:
        self.documents: list[str] = []
        self.errors: list[str] = []
        self._skip = skip
        self._pieces: list[bytes] = []

    def write(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def end(self) -> None:
        self.documents.append(b"".join(self._pieces).decode())
        self._pieces = []

    def bad(self, error: UserError) -> None:
        if not self._skip:
            raise error
        self._pieces = []
        self.errors.append(str(error))


def read(path: Path, text_field: str = "text", skip: bool = False) -> Kept:
    kept = Kept(skip)
    for file in find_files(str(path), "data.train[0]"):
        read_documents(file, text_field, kept)
    return kept


def test_json_lines(tmp_path: Path) -> None:
    contents = {
        "a.jsonl": LINES,
        "a.json": LINES.rstrip(b"\n"),
        "bom.jsonl": b"\xef\xbb\xbf" + LINES,
        "crlf.jsonl": LINES.replace(b"\n", b"\r\n \r\n"),
        "a.jsonl.gz": gzip.compress(LINES),
        "two-members.jsonl.gz": gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]),
        "A.JSONL.ZST": zstandard.compress(LINES),
        "a.jsonl.xz": lzma.compress(LINES),
        "two-streams.jsonl.xz": lzma.compress(LINES[:40]) + lzma.compress(LINES[40:]),
        "a.json.bz2": bz2.compress(LINES[:40]) + bz2.compress(LINES[40:]),
        "three-streams.json.bz2": b"".join(map(bz2.compress, (LINES[:40], b"", LINES[40:]))),
        "padded.jsonl.xz": lzma.compress(LINES[:40]) + bytes(20_000) + lzma.compress(LINES[40:]) + bytes(4),
        "two-frames.json.zst": zstandard.compress(LINES[:40]) + zstandard.compress(LINES[40:]),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name).documents == TEXTS, name


def test_plain_text_is_one_document_a_file(tmp_path: Path) -> None:
    text = "one\n\n\ntwo\r\n  three"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(b"\xef\xbb\xbf" + text.encode()))
    assert read(tmp_path).documents == [text] * 3


def test_csv(tmp_path: Path) -> None:
    texts = [*TEXTS, 'a "word", and\r\na line\n', "tab\there", " spaces "]
    for name, delimiter, end in (("a.csv", ",", "\n"), ("b.tsv", "\t", "\r\n"), ("c.csv.gz", ",", "\n")):
        rows = io.StringIO(newline="")
        writer = csv.writer(rows, delimiter=delimiter, lineterminator=end)
        writer.writerows([["id", "text"], *enumerate(texts)])
        content = b"\xef\xbb\xbf" + rows.getvalue().encode() + end.encode()  # a blank line at its end
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert read(tmp_path / name).documents == texts, name
    (tmp_path / "empty.csv").write_bytes(b"")
    assert read(tmp_path / "empty.csv").documents == []


def test_arrow(tmp_path: Path) -> None:
    columns = {
        "n": pa.array(range(1000)),
        "text": pa.array(TEXTS * 200),
        "view": pa.array(TEXTS * 200, pa.string_view()),
    }
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        (tmp_path / f"{name}.arrow").write_bytes(_arrow(new, **columns))
        for column in ("text", "view"):
            assert read(tmp_path / f"{name}.arrow", column).documents == TEXTS * 200


def test_a_dataset_that_was_saved_to_disk(tmp_path: Path) -> None:
    """The folder of HF datasets' `save_to_disk`, with what its `map` keeps beside the data."""
    split = datasets.Dataset.from_dict({"text": TEXTS * 50, "n": list(range(250))})
    split.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(
        _arrow(pa.ipc.new_stream, text=pa.array(["of a map"]))
    )
    assert read(tmp_path / "one").documents == TEXTS * 50
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "several")
    assert read(tmp_path / "several" / "train").documents == TEXTS * 50
    message = r"several holds a dataset's splits \(test, train\): name one of them, such as .*several/test"
    with pytest.raises(UserError, match=message):
        read(tmp_path / "several")


def test_a_zstd_window_that_is_too_large_is_no_damage(tmp_path: Path) -> None:
    """A frame with a window of 2 GiB, as `zstd --long=31` writes: RFC 8878, 3.1.1; not left out with `skip`."""
    frame = (
        b"\x28\xb5\x2f\xfd\x00" + bytes([31 - 10 << 3]) + (len(LINES) << 3 | 1).to_bytes(3, "little") + LINES
    )
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    for skip in (False, True):
        with pytest.raises(UserError, match=r"window is larger than 128 MiB.*--long=27"):
            read(tmp_path / "a.jsonl.zst", skip=skip)


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
        assert read(tmp_path / "a.parquet", name).documents == TEXTS * 200


@pytest.mark.parametrize("piece_bytes", [7, 40, 64])
def test_long_lines_and_texts(piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes before and after them, and wherever a text is cut."""
    monkeypatch.setattr(readers, "PIECE_BYTES", piece_bytes)
    content = b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n \r\n" + b" " * 100 + b"\n") + LINES
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + "é🎉\n\t".encode() * 50)
    assert read(tmp_path).documents == TEXTS * 2 + ["é🎉\n\t" * 50]


def _parquet(**columns: pa.Array) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue().to_pybytes())


def _arrow(new: Any, **columns: pa.Array) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.table(columns)
    with new(sink, table.schema) as writer:
        writer.write_table(table, 30)
    return bytes(sink.getvalue().to_pybytes())


LONG_TEXTS = [os.urandom(2000).hex() for _ in range(50)]
LONG = json_lines(LONG_TEXTS)
GZ, ZST = gzip.compress(LONG), zstandard.compress(LONG)
PARQUET = _parquet(text=pa.array(["a", "b"] * 50), n=pa.array(range(100)))
XZ, BZ2 = lzma.compress(LONG), bz2.compress(LONG)
ARROW_STREAM, ARROW_FILE = (
    _arrow(new, n=pa.array(range(100)), text=pa.array(["a", "b"] * 50))
    for new in (pa.ipc.new_stream, pa.ipc.new_file)
)
STREAMS = [json_lines(LONG_TEXTS[begin:end]) for begin, end in ((0, 20), (20, 40), (40, 50))]
XZ_3, BZ2_3 = [lzma.compress(text) for text in STREAMS], [bz2.compress(text) for text in STREAMS]


def _joined(streams: list[bytes], at: int) -> bytes:
    """The streams of a file, with another byte at `at` of the second."""
    damaged = bytearray(streams[1])
    damaged[at] ^= 1
    return b"".join((streams[0], damaged, *streams[2:]))


BAD_XZ, BAD_BZ2 = "a.jsonl.xz: truncated or damaged xz", "a.jsonl.bz2: truncated or damaged bzip2"
# name, content, message, and how many documents are kept when it is skipped (None: some)
BAD_FILES: dict[str, tuple[str, bytes, str, int | None]] = {
    "truncated gz": ("a.jsonl.gz", GZ[:-9], "a.jsonl.gz: truncated or damaged gzip", None),
    "half a gz": ("a.jsonl.gz", GZ[: len(GZ) // 2], "a.jsonl.gz: truncated or damaged gzip", None),
    "damaged gz": ("a.jsonl.gz", GZ[:-5] + b"x" + GZ[-4:], "a.jsonl.gz: truncated or damaged gzip", None),
    "not a gz": ("a.txt.gz", LINES, "a.txt.gz: truncated or damaged gzip", 0),
    "truncated zst": ("a.jsonl.zst", ZST[:-9], "a.jsonl.zst: truncated or damaged zstd", None),
    "half a zst": ("a.txt.zst", ZST[: len(ZST) // 2], "a.txt.zst: truncated or damaged zstd", 0),
    "not a zst": ("a.jsonl.zst", LINES, "a.jsonl.zst: truncated or damaged zstd", 0),
    "not JSON": ("a.jsonl", LINES + b"{oops\n", "a.jsonl: line 6 is not JSON", 5),
    "cut JSON": ("a.jsonl", LINES[:-4], "a.jsonl: line 5 is not JSON", 4),
    "pretty JSON": ("a.json", b'{\n"text": "a"\n}\n', "a.json: line 1 is not JSON", 0),
    "deep JSON": ("a.jsonl", b'{"a":' * 200_000 + b"\n", "a.jsonl: line 1 is not JSON", 0),
    "an array": ("a.jsonl", LINES + b'["text"]\n', "a.jsonl: line 6 is an array, not a JSON object", 5),
    "one array": (
        "a.json",
        b' [{"text": "a"},\n{"text": "b"}]',
        "a.json: is a JSON array, not JSON Lines",
        0,
    ),
    "truncated xz": ("a.jsonl.xz", XZ[:-9], "a.jsonl.xz: truncated or damaged xz", None),
    "not an xz": ("a.csv.xz", LINES, "a.csv.xz: truncated or damaged xz", 0),
    "damaged bz2": ("a.txt.bz2", BZ2[:200] + b"x" + BZ2[201:], "a.txt.bz2: truncated or damaged bzip2", 0),
    "half a bz2": ("a.txt.bz2", BZ2[: len(BZ2) // 2], "a.txt.bz2: truncated or damaged bzip2", 0),
    "2nd xz's header": ("a.jsonl.xz", _joined(XZ_3, 1), BAD_XZ, 20),
    "2nd xz's block": ("a.jsonl.xz", _joined(XZ_3, 13), BAD_XZ, 20),
    "2nd xz's index": ("a.jsonl.xz", _joined(XZ_3, -13), BAD_XZ, None),
    "2nd bz2's header": ("a.jsonl.bz2", _joined(BZ2_3, 1), BAD_BZ2, 20),
    "2nd bz2's block": ("a.jsonl.bz2", _joined(BZ2_3, 5000), BAD_BZ2, 20),
    "3rd xz truncated": ("a.jsonl.xz", b"".join(XZ_3)[:-9], BAD_XZ, None),
    "3rd bz2 truncated": ("a.jsonl.bz2", b"".join(BZ2_3)[:-5000], BAD_BZ2, 40),
    "3rd xz, 5 bytes": ("a.jsonl.xz", b"".join(XZ_3[:2]) + XZ_3[2][:5], BAD_XZ, 40),
    "not an xz behind one": ("a.jsonl.xz", XZ + LINES, BAD_XZ, 50),
    "not a bz2 behind one": ("a.jsonl.bz2", BZ2 + LINES, BAD_BZ2, 50),
    "odd xz padding": ("a.jsonl.xz", XZ + bytes(6), BAD_XZ, 50),
    "empty bz2": ("a.jsonl.bz2", b"", BAD_BZ2, 0),
    "no CSV column": ("a.csv", b"id,body\n1,a\n", "a.csv: has no column 'text' .it has 'id', 'body'.", 0),
    "few CSV columns": (
        "a.csv",
        b"id,text\n1,a\n2\n3,c\n",
        "a.csv: line 3 has 1 columns, the first line 2",
        2,
    ),
    "many CSV columns": ("a.csv", b"text\na\nb, c\n", "a.csv: line 3 has 2 columns, the first line 1", 1),
    "open quotes": ("a.csv", b'text\na\n"b\nc\n', "a.csv: line 4 is not CSV .unexpected end of data", 1),
    "CSV not UTF-8": ("a.tsv", b"text\tn\na\t1\n\xff\t2\n", "a.tsv: line 3 is not valid UTF-8", 1),
    "cut Arrow": (
        "a.arrow",
        ARROW_STREAM[: len(ARROW_STREAM) // 2],
        "a.arrow: damaged or not an Arrow file",
        30,
    ),
    "cut Arrow file": ("a.arrow", ARROW_FILE[:-9], "a.arrow: damaged or not an Arrow file", 0),
    "no Arrow column": (
        "a.arrow",
        _arrow(pa.ipc.new_stream, body=pa.array(["a"])),
        "no column 'text' .it has 'body'",
        0,
    ),
    "a string": ("a.jsonl", LINES + b"\n" + b'"text"\n', "a.jsonl: line 7 is text, not a JSON object", 5),
    "no field": (
        "a.jsonl",
        LINES + b'{"txt": ""}\n',
        "a.jsonl: line 6 lacks the field 'text' .it has 'txt'",
        5,
    ),
    "a number": ("a.jsonl", LINES + b'{"text": 5}\n', "a.jsonl: line 6: 'text' is a number, not text", 5),
    "null": ("a.jsonl", LINES + b'{"text": null}\n', "a.jsonl: line 6: 'text' is null, not text", 5),
    "not UTF-8": ("a.jsonl", LINES + b'{"text": "\xff"}\n', "a.jsonl: line 6 is not valid UTF-8", 5),
    "surrogate": (
        "a.jsonl",
        LINES + b'{"text": "a\\ud83d"}\n',
        "a.jsonl: line 6: 'text' holds half of a surro",
        5,
    ),
    "UTF-16": ("a.txt", "text\n".encode("utf-16"), "a.txt: line 1 is not valid UTF-8", 0),
    "text not UTF-8": ("a.txt", b"a\nb\nc\xe9\n", "a.txt: line 3 is not valid UTF-8", 0),
    "half a character": ("a.txt", b"a\nb\nc\xc3", "a.txt: line 3 is not valid UTF-8", 0),
    "in gz": ("a.jsonl.gz", gzip.compress(LINES + b"x\n"), "a.jsonl.gz: line 6 is not JSON", 5),
    "no column": (
        "a.parquet",
        _parquet(body=pa.array(["a"])),
        "a.parquet: has no column 'text' .it has 'body'",
        0,
    ),
    "numbers": ("a.parquet", _parquet(text=pa.array([1])), "a.parquet: column 'text' is int64, not text", 0),
    "null in Parquet": (
        "a.parquet",
        _parquet(text=pa.array(["a"] * 700 + [None, "b"])),
        "a.parquet: row 700 .counted from 0. has no 'text'",
        701,
    ),
    "Parquet not UTF-8": (
        "a.parquet",
        _parquet(text=pa.array([b"a", b"\xff", b"c"]).view(pa.string())),
        "a.parquet: row 1 .counted from 0.: 'text' is not valid UTF-8",
        2,
    ),
    "cut Parquet": ("a.parquet", PARQUET[:-20], "a.parquet: damaged or not a Parquet file", 0),
    "damaged Parquet": (
        "a.parquet",
        PARQUET[:4] + b"\xff" * 30 + PARQUET[34:],
        "a.parquet: damaged or not",
        0,
    ),
    "empty Parquet": ("a.parquet", b"", "a.parquet: damaged or not a Parquet file", 0),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(case: str, tmp_path: Path) -> None:
    name, content, message, _ = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_skipped(case: str, tmp_path: Path) -> None:
    """What is before and after a bad line, and what is before damage, stays; each counts once."""
    name, content, message, count = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    kept = read(tmp_path / name, skip=True)
    assert all(re.search(message.replace("line 1 ", r"line \d "), error) for error in kept.errors)
    if count is None:
        assert len(kept.errors) == 1 and 0 < len(kept.documents) <= 50
        assert kept.documents == LONG_TEXTS[: len(kept.documents)]
    else:
        assert len(kept.documents) == count
        assert len(kept.errors) == (3 if case == "pretty JSON" else 1)


def test_a_line_that_ends_inside_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"text": "a"}\xc3')
    with pytest.raises(UserError, match=r"a\.jsonl: line 6 is not valid UTF-8"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("case", [case for case in BAD_FILES if "JSON" in case or BAD_FILES[case][3] == 5])
def test_a_long_bad_line_is_named_as_a_short_one(case: str, end: bytes, tmp_path: Path) -> None:
    """Behind 3 MB of spaces, which JSON allows."""
    name, content, message, count = BAD_FILES[case]
    lines = (gzip.decompress(content) if name.endswith(".gz") else content).splitlines(keepends=True)
    content = b"".join(lines[:-1]) + b" " * 3_000_000 + lines[-1].rstrip(b"\n") + end
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)
    assert len(read(tmp_path / name, skip=True).documents) == count


def _line_of(size: int, text: str) -> bytes:
    """A line of `size` bytes with its end of line."""
    return json.dumps({"text": text.ljust(size - len(json_lines([""])), ".")}).encode() + b"\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("over", [1, 2, 19, 1000])
def test_a_line_over_the_limit_is_left_out_whole(
    name: str, over: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of the limit are read. What follows the limit in a longer line is no line, whatever it looks like."""
    monkeypatch.setattr(readers, "LONGEST_LINE_BYTES", 100)
    monkeypatch.setattr(readers, "PIECE_BYTES", 7)
    ghost = (b" " * 101 + b'{"text": "GHOST"}' + b"\xff" * 2000)[: 99 + over] + b"\n"
    assert len(ghost) == 100 + over
    content = _line_of(100, "first") + ghost + _line_of(100 + over, "long") + _line_of(100, "last").rstrip()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(content))
    with pytest.raises(UserError, match=rf"{name}: line 2 is longer than 0\.0001 MB, the most .* \.txt file"):
        read(tmp_path / name)
    kept = read(tmp_path / name, skip=True)
    assert [text.rstrip(".") for text in kept.documents] == ["first", "last"]
    assert [error.split(" is ")[0] for error in kept.errors] == [
        f"{tmp_path / name}: line 2",
        f"{tmp_path / name}: line 3",
    ]


def test_a_last_line_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an end of line; and a text file has no limit."""
    monkeypatch.setattr(readers, "LONGEST_LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(_line_of(102, "long").rstrip())
    (tmp_path / "b.txt").write_bytes(b"long" * 1000)
    kept = read(tmp_path, skip=True)
    assert kept.documents == ["long" * 1000]
    assert len(kept.errors) == 1 and "a.jsonl: line 1 is longer than" in kept.errors[0]


def test_all_lines_before_the_damage_are_kept(tmp_path: Path) -> None:
    """Of gzip all complete lines that can be decompressed; of zstd all but at most 64 KiB before the damage."""
    (tmp_path / "a.jsonl.gz").write_bytes(GZ[:-9])  # the last block lacks a byte and the checksum
    assert len(read(tmp_path / "a.jsonl.gz", skip=True).documents) >= 49
    blocks = zstandard.ZstdCompressor(write_checksum=True).compress(LONG)
    (tmp_path / "b.jsonl.zst").write_bytes(blocks[:-3])
    assert len(read(tmp_path / "b.jsonl.zst", skip=True).documents) >= 50 - (65536 // 4000) - 1


def test_damage_in_the_second_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [os.urandom(500).hex() for _ in range(200)]
    pq.write_table(
        pa.table({"text": texts}), path, row_group_size=100, compression="zstd", use_dictionary=False
    )
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    kept = read(path, skip=True)
    assert kept.documents == texts[:100]
    assert len(kept.errors) == 1 and "damaged or not a Parquet file" in kept.errors[0]


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    files = find_files(str(tmp_path), "k")
    (tmp_path / "a.jsonl").unlink()
    kept = Kept(skip=True)
    for file in files:
        read_documents(file, "text", kept)
    assert kept.documents == TEXTS
    assert len(kept.errors) == 1 and re.search("a.jsonl: cannot be read .No such file", kept.errors[0])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.zst", "a.parquet"])
def test_too_few_descriptors_are_no_damage(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(
        {"a.jsonl": LINES, "a.jsonl.gz": GZ, "a.txt.zst": ZST, "a.parquet": PARQUET}[name]
    )
    assert read(tmp_path / name, skip=True).errors == []  # everything is imported
    (file,) = find_files(str(tmp_path / name), "k")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(OSError, match=f"Too many open files: .*{name}"):
            read_documents(file, "text", Kept(skip=True))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


SHORT_OF_MEMORY = """
import resource, sys
import pyarrow
from mf_train.data.files.input_files import find_files
from mf_train.data.text.readers import read_documents
from tests.data.text.test_readers import Kept
with open("/proc/self/statm") as statm:
    limit = int(statm.read().split()[0]) * resource.getpagesize() + (50 << 20)
if sys.argv[2] == "Arrow":  # whose own pool has room left
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
(file,) = find_files(sys.argv[1], "k")
try:
    read_documents(file, "text", Kept(skip=True))
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("whose", ["Arrow", "Python"])
def test_too_little_memory_is_no_damage(whose: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a" * (100 << 20)]}), path, compression="zstd", use_dictionary=False)
    assert run_python(SHORT_OF_MEMORY, path, whose) == f"[Errno 12] Cannot allocate memory: '{path}'\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_that_shrinks_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(LINES if name == "a.jsonl" else PARQUET)
    (file,) = find_files(str(tmp_path / name), "k")
    (tmp_path / name).write_bytes(LINES[: LINES.index(b"\n") + 1])
    with pytest.raises(UserError, match=rf"{name} ended early: at byte \d+ of \d+"):
        read_documents(file, "text", Kept(skip=True))
