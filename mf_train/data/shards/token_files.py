"""A source made of token shards (Megatron's .bin/.idx), read in place: documents in any order, many at a time."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mf_train.config import OnError
from mf_train.data.documents import Chunk, Tokens
from mf_train.data.files.access import OpenFiles, read_exactly, read_into, with_retries
from mf_train.data.shards.shard import Shard, open_shard
from mf_train.errors import UserError

SUFFIXES = (".bin", ".idx")
MANIFEST = "manifest.json"
MANIFEST_FORMAT = "memoryformer token shards 1"

_PAGE = 64  # neighbouring documents whose places are read together
_PAGES = 2048  # pages in each of the two generations that are kept: 8 MB in all
_PREFETCH_BYTES = 4 << 20
_OPENERS = 16  # threads: opening waits for the file system
_SAMPLES = 64  # documents in the fingerprint
_SAMPLED_TOKENS = 1024

# Of 64 consecutive documents: each one's .bin, first byte and number of tokens.
_Page = tuple[list[str], memoryview, memoryview]


class TokenFiles:
    """The documents of many shards in order, as `Source` says; a `start` is in tokens.

    Every document ends with end of text: it is added when the stored document does not end with it. So an empty
    stored document gives one end of text.
    Reads with pread through at most 128 descriptors: a file that is cut while it is read is an error, not a
    signal. Memory: one chunk in the shards' type and 8 MB of the documents' places, whatever the number of shards
    and documents. Used from one thread.
    """

    num_bytes: int | None
    num_tokens: int | None
    starts_are_tokens = True

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        end_of_text_id: int,
        vocab_size: int,
        skipped: dict[str, int],
    ) -> None:
        self.name = name
        self.num_files = len(shards)
        self.num_documents = sum(shard.num_documents for shard in shards)
        self.num_stored_tokens = sum(shard.num_tokens for shard in shards)
        self.num_bytes = self.num_tokens = None
        self.skipped = skipped
        self.left_out: Sequence[str] = ()
        self._shards = shards
        self._firsts = [0, *accumulate(shard.num_documents for shard in shards)]
        self._end_of_text_id = end_of_text_id
        self._vocab_size = vocab_size
        self._dtype = np.dtype(shards[0].dtype)
        self._files = OpenFiles()
        self._raw = np.empty(0, self._dtype)
        self._pages: dict[int, _Page] = {}
        self._older_pages: dict[int, _Page] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read: a worker process gets the shards as they were opened."""
        return self.__dict__ | {"_raw": np.empty(0, self._dtype), "_pages": {}, "_older_pages": {}}

    def read(self, documents: Sequence[int], start: int, wanted: int) -> Chunk:
        """`wanted` tokens of `documents`, or all, or a few more: ends of text that are not stored do not count.

        Raises UserError for an id outside the vocabulary and for a damaged index, naming shard and document;
        OSError when a file cannot be read; IndexError for a document number out of range.
        """
        assert wanted >= 1
        stops, cut = self._fill(documents, start, wanted)
        raw = self._raw[: stops[-1]]
        self._check_ids(raw, documents, start, stops)
        tokens, offsets = self._end_documents(raw, stops, len(stops) - (1 if cut else 0))
        pieces = len(stops)
        places = [(0, start), *zip(range(1, pieces), repeat(0))]
        if cut:
            return Chunk(tokens, offsets, places, (pieces - 1, places[-1][1] + offsets[-1] - offsets[-2]))
        return Chunk(tokens, offsets, places, (pieces, 0))

    def _fill(self, documents: Sequence[int], start: int, wanted: int) -> tuple[list[int], bool]:
        """Reads stored tokens into `_raw`: where each document's end there, and whether the last is not at its end."""
        if len(self._raw) < wanted:
            self._raw = np.empty(wanted, self._dtype)
        buffer = self._raw.data.cast("B")
        itemsize = self._dtype.itemsize
        files, preadv = self._files, os.preadv
        stops: list[int] = []
        stop = 0
        for document in documents:
            page = self._pages.get(document // _PAGE)
            paths, begins, counts = page or self._find_page(document // _PAGE)
            entry = document % _PAGE
            path, begin, count = paths[entry], begins[entry], counts[entry]
            if start:
                begin += start * itemsize
                count -= start
                if count < 0:
                    raise UserError(
                        f"{path}: document {document} of {self.name} has fewer than {start} tokens"
                    )
                start = 0
            cut = count > wanted - stop
            if cut:
                count = wanted - stop
            place = buffer[stop * itemsize : (stop + count) * itemsize]
            try:
                complete = preadv(files.descriptor(path), (place,), begin) == len(place)
            except OSError:
                complete = False
            if not complete:
                read_into(files, path, place, begin)
            stop += count
            stops.append(stop)
            if stop == wanted:
                return stops, cut
        return stops, False

    def _check_ids(
        self, raw: npt.NDArray[Any], documents: Sequence[int], start: int, stops: list[int]
    ) -> None:
        if not len(raw) or (raw.max() < self._vocab_size and (raw.dtype.kind == "u" or raw.min() >= 0)):
            return
        position = int(np.argmax((raw < 0) | (raw >= self._vocab_size)))
        piece = bisect_right(stops, position)
        document = documents[piece]
        shard = bisect_right(self._firsts, document) - 1
        token = position - (stops[piece - 1] if piece else -start)
        raise UserError(
            f"{self._shards[shard].bin}: document {document - self._firsts[shard]} has id {raw[position]} at token "
            f"{token}, but the vocabulary has {self._vocab_size} ids: it was made with another tokenizer"
        )

    def _end_documents(
        self, raw: npt.NDArray[Any], stops: list[int], complete: int
    ) -> tuple[Tokens, list[int]]:
        """int32 tokens and offsets of the pieces, with an end of text after the first `complete` that lack it."""
        ends = np.array(stops)
        if len(raw):
            lacks = raw[ends - 1] != self._end_of_text_id
            lacks[0] |= stops[0] == 0  # nothing is stored: what stands before belongs to another document
            lacks[1:] |= ends[1:] == ends[:-1]
        else:
            lacks = np.ones(len(stops), np.bool_)
        lacks[complete:] = False
        if not lacks.any():
            return raw.astype(np.int32), [0, *stops]
        ends += np.cumsum(lacks)
        offsets = [0, *ends.tolist()]
        tokens = np.empty(offsets[-1], np.int32)
        begin = 0
        for offset, stop in zip(offsets, stops):  # noqa: B905 (the last offset is the end)
            tokens[offset : offset + stop - begin] = raw[begin:stop]
            begin = stop
        tokens[ends[lacks] - 1] = self._end_of_text_id
        return tokens, offsets

    def _find_page(self, number: int) -> _Page:
        """The page, kept for later; pages that were not asked for while `_PAGES` others came are forgotten."""
        page = self._older_pages.get(number) or self._read_page(number)
        if len(self._pages) >= _PAGES:
            self._older_pages, self._pages = self._pages, {}
        self._pages[number] = page
        return page

    def _read_page(self, number: int) -> _Page:
        first, last = number * _PAGE, min((number + 1) * _PAGE, self.num_documents)
        if not 0 <= first < last:
            raise IndexError(f"{self.name} has {self.num_documents} documents: there is no document {first}")
        paths: list[str] = []
        begins, counts = [], []
        index = bisect_right(self._firsts, first) - 1
        while first < last:
            shard, offset = self._shards[index], self._firsts[index]
            end = min(last, self._firsts[index + 1])
            if first < end:
                bounds = shard.boundaries(self._files, first - offset, end - offset)
                self._prefetch(shard.bin, int(bounds[0]), int(bounds[-1]))
                paths += [shard.bin] * (end - first)
                begins.append(bounds[:-1])
                counts.append((bounds[1:] - bounds[:-1]) // self._dtype.itemsize)
                first = end
            index += 1
        return paths, np.concatenate(begins).data, np.concatenate(counts).data

    def _prefetch(self, path: str, begin: int, end: int) -> None:
        """Neighbours are read soon after each other, but not in order: the disk shall read them at once."""
        size = min(end - begin, _PREFETCH_BYTES)
        try:
            os.posix_fadvise(self._files.descriptor(path), begin, size, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # advice only; what is wrong with the file shows when it is read

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the numbers of documents and stored tokens and a sample of documents: cheap, not a full hash.

        It depends on the stored tokens only: moving or splitting the shards or another type does not change it.
        """
        digest = hashlib.blake2b(
            f"{self.num_documents} {self.num_stored_tokens}".encode("ascii"), digest_size=8
        )
        samples = min(self.num_documents, _SAMPLES)
        for sample in range(samples):  # the first, the last and evenly between
            document = sample * (self.num_documents - 1) // max(1, samples - 1)
            index = bisect_right(self._firsts, document) - 1
            shard, local = self._shards[index], document - self._firsts[index]
            begin, end = shard.boundaries(self._files, local, local + 1).tolist()
            size = min(end - begin, _SAMPLED_TOKENS * shard.itemsize)
            tokens = np.frombuffer(read_exactly(self._files, shard.bin, begin, size), shard.dtype)
            digest.update(((end - begin) // shard.itemsize).to_bytes(8, "little"))
            digest.update(tokens.astype("<i8").tobytes())
        return digest.hexdigest()


def open_token_files(
    paths: Iterable[str | Path],
    end_of_text_id: int,
    vocab_size: int,
    on_error: OnError,
    name: str,
    key: str,
    tokenizer_fingerprint: str,
) -> TokenFiles:
    """Open shards, named by their .bin, their .idx or both, as one source in the order of the names given.

    Reads headers and sizes only: milliseconds a shard, whatever its size. A `manifest.json` of `memoryformer data
    tokenize` beside a shard is held against `tokenizer_fingerprint` and the shard.
    Raises UserError naming `key` or the file: shards that are not whole (`on_error` "skip" leaves documents out,
    as `open_shard` says, and counts them by .bin in `skipped`), types that differ, another tokenizer, no documents.
    """
    prefixes = list(dict.fromkeys(_prefix(str(path)) for path in paths))
    with ThreadPoolExecutor(_OPENERS) as pool:
        manifests = _read_manifests({*map(os.path.dirname, prefixes)}, tokenizer_fingerprint, pool)
        opened = list(pool.map(open_shard, prefixes, repeat(on_error)))
    skipped = {f"{prefix}.bin": left for prefix, (_, left) in zip(prefixes, opened, strict=True) if left}
    shards = [shard for shard, _ in opened if shard is not None]
    if not sum(shard.num_documents for shard in shards):
        left = f" ({sum(skipped.values())} were left out)" if skipped else ""
        raise UserError(f"{key}: {name} holds no documents{left}: remove the source or fill it")
    for shard in shards:
        if shard.dtype != shards[0].dtype:
            raise UserError(
                f"{key}: {shards[0].bin} holds {np.dtype(shards[0].dtype)} and {shard.bin} "
                f"{np.dtype(shard.dtype)}: make them two sources"
            )
    source = TokenFiles(name, shards, end_of_text_id, vocab_size, skipped)
    records = [manifests[os.path.dirname(shard.bin)].get(_name(shard)) for shard in shards]
    _count_from_manifests(source, shards, records)
    return source


def _prefix(path: str) -> str:
    assert path.endswith(SUFFIXES), path
    return path[:-4]


def _name(shard: Shard) -> str:
    return os.path.basename(shard.bin)[:-4]


def _read_manifests(
    folders: Iterable[str], tokenizer_fingerprint: str, pool: ThreadPoolExecutor
) -> dict[str, dict[str, dict[str, Any]]]:
    """The shards that our own manifests describe, by folder and name."""
    paths = {folder: os.path.join(folder, MANIFEST) for folder in folders}
    contents = dict(zip(paths, pool.map(_read_if_there, paths.values()), strict=True))
    parsed = {b"": dict[str, dict[str, Any]]()}  # fetched shards have a copy of the same manifest each
    for folder, content in contents.items():
        if content not in parsed:
            parsed[content] = _parse_manifest(content, paths[folder], tokenizer_fingerprint)
    return {folder: parsed[content] for folder, content in contents.items()}


def _read_if_there(path: str) -> bytes:
    try:
        return with_retries(Path(path).read_bytes, path)
    except FileNotFoundError:
        return b""


def _parse_manifest(content: bytes, path: str, tokenizer_fingerprint: str) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads(content)
    except ValueError:
        return {}  # some other tool's, like one without our mark
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        return {}
    if not manifest["complete"]:
        raise UserError(f"{path}: tokenising was not finished: run 'memoryformer data tokenize' again")
    if manifest["tokenizer"] != tokenizer_fingerprint:
        raise UserError(
            f"{path}: these shards were made with tokenizer {manifest['tokenizer']}, but tokenizer.path is "
            f"{tokenizer_fingerprint}: set it to the one that made them, or tokenise again"
        )
    return {shard["name"]: shard for shard in manifest["shards"]}


def _count_from_manifests(
    source: TokenFiles, shards: Sequence[Shard], records: Sequence[dict[str, Any] | None]
) -> None:
    """Sets the exact counts when every shard is described, having checked that it is the one described."""
    known = [record for record in records if record is not None]
    for shard, record in zip(shards, records, strict=True):
        if record is None or shard.bin in source.skipped:
            continue
        here = (shard.num_documents, shard.num_tokens)
        if here != (record["documents"], record["tokens"]):
            raise UserError(
                f"{shard.bin}: has {here[0]} documents and {here[1]} tokens, but {MANIFEST} beside it says "
                f"{record['documents']} and {record['tokens']}: copy the shard and the manifest again"
            )
    if len(known) == len(records) and not source.skipped:
        source.num_tokens = sum(record["tokens"] for record in known)
        source.num_bytes = sum(record["text_bytes"] for record in known)
