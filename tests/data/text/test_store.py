"""Prepared text is the documents, whoever prepares it and whatever happens meanwhile."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mf_train.data.files.input_files import InputFile, find_files
from mf_train.data.text import readers
from mf_train.data.text import store as text_store
from mf_train.data.text.store import StoredDocuments, open_documents, parts_of, prepare_part
from mf_train.errors import UserError
from tests.data.texts import json_lines, random_documents, write_json_lines
from tests.processes import result, start_python

TEXTS = ["2024-01-01 12:00:00", "é🎉\n\tz\u2028 \u2581", "17", "null"]


def open_path(
    path: Path | str, cache: Path, on_error: str = "raise", text_field: str = "text"
) -> StoredDocuments:
    files = find_files(str(path), "data.train[0]")
    return open_documents(files, text_field, on_error, cache, str(path), "data.train[0]")  # type: ignore[arg-type]


def texts_of(documents: StoredDocuments) -> list[str]:
    return [documents.text(i).decode() for i in range(len(documents))]


def test_documents(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", ["", *TEXTS[:2], "", ""])
    write_json_lines(tmp_path / "b.jsonl", TEXTS[2:])
    documents = open_path(tmp_path, tmp_path / "cache")
    assert texts_of(documents) == TEXTS  # no empty ones
    assert (documents.name, documents.files, documents.skipped) == (str(tmp_path), 2, {})
    assert documents.num_bytes == sum(len(text.encode()) for text in TEXTS)
    utf8 = TEXTS[1].encode()
    assert documents.length(1) == len(utf8)
    assert documents.text(1, 4) == utf8[4:] and documents.text(1, 4, 3) == utf8[4:7]
    assert documents.text(1, 4, 1000) == utf8[4:] and documents.text(1, 1000) == b""
    for outside in (-1, 4):
        with pytest.raises(IndexError, match="has 4 documents"):
            documents.text(outside)
        with pytest.raises(IndexError, match="has 4 documents"):
            documents.length(outside)


def test_many_parts_and_blocks_in_random_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_store, "_PART_BYTES", 20_000)
    monkeypatch.setattr(text_store, "_BLOCKS_KEPT", 3)
    monkeypatch.setattr(text_store, "_ENDS_AT_ONCE", 10)
    texts = random_documents(1500, 1, 40)
    for number, begin in enumerate(range(0, 1500, 200)):
        write_json_lines(tmp_path / f"{number}.jsonl", texts[begin : begin + 200])
    documents = open_path(tmp_path, tmp_path / "cache")
    expected = [text for text in texts if text]
    assert len(list((tmp_path / "cache" / "text").glob("*.meta"))) >= 5
    assert len(documents) == len(expected)
    for i in random.Random(0).sample(range(len(expected)), len(expected)):
        assert documents.text(i).decode() == expected[i]
        assert documents.length(i) == len(expected[i].encode())


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(pattern: str, **settings: str) -> str:
        return open_path(tmp_path / pattern, tmp_path / "cache", **settings).fingerprint

    lines = json_lines(TEXTS).splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines) + json_lines([""])))
    (tmp_path / "1-shard.jsonl").write_bytes(b"".join(lines[:2]))
    (tmp_path / "2-shard.jsonl").write_bytes(b"".join(lines[2:]))
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "c.parquet")
    (tmp_path / "other.jsonl").write_bytes(b"".join(lines).replace(b'"17"', b'"18"'))
    (tmp_path / "order.jsonl").write_bytes(b"".join(reversed(lines)))
    same = {fingerprint("a.jsonl"), fingerprint("b.jsonl.gz"), fingerprint("*-shard.jsonl")}
    same.add(fingerprint("c.parquet", text_field="body"))
    assert len(same) == 1
    assert len(same | {fingerprint("other.jsonl"), fingerprint("order.jsonl")}) == 3


def test_a_changed_file_field_or_policy_is_read_again(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(b'{"text": "1", "body": "b"}\n')
    assert texts_of(open_path(path, cache)) == ["1"]
    assert texts_of(open_path(path, cache, text_field="body")) == ["b"]
    path.write_bytes(b'{"text": "2", "body": "b"}\n')
    os.utime(path, ns=(1, 1))
    assert texts_of(open_path(path, cache)) == ["2"]
    path.write_bytes(b'{"text": "2"}\n{oops')
    assert texts_of(open_path(path, cache, on_error="skip")) == ["2"]
    with pytest.raises(UserError, match="line 2 is not JSON"):
        open_path(path, cache)


def test_what_is_prepared_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_json_lines(path, ["1"])
    stamp = path.stat().st_mtime_ns
    assert texts_of(open_path(path, tmp_path / "cache")) == ["1"]
    write_json_lines(path, ["2"])
    os.utime(path, ns=(stamp, stamp))
    assert texts_of(open_path(path, tmp_path / "cache")) == ["1"]
    (text,) = (tmp_path / "cache" / "text").glob("*.text")
    text.write_bytes(b"")  # a cache that lost bytes is not used
    assert texts_of(open_path(path, tmp_path / "cache")) == ["2"]
    for suffix in ("meta", "ends", "text"):
        (damaged,) = (tmp_path / "cache" / "text").glob(f"*.{suffix}")
        damaged.unlink()
        assert texts_of(open_path(path, tmp_path / "cache")) == ["2"]


def test_parts_depend_on_sizes_alone() -> None:
    mebibyte = 1 << 20
    sizes = [mebibyte, 60 * mebibyte, 3 * mebibyte, 1, 200 * mebibyte, 0, 5, -1, 7]
    files = [InputFile(f"{number}.jsonl", size, "") for number, size in enumerate(sizes)]
    groups = [[files.index(file) for file in group] for group in parts_of(files)]
    assert groups == [[0, 1, 2], [3], [4], [5, 6], [7], [8]]
    assert parts_of([]) == [] and parts_of(files[5:6]) == [files[5:6]]


def test_one_part_of_its_own(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", TEXTS)
    (group,) = parts_of(find_files(str(tmp_path), "k"))
    part = prepare_part(group, "text", "raise", tmp_path / "work")
    assert (part.documents, part.num_bytes) == (4, sum(len(text.encode()) for text in TEXTS))
    assert texts_of(StoredDocuments("x", [part], 1)) == TEXTS
    assert prepare_part(group, "text", "raise", tmp_path / "work") == part
    part.remove()
    assert list((tmp_path / "work").iterdir()) == []


def test_skipped_documents_are_counted_per_file(tmp_path: Path) -> None:
    good = json_lines(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(b"{oops\n" + good + b'{"txt": 1}\n')
    (tmp_path / "b.jsonl").write_bytes(good)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(good)[:-6])
    (tmp_path / "d.txt").write_bytes(b"\xff")
    documents = open_path(tmp_path, tmp_path / "cache", "skip")
    assert texts_of(documents) == TEXTS * 3
    expected = {"a.jsonl": 2, "c.jsonl.gz": 1, "d.txt": 1}
    assert documents.skipped == {str(tmp_path / name): count for name, count in expected.items()}
    assert open_path(tmp_path, tmp_path / "cache", "skip").skipped == documents.skipped
    with pytest.raises(UserError, match=r"a\.jsonl: line 1 is not JSON"):
        open_path(tmp_path, tmp_path / "cache")


def test_a_source_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"txt": 1}\n' * 3)
    with pytest.raises(
        UserError, match=r"data.train\[0\]: no document of .* can be read: .*lacks the field 'text'"
    ):
        open_path(tmp_path, tmp_path / "cache", "skip")
    (tmp_path / "a.jsonl").write_bytes(b"\n" + json_lines([""]))
    assert len(open_path(tmp_path, tmp_path / "cache", "skip")) == 0


def test_the_bad_file_of_many_is_named(tmp_path: Path) -> None:
    content = gzip.compress(json_lines(TEXTS))
    for number in range(5):
        (tmp_path / f"{number}.jsonl.gz").write_bytes(content if number != 3 else content[:-6])
    with pytest.raises(UserError, match=r"3\.jsonl\.gz: truncated"):
        open_path(tmp_path, tmp_path / "cache")
    assert [found.suffix for found in (tmp_path / "cache" / "text").iterdir()] == [".lock"]
    (tmp_path / "3.jsonl.gz").write_bytes(content)
    assert texts_of(open_path(tmp_path, tmp_path / "cache")) == TEXTS * 5


def test_a_cut_cache_is_named_when_it_is_read(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", TEXTS)
    documents = open_path(tmp_path / "a.jsonl", tmp_path / "cache")
    assert documents.text(0).decode() == TEXTS[0]
    (text,) = (tmp_path / "cache" / "text").glob("*.text")
    os.truncate(text, 10)
    with pytest.raises(UserError, match=r"\.text ended early: .* it was 10 bytes"):
        documents.text(3)


# Processes -----------------------------------------------------------------------------------------------------------

OPEN = """
import sys
from mf_train.data.text import store as text_store
from mf_train.data.files.input_files import find_files
from mf_train.errors import UserError
text_store._PART_BYTES = 100_000
path, cache = sys.argv[1:3]
try:
    documents = text_store.open_documents(find_files(path, "k"), "text", "raise", cache, path, "k")
    print(len(documents), documents.fingerprint)
except UserError as error:
    print("UserError:", error)
"""


def start(path: Path | str, cache: Path, code: str = OPEN) -> subprocess.Popen[str]:
    return start_python(code, path, cache)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """20 files of 60 kB."""
    for number in range(20):
        texts = [f"{number} {text}" for text in random_documents(200, number, 60)]
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{number:02}.jsonl.gz").write_bytes(gzip.compress(json_lines(texts), 0))
    return tmp_path / "corpus"


# Says how many parts it wrote itself.
COUNTING = (
    OPEN.replace(
        "path, cache =",
        """
written, write = [], text_store._write_part
def count(*arguments):
    written.append(1)
    return write(*arguments)
text_store._write_part = count
path, cache =""",
    )
    + "print(len(written))"
)


def test_processes_share_the_work(corpus: Path, tmp_path: Path) -> None:
    processes = [start(corpus, tmp_path / "cache", COUNTING) for _ in range(4)]
    results, written = zip(*(result(process).splitlines() for process in processes), strict=True)
    assert len(set(results)) == 1 and results[0].startswith("4000 ")
    assert sum(map(int, written)) == len(list((tmp_path / "cache" / "text").glob("*.meta")))
    suffixes = sorted(found.suffix for found in (tmp_path / "cache" / "text").iterdir())
    assert suffixes.count(".meta") == suffixes.count(".text") == suffixes.count(".ends") > 5
    assert ".tmp" not in suffixes


# Holds the lock of every part it writes for ever, after it has written something.
HANGING = OPEN.replace(
    "path, cache =",
    """
import time
def hang(self):
    self._text_file.flush()
    print("hanging", flush=True)
    time.sleep(600)
text_store._PartWriter.finish = hang
path, cache =""",
)


def test_a_killed_process_does_not_hold_up_the_others(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_store, "_PART_BYTES", 100_000)
    parts = len(parts_of(find_files(str(corpus), "k")))
    killed = start(corpus, tmp_path / "cache", HANGING)
    assert killed.stdout is not None and killed.stdout.readline() == "hanging\n"
    waiting = start(corpus, tmp_path / "cache")
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cache" / "text").glob("*.meta"))) < parts - 1:
        assert time.monotonic() < deadline, "it waits though there is more to do"
        time.sleep(0.05)
    time.sleep(0.3)
    assert waiting.poll() is None  # for the part that the other holds
    assert len(list((tmp_path / "cache" / "text").glob("*.tmp"))) == 2
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert result(waiting).startswith("4000 ")
    assert list((tmp_path / "cache" / "text").glob("*.tmp")) == []


def test_another_node_is_not_written_over(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks hold within a node only, two may write the same part: under names of their own."""
    other = start(corpus, tmp_path / "cache", HANGING)
    assert other.stdout is not None and other.stdout.readline() == "hanging\n"
    other.send_signal(signal.SIGKILL)
    other.communicate()
    temporaries = list((tmp_path / "cache" / "text").glob("*.tmp"))
    assert len(temporaries) == 2
    assert all(found.name.endswith(f".{socket.gethostname()}.tmp") for found in temporaries)
    for found in temporaries:
        found.rename(str(found).replace(socket.gethostname(), "another-node"))
    assert result(start(corpus, tmp_path / "cache")).startswith("4000 ")
    left = [found.name for found in (tmp_path / "cache" / "text").glob("*.tmp")]
    assert len(left) == 2 and all("another-node" in name for name in left)


# The kernel answers flock as a file system does that lacks it (seccomp: load the call's number, compare, return).
NO_FLOCK = (
    """
import ctypes, errno, platform, struct
flock = {"x86_64": 73, "aarch64": 32}[platform.machine()]
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, flock), (6, 0, 0, 0x50000 | errno.ENOSYS), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
"""
    + OPEN
)


def test_a_file_system_without_locks_is_named(corpus: Path, tmp_path: Path) -> None:
    """A soft lock would be left for ever by a process that is killed."""
    printed = result(start(corpus, tmp_path / "cache", NO_FLOCK))
    assert re.fullmatch(
        r"UserError: the cache .*/cache/text cannot be used \(flock: Function not implemented\): "
        r"set data\.cache to a folder on a disk of the node, or on a file system that has flock\n",
        printed,
    )


FULL = (
    "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))" + OPEN
)


def test_a_full_disk_is_named(corpus: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    printed = result(start(corpus, tmp_path / "cache", FULL))
    assert printed == (
        f"UserError: the cache {tmp_path}/cache/text cannot be used (it is full): "
        "set data.cache to a folder with enough free space\n"
    )
    assert {found.suffix for found in (tmp_path / "cache" / "text").iterdir()} == {".lock"}
    assert result(start(corpus, tmp_path / "cache")).startswith("4000 ")


def test_an_unusable_cache_is_named(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the cache .*file/text cannot be used .*: set data.cache"):
        open_path(tmp_path / "a.jsonl", tmp_path / "file")


MEMORY = """
import resource, sys
from mf_train.data.files.input_files import find_files
from mf_train.data.text import readers
from mf_train.data.text.store import open_documents, prepare_part
paths, cache = sys.argv[1].split(":"), sys.argv[2]
readers.LONGEST_LINE_BYTES = LIMIT
import pyarrow, filelock, fsspec, mf_train.data.text.arrow
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
for path in paths:
    before = peak()
    documents = open_documents(find_files(path, "k"), "text", "skip", cache, path, "k")
    longest = max(documents.length(i) for i in range(len(documents)))
    print(len(documents), longest, peak() - before, flush=True)
"""


def _write_long_documents(folder: Path, size: int) -> tuple[list[Path], list[Path]]:
    """Files of text and of lines: a document of `size` bytes, among short ones; a line with as much in other fields."""
    sentence = 'naïve "quoted" back\\slash,\nline 🎉 '
    long = sentence * (size // len(sentence.encode()))
    line, ascii_line = (json.dumps({"text": long}, ensure_ascii=ascii) + "\n" for ascii in (False, True))
    short = json_lines(["short"])
    other = (
        json.dumps({"meta": {"other": long, "list": [1, {"a": None}] * (size // 200)}, "text": "t"}) + "\n"
    )
    contents = {
        "a.jsonl": short + line.encode() + short,
        "b.jsonl": short + ascii_line.encode() + short,
        "c.jsonl": other.encode() + short,
        "d.jsonl": short + line.encode().rstrip()[:-1] + b"\n" + short,  # not JSON, which shows at its end
        "e.jsonl.gz": gzip.compress(short + line.encode(), 1),
        "f.txt": long.encode(),
        "g.txt.gz": gzip.compress(long.encode(), 1),
        "h.jsonl.zst": zstandard.compress(short + line.encode()),
    }
    texts, lines = [], []
    for name, content in contents.items():
        (texts if ".txt" in name else lines).append(folder / name)
        (folder / name).write_bytes(content)
    return texts, lines


def _growth(limit: int, paths: list[Path], cache: Path) -> tuple[list[int], list[int], list[int]]:
    """Of each file: documents, the bytes of the longest, and kB by which opening it raised the process's peak."""
    code = MEMORY.replace("LIMIT", str(limit))
    process = start(":".join(map(str, paths)), cache, code)
    counts, longest, growth = zip(
        *[map(int, line.split()) for line in result(process).splitlines()], strict=True
    )
    return list(counts), list(longest), list(growth)


def _check_memory(size: int, tmp_path: Path) -> None:
    texts, lines = _write_long_documents(tmp_path, size)
    counts, longest, growth = _growth(10_000_000, texts + lines, tmp_path / "limited")
    assert counts == [1, 1, 2, 2, 1, 2, 1, 1]  # the long lines are left out
    assert [length > 0.95 * size for length in longest] == [True] * 2 + [False] * 6
    assert sum(growth) < 96 << 10, f"kB: {growth}"
    counts, longest, growth = _growth(readers.LONGEST_LINE_BYTES, lines, tmp_path / "cache")
    assert counts == [3, 3, 2, 2, 2, 2]
    assert [length > 0.95 * size for length in longest] == [True, True, False, False, True, True]
    assert sum(growth) < 15 * size >> 10, f"kB: {growth}"


def test_long_documents_need_bounded_memory(tmp_path: Path) -> None:
    _check_memory(30_000_000, tmp_path)


@pytest.mark.slow
def test_very_long_documents_need_bounded_memory(tmp_path: Path) -> None:
    _check_memory(150_000_000, tmp_path)


def test_a_line_over_the_limit_counts_as_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert readers.LONGEST_LINE_BYTES == 256_000_000
    monkeypatch.setattr(readers, "LONGEST_LINE_BYTES", 1000)
    path = write_json_lines(tmp_path / "a.jsonl", ["a", "b" * 1000, "c", "d" * 5000, "e"])
    with pytest.raises(UserError, match=r"a\.jsonl: line 2 is longer than 0\.001 MB"):
        open_documents(find_files(path, "k"), "text", "raise", tmp_path / "cache", path, "k")
    documents = open_documents(find_files(path, "k"), "text", "skip", tmp_path / "cache", path, "k")
    assert [documents.text(i) for i in range(len(documents))] == [b"a", b"c", b"e"]
    assert documents.skipped == {path: 2}


def as_user(user: int, path: Path, cache: Path) -> str:
    """What opening the path gives a member of group 2000: the number of documents, or the error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.umask(0o022)
        os.setgroups([])
        os.setgid(2000)
        os.setuid(user)
        try:
            said = str(len(open_path(path, cache)))
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        return pipe.read()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may be two users")
def test_a_group_shares_a_cache() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        root = Path(name)
        root.chmod(0o755)
        for number in (1, 2):
            write_json_lines(root / f"{number}.jsonl", TEXTS[:number])
        for folder, mode in (("group", 0o2775), ("alone", 0o755)):
            (root / folder).mkdir()
            os.chown(root / folder, 1001, 2000)
            (root / folder).chmod(mode)
            assert as_user(1001, root / "1.jsonl", root / folder) == "1"
            assert as_user(1002, root / "1.jsonl", root / folder) == "1"  # what is there can be read
        (left,) = (root / "group" / "text").glob("*.text")
        left.with_name(f"{left.name}.{socket.gethostname()}.tmp").write_bytes(b"of a process that was killed")
        (root / "group" / "text" / f"{left.stem}.meta").unlink()
        assert as_user(1002, root / "1.jsonl", root / "group") == "1"
        assert as_user(1002, root / "2.jsonl", root / "group") == "2"
        error = as_user(1002, root / "2.jsonl", root / "alone")
        assert (
            "alone/text cannot be used (Permission denied): set data.cache to a folder that this user may"
            in error
        )
