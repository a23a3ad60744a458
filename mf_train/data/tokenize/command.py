"""`memoryformer data tokenize`: the text sources of a configuration to token shards, the same whoever works on them.

DIR/train-0, DIR/validation-0 and so on hold a source's shards and a manifest of them; DIR/manifest.json says what
was made of what. Finished shards are noted in DIR/train-0/.finished.jsonl: a command that was killed continues there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from mf_train import __version__
from mf_train.config import Config, OnError, SourceConfig
from mf_train.config.yaml_text import yaml_text
from mf_train.data.files.cache import try_lock
from mf_train.data.files.input_files import InputFile, find_files, is_token_shard
from mf_train.data.open_tokenizer import load_tokenizer
from mf_train.data.shards.shard import index_bytes, token_dtype
from mf_train.data.shards.token_files import MANIFEST, MANIFEST_FORMAT
from mf_train.data.tokenize.shards import TEXT_FOLDER, Place, ShardMaker, SourceWork
from mf_train.data.tokenize.worker import Workers, open_prepared
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from mf_train.files import beside, sync_file, write_whole

SHARD_BYTES = 256 << 20  # of text
_FORMAT = "memoryformer tokenisation 1"
_FINISHED = ".finished.jsonl"
_LOCK = ".lock"


def tokenize(config: Config, output: Path, workers: int, shard_bytes: int = SHARD_BYTES) -> Iterator[str]:
    """Write every training and validation source of `config` to a folder of shards in `output`; lines that say so.

    The bytes depend on the text, the tokenizer and `shard_bytes` (of text a shard) alone. Continues an
    unfinished `output`. Needs disk space for the shards and for the text of a few files.
    Raises UserError for what cannot be read, an output that holds something else or cannot be written, OSError,
    and TrainingError when one of the `workers` processes dies.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: at least one process has to work")
    tokenizer = load_tokenizer(config.tokenizer)
    with _output_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        (output / _LOCK).touch()
    with try_lock(output / _LOCK) as mine:
        if not mine:
            raise UserError(
                f"--output {output}: another process writes there: wait for it, or name another folder"
            )
        dtype = np.dtype(token_dtype(tokenizer.vocab_size))
        sources = _find_sources(config, tokenizer, output, str(dtype), shard_bytes)
        manifest = _describe(config, tokenizer, sources, str(dtype), shard_bytes)
        _claim(output, manifest)
        with closing(Workers(workers, tokenizer)) as pool:
            for source, described in zip(sources, manifest["sources"], strict=True):
                log = _Log(source.folder, dtype.itemsize)
                if not log.done:
                    _write_source_manifest(source.folder, manifest, described, log, complete=False)
                    _make(source, log, pool)
                described.update(log.totals())
                _write_source_manifest(source.folder, manifest, described, log, complete=True)
                yield _summary(source.folder, described)
        rmtree(output / TEXT_FOLDER, ignore_errors=True)
        _write_json(output / MANIFEST, {**manifest, "complete": True})
    yield "train on it with:"
    yield from _config_lines(sources)


def _find_sources(
    config: Config, tokenizer: Tokenizer, output: Path, dtype: str, shard_bytes: int
) -> list[SourceWork]:
    on_error, sources = config.data.on_error, []
    for part in ("train", "validation"):
        for index, source in enumerate(getattr(config.data, part)):
            key = f"data.{part}[{index}]"
            files, inputs = _find_inputs(source, key, on_error)
            folder = output / f"{part}-{index}"
            work = SourceWork(key, source, tokenizer, files, inputs, folder, on_error, dtype, shard_bytes)
            sources.append(work)
    if not sources:
        raise UserError("data.train is empty: name at least one source of text")
    return sources


def _find_inputs(source: SourceConfig, key: str, on_error: OnError) -> tuple[list[InputFile], str]:
    """The files, and a digest of what is read and how."""
    files: list[InputFile] = []
    identity: list[Any] = [source.text_field, on_error]
    if source.hub is not None:
        documents = open_prepared(source, on_error, key)
        identity += [source.hub, source.hub_config, source.split, documents.fingerprint]
    else:
        files = find_files(source.path or "", key)
        if is_token_shard(files[0]):
            raise UserError(f"{key}: {source.path} holds token shards already: leave the source out")
        identity += [[file.identity, file.size, file.stamp] for file in files]
    return files, hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()


def _describe(
    config: Config, tokenizer: Tokenizer, sources: Sequence[SourceWork], dtype: str, shard_bytes: int
) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "complete": False,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text_id": tokenizer.end_of_text_id,
        "dtype": dtype,
        "shard_bytes": shard_bytes,
        "on_error": config.data.on_error,
        "versions": {"mf_train": __version__, tokenizer.library: version(tokenizer.library)},
        "sources": [
            {
                "folder": source.folder.name,
                "name": source.name,
                "text_field": source.config.text_field,
                "files": len(source.files),
                "inputs": source.inputs,
            }
            for source in sources
        ],
    }


def _claim(output: Path, manifest: dict[str, Any]) -> None:
    """Refuses a folder that holds something else, and puts the manifest into an empty one."""
    path = output / MANIFEST
    if not path.exists():
        own = (_LOCK, beside(path, "partial").name)
        others = sorted(child.name for child in output.iterdir() if child.name not in own)
        if others:
            raise UserError(
                f"--output {output}: holds {others[0]} and no tokenisation: name an empty or new folder"
            )
        _write_json(path, manifest)
        return
    try:
        before = json.loads(path.read_bytes())
    except ValueError:
        before = {}
    if not isinstance(before, dict) or before.get("format") != _FORMAT:
        raise UserError(f"{path}: is not of this command: name an empty or new folder")
    for what, was, now in _differences(before, manifest):
        raise UserError(
            f"--output {output}: holds another tokenisation ({what} was {was} and is {now}): "
            "name another folder, or remove this one"
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in ("tokenizer", "shard_bytes", "dtype", "on_error"):
        if before[key] != now[key]:
            yield key, before[key], now[key]
    for library in now["versions"].keys() - {"mf_train"}:
        if before["versions"].get(library) != now["versions"][library]:
            yield library, before["versions"].get(library), now["versions"][library]
    folders = [[source["folder"] for source in manifest["sources"]] for manifest in (before, now)]
    if folders[0] != folders[1]:
        yield "the list of sources", " ".join(folders[0]), " ".join(folders[1])
        return
    for was, source in zip(before["sources"], now["sources"], strict=True):
        if was["inputs"] != source["inputs"]:
            # "inputs": a file's size or time of change, or a data set's content
            key = next((key for key in ("name", "text_field", "files") if was[key] != source[key]), "inputs")
            yield f"{source['folder']}: {key}", was[key], source[key]


class _Log:
    """What is finished of a source: a line a part and a shard, good for as long as the shards are there."""

    def __init__(self, folder: Path, itemsize: int) -> None:
        self.after: Place = (0, 0)  # the place after the last finished shard
        self.done = False
        self._records: list[dict[str, Any]] = []
        self._folder = folder
        self._path = folder / _FINISHED
        with _output_errors(folder):
            folder.mkdir(exist_ok=True)
            self._read(itemsize)
            self._remove_unfinished()
            write_whole(self._path, b"".join(map(_line, self._records)))

    @property
    def shards(self) -> list[dict[str, Any]]:
        return [record["shard"] for record in self._records if "shard" in record]

    def add(self, record: dict[str, Any]) -> None:
        """Note a part, a shard or, as {"done": true}, the end: durably."""
        self._take(record)
        with _output_errors(self._folder), self._path.open("ab") as file:
            file.write(_line(record))
            sync_file(file)

    def totals(self) -> dict[str, Any]:
        """Sums over the shards, and what was skipped of each file."""
        shards = self.shards
        sums = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "text_bytes")}
        skipped = {file: count for part in self._parts() for file, count in part["skipped"].items()}
        return {**sums, "shards": len(shards), "skipped": skipped}

    def reason(self) -> str | None:
        """Why the first document that was skipped was."""
        return next((part["reason"] for part in self._parts() if part["reason"]), None)

    def _parts(self) -> list[dict[str, Any]]:
        return sorted((record for record in self._records if "part" in record), key=lambda part: part["part"])

    def _read(self, itemsize: int) -> None:
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.exists() else []
        for record in map(json.loads, lines):
            if "shard" in record and not self._is_there(record["shard"], itemsize):
                break
            self._take(record)
        if not self.done:  # parts from here on are prepared again
            self._records = [r for r in self._records if "part" not in r or r["part"] < self.after[0]]

    def _is_there(self, shard: dict[str, Any], itemsize: int) -> bool:
        sizes = {".bin": shard["tokens"] * itemsize, ".idx": index_bytes(shard["documents"])}
        paths = {self._folder / f"{shard['name']}{suffix}": size for suffix, size in sizes.items()}
        return all(path.exists() and path.stat().st_size == size for path, size in paths.items())

    def _take(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        self.done = self.done or "done" in record
        if "after" in record:
            part, document = record["after"]
            self.after = part, document

    def _remove_unfinished(self) -> None:
        names = {shard["name"] for shard in self.shards}
        for path in self._folder.iterdir():
            if path.suffix == ".partial" or (path.suffix in (".bin", ".idx") and path.stem not in names):
                path.unlink()


def _make(source: SourceWork, log: _Log, workers: Workers) -> None:
    rmtree(source.folder.with_name(TEXT_FOLDER), ignore_errors=True)
    ShardMaker(source, workers, len(log.shards), log.after, log.add).run()
    if not log.totals()["documents"]:
        if reason := log.reason():
            raise UserError(f"{source.key}: no document of {source.name} can be read: {reason}")
        raise UserError(f"{source.key}: {source.name} holds no text: remove the source or fill it")
    log.add({"done": True})


def _write_source_manifest(
    folder: Path, manifest: dict[str, Any], described: dict[str, Any], log: _Log, *, complete: bool
) -> None:
    """What lies beside the shards: `open_token_files` reads it, and trains on none that is not complete."""
    common = {key: value for key, value in manifest.items() if key != "sources"}
    own = {"format": MANIFEST_FORMAT, "complete": complete, **described, "shards": log.shards}
    _write_json(folder / MANIFEST, common | own)


def _summary(folder: Path, described: dict[str, Any]) -> str:
    documents, tokens, size = described["documents"], described["tokens"], described["text_bytes"]
    line = (
        f"{folder}: {documents:,} documents, {tokens:,} tokens, {size:,} bytes of text "
        f"({size / tokens:.2f} a token), {described['shards']} shards"
    )
    if described["skipped"]:
        line += f"; {sum(described['skipped'].values()):,} documents left out of {len(described['skipped'])} files"
    return line


def _config_lines(sources: Sequence[SourceWork]) -> list[str]:
    data: dict[str, Any] = {}
    for source in sources:
        entry: dict[str, Any] = {"path": str(source.folder)}
        part = source.folder.name.split("-")[0]
        if part == "train":
            entry["weight"] = source.config.weight
        data.setdefault(part, []).append(entry)
    return yaml_text({"data": data}, width=1000).splitlines()


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with _output_errors(path.parent):
        write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


@contextmanager
def _output_errors(folder: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output: {folder} cannot be written ({error.strerror or error}): free space there, or name another"
        ) from None
