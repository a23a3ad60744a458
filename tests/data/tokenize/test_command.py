"""Text to token shards: the tokens of the other road, the same bytes whoever works, and nothing lost when killed."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mf_train.cli import main
from mf_train.config import Config, DataConfig, SourceConfig, TokenizerConfig
from mf_train.data.files.input_files import find_files
from mf_train.data.shards.token_files import TokenFiles, open_token_files
from mf_train.data.sources import open_source
from mf_train.data.stream.stream import TokenStream
from mf_train.data.text.store import prepare_part
from mf_train.data.tokenize.command import tokenize
from mf_train.data.tokenize.worker import Encode, Workers
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import TrainingError, UserError
from tests.data.texts import json_lines, random_documents, write_json_lines
from tests.processes import is_running, result, start_python, wait_until

TEXTS = random_documents(300, seed=7)
SHARD_BYTES = 20_000


def configure(
    tokenizer: Tokenizer, train: list[str], validation: tuple[str, ...] = (), **data: Any
) -> Config:
    return Config(
        data=DataConfig(
            train=tuple(SourceConfig(path=path) for path in train),
            validation=tuple(SourceConfig(path=path) for path in validation),
            **data,
        ),
        tokenizer=TokenizerConfig(path=str(tokenizer.path)),
    )


def make(config: Config, output: Path, workers: int = 1, shard_bytes: int = SHARD_BYTES) -> list[str]:
    return list(tokenize(config, output, workers, shard_bytes))


def open_output(folder: Path, tokenizer: Tokenizer) -> TokenFiles:
    return open_token_files(
        sorted(folder.glob("*.bin")),
        tokenizer.end_of_text_id,
        tokenizer.vocab_size,
        "raise",
        str(folder),
        "data.train[0]",
        tokenizer.fingerprint,
    )


def shard_bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


def documents_of(source: Any) -> list[list[int]]:
    """Every document's tokens, read in order."""
    found: list[list[int]] = [[] for _ in range(source.num_documents)]
    document = start = 0
    while document < source.num_documents:
        chunk = source.read(range(document, source.num_documents), start, 10_000)
        pieces = np.split(chunk.tokens, chunk.offsets[1 : len(chunk.places)])
        for (index, _), piece in zip(chunk.places, pieces, strict=True):
            found[document + index] += piece.tolist()
        document, start = document + chunk.end[0], chunk.end[1]
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_json_lines(tmp_path_factory.mktemp("text") / "a.jsonl", TEXTS)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, text: str) -> Path:
    """The shards of `text`, made by one worker."""
    folder = tmp_path_factory.mktemp("output") / "new"
    make(configure(tokenizer, [text]), folder)
    return folder


def test_both_roads_give_the_same_tokens(
    output: Path, text: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = DataConfig(cache=str(tmp_path))
    raw = open_source(SourceConfig(path=text), "data.train[0]", data, tokenizer)
    made = open_source(SourceConfig(path=str(output / "train-0")), "data.train[0]", data, tokenizer)
    assert isinstance(made, TokenFiles) and not isinstance(raw, TokenFiles)
    assert made.num_files > 2 and made.num_documents == raw.num_documents == len([t for t in TEXTS if t])
    tokens = documents_of(raw)
    assert documents_of(made) == tokens
    assert (made.num_bytes, made.num_tokens) == (raw.num_bytes, sum(map(len, tokens)))
    assert tokens[0] == [*tokenizer.encode(next(t for t in TEXTS if t)), tokenizer.end_of_text_id]


def test_both_roads_give_the_same_batches(
    output: Path, text: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    batches = []
    for path in (text, str(output / "train-0")):
        data = DataConfig(train=(SourceConfig(path=path),), cache=str(tmp_path), logical_streams=8)
        stream = TokenStream(data, tokenizer, sequence_length=64, global_batch_size=8)
        batches.append([stream.next_batch() for _ in range(60)])  # more than two epochs
    assert np.array_equal(batches[0], batches[1])


def test_long_documents_are_cut_into_the_segments_of_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Several megabytes without a space: where it is cut shows in the tokens, also between two workers' ranges."""
    random_state = np.random.default_rng(0)
    long = "".join(random_state.choice(list("abcdé"), 2_000_000).tolist())
    path = write_json_lines(tmp_path / "a.jsonl", ["short", long, "last one"])
    make(configure(tokenizer, [path]), tmp_path / "out", workers=2)
    raw = open_source(SourceConfig(path=path), "k", DataConfig(cache=str(tmp_path / "cache")), tokenizer)
    assert documents_of(open_output(tmp_path / "out" / "train-0", tokenizer)) == documents_of(raw)


def test_the_bytes_depend_on_the_text_alone(output: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Not on the workers, the files or their compression."""
    for number in range(7):
        part = json_lines(TEXTS[number * 300 // 7 : (number + 1) * 300 // 7])
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(part))
    expected = shard_bytes_of(output / "train-0")
    assert len(expected) > 4
    make(configure(tokenizer, [str(tmp_path / "*.gz")]), tmp_path / "out", workers=3)
    assert shard_bytes_of(tmp_path / "out" / "train-0") == expected


def test_the_manifest_describes_the_shards(output: Path, tokenizer: Tokenizer) -> None:
    folder = output / "train-0"
    manifest = json.loads((folder / "manifest.json").read_bytes())
    names = sorted(path.stem for path in folder.glob("*.bin"))
    assert [shard["name"] for shard in manifest["shards"]] == names == [f"{i:06}" for i in range(len(names))]
    for shard in manifest["shards"]:
        for suffix in ("bin", "idx"):
            content = (folder / f"{shard['name']}.{suffix}").read_bytes()
            assert shard[f"{suffix}_blake2b"] == hashlib.blake2b(content, digest_size=32).hexdigest()
    for shard in manifest["shards"][:-1]:  # a shard ends with the document that fills it
        assert SHARD_BYTES <= shard["text_bytes"] < SHARD_BYTES + 1000
    top = json.loads((output / "manifest.json").read_bytes())
    (source,) = top["sources"]
    for key in ("documents", "tokens", "text_bytes"):
        assert source[key] == manifest[key] == sum(shard[key] for shard in manifest["shards"])
    assert source["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert top["complete"] is manifest["complete"] is True
    assert top["tokenizer"] == manifest["tokenizer"] == tokenizer.fingerprint
    assert sorted(path.name for path in output.iterdir()) == [".lock", "manifest.json", "train-0"]


def test_what_is_printed_trains(tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    other = write_json_lines(tmp_path / "b.jsonl", ["one more", "two"])
    config = configure(tokenizer, [text, other], (other,))
    weighted = (config.data.train[0], dataclasses.replace(config.data.train[1], weight=0.25))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=weighted))
    lines = make(config, tmp_path / "out", workers=2)
    assert lines[1].startswith(f"{tmp_path / 'out' / 'train-1'}: 2 documents, ")
    data = yaml.safe_load("\n".join(lines[lines.index("train on it with:") + 1 :]))["data"]
    assert [source["weight"] for source in data["train"]] == [1.0, 0.25]
    for source, documents in zip([*data["train"], *data["validation"]], (262, 2, 2), strict=True):
        opened = open_source(SourceConfig(**source), "k", DataConfig(), tokenizer)
        assert opened.num_documents in (documents, len([t for t in TEXTS if t]))


def test_a_data_set_of_the_hub(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A folder stands for the hub, as in the tests of sources."""
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "hub" / "data" / "train.parquet")
    source = SourceConfig(hub=str(tmp_path / "hub"))
    config = dataclasses.replace(configure(tokenizer, []), data=DataConfig(train=(source,)))
    make(config, tmp_path / "out", workers=2)
    found = documents_of(open_output(tmp_path / "out" / "train-0", tokenizer))
    assert found == [[*tokenizer.encode(t), tokenizer.end_of_text_id] for t in TEXTS if t]


# A run that is killed ------------------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
from mf_train.config import Config, DataConfig, SourceConfig, TokenizerConfig
from mf_train.data.tokenize.command import tokenize
tokenizer, text, output, shard_bytes = sys.argv[1:]
config = Config(data=DataConfig(train=(SourceConfig(path=text),)), tokenizer=TokenizerConfig(path=tokenizer))
try:
    for line in tokenize(config, Path(output), 2, int(shard_bytes)):
        print(line)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """About 9 MB: seconds of work."""
    return write_json_lines(
        tmp_path_factory.mktemp("long") / "a.jsonl", random_documents(4000, 8, longest=800)
    )


def start_run(
    tokenizer: Tokenizer, text: str, output: Path, code: str = RUN, **options: Any
) -> subprocess.Popen[str]:
    """Tokenise `text` with two workers to shards of a megabyte."""
    return start_python(code, tokenizer.path, text, output, 1_000_000, **options)


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def finished_shards(output: Path) -> Iterator[Path]:
    log = output / "train-0" / ".finished.jsonl"
    for line in log.read_bytes().splitlines() if log.exists() else []:
        record = json.loads(line)
        if "shard" in record:
            yield output / "train-0" / f"{record['shard']['name']}.bin"


def test_a_killed_run_goes_on(tokenizer: Tokenizer, long_text: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shared = set(os.listdir("/dev/shm"))
    process = start_run(tokenizer, long_text, output)
    wait_until(lambda: len(list(finished_shards(output))) >= 2, "no shard was made")
    workers = children_of(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(map(is_running, workers)), "workers outlive the command", seconds=10)
    assert set(os.listdir("/dev/shm")) <= shared
    kept = {path: path.stat().st_ino for path in finished_shards(output)}
    with pytest.raises(UserError, match="tokenising was not finished"):
        open_output(output / "train-0", tokenizer)
    (output / "train-0" / ".000077.bin.partial").touch()

    config = configure(tokenizer, [long_text])
    make(config, output, workers=2, shard_bytes=1_000_000)
    assert {path: path.stat().st_ino for path in kept} == kept  # not made again
    assert len(kept) < len(list((output / "train-0").glob("*.bin")))
    make(config, tmp_path / "other", shard_bytes=1_000_000)
    assert shard_bytes_of(output / "train-0") == shard_bytes_of(tmp_path / "other" / "train-0")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_bytes()) for name in ("out", "other")]
    assert manifests[0] == manifests[1]
    assert not list(output.rglob("*.partial")) and not (output / ".text").exists()


def test_a_killed_worker_is_an_error(tokenizer: Tokenizer, long_text: str, tmp_path: Path) -> None:
    process = start_run(tokenizer, long_text, tmp_path / "out")
    wait_until(lambda: list(finished_shards(tmp_path / "out")), "no shard was made")
    worker, other = children_of(process.pid)
    os.kill(worker, signal.SIGKILL)
    said, _ = process.communicate(timeout=30)
    assert said.startswith(
        f"TrainingError process {worker} was ended by signal 9, as the system does when memory"
    )
    assert "while it tokenised documents " in said and "of data.train[0] (" in said
    assert not is_running(other)
    assert not list(tmp_path.rglob("*.partial"))


def test_an_interrupted_run_ends_its_workers(tokenizer: Tokenizer, long_text: str, tmp_path: Path) -> None:
    """As at a terminal, where the interrupt reaches every process of the group."""
    process = start_run(
        tokenizer,
        long_text,
        tmp_path / "out",
        start_new_session=True,
        # what a shell starts in the background ignores interrupts, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: list(finished_shards(tmp_path / "out")), "no shard was made")
    workers = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in said and said.count("Traceback") == 1
    assert len(workers) == 2 and not any(map(is_running, workers))
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_memory_does_not_grow_with_a_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    code = """
from mf_train.data.tokenize.worker import Workers
def peak(process):
    (line,) = (line for line in open(f"/proc/{process}/status") if line.startswith("VmHWM"))
    return int(line.split()[1])
def close(self, close=Workers.close):
    peaks.extend(peak(child.process.pid) for child in self._children)
    close(self)
Workers.close = close
peaks = []
""" + RUN + "print(peak('self'), max(peaks))"  # fmt: skip
    peaks = []
    for name, size in (("small", 10_000), ("large", 30_000_000)):
        path = str(tmp_path / f"{name}.txt")  # a line of JSON is parsed as a whole
        Path(path).write_text("a few words of it " * (size // 18))
        said = result(start_run(tokenizer, path, tmp_path / name, code))
        peaks.append([int(kilobytes) for kilobytes in said.splitlines()[-1].split()])
    (command_small, worker_small), (command_large, worker_large) = peaks
    assert command_large - command_small < 64 << 10
    assert worker_large - worker_small < 64 << 10


# Going on, or refusing to --------------------------------------------------------------------------------------------


@pytest.fixture
def copy(output: Path, tmp_path: Path) -> Path:
    """A finished output that may be changed."""
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(output), str(folder)], check=True)
    return folder


def test_a_finished_output_is_left_as_it_is(copy: Path, text: str, tokenizer: Tokenizer) -> None:
    before = {path: path.stat().st_ino for path in copy.rglob("*.bin")}
    lines = make(configure(tokenizer, [text]), copy)
    assert {path: path.stat().st_ino for path in copy.rglob("*.bin")} == before
    assert lines[0].startswith(f"{copy / 'train-0'}: ") and "path: " in lines[-2]


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_shard_that_is_lost_is_made_again(
    copy: Path, output: Path, text: str, tokenizer: Tokenizer, damage: str
) -> None:
    lost = copy / "train-0" / "000001.bin"
    if damage == "missing":
        lost.unlink()
    else:
        os.truncate(lost, 100)
    kept = (copy / "train-0" / "000000.bin").stat().st_ino
    make(configure(tokenizer, [text]), copy)
    assert shard_bytes_of(copy / "train-0") == shard_bytes_of(output / "train-0")
    assert (copy / "train-0" / "000000.bin").stat().st_ino == kept
    assert (copy / "manifest.json").read_bytes() == (output / "manifest.json").read_bytes()


def test_another_tokenisation_is_refused(copy: Path, text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = configure(tokenizer, [text])
    other = write_json_lines(tmp_path / "other.jsonl", ["a"])
    changed = write_json_lines(tmp_path / "text" / Path(text).name, TEXTS[1:])
    cases: list[tuple[Config, int, str]] = [
        (config, 30_000, r"shard_bytes was 20000 and is 30000"),
        (
            configure(tokenizer, [text, other]),
            SHARD_BYTES,
            "list of sources was train-0 and is train-0 train-1",
        ),
        (configure(tokenizer, [other]), SHARD_BYTES, r"train-0: name was .*a.jsonl and is .*other.jsonl"),
        (configure(tokenizer, [changed]), SHARD_BYTES, r"train-0: (name|inputs) was "),
        (configure(tokenizer, [text], on_error="skip"), SHARD_BYTES, "on_error was raise and is skip"),
    ]
    for wrong, size, message in cases:
        with pytest.raises(UserError, match=rf"--output .*copy: holds another tokenisation \(.*{message}"):
            make(wrong, copy, shard_bytes=size)
    os.utime(text)
    with pytest.raises(UserError, match="train-0: inputs was"):
        make(config, copy)
    manifest = json.loads((copy / "manifest.json").read_bytes())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": "0123456789abcdef"}))
    with pytest.raises(UserError, match=r"tokenizer was 0123456789abcdef and is "):
        make(config, copy)


def test_other_folders_are_refused(text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = configure(tokenizer, [text])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "manifest.json").write_text('{"format": "parquet"}')
    (tmp_path / "file").touch()
    cases = {
        "full": "holds notes.txt and no tokenisation",
        "theirs": "manifest.json: is not of this command",
        "file/new": "cannot be written .Not a directory.",
    }
    for folder, message in cases.items():
        with pytest.raises(UserError, match=message):
            make(config, tmp_path / folder)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) in (
        [".lock", "notes.txt"],
        ["notes.txt"],
    )


def test_two_commands_do_not_share_an_output(text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    running = tokenize(configure(tokenizer, [text, text]), tmp_path / "out", 1, SHARD_BYTES)
    next(running)
    with pytest.raises(UserError, match=r"--output .*out: another process writes there"):
        make(configure(tokenizer, [text, text]), tmp_path / "out")
    assert list(running)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_bad_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """They end the command, or are left out, counted, and the rest is what it would be."""
    lines = json_lines(TEXTS).splitlines(keepends=True)
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "1.jsonl").write_bytes(b"".join(lines[:100]))
    (tmp_path / "bad" / "2.jsonl").write_bytes(b"".join([*lines[100:150], b"{oops\n", *lines[150:]]))
    (tmp_path / "good" / "1.jsonl").write_bytes(b"".join(lines))
    path = str(tmp_path / "bad")
    with pytest.raises(UserError, match=r"bad/2\.jsonl: line 51 is not JSON"):
        make(configure(tokenizer, [path]), tmp_path / "raised")
    make(configure(tokenizer, [path], on_error="skip"), tmp_path / "skipped")
    make(configure(tokenizer, [str(tmp_path / "good")]), tmp_path / "clean")
    assert shard_bytes_of(tmp_path / "skipped" / "train-0") == shard_bytes_of(tmp_path / "clean" / "train-0")
    manifest = json.loads((tmp_path / "skipped" / "train-0" / "manifest.json").read_bytes())
    assert manifest["skipped"] == {str(tmp_path / "bad" / "2.jsonl"): 1}


def test_sources_without_text(output: Path, text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(json_lines(["", ""]))
    (tmp_path / "bad.jsonl").write_bytes(b"{oops\n")
    shards = str(output / "train-0")
    cases = [
        (
            configure(tokenizer, [str(tmp_path / "empty.jsonl")]),
            r"data.train\[0\]: .*empty.jsonl holds no text",
        ),
        (
            configure(tokenizer, [text], (str(tmp_path / "bad.jsonl"),), on_error="skip"),
            r"data.validation\[0\]: no document of .*bad.jsonl can be read: .*line 1 is not JSON",
        ),
        (configure(tokenizer, [text, shards]), r"data.train\[1\]: .*train-0 holds token shards already"),
        (configure(tokenizer, []), "data.train is empty"),
    ]
    for number, (config, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            make(config, tmp_path / f"out-{number}")
    with pytest.raises(UserError, match="--workers 0: at least one"):
        make(configure(tokenizer, [text]), tmp_path / "out", workers=0)


@pytest.mark.parametrize(("limit", "where"), [(20_000, ".text"), (60_000, "train-0/000000")])
def test_a_full_disk(tokenizer: Tokenizer, text: str, tmp_path: Path, limit: int, where: str) -> None:
    """The system refuses larger files: first the text is one, then the shard."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" + RUN
    path = text
    if where != ".text":  # texts in parts that are small, so that only the shard is large
        path = str(tmp_path / "*.txt")
        for number, document in enumerate(t for t in TEXTS if t):
            (tmp_path / f"{number:03}.txt").write_text(document * 4)
        code = code.replace(
            "import sys", "import sys, mf_train.data.text.store as s; s._PART_BYTES = 10_000", 1
        )
    said = result(start_run(tokenizer, path, tmp_path / "out", code))
    assert said.startswith(f"UserError {tmp_path / 'out' / where}: cannot be written (File too large)")
    assert not list((tmp_path / "out" / "train-0").glob("*.bin")) and not list(tmp_path.rglob("*.partial"))


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command(
    tokenizer: Tokenizer, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Overrides stand where the usage says, after the options."""
    tree = {
        "model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "bits": 4, "expand_bits": 1},
        "data": {"train": [{"path": "gone.jsonl"}]},
        "tokenizer": {"path": str(tokenizer.path)},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    command = ["data", "tokenize", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--workers", "1", f"data.train=[{{path: {text}}}]"])
    assert ended.value.code == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == f"  - path: {tmp_path / 'out' / 'train-0'}"
    assert open_output(tmp_path / "out" / "train-0", tokenizer).num_documents == len([t for t in TEXTS if t])
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2 and "gone.jsonl" in capsys.readouterr().err


def test_progress_on_a_terminal(tokenizer: Tokenizer, long_text: str, tmp_path: Path) -> None:
    """One line that is written over."""
    import pty

    ours, theirs = pty.openpty()
    process = start_run(tokenizer, long_text, tmp_path / "out", stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1000):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    lines = shown.decode().strip().split("\r")
    assert all(line.startswith("data.train[0]: ") for line in lines)
    assert " MB/s, " in lines[-1] and " left" in lines[-1] and "\n" not in shown.decode().strip()


def test_errors_of_workers_keep_their_kind(tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    part = prepare_part(find_files(text, "k"), "text", "raise", tmp_path)
    gone = dataclasses.replace(part, path=tmp_path / "gone")
    cases: list[tuple[Encode, type[Exception], str]] = [
        (
            Encode(SourceConfig(hub=str(tmp_path / "no")), "data.train[0]", "raise", (0, 0), (1, 0), "<u2"),
            UserError,
            r"data.train\[0\].hub: .* cannot be loaded",
        ),
        (Encode(gone, "data.train[0]", "raise", (0, 0), (1, 0), "<u2"), OSError, "No such file .*gone"),
        (
            Encode(part, "k", "raise", (0, 0), (1, 0), "words"),
            TrainingError,
            "a process failed while it tokenised documents 0 to 0",
        ),
    ]
    workers = Workers(1, tokenizer)
    try:
        for task, kind, message in cases:
            with pytest.raises(kind, match=message):
                workers.submit(task).result()
    finally:
        workers.close()
