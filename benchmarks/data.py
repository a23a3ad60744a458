"""`python -m benchmarks.data`: text and token shards to packed batches, against the bare work and other readers.

text: JSON lines on disk to batches, against sentencepiece's `encode` called once a document on strings in memory.
tokens: shards to shuffled batches of 8 x 2048, against a memory map, megatron-core's IndexedDataset and MosaicML
Streaming, which need no packing: they read samples of 2048 tokens that were cut beforehand, into int64.
memory: what a stream adds to a fresh process at most. wait: what waiting for data takes of a run's steps.
Alternatives take turns; files are in the page cache.
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import machine
from benchmarks.memory import reset_peak, status
from benchmarks.tables import table
from mf_train.config import Config, DataConfig, ModelConfig, SourceConfig, TokenizerConfig, TrainingConfig
from mf_train.data.shards.shard import TokenShardWriter, token_dtype
from mf_train.data.stream.stream import TokenStream
from mf_train.data.tokenizer import Tokenizer
from mf_train.data.workers.batches import BatchReader
from mf_train.run_folder import read_metrics

SEQUENCE, BATCH = 2048, 8
STEP_TOKENS = SEQUENCE * BATCH
WARM_UP = 40  # batches: 5 rows of each of 64 streams, so that they do not all read at once any more
TEXT_TOKENS = 2_500_000  # tokenised in each turn, at least
SHARD_TOKENS = 50_000_000  # read from shards in each turn
SHORT_DOCUMENT = 1000  # tokens
PARTS = ("text", "tokens", "memory", "wait")


@dataclass
class Corpus:
    """Documents in memory, and as JSON lines in a folder; `tokens` with end of text, as int32."""

    texts: list[str]
    tokens: list[np.ndarray]
    folder: Path

    @property
    def num_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))


def read_corpus(path: str, tokenizer: Tokenizer, folder: Path) -> Corpus:
    """The documents of a source, written to `folder` as JSON lines in files of about 8 MB."""
    from mf_train.data.sources import open_text

    source = SourceConfig(path=path)
    documents = open_text(source, "--data", DataConfig(train=(source,), cache=str(folder / "read")))
    texts = [documents.text(i).decode() for i in range(len(documents))]
    shutil.rmtree(folder / "read")
    files = -(-documents.num_bytes // 2**23)
    for number in range(files):
        part = texts[number * len(texts) // files : (number + 1) * len(texts) // files]
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        (folder / f"{number:03}.jsonl").write_text(lines, encoding="utf-8")
    end = [tokenizer.end_of_text_id]
    return Corpus(texts, [np.array(tokenizer.encode(text) + end, np.int32) for text in texts], folder)


def configuration(
    path: Path | str, tokenizer: Tokenizer, cache: Path | None = None, workers: int = 0
) -> Config:
    data = DataConfig(train=(SourceConfig(path=str(path)),), cache=cache and str(cache), workers=workers)
    return Config(
        model=ModelConfig(vocab_size=tokenizer.vocab_size, sequence_length=SEQUENCE),
        data=data,
        tokenizer=TokenizerConfig(path=str(tokenizer.path)),
        training=TrainingConfig(global_batch_size=BATCH),
    )


def take_turns(alternatives: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Million tokens a second of each turn; an alternative times itself, without its preparations."""
    rates: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, function in alternatives.items():
            rates[name].append(function() / 1e6)
    return rates


def rate(steps: int, next_batch: Callable[[], object]) -> float:
    """Tokens a second of this many batches."""
    start = time.perf_counter()
    for _ in range(steps):
        next_batch()
    return steps * STEP_TOKENS / (time.perf_counter() - start)


def open_stream(config: Config, tokenizer: Tokenizer) -> TokenStream:
    return TokenStream(config.data, tokenizer, SEQUENCE, BATCH)


def stream_rate(config: Config, tokenizer: Tokenizer, steps: int) -> float:
    """Of a TokenStream, when it runs."""
    stream = open_stream(config, tokenizer)
    rate(WARM_UP, stream.next_batch)
    return rate(steps, stream.next_batch)


def reader_rate(config: Config, tokenizer: Tokenizer, steps: int) -> float:
    """Of a BatchReader, when it runs."""
    reader = BatchReader(open_stream(config, tokenizer), config)
    try:
        rate(WARM_UP, reader.next_batch)
        return rate(steps, reader.next_batch)
    finally:
        reader.close()


# Text ----------------------------------------------------------------------------------------------------------------


def text(corpus: Corpus, tokenizer: Tokenizer, rounds: int) -> list[str]:
    cache = corpus.folder / "cache"
    config = functools.partial(configuration, corpus.folder / "*.jsonl", tokenizer, cache)
    epochs = -(-TEXT_TOKENS // corpus.num_tokens)
    epoch = corpus.num_tokens // STEP_TOKENS  # batches
    preparations: list[float] = []

    def from_nothing() -> float:
        shutil.rmtree(cache, ignore_errors=True)
        start = time.perf_counter()
        stream = open_stream(config(), tokenizer)
        preparations.append(time.perf_counter() - start)
        for _ in range(epoch):
            stream.next_batch()
        return epoch * STEP_TOKENS / (time.perf_counter() - start)

    def read(workers: int) -> float:
        return reader_rate(config(workers=workers), tokenizer, epochs * epoch)

    alternatives = {
        "sentencepiece encode": lambda: encode_rate(corpus, tokenizer, epochs, processes=1),
        "one epoch from JSON lines, empty cache": from_nothing,
        "TokenStream": lambda: stream_rate(config(), tokenizer, epochs * epoch),
        "BatchReader, a thread": lambda: read(0),
        "BatchReader, 1 worker": lambda: read(1),
        "BatchReader, 2 workers": lambda: read(2),
        "sentencepiece encode, 2 processes": lambda: encode_rate(corpus, tokenizer, epochs, processes=2),
    }
    rates = take_turns(alternatives, rounds)
    medians = [statistics.median(values) for values in rates.values()]
    bare, _, _, _, one, two, bare_two = medians
    bytes_a_token = corpus.num_bytes / corpus.num_tokens
    rows = [
        [*row, f"{m * bytes_a_token:.2f}"] for row, m in zip(rate_rows(rates, bare), medians, strict=True)
    ]
    title = (
        f"text: {len(corpus.texts):,} documents, {corpus.num_bytes / 1e6:.1f} MB, "
        f"{corpus.num_tokens / 1e6:.1f} M tokens"
    )
    return [
        table([title, *RATE_HEADER, "MB/s"], rows),
        f"preparing the text was {statistics.median(preparations):.2f} s of the epoch; 2 workers / 1: {two / one:.2f}, "
        f"sentencepiece in 2 processes / 1: {bare_two / bare:.2f}",
    ]


def encode_rate(corpus: Corpus, tokenizer: Tokenizer, epochs: int, processes: int) -> float:
    """Tokens a second of bare sentencepiece, a call a document, in each of the processes at once."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(tokenizer.path))

    def encode() -> None:
        for text in corpus.texts * epochs:
            processor.encode(text)

    start = time.perf_counter()
    if processes == 1:
        encode()
    else:
        children = [multiprocessing.get_context("fork").Process(target=encode) for _ in range(processes)]
        for child in children:
            child.start()
        for child in children:
            child.join()
    return processes * epochs * corpus.num_tokens / (time.perf_counter() - start)


RATE_HEADER = ("M tokens/s", "least", "most", "ratio")


def rate_rows(rates: Mapping[str, Sequence[float]], baseline: float) -> list[list[str]]:
    """Medians, spread and the ratio of the median to `baseline`."""
    return [
        [name, *(f"{v:.3g}" for v in (statistics.median(r), min(r), max(r), statistics.median(r) / baseline))]
        for name, r in rates.items()
    ]


# Token shards --------------------------------------------------------------------------------------------------------


def tokens(corpus: Corpus, tokenizer: Tokenizer, rounds: int, count: int, streaming: str | None) -> list[str]:
    dtype = token_dtype(tokenizer.vocab_size)
    whole, short, sampled = make_shards(corpus, tokenizer, count, dtype)
    samples = whole.stat().st_size // np.dtype(dtype).itemsize // SEQUENCE
    steps = min(SHARD_TOKENS // STEP_TOKENS, samples // BATCH)
    order = np.random.default_rng(0).permutation(samples)[: steps * BATCH].reshape(steps, BATCH)
    mean = corpus.num_tokens // len(corpus.texts)

    def stream(path: Path) -> float:
        return stream_rate(configuration(path, tokenizer), tokenizer, steps)

    def read(workers: int) -> float:
        return reader_rate(configuration(whole, tokenizer, workers=workers), tokenizer, steps)

    alternatives = {
        "memory map": lambda: on_one_core(lambda: memory_map_rate(sampled, dtype, order)),
        f"TokenStream, documents of {mean:,} tokens on average": lambda: on_one_core(lambda: stream(whole)),
        f"TokenStream, documents of {SHORT_DOCUMENT:,} tokens": lambda: on_one_core(lambda: stream(short)),
        "BatchReader, a thread": lambda: read(0),
        "BatchReader, 1 worker": lambda: read(1),
    }
    missing = []
    try:
        dataset = indexed_dataset(sampled)
        alternatives["megatron-core IndexedDataset"] = lambda: on_one_core(
            lambda: sample_rate(dataset.__getitem__, order)
        )
    except ImportError as error:
        missing.append(["megatron-core IndexedDataset", "not run", "", "", str(error)])
    if streaming:
        peer = [streaming, str(Path(__file__).with_name("data_streaming.py")), str(corpus.folder / "mds")]
        run_peer([*peer, "write", str(sampled), dtype])
        alternatives["MosaicML Streaming"] = lambda: on_one_core(
            lambda: float(run_peer([*peer, "read", str(steps)]))
        )
    else:
        missing.append(["MosaicML Streaming", "not run", "", "", "no --streaming-python"])
    rates = take_turns(alternatives, rounds)
    rows = rate_rows(rates, statistics.median(rates["memory map"]))
    title = f"tokens: {samples * SEQUENCE / 1e6:.0f} M {np.dtype(dtype)}, shuffled, batches of {BATCH} x {SEQUENCE}"
    return [
        table([title, *RATE_HEADER], rows + missing),
        "one core each; BatchReader: and the trainer's",
    ]


def on_one_core(function: Callable[[], float]) -> float:
    """Called on one of this process's cores: threads that share Python's lock hinder each other less there."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        return function()
    finally:
        os.sched_setaffinity(0, cores)


def make_shards(corpus: Corpus, tokenizer: Tokenizer, count: int, dtype: str) -> tuple[Path, Path, Path]:
    """About `count` tokens as the corpus' documents, as documents of `SHORT_DOCUMENT` and as samples of `SEQUENCE`."""
    times = -(-count // corpus.num_tokens)
    flat = np.tile(np.concatenate(corpus.tokens).astype(dtype), times)
    flat = flat[: len(flat) // SEQUENCE * SEQUENCE]
    ends = np.cumsum(np.tile([len(tokens) for tokens in corpus.tokens], times))
    whole = write_shard(corpus.folder / "whole", flat, ends)
    sampled = write_shard(corpus.folder / "samples", flat, np.arange(SEQUENCE, len(flat), SEQUENCE))
    ends = np.arange(SHORT_DOCUMENT, len(flat), SHORT_DOCUMENT)
    flat[ends - 1] = tokenizer.end_of_text_id
    return whole, write_shard(corpus.folder / "short", flat, ends), sampled


def write_shard(prefix: Path, flat: np.ndarray, ends: np.ndarray) -> Path:
    """Documents that end at `ends` as far as there are tokens, and at the last token."""
    ends = np.append(ends[ends < len(flat)], len(flat))
    with TokenShardWriter(prefix, flat.dtype.str) as writer:
        writer.write(flat.tobytes())
        writer.end_documents(np.diff(ends, prepend=0))
        writer.finish()
    return prefix.with_name(f"{prefix.name}.bin")


def memory_map_rate(path: Path, dtype: str, order: np.ndarray) -> float:
    tokens = np.memmap(path, dtype, "r")
    return sample_rate(lambda sample: tokens[sample * SEQUENCE : (sample + 1) * SEQUENCE], order)


def sample_rate(read: Callable[[int], np.ndarray], order: np.ndarray) -> float:
    """Of batches of samples by number, [batches, BATCH]."""
    batches = iter(order.tolist())

    def next_batch() -> np.ndarray:
        batch = np.empty((BATCH, SEQUENCE), np.int64)
        for row, sample in enumerate(next(batches)):
            batch[row] = read(sample)
        return batch

    return rate(len(order), next_batch)


def indexed_dataset(path: Path) -> Sequence[np.ndarray]:
    """megatron-core's, without what it prints."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        return IndexedDataset(str(path.with_suffix("")))


def run_peer(command: Sequence[str]) -> str:
    """The last line of what another environment's Python prints."""
    return "".join(machine.run_program(command).splitlines()[-1:])


# Memory and waiting --------------------------------------------------------------------------------------------------


def memory(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    """Each measured in a process of its own, after every cursor has read."""
    whole = write_shard(
        corpus.folder / "resident",
        np.concatenate(corpus.tokens).astype(token_dtype(tokenizer.vocab_size)),
        np.cumsum([len(tokens) for tokens in corpus.tokens]),
    )
    rows = []
    for name, path in (("text", corpus.folder / "*.jsonl"), ("token shards", whole)):
        for sources in (1, 8):
            config = configuration(path, tokenizer, corpus.folder / "cache")
            config = replace(config, data=replace(config.data, train=config.data.train * sources))
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                growth, state = pool.submit(_grow, config).result()
            cursors = config.data.logical_streams * sources
            figures = [f"{growth / 1e6:.1f}", f"{growth / cursors / 1e3:.1f}", f"{bound(config) / 1e3:.1f}"]
            rows.append([f"{name}, {sources} sources x 64 streams", *figures, f"{state / cursors:.0f}"])
    return [table(["memory", "MB", "kB a cursor", "bound", "bytes of state a cursor"], rows)]


def bound(config: Config) -> int:
    """Bytes of a stream's cursor in a source, as TokenStream's docstring states them."""
    chunk = 4 * max(16384, 4 * (SEQUENCE + 1))
    window = config.data.block_documents * config.data.window_blocks * (8 + 32)  # a list of Python's int
    return chunk + 4 * (SEQUENCE + 1) + window


def _grow(config: Config) -> tuple[int, int]:
    """Bytes that a stream adds to this process at most, and those of its state as JSON."""
    tokenizer = Tokenizer(config.tokenizer.path)
    tokenizer.encode("the first call makes tables of its own")
    open_stream(config, tokenizer)  # imports what it needs
    reset_peak()
    before = status("VmRSS")
    stream = open_stream(config, tokenizer)
    for _ in range(2 * WARM_UP * len(config.data.train)):
        stream.next_batch()
    return status("VmHWM") - before, len(json.dumps(stream.positions()))


def wait(run: Path) -> list[str]:
    steps = [record for record in read_metrics(run) if "data_wait_seconds" in record][1:]
    waited, took = (sum(step[key] for step in steps) for key in ("data_wait_seconds", "step_seconds"))
    return [
        f"wait: {waited:.3f} s of {took:.1f} s of {len(steps)} steps without the first: {waited / took:.2%}"
        f" (the longest {1e3 * max(step['data_wait_seconds'] for step in steps):.1f} ms)"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="configs/quickstart-text/train/*.jsonl.gz", help="documents to use")
    parser.add_argument("--tokenizer", default="tokenizer")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, %(default)s by default")
    parser.add_argument(
        "--tokens", type=int, default=200_000_000, help="in the shards, %(default)s by default"
    )
    parser.add_argument(
        "--streaming-python", metavar="PATH", help="of an environment with mosaicml-streaming"
    )
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a run whose waiting for data is reported")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/DATE-data.txt")
    options = parser.parse_args()

    parts = []
    if {"text", "tokens", "memory"} & {*options.only}:
        tokenizer = Tokenizer(options.tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            corpus = read_corpus(options.data, tokenizer, Path(folder))
            if "text" in options.only:
                parts += text(corpus, tokenizer, options.rounds)
            if "tokens" in options.only:
                parts += tokens(corpus, tokenizer, options.rounds, options.tokens, options.streaming_python)
            if "memory" in options.only:
                parts += memory(corpus, tokenizer)
    if options.run and "wait" in options.only:
        parts += wait(options.run)
    machine.report("data", parts, save=options.save)


if __name__ == "__main__":
    main()
