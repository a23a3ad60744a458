"""Compiles C++ or CUDA sources once and keeps the library in the user's cache folder.

A wheel for one kind of machine may hold libraries compiled before (wheel.py). Their names are those that the cache
would have, so one that was made of other sources or with other flags is never loaded.
"""

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
PREBUILT = Path(__file__).parent / "prebuilt"

Commands = Sequence[Sequence[list[str]]]  # command lines in stages: those of a stage run side by side


class UnsupportedError(ValueError):
    """A backend cannot compute with these tensors, or not on this machine; the message says why."""


class BuildError(Exception):
    """A library that could not be compiled; the message says why and what would help."""


def file_name(name: str, sources: Sequence[Path], flags: Sequence[str], machine: str) -> str:
    """Of a library: with a digest of the sources' contents, the flags and the kind of machine, so that another version
    never loads it. It says nothing of where the package lies: each launched run has a copy of its own.
    """
    digest = hashlib.sha256("\0".join([machine, *flags]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return f"{name}-{digest.hexdigest()[:16]}.so"


def compile_once(
    name: str, sources: Sequence[Path], flags: Sequence[str], commands: Callable[[Path], Commands]
) -> Path:
    """The shared library that `commands(output)` make: compiled before, from the cache, or compiled now.

    Of several processes one compiles and the others wait; the file is complete or absent.

    Args:
        name: what the library is called, such as "cpu-avx512".
        sources: every file whose contents decide the result, headers included.
        flags: the compiler's, which decide it too.
        commands: the compiler's command lines, given the file to write; other files go into its folder.

    Raises:
        BuildError: the compiler is missing or fails, or the cache folder cannot be written.
    """
    file = file_name(name, sources, flags, platform.machine())
    folder = user_cache() / "kernels"
    library = folder / file
    for found in (PREBUILT / file, library):
        if found.is_file():
            return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{name}.lock"):
            if not library.is_file():
                print(f"compiling {file} once, into {folder}", file=sys.stderr, flush=True)
                compile_library(library, commands)
    except OSError as error:
        raise BuildError(
            f"{folder}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written"
        ) from None
    return library


def compile_library(library: Path, commands: Callable[[Path], Commands]) -> None:
    """Make a library by `commands(output)`, whole or not at all. Raises BuildError where a compiler fails."""
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
