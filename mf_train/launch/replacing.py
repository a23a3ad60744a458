"""Changes to files that are undone together where what they are for fails."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mf_train.errors import UserError


class Changes:
    """New folders, and files and folders that were replaced by others."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(4)
        self._made: list[Path] = []
        self._replaced: list[tuple[Path, Path]] = []

    def make_folder(self, folder: Path) -> None:
        """Make a folder and those above it. Raises UserError where one of them is a file."""
        for path in [*reversed(folder.parents), folder]:
            if path.is_dir():
                continue
            try:
                path.mkdir()
            except FileExistsError:
                if not path.is_dir():
                    raise UserError(f"{path}: is a file; choose another training.output_dir") from None
            else:
                self._made.append(path)

    def make_scratch(self, folder: Path) -> Path:
        """A hidden new folder in `folder`, gone at the end."""
        scratch = folder / f".new-{self._token}"
        scratch.mkdir()
        return scratch

    def replace(self, target: Path, new: Path) -> None:
        """Put `new` in the place of `target`, or nothing where `new` is not there."""
        before = target.with_name(f".before-{self._token}-{target.name}")
        self._replaced.append((target, before))
        if target.exists():
            os.rename(target, before)
        if new.exists():
            os.rename(new, target)

    def write(self, target: Path, text: str) -> None:
        """Have a file hold `text`."""
        new = target.with_name(f".new-{self._token}-{target.name}")
        try:
            new.write_text(text, encoding="utf-8")
            self.replace(target, new)
        finally:
            new.unlink(missing_ok=True)

    def keep(self) -> None:
        """What was replaced is deleted."""
        for _, before in self._replaced:
            _remove(before)

    def undo(self) -> None:
        """All is as it was."""
        for target, before in reversed(self._replaced):
            if before.exists():
                _remove(target)
                os.rename(before, target)
            else:
                _remove(target)
        for folder in reversed(self._made):
            with suppress(OSError):  # somebody else has put something into it
                folder.rmdir()


@contextmanager
def all_or_nothing(scratch_in: Path) -> Iterator[tuple[Changes, Path]]:
    """Changes that stay if the block ends well, and are undone if it raises; and a scratch folder in `scratch_in`."""
    changes = Changes()
    scratch = None
    try:
        changes.make_folder(scratch_in)
        scratch = changes.make_scratch(scratch_in)
        yield changes, scratch
    except BaseException:
        if scratch is not None:
            _remove(scratch)
        changes.undo()
        raise
    _remove(scratch)
    changes.keep()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
