"""Resuming at step 10^6 of a source list of 100 GB reads what the next batch needs: nothing is replayed.

The lists are simulated: 1600 names of one file of 64 MiB, which has real content. All documents have the same
number of tokens, so the state after any number of steps, and the batch that follows, can be written down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mf_train.config import DataConfig, SourceConfig
from mf_train.data.files.input_files import InputFile, find_files
from mf_train.data.shards.shard import TokenShardWriter
from mf_train.data.stream.order import WindowOrder
from mf_train.data.stream.stream import Position, TokenStream
from mf_train.data.text.store import _part_key, open_documents, parts_of
from mf_train.data.tokenizer import Tokenizer
from tests.data.texts import write_json_lines

FILES = 1600
STREAMS = 64
SEQUENCE = 2048
STEP = 10**6
WINDOW = 1024  # documents: data.block_documents * data.window_blocks
SHARD_DOCUMENTS = 2**15  # in a file, of 1024 tokens as uint16
TEXT_DOCUMENTS, TEXT_BYTES = 2**14, 4096  # in a file, of each

# Prints seconds and bytes read from opening the stream to the first batch, and the batch.
RESUME = """
import json, sys, time
import mf_train.data.text.store, mf_train.data.shards.token_files
from mf_train.config import DataConfig, SourceConfig
from mf_train.data.stream.stream import TokenStream
from mf_train.data.tokenizer import Tokenizer

def read():
    return int(open("/proc/self/io").readline().split()[1])

job = json.load(sys.stdin)
tokenizer = Tokenizer(job["tokenizer"])
tokenizer.encode("its tables")
data = DataConfig(train=(SourceConfig(path=job["path"]),), cache=job["cache"], logical_streams=job["streams"])
bytes_before, start = read(), time.perf_counter()
stream = TokenStream(data, tokenizer, job["sequence"], job["streams"], job["rank"], job["ranks"])
stream.load_state_dict(job["state"])
batch = stream.next_batch()
seconds, bytes_read = time.perf_counter() - start, read() - bytes_before
json.dump({"seconds": seconds, "bytes": bytes_read, "batch": batch.tolist()}, sys.stdout)
"""


@dataclass
class Corpus:
    """A simulated source; document n holds the tokens of `documents[n % len(documents)]`, end of text included."""

    path: str
    cache: str
    documents: np.ndarray  # [documents of a file, tokens of each]

    def data(self, sources: int = 1) -> DataConfig:
        return DataConfig(
            train=(SourceConfig(path=self.path),) * sources, cache=self.cache, logical_streams=STREAMS
        )

    def place(self, rows: int) -> tuple[int, int]:
        """Where a stream is after so many rows: documents read, tokens of the next one."""
        return divmod(rows * SEQUENCE, self.documents.shape[1])

    def position(self, rows: int, *, starts_are_tokens: bool) -> Position:
        """As the state says it. Text counts tokens from a segment's beginning: that is the document's here."""
        documents, token = self.place(rows)
        within = (token, 0) if starts_are_tokens else (0, token)
        return Position(rows, documents, *divmod(documents, WINDOW), *within)

    def row(self, rows: int, stream: int) -> np.ndarray:
        """The row after so many rows of a stream."""
        order = WindowOrder(
            seed=0,
            source=0,
            num_documents=FILES * len(self.documents),
            streams=STREAMS,
            block_documents=64,
            window_blocks=16,
        )
        documents, token = self.place(rows)
        window, passed = divmod(documents, WINDOW)
        numbers = order.window(stream, window) + order.window(stream, window + 1)
        assert len(numbers) == 2 * WINDOW
        coming = self.documents[np.array(numbers[passed : passed + 8]) % len(self.documents)]
        return coming.ravel()[token : token + SEQUENCE + 1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """107 GB of token shards: 52 million documents."""
    folder = tmp_path_factory.mktemp("shards")
    numbers = np.arange(SHARD_DOCUMENTS, dtype=np.uint32)[:, None]
    documents = ((7 * numbers + np.arange(1024, dtype=np.uint32)) % 4095 + 1).astype(np.uint16)
    documents[:, -1] = 0
    with TokenShardWriter(folder / "0000", "uint16") as writer:
        writer.write(documents.tobytes(), documents.shape[1] * np.arange(1, SHARD_DOCUMENTS + 1))
        writer.finish()
    for number in range(1, FILES):
        for suffix in (".bin", ".idx"):
            os.link(folder / f"0000{suffix}", folder / f"{number:04}{suffix}")
    return Corpus(f"{folder}/*.bin", str(folder), documents)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Corpus:
    """107 GB of text that has been prepared: 26 million documents. Only the first file it came from has content."""
    folder = tmp_path_factory.mktemp("text")
    path, cache = f"{folder}/*.jsonl", folder / "cache"
    rest = (" of these United States" * 200)[: TEXT_BYTES - 8]
    texts = [f"{number:08d}{rest}" for number in range(TEXT_DOCUMENTS)]
    size = os.path.getsize(write_json_lines(folder / "0000.jsonl", texts))
    files = find_files(path, "")
    assert len(open_documents(files, "text", "raise", cache, path, "")) == TEXT_DOCUMENTS
    for number in range(1, FILES):
        with open(folder / f"{number:04}.jsonl", "wb") as file:
            file.truncate(size)
    prepared = [(file, file.name.removeprefix(_key(files))) for file in (cache / "text").iterdir()]
    for group in parts_of(find_files(path, ""))[1:]:
        for file, suffix in prepared:
            os.link(file, file.with_name(_key(group) + suffix))

    digits = [tokenizer.encode(str(digit)) for digit in range(10)]  # a token each
    after = tokenizer.encode(texts[0])[8:]
    documents = [[*(digits[int(digit)][0] for digit in text[:8]), *after, 0] for text in texts]
    return Corpus(path, str(cache), np.array(documents, np.uint16))


def _key(files: list[InputFile]) -> str:
    assert len(files) == 1
    return _part_key(files, "text", "raise")


@pytest.fixture(params=["shards", "text"])
def corpus(request: pytest.FixtureRequest) -> Corpus:
    found: Corpus = request.getfixturevalue(request.param)
    return found


def state_after(corpus: Corpus, stream: TokenStream, step: int) -> dict[str, Any]:
    """The state after `step` batches of a row of each stream and, of several sources, as many rows of each."""
    sources = len(stream.sources)
    position = corpus.position(step // sources, starts_are_tokens=stream.sources[0].starts_are_tokens)
    streams = {str(number): [position] * sources for number in range(STREAMS)}
    return {"step": step, "identity": stream.identity(), "streams": streams}


def test_the_state_is_the_one_that_reading_makes(corpus: Corpus, tokenizer: Tokenizer) -> None:
    stream = TokenStream(corpus.data(), tokenizer, SEQUENCE, STREAMS)
    for step in range(3):
        batch = stream.next_batch()
        assert np.array_equal(batch, [corpus.row(step, number) for number in range(STREAMS)])
    assert stream.state_dict() == state_after(corpus, stream, 3)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count bytes read")
@pytest.mark.parametrize("ranks", [1, 64])
def test_nothing_is_replayed(corpus: Corpus, tokenizer: Tokenizer, ranks: int) -> None:
    rank = ranks // 2
    state = state_after(corpus, TokenStream(corpus.data(), tokenizer, SEQUENCE, STREAMS), STEP)
    job = {
        "tokenizer": str(tokenizer.path),
        "path": corpus.path,
        "cache": corpus.cache,
        "streams": STREAMS,
        "sequence": SEQUENCE,
        "rank": rank,
        "ranks": ranks,
        "state": state,
    }
    done = subprocess.run(
        [sys.executable, "-c", RESUME], input=json.dumps(job), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    numbers = range(rank, STREAMS, ranks)
    print(f"{len(numbers)} streams: {result['seconds']:.2f} s, {result['bytes'] / 1e6:.2f} MB read")
    assert np.array_equal(result["batch"], [corpus.row(STEP, number) for number in numbers])
    # Opening looks at every file; a stream's chunk and what leads to it are less than 100 kB. The rows before
    # would be 4 GB of every stream, an index or all ends of documents of the list 200 MB or more.
    assert result["bytes"] < FILES * 1000 + len(numbers) * 100_000


def test_the_state_is_kilobytes(shards: Corpus, tokenizer: Tokenizer) -> None:
    sources = 22
    stream = TokenStream(shards.data(sources), tokenizer, SEQUENCE, STREAMS)
    stream.load_state_dict(state_after(shards, stream, STEP * sources))
    size = len(json.dumps(stream.state_dict()))
    print(f"{sources} sources x {STREAMS} streams: {size} bytes of JSON")
    assert size < 64 * sources * STREAMS + 1000 * sources
