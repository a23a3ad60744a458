"""Remote token shards, which are read at random, copied to the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mf_train.data.cache import cache_folder, naming_cache, publish, share_work, try_lock
from mf_train.data.files import REMOTE_BLOCK_BYTES, InputFile, file_beside, is_token_shard


def local_files(files: Sequence[InputFile], cache: str | Path | None) -> list[Path]:
    """Paths of the files: their own, or those of copies in the cache where they are remote.

    A .bin of tokens has its .idx beside it, and the manifest.json that was beside it. Processes that want the
    same files share the copying, and copy each once. Raises UserError (the cache), or OSError.
    """
    return share_work(len(files), lambda number: _fetch_if_free(files[number], cache))


def _fetch_if_free(file: InputFile, cache: str | Path | None) -> Path | None:
    """The file's path, copied now unless it was before; None while another process copies it."""
    if not file.remote:
        return Path(file.name)
    identity = hashlib.blake2b(repr((file.name, file.size, file.stamp)).encode(), digest_size=16).hexdigest()
    folder = cache_folder(cache) / "shards" / identity
    path = folder / PurePosixPath(file.name).name
    if path.exists():
        return path
    with try_lock(folder.with_suffix(".lock")) as mine:
        if not mine:
            return None
        if not path.exists():
            with naming_cache(folder):
                folder.mkdir(exist_ok=True)
            for companion in _companions(file):
                _download(companion, folder)
            _download(file, folder)  # last: where it is, the others are
    return path


def _companions(file: InputFile) -> list[InputFile]:
    """What is read beside a .bin of tokens: its index and, where there is one, what says which tokens they are."""
    if not is_token_shard(file):
        return []
    index = PurePosixPath(file.name).with_suffix(".idx").name
    found = (file_beside(file, name) for name in (index, "manifest.json"))
    return [companion for companion in found if companion is not None]


def _download(file: InputFile, folder: Path) -> None:
    path = folder / PurePosixPath(file.name).name
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with file.open() as source:
            with naming_cache(folder):
                target = temporary.open("wb")
            with target:
                while piece := source.read(REMOTE_BLOCK_BYTES):
                    with naming_cache(folder):
                        target.write(piece)
                with naming_cache(folder):
                    publish(target, temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
