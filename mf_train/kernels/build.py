"""Compiles C++ or CUDA sources once and keeps the library in the user's cache folder."""

import fcntl
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mf_train.files import user_cache
from mf_train.processors import usable_processors

SOURCES = Path(__file__).parent / "csrc"

Commands = Sequence[Sequence[list[str]]]  # command lines in stages: those of a stage run side by side


class BuildError(Exception):
    """A library that could not be compiled; the message says why and what would help."""


def compile_once(name: str, sources: Sequence[Path], commands: Callable[[Path], Commands]) -> Path:
    """The shared library that `commands(output)` make, from the cache or compiled now.

    The file's name holds a digest of the sources' contents and of the commands, so that another version never loads
    it. Of several processes one compiles and the others wait; the file is complete or absent.

    Args:
        name: what the library is called, such as "cpu-avx512".
        sources: every file whose contents decide the result, headers included.
        commands: the compiler's command lines, given the file to write; other files go into its folder.

    Raises:
        BuildError: the compiler is missing or fails, or the cache folder cannot be written.
    """
    # wherever the package lies: each launched run has a copy of its own
    lines = [line for stage in commands(Path(name)) for line in stage]
    words = [word.replace(str(SOURCES), SOURCES.name) for line in lines for word in line]
    digest = hashlib.sha256("\0".join([platform.machine(), *words]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = user_cache() / "kernels"
    library = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{name}.lock"):
            if not library.is_file():
                _compile(library, commands)
    except OSError as error:
        raise BuildError(
            f"{folder}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written"
        ) from None
    return library


def _compile(library: Path, commands: Callable[[Path], Commands]) -> None:
    print(f"compiling {library.name} once, into {library.parent}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        output = Path(scratch) / library.name
        with ThreadPoolExecutor(usable_processors()) as pool:
            for stage in commands(output):
                for done in list(pool.map(_run, stage)):
                    if done.returncode:
                        log = library.with_suffix(".log")
                        log.write_text(f"{' '.join(done.args)}\n{done.stderr}", encoding="utf-8")
                        raise BuildError(
                            f"{done.args[0]} failed (status {done.returncode}): {log} has its messages"
                        )
        os.replace(output, library)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise BuildError(f"there is no compiler {command[0]} on the PATH") from None


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process of this machine at a time; where the file system has no locks, several may compile the same."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
