"""Remote token shards, which are read at random, copied to the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mf_train.data.files.cache import (
    cache_errors,
    cache_folder,
    do_each_once,
    make_folder,
    open_temporary,
    temporary_name,
    try_lock,
)
from mf_train.data.files.input_files import (
    REMOTE_BLOCK_BYTES,
    InputFile,
    file_at,
    files_in,
    is_token_shard,
    without_query,
)
from mf_train.errors import UserError
from mf_train.files import publish


def local_files(files: Sequence[InputFile], cache: str | Path | None) -> list[Path]:
    """Paths of the files: their own, or those of copies in the cache where they are remote.

    A .bin of tokens has its .idx beside it, and the manifest.json that was beside it; when one of them changes or
    comes, all are copied again. Processes that want the same files share the copying, and copy each once.
    Raises UserError (the cache, a .bin without .idx), or OSError.
    """
    listed: dict[str, dict[str, InputFile | None]] = {}
    companions = [_companions(file, listed) for file in files]
    return do_each_once(len(files), lambda number: _fetch_if_free(files[number], companions[number], cache))


def _fetch_if_free(file: InputFile, companions: list[InputFile], cache: str | Path | None) -> Path | None:
    """The file's path, copied now unless it was before; None while another process copies it."""
    if not file.remote:
        return Path(file.name)
    versions = [(each.name, each.size, each.stamp) for each in (file, *companions)]
    identity = hashlib.blake2b(repr(versions).encode(), digest_size=16).hexdigest()
    folder = cache_folder(cache) / "shards" / identity
    path = folder / _local_name(file)
    if path.exists():
        return path
    with try_lock(folder.with_suffix(".lock")) as mine:
        if not mine:
            return None
        if not path.exists():
            with cache_errors(folder):
                make_folder(folder)
            for companion in companions:
                _download(companion, folder)
            _download(file, folder)  # last: where it is, the others are
    return path


def _companions(file: InputFile, listed: dict[str, dict[str, InputFile | None]]) -> list[InputFile]:
    """What is read beside a .bin of tokens: its index and, where there is one, what says which tokens they are.

    `listed` keeps what is known of folders: thousands of shards are not asked for one by one where a server lists.
    """
    if not (file.remote and is_token_shard(file)):
        return []
    path = without_query(file.name)
    query = file.name[len(path) :]  # as a server may want for each file, such as a token
    folder = path.rpartition("/")[0]
    if folder not in listed:
        listed[folder] = {**files_in(folder)}
    known = listed[folder]
    name = PurePosixPath(path).with_suffix(".idx").name
    index = f"{folder}/{name}{query}"
    manifest = f"{folder}/manifest.json{query}"
    for url in (index, manifest):
        if url not in known:
            known[url] = None if file.name in known else file_at(url)
    if known[index] is None:
        raise UserError(f"{file.name} has no {name} beside it: put it there or leave out the .bin")
    return [companion for companion in (known[index], known[manifest]) if companion is not None]


def _local_name(file: InputFile) -> str:
    return PurePosixPath(without_query(file.name)).name


def _download(file: InputFile, folder: Path) -> None:
    path = folder / _local_name(file)
    temporary = temporary_name(path)
    try:
        with file.open() as source:
            with cache_errors(folder):
                target = open_temporary(temporary)
            with target:
                while piece := source.read(REMOTE_BLOCK_BYTES):
                    with cache_errors(folder):
                        target.write(piece)
                with cache_errors(folder):
                    publish(target, path)
    finally:
        temporary.unlink(missing_ok=True)
